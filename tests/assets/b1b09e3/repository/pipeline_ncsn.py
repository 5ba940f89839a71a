"""Pictures from a noise conditional score network: at will, of a class, from a picture, or in between two others.

One loop serves all of them: the network is evaluated, the scheduler steps. What differs is where the loop begins
(noise, or a noised picture: SDEdit, Meng et al. 2021, arXiv:2108.01073), what the network is told (a class, with
classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598), and where the noise comes from (mixed from two
sources: interpolation, Song & Ermon 2020, arXiv:2006.09011).
"""

import copy
import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import PNDMScheduler, UNet2DModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# The least value of a pixel, black, in the data of foreign pipelines that an NCSNPipeline can take over; white is 1.
FOREIGN_PIPELINES = {"ScoreSdeVePipeline": 0.0, "DDPMPipeline": -1.0, "DDIMPipeline": -1.0, "PNDMPipeline": -1.0}
# To be raised with each change after which older versions of this file would draw other pictures from a saved pipeline.
SAVED_FORMAT = 1

logger = logging.get_logger(__name__)


class NCSNPipeline(DiffusionPipeline):
    """
    Draws pictures with a noise conditional score network and any scheduler: `AnnealedLangevinScheduler`, or a stock one
    made by `from_config(pipe.scheduler.config)`.

    A class-conditional network has `num_class_embeds` = number of classes + 1: the last embedding means "no label".

    Args:
        unet ([`UNet2DModel`]): The network, conditioned on the noise level as the scheduler's config says.
        scheduler ([`SchedulerMixin`]): The sampler.
        data_min (`float`, defaults to -1.0):
            Black in the data that the network was trained on, -1 or 0; white is 1. Public NCSN++ networks have 0.

    Raises:
        ValueError: `data_min` is neither -1 nor 0.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "sigma", "denoised"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, data_min: float = -1.0):
        super().__init__()
        if data_min not in (-1, 0):
            raise ValueError(f"`data_min` must be -1 or 0, black in the data, not {data_min!r}.")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(data_min=float(data_min), _saved_format=SAVED_FORMAT)
        self._interrupt = False
        # The picture is the latent: nothing is scaled down, and no number of channels marks a VAE's latents.
        pixels = {"vae_scale_factor": 1, "vae_latent_channels": 0, "do_resize": False, "do_normalize": data_min == -1}
        channels = unet.config.in_channels
        self.image_processor = VaeImageProcessor(
            do_convert_grayscale=channels == 1, do_convert_rgb=channels == 3, **pixels
        )

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop after its present step; a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw `batch_size` pictures.

        Args:
            batch_size (`int`, *optional*):
                The number of pictures; that of `class_labels` or `image`, or else 1, when not given.
            num_inference_steps (`int`, defaults to 50):
                The number of noise levels, each of which takes one network evaluation for each Langevin step.
            num_langevin_steps (`int`, *optional*):
                Langevin steps a level, for `AnnealedLangevinScheduler`; its config's when not given.
            sigmas (`list[float]`, *optional*):
                The noise levels themselves, falling, in units of the data, in the place of `num_inference_steps`; for
                `AnnealedLangevinScheduler`.
            class_labels (`int`, `list[int]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                The class of all pictures or of each, from 0, for a class-conditional network; it draws from all
                classes when not given.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance w: the network's output becomes u + w (c - u), where c is its output for the
                class and u that for no label, both from one evaluation of a doubled batch. The output, the denoised
                estimate and the score are affine in one another, so that any of them may be guided, to the same end.
                1 is the class-conditional model itself, without doubling.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Pictures to start from, of the network's size, in the formats of [`VaeImageProcessor`]: floating arrays
                `(batch_size, height, width, channels)` and tensors `(batch_size, channels, height, width)` in [0, 1],
                or 8-bit ones. One picture serves the whole batch.
            strength (`float`, defaults to 0.8):
                With `image`, the share of the steps that is taken, above 0 and up to 1: the picture is noised to the
                level where they begin.
            generator (`torch.Generator` or a list of them, *optional*):
                The randomness. With one generator for each picture, a picture does not depend on the batch it is
                drawn in. A CPU generator gives the same noise on every device.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to start from, or for `image` to be noised with.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: pictures; `"np"`: an array of shape `(batch_size, height, width, channels)` in [0, 1]; `"pt"`:
                a tensor of shape `(batch_size, channels, height, width)` in [0, 1]; `"latent"`: the same tensor in
                units of the data, unclipped.
            return_dict (`bool`, defaults to `True`): An [`ImagePipelineOutput`], or a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; the "latents" that it returns
                replace the sample. When it sets `pipe._interrupt = True`, the call ends after that step with the
                denoised estimate instead of the noisy sample.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `("latents",)`):
                The names of the tensors that the callback is given: "latents", the sample after the step, as the
                scheduler scales it; "denoised", the estimate of the picture that the step was computed from, in units
                of the data; "sigma", the noise level that it was made at, of shape `()`, in the same units.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the pictures.

        Raises:
            ValueError: an argument does not fit the network or the scheduler; nothing has been computed then.
        """
        if image is not None:
            self._check_strength(strength)
            image = self._preprocess("image", image, self.image_processor, self._picture_shape)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, image=image)
        shape = (batch_size, *self._picture_shape)
        self.check_inputs(
            shape, class_labels, guidance_scale, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        device = self._execution_device
        strength = strength if image is not None else 1.0
        timesteps = self._set_timesteps(num_inference_steps, num_langevin_steps, sigmas, strength)

        images = self._sample(
            self._prepare_latents(shape, timesteps, image, latents, generator, device),
            timesteps,
            self._embedding_indices(class_labels, batch_size, guidance_scale, device),
            guidance_scale,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return self._finish(images, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        generator: Sequence[torch.Generator],
        batch_size: int = 8,
        num_inference_steps: int = 50,
        num_langevin_steps: int | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Draw a row of pictures that leads smoothly from one sample to another.

        Picture i takes all its noise, that of the start and that of each step, as cos(θ_i) z + sin(θ_i) z' from the
        noises z and z' of the two samples, with θ_i evenly spaced from 0 to π/2 (Song & Ermon 2020, arXiv:2006.09011):
        it is standard normal for every θ, and so each picture is a fair sample. A deterministic scheduler has noise at
        the start alone, and the row is then the spherical interpolation of it.

        Args:
            generator (two `torch.Generator`):
                The randomness of the two samples: the row begins with what a call with `batch_size=1` draws from the
                first, and ends with what it draws from the second.
            batch_size (`int`, defaults to 8): The number of pictures, the two samples among them, at least 2.
            num_inference_steps, num_langevin_steps, class_labels, guidance_scale, output_type, return_dict:
                As in [`__call__`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the pictures, in order.

        Raises:
            ValueError: an argument does not fit the network or the scheduler, or the scheduler draws noise in its steps
                and does not let it be given (`variance_noise`); nothing has been computed then.
        """
        generators = list(generator) if isinstance(generator, Sequence) else [generator]
        if len({id(g) for g in generators if isinstance(g, torch.Generator)}) != 2 or len(generators) != 2:
            raise ValueError(
                f"`generator` must be two different `torch.Generator`s, one for each end, not {generator!r}."
            )
        batch_size, class_labels = self._check_batch(batch_size, class_labels)
        if batch_size < 2:
            raise ValueError("`batch_size` must be at least 2, the two samples at the ends, not 1.")
        shape = (batch_size, *self._picture_shape)
        self.check_inputs(shape, class_labels, guidance_scale, output_type=output_type)
        device = self._execution_device
        timesteps = self._set_timesteps(num_inference_steps, num_langevin_steps)
        draws_noise = self._find_noisy_steps(timesteps)
        if any(draws_noise) and "variance_noise" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(
                f"{type(self.scheduler).__name__} draws noise in its steps that cannot be mixed: interpolate with "
                "AnnealedLangevinScheduler or a deterministic scheduler, such as DDIMScheduler."
            )

        angles = torch.linspace(0, math.pi / 2, batch_size, dtype=torch.float64).reshape(-1, 1, 1, 1)
        cos, sin = angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

        def mixed_noise():
            first, second = (
                randn_tensor((1, *shape[1:]), generator=g, device=device, dtype=torch.float32) for g in generators
            )
            return cos * first + sin * second

        images = self._sample(
            mixed_noise() * self.scheduler.init_noise_sigma,
            timesteps,
            self._embedding_indices(class_labels, batch_size, guidance_scale, device),
            guidance_scale,
            variance_noise=(lambda i: mixed_noise() if draws_noise[i] else None) if any(draws_noise) else None,
        )
        return self._finish(images, output_type, return_dict)

    # Loading and publishing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "NCSNPipeline":
        """
        As [`~DiffusionPipeline.from_pretrained`], from a folder or a repository on the Hub. No code of the repository
        is run: the package's own takes its place.

        DDPM, DDIM, PNDM and ScoreSdeVe pipelines load as well: `AnnealedLangevinScheduler` takes over their noise
        levels, and `data_min` is that of their data.

        The weights of an NCSN are safetensors. Of other repositories, safetensors are preferred; one that has only a
        pickle is read as diffusers does, by torch's loader for plain tensors, unless `use_safetensors=True`.

        Raises:
            OSError: there is no such repository or revision, a file is missing or damaged, or the Hub is out of reach
                and the cache does not hold it.
            ValueError: the pipeline is of another kind, or was saved by a newer version of this package.
        """
        source = str(pretrained_model_name_or_path)
        folder = source if os.path.isdir(source) else str(cls.download(source, **kwargs))
        index_file = os.path.join(folder, cls.config_name)
        if not os.path.isfile(index_file):
            raise OSError(f"{source!r} holds no pipeline: it has no {cls.config_name}.")
        with open(index_file, encoding="utf-8") as file:
            index = json.load(file)
        _translate_index(index, cls.__name__)  # raises where it cannot
        foreign = _class_name(index)
        if foreign not in FOREIGN_PIPELINES:
            foreign = None
            _check_complete(source, folder, [name for name in ("unet", "scheduler") if name not in kwargs])
            kwargs["use_safetensors"] = True
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=source)
        if foreign is not None:
            scheduler = "" if "scheduler" in kwargs else f"its {index['scheduler'][1]} has become an "
            logger.warning(
                f"{source} is a {foreign}: {scheduler}{type(pipe.scheduler).__name__}, and its data are taken to be "
                f"in [{pipe.config.data_min:g}, 1]."
            )
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str | os.PathLike:
        """
        As [`~DiffusionPipeline.download`]: the folder of the cache that holds the repository's pipeline. Files whose
        content differs from what the Hub says of them are refused.

        Raises:
            OSError: as [`from_pretrained`].
        """
        revision = kwargs.get("revision") or "main"
        try:
            folder = super().download(pretrained_model_name, **kwargs)
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise OSError(_explain(error, pretrained_model_name, revision)) from error
        for path in sorted(Path(folder).rglob("*")):
            _check_content(path, pretrained_model_name)
        return folder

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        # diffusers reads model_index.json through this method, to download as well as to load
        return _translate_index(super()._dict_from_json_file(json_file), cls.__name__)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, push_to_hub: bool = False, **kwargs) -> None:
        """
        As [`~DiffusionPipeline.save_pretrained`]. With `push_to_hub=True` the folder is uploaded as well, under its
        name or as `repo_id` says; `private`, `token` and `commit_message` are as of [`push_to_hub`].
        """
        options = {name: kwargs.pop(name) for name in ("private", "token", "commit_message") if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
        super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            importlib.import_module("ncsn_diffusers.hub").push_to_hub(save_directory, repo_id, **options)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Upload the pipeline with a model card and the code that loads it where this package is not installed; the
        arguments are those of `ncsn_diffusers.hub.push_to_hub`.
        """
        # Not a plain import: diffusers, which reads this file's imports from its text, would ask for the package.
        return importlib.import_module("ncsn_diffusers.hub").push_to_hub(self, repo_id, **kwargs)

    # The loop and what surrounds it

    def _set_timesteps(
        self,
        num_inference_steps: int,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """The timesteps of the last `strength` of the chain, which the scheduler is set to."""
        settings = {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": list(sigmas)}
        if num_langevin_steps is not None:
            settings["num_langevin_steps"] = num_langevin_steps
        for name in settings.keys() & {"sigmas", "num_langevin_steps"}:
            if "num_langevin_steps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(
                    f"`{name}`={settings[name]} is for AnnealedLangevinScheduler; {type(self.scheduler).__name__} "
                    "takes one step at each of its own levels."
                )
        self.scheduler.set_timesteps(device=self._execution_device, **settings)
        order = self.scheduler.order  # a scheduler of order 2 takes its timesteps in pairs, which stay together
        num_steps = math.ceil(len(self.scheduler.timesteps) / order)
        begin = order * (num_steps - max(1, round(num_steps * strength)))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)  # spares the schedulers a search on the device, too
        return self.scheduler.timesteps[begin:]

    def _prepare_latents(self, shape, timesteps, image, latents, generator, device) -> torch.Tensor:
        """The sample at the first of `timesteps`: noise, or the noised `image`."""
        # It stays in float32, whatever the network's dtype: at sigma = 50 half precision loses the picture.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        if image is None:
            return latents * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(image.to(device).expand(shape), latents, timesteps[:1])

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
    ) -> torch.Tensor:
        """
        The loop: the sample after the last step, or the denoised estimate where it was interrupted.

        `before_step(i, latents)` returns the sample to take step i from, `variance_noise(i)` its noise, and
        `schedulers[i]` takes it.
        """
        schedulers = schedulers or [self.scheduler] * len(timesteps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        sigmas = torch.from_numpy(self._noise_levels(timesteps)).to(latents.device, torch.float32)

        self._interrupt = False
        for i, t in enumerate(self.progress_bar(timesteps)):
            if before_step is not None:
                latents = before_step(i, latents)
            if variance_noise is not None:
                extra["variance_noise"] = variance_noise(i)
            model_input = schedulers[i].scale_model_input(latents, t)
            model_output = self._predict(model_input, t, labels, guidance_scale)
            latents = schedulers[i].step(model_output, t, latents, return_dict=False, **extra)[0]

            if callback_on_step_end is not None:
                tensors = {"latents": latents, "sigma": sigmas[i]}
                if "denoised" in callback_on_step_end_tensor_inputs:
                    tensors["denoised"] = self._denoise(model_output, model_input, sigmas[i])
                tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
            if self._interrupt:
                return self._denoise(model_output, model_input, sigmas[i])
        return latents

    def _predict(
        self, model_input: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        """
        The network's (guided) output in float32, from one evaluation. `labels` are as `_embedding_indices` made them:
        twice as many as pictures, those of "no label" last, where there is guidance.
        """
        model_input = model_input.to(self.unet.dtype)
        condition = {} if labels is None else {"class_labels": labels}
        guided = labels is not None and len(labels) > len(model_input)
        if guided:
            model_input = torch.cat([model_input, model_input])
        model_output = self.unet(model_input, timestep, return_dict=False, **condition)[0].float()
        if guided:
            conditional, unconditional = model_output.chunk(2)
            model_output = torch.lerp(unconditional, conditional, guidance_scale)
        return model_output

    def _finish(self, images: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        self.maybe_free_model_hooks()
        if output_type != "latent":
            images = images.clamp(self.config.data_min, 1)  # the processor clips data in [-1, 1] alone
        images = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # What the network is told, and what it says

    @property
    def _picture_shape(self) -> tuple[int, int, int]:
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        return (channels, size, size) if isinstance(size, int) else (channels, *size)

    def _embedding_indices(
        self, class_labels: torch.Tensor | None, batch_size: int, guidance_scale: float, device: torch.device
    ) -> torch.Tensor | None:
        """The rows of the class embedding, `(batch_size,)` or, with guidance, `(2 * batch_size,)`; None without one."""
        num_embeddings = self.unet.config.get("num_class_embeds")
        if num_embeddings is None:
            return None
        no_label = torch.full((batch_size,), num_embeddings - 1, device=device)
        if class_labels is None:
            return no_label
        labels = class_labels.to(device).expand(batch_size)
        return labels if guidance_scale == 1 else torch.cat([labels, no_label])

    def _log_ladder(self) -> np.ndarray:
        """log sigma of the levels that the network was trained on, rising, in float64."""
        with np.errstate(divide="ignore"):
            log_alphas = np.log1p(-self.scheduler.betas.numpy(force=True).astype(np.float64))
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

    def _denoise(self, model_output: torch.Tensor, model_input: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        The denoised estimate D, in units of the data, from what the network was given and returned at level `sigma`:
        the same for all schedulers, because the network's convention is. (AnnealedLangevinScheduler has it too, but
        the stock ones do not, and on the Hub either file must stand alone.)
        """
        scale = (1 + sigma**2) ** 0.5
        x = model_input if self.scheduler.config.get("conditioning") == "sigma" else model_input * scale
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "v_prediction":
            return x / scale**2 - model_output * (sigma / scale)
        if prediction_type == "epsilon":
            return x - sigma * model_output
        if prediction_type == "score":
            return x + sigma**2 * model_output
        return model_output

    def _find_noisy_steps(self, timesteps: torch.Tensor) -> list[bool]:
        """Which steps draw noise: those of a copy of the scheduler that move on a generator."""
        scheduler, generator = copy.deepcopy(self.scheduler), torch.Generator()
        if "generator" not in inspect.signature(scheduler.step).parameters:
            return [False] * len(timesteps)
        x = torch.zeros(1, 1, 1, 1, device=timesteps.device)
        draws_noise = []
        for t in timesteps:
            state = generator.get_state()
            scheduler.scale_model_input(x, t)
            scheduler.step(x, t, x, generator=generator)
            draws_noise.append(not torch.equal(state, generator.get_state()))
        return draws_noise

    # Checks: a ValueError for what cannot work, before the first network evaluation

    def _preprocess(self, name: str, image, processor: VaeImageProcessor, shape: tuple[int, int, int]) -> torch.Tensor:
        """Pictures or masks as a float32 tensor of shape `(n, *shape)`, checked."""
        images = image if isinstance(image, list) else [image]
        images = [self._from_8_bit(i) for i in images]
        try:
            tensor = processor.preprocess(images if isinstance(image, list) else images[0]).float()
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` must be a picture, an array or a tensor, or a list of such, all of one size, not "
                f"{type(image).__name__}: {error}"
            ) from error
        if tuple(tensor.shape[1:]) != shape:
            raise ValueError(
                f"`{name}` must be {' × '.join(map(str, shape))} (channels, height, width) for this network, not "
                f"{' × '.join(map(str, tensor.shape[1:]))}: resize it first."
            )
        if not ((tensor >= self.config.data_min) & (tensor <= 1)).all():
            raise ValueError(f"`{name}` must hold numbers from 0 to 1, or be an 8-bit picture.")
        return tensor

    @staticmethod
    def _from_8_bit(image):
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            return image.astype(np.float32) / 255
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
            return image.float() / 255
        return image

    @staticmethod
    def _check_count(name: str, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, not {value!r}.")

    def _check_strength(self, strength: float) -> None:
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < strength <= 1:
            raise ValueError(f"`strength` must be a number above 0 and at most 1, not {strength!r}.")
        self._check_begins_anywhere("image")

    def _check_begins_anywhere(self, name: str) -> None:
        if isinstance(self.scheduler, PNDMScheduler):
            raise ValueError(
                f"`{name}` needs a scheduler that can begin in the middle of its chain; PNDMScheduler, whose first "
                "steps differ from the others, cannot: take DDIMScheduler, for example."
            )

    def _check_batch(
        self, batch_size: int | None, class_labels, **images: torch.Tensor | None
    ) -> tuple[int, torch.Tensor | None]:
        """The number of pictures, and the labels as a tensor of shape `()` or `(batch_size,)`."""
        counts = {}
        if class_labels is not None:
            class_labels = self._check_labels(class_labels)
            if class_labels.ndim:
                counts["class_labels"] = len(class_labels)
        counts |= {name: len(image) for name, image in images.items() if image is not None and len(image) > 1}
        if batch_size is None:
            batch_size = max(counts.values(), default=1)
        self._check_count("batch_size", batch_size)
        for name, count in counts.items():
            if count != batch_size:
                raise ValueError(
                    f"`{name}` has {count} entries, but batch_size={batch_size}: give one for each picture, or a "
                    "single one for all."
                )
        return batch_size, class_labels

    def _check_labels(self, class_labels: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        num_embeddings = self.unet.config.get("num_class_embeds")
        if num_embeddings is None:
            raise ValueError(
                "`class_labels` are for a class-conditional network, and this one is unconditional: its config has no "
                "`num_class_embeds`."
            )
        accepted = f"an int or a list of ints from 0 to {num_embeddings - 2}, of shape (batch_size,)"
        try:
            labels = torch.as_tensor(class_labels)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"`class_labels` must be {accepted}, not {class_labels!r}.") from error
        integral = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if not integral or labels.ndim > 1 or not labels.numel():
            raise ValueError(f"`class_labels` must be {accepted}, not {class_labels!r}.")
        if labels.min() < 0 or labels.max() > num_embeddings - 2:
            raise ValueError(
                f"`class_labels` must be {accepted}, not {labels.tolist()} (the network has {num_embeddings} "
                "embeddings, the last of which means 'no label')."
            )
        return labels.long()

    def check_inputs(
        self,
        shape,
        class_labels,
        guidance_scale,
        generator=None,
        latents=None,
        output_type="pil",
        callback_tensor_inputs=(),
    ):
        """Raise a ValueError for what cannot work, before the first network evaluation."""
        batch_size, channels = shape[:2]
        if (
            isinstance(guidance_scale, bool)
            or not isinstance(guidance_scale, Real)
            or not (0 <= guidance_scale < math.inf)
        ):
            raise ValueError(f"`guidance_scale` must be a finite number of at least 0, not {guidance_scale!r}.")
        if guidance_scale != 1 and class_labels is None:
            raise ValueError(f"`guidance_scale`={guidance_scale} guides towards a class: it needs `class_labels`.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but batch_size={batch_size}: give one generator for each "
                "picture, or a single one."
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
        langevin = "num_langevin_steps" in inspect.signature(self.scheduler.set_timesteps).parameters
        if self.scheduler.config.get("conditioning") == "sigma" and not langevin:
            raise ValueError(
                f"This network is conditioned on sigma, but {type(self.scheduler).__name__} would give it timesteps: "
                "use AnnealedLangevinScheduler.from_config(pipe.scheduler.config)."
            )
        if not hasattr(self.scheduler, "betas"):
            raise ValueError(
                f"{type(self.scheduler).__name__} has no `betas`, which the network's noise levels are read from: use "
                "AnnealedLangevinScheduler or one of its `compatibles`."
            )
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, not "
                f"{sorted(unknown)}."
            )


def _class_name(index: dict) -> str:
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list | tuple) else name  # with the module of its code, in a repository


def _translate_index(index: dict, class_name: str) -> dict:
    """
    A model_index.json as it would be if `class_name` and `AnnealedLangevinScheduler` were diffusers' own, where the
    package makes them known: code that is in the repository is not asked for.
    """
    found = _class_name(index)
    if found not in (*FOREIGN_PIPELINES, "NCSNPipeline", "NCSNInpaintPipeline", class_name):
        raise ValueError(
            f"The pipeline is a {found}, which an NCSNPipeline cannot take over; it can be an NCSNPipeline or one of "
            f"{', '.join(FOREIGN_PIPELINES)}. DiffusionPipeline.from_pretrained loads any."
        )
    if index.get("_saved_format", 1) > SAVED_FORMAT:
        raise ValueError(
            f"The pipeline was saved by a newer version of ncsn_diffusers, in format {index['_saved_format']}; this "
            f"version reads formats up to {SAVED_FORMAT}. Update the package, or run the repository's own code by "
            "DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
        )
    index = {**index, "_class_name": class_name}
    ours = index.get("scheduler", [None, None])[1] == "AnnealedLangevinScheduler"
    if (ours or found in FOREIGN_PIPELINES) and hasattr(diffusers, "AnnealedLangevinScheduler"):
        index["scheduler"] = ["diffusers", "AnnealedLangevinScheduler"]
    if found in FOREIGN_PIPELINES:
        index["data_min"] = FOREIGN_PIPELINES[found]
    return index


def _check_complete(source: str, folder: str, components: list[str]) -> None:
    needed = {"unet": ("config.json", "*.safetensors"), "scheduler": ("scheduler_config.json",)}
    missing = [
        f"{name}/{pattern}"
        for name in components
        for pattern in needed[name]
        if not any(Path(folder, name).glob(pattern))
    ]
    if missing:
        raise OSError(
            f"{source!r} is incomplete: {', '.join(missing)} is missing. Save or upload the pipeline once more, or ask "
            "its author to, or choose another `revision`."
        )


def _check_content(path: Path, repo_id: str) -> None:
    """The Hub's cache names a file after its hash: SHA-256, or git's for small files."""
    if not path.is_symlink() or not path.is_file():
        return  # a file system without links: the name is lost
    blob = path.resolve()
    if len(blob.name) == 64:
        digest = hashlib.sha256()
    elif len(blob.name) == 40:
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    else:
        return
    with open(blob, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        raise OSError(
            f"{path.name} of {repo_id!r} is damaged: its hash is not the one that the Hub has on record. Delete {blob} "
            "and load again."
        )


def _explain(error: BaseException, repo_id: str, revision: str) -> str:
    """What is wrong with a repository and what to do, from whatever the Hub's client has raised."""
    causes = [error]
    for cause in causes:
        causes += [c for c in (cause.__cause__, cause.__context__) if c is not None and c not in causes]

    def found(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    if found(RepositoryNotFoundError, HFValidationError):
        return (
            f"{repo_id!r} is neither a folder here nor a repository on the Hub that can be read: check the name; if it "
            "is private, log in by `hf auth login` or give a `token` that may read it."
        )
    if found(RevisionNotFoundError):
        return f"{repo_id!r} has no revision {revision!r}: `revision` must be a branch, a tag or a commit of it."
    if found(LocalEntryNotFoundError, OfflineModeIsEnabled, FileNotFoundError):
        return (
            f"{repo_id!r} at revision {revision!r} is not in the cache, or not all of it, and the Hub is out of reach "
            "or not to be asked: load it once with a connection and without `local_files_only`."
        )
    if found(EntryNotFoundError):
        return (
            f"{repo_id!r} is incomplete, or holds no pipeline, at revision {revision!r}: {error}. Choose another "
            "`revision`, or ask its author to upload it once more."
        )
    return f"{repo_id!r} could not be loaded from the Hub: {error}"
