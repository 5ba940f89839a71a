"""
Posterior samples with the right share of each mode: twisted weights (Wu et al. 2023, arXiv:2306.17775).

A chain that steps with the estimate D_y of measured.py decides between modes that are far apart at levels at which D_y
is only an approximation. Here that chain is a proposal, and the target is the prior's own chain, twisted by how well
its estimate D fits the measurement y:

    log w += -(‖m₁ - m₀‖²/(2 c²) + (m₁ - m₀)·z/c)                 m₁, m₀: the step's mean with D_y, with D          (1)
    log w += ψ' - ψ,    ψ = log N(y; A D, sigma_y² + c_e A Aᵀ),    c_e = sigma² s²/(s² + sigma²)                   (2)

with the step's noise c z, and s = ½, the data's deviation. D takes a third evaluation at each level. Samples are
resampled as in resampling.py.
"""

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from .measured import Measured
from .operators import LinearOperator, dot
from .resampling import DATA_VARIANCE, Particles


class Twisted(Measured):
    """
    The denoiser E[x0 | x, y] of a chain whose samples are weighted by (1) and (2) and resampled.

    Args:
        denoiser, operator, measurement, noise_std, num_evaluations, generator: As of [`Measured`].
        particles ([`Particles`]): The weights.
        scheduler ([`AnnealedLangevinScheduler`]): Whose steps are weighted, and whose memory is resampled.
    """

    def __init__(
        self,
        denoiser: Callable,
        operator: LinearOperator,
        measurement: torch.Tensor,
        noise_std: float,
        num_evaluations: int,
        generator: torch.Generator | None,
        particles: Particles,
        scheduler,
    ):
        super().__init__(denoiser, operator, measurement, noise_std, num_evaluations, generator)
        self.particles, self.scheduler = particles, scheduler
        self._fit = torch.zeros(len(measurement), device=measurement.device)  # ψ
        self._difference = self._last_difference = None  # D_y - D, and that of the level before

    def settle(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """The samples that go on from this level."""
        denoised = self.denoiser(x, sigma)
        c_e = sigma**2 * DATA_VARIANCE / (sigma**2 + DATA_VARIANCE)
        misfit = self.y - self.operator.A(denoised)
        fit = -0.5 * dot(misfit, self.operator.solve(misfit, c_e, self.noise_std**2)[0])
        self.particles.log_weights += fit - self._fit  # (2); the determinant is the same for all
        estimate = super().__call__(x, sigma)
        kept = self.particles.resample(always=self.to_come <= 0)
        self.scheduler.reorder(kept)
        self.mu, self.shift, self._fit = self.mu[kept], self.shift[kept], fit[kept]
        self._estimate, self._difference = estimate[kept], (estimate - denoised)[kept]
        if self._last_difference is not None:
            self._last_difference = self._last_difference[kept]
        return x[kept]

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x, y] of the samples that [`settle`] returned."""
        return self._estimate

    def noise(self, i: int) -> torch.Tensor:
        """The noise z of row i, by which the samples are weighted, too."""
        row, difference = self.scheduler.table[i], self._difference
        z = randn_tensor(difference.shape, generator=self.generator, device=difference.device, dtype=difference.dtype)
        shift = (1 - row.kappa) * difference  # m1 - m0
        if row.extrapolation and self._last_difference is not None:
            shift = shift + row.extrapolation * (difference - self._last_difference)
        if row.c:
            self.particles.log_weights -= dot(shift, shift) / (2 * row.c**2) + dot(shift, z) / row.c  # (1)
        self._last_difference = difference
        return z
