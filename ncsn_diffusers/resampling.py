"""
Weights that make a chain's target right, and resampling by them.

The sampler of a product (denoiser.py, equation (2)) draws its noisy densities' product at each level, but those are not
the noisy densities of the product: the shares of its modes come out wrong. Samples are therefore weighted along the
chain (Feynman–Kac; Skreta et al. 2025, arXiv:2503.02819, for diffusion models) and resampled: the more probable ones
are copied, others dropped. With levels tau' after tau, in d dimensions,

    log w += ½ (R + R') log(tau/tau'),                                                                           (1)
    R = [‖D - x‖² - Σ (w_i/W) ‖D_i - x‖²]/tau² - (W - 1) (div D - d).

For W = 1 (guidance; "and", as in p₁ p₂/p₀) the divergence drops out. Otherwise one random sign vector v estimates it,
v·(D(x + e v) - D(x))/e, with one evaluation more at each level.

A reward r(x) turns the target p into p exp(r), without its gradient. With g = s²/(s² + tau²), where s = ½ is the data's
deviation,

    log w += g' r(D') - g r(D).                                                                                  (2)

Resampling is systematic, within groups of samples of one target, when the effective number 1/Σ w² falls below half of
the group, and at the end. Few distinct ancestors mean that the network's scores do not belong together: then the
weights lead nowhere, and the samples are no better than without them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .checks import check_count
from .denoiser import Guided, Product
from .foreign_configs import is_langevin

# The step of the difference that estimates the divergence, in units of the level that the networks are told.
_PROBE_STEP = 0.02
DATA_VARIANCE = 0.25  # s², in the network's units


@dataclass(frozen=True)
class ResamplingReport:
    """
    What resampling did in a call.

    Args:
        num_samples (`int`): The samples of the call.
        num_ancestors (`int`): Distinct samples, of those that the chain began with, that have offspring in the result.
        spread (`float`): The largest standard deviation of a group's log weights at any level, in nats.
        num_levels (`int`): Levels at which some group was resampled.
    """

    num_samples: int
    num_ancestors: int
    spread: float
    num_levels: int


class Particles:
    """
    Samples with weights.

    Args:
        groups (sequence of int64 tensors): The indices of the samples of each group, which together are 0 to n - 1.
        device (`str` or `torch.device`): Where the samples are.
        generator (`torch.Generator`, *optional*): The randomness of resampling.
    """

    def __init__(self, groups: Sequence[torch.Tensor], device, generator: torch.Generator | None = None):
        self.groups, self.generator = [group.to(device) for group in groups], generator
        num = sum(map(len, groups))
        self.log_weights = torch.zeros(num, device=device)
        self.ancestors = torch.arange(num, device=device)
        self._spread, self._levels = torch.zeros((), device=device), torch.zeros((), device=device)

    def resample(self, always: bool = False) -> torch.Tensor:
        """
        The indices of the samples that go on, `(n,)`: as they are, but in groups whose effective number is below half,
        or in all of them. Nothing is read on the host.
        """
        indices, any_needed = torch.empty_like(self.ancestors), torch.zeros((), device=self.ancestors.device)
        for group in self.groups:
            log_weights = self.log_weights[group]
            shares, count = log_weights.softmax(0), len(group)
            needed = (1 / shares.square().sum() < 0.5 * count) | always
            offset = torch.rand((), generator=self.generator, device=self._random_device()).to(group.device)
            places = (torch.arange(count, device=group.device) + offset) / count
            chosen = torch.searchsorted(shares.cumsum(0), places).clamp(max=count - 1)
            indices[group] = torch.where(needed, group[chosen], group)
            self.log_weights[group] = torch.where(needed, 0.0, log_weights)
            if count > 1:
                self._spread = torch.maximum(self._spread, log_weights.std())
            any_needed = torch.maximum(any_needed, needed.float())
        self._levels = self._levels + any_needed
        self.ancestors = self.ancestors[indices]
        return indices

    def _random_device(self):
        return "cpu" if self.generator is None else self.generator.device

    def signs(self, like: torch.Tensor) -> torch.Tensor:
        """Independent random signs of the shape of `like`."""
        draws = torch.randint(0, 2, like.shape, generator=self.generator, device=self._random_device())
        return (2 * draws - 1).to(like)

    def report(self) -> ResamplingReport:
        """What was done; waits for the device."""
        num_ancestors = len(self.ancestors.unique())
        return ResamplingReport(len(self.ancestors), num_ancestors, self._spread.item(), int(self._levels.item()))


class Weighted:
    """
    A product's denoiser that weights the samples by (1) and (2) and resamples them, for one chain.

    Args:
        product ([`Product`]): The denoiser; a single density is a product of one part.
        particles ([`Particles`]): The weights.
        scheduler ([`AnnealedLangevinScheduler`]): Whose memory of the samples is resampled with them.
        reward (function, *optional*): r, from denoised samples in the network's units to a tensor `(n,)`.
    """

    def __init__(self, product: Product, particles: Particles, scheduler, reward: Callable | None = None):
        self.product, self.particles, self.scheduler, self.reward = product, particles, scheduler, reward
        self._last = None  # sigma, R
        self._value = 0.0  # g r(D)

    def settle(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The samples that go on from this level."""
        product, particles = self.product, self.particles
        estimates = product.estimates(x, sigma)
        denoised = product.combine(estimates)
        rate = _square(denoised - x)
        for share, estimate in zip(product.shares, estimates, strict=True):
            rate = rate - share * _square(estimate - x)
        rate = rate / sigma**2
        if abs(product.total - 1) > 1e-6:
            signs, step = particles.signs(x), _PROBE_STEP * product.network_sigma(sigma)
            moved = product(x + step * signs, sigma) - denoised
            divergence = (signs * moved).flatten(1).sum(1) / step
            rate = rate - (product.total - 1) * (divergence - x[0].numel())
        if self._last is not None:
            last_sigma, last_rate = self._last
            particles.log_weights += 0.5 * (last_rate + rate) * math.log(last_sigma / sigma)  # (1)
        value = torch.zeros_like(rate)
        if self.reward is not None:
            value = DATA_VARIANCE / (DATA_VARIANCE + sigma**2) * self.reward(denoised)
            particles.log_weights += value - self._value  # (2)
        kept = particles.resample()
        self.scheduler.reorder(kept)
        self._last, self._value = (sigma, rate[kept]), value[kept]
        self._denoised = denoised[kept]
        return x[kept]

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """D of the samples that [`settle`] returned."""
        return self._denoised

    def finish(self, samples: torch.Tensor) -> torch.Tensor:
        """The last resampling, after which all weights are equal."""
        return samples[self.particles.resample(always=True)]


def make_weighted(
    denoiser: Callable,
    num: int,
    device,
    scheduler,
    generator: torch.Generator | None,
    resample: bool | int,
    reward: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Weighted:
    """
    The denoiser of a call that resamples.

    Args:
        denoiser ([`Denoiser`], [`Guided`] or [`Product`]): Of the call.
        num (`int`), device: The number of samples, and where they are.
        scheduler ([`AnnealedLangevinScheduler`]), generator (`torch.Generator`, *optional*): The call's.
        resample (`bool` or `int`): `True`, or the largest group that is resampled together.
        reward (function, *optional*): As in [`Weighted`].

    Raises:
        ValueError: resampling would not be what the call asks for; the message says why.
    """
    if not isinstance(resample, bool):
        check_count("resample", resample, at_least=2)
    if not is_langevin(scheduler):
        raise ValueError(
            f"`resample` needs AnnealedLangevinScheduler, not {type(scheduler).__name__}, whose memory of the samples "
            "cannot be resampled with them."
        )
    if isinstance(generator, list):
        raise ValueError(
            "`resample` chooses among the samples of a batch, so that each depends on the others: give one `generator` "
            "for all, not one for each."
        )
    if isinstance(denoiser, Guided):
        if math.isfinite(denoiser.max_sigma):
            raise ValueError(
                "`resample` is for one target at all levels, and `guidance_max_sigma` makes it another above that "
                "level: leave out one of them."
            )
        labels = denoiser.conditional.labels
        parts = [(denoiser.conditional, denoiser.scale), (denoiser.unconditional, 1 - denoiser.scale)]
        product = Product(parts if denoiser.scale != 1 else parts[:1])
    else:
        labels = getattr(denoiser, "labels", None)
        product = denoiser if isinstance(denoiser, Product) else Product([(denoiser, 1.0)])
    groups = make_groups(labels, num, None if resample is True else resample)
    return Weighted(product, Particles(groups, device, generator), scheduler, reward)


def make_groups(labels: torch.Tensor | None, num: int, size: int | None = None) -> list[torch.Tensor]:
    """
    The indices of samples of one target, in groups.

    Args:
        labels (`torch.Tensor` of shape `(num,)`, *optional*): Samples of different labels have different targets.
        num (`int`): The number of samples.
        size (`int`, *optional*): The largest group; all samples of a target are one when not given.

    Returns:
        `list[torch.Tensor]`: int64, on the CPU.
    """
    labels = torch.zeros(num) if labels is None else labels.cpu()
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    return [group for one in members for group in one.split(size or num)]


def _square(a: torch.Tensor) -> torch.Tensor:
    return a.square().flatten(1).sum(1)
