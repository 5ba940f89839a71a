"""
Samples given a measurement: the posterior for any linear operator, by the denoiser of measured.py.

A measurement, its noise and what comes out are in the units of the data; here they become the network's.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging

from .checks import check_choice
from .hub.loading import NCSNPipeline
from .inputs import ClassLabels
from .measured import Measured
from .operators import LinearOperator, misfit_in_range
from .resampling import make_weighted
from .twisted import Twisted

UNITS = ("image", "data")

logger = logging.get_logger(__name__)


class NCSNPosteriorPipeline(NCSNPipeline):
    """
    Draws samples given a linear measurement of them, with a noise conditional score network and any scheduler; see
    measured.py.

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
        resample: bool | int = False,
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
            resample (`bool` or `int`, defaults to `False`):
                Weight the samples and resample them, so that modes that are far apart get their right shares
                (twisted.py), at a third evaluation each level; an int is the size of the groups. For one measurement
                with noise, under `AnnealedLangevinScheduler` with one step a level. On images the weights collapse as
                a rule, which a warning says.
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
        chain = self._make_chain(denoiser, num_inference_steps, num_langevin_steps, sigmas)
        if measured.noise_std > 0:
            measured.to_come, measured.generator = len(chain.timesteps), generator
        if resample is not False:
            measured = self._twist(measured, len(chain.timesteps), generator, resample)
        samples = self._sample(
            measured,
            chain,
            self._prepare_latents(batch_size, chain, None, latents, generator),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            variance_noise=getattr(measured, "noise", None),
        )
        if resample is not False:
            self._report(measured.particles)
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

    def _twist(self, measured: Measured, num_steps: int, generator, resample) -> Twisted:
        """The denoiser of a call that resamples."""
        num = len(measured.y)
        if num > 1 and not torch.equal(measured.y, measured.y[:1].expand_as(measured.y)):
            raise ValueError("`resample` is for samples of one measurement, not of one for each.")
        if measured.noise_std == 0:
            raise ValueError("`resample` weights by the measurement's noise, and `noise_std` is 0.")
        weighted = make_weighted(measured.denoiser, num, measured.y.device, self.scheduler, generator, resample)
        if len(self.scheduler.table) != len(set(self.scheduler.timesteps.tolist())):
            raise ValueError("`resample` takes one Langevin step at each level, `num_langevin_steps`=1.")
        return Twisted(
            measured.denoiser,
            measured.operator,
            measured.y,
            measured.noise_std,
            num_steps,
            generator,
            weighted.particles,
            self.scheduler,
        )

    def _warn_if_impossible(self, operator: LinearOperator, y: torch.Tensor, noise_std: float) -> None:
        """Whether no data of the network's range would give this measurement, by more than its noise."""
        low, high = -_RANGE, _RANGE
        if self.units.value_range is not None:
            ends = torch.tensor(self.units.value_range, device=y.device, dtype=torch.float32).reshape(1, 1, 2)
            low, high = self.units.to_network(ends.expand(1, self.sample_shape[0], 2)).unbind(-1)
            low, high = low.min().item(), high.max().item()
        else:
            y = y - operator.A(self._center.to(y.device).expand(operator.shape))
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


# Data without bounds are taken to be within so much of what they lie around, in the network's units: ten standard
# deviations.
_RANGE = 5.0


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
