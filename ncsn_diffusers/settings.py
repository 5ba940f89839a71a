"""Drawing from the command line: the settings, the pipeline that they name, and batches that processes share."""

import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

import diffusers
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from . import precision
from .hub.loading import NCSNPipeline
from .pipeline_ncsn import SCHEDULERS, check_scheduler
from .pretrained import pretrained
from .scheduling_annealed_langevin import are_exported

# Added to the seed of the noise of measurements: far from the seeds of the chains, whose numbers must be others. A
# generator on the CPU reads only the low 32 bits of a seed, so that 2**32 would be no distance.
NOISE_SEED = 2**31


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """
    `name=value` pairs, whose values are JSON or else strings, and JSON objects, as one dictionary.

    Raises:
        ValueError: an item is neither.
    """
    settings = {}
    for item in items:
        if item.lstrip().startswith("{"):
            try:
                settings |= json.loads(item)
            except json.JSONDecodeError as error:
                raise ValueError(f"`scheduler_config`: {item} is not a JSON object: {error}.") from error
            continue
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"`scheduler_config` must be name=value pairs or a JSON object, not {item!r}.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return settings


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
    try:
        pipe = NCSNPipeline.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"`pipeline`={name!r} cannot be loaded, as a folder or from the Hub: {error}") from error
    scheduler_class, settings = scheduler_class or type(pipe.scheduler), settings or {}
    check_settings(scheduler_class, settings)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    check_scheduler(pipe.scheduler)
    return pipe


DType = Literal["float32", "bfloat16", "float16"]


def cast(pipe: NCSNPipeline, dtype: DType) -> None:
    """Run the network in `dtype`, in the layout that is fast for it."""
    # these and not `to`, of which diffusers 0.42 warns whatever the model
    {"float32": pipe.unet.float, "bfloat16": pipe.unet.bfloat16, "float16": pipe.unet.half}[dtype]()
    pipe.unet.to(memory_format=precision.fast_memory_format(pipe.device, pipe.unet.dtype, len(pipe.image_shape) - 1))


def open_processes() -> Accelerator:
    """The processes that share the work. The timeout of a week lets a process that is done wait for the slowest."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])


@dataclass
class SamplerSettings:
    """Noise level and scheduler"""

    num_inference_steps: int | None = None
    """Number of noise levels; the pipeline's own by default, 50 unless it was saved with another."""

    sigmas: tuple[float, ...] | None = None
    """The noise levels themselves, from high to low, in units of the data; replaces num_inference_steps."""

    num_langevin_steps: int | None = None
    """Langevin steps per level, for AnnealedLangevinScheduler; the pipeline's own by default."""

    scheduler: str | None = None
    """Class of the scheduler, such as DDIMScheduler; the pipeline's own by default."""

    scheduler_config: tuple[str, ...] = ()
    """Settings of the scheduler: `name=value` pairs, or a JSON object."""


@dataclass
class ClassSettings:
    """Class"""

    class_labels: tuple[int, ...] | None = None
    """Classes for a class-conditional pipeline; the images take them in turn."""

    guidance_scale: float = 1.0
    """Classifier-free guidance towards the classes; 1 is none."""


@dataclass
class DrawSettings:
    """Image"""

    pipeline: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PIPELINE")] = None
    """Folder of the pipeline, or its id on the Hub; the digits that come with the package by default."""

    num_images: int | None = None
    """Number of images; 64 by default, or fewer that show each class equally often (60 of ten classes)."""

    batch_size: int = 16
    """Images drawn at a time on each device."""

    seed: int = 0
    """Image i uses the seed `seed` + i."""

    dtype: DType = "float32"
    """The network's type; the chain itself stays in float32."""


@dataclass
class SamplingConfig(ClassSettings, SamplerSettings, DrawSettings):
    """
    The settings of every command that draws images with a trained pipeline.

    Raises:
        ValueError: a setting is out of its range, or the scheduler or one of its settings is unknown.
    """

    def __post_init__(self):
        self.pipeline = self.pipeline or pretrained("mnist")
        self.check_least(num_images=1, batch_size=1)
        if self.class_labels == ():
            raise ValueError("`class_labels` needs at least one class.")
        self.settings = parse_settings(self.scheduler_config)
        self.scheduler_class = None if self.scheduler is None else find_scheduler(self.scheduler)
        if self.scheduler_class is not None:
            check_settings(self.scheduler_class, self.settings)

    def check_least(self, **least: int) -> None:
        """
        Raises:
            ValueError: a setting that is given is below its least value.
        """
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"`{name}` must be at least {number}, not {value}.")

    def open(self) -> tuple[Accelerator, NCSNPipeline]:
        """The processes that share the work, and the pipeline on this one's device."""
        accelerator = open_processes()
        pipe = load_pipeline(self.pipeline, self.scheduler_class, self.settings).to(accelerator.device)
        if self.num_inference_steps is None:
            self.num_inference_steps = pipe.config.num_inference_steps  # which a record of the run then states
        if self.dtype is None:  # as in the command that draws, not in the one that measures
            self.dtype = "float32"
            if accelerator.device.type == "cpu" and precision.cpu_has_bfloat16():
                self.dtype = "bfloat16"
                accelerator.print("The network computes in bfloat16: this CPU has instructions for it.")
        cast(pipe, self.dtype)
        pipe.set_progress_bar_config(leave=False, disable=not accelerator.is_main_process)
        return accelerator, pipe

    def draw(self, pipe: NCSNPipeline, indices: range, **arguments) -> Any:
        """The images with these indices, of the type that the pipeline's `arguments` ask for."""
        if self.num_langevin_steps is not None:
            arguments["num_langevin_steps"] = self.num_langevin_steps
        if self.class_labels is not None:
            arguments["class_labels"] = [self.class_labels[i % len(self.class_labels)] for i in indices]
        return pipe(
            batch_size=len(indices),
            num_inference_steps=self.num_inference_steps,
            sigmas=self.sigmas,
            guidance_scale=self.guidance_scale,
            generator=make_generators(self.seed, indices),
            **arguments,
        ).images


def make_generators(seed: int, indices: range) -> list[torch.Generator]:
    """One generator per image. Image i uses the seed `seed` + i, whatever its batch."""
    return [torch.Generator().manual_seed(seed + i) for i in indices]


def make_batches(num: int, batch_size: int) -> list[range]:
    """The indices below `num` in batches, the same for any number of processes, and so is a network's rounding."""
    return [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]


def describe_scheduler(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The scheduler's class and settings, to record what drew the samples."""
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    if settings.get("trained_betas") is not None and are_exported(settings["trained_betas"], settings):
        del settings["trained_betas"]  # a thousand numbers that follow from sigma_min and sigma_max
    return {"scheduler": type(scheduler).__name__, "scheduler_config": settings}
