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
from diffusers.utils.torch_utils import randn_tensor

from .hub.loading import NCSNPipeline
from .operators import LinearOperator, dot, expand
from .pipeline_ncsn import _callback_inputs

UNITS = ("data", "image")
# The least share of ⟨r, z⟩ that ⟨z, q⟩ may be: below it the network's Jacobian is lost in its noise.
LEAST_CURVATURE = 1e-4
# The step of the last difference of D, in units of sigma: the network is told sigma and sees 1.04 sigma.
LAST_STEP = 0.3


class NCSNPosteriorPipeline(NCSNPipeline):
    """
    Draws images given a linear measurement of them, with a noise conditional score network and any scheduler, as the
    module's docstring derives.

    ```python
    pipe = NCSNPosteriorPipeline.from_pretrained(folder)  # any NCSNPipeline's
    operator = lambda x: F.avg_pool2d(x, 4)
    pipe(measurement, operator, noise_std=0.1, batch_size=8).images
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        measurement: torch.Tensor | np.ndarray,
        operator: Callable[[torch.Tensor], torch.Tensor] | torch.Tensor | np.ndarray | Any,
        noise_std: float,
        batch_size: int | None = None,
        num_inference_steps: int = 25,
        units: str = "data",
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[NCSNPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw images whose measurement is `measurement`.

        Args:
            measurement (`torch.Tensor` or `np.ndarray`, real or complex):
                y, of shape `(n, ...)`, as `operator` returns it, where n is 1 or `batch_size`: one measurement, of
                which `batch_size` samples are drawn, or one for each sample.
            operator (function, object with `A` and `A_adjoint`, or matrix `(m, channels * height * width)`):
                A, linear. A torch function of `(batch_size, channels, height, width)`, whose adjoint autograd finds;
                an object such as those of `deepinv.physics`; or a matrix that acts on flattened images. It must not
                add noise. It is tried out on random images first.
            noise_std (`float`):
                sigma_y, the standard deviation of the measurement's noise, at least 0; of the real and of the
                imaginary part for complex measurements. 0 keeps what is measured exactly.
            batch_size (`int`, *optional*): The number of images; that of the measurements or labels by default.
            num_inference_steps (`int`, defaults to 25):
                The number of noise levels, each of which takes *two* network evaluations: 25 take 50.
            units (`str`, defaults to `"data"`):
                What `measurement` and `noise_std` are in. `"data"`: the network's own, black `data_min`, -1 as a rule,
                and white 1. `"image"`: those of images in [0, 1], y = A x + n with x in [0, 1], as in other
                packages. Where black is -1, the same noise is half as large in them.
            num_langevin_steps, sigmas, class_labels, guidance_scale, generator, latents, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`NCSNPipeline.__call__`]; "denoised" is the estimate given the measurement.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images, each an independent sample.

        Raises:
            ValueError:
                As [`NCSNPipeline.__call__`], and as [`LinearOperator`] for the operator; or the measurement does not
                fit the operator or is not finite, or `noise_std` is not a number of at least 0. Nothing has been
                computed then.
            FloatingPointError: as [`NCSNPipeline.__call__`].
        """
        noise_std = self._check_noise_std(noise_std)
        if units not in UNITS:
            raise ValueError(f"`units` must be one of {', '.join(map(repr, UNITS))}, not {units!r}.")
        measurement = self._check_measurement(measurement)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, measurement=measurement)
        shape = (batch_size, *self.image_shape)
        names = _callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            shape, class_labels, guidance_scale, generator, latents, output_type, names, callback_on_step_end
        )
        device = self._execution_device
        operator = LinearOperator(operator, shape, device)
        measurement = self._fit_measurement(measurement, operator)
        if units == "image":
            # x = data_min + (1 - data_min) x', and A is linear
            scale, black = 1 - self.config.data_min, torch.full(shape, self.config.data_min, device=device)
            measurement, noise_std = scale * measurement + operator.A(black), scale * noise_std
        timesteps = self._set_timesteps(self.scheduler, num_inference_steps, num_langevin_steps, sigmas)
        labels = self.embedding_indices(class_labels, batch_size, device)
        images = self._sample(
            self._prepare_latents(shape, timesteps, None, latents, generator, device),
            timesteps,
            labels,
            guidance_scale,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=names,
            estimate=self._estimator(operator, measurement, noise_std, timesteps, labels, generator),
        )
        if noise_std == 0 and not self.interrupt:
            # what rounding has moved
            images = images + operator.solve(measurement - operator.A(images), 1.0, 0.0)[1]
        return self._finish(images, output_type, return_dict)

    def _estimator(self, operator, y, noise_std, timesteps, labels, generator) -> Callable:
        """`estimate` of [`_sample`]: E[x0 | x, y] in the place of E[x0 | x]."""
        sigmas, variance = self._noise_levels(timesteps).tolist(), noise_std**2
        last = len(sigmas) - 1 if noise_std > 0 else None
        mu = torch.zeros_like(y)
        shift = torch.zeros(operator.shape, device=y.device)  # Aᵀ mu

        def estimate(i, x, t):
            nonlocal mu, shift
            sigma, c = sigmas[i], sigmas[i] ** 2

            def denoise(x):
                return self._denoise(x, t, sigma, labels)

            shifted = x + c * shift  # 1.
            denoised = denoise(shifted)
            r = y - operator.A(denoised) - variance * mu
            if i != last:
                z, u = operator.solve(r, c, variance)  # 2.
                moved = denoise(shifted + u) - denoised
                q = variance * z + operator.A(moved)
                rz, zq = dot(r, z), dot(z, q)
                a = torch.where(zq > LEAST_CURVATURE * rz, rz / zq, 0.0)
                mu = mu + expand(a, z) * z
                shift = shift + expand(a / c, u) * u
                denoised = denoised + expand(a, moved) * moved
                r = r - expand(a, q) * q
            else:
                e = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
                n = randn_tensor(y.shape, generator=generator, device=x.device, dtype=torch.float32)
                moved = (denoise(shifted + LAST_STEP * sigma * e) - denoised) / LAST_STEP  # (2)
                denoised, r = denoised + moved, r + noise_std * n - operator.A(moved)
            z, u = operator.solve(r, c, variance)  # 3.
            mu, shift = mu + z, shift + u / c
            return denoised + u

        return estimate

    # Checks

    @staticmethod
    def _check_noise_std(noise_std) -> float:
        if isinstance(noise_std, bool) or not isinstance(noise_std, Real) or not 0 <= noise_std < math.inf:
            raise ValueError(f"`noise_std` must be a finite number of at least 0, not {noise_std!r}.")
        return float(noise_std)

    @staticmethod
    def _check_measurement(measurement) -> torch.Tensor:
        try:
            measurement = torch.as_tensor(measurement)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"`measurement` must be a tensor, not {type(measurement).__name__}: {error}") from error
        if measurement.dtype == torch.uint8:
            raise ValueError(
                "`measurement` must be floating or complex, in the units of `units`, not uint8: 8-bit images divided "
                "by 255 are in units of 'image'."
            )
        if not measurement.ndim or not measurement.numel():
            raise ValueError(f"`measurement` must have the shape (n, ...), not {tuple(measurement.shape)}.")
        if not measurement.isfinite().all():
            raise ValueError("`measurement` must be finite: have `operator` leave out what was not measured.")
        return measurement

    @staticmethod
    def _fit_measurement(measurement, operator) -> torch.Tensor:
        """The measurement for each image, of the operator's `measurement_shape`."""
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
