"""Drawing many images from settings: the pipeline that they name, and batches that processes share."""

import difflib
import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from . import precision
from .foreign_configs import SCHEDULERS, check_scheduler, readable_config
from .hub.loading import NCSNPipeline
from .pretrained import find_pipeline, pretrained
from .settings import DType, SamplingConfig, parse_settings

# Added to the seed of the noise of measurements: far from the seeds of the chains, whose numbers must be others. A
# generator on the CPU reads only the low 32 bits of a seed, so that 2**32 would be no distance.
NOISE_SEED = 2**31


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """
    The scheduler class of that name.

    Raises:
        ValueError: diffusers has none, or it does not fit the networks of this package.
    """
    scheduler_class = getattr(diffusers, name, None)
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin):
        check_scheduler(scheduler_class)
        return scheduler_class
    names = ["AnnealedLangevinScheduler", *SCHEDULERS]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"`scheduler`={name!r} is no scheduler of diffusers; {', '.join(names)} fit.{hint}")


def check_settings(scheduler_class: type[SchedulerMixin], settings: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the scheduler has no such setting; `from_config` would silently drop it.
    """
    known = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"`scheduler_config`: {scheduler_class.__name__} has no setting {', '.join(unknown)}, but "
            f"{', '.join(sorted(known))}."
        )


def load_pipeline(
    name: str, scheduler_class: type[SchedulerMixin] | None = None, settings: dict[str, Any] | None = None
) -> NCSNPipeline:
    """
    A pipeline from a folder or the Hub.

    Args:
        name (`str`): the folder, or the repository's id.
        scheduler_class (`type`, *optional*): the scheduler to sample with; the pipeline's own when not given.
        settings (`dict`, *optional*): settings of the scheduler that replace those of the pipeline's config.

    Raises:
        ValueError: there is no such pipeline, the scheduler does not fit it, or has no such setting.
    """
    if scheduler_class is not None:
        check_settings(scheduler_class, settings or {})
    try:
        pipe = NCSNPipeline.from_pretrained(find_pipeline(name))
    except OSError as error:
        if Path(name).exists():
            raise ValueError(f"`pipeline`={name!r} cannot be loaded: {error}") from error
        raise ValueError(_describe_missing(name, error)) from error
    settings = settings or {}
    if scheduler_class is None:
        scheduler_class = type(pipe.scheduler)
        check_settings(scheduler_class, settings)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    check_scheduler(pipe.scheduler)
    return pipe


def _describe_missing(name: str, error: OSError) -> str:
    """That there is neither a folder nor a repository of that name, and which folder is near."""
    path = Path(name)
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    folders = {folder.name: folder for folder in beside if (folder / "model_index.json").is_file()}
    near = difflib.get_close_matches(path.name, folders, n=1)
    hint = f" Did you mean {folders[near[0]]}?" if near else ""
    if isinstance(error.__cause__, LocalEntryNotFoundError | OfflineModeIsEnabled):
        on_hub = "the Hub cannot be asked for a repository of that name"
    else:
        on_hub = f"on the Hub: {str(error).rstrip('.')}"
    return f"`pipeline`={name!r}: there is no such folder, and {on_hub}.{hint}"


def cast(pipe: NCSNPipeline, dtype: DType) -> None:
    """Run the network in `dtype`, in the layout that is fast for it."""
    # these and not `to`, of which diffusers 0.42 warns whatever the model
    {"float32": pipe.unet.float, "bfloat16": pipe.unet.bfloat16, "float16": pipe.unet.half}[dtype]()
    pipe.unet.to(memory_format=precision.fast_memory_format(pipe.device, pipe.unet.dtype, len(pipe.sample_shape) - 1))


def open_processes() -> Accelerator:
    """The processes that share the work. The timeout of a week lets a process that is done wait for the slowest."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


class Sampler:
    """
    A pipeline on this process's device, and what its images are drawn with.

    Args:
        config ([`SamplingConfig`]): what to draw; it is left as it is.

    Attributes:
        name (`str`): the pipeline, as it was given, or the one that comes with the package.
        num_inference_steps, dtype, class_labels: as in the config, or what it leaves to the pipeline and the device.

    Raises:
        ValueError: the pipeline cannot be loaded, or the scheduler or one of its settings does not fit.
    """

    def __init__(self, config: SamplingConfig):
        self.config, self.name = config, config.pipeline or pretrained("mnist")
        scheduler_class = None if config.scheduler is None else find_scheduler(config.scheduler)
        settings = parse_settings(config.scheduler_config)
        if scheduler_class is not None:
            check_settings(scheduler_class, settings)
        self.accelerator = open_processes()
        self.pipe = load_pipeline(self.name, scheduler_class, settings).to(self.accelerator.device)
        self.class_labels = config.class_labels
        self.num_inference_steps = config.num_inference_steps
        if self.num_inference_steps is None:
            self.num_inference_steps = self.pipe.config.num_inference_steps
        self.dtype = config.dtype or "float32"
        if config.dtype is None and self.accelerator.device.type == "cpu" and precision.cpu_has_bfloat16():
            self.dtype = "bfloat16"
            self.accelerator.print("The network computes in bfloat16: this CPU has instructions for it.")
        cast(self.pipe, self.dtype)
        if config.compile:  # not `unet.compile`, which takes hooks in and compiles again for each new one
            self.pipe.unet.forward = torch.compile(self.pipe.unet.forward, dynamic=False)
        self.pipe.set_progress_bar_config(leave=False, disable=not self.accelerator.is_main_process)

    def sample(self, indices: range, **arguments) -> Any:
        """The images with these indices, of the type that the pipeline's `arguments` ask for."""
        config = self.config
        if config.num_langevin_steps is not None:
            arguments["num_langevin_steps"] = config.num_langevin_steps
        if self.class_labels is not None:
            arguments["class_labels"] = [self.class_labels[i % len(self.class_labels)] for i in indices]
        return self.pipe(
            batch_size=len(indices),
            num_inference_steps=self.num_inference_steps,
            sigmas=config.sigmas,
            guidance_scale=config.guidance_scale,
            generator=make_generators(config.seed, indices),
            **arguments,
        ).images

    def describe(self) -> dict[str, Any]:
        """What the images depend on besides the weights, to record it."""
        names = ("sigmas", "num_langevin_steps", "guidance_scale", "seed", "batch_size")
        found = {name: getattr(self, name) for name in ("num_inference_steps", "class_labels", "dtype")}
        return describe_scheduler(self.pipe.scheduler) | {name: getattr(self.config, name) for name in names} | found


def make_generators(seed: int, indices: range) -> list[torch.Generator]:
    """One generator per image. Image i uses the seed `seed` + i, whatever its batch."""
    return [torch.Generator().manual_seed(seed + i) for i in indices]


def make_batches(num: int, batch_size: int) -> list[range]:
    """The indices below `num` in batches, the same for any number of processes, and so is a network's rounding."""
    return [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]


def describe_scheduler(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The scheduler's class and settings, to record what drew the samples."""
    return {"scheduler": type(scheduler).__name__, "scheduler_config": readable_config(scheduler.config)}
