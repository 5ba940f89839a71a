"""Unconditional image generation with a noise conditional score network."""

import inspect
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from diffusers import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class NCSNPipeline(DiffusionPipeline):
    """
    Draws pictures with a noise conditional score network and any scheduler: `AnnealedLangevinScheduler`, or a stock one
    made by `from_config(pipe.scheduler.config)`.

    Args:
        unet ([`UNet2DModel`]): The network, conditioned on the noise level as the scheduler's config says.
        scheduler ([`SchedulerMixin`]): The sampler.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        num_langevin_steps: int | None = None,
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
            batch_size (`int`, defaults to 1): The number of pictures.
            num_inference_steps (`int`, defaults to 50):
                The number of noise levels, each of which takes one network evaluation for each Langevin step.
            num_langevin_steps (`int`, *optional*):
                Langevin steps a level, for `AnnealedLangevinScheduler`; its config's when not given.
            generator (`torch.Generator` or a list of them, *optional*):
                The randomness. With one generator for each picture, a picture does not depend on the batch it is
                drawn in. A CPU generator gives the same noise on every device.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to start from; the pipeline scales it by `scheduler.init_noise_sigma`.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: pictures; `"np"`: an array of shape `(batch_size, height, width, channels)` in [0, 1]; `"pt"`:
                a tensor of shape `(batch_size, channels, height, width)` in [0, 1]; `"latent"`: the same tensor in
                units of the data, unclipped.
            return_dict (`bool`, defaults to `True`): An [`ImagePipelineOutput`], or a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; what it returns replaces the
                tensors of the same names.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `("latents",)`):
                The names of the tensors that the callback is given.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the pictures.

        Raises:
            ValueError: an argument does not fit the network or the scheduler; nothing has been computed then.
        """
        channels, size = self.unet.config.in_channels, self.unet.config.sample_size
        shape = (batch_size, channels, *([size, size] if isinstance(size, int) else size))
        self.check_inputs(
            shape, num_langevin_steps, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        device = self._execution_device

        langevin = {} if num_langevin_steps is None else {"num_langevin_steps": num_langevin_steps}
        self.scheduler.set_timesteps(num_inference_steps, device=device, **langevin)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # spares the schedulers a search on the device
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}

        # The sample stays in float32, whatever the network's dtype: at sigma = 50 half precision loses the picture.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
            model_output = self.unet(model_input, t, return_dict=False)[0].float()
            latents = self.scheduler.step(model_output, t, latents, return_dict=False, **extra)[0]

            if callback_on_step_end is not None:
                tensors = {name: {"latents": latents}[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)

        images = latents if output_type == "latent" else (latents / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(self, shape, num_langevin_steps, generator, latents, output_type, callback_tensor_inputs):
        """Raise a ValueError for what cannot work, before the first network evaluation."""
        batch_size, channels = shape[:2]
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"`batch_size` must be an int of at least 1, not {batch_size!r}.")
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
        unknown = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, not "
                f"{sorted(unknown)}."
            )
        langevin = "num_langevin_steps" in inspect.signature(self.scheduler.set_timesteps).parameters
        if num_langevin_steps is not None and not langevin:
            raise ValueError(
                f"`num_langevin_steps`={num_langevin_steps} is for AnnealedLangevinScheduler; "
                f"{type(self.scheduler).__name__} takes one step a level."
            )
        if self.scheduler.config.get("conditioning") == "sigma" and not langevin:
            raise ValueError(
                f"This network is conditioned on sigma, but {type(self.scheduler).__name__} would give it timesteps: "
                "use AnnealedLangevinScheduler.from_config(pipe.scheduler.config)."
            )
