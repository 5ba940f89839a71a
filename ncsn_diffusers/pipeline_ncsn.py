"""
Images from a noise conditional score network: drawn from noise, of a class, from another image, or between two samples.

One loop serves them all: the network is evaluated, the scheduler steps. They differ in where the loop begins (noise, or
a noised image: SDEdit, Meng et al. 2021, arXiv:2108.01073), in what the network is told (a class, with classifier-free
guidance, Ho & Salimans 2022, arXiv:2207.12598), and in where the noise comes from (mixed from two sources:
interpolation, Song & Ermon 2020, arXiv:2006.09011).

The file is long because it is uploaded with each pipeline and has to run there alone: reading images of any mode, the
loop, and the checks that refuse bad input before the first network evaluation are all in it.
"""

import copy
import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import diffusers
import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Raise it with each change after which older versions of this file would draw other images from a saved pipeline.
SAVED_FORMAT = 1

# The schedulers of diffusers with the network's time, scaling and kind of step, whose noise `generator` reaches.
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
_PUBLISHING = (
    "This pipeline's code comes from a repository, and cannot publish it. Install the package, `pip install "
    "ncsn_diffusers`, load the pipeline by its class, `from ncsn_diffusers import NCSNPipeline` and "
    "`NCSNPipeline.from_pretrained(...)`, and call `push_to_hub` of that."
)
# A sample whose numbers are so large, where data are in [-1, 1], is noise that the steps have left.
LARGEST_SAMPLE = 10.0

logger = logging.get_logger(__name__)


def find_white(image: Image.Image) -> float | None:
    """
    The value of white in an image of more than 8 bits, whose black is 0.

    | values | white |
    | --- | --- |
    | integers of 12 or 14 bits, as the file's header says | 4095 or 16383 |
    | 16-bit integers | 65535 |
    | 32-bit integers up to 255, or up to 65535 | 255, or 65535 |
    | floating point up to 1, or whole numbers up to 255 | 1, or 255 |

    Integers whose largest value is from 256 to 4095 (from 1 to 4095 with 16 bits) are refused: a dark image of 16 bits
    looks the same as a bright one of 8 or 12 bits.

    Returns:
        `float`, or None if the image has 8 bits, or is black all over.

    Raises:
        ValueError: white is not certain, or values are negative or not finite; the message gives their range.
    """
    if not _is_deep(image):
        return None
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low == high == 0:
        return None
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(258, (0,))[0]  # BitsPerSample
    if low >= 0 and image.mode == "F":
        if high <= 1:
            return 1.0
        if high <= 255 and (values == np.rint(values)).all():
            return 255.0
    elif low >= 0:
        if 8 < bits < 16:
            return 2.0**bits - 1
        # Pillow before 11.3 opens 16-bit PNGs in the mode of 32 bits, as all versions do with PGMs.
        if image.mode == "I" and image.format not in ("PNG", "PPM") and high <= 255:
            return 255.0
        if 4096 <= high <= 65535:
            return 65535.0
    raise ValueError(
        f"an image of mode {image.mode} that holds {low:g} to {high:g}: what is white in it is not certain. Floating "
        "point may hold 0 to 1, or whole numbers to 255; integers of 16 bits 0 to 65535, with the largest at 4096 or "
        "above; those of 32 bits these or 0 to 255. Scale it yourself and save it with 8 bits."
    )


def read_image(image: Image.Image, channels: int | None = None) -> Image.Image:
    """
    Any PIL image with 8 bits a channel, as training, image to image, inpainting and evaluation all see it.

    It is turned upright as its EXIF orientation says; more than 8 bits are scaled (see [`find_white`]) and rounded;
    palettes become colours; what is transparent is laid on white, unless `channels` is 4. An image without transparency
    is opaque in 4 channels.

    Args:
        image (`PIL.Image.Image`): of any mode.
        channels (`int`, *optional*): 1, 3 or 4; the image's own, 1 or 3, when not given.

    Returns:
        `PIL.Image.Image` of mode L, RGB or RGBA.

    Raises:
        ValueError: the range of the image's values is not certain, or PIL cannot convert its mode.
    """
    white = find_white(image)  # first: the upright copy lacks the file's tags
    if image.getexif().get(0x0112, 1) != 1:  # Orientation
        image = ImageOps.exif_transpose(image)
    if _is_deep(image):
        values, transparent = np.asarray(image, dtype=np.float64), image.info.get("transparency")
        image = Image.fromarray(np.rint(values * (255 / (white or 1))).astype(np.uint8))
        if transparent is not None:  # the one gray value that a PNG names
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if image.mode in ("La", "LAB"):  # La goes to LA alone, and LAB would have no opacity in RGBA
        image = image.convert("LA" if image.mode == "La" else "RGB")
    channels = channels or (1 if image.mode in ("1", "L", "LA") else 3)
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _takes_old_names(**renamed: str) -> Callable:
    """Keep accepting keyword arguments by their old names, given as `old="new"`, with a FutureWarning."""

    def decorate(method):
        @functools.wraps(method)
        def accept(*args, **kwargs):
            for old, new in renamed.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(f"{method.__name__}() got both `{new}` and its old name, `{old}`.")
                message = f"`{old}` of `{method.__name__}` is now called `{new}`; the old name will be removed."
                warnings.warn(message, FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return method(*args, **kwargs)

        return accept

    return decorate


class NCSNPipeline(DiffusionPipeline):
    """
    Draws images with a noise conditional score network and any scheduler: `AnnealedLangevinScheduler`, or a stock one
    made by `from_config(pipe.scheduler.config)`.

    A class-conditional network has `num_class_embeds` = number of classes + 1: the last embedding means "no label".

    Args:
        unet ([`UNet2DModel`] or another network called like it):
            The network, conditioned on the noise level as the scheduler's config says.
        scheduler ([`SchedulerMixin`]): The sampler.
        data_min (`float`, defaults to -1.0):
            Black in the data that the network was trained on, -1 or 0; white is 1. Public NCSN++ networks have 0.
        num_inference_steps (`int`, defaults to 50):
            The number of noise levels of a call that does not give it. A step size that was chosen for a whole ladder,
            as the papers' were, needs all of its levels.

    Raises:
        ValueError: `data_min` is neither -1 nor 0, `num_inference_steps` is no int of at least 1, or a component is no
            network or of the package diffusers-ncsn.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "sigma", "denoised"]
    _num_timesteps = None
    _guidance_scale = 1.0

    def __init__(
        self, unet: UNet2DModel, scheduler: SchedulerMixin, data_min: float = -1.0, num_inference_steps: int = 50
    ):
        super().__init__()
        self._check_count("num_inference_steps", num_inference_steps)
        if data_min not in (-1, 0):
            raise ValueError(f"`data_min` must be -1 or 0, black in the data, not {data_min!r}.")
        for component in (unet, scheduler):
            check_not_of_diffusers_ncsn(type(component).__name__, "This pipeline")
        unet = _without_wrapper(unet)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            data_min=float(data_min), num_inference_steps=int(num_inference_steps), _saved_format=SAVED_FORMAT
        )
        self._interrupt = False
        # The image is the latent: nothing is scaled down, and no number of channels marks a VAE's latents.
        pixels = {"vae_scale_factor": 1, "vae_latent_channels": 0, "do_resize": False, "do_normalize": data_min == -1}
        channels = unet.config.in_channels
        self.image_processor = VaeImageProcessor(
            do_convert_grayscale=channels == 1, do_convert_rgb=channels == 3, **pixels
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As [`~DiffusionPipeline.save_pretrained`].

        Raises:
            ImportError: `push_to_hub=True`; see [`push_to_hub`]. Nothing has been written then.
        """
        if push_to_hub:
            raise ImportError(_PUBLISHING)
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """
        The package's own `NCSNPipeline` uploads, because this file's code and its card have to go with it.

        Raises:
            ImportError: always, with what to install.
        """
        raise ImportError(_PUBLISHING)

    @property
    def components(self) -> dict:
        """
        As [`~DiffusionPipeline.components`], for `NCSNInpaintPipeline(**pipe.components)` and the like. A `data_min`
        other than -1 is among them, because the network's data keep their range, and so is a `num_inference_steps`
        other than 50.
        """
        components = super().components
        for name, default in (("data_min", -1), ("num_inference_steps", 50)):
            if self.config[name] != default:
                components[name] = self.config[name]
        return components

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the images that the network draws."""
        channels, size = self._network.config.in_channels, self._network.config.sample_size
        return (channels, size, size) if isinstance(size, int) else (channels, *size)

    @property
    def num_classes(self) -> int | None:
        """The number of classes that the network can be asked for; `None` for a network without a class embedding."""
        num_embeddings = self._network.config.get("num_class_embeds")
        return None if num_embeddings is None else num_embeddings - 1

    def embedding_indices(
        self, class_labels: torch.Tensor | None, batch_size: int, device: str | torch.device
    ) -> torch.Tensor | None:
        """
        The rows of the network's class embedding, the last of which means "no label".

        Args:
            class_labels (`torch.Tensor` of shape `()` or `(batch_size,)`, *optional*):
                The classes, from 0; ignored by a network without a class embedding.
            batch_size (`int`): The number of images.
            device (`str` or `torch.device`): Where the indices are to be.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, "no label" for each image, if `class_labels` is `None`; otherwise
            of shape `(2 * batch_size,)`: the classes, then as many of "no label", for guidance. `None` for a network
            without a class embedding.
        """
        if self.num_classes is None:
            return None
        no_label = torch.full((batch_size,), self.num_classes, device=device)
        if class_labels is None:
            return no_label
        return torch.cat([class_labels.to(device).expand(batch_size), no_label])

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop after its present step; a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int | None:
        """The number of steps of the running call, or of the last one; `None` before the first."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """
        The running call's guidance. A callback that sets `pipe._guidance_scale` changes it from the next step on: 1
        is the class-conditional model, without doubling the batch, and so is 0, by which diffusers' own callbacks
        turn guidance off.
        """
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step evaluates the network with and without the class."""
        return self._guidance_scale != 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["NCSNPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw `batch_size` images.

        Args:
            batch_size (`int`, *optional*):
                The number of images; that of `class_labels` or `image`, or else 1, when not given.
            num_inference_steps (`int`, *optional*):
                The number of noise levels, each of which takes one network evaluation for each Langevin step; the
                pipeline's own when not given, which is 50 unless it was made with another.
            num_langevin_steps (`int`, *optional*):
                Langevin steps a level, for `AnnealedLangevinScheduler`; its config's when not given.
            sigmas (`list[float]`, *optional*):
                The noise levels themselves, falling, in units of the data, in the place of `num_inference_steps`; for
                `AnnealedLangevinScheduler`. A last level of 0, as in `scheduler.sigmas`, is the final denoising.
            class_labels (`int`, `list[int]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                One class for all images, or one for each, from 0, for a class-conditional network, which draws from
                all classes when not given.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance w: the network's output becomes u + w (c - u), where c is its output for the
                class and u that for no label, both from one evaluation of a doubled batch. The output, the denoised
                estimate and the score are affine in one another, so that any of them may be guided, to the same end.
                1 is the class-conditional model itself, without doubling.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Images to start from, of the network's size, in the formats of [`VaeImageProcessor`]: floating arrays
                `(batch_size, height, width, channels)` and tensors `(batch_size, channels, height, width)` in [0, 1],
                or 8-bit ones. One image serves the whole batch.
            strength (`float`, defaults to 0.8):
                With `image`, the share of the steps that is taken, above 0 and up to 1: the image is noised to the
                level where they begin.
            generator (`torch.Generator` or a list of them, *optional*):
                The randomness. With one generator for each image, an image does not depend on the batch it is
                drawn in. A CPU generator gives the same noise on every device.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to start from, or for `image` to be noised with.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: images; `"np"`: an array of shape `(batch_size, height, width, channels)` in [0, 1]; `"pt"`:
                a tensor of shape `(batch_size, channels, height, width)` in [0, 1]; `"latent"`: the same tensor in
                units of the data, unclipped.
            return_dict (`bool`, defaults to `True`): An [`ImagePipelineOutput`], or a plain tuple.
            callback_on_step_end (`Callable`, [`PipelineCallback`] or [`MultiPipelineCallbacks`], *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; the "latents" that it returns, of
                the same shape, replace the sample. When it sets `pipe._interrupt = True`, the call ends after that
                step with the denoised estimate instead of the noisy sample. When it sets `pipe._guidance_scale`, the
                guidance changes from the next step on: 1, or 0 as in diffusers' own callbacks, turns it off.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The names of the tensors that the callback is given: "latents", the sample after the step, as the
                scheduler scales it; "denoised", the estimate of the image that the step was computed from, in units
                of the data; "sigma", the noise level that it was made at, of shape `()`, in the same units. A
                [`PipelineCallback`] names its own.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError:
                An argument does not fit the network or the scheduler, or the scheduler does not fit the network;
                nothing has been computed then. Or a callback returned or set what it may not.
            FloatingPointError: the sample holds numbers that are not finite; the message names scheduler and step.
        """
        if image is not None:
            self._check_strength(strength)
            self._check_begins_anywhere("image")
            image = self._preprocess("image", image, self.image_processor, self.image_shape)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, image=image)
        shape = (batch_size, *self.image_shape)
        names = _callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            shape, class_labels, guidance_scale, generator, latents, output_type, names, callback_on_step_end
        )
        device = self._execution_device
        strength = strength if image is not None else None
        timesteps = self._set_timesteps(self.scheduler, num_inference_steps, num_langevin_steps, sigmas, strength)

        images = self._sample(
            self._prepare_latents(shape, timesteps, image, latents, generator, device),
            timesteps,
            self.embedding_indices(class_labels, batch_size, device),
            guidance_scale,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=names,
        )
        return self._finish(images, output_type, return_dict)

    @_takes_old_names(generator="generators", batch_size="num_images")
    @torch.no_grad()
    def interpolate(
        self,
        generators: Sequence[torch.Generator],
        num_images: int = 8,
        num_inference_steps: int | None = None,
        num_langevin_steps: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["NCSNPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw a row of images that leads smoothly from one sample to another.

        Image i takes all its noise, that of the start and that of each step, as cos(θ_i) z + sin(θ_i) z' from the
        noises z and z' of the two samples, with θ_i evenly spaced from 0 to π/2 (Song & Ermon 2020, arXiv:2006.09011):
        it is standard normal for every θ, so each image is a fair sample. A deterministic scheduler has noise at
        the start alone, and the row is then the spherical interpolation of it.

        Args:
            generators (two `torch.Generator`):
                The randomness of the two samples: the row begins with what a call with `batch_size=1` draws from the
                first, and ends with what it draws from the second.
            num_images (`int`, defaults to 8): The number of images, the two samples included, at least 2.
            num_inference_steps, num_langevin_steps, class_labels, guidance_scale, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`__call__`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images, in order.

        Raises:
            ValueError: as [`__call__`], or the scheduler draws noise in its steps and does not let it be given
                (`variance_noise`); nothing has been computed then.
            FloatingPointError: as [`__call__`].
        """
        given = list(generators) if isinstance(generators, Sequence) else [generators]
        if len({id(g) for g in given if isinstance(g, torch.Generator)}) != 2 or len(given) != 2:
            raise ValueError(
                f"`generators` must be two different `torch.Generator`s, one for each end, not {generators!r}."
            )
        self._check_count("num_images", num_images, at_least=2)
        _, class_labels = self._check_batch(num_images, class_labels, name="num_images")
        shape = (num_images, *self.image_shape)
        names = _callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(shape, class_labels, guidance_scale, None, None, output_type, names, callback_on_step_end)
        device = self._execution_device
        timesteps = self._set_timesteps(self.scheduler, num_inference_steps, num_langevin_steps)
        draws_noise = self._dry_run(timesteps)
        if any(draws_noise) and "variance_noise" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(
                f"{type(self.scheduler).__name__} draws noise in its steps that cannot be mixed: interpolate with "
                "AnnealedLangevinScheduler or a deterministic scheduler, such as DDIMScheduler."
            )

        angles = torch.linspace(0, math.pi / 2, num_images, dtype=torch.float64).reshape(-1, 1, 1, 1)
        cos, sin = angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

        def mixed_noise():
            first, second = (
                randn_tensor((1, *shape[1:]), generator=g, device=device, dtype=torch.float32) for g in generators
            )
            return cos * first + sin * second

        images = self._sample(
            self._scale_start(mixed_noise()),
            timesteps,
            self.embedding_indices(class_labels, num_images, device),
            guidance_scale,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=names,
            variance_noise=(lambda i: mixed_noise() if draws_noise[i] else None) if any(draws_noise) else None,
        )
        return self._finish(images, output_type, return_dict)

    # The network as a part for others: gradients flow through these two

    def denoise(
        self,
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The denoised estimate D(x, sigma) = E[x0 | x0 + sigma z = x], from one network evaluation. Below the smallest
        trained level, which is the least that the network knows of, the score is taken to be what it is there.

        Args:
            x (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): In units of the data.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                The noise level of all images or of each, in units of the data, from 0 to the largest trained level.
            class_labels (`int`, `list[int]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As in [`__call__`].

        Returns:
            `torch.Tensor` of the shape of `x`, in float32, in units of the data.

        Raises:
            ValueError: a shape does not fit the network, or a level lies outside the trained range.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            expected = ("batch_size", *self.image_shape)
            raise ValueError(f"`x` must have the shape ({', '.join(map(str, expected))}), not {tuple(x.shape)}.")
        sigmas = torch.as_tensor(sigma).detach().to("cpu", torch.float64)
        if sigmas.ndim > 1 or (sigmas.ndim == 1 and len(sigmas) not in (1, len(x))):
            raise ValueError(
                f"`sigma` must be a number, or one for each of the {len(x)} images, not of shape {tuple(sigmas.shape)}."
            )
        smallest, largest = math.exp(self._log_ladder()[0]), math.exp(self._log_ladder()[-1])
        if not ((sigmas >= 0) & (sigmas <= 1.001 * largest)).all():
            raise ValueError(
                f"`sigma` must be from 0 to {largest:g}, the largest level that the network was trained on, not "
                f"{sigmas.tolist()}."
            )
        _, class_labels = self._check_batch(len(x), class_labels, name="len(x)")
        labels = self.embedding_indices(class_labels, len(x), x.device)
        levels = sigmas.clamp(smallest, largest)
        timesteps = self._timesteps_at(levels.tolist()).to(x.device)
        share = ((sigmas / levels) ** 2).to(x.device, torch.float32).reshape(-1, 1, 1, 1)
        levels = levels.to(x.device, torch.float32).reshape(-1, 1, 1, 1)
        x = x.float()
        guidance_scale, self._guidance_scale = self._guidance_scale, 1.0
        try:
            denoised = self._denoise(x, timesteps, levels, labels)
        finally:
            self._guidance_scale = guidance_scale  # of a running call, whose callback may ask here
        return torch.lerp(x, denoised, share)  # x + sigma² score

    def score(
        self,
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The score, the gradient of log p_sigma(x) with respect to x: (D(x, sigma) - x)/sigma² (Tweedie's formula).

        Args:
            x, class_labels: As in [`denoise`].
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                The noise level of all images or of each, in units of the data, within the trained range.

        Returns:
            `torch.Tensor` of the shape of `x`, in float32, in 1/units of the data.

        Raises:
            ValueError: as [`denoise`], or a level lies below the trained range.
        """
        smallest = math.exp(self._log_ladder()[0])
        sigma = torch.as_tensor(sigma, dtype=torch.float32)
        if not (sigma >= 0.999 * smallest).all():
            raise ValueError(
                f"`sigma` must be at least {smallest:g}, the smallest level that the network was trained on, not "
                f"{sigma.tolist()}."
            )
        # x as the network sees it: what is rounded off would count as noise
        return (self.denoise(x, sigma, class_labels) - x.float()) / sigma.to(x.device).reshape(-1, 1, 1, 1) ** 2

    # The loop and what surrounds it

    def _set_timesteps(
        self,
        scheduler: SchedulerMixin,
        num_inference_steps: int | None,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float | None = None,
    ) -> torch.Tensor:
        """The timesteps of the last `strength` of the chain, or of one from noise, which `scheduler` is set to."""
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        name = type(scheduler).__name__
        settings = {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": sigmas}
        if num_langevin_steps is not None:
            settings["num_langevin_steps"] = num_langevin_steps
        if not _is_langevin(scheduler):
            for key in settings.keys() - {"num_inference_steps"}:
                raise ValueError(
                    f"`{key}`={settings[key]} is for AnnealedLangevinScheduler; {name} takes one step at each of its "
                    "own levels."
                )
            self._check_count("num_inference_steps", num_inference_steps)
            if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps and num_inference_steps < 4:
                raise ValueError(
                    f"`num_inference_steps`={num_inference_steps} is too few for {name}, whose first, Runge-Kutta "
                    "steps need 4 levels: take at least 4, or DDIMScheduler, or "
                    f"{name}.from_config(pipe.scheduler.config, skip_prk_steps=True)."
                )
        scheduler.set_timesteps(device=self._execution_device, **settings)
        order = scheduler.order  # a scheduler of order 2 takes its timesteps in pairs, which stay together
        num_steps = math.ceil(len(scheduler.timesteps) / order)
        begin = 0 if strength is None else order * (num_steps - max(1, round(num_steps * strength)))
        timesteps = scheduler.timesteps[begin:]
        if not _is_langevin(scheduler):
            if strength is None:
                self._check_first_level(timesteps, num_inference_steps)
            self._dry_run(timesteps[:1])
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)  # spares the schedulers a search on the device, too
        return timesteps

    def _check_first_level(self, timesteps: torch.Tensor, num_inference_steps: int) -> None:
        """With one level, diffusers' spacings "linspace" and "leading" begin at the smallest, on noise alone."""
        first, largest = self._noise_levels(timesteps)[0], math.exp(self._log_ladder()[-1])
        if first < 0.5 * min(1.0, largest):
            raise ValueError(
                f"`num_inference_steps`={num_inference_steps} is too few for {type(self.scheduler).__name__}, which "
                f"would begin at sigma={first:.2g} and return noise: take more, or set timestep_spacing='trailing'."
            )

    def _dry_run(self, timesteps: torch.Tensor) -> list[bool]:
        """
        Take the steps at `timesteps` with a copy of the scheduler and a sample of one pixel.

        Returns:
            `list[bool]`: whether each step draws noise, that is, moves a generator.

        Raises:
            ValueError: a step fails, whatever the reason.
        """
        scheduler, x = copy.deepcopy(self.scheduler), torch.zeros(1, 1, 1, 1, device=timesteps.device)
        generator = torch.Generator()  # torch's own stays as it is
        extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        draws_noise = []
        for t in timesteps:
            state = generator.get_state()
            try:
                scheduler.step(scheduler.scale_model_input(x, t), t, x, **extra)
            except Exception as error:
                raise ValueError(
                    f"{type(scheduler).__name__} cannot take a step with "
                    f"prediction_type={scheduler.config.prediction_type!r}: {type(error).__name__}: {error}"
                ) from error
            draws_noise.append(not torch.equal(state, generator.get_state()))
        return draws_noise

    def _prepare_latents(self, shape, timesteps, image, latents, generator, device) -> torch.Tensor:
        """The sample at the first of `timesteps`: noise, or the noised `image`."""
        # It stays in float32, whatever the network's dtype: at sigma = 50 half precision loses the image.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        if image is None:
            return self._scale_start(latents)
        return self.scheduler.add_noise(image.to(device).expand(shape), latents, timesteps[:1])

    def _scale_start(self, noise: torch.Tensor) -> torch.Tensor:
        """The first sample of a chain from noise: around the middle of the data, where sigma_1 is not much larger."""
        middle = (1 + self.config.data_min) / 2 if _is_langevin(self.scheduler) else 0.0  # the others scale the data
        return middle + noise * self.scheduler.init_noise_sigma

    def _sample(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        before_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        variance_noise: Callable[[int], torch.Tensor | None] | None = None,
        schedulers: Sequence[SchedulerMixin] | None = None,
        estimate: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        The loop: the sample after the last step, or the denoised estimate where it was interrupted.

        `before_step(i, latents)` returns the sample to take step i from, `variance_noise(i)` its noise, and
        `schedulers[i]` takes it. `estimate(i, x, t)` returns what takes the place of the network's own D(x, sigma).
        """
        schedulers = schedulers or [self.scheduler] * len(timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        sigmas = torch.from_numpy(self._noise_levels(timesteps)).to(latents.device, torch.float32)
        totals = torch.zeros(len(timesteps), device=latents.device)  # not finite from where the sample is not

        self._interrupt = False
        self._guidance_scale, self._num_timesteps = guidance_scale, len(timesteps)
        for i, t in enumerate(self.progress_bar(timesteps)):
            if before_step is not None:
                latents = before_step(i, latents)
            if variance_noise is not None:
                extra["variance_noise"] = variance_noise(i)
            model_input = schedulers[i].scale_model_input(latents, t)
            if estimate is None:
                model_output = self._predict(model_input, t, labels)
            else:
                denoised = estimate(i, self._to_x(model_input, sigmas[i]), t)
                model_output = self._from_denoised(denoised, model_input, sigmas[i])
            latents = schedulers[i].step(model_output, t, latents, return_dict=False, **extra)[0]

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "sigma": sigmas[i]}
                if "denoised" in callback_on_step_end_tensor_inputs:
                    tensors["denoised"] = self._to_denoised(model_output, model_input, sigmas[i])
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = self._call_back(callback_on_step_end, i, t, tensors, latents, labels)
            totals[i] = latents.sum()
            if self._interrupt:
                latents = self._to_denoised(model_output, model_input, sigmas[i])
                break
        self._check_sample(latents, totals[: i + 1], sigmas)
        return latents

    def _call_back(self, callback, i, t, tensors, latents, labels) -> torch.Tensor:
        """The sample after the callback, which may have changed it and the guidance."""
        guidance_scale, given = self._guidance_scale, dict(tensors)
        returned = callback(self, i, t, tensors)
        if self._guidance_scale != guidance_scale:
            self._guidance_scale = self._guidance_scale or 1.0  # 0 is how diffusers' own callbacks turn guidance off
            self._check_guidance(self._guidance_scale, labels is not None and len(labels) > len(latents))
        if returned is None:
            return latents
        if not isinstance(returned, dict):
            raise ValueError(f"`callback_on_step_end` must return a dict or None, not {type(returned).__name__}.")
        for name, value in returned.items():
            if name != "latents" and value is not given.get(name):
                raise ValueError(f"`callback_on_step_end` may replace 'latents' alone, but returned another {name!r}.")
        replaced = returned.get("latents", latents)
        if not isinstance(replaced, torch.Tensor) or replaced.shape != latents.shape:
            found = tuple(replaced.shape) if isinstance(replaced, torch.Tensor) else type(replaced).__name__
            raise ValueError(
                f"`callback_on_step_end` must return 'latents' of shape {tuple(latents.shape)}, not {found}: the batch "
                "is not doubled for guidance here, and there is nothing to halve."
            )
        return replaced.to(latents)

    def _check_sample(self, sample: torch.Tensor, totals: torch.Tensor, sigmas: torch.Tensor) -> None:
        """The one look at the numbers, after the loop: inside it, it would keep the device waiting."""
        name = type(self.scheduler).__name__
        largest = sample.abs().max().item()  # NaN where anything is
        if not math.isfinite(largest):
            bad = (~totals.isfinite()).nonzero().flatten().tolist()
            step = bad[0] if bad else len(totals) - 1
            raise FloatingPointError(
                f"The sample of {name} is not finite after step {step} of {self.num_timesteps} (from 0 on), at sigma="
                f"{sigmas[step].item():.3g}. Take more steps or another scheduler; where all of them do so, the "
                f"network's output overflows in {str(self._network.dtype).removeprefix('torch.')}, or its weights are "
                "not finite."
            )
        if largest > LARGEST_SAMPLE * (1 + sigmas[len(totals) - 1].item()):
            logger.warning(
                f"The sample of {name} reaches {largest:.3g}, where data are in [{self.config.data_min:g}, 1]: "
                f"{self.num_timesteps} steps have left noise in it. Take more, or another scheduler."
            )

    def _predict(self, model_input: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """
        The network's (guided) output in float32, from one evaluation. `labels` are as [`embedding_indices`] made them.
        """
        batch_size, model_input = len(model_input), model_input.to(self._network.dtype)
        if self.do_classifier_free_guidance:
            model_input = torch.cat([model_input, model_input])
        condition = {} if labels is None else {"class_labels": labels[: len(model_input)]}
        model_output = self.unet(model_input, timestep, return_dict=False, **condition)[0].float()
        if self.do_classifier_free_guidance:
            conditional, unconditional = model_output.split(batch_size)
            model_output = torch.lerp(unconditional, conditional, float(self._guidance_scale))
        return model_output

    def _finish(self, images: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        self.maybe_free_model_hooks()
        if output_type != "latent":
            images = images.clamp(self.config.data_min, 1)  # the processor clips data in [-1, 1] alone
        images = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # What the network is told, and what it says

    @property
    def _network(self) -> torch.nn.Module:
        """The network out of the wrappers of torch.compile and DistributedDataParallel, with its config and dtype."""
        network = self.unet
        while (inner := getattr(network, "_orig_mod", getattr(network, "module", None))) is not None:
            network = inner
        return network

    def _log_ladder(self) -> np.ndarray:
        """log sigma of the levels that the network was trained on, rising, in float64."""
        with np.errstate(divide="ignore"):
            # by a list: inside torch.func.vjp, which deepinv uses, tensors cannot be read by numpy
            log_alphas = np.log1p(-np.array(self.scheduler.betas.tolist()))
            return 0.5 * np.log(np.expm1(-np.cumsum(log_alphas)))  # 1 + sigma² = Π 1/(1 - beta)

    def _noise_levels(self, timesteps: torch.Tensor) -> np.ndarray:
        """The noise levels that the network is told of at `timesteps`, in units of the data, in float64."""
        timesteps = timesteps.numpy(force=True).astype(np.float64)
        if self.scheduler.config.get("conditioning") == "sigma":
            return timesteps
        log_sigmas = self._log_ladder()
        return np.exp(np.interp(timesteps, np.arange(len(log_sigmas)), log_sigmas))

    def _timesteps_at(self, sigmas: Sequence[float]) -> torch.Tensor:
        """The inverse of `_noise_levels`: (fractional) timesteps, in float32."""
        if self.scheduler.config.get("conditioning") != "sigma":
            log_sigmas = self._log_ladder()
            sigmas = np.interp(np.log(sigmas), log_sigmas, np.arange(len(log_sigmas)))
        return torch.as_tensor(np.asarray(sigmas), dtype=torch.float32)

    def _denoise(self, x, timestep, sigma, labels) -> torch.Tensor:
        """D(x, sigma), by one evaluation of the network. `timestep` is that of sigma."""
        model_input = x if self.scheduler.config.get("conditioning") == "sigma" else x / (1 + sigma**2) ** 0.5
        return self._to_denoised(self._predict(model_input, timestep, labels), model_input, sigma)

    def _to_x(self, model_input: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The noisy sample, in units of the data, that the network is given as `model_input` at the level `sigma`."""
        return (
            model_input if self.scheduler.config.get("conditioning") == "sigma" else model_input * (1 + sigma**2) ** 0.5
        )

    def _to_denoised(self, model_output: torch.Tensor, model_input: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        Convert the network's output to the denoised estimate D, in units of the data.

        `model_input` is what the network was given, at the noise level `sigma`. The conversion is the same for every
        scheduler because the network's convention is. (AnnealedLangevinScheduler has it as well, but stock schedulers
        do not, and on the Hub this file stands alone.)
        """
        x, scale = self._to_x(model_input, sigma), (1 + sigma**2) ** 0.5
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "v_prediction":
            return x / scale**2 - model_output * (sigma / scale)
        if prediction_type == "epsilon":
            return x - sigma * model_output
        if prediction_type == "score":
            return x + sigma**2 * model_output
        return model_output

    def _from_denoised(self, denoised: torch.Tensor, model_input: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The output of the network that means the estimate `denoised`: undoes [`_to_denoised`]."""
        x, scale = self._to_x(model_input, sigma), (1 + sigma**2) ** 0.5
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "v_prediction":
            return (x / scale**2 - denoised) * (scale / sigma)
        if prediction_type == "epsilon":
            return (x - denoised) / sigma
        if prediction_type == "score":
            return (denoised - x) / sigma**2
        return denoised

    # Checks: a ValueError for what cannot work, before the first network evaluation

    def _preprocess(self, name: str, image, processor: VaeImageProcessor, shape: tuple[int, int, int]) -> torch.Tensor:
        """Images or masks as a float32 tensor of shape `(n, *shape)`, checked."""
        images = image if isinstance(image, list) else [image]
        try:
            images = [self._from_8_bit(i, shape[0]) for i in images]
            tensor = processor.preprocess(images if isinstance(image, list) else images[0]).float()
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` must be an image, an array or a tensor, or a list of such, all of one size, not "
                f"{type(image).__name__}: {error}"
            ) from error
        if tuple(tensor.shape[1:]) != shape:
            raise ValueError(
                f"`{name}` must be {' × '.join(map(str, shape))} (channels, height, width) for this network, not "
                f"{' × '.join(map(str, tensor.shape[1:]))}: resize it first."
            )
        least = self.config.data_min if processor is self.image_processor else 0  # black in masks is 0
        if not ((tensor >= least) & (tensor <= 1)).all():
            raise ValueError(f"`{name}` must hold numbers from 0 to 1, or be an 8-bit image.")
        return tensor

    @staticmethod
    def _from_8_bit(image, channels: int):
        if isinstance(image, Image.Image):
            return read_image(image, channels if channels in (1, 3, 4) else None)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            return image.astype(np.float32) / 255
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
            return image.float() / 255
        return image

    @staticmethod
    def _check_count(name: str, value: int, at_least: int = 1) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
            raise ValueError(f"`{name}` must be an int of at least {at_least}, not {value!r}.")

    def _check_strength(self, strength: float) -> None:
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be a number above 0 and at most 1, not {strength!r}.")

    def _check_begins_anywhere(self, name: str) -> None:
        if isinstance(self.scheduler, PNDMScheduler):
            raise ValueError(
                f"`{name}` needs a scheduler that can begin in the middle of its chain; PNDMScheduler, whose first "
                "steps differ from the others, cannot: take DDIMScheduler, for example."
            )

    def _check_batch(
        self, batch_size: int | None, class_labels, name: str = "batch_size", **images: torch.Tensor | None
    ) -> tuple[int, torch.Tensor | None]:
        """The number of images, which the user knows as `name`, and the labels, of shape `()` or `(batch_size,)`."""
        counts = {}
        if class_labels is not None:
            class_labels = self._check_labels(class_labels)
            if class_labels.ndim:
                counts["class_labels"] = len(class_labels)
        counts |= {key: len(image) for key, image in images.items() if image is not None and len(image) > 1}
        if batch_size is None:
            batch_size = max(counts.values(), default=1)
        self._check_count(name, batch_size)
        for key, count in counts.items():
            if count != batch_size:
                raise ValueError(
                    f"`{key}` has {count} entries, but {name}={batch_size}: give one for each image, or a "
                    "single one for all."
                )
        return batch_size, class_labels

    def _check_labels(self, class_labels: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        num_classes = self.num_classes
        if num_classes is None:
            raise ValueError(
                "`class_labels` are for a class-conditional network, and this one is unconditional: its config has no "
                "`num_class_embeds`."
            )
        accepted = f"an int or a list of ints from 0 to {num_classes - 1}, of shape (batch_size,)"
        try:
            labels = torch.as_tensor(class_labels)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"`class_labels` must be {accepted}, not {class_labels!r}.") from error
        integral = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not integral or labels.ndim > 1 or not labels.numel():
            raise ValueError(f"`class_labels` must be {accepted}, not {class_labels!r}.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"`class_labels` must be {accepted}, not {labels.tolist()} (the network has {num_classes + 1} "
                "embeddings, the last of which means 'no label')."
            )
        return labels.long()

    @staticmethod
    def _check_guidance(guidance_scale: float, has_class: bool) -> None:
        if (
            isinstance(guidance_scale, bool)
            or not isinstance(guidance_scale, Real)
            or not (0 <= guidance_scale < math.inf)
        ):
            raise ValueError(f"`guidance_scale` must be a finite number of at least 0, not {guidance_scale!r}.")
        if guidance_scale != 1 and not has_class:
            raise ValueError(f"`guidance_scale`={guidance_scale} guides towards a class: it needs `class_labels`.")

    def check_inputs(
        self,
        shape,
        class_labels,
        guidance_scale,
        generator=None,
        latents=None,
        output_type="pil",
        callback_tensor_inputs=(),
        callback_on_step_end=None,
    ):
        """Raise a ValueError for what cannot work, before the first network evaluation."""
        batch_size, channels = shape[:2]
        self._check_guidance(guidance_scale, class_labels is not None)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but batch_size={batch_size}: give one generator for each "
                "image, or a single one."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, not {tuple(latents.shape)}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(map(repr, OUTPUT_TYPES))}, not {output_type!r}.")
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(
                f"`output_type`='pil' needs 1, 3 or 4 channels, and the network has {channels}; 'np', 'pt' and "
                "'latent' take any number."
            )
        check_scheduler(self.scheduler)
        if self.scheduler.config.get("conditioning") == "sigma" and not _is_langevin(self.scheduler):
            raise ValueError(
                f"This network is conditioned on sigma, but {type(self.scheduler).__name__} would give it timesteps: "
                "use AnnealedLangevinScheduler.from_config(pipe.scheduler.config)."
            )
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be callable, not {callback_on_step_end!r}.")
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, not "
                f"{sorted(unknown)}. (To change the guidance, a callback sets `pipe._guidance_scale`, and needs none.)"
            )


def check_scheduler(scheduler: SchedulerMixin | type[SchedulerMixin]) -> None:
    """
    Raises:
        ValueError: the scheduler, or all schedulers of the class, would sample a network of this package wrongly.
    """
    scheduler_class = scheduler if isinstance(scheduler, type) else type(scheduler)
    fitting = (
        f"AnnealedLangevinScheduler and {', '.join(SCHEDULERS)} fit, made by `from_config(pipe.scheduler.config)`."
    )
    known = {"AnnealedLangevinScheduler", *SCHEDULERS}
    # Those of diffusers, and classes that bear their names: copies of its files go about.
    of_diffusers = [
        cls.__name__
        for cls in scheduler_class.__mro__
        if cls.__name__.endswith("Scheduler")
        and (cls.__module__.startswith("diffusers.") or hasattr(diffusers.schedulers, cls.__name__))
    ]
    if of_diffusers and known.isdisjoint(cls.__name__ for cls in scheduler_class.__mro__):
        raise ValueError(
            f"{scheduler_class.__name__} does not fit: its time, its scaling or its steps are not those of the "
            f"network, or `generator` does not reach its noise. {fitting}"
        )
    if isinstance(scheduler, type):
        return
    if not hasattr(scheduler, "betas"):
        raise ValueError(
            f"{scheduler_class.__name__} has no `betas`, which the network's noise levels are read from. {fitting}"
        )
    settings = scheduler.config
    continuous = settings.get("timestep_type") == "continuous" and settings.get("prediction_type") == "v_prediction"
    for name, misfit in (
        ("use_flow_sigmas", bool(settings.get("use_flow_sigmas"))),
        ("prediction_type", settings.get("prediction_type") == "flow_prediction"),
        ("timestep_type", continuous),
    ):
        if misfit:
            raise ValueError(
                f"{scheduler_class.__name__} with {name}={settings[name]!r} does not fit: its time or scaling is not "
                f"the network's. Leave `{name}` at its default."
            )


def _is_langevin(scheduler: SchedulerMixin) -> bool:
    return "num_langevin_steps" in inspect.signature(scheduler.set_timesteps).parameters


def _callback_inputs(callback: Callable | None, names: Sequence[str] | None) -> Sequence[str]:
    """The tensors that a callback is given; diffusers' callback classes name them themselves."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    return ("latents",) if names is None else names


def _without_wrapper(unet: torch.nn.Module) -> torch.nn.Module:
    """The network itself, or compiled, from DistributedDataParallel and the like, which hide its config."""
    network = unet
    while not hasattr(network, "config") and isinstance(network, torch.nn.Module):
        network = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"`unet` must be a UNet2DModel, alone or wrapped, not {type(unet).__name__}.")
    return network


def check_not_of_diffusers_ncsn(class_name: str, name: str) -> None:
    """
    Raises:
        ValueError: `class_name` is that of a component of the package diffusers-ncsn.
    """
    if class_name in ("UNet2DModelForNCSN", "AnnealedLangevinDynamicsScheduler"):
        raise ValueError(
            f"{name!r} is of the package diffusers-ncsn, whose pipeline has the same name, NCSNPipeline: its "
            f"{class_name} is another network or sampler and does not fit this package. Use it with that package: "
            "`pip install diffusers-ncsn`, then `from ncsn import NCSNPipeline`."
        )
