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
D_y is that of `measured.py`, whose docstring derives it, for the operator that picks the known pixels and no noise.
For Gaussian data it is

    D_y(x, sigma) = D(x + sigma² lambda, sigma),                                                            (2)

where lambda is 0 on the drawn pixels, and on the known ones such that D_y is y there. lambda belongs to the data, not
to the level. It begins at 0 and is carried down the ladder; each evaluation, those of the scheduler's steps too, puts y
for the known pixels of D and mends it by

    lambda' = lambda + (y - D)/sigma²,                                                                      (3)

which is step 3 of that module, in closed form. Its step 2, a second evaluation at each level, is not taken: a pass
mends lambda as well, and besides repairs what the scheduler does to the variance.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .checks import check_count, check_number
from .hub.loading import NCSNPipeline
from .image_files import read_mask
from .inputs import ClassLabels, check_shape, read_images
from .scheduler_chains import check_begins_anywhere


class KnownPixels:
    """
    The denoiser E[x0 | x, y] of data of which some values y are known, equations (2) and (3) of the module's docstring.

    It remembers the multiplier of the chain that it serves: each chain needs its own.

    Args:
        denoiser (denoiser): D(x, sigma) of all data.
        known (`torch.Tensor` of shape `(n, channels, ...)`): y, in the network's units, anything where it is drawn.
        drawn (`torch.Tensor` of bool, broadcastable to it): True where the data are to be drawn.
        num_passes (`int`, defaults to 0): Passes (1) that [`settle`] takes.
        largest_sigma (`float`, *optional*): The level above which a pass would see noise alone.
        generator (`torch.Generator` or a list of them, *optional*): The randomness of the passes.
    """

    def __init__(
        self,
        denoiser: Callable,
        known: torch.Tensor,
        drawn: torch.Tensor,
        num_passes: int = 0,
        largest_sigma: float = math.inf,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        self.denoiser, self.known, self.drawn = denoiser, known, drawn
        self.num_passes, self.largest_sigma, self.generator = num_passes, largest_sigma, generator
        self.multiplier = torch.zeros_like(known)  # lambda

    def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[x0 | x, y] by (2), and the multiplier by (3)."""
        denoised = self.denoiser(x + sigma**2 * self.multiplier, sigma)
        self.multiplier.add_(torch.where(self.drawn, 0.0, self.known - denoised), alpha=1 / sigma**2)
        return torch.where(self.drawn, denoised, self.known)

    def settle(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """`num_passes` passes (1) at the level sigma."""
        if 2**0.5 * sigma > self.largest_sigma:
            return x
        for _ in range(self.num_passes):
            z = sigma * randn_tensor(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
            x = self(x + z, 2**0.5 * sigma) + z  # (1)
        return x


class NCSNInpaintPipeline(NCSNPipeline):
    """
    Draws the masked pixels of images anew, or the unknown values of other data, with a noise conditional score network
    and any scheduler, as the module's docstring derives. The others stay exactly as they are.

    ```python
    pipe = NCSNInpaintPipeline.from_pretrained(folder)  # any NCSNPipeline's
    pipe(image, mask_image).images[0]
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        num_resamplings: int = 3,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_max_sigma: float | None = None,
        strength: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[[NCSNPipeline, int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw the masked pixels, or the unknown values.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The data, in the formats and units of `image` in [`NCSNPipeline.__call__`]. One serves the whole batch.
                NaN in floating arrays and tensors means unknown.
            mask_image (the same types, *optional*):
                White, 1 or True where the image is to be drawn, black where it is known; one half counts as white.
                Of an image file with transparency, what is white *and* opaque is drawn. Integers may be 0 and 1, or 0
                to 255. For images it has one channel; for other data one, or one for each of theirs. One mask serves
                the whole batch. Not needed where NaN says what is unknown.
            batch_size (`int`, *optional*): The number of samples; that of `image`, masks or labels by default.
            num_inference_steps (`int`, *optional*): The number of noise levels; the pipeline's own when not given.
            num_resamplings (`int`, defaults to 3):
                Passes (1) at each level, or each step where a level has several; each takes one network evaluation
                more. With 0, (3) is mended by the steps alone and lags behind. A multistep scheduler restarts after
                passes.
            class_labels (`int`, `list[int]`, `dict` or `torch.Tensor`, *optional*):
                As in [`NCSNPipeline.__call__`]. When not given, a class-conditional network is told no label, since
                the known pixels decide the class.
            strength (`float`, defaults to 1.0):
                The share of the steps that is taken, above 0 and up to 1. Below 1 the masked pixels are drawn from
                what `image` holds there, noised to the level where the steps begin; 1 pays no regard to it.
            num_langevin_steps, sigmas, guidance_scale, guidance_max_sigma, generator, latents, output_type,
            return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`NCSNPipeline.__call__`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the samples, whose known values are those of `image`: as 8-bit values
            in `"pil"`, exactly in `"latent"`, and to the rounding of float32 in `"np"` and `"pt"`.

        Raises:
            ValueError, FloatingPointError: as [`NCSNPipeline.__call__`].
        """
        check_count("num_resamplings", num_resamplings, at_least=0)
        if num_resamplings:
            check_begins_anywhere(self.scheduler, "num_resamplings")
        check_number("strength", strength, above=0, at_most=1)
        if strength < 1:
            check_begins_anywhere(self.scheduler, "strength")
        image, mask = self._read_known(image, mask_image)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, image=image, mask_image=mask)
        self._check_call(batch_size, generator, latents, output_type)
        if strength < 1 and image.isnan().any():
            raise ValueError(f"`strength`={strength} begins at what `image` holds, and it holds NaN: leave it out.")
        denoiser = self._prepare_denoiser(class_labels, batch_size, guidance_scale, guidance_max_sigma)
        chain = self._make_chain(denoiser, num_inference_steps, num_langevin_steps, sigmas, strength)
        device = self._execution_device
        image, mask = image.nan_to_num().to(device), mask.to(device)
        known = KnownPixels(
            denoiser,
            image.expand(batch_size, *self.sample_shape),
            mask,
            num_resamplings,
            chain.first_sigma,
            generator,
        )
        samples = self._sample(
            known,
            chain.without_memory() if num_resamplings else chain,
            self._prepare_latents(batch_size, chain, image if strength < 1 else None, latents, generator),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return self._finish(torch.where(mask, samples, image), output_type, return_dict)

    def condition(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput | None = None,
        class_labels: ClassLabels | None = None,
        batch_size: int | None = None,
    ) -> KnownPixels:
        """
        The denoiser of data whose known values are those of `image`, for another sampler; arguments as of a call.

        Raises:
            ValueError: as a call.
        """
        image, mask = self._read_known(image, mask_image)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, image=image, mask_image=mask)
        device, shape = self._execution_device, (batch_size, *self.sample_shape)
        denoiser = self.make_denoiser(class_labels, batch_size=batch_size)
        return KnownPixels(denoiser, image.nan_to_num().to(device).expand(shape), mask.to(device))

    def _read_known(self, image, mask_image) -> tuple[torch.Tensor, torch.Tensor]:
        """The data in the network's units, `(n, *sample_shape)`, and the mask, True where they are to be drawn."""
        image = self._read_data("image", image, missing=True)
        unknown = image.isnan()
        if mask_image is None:
            if not unknown.any():
                raise ValueError("`mask_image` is needed where no NaN in `image` says what is to be drawn.")
            return image, unknown
        mask = self._read_mask(mask_image) | unknown if unknown.any() else self._read_mask(mask_image)
        if not mask.any():
            raise ValueError("`mask_image` leaves nothing to draw: it must be white (and opaque), 1 or True somewhere.")
        return image, mask

    def _read_mask(self, mask_image) -> torch.Tensor:
        """The mask, True where the data are to be drawn, of shape `(n, 1 or channels, ...)`."""
        given = mask_image if isinstance(mask_image, list) else [mask_image]
        if not self.draws_images:
            masks = self._stack_masks(given)
        else:
            processor = VaeImageProcessor(
                vae_scale_factor=1,
                vae_latent_channels=0,
                do_resize=False,
                do_normalize=False,
                do_convert_grayscale=True,
            )
            masks = [read_mask(m) if isinstance(m, Image.Image) else _to_unit_range(m) for m in given]
            masks = read_images("mask_image", masks if isinstance(mask_image, list) else masks[0], 1, processor)
            check_shape("mask_image", masks, (1, *self.sample_shape[1:]), is_image=True)
        if not ((masks >= 0) & (masks <= 1)).all():
            raise ValueError("`mask_image` must hold numbers from 0 to 1, or be an 8-bit image.")
        return masks >= 0.5

    def _stack_masks(self, given: list) -> torch.Tensor:
        """Masks of data that are no images, each `(sizes)`, `(1 or channels, sizes)` or `(n, 1 or channels, sizes)`."""
        channels, *sizes = self.sample_shape
        masks = []
        for mask in given:
            mask = _to_unit_range(mask if isinstance(mask, torch.Tensor) else np.asarray(mask))
            mask = torch.as_tensor(mask).float()
            mask = mask[None] if mask.ndim == len(sizes) else mask
            mask = mask[None] if mask.ndim == len(sizes) + 1 else mask
            if mask.ndim != len(sizes) + 2 or list(mask.shape[2:]) != sizes or mask.shape[1] not in (1, channels):
                raise ValueError(
                    f"`mask_image` must have the sizes {' × '.join(map(str, sizes))} with 1 or {channels} channels, "
                    f"not the shape {tuple(mask.shape)}."
                )
            masks.append(mask)
        return torch.cat(masks)


def _to_unit_range(mask):
    """Booleans and integers, 0 and 1 or 0 to 255, as numbers from 0 to 1."""
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "bui":
        mask = mask.astype(np.float32)
    elif isinstance(mask, torch.Tensor) and not mask.is_floating_point():
        mask = mask.float()
    else:
        return mask
    return mask if mask.max() <= 1 else mask / 255
