import importlib
import inspect
import itertools
import json
import math
import pkgutil
import time
import weakref
from itertools import pairwise

import diffusers
import diffusers.schedulers.deprecated
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, ScoreSdeVeScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin
from networks import MIXTURE, GaussianMixture, to_model_output, train_sigmas
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_diffusers import AnnealedLangevinScheduler, scheduling_annealed_langevin

CHAINS = 20_000


def run_chain(scheduler, denoised, x, seed=0):
    """The sampling loop of a pipeline, for a network that knows the denoised estimate at every sigma."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_begin_index(0)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        output = to_model_output(denoised(x, sigma), x, sigma, scheduler.config.prediction_type)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


# --- The papers, number for number ---


def plain_langevin(score, x, sigmas, num_steps, update, seed):
    generator = torch.Generator().manual_seed(seed)
    for sigma in sigmas:
        for _ in range(num_steps):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = update(x, score(x, sigma), noise, sigma**2 / sigmas[-1] ** 2)
    return x


def ncsn_2019(x, score, noise, ratio, epsilon=2e-5):
    alpha = epsilon * ratio
    return x + alpha / 2 * score + math.sqrt(alpha) * noise


def ncsn_code(x, score, noise, ratio, step_lr=2e-5):
    step_size = step_lr * ratio
    return x + step_size * score + math.sqrt(2 * step_size) * noise


def ncsnv2(x, score, noise, ratio):
    return ncsn_code(x, score, noise, ratio, step_lr=6.2e-6)


@pytest.mark.parametrize(
    ("update", "sigma_max", "num_levels", "num_steps", "step_size", "denoise"),
    [
        (ncsn_2019, 1.0, 10, 100, 2e-5 / (2 * 0.01**2), False),
        (ncsn_code, 1.0, 10, 100, 2e-5 / 0.01**2, False),
        (ncsnv2, 50.0, 232, 5, 6.2e-6 / 0.01**2, True),
    ],
)
@pytest.mark.parametrize("prediction_type", ["score", "v_prediction"])
def test_the_papers_chains(update, sigma_max, num_levels, num_steps, step_size, denoise, prediction_type):
    def score(x, sigma):
        return (MIXTURE.denoised(x, sigma) - x) / sigma**2

    start = torch.rand(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigmas = np.geomspace(sigma_max, 0.01, num_levels)
    expected = plain_langevin(score, start, sigmas, num_steps, update, seed=2)
    if denoise:
        expected = expected + sigmas[-1] ** 2 * score(expected, sigmas[-1])

    scheduler = AnnealedLangevinScheduler(
        num_train_timesteps=num_levels,
        sigma_max=sigma_max,
        noise_rule="euler_maruyama",
        num_langevin_steps=num_steps,
        step_size=step_size,
        denoise_final=denoise,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(num_levels)
    assert len(scheduler.timesteps) == num_levels * num_steps + denoise
    # sigmas in float64, as the plain chain has them: `scheduler.sigmas` are float32
    every_sigma = np.append(np.repeat(sigmas, num_steps), sigmas[-1:] if denoise else [])
    generator, x = torch.Generator().manual_seed(2), start
    for t, sigma in zip(scheduler.timesteps, every_sigma, strict=True):
        output = to_model_output(MIXTURE.denoised(x, sigma), x, sigma, prediction_type)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_technique_4_finds_the_step_size_of_ncsnv2():
    scheduler = AnnealedLangevinScheduler(noise_rule="euler_maruyama", num_langevin_steps=5)
    scheduler.set_timesteps(232)
    kappa = {row.kappa for row in scheduler.table[:-1]}
    assert len(kappa) == 1
    assert 1 - kappa.pop() == pytest.approx(6.2e-6 / 0.01**2, rel=0.02)


# --- The analytic oracle ---


def gaussian_recursion(scheduler, mean, variance, start_variance):
    """
    Mean and variance, along one eigenvector, of the chain's end for Gaussian data and the exact score.

    D = mean + g (x - mean) makes each step linear in the state (x - mean, D_ - mean), so the state's mean and 2×2
    covariance follow exactly. Written from the rules of the design, with the table's sigma, kappa and c.
    """
    rows = scheduler.table
    second_order = scheduler.config.solver_order == 2 and scheduler.config.noise_rule == "consistent"
    sigmas = [row.sigma for row in rows]
    state, covariance = np.array([-mean, 0.0]), np.diag([start_variance, 0.0])
    level_before = None  # the level that D_ is from
    for i, row in enumerate(rows):
        gain = variance / (variance + row.sigma**2)
        kappa = row.kappa
        step = np.array([[kappa + (1 - kappa) * gain, 0.0], [0.0, 1.0]])
        leaves_level = i + 1 < len(rows) and sigmas[i + 1] < row.sigma
        if second_order and leaves_level:
            if level_before is not None:
                h, h_ = math.log(row.sigma / sigmas[i + 1]), math.log(level_before / row.sigma)
                b = -math.log(kappa) / h
                weight = 0.5 * (1 - kappa) * (1 - b * h / (2 * (b + 1)) + b * h**2 / (b + 6)) * h / h_
                step[0] += weight * np.array([gain, -1.0])
            step[1] = [gain, 0.0]
            level_before = row.sigma
        state = step @ state
        covariance = step @ covariance @ step.T + np.diag([row.c**2, 0.0])
    return mean + state[0], covariance[0, 0]


@pytest.mark.parametrize("noise_rule", ["consistent", "euler_maruyama"])
@pytest.mark.parametrize("solver_order", [1, 2])
@pytest.mark.parametrize(("num_levels", "num_steps"), [(50, 1), (20, 4)])
@pytest.mark.parametrize("denoise", [True, False])
def test_gaussian_chain_follows_its_recursion(noise_rule, solver_order, num_levels, num_steps, denoise):
    deviations = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    eigenvectors = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def denoised(x, sigma):
        gain = eigenvectors @ torch.diag(deviations**2 / (deviations**2 + sigma**2)) @ eigenvectors.T
        return mean + (x - mean) @ gain

    scheduler = AnnealedLangevinScheduler(
        noise_rule=noise_rule, solver_order=solver_order, num_langevin_steps=num_steps, denoise_final=denoise
    )
    scheduler.set_timesteps(num_levels)
    start = torch.randn(CHAINS, 3, dtype=torch.float64, generator=generator) * scheduler.init_noise_sigma
    along = run_chain(scheduler, denoised, start) @ eigenvectors
    for i, deviation in enumerate(deviations.tolist()):
        expected_mean, expected_variance = gaussian_recursion(
            scheduler, float(mean @ eigenvectors[:, i]), deviation**2, scheduler.init_noise_sigma**2
        )
        error = math.sqrt(expected_variance / CHAINS)
        assert abs(along[:, i].mean().item() - expected_mean) < 3 * error
        assert abs(along[:, i].var().item() - expected_variance) < 3 * expected_variance * math.sqrt(2 / CHAINS)


@pytest.mark.parametrize("deviation", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("r", [0.1, 0.6])
def test_stationary_variances(deviation, r):
    sigma = 0.5
    q = sigma**2 / (deviation**2 + sigma**2)
    factors = {"euler_maruyama": 1 / (1 - r * q / 2), "consistent": (2 - r) / (2 - r * q)}
    for noise_rule, factor in factors.items():
        scheduler = AnnealedLangevinScheduler(noise_rule=noise_rule, step_size=r, denoise_final=False)
        scheduler.set_timesteps(sigmas=[sigma], num_langevin_steps=10_000)
        _, variance = gaussian_recursion(scheduler, 0.0, deviation**2, 1.0)
        assert variance == pytest.approx((deviation**2 + sigma**2) * factor, rel=1e-6)


def exact_variances(scheduler, deviations):
    """
    The variances of the chain's end along eigenvectors with these deviations of Gaussian data of mean 0, through
    `scheduler.step` itself and without sampling error: with D = g x the end is linear in the start and in every step's
    noise, so one impulse for each of them, as a batch, gives all the coefficients. Their squares add up.
    """
    variances = torch.as_tensor(deviations, dtype=torch.float64) ** 2
    x = torch.zeros(len(scheduler.timesteps) + 1, len(variances), dtype=torch.float64)
    x[0] = scheduler.init_noise_sigma
    scheduler.set_begin_index(0)
    for i, (t, row) in enumerate(zip(scheduler.timesteps, scheduler.table, strict=True)):
        noise = torch.zeros_like(x)
        noise[i + 1] = 1
        denoised = x * variances / (variances + row.sigma**2)
        x = scheduler.step(denoised, t, x, variance_noise=noise).prev_sample
    return x.square().sum(0).numpy()


DEVIATIONS = np.geomspace(0.3, 3, 21)


def variance_error(deviations=DEVIATIONS, chain=None, **config):
    """The largest relative error of the variance over the deviations."""
    scheduler = AnnealedLangevinScheduler(prediction_type="sample", **config)
    scheduler.set_timesteps(**chain)
    return np.abs(exact_variances(scheduler, deviations) / np.square(deviations) - 1).max()


def test_impulses_and_recursion_agree():
    for num_steps in (1, 3):
        scheduler = AnnealedLangevinScheduler(prediction_type="sample")
        scheduler.set_timesteps(20, num_langevin_steps=num_steps)
        for deviation, variance in zip((0.3, 2.0), exact_variances(scheduler, [0.3, 2.0]), strict=True):
            _, expected = gaussian_recursion(scheduler, 0.0, deviation**2, scheduler.init_noise_sigma**2)
            assert variance == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("budget", "tolerance", "geometric"),  # the largest errors of the variance, by default and on geometric levels
    [(10, 0.21, 0.05), (20, 0.06, 0.006), (35, 0.03, 0.002), (50, 0.02, 0.002), (250, 0.002, 0.002)],
)
def test_variance_along_every_eigenvector(budget, tolerance, geometric):
    chain = {"num_inference_steps": budget}
    assert variance_error(chain=chain) < tolerance
    assert variance_error(chain=chain, rho=None) < geometric
    assert variance_error(chain=chain, rho=None, solver_order=1) > 10 * variance_error(chain=chain, rho=None)


@pytest.mark.parametrize(("num_levels", "solver_order", "b"), [(6, 2, 2), (10, 2, 2), (40, 2, 4), (40, 1, 2)])
def test_rate_follows_the_number_of_levels(num_levels, solver_order, b):
    scheduler = AnnealedLangevinScheduler(solver_order=solver_order)
    scheduler.set_timesteps(num_levels)
    for row, below in pairwise(scheduler.table[:-1]):
        assert row.kappa == pytest.approx((below.sigma / row.sigma) ** b)


@pytest.mark.parametrize("b", [1.0, 2.0, 3.5])
def test_order_of_convergence(b, monkeypatch):
    # the ladder begins and ends where the data's deviation, 1, no longer counts: only the steps' error is seen
    monkeypatch.setattr(scheduling_annealed_langevin, "langevin_rate", lambda *args: b)

    def errors(levels, solver_order):
        chains = [{"sigmas": levels(num)} for num in (80, 160, 320)]
        return np.array([variance_error([1.0], chain, solver_order=solver_order) for chain in chains])

    def karras(num):
        return np.linspace(1e3 ** (1 / 7), 1e-3 ** (1 / 7), num) ** 7

    first, second = errors(karras, 1), errors(karras, 2)
    assert np.all(np.abs(np.log2(first[:-1] / first[1:]) - 0.9) < 0.2)
    assert np.all(np.abs(np.log2(second[:-1] / second[1:]) - 2.1) < 0.15)
    assert np.all(second < first / 10)
    # q was derived for equal steps: on a geometric ladder nothing of the second order is left
    assert np.all(errors(lambda num: np.geomspace(1e3, 1e-3, num), 2) < 3e-4)


# With few steps the largest component takes more than its share, by the allowance, and the components are too narrow:
# their deviation, 0.15, is not much larger than the last level, 0.09.
@pytest.mark.parametrize(
    ("budget", "allowance", "tolerance"), [(10, 0.022, 0.3), (20, 0.012, 0.03), (50, 0.006, 0.03), (100, 0.003, 0.03)]
)
def test_default_finds_the_shares_and_deviations_of_a_mixture(budget, allowance, tolerance):
    scheduler = AnnealedLangevinScheduler()
    scheduler.set_timesteps(budget)
    assert len(scheduler.timesteps) == budget
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(CHAINS, 8, dtype=torch.float64, generator=generator) * scheduler.init_noise_sigma
    x = run_chain(scheduler, MIXTURE.denoised, start)
    weights = MIXTURE.weights.numpy()
    assert np.all(np.abs(MIXTURE.shares(x) - weights) < allowance + 3 * np.sqrt(weights * (1 - weights) / CHAINS))
    nearest = MIXTURE.responsibilities(x, 0.0).argmax(-1)
    for i, (mean, deviation) in enumerate(zip(MIXTURE.means, MIXTURE.deviations.tolist(), strict=True)):
        assert (x[nearest == i] - mean).std().item() == pytest.approx(deviation, rel=tolerance)


def test_consistent_rule_lands_on_the_next_noise_level():
    # For data that are one point, D is that point, and the sample's deviation is the noise level itself.
    point = GaussianMixture([1.0], [[0.3, -0.2]], [0.0])
    scheduler = AnnealedLangevinScheduler(num_langevin_steps=2, denoise_final=False)
    scheduler.set_timesteps(sigmas=[5.0, 2.0, 0.5])
    x = point.means + 5.0 * torch.randn(CHAINS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    for t, sigma, sigma_after in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        output = to_model_output(point.denoised(x, sigma), x, sigma, "v_prediction")
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        assert (x - point.means).std().item() == pytest.approx(sigma_after.item(), rel=3 * math.sqrt(1 / (4 * CHAINS)))


def test_denoise_final_ends_on_the_denoised_estimate():
    for noise_rule in ("consistent", "euler_maruyama"):
        scheduler = AnnealedLangevinScheduler(noise_rule=noise_rule, prediction_type="sample")
        scheduler.set_timesteps(sigmas=[1.0, 0.1])
        x = torch.randn(4, 1, 2, 2)
        for t in scheduler.timesteps:
            output = scheduler.step(torch.full_like(x, 0.7), t, x)
            x = output.prev_sample
        assert torch.equal(x, torch.full_like(x, 0.7))
        assert scheduler.sigmas[-1] == 0
        assert len(scheduler.timesteps) == (2 if noise_rule == "consistent" else 3)


# --- Ladders, configs and swaps ---


def json_reload(config):
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))


@pytest.mark.parametrize("arguments", [{}, {"sigma_max": 20.0, "num_train_timesteps": 10}, {"beta_schedule": "linear"}])
def test_config_equals_its_reload(tmp_path, arguments):
    scheduler = AnnealedLangevinScheduler(**arguments)
    scheduler.save_pretrained(tmp_path)
    reloaded = AnnealedLangevinScheduler.from_pretrained(tmp_path)
    # saving writes the class and the version into both; what is listed as a default is not saved
    assert reloaded.config["_use_default_values"] == []
    assert dict(reloaded.config) == {**scheduler.config, "_use_default_values": []}
    public = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert json_reload(scheduler.config) == public
    assert {k: reloaded.config[k] for k in public} == public


def test_ladder_is_geometric_and_alphas_follow():
    scheduler = AnnealedLangevinScheduler(num_train_timesteps=5, sigma_min=0.1, sigma_max=10.0)
    expected = torch.tensor([0.1, 10**-0.5, 1.0, 10**0.5, 10.0])
    torch.testing.assert_close(train_sigmas(scheduler), expected)
    torch.testing.assert_close(scheduler.alphas_cumprod, 1 / (1 + expected**2))
    torch.testing.assert_close(torch.cumprod(1 - scheduler.betas, 0), 1 / (1 + expected**2))
    assert len(scheduler) == 5


def test_timesteps_and_sigmas_convert_both_ways():
    for scheduler in (AnnealedLangevinScheduler(), AnnealedLangevinScheduler(beta_schedule="scaled_linear")):
        timesteps = torch.tensor([[0.0, 0.5], [333.25, 999.0]], dtype=torch.float64)
        sigmas = scheduler.t_to_sigma(timesteps)
        assert sigmas.shape == timesteps.shape
        torch.testing.assert_close(scheduler.sigma_to_t(sigmas), timesteps)
        torch.testing.assert_close(sigmas[0, 1].log(), train_sigmas(scheduler)[:2].double().log().mean())
    assert scheduler.t_to_sigma(0).item() == pytest.approx(scheduler.config.sigma_min)
    assert scheduler.t_to_sigma(5000).item() == pytest.approx(scheduler.config.sigma_max)
    assert scheduler.sigma_to_t(1e9).item() == 999
    by_sigma = AnnealedLangevinScheduler(conditioning="sigma")
    assert by_sigma.t_to_sigma(3.5) == 3.5
    assert by_sigma.sigma_to_t(3.5) == 3.5


def test_override_replaces_the_exported_ladder_but_not_a_users():
    scheduler = AnnealedLangevinScheduler()
    assert train_sigmas(AnnealedLangevinScheduler.from_config(scheduler.config, sigma_max=20.0))[-1] == pytest.approx(
        20
    )
    fewer = AnnealedLangevinScheduler.from_config(scheduler.config, num_train_timesteps=10)
    assert len(fewer.config.trained_betas) == 10
    through_ddim = DDIMScheduler.from_config(scheduler.config)
    again = AnnealedLangevinScheduler.from_config(through_ddim.config, sigma_min=0.02)
    assert train_sigmas(again)[0] == pytest.approx(0.02)

    betas = [0.1, 0.2, 0.4]
    own = AnnealedLangevinScheduler(trained_betas=np.array(betas))
    assert own.config.trained_betas == betas
    assert own.config.num_train_timesteps == 3
    for config in (own.config, json_reload(own.config), DDIMScheduler.from_config(own.config).config):
        reloaded = AnnealedLangevinScheduler.from_config(config)
        assert reloaded.config.trained_betas == betas
        torch.testing.assert_close(train_sigmas(reloaded)[-1], torch.tensor(math.sqrt(1 / (0.9 * 0.8 * 0.6) - 1)))
    with pytest.raises(ValueError, match=r"`sigma_max`=20.*contradicts.*set_timesteps"):
        AnnealedLangevinScheduler.from_config(own.config, sigma_max=20.0)

    linear = AnnealedLangevinScheduler(beta_schedule="linear")
    wider = AnnealedLangevinScheduler.from_config(linear.config, beta_end=0.03)
    assert wider.config.sigma_max > linear.config.sigma_max


@pytest.mark.parametrize("name", AnnealedLangevinScheduler._compatibles)
@pytest.mark.parametrize("saved", [False, True])
def test_swap_and_back(name, saved, caplog, tmp_path):
    diffusers.logging.enable_propagation()
    scheduler = AnnealedLangevinScheduler(sigma_max=30.0, noise_rule="euler_maruyama", prediction_type="epsilon")
    if saved:
        scheduler.save_pretrained(tmp_path)
        scheduler = AnnealedLangevinScheduler.from_pretrained(tmp_path)
    other = getattr(diffusers, name).from_config(scheduler.config)
    back = AnnealedLangevinScheduler.from_config(other.config)
    diffusers.logging.disable_propagation()
    assert "not expected" not in caplog.text
    torch.testing.assert_close(other.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-3, atol=0)
    assert other.config.prediction_type == "epsilon"
    assert {k: back.config[k] for k in scheduler.config} == dict(scheduler.config)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("saved", [False, True])
def test_ddpm_config_loads_as_it_is(schedule, saved):
    # a fresh config lists its defaults (epsilon, linear) as such, and other classes leave those out
    ddpm = DDPMScheduler() if schedule == "linear" else DDPMScheduler(beta_schedule=schedule)
    scheduler = AnnealedLangevinScheduler.from_config(json_reload(ddpm.config) if saved else ddpm.config)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.beta_schedule == schedule
    expected = ((1 - ddpm.alphas_cumprod.double()) / ddpm.alphas_cumprod.double()).sqrt()
    torch.testing.assert_close(train_sigmas(scheduler).double(), expected, rtol=2e-3, atol=0)
    again = DDPMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(again.betas, ddpm.betas, rtol=1e-5, atol=0)


# Stock classes whose configs describe a network with DDPM's time and scaling. DPMSolverSDEScheduler is another, where
# torchsde is installed.
READABLE = {
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
}


def every_stock_scheduler():
    """Also those that `diffusers` itself does not name; without those whose dependencies are missing."""
    found = {}
    for package in (diffusers.schedulers, diffusers.schedulers.deprecated):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if ".scheduling_" not in module.name or module.name.endswith("_flax"):
                continue
            try:
                module = importlib.import_module(module.name)
            except ImportError:
                continue
            for name, cls in inspect.getmembers(module, inspect.isclass):
                if issubclass(cls, ConfigMixin) and cls.__module__ == module.__name__:
                    found[name] = cls
    return found


STOCK = every_stock_scheduler()


def test_every_stock_class_was_found():
    assert {"ScoreSdeVpScheduler", "KarrasVeScheduler", "IPNDMScheduler", "DDIMScheduler"} <= STOCK.keys()
    assert STOCK.keys() >= READABLE - {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}


@pytest.mark.parametrize("name", sorted(STOCK.keys() & READABLE))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stock_config_means_what_its_class_means(name):
    if isinstance(getattr(diffusers, name), diffusers.utils.DummyObject):
        pytest.skip(f"{name} asks for a package that is not installed")
    stock = STOCK[name]()
    whole = json_reload(stock.config)
    if name == "ScoreSdeVeScheduler":
        expected, prediction_type, conditioning = torch.logspace(-2, math.log10(1348), 2000), "score", "sigma"
    else:
        alphas = torch.cumprod(1 - stock.betas.double(), 0)
        expected, prediction_type, conditioning = ((1 - alphas) / alphas).sqrt(), "epsilon", "timestep"
    for config in (stock.config, {**whole, "_class_name": name}, {"_class_name": name}, whole):
        scheduler = AnnealedLangevinScheduler.from_config(config)
        torch.testing.assert_close(train_sigmas(scheduler), expected.float(), rtol=2e-3, atol=0)
        assert scheduler.config.prediction_type == prediction_type
        assert scheduler.config.conditioning == conditioning
        assert scheduler.config.solver_order == 2
        for key in ("clip_sample", "clip_sample_range", "timestep_spacing"):
            default = inspect.signature(AnnealedLangevinScheduler).parameters[key].default
            assert scheduler.config[key] == whole.get(key, default)


def test_ddpm_configs_of_2022_mean_epsilon():
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    for given in ({"_class_name": "DDPMScheduler", "clip_sample": True, **config}, config):
        assert AnnealedLangevinScheduler.from_config(given).config.prediction_type == "epsilon"
    # in a folder, as everything else
    given = {"_class_name": "DDPMScheduler", "beta_start": 1e-3, "beta_end": 0.03, "trained_betas": None}
    scheduler = AnnealedLangevinScheduler.from_config(given)
    expected = DDPMScheduler(beta_start=1e-3, beta_end=0.03).alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=1e-3, atol=0)
    # what the caller says counts
    assert AnnealedLangevinScheduler.from_config(given, prediction_type="sample").config.prediction_type == "sample"


def test_foreign_config_in_a_folder(tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = AnnealedLangevinScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (scheduler.config.prediction_type, scheduler.config.clip_sample) == ("epsilon", True)
    expected = DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=1e-3, atol=0)
    again = AnnealedLangevinScheduler.from_pretrained(save(scheduler, tmp_path / "ours"))
    assert dict(again.config) == {**scheduler.config, "_use_default_values": []}


def save(scheduler, folder):
    scheduler.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "prediction_type", "beta_schedule"),
    [
        ({}, "v_prediction", "geometric"),
        ({"sigma_max": 5}, "v_prediction", "geometric"),
        ({"prediction_type": "epsilon", "rho": None}, "epsilon", "geometric"),
        ({"num_train_timesteps": 10, "clip_sample": True}, "v_prediction", "geometric"),
        ({"beta_schedule": "linear", "conditioning": "timestep"}, "v_prediction", "linear"),
        ({"beta_schedule": "linear"}, "epsilon", "linear"),
        ({"beta_start": 1e-4}, "epsilon", "linear"),
        ({"steps_offset": 1, "num_train_timesteps": 100}, "epsilon", "linear"),
        ({"sampling_eps": 1e-5, "snr": 0.15}, "score", "geometric"),
        ({"_class_name": "OursSubclassed", "noise_rule": "consistent"}, "v_prediction", "geometric"),
    ],
)
def test_config_without_a_class(config, prediction_type, beta_schedule):
    read = AnnealedLangevinScheduler.from_config(config).config
    assert (read.prediction_type, read.beta_schedule) == (prediction_type, beta_schedule)


def test_keys_tell_which_class_wrote_a_config():
    # PNDM's spacing is "leading", DEIS's "linspace"
    for key, spacing in (("skip_prk_steps", "leading"), ("lower_order_final", "linspace")):
        config = {"beta_schedule": "linear", key: True}
        assert AnnealedLangevinScheduler.from_config(config).config.timestep_spacing == spacing


@pytest.mark.parametrize("name", sorted(STOCK.keys() - READABLE))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stock_config_with_another_time_or_scaling_is_refused(name):
    with pytest.raises(ValueError, match=f"A config of {name} cannot be read.*DDPMScheduler"):
        AnnealedLangevinScheduler.from_config({"_class_name": name})
    if all(p.default is not p.empty for p in inspect.signature(STOCK[name]).parameters.values()):
        config = STOCK[name]().config  # names no class as yet
        with pytest.raises(ValueError, match=r"cannot be read|no class that can be read"):
            AnnealedLangevinScheduler.from_config(config)
    # one that was made for our network is no better: its samples are noise
    if name in ("IPNDMScheduler", "EDMEulerScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"):
        config = STOCK[name].from_config(AnnealedLangevinScheduler().config).config
        with pytest.raises(ValueError, match=f"A config of {name} cannot be read"):
            AnnealedLangevinScheduler.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "`use_flow_sigmas`=True is flow matching",
        ),
        (
            {"_class_name": "DEISMultistepScheduler", "prediction_type": "flow_prediction"},
            "`prediction_type`='flow",
        ),
        ({"use_flow_sigmas": True}, "`use_flow_sigmas`=True is flow matching"),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "prediction_type": "v_prediction",
                "timestep_type": "continuous",
                "sigma_min": 0.002,
                "sigma_max": 700.0,
            },
            "`timestep_type`='continuous'",
        ),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
            "`beta_schedule` must be .*not 'sigmoid'",
        ),
        ({"shift": 3.0, "num_train_timesteps": 1000}, "no class that can be read knows shift"),
        ({"sigma_data": 0.5, "sigma_max": 80.0, "rho": 7.0}, "no class that can be read knows sigma_data"),
        ({"original_inference_steps": 50, "beta_schedule": "linear"}, "knows original_inference_steps"),
        ({"beta_min": 0.1, "beta_max": 20}, "knows beta_max, beta_min"),
        (
            {"_class_name": "AnnealedLangevinDynamicsScheduler", "sigma_max": 1.0},
            "A config of AnnealedLangevinDynamics",
        ),
        ({"_class_name": "UNet2DModel"}, "A config of UNet2DModel cannot be read"),
        ({"_class_name": 5}, "`_class_name` must be the name of a class, not 5"),
        ({"_class_name": ["a"]}, "`_class_name` must be the name of a class"),
        ({"_use_default_values": 5}, "`_use_default_values` must be a list"),
        ([1, 2], r"A scheduler's config must be a dictionary, not \[1, 2\]"),
        (5, "A scheduler's config must be a dictionary, not 5"),
    ],
)
def test_unreadable_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AnnealedLangevinScheduler.from_config(config)


def test_defaults_of_a_class_that_is_not_installed_are_not_guessed(monkeypatch):
    class Missing(metaclass=diffusers.utils.DummyObject):
        _backends = ["torch", "torchsde"]

    Missing.__name__ = "DPMSolverSDEScheduler"
    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", Missing)
    config = {"_class_name": "DPMSolverSDEScheduler", "beta_schedule": "linear", "prediction_type": "epsilon"}
    with pytest.raises(ValueError, match=r"DPMSolverSDEScheduler lacks num_train_timesteps, beta_start.*torchsde"):
        AnnealedLangevinScheduler.from_config(config)
    config |= {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1}
    assert len(AnnealedLangevinScheduler.from_config(config)) == 100


@pytest.mark.parametrize(
    "name", [n for n in sorted(READABLE & STOCK.keys()) if "solver_order" in inspect.signature(STOCK[n]).parameters]
)
@pytest.mark.parametrize("ours", [1, 2])
def test_solver_order_of_another_solver_is_not_ours(name, ours, tmp_path):
    scheduler = AnnealedLangevinScheduler(solver_order=ours, noise_rule="euler_maruyama", rho=3.0)
    other = STOCK[name].from_config(scheduler.config, solver_order=3)
    assert other.config.solver_order == 3
    through_two = DDIMScheduler.from_config(other.config)
    from_disk = STOCK[name].from_pretrained(save(other, tmp_path))
    for config in (other.config, through_two.config, from_disk.config, json.loads(other.to_json_string())):
        back = AnnealedLangevinScheduler.from_config(config)
        assert {k: back.config[k] for k in scheduler.config} == dict(scheduler.config)
    # and is not ours by default either
    assert AnnealedLangevinScheduler.from_config(STOCK[name](solver_order=3).config).config.solver_order == 2


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_range_of_karras_levels_is_not_the_ladder(name):
    # both take sigma_min and sigma_max for the range in which they lay their own levels
    if "sigma_max" not in inspect.signature(STOCK[name]).parameters:
        pytest.skip("not in this version of diffusers")
    for scheduler in (AnnealedLangevinScheduler(sigma_max=30.0), AnnealedLangevinScheduler(beta_schedule="linear")):
        for changed in ({"sigma_min": 0.1, "sigma_max": 10.0}, {"sigma_min": None, "sigma_max": None}):
            other = STOCK[name].from_config(scheduler.config, use_karras_sigmas=True, **changed)
            back = AnnealedLangevinScheduler.from_config(other.config)
            assert {k: back.config[k] for k in scheduler.config} == dict(scheduler.config)
    stock = STOCK[name](sigma_min=0.1, sigma_max=10.0, use_karras_sigmas=True)
    scheduler = AnnealedLangevinScheduler.from_config(stock.config)
    assert scheduler.config.sigma_max == AnnealedLangevinScheduler(beta_schedule="linear").config.sigma_max


def test_what_was_kept_for_the_way_back_does_not_outlive_an_override():
    scheduler = AnnealedLangevinScheduler.from_config(
        AnnealedLangevinScheduler().config, solver_order=1, sigma_max=20.0
    )
    back = AnnealedLangevinScheduler.from_config(DDIMScheduler.from_config(scheduler.config).config)
    assert (back.config.solver_order, back.config.sigma_max) == (1, 20.0)
    # whatever stands there in somebody else's file is checked as any other value
    for kept in ({"sigma_max": "50"}, {"solver_order": [2]}):
        config = dict(DDIMScheduler.from_config(scheduler.config).config) | {"_annealed_langevin": kept}
        if "solver_order" in kept:
            with pytest.raises(ValueError, match="`solver_order` must be"):
                AnnealedLangevinScheduler.from_config(config)
        else:  # the ladder is then the betas'
            assert AnnealedLangevinScheduler.from_config(config).config.sigma_max == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("arguments", "edit", "message"),
    [
        ({}, {"sigma_max": 20.0}, "`sigma_max`=20.0 contradicts the ladder.*leave out `trained_betas`"),
        ({"sigma_max": 20.0}, {"sigma_max": 50.0}, "`sigma_max`=50.0 contradicts"),
        ({}, {"num_train_timesteps": 10}, "`num_train_timesteps`=10 contradicts the 1000 `trained_betas`"),
        ({"beta_schedule": "linear"}, {"sigma_min": 0.02}, "`sigma_min`=0.02 contradicts"),
    ],
)
def test_a_config_edited_by_hand_must_agree_with_itself(arguments, edit, message):
    config = json.loads(AnnealedLangevinScheduler(**arguments).to_json_string())
    AnnealedLangevinScheduler.from_config(config)
    with pytest.raises(ValueError, match=message):
        AnnealedLangevinScheduler.from_config({**config, **edit})


def test_repr_leaves_out_the_exported_betas():
    shown = repr(AnnealedLangevinScheduler(sigma_max=20.0))
    assert len(shown.splitlines()) < 30
    assert "trained_betas" not in shown
    assert '"sigma_max": 20.0' in shown
    assert "0.1,\n    0.2" in repr(AnnealedLangevinScheduler(trained_betas=[0.1, 0.2, 0.2]))
    many = AnnealedLangevinScheduler(trained_betas=np.linspace(1e-4, 0.02, 1000))
    assert '"trained_betas": "1000 betas from 0.0001 to 0.02"' in repr(many)
    assert len(repr(many).splitlines()) < 30
    assert len(json.loads(many.to_json_string())["trained_betas"]) == 1000


def test_zero_terminal_snr_is_refused():
    config = DDIMScheduler(rescale_betas_zero_snr=True).config
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        AnnealedLangevinScheduler.from_config(config)


@pytest.mark.parametrize("saved", [False, True])
def test_score_sde_ve_config(saved):
    config = ScoreSdeVeScheduler(sigma_max=380.0).config
    scheduler = AnnealedLangevinScheduler.from_config(json_reload(config) if saved else config, rho=None)
    assert (scheduler.config.conditioning, scheduler.config.prediction_type) == ("sigma", "score")
    assert len(scheduler) == 2000
    scheduler.set_timesteps(3)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([380.0, math.sqrt(3.8), 0.01]))
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1])


def test_fourier_unet_is_given_sigma_and_the_unscaled_sample():
    # the layout of the google/ncsnpp-* checkpoints: the network itself divides by the sigma it is given
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        time_embedding_type="fourier",
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        layers_per_block=1,
    ).eval()
    scheduler = AnnealedLangevinScheduler.from_config(ScoreSdeVeScheduler(sigma_max=50.0).config)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 8, 8) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            assert t == sigma
            assert torch.equal(scheduler.scale_model_input(x, t), x)
            score = unet(x, t).sample
            output = scheduler.step(score, t, x)
            torch.testing.assert_close(output.pred_original_sample, x + sigma**2 * score, rtol=1e-4, atol=1e-3)
            x = output.prev_sample
    assert torch.equal(x, output.pred_original_sample)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("conditioning", ["timestep", "sigma"])
def test_timestep_spacing(spacing, conditioning):
    scheduler = AnnealedLangevinScheduler(timestep_spacing=spacing, conditioning=conditioning, rho=None)
    all_expected = {"linspace": [999, 666, 333, 0], "leading": [750, 500, 250, 0], "trailing": [999, 749, 499, 249]}
    expected = all_expected[spacing]
    scheduler.set_timesteps(4)
    sigmas = 0.01 * 5000 ** (torch.tensor(expected) / 999)
    torch.testing.assert_close(scheduler.sigmas[:-1], sigmas)
    torch.testing.assert_close(
        scheduler.timesteps, sigmas if conditioning == "sigma" else torch.tensor(expected, dtype=torch.float32)
    )
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(sigmas[0].item() ** 2 + 1), rel=1e-5)
    if spacing != "trailing":
        scheduler.set_timesteps(1500)
        assert len(scheduler.timesteps) == 1500
        assert torch.all(scheduler.timesteps.diff() < 0)
    else:
        with pytest.raises(ValueError, match=r"`num_inference_steps`=1500.*linspace"):
            scheduler.set_timesteps(1500)


def test_default_levels_are_karras_levels_within_the_trained_ladder():
    scheduler = AnnealedLangevinScheduler(sigma_min=1.0, sigma_max=7.0**3, rho=3.0)
    scheduler.set_timesteps(3)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([5.0**3, 4.0**3, 3.0**3, 0.0]))
    # two steps are left out at either end, fewer from 10 levels on, one from 20 on
    for num, left_out in ((10, 2.0), (15, 1.5), (20, 1.0), (50, 1.0)):
        scheduler.set_timesteps(num)
        roots = scheduler.sigmas[:-1].double() ** (1 / 3)
        step = 6 / (num - 1 + 2 * left_out)
        torch.testing.assert_close(7 - roots[0], torch.tensor(left_out * step).double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(roots[-1] - 1, torch.tensor(left_out * step).double(), rtol=1e-4, atol=1e-5)
    # where no final denoising takes the last steps, they are the chain's
    scheduler = AnnealedLangevinScheduler(sigma_min=1.0, sigma_max=7.0**3, rho=3.0, denoise_final=False)
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([5.0**3, 4.0**3, 3.0**3, 2.0**3, 1.0, 1.0]))
    # a DDPM checkpoint's scheduler does not know rho
    scheduler = AnnealedLangevinScheduler.from_config(DDPMScheduler().config)
    scheduler.set_timesteps(10)
    steps = (scheduler.sigmas[:-1] ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(9))
    # the papers' chain runs down the trained ladder
    scheduler = AnnealedLangevinScheduler(noise_rule="euler_maruyama")
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps[:4], torch.tensor([999.0, 666.0, 333.0, 0.0]))


def test_levels_by_sigmas_timesteps_and_count_agree():
    chains = []
    for arguments in ({"num_inference_steps": 7}, {"timesteps": np.linspace(999, 0, 7)}, {"sigmas": None}):
        scheduler = AnnealedLangevinScheduler(rho=None)
        if "sigmas" in arguments:
            arguments = {"sigmas": chains[0].sigmas[:-1].tolist()[::2]}
        scheduler.set_timesteps(num_langevin_steps=2, **arguments)
        chains.append(scheduler)
    torch.testing.assert_close(chains[0].timesteps, chains[1].timesteps)
    torch.testing.assert_close(chains[0].timesteps, chains[2].timesteps)
    torch.testing.assert_close(chains[0].sigmas, chains[2].sigmas)
    assert chains[0].num_inference_steps == 7
    assert chains[0].timesteps[::2].tolist() == chains[0].timesteps[1::2].tolist()


@pytest.mark.parametrize("noise_rule", ["consistent", "euler_maruyama"])
@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_sigmas_and_timesteps_of_a_chain_make_that_chain(noise_rule, denoise, num_steps):
    scheduler = AnnealedLangevinScheduler(noise_rule=noise_rule, denoise_final=denoise, num_langevin_steps=num_steps)
    scheduler.set_timesteps(5)
    expected = scheduler.sigmas, scheduler.timesteps
    for chain in ({"sigmas": expected[0]}, {"timesteps": expected[1]}, {"sigmas": expected[0].tolist()}):
        scheduler.set_timesteps(**chain)
        assert scheduler.num_inference_steps == 5
        torch.testing.assert_close((scheduler.sigmas, scheduler.timesteps), expected)


def test_a_zero_among_the_sigmas_is_the_final_denoising():
    published, chains = [14.6146, 2.0, 0.5, 0.0], []
    for sigmas in (published, published[:-1], np.array(published), torch.tensor(published)):
        scheduler = AnnealedLangevinScheduler(prediction_type="sample")
        scheduler.set_timesteps(sigmas=sigmas)
        assert len(scheduler.timesteps) == 3
        x = torch.ones(1, 1, 2, 2)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.full_like(x, 0.7), t, x).prev_sample
        assert torch.equal(x, torch.full_like(x, 0.7))
        chains.append(scheduler.sigmas)
    for chain in chains:
        torch.testing.assert_close(chain, torch.tensor(published))
    with pytest.raises(ValueError, match="`sigmas` ends in 0, the final denoising, but `denoise_final` is False"):
        AnnealedLangevinScheduler(denoise_final=False).set_timesteps(sigmas=published)


@pytest.mark.parametrize("num_levels", [1, 2, 3, 1000, 1234])
@pytest.mark.parametrize("noise_rule", ["consistent", "euler_maruyama"])
@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_any_number_of_levels(num_levels, noise_rule, denoise, num_steps):
    scheduler = AnnealedLangevinScheduler(noise_rule=noise_rule, denoise_final=denoise)
    scheduler.set_timesteps(num_levels, num_langevin_steps=num_steps)
    extra = denoise and noise_rule == "euler_maruyama"
    assert len(scheduler.timesteps) == num_levels * num_steps + extra
    for row in scheduler.table:
        assert 0 <= row.kappa < 1
        assert math.isfinite(row.c) and row.c >= 0
        assert math.isfinite(row.extrapolation)


# --- The chain's index ---


def test_step_index_follows_the_chain_and_resets():
    scheduler = AnnealedLangevinScheduler(prediction_type="sample")
    scheduler.set_timesteps(5, num_langevin_steps=2)
    assert scheduler.step_index is None
    for _ in range(2):
        x = torch.zeros(1, 1, 2, 2)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.zeros_like(x), t, x, generator=torch.Generator().manual_seed(i)).prev_sample
            assert scheduler.step_index == i + 1
        with pytest.raises(ValueError, match="chain of 10 steps has ended"):
            scheduler.step(torch.zeros_like(x), t, x)
        scheduler.set_timesteps(5, num_langevin_steps=2)


def test_chain_may_begin_in_the_middle():
    def run(begin, use_begin_index):
        scheduler = AnnealedLangevinScheduler(prediction_type="sample")
        scheduler.set_timesteps(10, num_langevin_steps=2)
        if use_begin_index:
            scheduler.set_begin_index(begin)
            assert scheduler.begin_index == begin
        x, generator = torch.ones(1, 1, 2, 2), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(x / 2, t, x, generator=generator).prev_sample
        return x

    assert torch.equal(run(6, True), run(6, False))
    assert not torch.equal(run(6, True), run(4, True))


@pytest.mark.parametrize("noise_rule", ["consistent", "euler_maruyama"])
@pytest.mark.parametrize("denoise", [True, False])
def test_chain_may_begin_in_the_middle_of_a_level(noise_rule, denoise):
    # as image-to-image loops of diffusers do that say where they begin
    scheduler = AnnealedLangevinScheduler(
        noise_rule=noise_rule, prediction_type="sample", num_langevin_steps=2, denoise_final=denoise
    )
    scheduler.set_timesteps(10)
    image, noise = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    for begin in range(len(scheduler.timesteps)):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin * scheduler.order :]
        x, generator = scheduler.add_noise(image, noise, timesteps[:1]), torch.Generator().manual_seed(0)
        for t in timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x, generator=generator).prev_sample
        assert scheduler.step_index == len(scheduler.timesteps)
        if denoise:
            assert torch.count_nonzero(x) == 0


def test_a_row_that_is_guessed_is_said(caplog):
    diffusers.logging.enable_propagation()
    x = torch.zeros(1, 1, 2, 2)

    def first_row(num_steps, timestep):
        caplog.clear()
        scheduler.set_timesteps(5, num_langevin_steps=num_steps)
        scheduler.step(x, timestep(scheduler.timesteps), x)
        return scheduler.step_index - 1

    scheduler = AnnealedLangevinScheduler()
    assert first_row(2, lambda timesteps: timesteps[7].item()) == 6
    assert "stands for the rows 6 to 7 of this chain, which begins with row 6" in caplog.text
    # a value that stands for one row, or the chain's beginning, is no guess
    for num_steps, timestep, row in (
        (1, lambda timesteps: timesteps[3].item(), 3),
        (1, lambda timesteps: timesteps[3].clone(), 3),
        (1, lambda timesteps: timesteps[3].double(), 3),
        (2, lambda timesteps: timesteps[0].item(), 0),
        (2, lambda timesteps: timesteps[:1], 0),
    ):
        assert first_row(num_steps, timestep) == row
        assert not caplog.text
    diffusers.logging.disable_propagation()


def test_step_works_right_after_construction_and_names_a_foreign_timestep():
    scheduler = AnnealedLangevinScheduler()
    assert len(scheduler.timesteps) == len(scheduler.sigmas) - 1 == 1000
    assert scheduler.num_inference_steps is None
    x = torch.randn(1, 1, 2, 2)
    output = scheduler.step(x, 500, x)
    assert scheduler.step_index == 500
    sigma = 0.01 * 5000 ** (500 / 999)  # and the output is v = x
    expected = x / (1 + sigma**2) - x * sigma / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(output.pred_original_sample, expected, rtol=1e-4, atol=1e-5)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"`timestep`=500 is not in this chain, whose nearest is 532.981"):
        scheduler.step(x, 500, x)


def test_second_order_starts_afresh_with_each_chain():
    scheduler = AnnealedLangevinScheduler()
    results = []
    for restart in (lambda: scheduler.set_timesteps(10), lambda: scheduler.set_begin_index(0)):
        scheduler.set_timesteps(10)
        run_chain(scheduler, MIXTURE.denoised, torch.ones(5, 8, dtype=torch.float64))  # another batch
        restart()
        results.append(run_chain(scheduler, MIXTURE.denoised, torch.ones(3, 8, dtype=torch.float64)))
    assert torch.equal(*results)

    # half-way through one chain to half-way through another: no D_ is left of the first
    x, output = torch.ones(3, 1, 2, 2), torch.full((3, 1, 2, 2), 0.3)
    steps = []
    for interrupted in (True, False):
        scheduler.set_timesteps(10)
        if interrupted:
            scheduler.step(-5 * output, scheduler.timesteps[0], x)
        scheduler.set_begin_index(4)
        steps.append(scheduler.step(output, None, x, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(*steps)


def test_second_order_keeps_its_estimate_when_a_callback_replaces_the_sample():
    scheduler = AnnealedLangevinScheduler(prediction_type="sample")
    scheduler.set_timesteps(10)
    x, before, now, noise = torch.randn(4, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler.step(before, scheduler.timesteps[0], x)
    replaced = x + 3
    row = scheduler.table[1]
    assert row.extrapolation > 0.1
    after = scheduler.step(now, scheduler.timesteps[1], replaced, variance_noise=noise).prev_sample
    expected = row.kappa * replaced + (1 - row.kappa) * now + row.extrapolation * (now - before) + row.c * noise
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample", "score"])
def test_network_may_reuse_its_output_buffer(prediction_type):
    # as a CUDA graph does
    def run(buffer):
        scheduler = AnnealedLangevinScheduler(prediction_type=prediction_type)
        scheduler.set_timesteps(6)
        generator, x = torch.Generator().manual_seed(0), torch.full((2, 1, 2, 2), 30.0)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
            output = to_model_output(x.tanh() / 2, x, sigma, prediction_type)
            output = output if buffer is None else buffer.copy_(output)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        return x

    assert torch.equal(run(buffer=None), run(buffer=torch.empty(2, 1, 2, 2)))


class LiveTensors(TorchDispatchMode):
    """Counts the tensors of one size that are alive; views and in-place results are no new ones."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.alive, self.most = numel, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel:
            storage = result.untyped_storage().data_ptr()
            if storage not in self.alive and not func.is_view:
                self.alive.add(storage)
                weakref.finalize(result, self.alive.discard, storage)
            self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize("num_levels", [3, 40])
@pytest.mark.parametrize("num_langevin_steps", [1, 2])
def test_memory_does_not_grow_with_the_number_of_steps(num_levels, num_langevin_steps):
    scheduler = AnnealedLangevinScheduler()
    scheduler.set_timesteps(num_levels, num_langevin_steps=num_langevin_steps)
    with LiveTensors(numel=2 * 17 * 17) as live:
        x = torch.randn(2, 1, 17, 17)
        for t in scheduler.timesteps:
            output = torch.zeros_like(x)  # the network's
            x = scheduler.step(output, t, x, return_dict=False)[0]
    # x and the network's output, of which a bare network needs as many; and D, D_, x' and the noise
    assert live.most == 6


# --- Conversions ---


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample", "score"])
def test_prediction_types_are_conversions_of_one_another(prediction_type):
    scheduler = AnnealedLangevinScheduler(prediction_type=prediction_type)
    timesteps = torch.tensor([0.0, 400.5, 999.0])
    sigma = scheduler.t_to_sigma(timesteps)[:, None]
    x0, noise = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    x = scheduler.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(x, x0 + sigma * noise)
    output = to_model_output(x0, x, sigma, prediction_type)
    if prediction_type == "v_prediction":
        torch.testing.assert_close(scheduler.get_velocity(x0, noise, timesteps), output, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scheduler.predict_original_sample(output, timesteps, x), x0, rtol=1e-4, atol=2e-4)
    scheduler.set_timesteps(timesteps=[999.0, 400.5, 0.0])
    scheduler.set_begin_index(1)
    denoised = scheduler.step(output[1:2], 400.5, x[1:2]).pred_original_sample
    torch.testing.assert_close(denoised, x0[1:2], rtol=1e-4, atol=2e-4)


def test_scale_model_input_takes_one_timestep_or_one_a_sample():
    scheduler = AnnealedLangevinScheduler()
    x = torch.randn(3, 1, 2, 2)
    timesteps = torch.tensor([0.0, 500.0, 999.0])
    expected = x / (1 + scheduler.t_to_sigma(timesteps)[:, None, None, None] ** 2).sqrt()
    torch.testing.assert_close(scheduler.scale_model_input(x, timesteps), expected)
    for form in (500, 500.0, torch.tensor(500), torch.tensor([500.0])):
        torch.testing.assert_close(scheduler.scale_model_input(x, form)[1], expected[1])
    assert scheduler.scale_model_input(x.half(), 500).dtype == torch.float16
    # alphas_cumprod is that of the variance preserving form
    torch.testing.assert_close(scheduler.scale_model_input(x, 999), x * scheduler.alphas_cumprod[-1].sqrt())


def test_clip_sample_clips_the_denoised_estimate():
    scheduler = AnnealedLangevinScheduler(prediction_type="sample", clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(1)
    output = scheduler.step(torch.tensor([[-2.0, 0.2, 2.0]]), scheduler.timesteps[0], torch.zeros(1, 3))
    assert output.pred_original_sample.tolist() == output.prev_sample.tolist() == [[-0.5, pytest.approx(0.2), 0.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_keep_their_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    output, noise, x = (torch.randn(2, 1, 4, 4, generator=generator).to(dtype) for _ in range(3))
    steps = []
    for to in (dtype, torch.float32):  # computed in float32, and rounded once
        scheduler = AnnealedLangevinScheduler()
        scheduler.set_timesteps(10)
        sample = (x.float() * scheduler.init_noise_sigma).to(dtype).to(to)
        steps.append(scheduler.step(output.to(to), scheduler.timesteps[0], sample, variance_noise=noise.float()))
    for name in ("prev_sample", "pred_original_sample"):
        assert steps[0][name].dtype == dtype
        assert torch.equal(steps[0][name], steps[1][name].to(dtype))


def test_an_image_does_not_depend_on_its_batch():
    def draw(seeds):
        scheduler = AnnealedLangevinScheduler()
        scheduler.set_timesteps(20)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.cat([torch.randn(1, 8, generator=g, dtype=torch.float64) for g in generators]) * 50
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
            output = to_model_output(MIXTURE.denoised(x, sigma), x, sigma, "v_prediction")
            x = scheduler.step(output, t, x, generator=generators).prev_sample
        return x

    torch.testing.assert_close(draw([3, 1, 4])[2], draw([4])[0])


# --- What diffusers asks of every scheduler ---


def test_compatibles_resolve():
    scheduler = AnnealedLangevinScheduler(num_train_timesteps=100)
    assert set(AnnealedLangevinScheduler._compatibles) <= {cls.__name__ for cls in scheduler.compatibles}
    for cls in scheduler.compatibles:
        other = cls.from_config(scheduler.config)
        back = AnnealedLangevinScheduler.from_config(other.config)
        assert {k: back.config[k] for k in scheduler.config} == dict(scheduler.config)
        added = {k for k in back.config if k not in scheduler.config}
        assert not added & set(inspect.signature(AnnealedLangevinScheduler.__init__).parameters)


def test_saved_scheduler_steps_alike(tmp_path):
    scheduler = AnnealedLangevinScheduler(num_train_timesteps=100)
    scheduler.save_config(tmp_path)
    reloaded = AnnealedLangevinScheduler.from_pretrained(tmp_path)
    sample = torch.rand(4, 3, 8, 8)
    outputs = [s.step(0.1 * sample, 50, sample, generator=torch.manual_seed(0)) for s in (scheduler, reloaded)]
    assert torch.equal(outputs[0].prev_sample, outputs[1].prev_sample)


def test_tuple_and_dict_outputs_agree():
    sample = torch.rand(4, 3, 8, 8)
    outputs = []
    for return_dict in (True, False):
        scheduler = AnnealedLangevinScheduler()
        scheduler.set_timesteps(50)
        outputs.append(
            scheduler.step(
                0.1 * sample,
                scheduler.timesteps[0],
                sample,
                generator=torch.manual_seed(0),
                return_dict=return_dict,
            )
        )
    assert isinstance(outputs[1], tuple)
    assert torch.equal(outputs[0].prev_sample, outputs[1][0])
    assert torch.equal(outputs[0].pred_original_sample, outputs[1][1])


def test_attributes_that_diffusers_reads():
    # by hand, for four levels from 0.1 to 100 and a chain over all of them
    arguments = {"num_train_timesteps": 4, "sigma_min": 0.1, "sigma_max": 100.0, "rho": None, "denoise_final": False}
    scheduler = AnnealedLangevinScheduler(**arguments)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx([3, 2, 1, 0], abs=1e-5)
    assert scheduler.sigmas.tolist() == pytest.approx([100, 10, 1, 0.1, 0.1], rel=1e-6)
    assert (scheduler.order, scheduler.num_inference_steps, len(scheduler)) == (1, 4, 4)
    # alphas_cumprod is 1/(1 + sigma²) at each level, and 1 - beta the ratio of neighbors
    assert scheduler.alphas_cumprod.tolist() == pytest.approx([1 / 1.01, 1 / 2, 1 / 101, 1 / 10_001], rel=1e-6)
    assert scheduler.betas.tolist() == pytest.approx([0.01 / 1.01, 0.99 / 2, 99 / 101, 9900 / 10_001], rel=1e-6)
    assert scheduler.init_noise_sigma == pytest.approx(10_001**0.5, rel=1e-6)
    x = torch.full((1, 1, 2, 2), 3.0)
    assert scheduler.scale_model_input(x, scheduler.timesteps[2]).flatten().tolist() == pytest.approx([3 / 2**0.5] * 4)
    # v = 0 at sigma = 1: D = x/2; kappa of the step to 0.1 at the rate b = 2 is (0.1)² = 0.01, c = √(0.1² - 0.01²)
    scheduler.set_begin_index(2)
    output = scheduler.step(torch.zeros_like(x), scheduler.timesteps[2], x, variance_noise=torch.ones_like(x))
    torch.testing.assert_close(output.pred_original_sample, x / 2)
    expected = 0.01 * 3 + 0.99 * 1.5 + (0.01 - 0.0001) ** 0.5
    torch.testing.assert_close(output.prev_sample, torch.full_like(x, expected))


def test_config_behaves_as_diffusers_expects():
    assert "kwargs" not in inspect.signature(AnnealedLangevinScheduler.__init__).parameters
    assert AnnealedLangevinScheduler._deprecated_kwargs == []
    scheduler = AnnealedLangevinScheduler()
    scheduler.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning, match="test_attribute"):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match="'AnnealedLangevinScheduler' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_trained_betas_as_array_or_list(tmp_path):
    for betas in (np.array([0.1, 0.3]), [0.1, 0.3]):
        scheduler = AnnealedLangevinScheduler(num_train_timesteps=1000, trained_betas=betas)
        scheduler.save_pretrained(tmp_path)
        reloaded = AnnealedLangevinScheduler.from_pretrained(tmp_path)
        assert scheduler.betas.tolist() == reloaded.betas.tolist() == pytest.approx([0.1, 0.3])


def test_add_noise_broadcasts_and_keeps_the_dtype():
    scheduler = AnnealedLangevinScheduler()
    scheduler.set_timesteps(100)
    sample = torch.rand(4, 3, 8, 8)
    noised = scheduler.add_noise(sample, torch.ones(3, 8, 8), scheduler.timesteps[5][None])
    torch.testing.assert_close(noised, sample + scheduler.sigmas[5])
    assert scheduler.add_noise(sample.half(), sample.half(), torch.tensor(3)).dtype == torch.float16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_may_differ():
    scheduler = AnnealedLangevinScheduler()
    scheduler.set_timesteps(10, device="cuda")
    sample = torch.rand(2, 3, 8, 8)
    noised = scheduler.add_noise(sample.cuda(), sample, scheduler.timesteps[:2].cpu())
    assert noised.device.type == "cuda"
    torch.testing.assert_close(noised.cpu(), scheduler.add_noise(sample, sample, scheduler.timesteps[:2]))


def test_stock_loop_with_float_timesteps():
    # EulerDiscreteScheduler, swapped in, keeps its own convention of sigma_max as the start's deviation
    euler = EulerDiscreteScheduler.from_config(AnnealedLangevinScheduler(sigma_max=20.0).config)
    euler.set_timesteps(10)
    assert float(euler.init_noise_sigma) == pytest.approx(20, rel=1e-3)


# --- Bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_min": 1.0, "sigma_max": 0.5}, r"`sigma_min`=1.0 must be below `sigma_max`=0.5"),
        ({"sigma_min": 50.0}, r"`sigma_min`=50.0 must be below"),
        ({"sigma_min": 0}, r"`sigma_min` must be a finite number of at least 1e-10 and at most 1e\+10, not 0"),
        ({"sigma_max": "50"}, r"`sigma_max` must be a finite number of at least 1e-10 and at most 1e\+10, not '50'"),
        ({"sigma_max": math.inf}, r"`sigma_max` must be a finite number .*, not inf"),
        ({"sigma_max": 1e308}, r"`sigma_max` must be a finite number .*, not 1e\+308"),
        ({"sigma_min": 1e-300}, r"`sigma_min` must be a finite number .*, not 1e-300"),
        ({"sigma_min": 1.0, "sigma_max": 1 + 1e-12}, r"`sigma_min`=1.0 and `sigma_max`=1.0.* must rise from each"),
        ({"num_train_timesteps": 1}, r"`num_train_timesteps` must be an int from 2 to 100000, not 1"),
        ({"num_train_timesteps": 10.0}, r"`num_train_timesteps` must be an int from .*, not 10.0"),
        ({"num_train_timesteps": 10**8}, r"`num_train_timesteps` must be an int from 2 to 100000, not 100000000"),
        ({"num_langevin_steps": 10**7}, r"`num_langevin_steps` must be an int from 1 to 1000000, not 10000000"),
        ({"num_langevin_steps": 1001}, r"`num_langevin_steps`=1001 at each of 1000 levels makes 1001000 steps"),
        ({"prediction_type": "noise"}, r"`prediction_type` must be one of 'v_prediction', .*not 'noise'"),
        ({"conditioning": "noise"}, r"`conditioning` must be one of 'timestep', 'sigma', not 'noise'"),
        ({"beta_schedule": "sigmoid"}, r"`beta_schedule` must be one of 'geometric', .*not 'sigmoid'"),
        ({"noise_rule": "heun"}, r"`noise_rule` must be one of .*not 'heun'"),
        ({"solver_order": 3}, r"`solver_order` must be one of 1, 2, not 3"),
        ({"timestep_spacing": "karras"}, r"`timestep_spacing` must be one of .*not 'karras'"),
        ({"num_langevin_steps": 0}, r"`num_langevin_steps` must be an int from 1 to 1000000, not 0"),
        ({"step_size": 1.5}, r"`step_size` must be a finite number above 0 and at most 1, not 1.5"),
        ({"step_size": 0}, r"`step_size` must be"),
        ({"rho": 0}, r"`rho` must be a finite number of at least 0.1 and at most 10000, not 0"),
        ({"rho": 1e-300}, r"`rho` must be a finite number of at least 0.1 and at most 10000, not 1e-300"),
        ({"clip_sample_range": -1}, r"`clip_sample_range` must be"),
        ({"trained_betas": [0.1, 1.0]}, r"`trained_betas`, from 0.1 to 1, must be from 2 to 100000 numbers"),
        ({"trained_betas": [0.1]}, r"`trained_betas` must be from 2 to 100000 .*, not 1 of them: \[0.1\]"),
        ({"trained_betas": []}, r"`trained_betas` must be .*, not 0 of them"),
        ({"trained_betas": [0.1] * 10**7}, r"`trained_betas` must be .*, not 10000000 of them: .*\.\.\."),
        ({"trained_betas": [0.5] * 100}, r"`trained_betas`: the 100 noise levels go from 1 to 1.12\S*e\+15; they must"),
        ({"trained_betas": ["0.1", "0.2"]}, r"`trained_betas` must be .*, not \['0.1', '0.2'\]"),
        (
            {"beta_schedule": "linear", "beta_end": 1.5},
            r"`beta_end` must be a .* above 0 and below 1, not 1.5",
        ),
        ({"denoise_final": "false"}, r"`denoise_final` must be True or False, not 'false'"),
        ({"solver_order": True}, r"`solver_order` must be one of 1, 2, not True"),
        ({"beta_schedule": "linear", "sigma_max": 20.0}, r"`sigma_max`=20.0 contradicts the ladder"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnnealedLangevinScheduler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"num_inference_steps": 10, "sigmas": [1.0]}, "exactly one of"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an int from 1 to 100000, not 0"),
        ({"num_inference_steps": 10.5}, r"`num_inference_steps` must be an int from .*, not 10.5"),
        ({"num_inference_steps": True}, r"`num_inference_steps` must be an int from .*, not True"),
        ({"num_inference_steps": 10**12}, r"`num_inference_steps` must be an int from 1 to 100000, not 10{12}"),
        ({"num_inference_steps": 1001, "num_langevin_steps": 1000}, r"`num_langevin_steps`=1000 at each of 1001 level"),
        (
            {"num_inference_steps": 1, "num_langevin_steps": 10**9},
            r"`num_langevin_steps` must be an int from 1 to 1000000",
        ),
        ({"sigmas": np.ones(10**6 + 1)}, r"`sigmas` has 1000001 values; a chain has at most 1000000 steps"),
        ({"sigmas": "5, 1"}, r"`sigmas` must be a list of numbers, not '5, 1'"),
        ({"sigmas": [[5.0], 1.0]}, r"`sigmas` must be a list of numbers"),
        ({"sigmas": 5.0}, r"`sigmas` must be a list of at least one number, not an array of shape \(\)"),
        ({"sigmas": [5.0, math.nan]}, r"`sigmas` must fall"),
        ({"sigmas": [0.0]}, r"`sigmas` must be from 1e-10 to 1e\+10, not \[0.0\]"),
        ({"sigmas": [5.0, 0.0, 0.0]}, r"`sigmas` must be from .*; a 0 stands for the final denoising, at the end only"),
        ({"sigmas": [5.0, 5.0, 1.0, 0.0]}, r"`sigmas` must fall .*, or hold each num_langevin_steps=1 times, not"),
        ({"sigmas": [5.0, 5.0 - 1e-9]}, r"`sigmas` must fall"),
        ({"num_inference_steps": 10, "num_langevin_steps": 0}, r"`num_langevin_steps` must be an int"),
        ({"sigmas": []}, r"`sigmas` must be a list of at least one number"),
        ({"sigmas": [1.0, 2.0]}, r"`sigmas` must fall from each value to the next"),
        ({"sigmas": [math.inf, 1.0]}, r"`sigmas` must be from 1e-10 to 1e\+10, not \[inf, 1.0\]"),
        ({"timesteps": [1000, 10]}, r"`timesteps` must be from 0 to 999"),
        ({"timesteps": [10, 10]}, r"`timesteps` must fall"),
    ],
)
def test_bad_set_timesteps(arguments, message):
    scheduler = AnnealedLangevinScheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)


WRONG = [["a"], "a", None, True, math.nan, math.inf, -1, 1e308, 10**400, 0.5j, {"a": 1}, [[[1]]]]
KEYS = inspect.signature(AnnealedLangevinScheduler).parameters


@pytest.mark.parametrize("key", KEYS)
def test_wrong_values_are_refused_at_once_with_their_key(key):
    schedule = {"beta_schedule": "linear"} if key in ("beta_start", "beta_end") else {}
    sane = {key: parameter.default for key, parameter in KEYS.items()} | schedule
    for value in WRONG:
        if (value is True and isinstance(sane[key], bool)) or (value is None and (sane[key] is None or key == "rho")):
            continue
        start = time.process_time()
        for make in (
            lambda config: AnnealedLangevinScheduler(**config),
            lambda config: AnnealedLangevinScheduler.from_config(
                {**config, "_class_name": "AnnealedLangevinScheduler"}
            ),
        ):
            with pytest.raises(ValueError, match=f"`{key}`"):
                make({**schedule, key: value})
        stock = {"_class_name": "DDPMScheduler", key: value}
        if key in DDPMScheduler().config:
            with pytest.raises(ValueError, match=f"`{key}`"):
                AnnealedLangevinScheduler.from_config(stock)
        assert time.process_time() - start < 1


def test_extremes_of_what_is_accepted_stay_finite():
    x = torch.ones(1, 1, 2, 2)
    ladders = [
        {"sigma_min": 1e-10, "sigma_max": 1e10},
        {"sigma_min": 1e-10, "sigma_max": 2e-10},
        {"sigma_min": 5e9, "sigma_max": 1e10},
        {"num_train_timesteps": 2, "sigma_min": 1e-10, "sigma_max": 1e10},
        {"num_train_timesteps": 3, "sigma_min": 1.0, "sigma_max": 1.0001},
        {"trained_betas": [1e-12, 0.5, 1 - 1e-12]},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 2},
    ]
    samplers = [
        {"rho": 0.1},
        {"rho": 1e4},
        {"rho": None},
        {"rho": 0.1, "denoise_final": False, "solver_order": 1},
        {"step_size": 1e-300},
        {"step_size": 1.0, "clip_sample": True, "clip_sample_range": 1e10},
        {"noise_rule": "euler_maruyama", "step_size": 1e-300},
        {"noise_rule": "euler_maruyama", "num_langevin_steps": 3},
        {"conditioning": "sigma", "denoise_final": False},
    ]
    for ladder, sampler in itertools.product(ladders, samplers):
        scheduler = AnnealedLangevinScheduler(
            **{"prediction_type": "epsilon", "num_train_timesteps": 50} | ladder | sampler
        )
        for num in (1, 2, 3, 50, 300):
            scheduler.set_timesteps(num)
            assert scheduler.timesteps.isfinite().all() and scheduler.sigmas.isfinite().all()
            assert np.isfinite([(r.sigma, r.kappa, r.c, r.extrapolation) for r in scheduler.table]).all()
            assert all(above.sigma >= below.sigma > 0 for above, below in pairwise(scheduler.table))
        stride = max(1, len(scheduler.timesteps) // 4)
        for t, sigma in zip(scheduler.timesteps[::stride], scheduler.sigmas[:-1:stride].tolist(), strict=True):
            noised = scheduler.add_noise(torch.zeros_like(x), x, t)  # x0 = 0 and z = 1, which the network knows
            torch.testing.assert_close(noised, sigma * x, rtol=1e-4, atol=0)
            scale = 1 if scheduler.config.conditioning == "sigma" else math.sqrt(1 + sigma**2)
            torch.testing.assert_close(scheduler.scale_model_input(noised, t), sigma / scale * x, rtol=1e-4, atol=0)
            assert scheduler.predict_original_sample(x, t, noised).abs().max() <= 1e-6 * sigma
            scheduler.set_begin_index(0)
            assert scheduler.step(x, t, noised).prev_sample.isfinite().all()


def test_bad_step():
    scheduler = AnnealedLangevinScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"`model_output` has shape \(1, 6, 4, 4\), but `sample` has \(1, 3, 4, 4\)"):
        scheduler.step(torch.zeros(1, 6, 4, 4), 999, torch.zeros(1, 3, 4, 4))
    for index in (-1, 10, 1.5):
        with pytest.raises(ValueError, match=r"`begin_index` must be an int from 0 to 9"):
            scheduler.set_begin_index(index)
