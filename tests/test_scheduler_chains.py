"""The chain of every scheduler, in terms of x = x0 + sigma z and of D."""

from itertools import pairwise

import diffusers
import pytest
import torch
from torch import nn

from ncsn_diffusers import AnnealedLangevinScheduler
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.foreign_configs import SCHEDULERS
from ncsn_diffusers.scheduler_chains import make_chain

NAMES = ["AnnealedLangevinScheduler", *(name for name in SCHEDULERS if name != "LMSDiscreteScheduler")]
VARIANCE = 0.25  # of Gaussian data


def chain_of(name, num_inference_steps=12, config=None, **kwargs):
    scheduler_class = AnnealedLangevinScheduler if name.startswith("Annealed") else getattr(diffusers, name)
    scheduler = scheduler_class.from_config(AnnealedLangevinScheduler().config, **(config or {}))
    settings = {"num_inference_steps": num_inference_steps}
    return make_chain(scheduler, Denoiser.of(nn.Linear(1, 1), scheduler), torch.device("cpu"), settings, **kwargs)


def run(chain, sample, denoiser):
    generator = torch.Generator().manual_seed(1)
    for i, sigma in enumerate(chain.sigmas):
        x = chain.to_x(sample, i)
        sample = chain.step(denoiser(x, sigma), x, i, sample, generator)
    return sample


def gaussian(x, sigma):
    """D of data N(0, VARIANCE)."""
    return VARIANCE / (VARIANCE + sigma**2) * x


def ancestral_variance(levels):
    """Of what ancestral steps draw with [`gaussian`]; a sixth too small with 50 of them."""
    variance = levels[0] ** 2
    for sigma, following in pairwise(levels):
        kappa = (following / sigma) ** 2
        variance *= (kappa + (1 - kappa) * VARIANCE / (VARIANCE + sigma**2)) ** 2
        variance += following**2 * (1 - kappa)
    return variance


@pytest.mark.parametrize("strength", [0.3, 0.7])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "PNDMScheduler"])
def test_noised_data_are_x0_plus_sigma_z(name, strength):
    chain = chain_of(name, strength=strength)
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.rand(2, 1, 4, generator=generator), torch.randn(2, 1, 4, generator=generator)
    x = chain.to_x(chain.start_from(data, noise), 0)
    # diffusers keeps some levels in float32, from differences of numbers near 1
    torch.testing.assert_close(x, data + chain.sigmas[0] * noise, rtol=2e-3, atol=2e-3)
    assert len(chain.timesteps) == len(chain.sigmas)


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_from_noise_begins_at_the_first_level(name):
    chain = chain_of(name)
    x = chain.to_x(chain.start(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)), 0)
    assert chain.begin == 0 and chain.sigmas[0] == chain.first_sigma
    assert x.item() == pytest.approx((chain.first_sigma**2 + 1) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_of_an_exact_denoiser_draws_the_data(name):
    chain = chain_of(name, 50)
    variance = VARIANCE
    if name in ("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler"):
        variance = ancestral_variance([*chain.sigmas, 0.0])
    start = chain.start(torch.randn(40_000, 1, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 1))
    samples = run(chain, start, gaussian)
    # 40,000 numbers: four errors of their mean; the error of their variance is 0.7 %, that of the steps up to 8 %
    assert samples.mean().item() == pytest.approx(0, abs=4 * (variance / 40_000) ** 0.5)
    assert samples.var().item() == pytest.approx(variance, rel=0.03 if variance < VARIANCE else 0.1)


def test_the_middle_of_the_data_is_where_langevin_chains_begin():
    middle = torch.tensor([[[3.0]]])
    noise = torch.zeros(1, 1, 1)
    assert chain_of("AnnealedLangevinScheduler").start(noise, middle).item() == 3
    assert chain_of("DDIMScheduler").start(noise, middle).item() == 0  # its sample is scaled data


def test_levels_of_a_product_are_divided_by_the_root_of_its_weights():
    whole, product = (chain_of("AnnealedLangevinScheduler", total=total) for total in (1.0, 4.0))
    assert product.sigmas == pytest.approx([sigma / 2 for sigma in whole.sigmas])
    with pytest.raises(ValueError, match="weights whose sum is 4 need AnnealedLangevinScheduler"):
        chain_of("DDIMScheduler", total=4.0)


def test_steps_of_a_pair_stay_together():
    chain = chain_of("HeunDiscreteScheduler", 10, strength=0.5)
    assert len(chain.timesteps) == 9 and chain.begin == 10  # five levels, of which the last takes one step

    class Settling:
        levels = []

        def settle(self, x, sigma):
            self.levels.append(sigma)
            return x + 1

    sample = torch.zeros(1, 1, 1)
    for i in range(len(chain.timesteps)):
        settled = chain.settle(Settling(), sample, i)
        # one more in x, in whatever unit the scheduler has
        assert (chain.to_x(settled, i) - chain.to_x(sample, i)).item() == pytest.approx(float(i % 2 == 0), abs=1e-5)
        sample = chain.step(torch.zeros(1, 1, 1), chain.to_x(settled, i), i, settled)
    assert Settling.levels == chain.sigmas[::2]


def test_without_memory_a_multistep_scheduler_is_ddim():
    start = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0))
    settings = {"final_sigmas_type": "zero", "timestep_spacing": "linspace"}
    drawn = run(chain_of("DPMSolverMultistepScheduler", 8, settings).without_memory(), start, gaussian)
    multistep = chain_of("DPMSolverMultistepScheduler", 8, settings)
    remembered = run(multistep, start, gaussian)
    expected = start
    levels = [*multistep.sigmas, 0.0]
    for sigma, following in pairwise(levels):  # DDIM in x
        x = expected * (1 + sigma**2) ** 0.5
        x = gaussian(x, sigma) + following / sigma * (x - gaussian(x, sigma))
        expected = x / (1 + following**2) ** 0.5
    torch.testing.assert_close(drawn, expected, rtol=2e-3, atol=1e-4)
    assert (remembered - expected).abs().max() > 0.01


def test_without_memory_langevin_steps_are_of_first_order():
    chain = chain_of("AnnealedLangevinScheduler")
    forgetful = chain.without_memory()
    assert any(row.extrapolation for row in chain.scheduler.table)
    assert not any(row.extrapolation for row in forgetful.scheduler.table)
    assert forgetful.sigmas == chain.sigmas


def test_noise_is_taken_where_it_is_drawn():
    chain = chain_of("AnnealedLangevinScheduler")
    assert chain.draws_noise() == [True] * 11 + [False]
    sample, noise = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    moved = chain.step(sample, sample, 0, sample, noise=noise)
    assert moved.item() == pytest.approx(chain.scheduler.table[0].c)
    assert chain_of("DDIMScheduler").draws_noise() == [False] * 12
    with pytest.raises(ValueError, match="draws noise in its steps that cannot be mixed"):
        chain_of("EulerAncestralDiscreteScheduler").draws_noise()


def test_a_chain_that_would_begin_with_noise_at_a_small_level_is_refused():
    config = {"timestep_spacing": "leading"}
    with pytest.raises(ValueError, match="would begin at sigma"):
        chain_of("DDIMScheduler", 1, config)
    assert len(chain_of("DDIMScheduler", 1, config, strength=0.5).sigmas) == 1  # from data it may
