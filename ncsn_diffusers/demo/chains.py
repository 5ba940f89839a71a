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
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image, ImageOps

from ..foreign_configs import SCHEDULERS
from ..hub.loading import NCSNPipeline
from ..images import make_gaussian_blur, read_image
from ..pipeline_ncsn_inpaint import NCSNInpaintPipeline
from ..pipeline_ncsn_posterior import NCSNPosteriorPipeline
from ..sampling import make_generators
from ..sheets import Limits, cut_shown

ANY_CLASS = "any"
IN_TURN = "in turn"  # the image of seed s is of class s modulo their number
DAMAGES = ("pixelated", "blurred", "noisy")
NUM_SAMPLES = 3  # completions and restorations
NUM_EXAMPLES = 6  # images to be inpainted or restored
NUM_RESAMPLINGS = 3  # passes a level, the inpainting pipeline's default
MAX_FRAMES = 50
MAX_FRAMES_OF_FIELDS = 25  # which take 8 bytes where images take 2
MAX_COMPARED = 6
MAX_SEED = 2**32 - 1
MAX_PIXELS = 2**24  # of an upload
FORMATS = ("PNG", "JPEG", "WEBP")  # of an upload: readers of rarer ones are larger than they are needed
LARGEST_NOISE = 1.0  # of a measurement, where black is 0 and white 1

# What people call the schedulers, where that is not their class's name without "Scheduler".
NAMES = {
    "AnnealedLangevinScheduler": "Annealed Langevin",
    "DDIMParallelScheduler": "DDIM, parallel",
    "DDPMParallelScheduler": "DDPM, parallel",
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPM-Solver++",
    "DPMSolverSinglestepScheduler": "DPM-Solver++, single step",
    "EulerAncestralDiscreteScheduler": "Euler, ancestral",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2, ancestral",
    "KDPM2DiscreteScheduler": "DPM2",
    "SASolverScheduler": "SA-Solver",
    "UniPCMultistepScheduler": "UniPC",
}

Images = list[Image.Image]


class FieldError(ValueError):
    """
    A value that cannot be taken.

    Attributes:
        field (`str`): The argument's name.
    """

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


@dataclass
class Frame:
    """
    A moment of a chain.

    Args:
        step (`int`): The number of steps taken, from 1.
        num_steps (`int`): Those of the whole chain.
        sigma (`float`): The noise level of the step, in the network's units.
        denoised (`list[PIL.Image.Image]` or `np.ndarray`):
            The denoised estimates that the step was computed from; of fields, the part that plots show.
        noisy (as `denoised`): The samples after the step, clipped to the range of images.
    """

    step: int
    num_steps: int
    sigma: float
    denoised: Images | np.ndarray
    noisy: Images | np.ndarray


class Run:
    """
    Work in a thread of its own, whose steps can be watched, and which can be stopped. It begins with [`start`].

    Args:
        work (`Callable[[Run], Any]`):
            What the thread does, and with which result. It passes [`watch`] to the pipelines that it calls.
        result (`Any`, *optional*): What there is of the result before the work ends.

    Attributes:
        frames (`list[Frame]`): The chain so far.
        result: That of the work, or what there is of it.
        limits (`list`, *optional*): The values that the colors of fields stand for, as soon as they are known.
        stopped (`bool`): Whether somebody has asked the run to stop.
        done (`bool`): Whether the work has ended.
    """

    def __init__(self, work: Callable[["Run"], Any], result: Any = None):
        self.frames: list[Frame] = []
        self.result = result
        self.limits: Limits | None = None
        self.stopped = False
        self.done = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._work = work

    def start(self) -> "Run":
        """Begin, and return the run itself."""
        threading.Thread(target=self._do, daemon=True).start()
        return self

    def _do(self) -> None:
        result, error = self.result, None
        try:
            result = self._work(self)
        except Exception as raised:  # for the thread that watches
            error = raised
        with self._changed:
            self.result, self._error, self.done = result, error, True
            self._changed.notify_all()

    def watch(self) -> dict[str, Any]:
        """
        Arguments with which a pipeline reports its steps here, and ends when the run is stopped. Of a long chain, at
        most `MAX_FRAMES` steps are kept, of fields `MAX_FRAMES_OF_FIELDS`, evenly spaced, the last among them.
        """
        return {
            "callback_on_step_end": self._take,
            "callback_on_step_end_tensor_inputs": ["latents", "sigma", "denoised"],
        }

    def _take(self, pipe: NCSNPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pipe._interrupt = self.stopped
        most = MAX_FRAMES if pipe.draws_images else MAX_FRAMES_OF_FIELDS
        kept = np.linspace(0, pipe.num_timesteps - 1, min(pipe.num_timesteps, most)).round()
        if step not in kept and not self.stopped:
            return
        show = to_images if pipe.draws_images else to_fields
        denoised, noisy = (show(pipe, pipe.units.to_data(tensors[name])) for name in ("denoised", "latents"))
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
        """
        Wait until the work is done.

        Raises:
            Exception: what the work has raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.done)
        if self._error is not None:
            raise self._error


class Chains:
    """
    Runs of one pipeline, for any number of visitors. Each method checks what a visitor has entered, whatever its type,
    and returns a run that is yet to begin.

    Args:
        pipe ([`NCSNPipeline`]): The pipeline, which draws images; for others there is [`FieldChains`].
        max_evaluations (`int`): The most network evaluations of a chain; never less than the pipeline's own chain has.
        max_images (`int`): The most images of a run.

    Attributes:
        schedulers (`list[str]`): The names of the schedulers that fit the network, the pipeline's own first.
        classes (`list[str]`): The choices of the class, "any" first; empty for a network without classes.
        evaluations (`int`): The network evaluations of the pipeline's own chain.
        levels (`int`): The number of noise levels that inpainting and restoring begin with.
        num_images (`int`): The number of images that drawing begins with.

    Raises:
        ValueError: a limit is below 1, or the pipeline draws no images.
    """

    of_images = True
    thing, things = "image", "Images"  # what is drawn

    def __init__(self, pipe: NCSNPipeline, max_evaluations: int = 200, max_images: int = 16):
        check_limits(max_evaluations=max_evaluations, max_images=max_images)
        if pipe.draws_images != self.of_images:
            wanted, found = ("images", "fields") if self.of_images else ("fields", "images")
            raise ValueError(f"`{type(self).__name__}` is for {wanted}, and this pipeline draws {found}.")
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
        self.num_images = min(9 if math.prod(pipe.sample_shape[1:]) <= 64**2 else 4, max_images)

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
        Images from noise; the result is a list of those of `pipe(generator=...)` with the seeds from `seed` on. Their
        class may be `IN_TURN`, too.
        """
        seed, num_images, arguments = self._check_images(label, seed, num_images)
        evaluations = check_whole("evaluations", "Evaluations", evaluations, 1, self.max_evaluations)
        self._check_scheduler("scheduler", scheduler)
        pipe = self.fork(NCSNPipeline, scheduler)
        levels = find_levels(pipe.scheduler, evaluations)
        return Run(lambda run: self._draw(run, pipe, levels, seed, num_images, arguments))

    def compare(self, label: Any, evaluations: Any, schedulers: Any, seed: Any, num_images: Any) -> Run:
        """
        The same seeds under several schedulers with as many evaluations; the result is a list of pairs, the images and
        a caption, which grows. Their class may be `IN_TURN`, too.
        """
        seed, num_images, arguments = self._check_images(label, seed, num_images)
        evaluations = check_whole("evaluations", "Evaluations", evaluations, 1, self.max_evaluations)
        if not isinstance(schedulers, list) or not 1 <= len(schedulers) <= MAX_COMPARED:
            raise FieldError("schedulers", f"Schedulers: choose from 1 to {MAX_COMPARED} of them.")
        for name in schedulers:
            self._check_scheduler("schedulers", name)
        pipes = {name: self.fork(NCSNPipeline, name) for name in dict.fromkeys(schedulers)}
        levels = {name: find_levels(pipe.scheduler, evaluations) for name, pipe in pipes.items()}

        def work(run: Run) -> list[tuple[Images, str]]:
            for name, pipe in pipes.items():
                if run.stopped:
                    break
                images = self._draw(run, pipe, levels[name], seed, num_images, arguments)
                if not run.stopped:  # half a chain is not to be compared
                    caption = f"{name_scheduler(name)}, {pipe.num_timesteps} evaluations"
                    run.result = [*run.result, (self.to_pictures(images, run.limits), caption)]
            return run.result

        return Run(work, [])

    def inpaint(self, image: Any, mask: Any, label: Any, levels: Any, seed: Any) -> Run:
        """
        The painted pixels of an image drawn anew; the result is a list of `NUM_SAMPLES` images.

        Args:
            image (`PIL.Image.Image`, *optional*): As [`read_upload`] returns it.
            mask: What was painted, as [`read_mask`] takes it.
            label, levels, seed: What was entered.
        """
        self._check_image(image)
        mask = read_mask(mask, image.size)
        arguments = self._check_class(label)
        seed = check_whole("seed", "Seed", seed, 0, MAX_SEED)
        levels = check_whole("levels", "Noise levels", levels, 1, self.max_levels(1 + NUM_RESAMPLINGS))
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
        which the first is the image and the second the damaged one.

        Args:
            image (`PIL.Image.Image`, *optional*): As [`read_upload`] returns it.
            damage (`str`): One of `DAMAGES`.
            block, blur: As of [`make_operator`].
            noise_std: The standard deviation of the noise that is added, where black is 0 and white 1.
            label, levels, seed: What was entered.
        """
        self._check_image(image)
        operator = make_operator(damage, block, blur, self.pipe.sample_shape)
        noise_std = check_number("noise_std", "Noise", noise_std, 0, LARGEST_NOISE)
        if damage == "noisy" and noise_std == 0:
            raise FieldError("noise_std", "Noise must be above 0 for a noisy image.")
        arguments = self._check_class(label)
        seed = check_whole("seed", "Seed", seed, 0, MAX_SEED)
        levels = check_whole("levels", "Noise levels", levels, 1, self.max_levels(2))
        pipe = self.fork(NCSNPosteriorPipeline)

        pixels = np.array(image)
        pixels = torch.from_numpy(pixels).reshape(image.height, image.width, -1).permute(2, 0, 1)[None]
        measurement = operator(pixels / 255)
        # A seed that no sample has: one with the same would start from this very noise.
        generator = torch.Generator().manual_seed(seed + NUM_SAMPLES)
        noise = torch.randn(measurement.shape, generator=generator)
        measurement = measurement + noise_std * noise
        (damaged,) = to_images(pipe, measurement)
        given = [(image, "image"), (damaged.resize(image.size, Image.Resampling.NEAREST), damage)]

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
            return [*given, *((image, "restored") for image in images)]

        return Run(work, given)

    def _draw(
        self, run: Run, pipe: NCSNPipeline, levels: int, seed: int, num_images: int, arguments: dict[str, Any]
    ) -> Images | np.ndarray:
        samples = pipe(
            batch_size=num_images,
            num_inference_steps=levels,
            generator=make_generators(seed, range(num_images)),
            **arguments,
            **run.watch(),
        ).images
        if run.limits is None and not run.stopped:
            run.limits = self.find_limits(samples)
        return samples

    def find_limits(self, samples: Any) -> Limits | None:
        """The values that the colors of these samples are to stand for; `None` for images, whose colors are fixed."""
        return None

    def to_pictures(self, samples: Any, limits: Limits | None) -> Images:
        """What the page shows of samples."""
        return samples

    # Checks: a FieldError with a sentence for the page

    def max_levels(self, evaluations_each: int) -> int:
        """The most noise levels of a chain that takes so many evaluations at each step; never less than `levels`."""
        per_level = max(1, self.evaluations // self.pipe.config.num_inference_steps)
        return max(self.levels, self.max_evaluations // (evaluations_each * per_level))

    def _check_class(self, label: Any, words: tuple[str, ...] = (ANY_CLASS,)) -> dict[str, int]:
        if not self.classes:
            return {}
        if label not in self.classes:
            accepted = f"{', '.join(words)}, or from 0 to {self.classes[-1]}"
            raise FieldError("label", f"Class must be {accepted}, not {_show(label)}.")
        return {} if label == ANY_CLASS else {"class_labels": int(label)}

    def _check_images(self, label: Any, seed: Any, num_images: Any) -> tuple[int, int, dict[str, Any]]:
        seed = check_whole("seed", "Seed", seed, 0, MAX_SEED)
        num_images = check_whole("num_images", self.things, num_images, 1, self.max_images)
        if self.classes and label == IN_TURN:
            labels = [(seed + i) % self.pipe.num_classes for i in range(num_images)]
            return seed, num_images, {"class_labels": labels}
        return seed, num_images, self._check_class(label, (IN_TURN, ANY_CLASS))

    def _check_scheduler(self, field: str, name: Any) -> None:
        if name not in self.schedulers:
            raise FieldError(field, f"Scheduler must be one of {', '.join(self.schedulers)}, not {_show(name)}.")

    def _check_image(self, image: Any) -> None:
        if image is None:
            raise FieldError("image", "There is no image yet: choose an example, or upload one.")


def check_limits(**limits: int) -> None:
    """
    Raises:
        ValueError: a limit is below 1.
    """
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, not {value}.")


def check_number(field: str, name: str, value: Any, low: float, high: float) -> float:
    """
    Raises:
        FieldError: the value is not a number from `low` to `high`.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:
        raise FieldError(field, f"{name} must be a number from {low:g} to {high:g}, not {_show(value)}.")
    return float(value)


def check_whole(field: str, name: str, value: Any, low: int, high: int) -> int:
    """
    Raises:
        FieldError: the value is not a whole number from `low` to `high`. Browsers send 5.0 for 5.
    """
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not low <= value <= high:
        raise FieldError(field, f"{name} must be a whole number from {low} to {high}, not {_show(value)}.")
    return int(value)


def _show(value: Any) -> str:
    return "empty" if value is None else reprlib.repr(value)


def name_scheduler(scheduler: str) -> str:
    """What people call a scheduler, by its class's name."""
    return NAMES.get(scheduler, scheduler.removesuffix("Scheduler"))


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
        FieldError: the scheduler needs more than that.
    """

    def count(levels: int) -> int:
        return _count_evaluations(scheduler, levels)

    if count(evaluations) == evaluations:
        return evaluations
    levels = bisect.bisect_right(range(1, evaluations + 1), evaluations, key=count)
    if levels == 0 or count(levels) == 0:
        least = next(filter(None, map(count, range(1, 100))))
        name = name_scheduler(type(scheduler).__name__)
        raise FieldError("evaluations", f"Evaluations must be at least {least} for {name}, not {evaluations}.")
    return levels


def to_images(pipe: NCSNPipeline, samples: torch.Tensor) -> Images:
    """Samples in [0, 1], of any height and width, clipped."""
    return pipe.image_processor.postprocess(samples.clamp(0, 1).cpu(), do_denormalize=[False] * len(samples))


def to_fields(pipe: NCSNPipeline, samples: torch.Tensor) -> np.ndarray:
    """What plots show of samples, in the units of the data."""
    return cut_shown(samples.numpy(force=True)).astype(np.float32)


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
        with Image.open(path, formats=FORMATS) as image:  # which reads the header alone
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"The image has {image.width} × {image.height} pixels: upload one of {MAX_PIXELS:,} or less."
                )
            return fit_image(image, shape)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError("The file is not an image that can be read: upload a PNG, JPEG or WebP file.") from error
    finally:
        path.unlink(missing_ok=True)


def read_mask(mask: Any, size: tuple[int, int]) -> Image.Image:
    """
    The mask that was painted.

    Args:
        mask (`str`): A character for each pixel, row by row: 1 where the image is to be drawn anew, 0 elsewhere.
        size (`tuple[int, int]`): `(width, height)` of the image.

    Returns:
        `PIL.Image.Image` of mode L, 255 where the image is to be drawn anew and 0 elsewhere.

    Raises:
        FieldError: the text is not of that form, or nothing is painted.
    """
    width, height = size
    if not isinstance(mask, str) or len(mask) != width * height or not set(mask) <= {"0", "1"}:
        form = f"{width * height} characters, 1 where the image is to be drawn anew and 0 elsewhere, row by row"
        raise FieldError("mask", f"The mask must be a text of {form}, not {_show(mask)}.")
    if "1" not in mask:
        raise FieldError("mask", "Nothing is painted: paint over the part of the image that is to be drawn anew.")
    return Image.fromarray(np.array([255 * (pixel == "1") for pixel in mask], np.uint8).reshape(height, width))


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
        FieldError: a value is not among those that the image allows.
    """
    if damage not in DAMAGES:
        raise FieldError("damage", f"Damage must be one of {', '.join(DAMAGES)}, not {_show(damage)}.")
    if damage == "pixelated":
        if isinstance(block, bool) or block not in list_blocks(shape):
            accepted = ", ".join(map(str, list_blocks(shape)))
            raise FieldError("block", f"Block must be one of {accepted} pixels, not {_show(block)}.")
        return lambda x: F.avg_pool2d(x, int(block))
    if damage == "noisy":
        return lambda x: x
    blur = check_number("blur", "Blur", blur, 0.3, largest_blur(shape))
    return make_gaussian_blur(blur, math.ceil(3 * blur))


class Opening:
    """
    What the page shows before a visitor has chosen anything: a run for each tab, drawn one after another in a thread of
    its own, once for all visitors.

    Args:
        chains ([`Chains`]): What draws them.

    Attributes:
        mask (`str`): What is painted on the inpainted image, its lower half, as of [`read_mask`].
        damage, block, blur, noise_std: The damage of the restored image, as of [`Chains.restore`].
        compared (`list[str]`): The schedulers that are compared.
        num_compared (`int`): The number of images under each of them.
        evaluations (`int`): The network evaluations of each of them.
    """

    TABS = ("draw", "inpaint", "restore", "compare")

    def __init__(self, chains: Chains):
        self._prepare(chains.pipe.sample_shape)
        compared = (chains.schedulers[0], "DDIMScheduler", "DPMSolverMultistepScheduler")
        self.compared = list(dict.fromkeys(name for name in compared if name in chains.schedulers))
        self.num_compared = min(4, chains.max_images)
        self.evaluations = min(20, chains.max_evaluations)
        self._chains = chains
        self._runs: dict[str, Future[Run]] = {tab: Future() for tab in self.TABS}
        self._running: Run | None = None
        self._closed = False
        threading.Thread(target=self._work, daemon=True).start()

    def _prepare(self, shape: tuple[int, int, int]) -> None:
        _, height, width = shape
        self.mask = "0" * (height // 2 * width) + "1" * ((height - height // 2) * width)
        blocks = list_blocks(shape)
        self.damage, self.block = ("pixelated", blocks[-1]) if blocks else ("blurred", None)
        self.blur, self.noise_std = min(2.0, largest_blur(shape)), 0.05

    def _work(self) -> None:
        for tab, future in self._runs.items():
            try:
                self._running = run = self._make_run(tab)
                if self._closed:
                    run.stop()
                run.start().wait()
                future.set_result(run)
            except Exception as error:  # for who waits
                future.set_exception(error)

    def _make_run(self, tab: str) -> Run:
        chains = self._chains
        if tab == "draw":
            return chains.draw(IN_TURN, chains.evaluations, chains.schedulers[0], 0, chains.num_images)
        if tab == "compare":
            return chains.compare(IN_TURN, self.evaluations, self.compared, 0, self.num_compared)
        image = self.list_examples()[0]
        if tab == "inpaint":
            return chains.inpaint(image, self.mask, ANY_CLASS, chains.levels, 0)
        return chains.restore(image, self.damage, self.block, self.blur, self.noise_std, ANY_CLASS, chains.levels, 0)

    def wait(self, tab: str) -> Run:
        """
        The run of a tab, when it is done.

        Raises:
            Exception: what the run has raised.
        """
        return self._runs[tab].result()

    def list_examples(self) -> Images:
        """Images to be inpainted or restored, when they are drawn: the first ones of the tab Draw."""
        return self.wait("draw").result[:NUM_EXAMPLES]

    def close(self) -> None:
        """Stop what is running, and draw no more than a step of what would follow."""
        self._closed = True
        if self._running is not None:
            self._running.stop()
