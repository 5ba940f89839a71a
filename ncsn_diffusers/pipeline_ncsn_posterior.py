"""Images given a measurement: samples of the posterior for any linear operator.

The problem
-----------
A measurement y = A x0 + n is given, with a linear operator A (a mask, a blur, averages, a projection) and noise n ~
N(0, sigma_y² I); wanted are images x0 drawn from p(x0 | y), where p(x0) is the network's. A sampler of p(x0) becomes
one of p(x0 | y) when at every level the estimate D(x, sigma) = E[x0 | x] gives way to E[x0 | x, y], which the network
does not know.

The estimate
------------
Let the data be Gaussian, x0 ~ N(m, S), and x = x0 + sigma z. Given x, x0 is Gaussian with

    mean D(x, sigma) = m + S (S + sigma²)⁻¹ (x - m)    and covariance    C = sigma² J,    J = S (S + sigma²)⁻¹,

J being the Jacobian of D. The measurement then adds, by the formula for conditional Gaussians,

    E[x0 | x, y] = D(x, sigma) + C Aᵀ mu,    mu = (A C Aᵀ + sigma_y²)⁻¹ (y - A D(x, sigma)).

C = sigma² J and D is affine, so that D(x, sigma) + C Aᵀ mu = D(x + sigma² Aᵀ mu, sigma): no Jacobian is left. And mu
solves its equation exactly where, multiplied out,

    E[x0 | x, y] = D(x + sigma² Aᵀ mu, sigma)    with    A D(x + sigma² Aᵀ mu, sigma) + sigma_y² mu = y.          (1)

The network is asked about a shifted x, the shift being such that the answer agrees with the measurement. For other data
(1) is an approximation.

The multiplier
--------------
On average over x, mu is sigma_y⁻² (y - A E[x0 | y]), whatever sigma is: it belongs to the data, not to the level. So it
is carried down the ladder from 0, and at each level improved as follows. With c = sigma²,

1.  x̃ = x + c Aᵀ mu,   D = D(x̃, sigma),   r = y - A D - sigma_y² mu.
2.  One iteration of conjugate gradients on (1), whose matrix is sigma_y² + c A J Aᵀ, preconditioned by J = 1:
    z = (sigma_y² + c A Aᵀ)⁻¹ r,   Jz = D(x̃ + c Aᵀ z, sigma) - D,   q = sigma_y² z + A Jz,   a = ⟨r, z⟩/⟨z, q⟩,
    for each image, 0 where ⟨z, q⟩ ≤ 10⁻⁴ ⟨r, z⟩ (the network's noise, where J is almost 0);
    mu += a z,   D += a Jz,   r -= a q.
3.  z = (sigma_y² + c A Aᵀ)⁻¹ r,   D_y = D + c Aᵀ z,   mu += z.

The scheduler steps with D_y in the place of D, whichever it is. 2 takes a second network evaluation; 3 takes none,
since it holds J = 1: x0 is taken to be as uncertain as x is noisy. Where the data vary less than that, it believes the
measurement too much, and mu at the next level makes up for it. Backward passes are not needed.

This is exact for Gaussian data as the steps become many. It is not for mixtures of far-apart modes, where the share of
each mode is decided at levels where (1) is only an approximation.

The end
-------
The last step lands on the estimate D_y at the smallest level sigma_L: what is uncertain below sigma_L is not drawn. In
directions that the measurement fixes to a precision near sigma_L or finer, that would be all of it. The last estimate
is therefore drawn from the Gaussian that (1) describes, at the cost of the evaluation of 2: with fresh normal e and n,

    e' = sigma_L J e,    x0 = D_y + e' + c Aᵀ (sigma_y² + c A Aᵀ)⁻¹ (sigma_y n - A e').                            (2)
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_choice
from .hub.loading import NCSNPipeline
from .inputs import ClassLabels
from .operators import LinearOperator, dot, expand, misfit_in_range

UNITS = ("image", "data")
# The least share of ⟨r, z⟩ that ⟨z, q⟩ may be: below it the network's Jacobian is lost in its noise.
LEAST_CURVATURE = 1e-4
# The step of the last difference of D, in units of sigma: the network is told sigma and sees 1.04 sigma.
LAST_STEP = 0.3

logger = logging.get_logger(__name__)


class Measured:
    """
    The denoiser E[x0 | x, y] of measured data, equation (1) of the module's docstring, in the network's units.

    It remembers the multiplier of the chain that it serves: each chain needs its own.

    Args:
        denoiser (denoiser): D(x, sigma) of all data.
        operator ([`LinearOperator`]): A.
        measurement (`torch.Tensor` of `operator.measurement_shape`): y.
        noise_std (`float`): sigma_y.
        num_evaluations (`int`, *optional*):
            After so many calls the chain ends, and the estimate is drawn by (2) where there is noise.
        generator (`torch.Generator` or a list of them, *optional*): The randomness of (2).
    """

    def __init__(
        self,
        denoiser: Callable,
        operator: LinearOperator,
        measurement: torch.Tensor,
        noise_std: float,
        num_evaluations: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        self.denoiser, self.operator, self.y = denoiser, operator, measurement
        self.noise_std, self.generator = noise_std, generator
        self.to_come = math.inf if num_evaluations is None or noise_std == 0 else num_evaluations
        self.mu = torch.zeros_like(measurement)
        self.shift = torch.zeros(operator.shape, device=measurement.device, dtype=measurement.dtype)  # Aᵀ mu

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        operator, c, variance = self.operator, sigma**2, self.noise_std**2
        self.to_come -= 1
        shifted = x + c * self.shift  # 1.
        denoised = self.denoiser(shifted, sigma)
        r = self.y - operator.A(denoised) - variance * self.mu
        if self.to_come > 0:
            z, u = operator.solve(r, c, variance)  # 2.
            moved = self.denoiser(shifted + u, sigma) - denoised
            q = variance * z + operator.A(moved)
            rz, zq = dot(r, z), dot(z, q)
            a = torch.where(zq > LEAST_CURVATURE * rz, rz / zq, 0.0)
            self.mu = self.mu + expand(a, z) * z
            self.shift = self.shift + expand(a / c, u) * u
            denoised = denoised + expand(a, moved) * moved
            r = r - expand(a, q) * q
        else:
            e = randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=torch.float32)
            n = randn_tensor(r.shape, generator=self.generator, device=x.device, dtype=torch.float32)
            moved = (self.denoiser(shifted + LAST_STEP * sigma * e, sigma) - denoised) / LAST_STEP  # (2)
            denoised, r = denoised + moved, r + self.noise_std * n - operator.A(moved)
        z, u = operator.solve(r, c, variance)  # 3.
        self.mu, self.shift = self.mu + z, self.shift + u / c
        return denoised + u


class NCSNPosteriorPipeline(NCSNPipeline):
    """
    Draws samples given a linear measurement of them, with a noise conditional score network and any scheduler, as the
    module's docstring derives.

    ```python
    pipe = NCSNPosteriorPipeline.from_pretrained(folder)  # any NCSNPipeline's
    operator = lambda x: F.avg_pool2d(x, 4)
    pipe(measurement, operator, noise_std=0.05, batch_size=8).images
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        measurement: torch.Tensor | np.ndarray,
        operator: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | np.ndarray | Any,
        noise_std: float | Sequence[float] | torch.Tensor | np.ndarray,
        batch_size: int | None = None,
        num_inference_steps: int = 25,
        units: str = "image",
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_max_sigma: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[[NCSNPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw samples whose measurement is `measurement`.

        Args:
            measurement (`torch.Tensor` or `np.ndarray`, real or complex):
                y = A x + n of x as `output_type="pt"` returns it, [0, 1] for images. Of shape `(n, ...)`, as `operator`
                returns it, where n is 1 or `batch_size`: one measurement, of which `batch_size` samples are drawn, or
                one for each sample.
            operator (function, object with `A` and `A_adjoint`, or matrix `(m, channels * height * width)`):
                A, linear. A torch function of `(batch_size, channels, ...)`, whose adjoint autograd finds;
                an object such as those of `deepinv.physics`; or a matrix that acts on flattened samples. It must not
                add noise. It is tried out on random data first.
            noise_std (`float`, sequence of floats, `torch.Tensor` or `np.ndarray`):
                sigma_y, the standard deviation of the measurement's noise, in the units of `measurement`; of the real
                and of the imaginary part for complex ones. One number for all, at least 0, where 0 keeps what is
                measured exactly; or, above 0, one for each channel of the measurement, or an array of its shape.
            batch_size (`int`, *optional*): The number of samples; that of the measurements or labels by default.
            num_inference_steps (`int`, defaults to 25):
                The number of noise levels, each of which takes *two* network evaluations: 25 take 50.
            units (`str`, defaults to `"image"`):
                What `measurement` and `noise_std` are in. `"image"`: the units of what comes out, as above. `"data"`:
                the network's own, in which images are in [-1, 1] as a rule.
            class_labels (`int`, `list[int]`, `dict` or `torch.Tensor`, *optional*):
                As in [`NCSNPipeline.__call__`]. When not given, a class-conditional network is told no label, since
                the measurement decides the class.
            num_langevin_steps, sigmas, guidance_scale, guidance_max_sigma, generator, latents, output_type,
            return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`NCSNPipeline.__call__`]; "denoised" is the estimate given the measurement.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the samples, each drawn independently.

        Raises:
            ValueError:
                As [`NCSNPipeline.__call__`], and as [`LinearOperator`] for the operator; or the measurement does not
                fit the operator or is not finite, or `noise_std` is out of its range. Nothing has been computed then.
            FloatingPointError: as [`NCSNPipeline.__call__`].
        """
        check_choice("units", units, UNITS)
        measurement = self._check_measurement(measurement)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, measurement=measurement)
        self._check_call(batch_size, generator, latents, output_type)
        denoiser = self._prepare_denoiser(class_labels, batch_size, guidance_scale, guidance_max_sigma)
        measured = self._measure(denoiser, measurement, operator, noise_std, units, batch_size)
        chain = (num_inference_steps, num_langevin_steps, sigmas, 1.0, denoiser)
        timesteps = self._set_timesteps(self.scheduler, *chain)
        if measured.noise_std > 0:
            measured.to_come, measured.generator = len(timesteps), generator
        samples = self._sample(
            measured,
            self._prepare_latents(batch_size, timesteps, None, latents, generator),
            timesteps,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        if measured.noise_std == 0 and not self.interrupt:
            # what rounding has moved
            exact = measured.operator
            samples = samples + exact.solve(measured.y - exact.A(samples), 1.0, 0.0)[1]
        return self._finish(samples, output_type, return_dict)

    def condition(
        self,
        measurement: torch.Tensor | np.ndarray,
        operator: Any,
        noise_std: float | Sequence[float] | torch.Tensor | np.ndarray,
        units: str = "image",
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
    ) -> Measured:
        """
        The denoiser of data that were measured, in the network's units, for another sampler; arguments as of a call.

        Raises:
            ValueError: as a call.
        """
        check_choice("units", units, UNITS)
        measurement = self._check_measurement(measurement)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, measurement=measurement)
        denoiser = self.make_denoiser(class_labels, batch_size=batch_size)
        return self._measure(denoiser, measurement, operator, noise_std, units, batch_size)

    def _measure(self, denoiser, measurement, operator, noise_std, units, batch_size) -> Measured:
        """The denoiser given the measurement, all in the network's units, where each number has the same noise."""
        shape, device = (batch_size, *self.sample_shape), self._execution_device
        noise_std = self._check_noise_std(noise_std, measurement)
        own = LinearOperator(operator, shape, device)
        y = self._fit_measurement(measurement, own)
        middle = torch.zeros(shape, device=device, dtype=torch.float32)
        if units == "image":
            # x = mean + scale x', and A is linear
            y = y - own.A(self.units.mean(middle).expand(shape))
            scale = self.units.scale(middle)
        else:
            scale = torch.ones((), device=device, dtype=torch.float32)
        uniform = scale.numel() == 1 or bool((scale == scale.flatten()[0]).all())
        if isinstance(noise_std, float) and uniform:
            scale = scale.flatten()[0].item()
            operator, y, noise_std = own, y / scale, noise_std / scale
        else:
            spread, one = (noise_std, 1.0) if isinstance(noise_std, torch.Tensor) else (None, noise_std)
            if one == 0:
                spread = own.sizes_of_rows(scale)  # kelvin beside volts: without noise any unit will do
            operator = LinearOperator(operator, shape, device, scale=scale, noise_std=spread)
            y, noise_std = y if spread is None else operator.whiten(y), one
        self._warn_if_impossible(operator, y, noise_std)
        return Measured(denoiser, operator, y, noise_std)

    def _warn_if_impossible(self, operator: LinearOperator, y: torch.Tensor, noise_std: float) -> None:
        """Whether no data of the network's range would give this measurement, by more than its noise."""
        low, high = -_RANGE, _RANGE
        if self.units.value_range is not None:
            ends = torch.tensor(self.units.value_range, device=y.device, dtype=torch.float32).reshape(1, 1, 2)
            low, high = self.units.to_network(ends.expand(1, self.sample_shape[0], 2)).unbind(-1)
            low, high = low.min().item(), high.max().item()
        misfit = misfit_in_range(operator, y, low, high)
        allowed = 3 * noise_std + 0.02 * (high - low) * operator.norm
        if (misfit > allowed).any():
            what = f"{self.units.value_range}" if self.units.value_range is not None else "the training data's range"
            logger.warning(
                f"`measurement` is one that no data within {what} would give: the nearest is off by "
                f"{misfit.max().item() / max(noise_std, 1e-12):.3g} times `noise_std` on average. Are `measurement` "
                "and `noise_std` in the units of what the pipeline returns, and is `operator` the right one?"
            )

    # Checks

    @staticmethod
    def _check_noise_std(noise_std, measurement: torch.Tensor) -> float | torch.Tensor:
        """One number, or numbers that broadcast with the measurement."""
        if isinstance(noise_std, Real) and not isinstance(noise_std, bool):
            if not 0 <= noise_std < math.inf:
                raise ValueError(f"`noise_std` must be a finite number of at least 0, not {noise_std!r}.")
            return float(noise_std)
        try:
            stds = torch.as_tensor(noise_std)
        except (ValueError, TypeError, RuntimeError):
            stds = torch.tensor(True)
        if stds.dtype == torch.bool or stds.is_complex():
            raise ValueError(
                f"`noise_std` must be a finite number of at least 0, or an array of numbers above 0, not {noise_std!r}."
            )
        if stds.ndim == 0:
            return NCSNPosteriorPipeline._check_noise_std(stds.item(), measurement)
        if not (stds.isfinite() & (stds > 0)).all():
            raise ValueError(
                f"`noise_std` must hold finite numbers above 0, not {stds.min().item():g} to {stds.max().item():g}. "
                "The number 0 keeps all that is measured exactly."
            )
        if stds.ndim == 1 and measurement.ndim > 2 and len(stds) == measurement.shape[1]:
            stds = stds.reshape(-1, *[1] * (measurement.ndim - 2))  # one for each channel
        fits = tuple(stds.shape) in (tuple(measurement.shape), tuple(measurement.shape[1:]))
        of_channels = measurement.ndim > 2 and stds.numel() == stds.shape[0] == measurement.shape[1]
        if not fits and not of_channels:
            raise ValueError(
                f"`noise_std` must be one number, one for each channel of the measurement, or of its shape, "
                f"{tuple(measurement.shape[1:])}, not of shape {tuple(stds.shape)}."
            )
        return stds.float()

    def _check_measurement(self, measurement) -> torch.Tensor:
        try:
            measurement = torch.as_tensor(measurement)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"`measurement` must be a tensor, not {type(measurement).__name__}: {error}") from error
        if measurement.dtype == torch.bool or (not _is_real(measurement.dtype) and self.draws_images):
            raise ValueError(
                f"`measurement` must be floating or complex, of images in [0, 1], not {measurement.dtype}: divide "
                "8-bit numbers by 255."
            )
        if not measurement.ndim or not measurement.numel():
            raise ValueError(f"`measurement` must have the shape (n, ...), not {tuple(measurement.shape)}.")
        if not measurement.isfinite().all():
            raise ValueError("`measurement` must be finite: have `operator` leave out what was not measured.")
        return measurement

    @staticmethod
    def _fit_measurement(measurement, operator) -> torch.Tensor:
        """The measurement for each sample, of the operator's `measurement_shape`."""
        batch_size, *shape = operator.measurement_shape
        if operator.is_complex:
            shape = shape[:-1]
        if list(measurement.shape[1:]) != shape:
            raise ValueError(
                f"`measurement` must have the shape ({', '.join(map(str, ('n', *shape)))}), as `operator` returns it, "
                f"with n = 1 or {batch_size}, not {tuple(measurement.shape)}."
            )
        if measurement.is_complex() != operator.is_complex:
            kind = "complex" if operator.is_complex else "real"
            raise ValueError(f"`measurement` must be {kind}, as what `operator` returns is, not {measurement.dtype}.")
        measurement = torch.view_as_real(measurement.resolve_conj()) if operator.is_complex else measurement
        return measurement.to(operator.device, torch.float32).expand(operator.measurement_shape)


# Data without bounds are taken to be within so much of their mean, in the network's units: ten standard deviations.
_RANGE = 5.0


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
