"""
What a command that draws images can be told. Nothing here imports torch or diffusers, which takes seconds: `--help` and
a misspelt flag are answered at once. What the settings make is in `sampling.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

DType = Literal["float32", "bfloat16", "float16"]


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


@dataclass
class SamplerSettings:
    """Noise level and scheduler"""

    num_inference_steps: int | None = None
    """Number of noise levels; the pipeline's own by default, 50 unless it was saved with another."""

    sigmas: tuple[float, ...] | None = None
    """The noise levels themselves, from high to low, in the network's units; replaces num_inference_steps."""

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
class ImageSettings:
    """Image"""

    pipeline: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PIPELINE")] = None
    """Folder of the pipeline, its id on the Hub, or one that comes with the package: mnist, the default, fashion_mnist,
    avatars or temperature."""

    num_images: int | None = None
    """Number of images; 64 by default, or fewer that show each class equally often (60 of ten classes)."""

    batch_size: int = 16
    """Images drawn at a time on each device."""

    seed: int = 0
    """Image i uses the seed `seed` + i."""

    dtype: DType | None = None
    """The network's type; by default bfloat16 on a CPU with instructions for it, otherwise float32. The chain itself
    stays in float32."""

    compile: bool = False
    """Compile the network first, which takes a minute or more and pays off in runs of many minutes."""


@dataclass
class SamplingConfig(ClassSettings, SamplerSettings, ImageSettings):
    """
    The settings of every command that draws images with a trained pipeline.

    Raises:
        ValueError: a setting is out of its range, or `scheduler_config` cannot be read.
    """

    def __post_init__(self):
        self.check_least(num_images=1, batch_size=1)
        if self.class_labels == ():
            raise ValueError("`class_labels` needs at least one class.")
        parse_settings(self.scheduler_config)

    def check_least(self, **least: int) -> None:
        """
        Raises:
            ValueError: a setting that is given is below its least value.
        """
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ValueError(f"`{name}` must be at least {number}, not {value}.")


@dataclass
class SampleConfig(SamplingConfig):
    """
    Draw images with a trained pipeline.

    A class-conditional pipeline draws its classes in turn, a column for each, unless `class_labels` says otherwise. The
    images are the same for any number of processes. A run that was cut short goes on where it stopped.
    """

    output_dir: str = "samples"
    """Folder for the images; every process must see it."""

    overwrite_output_dir: bool = False
    """Discard the images of a run with other settings that was cut short."""

    save_grid: bool = True
    """Save a grid of all images, `samples.png`."""

    save_images: bool = False
    """Save each image as a file, `00000.png` and so on, as soon as it is drawn."""

    animation: Literal["gif", "filmstrip"] | None = None
    """Save the annealing as `samples.gif`, or as `filmstrip.png` with a row per image."""

    animation_shows: Literal["denoised", "noisy"] = "denoised"
    """What the animation shows: the denoised estimate at each step, or the noisy sample itself."""

    num_frames: int = 12
    """Frames of the animation, evenly spaced over the steps; the last is the image itself."""

    def __post_init__(self):
        self.check_least(num_frames=1)
        if not (self.save_grid or self.save_images or self.animation):
            raise ValueError("Nothing would be saved: `save_grid`, `save_images` or `animation` is needed.")
        super().__post_init__()
