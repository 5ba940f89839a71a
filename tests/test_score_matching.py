import math

import pytest
import torch
from networks import MIXTURE, AnalyticUNet, GaussianMixture, to_model_output, train_sigmas

from ncsn_diffusers import AnnealedLangevinScheduler
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.score_matching import draw_sigmas, normal_quantile, score_matching_loss, stratified

CONVENTIONS = [
    (prediction_type, conditioning)
    for prediction_type in ("v_prediction", "epsilon", "sample", "score")
    for conditioning in ("timestep", "sigma")
]


def loss_of(model, scheduler, x0, noise, sigmas, **arguments):
    if not isinstance(model, torch.nn.Module):
        model = FunctionNetwork(model)
    return score_matching_loss(Denoiser.of(model, scheduler), x0, noise, sigmas, **arguments)


class FunctionNetwork(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, sample, timestep, return_dict=True):
        return self.function(sample, timestep, return_dict=return_dict)


class PointNetwork(torch.nn.Module):
    """The exact network for one Gaussian, or any other denoised estimate, in any convention."""

    def __init__(self, scheduler, denoised):
        super().__init__()
        self.scheduler, self.denoised = scheduler, denoised

    def forward(self, sample, timestep, return_dict=True):
        sigma = timestep if self.scheduler.config.conditioning == "sigma" else 0.01 * 5000 ** (timestep / 999)
        sigma = sigma[:, None]
        x = sample if self.scheduler.config.conditioning == "sigma" else sample * (1 + sigma**2).sqrt()
        return (to_model_output(self.denoised(x, sigma), x, sigma, self.scheduler.config.prediction_type),)


@pytest.mark.parametrize(("prediction_type", "conditioning"), CONVENTIONS)
def test_loss_of_the_exact_score_is_known(prediction_type, conditioning):
    # For Gaussian data of deviation s, (D - x0)/sigma has variance s²/(s² + sigma²): half of that is the loss.
    deviation, count, dims = 0.5, 5000, 8
    scheduler = AnnealedLangevinScheduler(prediction_type=prediction_type, conditioning=conditioning)
    gain = lambda sigma: deviation**2 / (deviation**2 + sigma**2)  # noqa: E731
    network = PointNetwork(scheduler, lambda x, sigma: gain(sigma) * x)
    generator = torch.Generator().manual_seed(0)
    for sigma in (0.05, 0.5, 5.0):
        x0 = deviation * torch.randn(count, dims, generator=generator)
        noise = torch.randn(count, dims, generator=generator)
        losses = loss_of(network, scheduler, x0, noise, torch.full((count,), sigma))
        assert losses.shape == (count,)
        expected = gain(sigma) / 2
        # a mean of count·dims halves of squared normals
        assert losses.mean().item() == pytest.approx(expected, rel=3 * math.sqrt(2 / (count * dims)))


def test_exact_score_of_a_mixture_beats_its_neighbors():
    scheduler = AnnealedLangevinScheduler()
    generator = torch.Generator().manual_seed(0)
    x0 = MIXTURE.sample(4000, generator).float()
    noise = torch.randn(x0.shape, generator=generator)
    sigmas = draw_sigmas(scheduler.ladder, torch.rand(len(x0), generator=generator))

    def loss(perturb):
        network = PointNetwork(scheduler, lambda x, sigma: perturb(MIXTURE.denoised(x.double(), sigma).float()))
        return loss_of(network, scheduler, x0, noise, sigmas).mean()

    exact = loss(lambda denoised: denoised)
    assert exact < loss(lambda denoised: denoised * 0.97)
    assert exact < loss(lambda denoised: denoised * 1.03)
    assert exact < loss(lambda denoised: denoised + 0.03)


def test_a_zero_score_costs_a_half():
    scheduler = AnnealedLangevinScheduler(prediction_type="score", conditioning="sigma")
    noise = torch.randn(5000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    model = lambda x, t, return_dict: (torch.zeros_like(x),)  # noqa: E731
    losses = loss_of(model, scheduler, torch.zeros_like(noise), noise, torch.full((5000,), 0.3))
    assert losses.mean().item() == pytest.approx(0.5, rel=3 * math.sqrt(2 / noise.numel()))


def test_edm_weighs_the_error_of_a_v_prediction_equally():
    scheduler = AnnealedLangevinScheduler()
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(6, 1, 4, 4, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.02, 0.1, 0.5, 2.0, 10.0, 40.0])
    target = scheduler.get_velocity(images, noise, scheduler.sigma_to_t(sigma))
    model = lambda x, t, return_dict: (target + 0.3,)  # noqa: E731
    losses = loss_of(model, scheduler, images, noise, sigma, weighting="edm")
    torch.testing.assert_close(losses, torch.full((6,), 0.5 * 0.3**2), rtol=1e-3, atol=0)
    plain = loss_of(model, scheduler, images, noise, sigma)
    torch.testing.assert_close(losses / plain, 1 + sigma**2, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"`weighting` must be one of .* not 'flat'"):
        loss_of(model, scheduler, images, noise, sigma, weighting="flat")


def test_loss_takes_images_and_passes_gradients():
    scheduler = AnnealedLangevinScheduler()
    unet = AnalyticUNet(train_sigmas(scheduler).tolist())
    images = torch.rand(6, 1, 2, 4, generator=torch.Generator().manual_seed(1))
    scale = torch.ones(1, requires_grad=True)
    model = lambda x, t, return_dict: (unet(x, t, return_dict=return_dict)[0] * scale,)  # noqa: E731
    sigmas = scheduler.t_to_sigma(torch.tensor([0.0, 10.5, 300.0, 500.0, 700.25, 999.0]))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def loss():
        return loss_of(model, scheduler, images, noise, sigmas)

    losses = loss()
    one_by_one = [loss_of(model, scheduler, images[i : i + 1], noise[i : i + 1], sigmas[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(losses, torch.cat(one_by_one))
    losses.sum().backward()
    with torch.no_grad():
        scale += 1e-2
        above = loss().sum()
        scale -= 2e-2
        below = loss().sum()
    # the loss is quadratic in the scale: its central difference is its derivative, but for rounding
    torch.testing.assert_close(scale.grad, ((above - below) / 2e-2).reshape(1), rtol=1e-2, atol=0)


def test_lognormal_levels():
    ladder = AnnealedLangevinScheduler().ladder
    uniform = torch.tensor([0.0, 0.158655254, 0.5, 0.841344746])
    sigmas = draw_sigmas(ladder, uniform, "lognormal", -0.8, 1.4)
    expected = torch.tensor([0.01, math.exp(-2.2), math.exp(-0.8), math.exp(0.6)])
    torch.testing.assert_close(sigmas, expected, rtol=1e-4, atol=0)
    shifted = draw_sigmas(ladder, uniform, log_sigma_mean=0.0, log_sigma_std=1.0)
    torch.testing.assert_close(shifted[1:].log(), torch.tensor([-1.0, 0.0, 1.0]), rtol=1e-4, atol=1e-4)
    assert draw_sigmas(ladder, torch.tensor([1 - 1e-7]), log_sigma_std=9.0) <= 50.001


def test_uniform_levels_are_the_papers():
    scheduler = AnnealedLangevinScheduler(num_train_timesteps=10, sigma_max=1.0)
    levels, counts = draw_sigmas(scheduler.ladder, torch.arange(1000) / 1000, "uniform").unique(return_counts=True)
    torch.testing.assert_close(levels, train_sigmas(scheduler))
    assert counts.tolist() == [100] * 10


def test_normal_quantile_is_right_to_the_tails():
    powers = torch.logspace(-11, math.log10(0.5), 20_000)
    uniform = torch.cat([powers, 1 - powers, torch.linspace(0, 1, 20_001)[1:-1], torch.tensor([0.075, 0.925])])
    exact = torch.special.ndtri(uniform.double())
    inside = exact.isfinite()  # 1 - 1e-11 is 1 in float32
    error = (normal_quantile(uniform) - exact).abs() / exact.abs().clamp(min=1)
    assert error[inside].max() < 1e-6
    ends = normal_quantile(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([-6.7060, 6.7060], abs=1e-3)  # as for 1e-11: finite


def test_unknown_distribution():
    with pytest.raises(ValueError, match=r"`distribution` must be one of .*not 'cosine'"):
        draw_sigmas(AnnealedLangevinScheduler().ladder, torch.rand(3), "cosine")


def test_stratified_draws_are_uniform_and_even():
    uniform = torch.rand(1000, 8, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([stratified(row) for row in uniform])
    assert torch.equal((draws * 8).floor(), torch.arange(8.0).expand(1000, 8))
    assert draws.mean().item() == pytest.approx(0.5, abs=1e-3)
    means = draws.mean(1)
    assert means.std() < uniform.mean(1).std() / 5


def test_mixture_oracle_itself():
    # D is the gradient of log p in Tweedie's formula: checked against automatic differentiation
    mixture = GaussianMixture([0.3, 0.7], [[0.0, 1.0], [1.0, -1.0]], [0.2, 0.5])
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    variances = mixture.deviations**2 + 0.4**2
    log_p = torch.logsumexp(
        mixture.weights.log()
        - (x[:, None] - mixture.means).square().sum(-1) / (2 * variances)
        - torch.log(2 * math.pi * variances),
        -1,
    )
    (score,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(mixture.denoised(x, 0.4), x + 0.4**2 * score)
