"""The loss per level, the score error and the likelihood against closed forms."""

import math

import pytest
import torch
from networks import MIXTURE, AnalyticUNet, Gaussian, GaussianUNet, train_sigmas
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from ncsn_diffusers import AnnealedLangevinScheduler
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.likelihood import bits_per_dim, log_likelihood, loss_per_level, score_error
from ncsn_diffusers.scheduling_annealed_langevin import CONDITIONINGS, PREDICTION_TYPES
from ncsn_diffusers.units import Units, image_units

ROTATED = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
# Correlated, with deviations from 0.02, little above sigma_min, to 0.8
GAUSSIAN = Gaussian(
    torch.linspace(-0.5, 0.5, 8), ROTATED @ torch.diag(torch.logspace(-1.7, -0.1, 8).double() ** 2) @ ROTATED.T
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_unet(scheduler):
    arguments = {"prediction_type": scheduler.config.prediction_type, "conditioning": scheduler.config.conditioning}
    return GaussianUNet(GAUSSIAN, 2, 4, train_sigmas(scheduler).tolist(), **arguments)


def mixture_unet(scheduler):
    arguments = {"prediction_type": scheduler.config.prediction_type, "conditioning": scheduler.config.conditioning}
    return AnalyticUNet(train_sigmas(scheduler).tolist(), **arguments)


def unit_probes(n, d=8):
    """Those that give the exact trace."""
    return math.sqrt(d) * torch.eye(d).reshape(d, 1, 1, 2, d // 2).expand(d, n, 1, 2, d // 2)


def noisy_gaussian(sigma):
    return MultivariateNormal(GAUSSIAN.mean, GAUSSIAN.covariance + sigma**2 * torch.eye(8))


def noisy_mixture(sigma):
    deviations = (MIXTURE.deviations**2 + sigma**2).sqrt()
    return MixtureSameFamily(
        Categorical(MIXTURE.weights), Independent(Normal(MIXTURE.means, deviations[:, None].expand(3, 8)), 1)
    )


# --- Likelihood ---


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_likelihood_of_a_gaussian(prediction_type, conditioning):
    # at sigma_max the prior lacks the data's mean: one part in sigma_max
    scheduler = AnnealedLangevinScheduler(sigma_max=500.0, prediction_type=prediction_type, conditioning=conditioning)
    exact = noisy_gaussian(scheduler.config.sigma_min)
    torch.manual_seed(0)
    x = exact.sample((100,))
    log_p = log_likelihood(
        Denoiser.of(gaussian_unet(scheduler), scheduler), x.reshape(-1, 1, 2, 4).float(), unit_probes(100), 40
    )
    torch.testing.assert_close(log_p, exact.log_prob(x), rtol=0, atol=0.01)


def test_entropy_of_a_gaussian_to_three_digits():
    scheduler = AnnealedLangevinScheduler()
    exact = noisy_gaussian(scheduler.config.sigma_min)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * exact.covariance_matrix).item()
    # Points whose mean and covariance are the Gaussian's exactly, so that their mean of -log p is the entropy exactly
    points = math.sqrt(8) * torch.cat([torch.eye(8), -torch.eye(8)]).double() @ exact.scale_tril.T + exact.mean
    points = points.reshape(-1, 1, 2, 4).float()
    log_p = log_likelihood(Denoiser.of(gaussian_unet(scheduler), scheduler), points, unit_probes(16))
    assert -log_p.mean().item() == pytest.approx(entropy, rel=1e-3)


def test_likelihood_of_a_mixture():
    scheduler = AnnealedLangevinScheduler(sigma_max=500.0)
    exact = noisy_mixture(scheduler.config.sigma_min)
    torch.manual_seed(0)
    x = torch.cat([exact.sample((60,)), torch.rand(20, 8, dtype=torch.float64) - 0.5])  # and between the components
    images = x.reshape(-1, 1, 2, 4).float()
    log_p = log_likelihood(Denoiser.of(mixture_unet(scheduler), scheduler), images, unit_probes(80), num_steps=100)
    torch.testing.assert_close(log_p, exact.log_prob(x), rtol=4e-3, atol=0.01)


def test_entropy_of_a_mixture_by_monte_carlo():
    scheduler = AnnealedLangevinScheduler()
    exact = noisy_mixture(scheduler.config.sigma_min)
    torch.manual_seed(0)
    entropy = -exact.log_prob(exact.sample((200_000,))).mean().item()  # standard error 0.005
    x = exact.sample((2_000,)).reshape(-1, 1, 2, 4).float()
    signs = torch.randint(2, (1, *x.shape), generator=generator()) * 2.0 - 1
    log_p = log_likelihood(Denoiser.of(mixture_unet(scheduler), scheduler), x, signs)
    assert abs(-log_p.mean() - entropy) < 4 * log_p.std() / math.sqrt(2_000)


def test_the_integral_converges_at_fourth_order():
    scheduler = AnnealedLangevinScheduler(sigma_min=0.05)
    x = MIXTURE.sample(20, generator()).reshape(-1, 1, 2, 4).float()
    values = [
        log_likelihood(Denoiser.of(mixture_unet(scheduler), scheduler), x, unit_probes(20), n) for n in (10, 20, 80)
    ]
    coarse, fine = ((value - values[-1]).abs().mean() for value in values[:2])
    assert fine < coarse / 8


def test_hutchinsons_estimate_is_unbiased():
    scheduler = AnnealedLangevinScheduler()
    x = noisy_gaussian(0.01).sample((1,)).reshape(1, 1, 2, 4).float().expand(400, 1, 2, 4)
    signs = torch.randint(2, (1, 400, 1, 2, 4), generator=generator()) * 2.0 - 1
    model = Denoiser.of(gaussian_unet(scheduler), scheduler)
    estimates = log_likelihood(model, x, signs)
    exact = log_likelihood(model, x[:1], unit_probes(1)).item()
    assert estimates.std() > 0.1
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 20
    # several probes are averaged
    four = log_likelihood(model, x[:100], signs.reshape(4, 100, 1, 2, 4))
    torch.testing.assert_close(four, estimates.reshape(4, 100).mean(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("data_min", [-1.0, 0.0])
def test_bits_per_dim_of_images_whose_probability_is_known(data_min):
    # the values of a Gaussian, in cells of one 8-bit value, have probabilities from its distribution function
    width, units = (1 - data_min) / 255, Units(**image_units(data_min))
    scheduler = AnnealedLangevinScheduler()
    gaussian = Gaussian(torch.full((8,), 0.1), 0.3**2 * torch.eye(8))
    model = GaussianUNet(gaussian, 2, 4, train_sigmas(scheduler).tolist())
    values = 0.1 + 0.3 * torch.randn(50, 1, 2, 4, generator=generator())
    images = ((values - data_min) / width).round().clamp(0, 255).to(torch.uint8)
    normal = Normal(0.1, math.sqrt(0.3**2 + scheduler.config.sigma_min**2))
    centers = data_min + width * images.double()
    probabilities = normal.cdf(centers + width / 2) - normal.cdf(centers - width / 2)
    exact = -probabilities.log2().flatten(1).mean(1)

    bits = bits_per_dim(Denoiser.of(model, scheduler), images, [generator(i) for i in range(50)], units)
    # within a cell log p varies with the offset, by 0.004 bits
    torch.testing.assert_close(bits, exact, rtol=0, atol=0.02)
    assert bits.mean() == pytest.approx(exact.mean().item(), abs=2e-3)
    # an image's value does not depend on the others
    alone = bits_per_dim(Denoiser.of(model, scheduler), images[7:8], [generator(7)], units)
    torch.testing.assert_close(alone, bits[7:8], rtol=0, atol=1e-6)


def test_the_likelihood_has_no_gradient():
    # the integral is not followed, and what is left of the gradient would be another one
    scheduler = AnnealedLangevinScheduler()
    x = torch.zeros(2, 1, 2, 4, requires_grad=True)
    assert not log_likelihood(
        Denoiser.of(mixture_unet(scheduler), scheduler), x, torch.ones(1, 2, 1, 2, 4), 2
    ).requires_grad


# --- The score ---


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_score_error_is_the_loss_above_the_least_possible(prediction_type):
    scheduler = AnnealedLangevinScheduler(prediction_type=prediction_type)
    perfect, wrong = (Denoiser.of(unet, scheduler) for unet in (mixture_unet(scheduler), gaussian_unet(scheduler)))
    images = MIXTURE.sample(20_000, generator()).reshape(-1, 1, 2, 4).float()
    noise = torch.randn(images.shape, generator=generator(1))
    sigmas = [0.05, 0.3, 2.0]

    def denoised(x, sigma):
        return MIXTURE.denoised(x.flatten(1).double(), sigma).reshape(x.shape).float()

    assert score_error(perfect, denoised, images, noise, sigmas).max() < 1e-5
    error = score_error(wrong, denoised, images, noise, sigmas)
    excess = loss_per_level(wrong, images, noise, sigmas)
    excess = excess - loss_per_level(perfect, images, noise, sigmas)
    assert error.shape == excess.shape == (3, 20_000)
    difference = excess - error / 2
    standard_error = difference.std(1) / math.sqrt(20_000)
    assert (difference.mean(1).abs() < 4 * standard_error).all()
    assert (error.mean(1) > 20 * standard_error).all()  # it is not nothing that is compared


# --- Wrong inputs ---


def test_wrong_inputs():
    scheduler = AnnealedLangevinScheduler()
    model, images = Denoiser.of(mixture_unet(scheduler), scheduler), torch.zeros(3, 1, 2, 4)
    with pytest.raises(ValueError, match=r"`sigmas` must lie in the ladder, from 0.01 to 50, not \[0.1, 60\]"):
        loss_per_level(model, images, images, [0.1, 60])
    with pytest.raises(ValueError, match=r"`sigmas` must lie in the ladder, from 0.01 to 50, not \[0.001\]"):
        score_error(model, lambda x, sigma: x, images, images, [0.001])
    for function, rest in ((loss_per_level, ()), (score_error, (lambda x, sigma: x,))):
        with pytest.raises(ValueError, match=r"floating, in the network's units, .* not torch\.uint8"):
            function(model, *rest, images.byte(), images, [1.0])
        with pytest.raises(ValueError, match=r"`noise` of their shape, .* \(3, 1, 2, 4\) and \(1, 1, 2, 4\)"):
            function(model, *rest, images, images[:1], [1.0])
    with pytest.raises(ValueError, match=r"`x` must be floating, in the network's units, not torch\.uint8"):
        log_likelihood(model, images.byte(), images[None])
    with pytest.raises(ValueError, match=r"`probes` must be of shape .* not \(3, 1, 2, 4\)"):
        log_likelihood(model, images, images)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, not 0"):
        log_likelihood(model, images, images[None], num_steps=0)
    with pytest.raises(ValueError, match=r"`images` must be uint8, not torch\.float32"):
        bits_per_dim(model, images, [generator()] * 3, Units())
    with pytest.raises(ValueError, match="`generators` must be one for each of the 3 images, not 1"):
        bits_per_dim(model, images.byte(), [generator()], Units())
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, not 0"):
        bits_per_dim(model, images.byte(), [generator()] * 3, Units(), num_probes=0)
