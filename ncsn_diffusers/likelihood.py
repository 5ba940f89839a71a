"""
What a score network is worth without sampling: its loss at each noise level, its distance from a known score, and the
likelihood it gives to images.

**Likelihood.** Along the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, equation 13), here with the noise
level itself as time, the noisy data keep their distribution at every sigma:

    dx/dsigma = -sigma score(x, sigma) = (x - D(x, sigma))/sigma,

with the denoised estimate D. In u = log sigma and y = x/c, c = √(1 + sigma²), what the network sees, this reads

    dy/du = (x/(1 + sigma²) - D)/c,                                                                              (1)

whose right side vanishes as sigma grows, so that a few dozen steps of equal length in u are exact to four digits. The
logarithm of the density changes by the divergence (their equation 39), and at sigma_max y is taken to be N(0, I). (Data
in [0, 1] have their middle at ½, and chains begin there: at sigma_max = 50 that costs 5·10⁻⁵ nats per dimension, 0.06
at sigma_max = 1.) With d the number of dimensions,

    log p(x) = log N(y_max; 0, I) - d log c_min + ∫ (d/(1 + sigma²) - tr ∂D/∂x) du,   u from log sigma_min up.   (2)

The trace is estimated by vᵀ (∂D/∂x) v with random signs v (Hutchinson), one backward pass each.

p is the density of the data with noise of sigma_min. For 8-bit images see [`bits_per_dim`].
"""

import math
from collections.abc import Callable, Sequence

import torch

from .denoiser import Denoiser
from .score_matching import score_matching_loss
from .units import Units


@torch.no_grad()
def loss_per_level(
    denoiser: Denoiser,
    data: torch.Tensor,
    noise: torch.Tensor,
    sigmas: Sequence[float],
) -> torch.Tensor:
    """
    The denoising score matching loss ½ ‖sigma score(x, sigma) + z‖²/d of each sample at each noise level: see
    [`score_matching_loss`]. Even the exact score has a loss above 0, but of two networks the one with the lower
    loss has the better score.

    Args:
        denoiser ([`Denoiser`]): the network.
        data (`torch.Tensor` of shape `(n, ...)`): x0, in the network's units.
        noise (`torch.Tensor` of shape `(n, ...)`): z, standard normal, the same at every level.
        sigmas (`Sequence[float]` of length L): noise levels within the ladder, in the network's units.

    Returns:
        `torch.Tensor` of shape `(L, n)`.

    Raises:
        ValueError: a noise level is outside the ladder, or images and noise are not floating and of one shape.
    """
    _check_levels(denoiser, data, noise, sigmas)
    levels = [torch.full((len(data),), sigma, dtype=torch.float32, device=data.device) for sigma in sigmas]
    return torch.stack([score_matching_loss(denoiser, data, noise, level) for level in levels])


@torch.no_grad()
def score_error(
    denoiser: Denoiser,
    exact: Callable[[torch.Tensor, float], torch.Tensor],
    data: torch.Tensor,
    noise: torch.Tensor,
    sigmas: Sequence[float],
) -> torch.Tensor:
    """
    The squared error of the score, sigma² ‖score(x, sigma) - score*(x, sigma)‖²/d, on data whose score is known: the
    network's loss exceeds the least possible one by half of its mean (Vincent 2011).

    Args:
        denoiser ([`Denoiser`]): the network.
        exact (denoiser): E[x0 | x].
        data (`torch.Tensor` of shape `(n, ...)`): x0, in the network's units.
        noise (`torch.Tensor` of shape `(n, ...)`): z, standard normal: x = x0 + sigma z.
        sigmas (`Sequence[float]` of length L): noise levels within the ladder, in the network's units.

    Returns:
        `torch.Tensor` of shape `(L, n)`: 1 for a network that returns the score 0, where the noise is all there is.

    Raises:
        ValueError: as [`loss_per_level`].
    """
    _check_levels(denoiser, data, noise, sigmas)
    errors = []
    for sigma in sigmas:
        x = data + sigma * noise
        error = (denoiser(x, sigma) - exact(x, sigma)) / sigma  # score = (D - x)/sigma²
        errors.append(error.square().flatten(1).mean(1))
    return torch.stack(errors)


@torch.no_grad()
def log_likelihood(
    denoiser: Denoiser,
    x: torch.Tensor,
    probes: torch.Tensor,
    num_steps: int = 25,
) -> torch.Tensor:
    """
    log p(x), equation (2), by the classical Runge-Kutta method: 4 `num_steps` evaluations, and one
    backward pass per probe for each.

    Args:
        denoiser ([`Denoiser`]): the network.
        x (`torch.Tensor` of shape `(n, ...)`): in the network's units, on the network's device.
        probes (`torch.Tensor` of shape `(k, n, ...)`):
            The vectors v, whose estimates of the trace are averaged: independent random signs; or, for the exact trace
            in d dimensions, the k = d unit vectors times √d.
        num_steps (`int`, defaults to 25): steps from sigma_min to sigma_max, equal in log sigma.

    Returns:
        `torch.Tensor` of shape `(n,)`: log p in nats, in the network's units, float64, on the CPU, without a gradient.

    Raises:
        ValueError: x is not floating, the probes have another shape, or there are fewer than 1 step.
    """
    if not x.is_floating_point():
        raise ValueError(f"`x` must be floating, in the network's units, not {x.dtype}.")
    if probes.ndim != x.ndim + 1 or probes.shape[1:] != x.shape or not len(probes):
        raise ValueError(f"`probes` must be of shape (k, *{tuple(x.shape)}), not {tuple(probes.shape)}.")
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, not {num_steps}.")
    d = x[0].numel()

    def slope(y, u):
        """dy/du and du/dlog p at y, log sigma = u."""
        sigma = math.exp(u)
        c = math.sqrt(1 + sigma**2)
        with torch.enable_grad():
            x = (c * y).requires_grad_()
            denoised = denoiser(x, sigma)
        trace = 0
        for k, probe in enumerate(probes):
            (product,) = torch.autograd.grad(denoised, x, probe, retain_graph=k < len(probes) - 1)
            trace = trace + (product * probe).flatten(1).sum(1).cpu().double()
        dy = (x / c**2 - denoised).detach() / c  # (1)
        return dy, d / c**2 - trace / len(probes)

    low, high = math.log(denoiser.ladder.smallest), math.log(denoiser.ladder.largest)
    h = (high - low) / num_steps
    c_min = math.sqrt(1 + denoiser.ladder.smallest**2)
    y, integral = x.float() / c_min, torch.zeros(len(x), dtype=torch.float64)
    for step in range(num_steps):
        u = low + step * h
        dy1, dl1 = slope(y, u)
        dy2, dl2 = slope(y + h / 2 * dy1, u + h / 2)
        dy3, dl3 = slope(y + h / 2 * dy2, u + h / 2)
        dy4, dl4 = slope(y + h * dy3, u + h)
        y = y + h / 6 * (dy1 + 2 * dy2 + 2 * dy3 + dy4)
        integral += h / 6 * (dl1 + 2 * dl2 + 2 * dl3 + dl4)
    log_prior = -0.5 * (y.cpu().double().square().flatten(1).sum(1) + d * math.log(2 * math.pi))
    return log_prior - d * math.log(c_min) + integral  # (2)


def bits_per_dim(
    denoiser: Denoiser,
    images: torch.Tensor,
    generators: Sequence[torch.Generator],
    units: Units,
    num_steps: int = 25,
    num_probes: int = 1,
) -> torch.Tensor:
    """
    Bits that the model needs per 8-bit value of an image: in expectation an upper bound.

    The density p of [`log_likelihood`] gives an image x the probability ∫ p over the cube around it, whose side w is
    one 8-bit step in the network's units. By Jensen's inequality that is at least w^d exp E[log p(x + n)], n
    uniform in the cube (uniform dequantization: Theis et al. 2016, arXiv:1511.01844). One n is drawn for each image.

    Args:
        denoiser ([`Denoiser`]): the network.
        images (`torch.Tensor` of shape `(n, channels, height, width)`): uint8.
        generators (`Sequence[torch.Generator]` of length n):
            One for each image, on the CPU, so that an image's value does not depend on the others.
        units ([`Units`]): of the pipeline, which say where black and white are for the network.
        num_steps (`int`, defaults to 25): see [`log_likelihood`].
        num_probes (`int`, defaults to 1): vectors that the trace is estimated with.

    Returns:
        `torch.Tensor` of shape `(n,)`: bits per dimension, float64, on the CPU.

    Raises:
        ValueError: the images are not uint8, or there is not one generator for each.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"`images` must be uint8, not {images.dtype}: the bits are those of 8-bit images.")
    if len(generators) != len(images):
        raise ValueError(f"`generators` must be one for each of the {len(images)} images, not {len(generators)}.")
    offsets = torch.stack([torch.rand(images.shape[1:], generator=g) for g in generators]) - 0.5
    x = units.to_network((images + offsets.to(images.device)) / 255)
    log_p = log_likelihood(denoiser, x, _draw_signs(x, generators, num_probes), num_steps)
    log_width = -units.scale(x).double().cpu().log2().mean().item() - math.log2(255)  # of a step, for the network
    return -log_p / (x[0].numel() * math.log(2)) - log_width


def nats_per_number(
    denoiser: Denoiser,
    data: torch.Tensor,
    generators: Sequence[torch.Generator],
    units: Units,
    num_steps: int = 25,
    num_probes: int = 1,
) -> torch.Tensor:
    """
    -log p(x)/d of data in their own units, whose density is that of [`log_likelihood`] over the volume of a unit of
    the network's, ∏ 2 data_std. It may be below 0, and changes with the unit of the data: by log 1000 from m to km.

    Args:
        denoiser ([`Denoiser`]): the network.
        data (`torch.Tensor` of shape `(n, channels, ...)`): floating, in the units of the data.
        generators, num_steps, num_probes: as of [`bits_per_dim`].
        units ([`Units`]): of the pipeline.

    Returns:
        `torch.Tensor` of shape `(n,)`: nats, float64, on the CPU.

    Raises:
        ValueError: the data are not floating, or there is not one generator for each.
    """
    if not data.is_floating_point():
        raise ValueError(f"`data` must be floating, in the units of the pipeline, not {data.dtype}.")
    x = units.to_network(data).float()
    log_p = log_likelihood(denoiser, x, _draw_signs(x, generators, num_probes), num_steps)
    return units.scale(x).double().cpu().log().mean().item() - log_p / x[0].numel()


def _draw_signs(x: torch.Tensor, generators: Sequence[torch.Generator], num_probes: int) -> torch.Tensor:
    """Random signs `(num_probes, *x.shape)`, of each sample by its own generator."""
    if len(generators) != len(x):
        raise ValueError(f"`generators` must be one for each of the {len(x)} samples, not {len(generators)}.")
    if num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1, not {num_probes}.")
    shape = (num_probes, *x.shape[1:])
    return torch.stack([torch.randint(2, shape, generator=g) * 2.0 - 1 for g in generators], dim=1).to(x.device)


def _check_levels(denoiser: Denoiser, data: torch.Tensor, noise: torch.Tensor, sigmas: Sequence[float]) -> None:
    if not data.is_floating_point() or noise.shape != data.shape:
        raise ValueError(
            "`data` must be floating, in the network's units, and `noise` of their shape, not "
            f"{data.dtype} of {tuple(data.shape)} and {tuple(noise.shape)}."
        )
    low, high = denoiser.ladder.smallest, denoiser.ladder.largest
    if not all(low * (1 - 1e-5) <= sigma <= high * (1 + 1e-5) for sigma in sigmas):
        raise ValueError(f"`sigmas` must lie in the ladder, from {low:g} to {high:g}, not {list(sigmas)}.")
