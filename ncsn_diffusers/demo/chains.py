"""
What the demo page draws, apart from the page: checked inputs, and runs of a pipeline that can be watched and stopped.

Visitors share the network alone. A pipeline and its scheduler hold the state of their run (the step, whether it is to
stop, what a multistep scheduler remembers), so each run has both for itself.
"""

import bisect
import copy
import math
import reprlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image, ImageOps

from ..hub.loading import NCSNPipeline
from ..images import make_gaussian_blur, make_grid, read_image, to_model_range
from ..pipeline_ncsn import SCHEDULERS
from ..pipeline_ncsn_inpaint import NCSNInpaintPipeline
from ..pipeline_ncsn_posterior import NCSNPosteriorPipeline
from ..sampling import make_generators

ANY_CLASS = "any"
IN_TURN = "in turn"  # the image of seed s is of class s modulo their number
DAMAGES = ("pixelated", "blurred", "noisy")
NUM_SAMPLES = 3  # completions and restorations
NUM_RESAMPLINGS = 3  # passes a level, the inpainting pipeline's default
MAX_FRAMES = 50
MAX_COMPARED = 6
MAX_SEED = 2**32 - 1
MAX_PIXELS = 2**24  # of an upload
LARGEST_NOISE = 2.0  # in units of the data, of a measurement

Callback = Callable[[NCSNPipeline, int, torch.Tensor, dict], None]


@dataclass
class Frame:
    """
    A moment of a chain.

    Args:
        step (`int`): The number of steps taken, from 1.
        num_steps (`int`): Those of the whole chain.
        sigma (`float`): The noise level of the step, in units of the data.
        denoised (`PIL.Image.Image`): The denoised estimates that the step was computed from, in a grid.
        noisy (`PIL.Image.Image`): The samples after the step, in a grid, clipped to the range of images.
    """

    step: int
    num_steps: int
    sigma: float
    denoised: Image.Image
    noisy: Image.Image


class Run:
    """
    Work in a thread of its own, whose steps can be watched, and which can be stopped.

    Args:
        work (`Callable[[Run], Any]`):
            What the thread does, and with which result. It passes [`watch`] to the pipelines that it calls.
        result (*optional*): What there is of the result before the work ends.

    Attributes:
        frames (`list[Frame]`): The chain so far.
        result: That of the work, or what there is of it.
        stopped (`bool`): Whether somebody has asked the run to stop.
        done (`bool`): Whether the work has ended.
    """

    def __init__(self, work: Callable[["Run"], Any], result: Any = None):
        self.frames: list[Frame] = []
        self.result = result
        self.stopped = False
        self.done = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._work, args=(work,), daemon=True).start()

    def _work(self, work: Callable[["Run"], Any]) -> None:
        result, error = self.result, None
        try:
            result = work(self)
        except Exception as raised:  # for the thread that watches
            error = raised
        with self._changed:
            self.result, self._error, self.done = result, error, True
            self._changed.notify_all()

    def watch(self) -> dict[str, Any]:
        """
        Arguments with which a pipeline reports its steps here, and ends when the run is stopped. Of a long chain, at
        most `MAX_FRAMES` steps are kept, evenly spaced, the last among them.
        """
        return {
            "callback_on_step_end": self._take,
            "callback_on_step_end_tensor_inputs": ["latents", "sigma", "denoised"],
        }

    def _take(self, pipe: NCSNPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pipe._interrupt = self.stopped
        kept = np.linspace(0, pipe.num_timesteps - 1, min(pipe.num_timesteps, MAX_FRAMES)).round()
        if step not in kept and not self.stopped:
            return
        denoised, noisy = (to_grid(pipe, tensors[name]) for name in ("denoised", "latents"))
        frame = Frame(step + 1, pipe.num_timesteps, tensors["sigma"].item(), denoised, noisy)
        with self._changed:
            self.frames.append(frame)
            self._changed.notify_all()

    def steps(self) -> Iterator[Frame]:
        """
        The newest frame whenever there is one, until the work is done. Who leaves early stops the run.

        Raises:
            Exception: what the work has raised.
        """
        seen = 0
        try:
            while True:
                with self._changed:
                    while len(self.frames) == seen and not self.done:
                        self._changed.wait()
                    if len(self.frames) == seen:
                        break
                    seen = len(self.frames)
                    frame = self.frames[-1]
                yield frame
        except GeneratorExit:
            self.stop()
            raise
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Have the pipeline end after its present step, with the denoised estimate."""
        self.stopped = True

    def wait(self) -> None:
        """Wait until the work is done, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.done)


class Chains:
    """
    Runs of one pipeline, for any number of visitors. Each method checks what a visitor has entered, and then begins.

    Args:
        pipe ([`NCSNPipeline`]): The pipeline, of 1, 3 or 4 channels.
        max_evaluations (`int`): The most network evaluations of a chain; never less than the pipeline's own chain has.
        max_images (`int`): The most images of a run.

    Attributes:
        schedulers (`list[str]`): The names of the schedulers that fit the network, the pipeline's own first.
        classes (`list[str]`): The choices of the class, "any" first; empty for a network without classes.
        evaluations (`int`): The network evaluations of the pipeline's own chain.
        levels (`int`): The number of noise levels that inpainting and restoring begin with.

    Raises:
        ValueError: a limit is not a positive int, or images of the network's channels cannot be shown.
    """

    def __init__(self, pipe: NCSNPipeline, max_evaluations: int = 200, max_images: int = 16):
        check_limits(max_evaluations=max_evaluations, max_images=max_images)
        if pipe.image_shape[0] not in (1, 3, 4):
            raise ValueError(f"The page shows images of 1, 3 or 4 channels, and the network has {pipe.image_shape[0]}.")
        self.pipe = pipe
        self.max_images = max_images
        own = type(pipe.scheduler).__name__
        names = ["AnnealedLangevinScheduler"]
        if pipe.scheduler.config.get("conditioning") != "sigma":
            names += [name for name in SCHEDULERS if _is_there(name)]
        self.schedulers = [own, *(name for name in names if name != own)]
        self.classes = [] if pipe.num_classes is None else [ANY_CLASS, *map(str, range(pipe.num_classes))]
        own_levels = pipe.config.num_inference_steps
        self.evaluations = _count_evaluations(self.fork(NCSNPipeline).scheduler, own_levels)
        self.max_evaluations = max(max_evaluations, self.evaluations)
        # A long chain's step size is made for all of its levels.
        self.levels = own_levels if own_levels > 50 else min(own_levels, 25)

    def fork(self, pipeline_class: type[NCSNPipeline], scheduler: str | None = None) -> NCSNPipeline:
        """A pipeline for one run: the shared network, and a scheduler of its own, of the given class's name."""
        config = self.pipe.scheduler.config
        own = type(self.pipe.scheduler)
        scheduler_class = own if scheduler in (None, own.__name__) else getattr(diffusers, scheduler)
        pipe = pipeline_class(**{**self.pipe.components, "scheduler": scheduler_class.from_config(config)})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # The runs

    def draw(self, label: Any, evaluations: Any, scheduler: Any, seed: Any, num_images: Any) -> Run:
        """
        Images from noise; the result is a grid of those of `pipe(generator=...)` with the seeds from `seed` on. Their
        class may be `IN_TURN`, too.
        """
        evaluations = check_whole("Evaluations", evaluations, 1, self.max_evaluations)
        self._check_scheduler(scheduler)
        seed = check_whole("Seed", seed, 0, MAX_SEED)
        num_images = check_whole("Images", num_images, 1, self.max_images)
        arguments = self._check_classes(label, seed, num_images)
        pipe = self.fork(NCSNPipeline, scheduler)
        levels = find_levels(pipe.scheduler, evaluations)
        return Run(lambda run: make_grid(self._draw(run, pipe, levels, seed, num_images, arguments)))

    def compare(self, label: Any, evaluations: Any, schedulers: Any, seed: Any, num_images: Any) -> Run:
        """
        The same seeds under several schedulers with as many evaluations; the result is a list of grids of images, each
        with a caption, which grows. Their class may be `IN_TURN`, too.
        """
        evaluations = check_whole("Evaluations", evaluations, 1, self.max_evaluations)
        if not isinstance(schedulers, list) or not 1 <= len(set(map(str, schedulers))) <= MAX_COMPARED:
            raise ValueError(f"Schedulers: choose from 1 to {MAX_COMPARED} of them.")
        for name in schedulers:
            self._check_scheduler(name)
        seed = check_whole("Seed", seed, 0, MAX_SEED)
        num_images = check_whole("Images", num_images, 1, self.max_images)
        arguments = self._check_classes(label, seed, num_images)
        pipes = {name: self.fork(NCSNPipeline, name) for name in dict.fromkeys(schedulers)}
        levels = {name: find_levels(pipe.scheduler, evaluations) for name, pipe in pipes.items()}

        def work(run: Run) -> list[tuple[Image.Image, str]]:
            for name, pipe in pipes.items():
                if run.stopped:
                    break
                images = self._draw(run, pipe, levels[name], seed, num_images, arguments)
                if not run.stopped:  # half a chain is not to be compared
                    run.result = [*run.result, (make_grid(images), f"{name}: {pipe.num_timesteps} evaluations")]
            return run.result

        return Run(work, [])

    def inpaint(self, image: Any, layers: Any, label: Any, levels: Any, seed: Any) -> Run:
        """
        The painted pixels of an image drawn anew; the result is a list of `NUM_SAMPLES` images.

        Args:
            image (`PIL.Image.Image`, *optional*): As [`read_upload`] returns it.
            layers (`list[PIL.Image.Image]`, *optional*): What was painted, in RGBA, as [`read_mask`] takes it.
            label, levels, seed: What was entered.
        """
        self._check_image(image)
        mask = read_mask(layers, image.size)
        arguments = self._check_class(label)
        levels = check_whole("Noise levels", levels, 1, self.max_levels(1 + NUM_RESAMPLINGS))
        seed = check_whole("Seed", seed, 0, MAX_SEED)
        pipe = self.fork(NCSNInpaintPipeline)

        def work(run: Run) -> list[Image.Image]:
            return pipe(
                image,
                mask,
                batch_size=NUM_SAMPLES,
                num_inference_steps=levels,
                num_resamplings=NUM_RESAMPLINGS,
                generator=make_generators(seed, range(NUM_SAMPLES)),
                **arguments,
                **run.watch(),
            ).images

        return Run(work)

    def restore(
        self, image: Any, damage: Any, block: Any, blur: Any, noise_std: Any, label: Any, levels: Any, seed: Any
    ) -> Run:
        """
        An image damaged, and images drawn that fit what is left of it; the result is a list of images with captions, of
        which the first is the damaged one.

        Args:
            image (`PIL.Image.Image`, *optional*): As [`read_upload`] returns it.
            damage (`str`): One of `DAMAGES`.
            block, blur: As of [`make_operator`].
            noise_std: The standard deviation of the noise that is added, in units of the data.
            label, levels, seed: What was entered.
        """
        self._check_image(image)
        operator = make_operator(damage, block, blur, self.pipe.image_shape)
        noise_std = check_number("Noise", noise_std, 0, LARGEST_NOISE)
        if damage == "noisy" and noise_std == 0:
            raise ValueError("Noise must be above 0 for a noisy image.")
        arguments = self._check_class(label)
        levels = check_whole("Noise levels", levels, 1, self.max_levels(2))
        seed = check_whole("Seed", seed, 0, MAX_SEED)
        pipe = self.fork(NCSNPosteriorPipeline)

        pixels = np.array(image)
        pixels = torch.from_numpy(pixels).reshape(image.height, image.width, -1).permute(2, 0, 1)[None]
        measurement = operator(to_model_range(pixels, pipe.config.data_min))
        # A seed that no sample has: one with the same would start from this very noise.
        generator = torch.Generator().manual_seed(seed + NUM_SAMPLES)
        noise = torch.randn(measurement.shape, generator=generator)
        measurement = measurement + noise_std * noise
        damaged = to_grid(pipe, measurement).resize(image.size, Image.Resampling.NEAREST), damage

        def work(run: Run) -> list[tuple[Image.Image, str]]:
            images = pipe(
                measurement,
                operator,
                noise_std,
                batch_size=NUM_SAMPLES,
                num_inference_steps=levels,
                generator=make_generators(seed, range(NUM_SAMPLES)),
                **arguments,
                **run.watch(),
            ).images
            return [damaged, *((image, "restored") for image in images)]

        return Run(work, [damaged])

    def _draw(
        self, run: Run, pipe: NCSNPipeline, levels: int, seed: int, num_images: int, arguments: dict[str, Any]
    ) -> list[Image.Image]:
        return pipe(
            batch_size=num_images,
            num_inference_steps=levels,
            generator=make_generators(seed, range(num_images)),
            **arguments,
            **run.watch(),
        ).images

    # Checks: a ValueError with a sentence for the page

    def max_levels(self, evaluations_each: int) -> int:
        """The most noise levels of a chain that takes so many evaluations at each step; never less than `levels`."""
        per_level = max(1, self.evaluations // self.pipe.config.num_inference_steps)
        return max(self.levels, self.max_evaluations // (evaluations_each * per_level))

    def _check_class(self, label: Any, words: tuple[str, ...] = (ANY_CLASS,)) -> dict[str, int]:
        if not self.classes:
            return {}
        if label not in self.classes:
            accepted = f"{', '.join(words)}, or from 0 to {self.classes[-1]}"
            raise ValueError(f"Class must be {accepted}, not {reprlib.repr(label)}.")
        return {} if label == ANY_CLASS else {"class_labels": int(label)}

    def _check_classes(self, label: Any, seed: int, num_images: int) -> dict[str, Any]:
        if self.classes and label == IN_TURN:
            return {"class_labels": [(seed + i) % self.pipe.num_classes for i in range(num_images)]}
        return self._check_class(label, (IN_TURN, ANY_CLASS))

    def _check_scheduler(self, name: Any) -> None:
        if name not in self.schedulers:
            raise ValueError(f"Scheduler must be one of {', '.join(self.schedulers)}, not {reprlib.repr(name)}.")

    def _check_image(self, image: Any) -> None:
        if image is None:
            raise ValueError("There is no image yet: draw an example, or upload one.")


def check_limits(**limits: int) -> None:
    """
    Raises:
        ValueError: a limit is below 1.
    """
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, not {value}.")


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """
    Raises:
        ValueError: the value is not a number from `low` to `high`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {_show(value)}.")
    return float(value)


def check_whole(name: str, value: Any, low: int, high: int) -> int:
    """
    Raises:
        ValueError: the value is not a whole number from `low` to `high`. Browsers send 5.0 for 5.
    """
    whole = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value == int(value)
    if not whole or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {_show(value)}.")
    return int(value)


def _show(value: Any) -> str:
    return "empty" if value is None else reprlib.repr(value)


def _is_there(scheduler: str) -> bool:
    """Whether diffusers has this scheduler: some need other packages."""
    scheduler_class = getattr(diffusers, scheduler, None)
    return isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)


def _count_evaluations(scheduler: SchedulerMixin, levels: int) -> int:
    """The network evaluations of a chain, one at each timestep; 0 where the scheduler needs more levels."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(levels)
    except ValueError:  # PNDMScheduler's, below 4
        return 0
    return len(scheduler.timesteps)


def find_levels(scheduler: SchedulerMixin, evaluations: int) -> int:
    """
    The largest number of noise levels whose chain takes at most so many network evaluations.

    Raises:
        ValueError: the scheduler needs more than that.
    """

    def count(levels: int) -> int:
        return _count_evaluations(scheduler, levels)

    if count(evaluations) == evaluations:
        return evaluations
    levels = bisect.bisect_right(range(1, evaluations + 1), evaluations, key=count)
    if levels == 0 or count(levels) == 0:
        least = next(filter(None, map(count, range(1, 100))))
        raise ValueError(f"Evaluations must be at least {least} for {type(scheduler).__name__}, not {evaluations}.")
    return levels


def to_grid(pipe: NCSNPipeline, samples: torch.Tensor) -> Image.Image:
    """Samples in units of the data, of any height and width, clipped and as one image."""
    images = samples.clamp(pipe.config.data_min, 1).cpu()
    return make_grid(pipe.image_processor.postprocess(images))


def fit_image(image: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    """An image of any size and mode, its middle cropped and averaged to the network's `(channels, height, width)`."""
    channels, height, width = shape
    return ImageOps.fit(read_image(image, channels), (width, height), Image.Resampling.BOX)


def read_upload(path: str | Path, shape: tuple[int, int, int]) -> Image.Image:
    """
    An uploaded image, as [`fit_image`] makes it. The file is deleted.

    Raises:
        ValueError: the file is no image that can be read, or has too many pixels.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"The image has {image.width} × {image.height} pixels: upload one of {MAX_PIXELS:,} or less."
                )
            return fit_image(image, shape)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError("The file is not an image that can be read: upload a PNG, JPEG or WebP file.") from error
    finally:
        path.unlink(missing_ok=True)


def read_mask(layers: Sequence[Image.Image] | None, size: tuple[int, int]) -> Image.Image:
    """
    The mask that was painted: white where half of a pixel or more is covered in any layer, whatever the colour.

    Args:
        layers (`list[PIL.Image.Image]`, *optional*): Of one size, which need not be that of the image; RGBA.
        size (`tuple[int, int]`): `(width, height)` of the mask.

    Raises:
        ValueError: nothing is painted.
    """
    mask = np.zeros(size[::-1], bool)
    for layer in layers or []:
        mask |= np.asarray(layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BOX)) >= 128
    if not mask.any():
        raise ValueError("Nothing is painted: paint over the part of the image that is to be drawn anew.")
    return Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))


def list_blocks(shape: tuple[int, int, int]) -> list[int]:
    """The sides of the blocks, in pixels, that an image can be cut into, up to a quarter of it."""
    _, height, width = shape
    side = math.gcd(height, width)
    return [block for block in range(2, min(height, width) // 4 + 1) if side % block == 0]


def largest_blur(shape: tuple[int, int, int]) -> float:
    """In pixels: what lies within three standard deviations has to fit into the image."""
    return min(shape[1:]) / 8


def make_operator(
    damage: Any, block: Any, blur: Any, shape: tuple[int, int, int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The linear operator of a kind of damage, on images `(batch_size, channels, height, width)`.

    Args:
        damage (`str`): One of `DAMAGES`; "noisy" leaves the image as it is.
        block (`int`): For "pixelated", the side of the blocks whose average is kept, in pixels.
        blur (`float`): For "blurred", the standard deviation of a Gaussian, in pixels. The image goes on mirrored.
        shape (`tuple[int, int, int]`): `(channels, height, width)`.

    Raises:
        ValueError: a value is not among those that the image allows.
    """
    if damage not in DAMAGES:
        raise ValueError(f"Damage must be one of {', '.join(DAMAGES)}, not {_show(damage)}.")
    if damage == "pixelated":
        if block not in list_blocks(shape):
            raise ValueError(
                f"Block must be one of {', '.join(map(str, list_blocks(shape)))} pixels, not {_show(block)}."
            )
        return lambda x: F.avg_pool2d(x, int(block))
    if damage == "noisy":
        return lambda x: x
    blur = check_number("Blur", blur, 0.3, largest_blur(shape))
    return make_gaussian_blur(blur, math.ceil(3 * blur))
