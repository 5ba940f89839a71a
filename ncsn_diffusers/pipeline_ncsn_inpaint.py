"""Inpainting with a noise conditional score network.

The problem
-----------
Some pixels y are known, the others are to be drawn from the network's p(x_u | y). The plain way replaces the known
pixels at each level with y + sigma z and takes the next step (Song & Ermon 2019, algorithm 2; RePaint, Lugmayr et al.
2022, arXiv:2201.09865). The drawn pixels then see the known ones only through noise and agree with them badly, so
RePaint passes over each level several times: up again by adding noise, down by a step. Each such pass holds D still
while it moves, and so narrows the distribution: for a Gaussian prior every pass loses variance.

One pass
--------
Here a pass at noise level sigma is, with fresh standard normal z,

    x' = D_y(x + sigma z, √2 sigma) + sigma z,    D_y(x, sigma) = E[x0 | x, y].                             (1)

Noise is added, the result is denoised, and *the same* noise is added again. For Gaussian p(x0 | y) of variance s² along
an eigenvector D_y(x, √2 sigma) = g x with g = s²/(s² + 2 sigma²), so that (1) turns the variance v into
g² v + (1 + g)² sigma², whose fixed point is exactly s² + sigma²: passes may be repeated at will. (It is the Langevin
step of Leimkuhler & Matthews 2013, 10.1093/amrx/abs010, at the level √2 sigma with relative step size 1, seen
between its two half-noises; with fresh noise the variance would end up to a half too low.)

What the drawn pixels are told
------------------------------
D_y is that of `pipeline_ncsn_posterior.py`, whose docstring derives it, for the operator that picks the known pixels
and no noise. For Gaussian data it is

    D_y(x, sigma) = D(x + sigma² lambda, sigma),                                                            (2)

where lambda is 0 on the drawn pixels, and on the known ones such that D_y is y there. lambda belongs to the data, not
to the level. It begins at 0 and is carried down the ladder; each evaluation, those of the scheduler's steps too, puts y
for the known pixels of D and mends it by

    lambda' = lambda + (y - D)/sigma²,                                                                      (3)

which is step 3 of that module, in closed form. Its step 2, a second evaluation at each level, is not taken: a pass
mends lambda as well, and besides repairs what the scheduler does to the variance.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from .hub.loading import NCSNPipeline
from .pipeline_ncsn import _callback_inputs
from .scheduling_annealed_langevin import AnnealedLangevinScheduler


class NCSNInpaintPipeline(NCSNPipeline):
    """
    Draws the masked pixels of images anew, with a noise conditional score network and any scheduler, as the module's
    docstring derives. The other pixels stay exactly as they are.

    ```python
    pipe = NCSNInpaintPipeline.from_pretrained(folder)  # any NCSNPipeline's
    pipe(image, mask_image).images[0]
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        num_resamplings: int = 3,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        strength: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[NCSNPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw the masked pixels.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The images, of the network's size, in the formats of [`VaeImageProcessor`]: floating arrays
                `(batch_size, height, width, channels)` and tensors `(batch_size, channels, height, width)` in [0, 1],
                or 8-bit ones. One image serves the whole batch.
            mask_image (the same types, of one channel):
                White, 1 or True where the image is to be drawn, black where it is known; one half counts as white.
                One mask serves the whole batch. Integers may be 0 and 1, or 0 to 255.
            batch_size (`int`, *optional*): The number of images; that of `image`, masks or labels by default.
            num_inference_steps (`int`, *optional*): The number of noise levels; the pipeline's own when not given.
            num_resamplings (`int`, defaults to 3):
                Passes (1) at each level, or each step where a level has several; each takes one network evaluation
                more. With 0, (3) is mended by the steps alone and lags behind. A multistep scheduler restarts after
                passes.
            strength (`float`, defaults to 1.0):
                The share of the steps that is taken, above 0 and up to 1. Below 1 the masked pixels are drawn from
                what `image` holds there, noised to the level where the steps begin; 1 pays no regard to it.
            num_langevin_steps, sigmas, class_labels, guidance_scale, generator, latents, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`NCSNPipeline.__call__`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images, whose known pixels are those of `image`: as 8-bit values
            in `"pil"`, exactly in `"latent"`, and to the rounding of float32 in `"np"` and `"pt"`.

        Raises:
            ValueError, FloatingPointError: as [`NCSNPipeline.__call__`].
        """
        image = self._preprocess("image", image, self.image_processor, self.image_shape)
        mask = self._preprocess_mask(mask_image)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, image=image, mask_image=mask)
        shape = (batch_size, *self.image_shape)
        names = _callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            shape, class_labels, guidance_scale, generator, latents, output_type, names, callback_on_step_end
        )
        self._check_count("num_resamplings", num_resamplings, at_least=0)
        if num_resamplings:
            self._check_begins_anywhere("num_resamplings")
        self._check_strength(strength)
        if strength < 1:
            self._check_begins_anywhere("strength")
        device = self._execution_device
        chain = (num_inference_steps, num_langevin_steps, sigmas, strength if strength < 1 else None)
        timesteps = self._set_timesteps(self.scheduler, *chain)
        image, mask = image.to(device), mask.to(device)
        labels = self.embedding_indices(class_labels, batch_size, device)

        def draw_noise():
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

        sigmas = self._noise_levels(timesteps).tolist()
        preserves_variance = self._preserves_variance(timesteps[:1])
        units = [(1 + sigma**2) ** 0.5 if preserves_variance else 1.0 for sigma in sigmas]  # x per scheduler's sample
        largest_sigma = self._noise_levels(self.scheduler.timesteps[:1]).item()
        upper_sigmas = [2**0.5 * sigma for sigma in sigmas]
        upper_timesteps = self._timesteps_at(upper_sigmas).to(device)
        order = self.scheduler.order
        multiplier = torch.zeros(shape, device=device)  # lambda

        def estimate(x, timestep, sigma):
            """E[x0 | x, y] by (2), and the multiplier by (3)."""
            denoised = self._denoise(x + sigma**2 * multiplier, timestep, sigma, labels)
            multiplier.add_(torch.where(mask, 0.0, image - denoised), alpha=1 / sigma**2)
            return torch.where(mask, denoised, image)

        def settle(i, latents):
            if i % order or upper_sigmas[i] > largest_sigma:  # above there is nothing but noise
                return latents
            x = latents * units[i]
            for _ in range(num_resamplings):
                z = sigmas[i] * draw_noise()
                x = estimate(x + z, upper_timesteps[i], upper_sigmas[i]) + z  # (1)
            return x / units[i]

        images = self._sample(
            self._prepare_latents(shape, timesteps, image if strength < 1 else None, latents, generator, device),
            timesteps,
            labels,
            guidance_scale,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=names,
            before_step=settle if num_resamplings else None,
            schedulers=self._fresh_schedulers(chain, len(timesteps)) if num_resamplings else None,
            estimate=lambda i, x, t: estimate(x, t, sigmas[i]),
        )
        return self._finish(torch.where(mask, images, image), output_type, return_dict)

    def _preserves_variance(self, timestep: torch.Tensor) -> bool:
        """Whether the scheduler's sample is x/√(1 + sigma²), as DDPM's is, and not x: `add_noise` shrinks images."""
        one = torch.ones(1, device=timestep.device)
        return self.scheduler.add_noise(one, torch.zeros_like(one), timestep).item() < 1

    def _fresh_schedulers(self, chain: tuple, num_steps: int) -> list:
        """
        The scheduler for each of the last `num_steps` steps of the chain with the settings `chain`, as if the chain
        began at that step: what a multistep scheduler remembers is of another sample than the one that the passes left.
        """
        if isinstance(self.scheduler, AnnealedLangevinScheduler):
            # of first order, whose rate is another, it remembers nothing: one serves all steps
            scheduler = AnnealedLangevinScheduler.from_config(self.scheduler.config, solver_order=1)
            self._set_timesteps(scheduler, *chain)
            return [scheduler] * num_steps
        schedulers, order = [], self.scheduler.order
        for i in range(0, num_steps, order):
            scheduler = copy.deepcopy(self.scheduler)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(len(scheduler.timesteps) - num_steps + i)
            schedulers += [scheduler] * order
        return schedulers[:num_steps]

    def _preprocess_mask(self, mask_image) -> torch.Tensor:
        """The mask, `(n, 1, height, width)`, True where the image is to be drawn."""
        processor = VaeImageProcessor(
            vae_scale_factor=1,
            vae_latent_channels=0,
            do_resize=False,
            do_normalize=False,
            do_convert_grayscale=True,
        )
        masks = [_to_unit_range(m) for m in (mask_image if isinstance(mask_image, list) else [mask_image])]
        masks = masks if isinstance(mask_image, list) else masks[0]
        mask = self._preprocess("mask_image", masks, processor, (1, *self.image_shape[1:])) >= 0.5
        if not mask.any():
            raise ValueError("`mask_image` leaves nothing to draw: it must be white, or 1, at some pixel.")
        return mask


def _to_unit_range(mask):
    """Booleans and integers, 0 and 1 or 0 to 255, as numbers from 0 to 1."""
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "bui":
        mask = mask.astype(np.float32)
    elif isinstance(mask, torch.Tensor) and not mask.is_floating_point():
        mask = mask.float()
    else:
        return mask
    return mask if mask.max() <= 1 else mask / 255
