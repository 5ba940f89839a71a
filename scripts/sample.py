"""Draw pictures: `python scripts/sample.py PIPELINE`, or with `accelerate launch` on several devices."""

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from ncsn_diffusers import NCSNPipeline
from ncsn_diffusers.loading import check_settings, find_scheduler, load_pipeline, parse_settings


@dataclass
class SampleConfig:
    """
    Draw pictures with a trained pipeline.

    Picture i takes its randomness from the seed `seed` + i, and shares a batch with the same others however many
    processes there are: their number does not change it.
    """

    pipeline: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PIPELINE")]
    """Folder of the pipeline, or its id on the Hub."""

    output_dir: str = "samples"
    """Folder for the pictures."""

    num_images: int = 64
    """Number of pictures."""

    batch_size: int = 16
    """Pictures that are drawn at a time on each device."""

    save_grid: bool = True
    """Save all pictures as one, `samples.png`."""

    save_images: bool = False
    """Save each picture as a file of its own, `00000.png` and so on."""

    animation: Literal["gif", "filmstrip"] | None = None
    """Save the annealing as `samples.gif`, or as `filmstrip.png`, a row for each picture."""

    animation_shows: Literal["denoised", "noisy"] = "denoised"
    """What the animation shows: the estimate of the picture at each step, or the noisy sample itself."""

    num_frames: int = 12
    """Frames of the animation, evenly spaced over the steps; the picture itself is the last."""

    num_inference_steps: int = 50
    """Number of noise levels."""

    num_langevin_steps: int | None = None
    """Langevin steps a level, for AnnealedLangevinScheduler; the pipeline's own by default."""

    scheduler: str | None = None
    """Class of the scheduler, such as DDIMScheduler; the pipeline's own by default."""

    scheduler_config: tuple[str, ...] = ()
    """Settings of the scheduler: `name=value` pairs, or a JSON object."""

    class_labels: tuple[int, ...] | None = None
    """Classes of a class-conditional pipeline, which the pictures take in turn."""

    guidance_scale: float = 1.0
    """Classifier-free guidance towards the classes; 1 is none."""

    seed: int = 0
    """Seed of the first picture; the others' follow."""

    def __post_init__(self):
        for name in ("num_images", "batch_size", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, not {getattr(self, name)}.")
        if not (self.save_grid or self.save_images or self.animation):
            raise ValueError("Nothing would be saved: `save_grid`, `save_images` or `animation` is needed.")
        if self.class_labels == ():
            raise ValueError("`class_labels` needs at least one class.")
        self.settings = parse_settings(self.scheduler_config)
        self.scheduler_class = None if self.scheduler is None else find_scheduler(self.scheduler)
        if self.scheduler_class is not None:
            check_settings(self.scheduler_class, self.settings)


def record_frames(config: SampleConfig, frames: list[torch.Tensor]) -> dict[str, Any]:
    """The arguments that make the pipeline put what the animation shows into `frames`, a batch for each step."""
    if config.animation is None:
        return {}
    name = {"denoised": "denoised", "noisy": "latents"}[config.animation_shows]

    def callback(pipe, step, timestep, tensors):
        frames.append(tensors[name].cpu())

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [name]}


def draw(pipe: NCSNPipeline, config: SampleConfig, indices: range) -> list[tuple[int, list[Image.Image]]]:
    """For each picture its index and its frames, the last of which is the picture."""
    arguments, steps = {}, []
    if config.num_langevin_steps is not None:
        arguments["num_langevin_steps"] = config.num_langevin_steps
    if config.class_labels is not None:
        arguments["class_labels"] = [config.class_labels[i % len(config.class_labels)] for i in indices]
    images = pipe(
        batch_size=len(indices),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=[torch.Generator().manual_seed(config.seed + i) for i in indices],
        **record_frames(config, steps),
        **arguments,
    ).images
    chosen = np.linspace(0, len(steps) - 1, config.num_frames)[:-1].round().astype(int) if steps else []
    frames = [*(pipe.image_processor.postprocess(steps[k]) for k in chosen), images]
    return list(zip(indices, map(list, zip(*frames, strict=True)), strict=True))


def make_grid(images: list[Image.Image], num_columns: int | None = None) -> Image.Image:
    """Side by side, in the shape nearest to a square unless `num_columns` says otherwise."""
    num_columns = num_columns or math.ceil(math.sqrt(len(images)))
    num_rows = math.ceil(len(images) / num_columns)
    blank = Image.new(images[0].mode, images[0].size)
    images = images + [blank] * (num_rows * num_columns - len(images))
    grid = make_image_grid(images, num_rows, num_columns)
    return grid.convert(images[0].mode)


def save(config: SampleConfig, pictures: list[list[Image.Image]]) -> None:
    """Save what the config asks for; `pictures` holds the frames of each."""
    folder = Path(config.output_dir)
    if config.save_grid:
        make_grid([frames[-1] for frames in pictures]).save(folder / "samples.png")
    if config.save_images:
        for i, frames in enumerate(pictures):
            frames[-1].save(folder / f"{i:05d}.png")
    if config.animation == "filmstrip":
        make_grid([frame for frames in pictures for frame in frames], config.num_frames).save(folder / "filmstrip.png")
    if config.animation == "gif":
        first, *others = [make_grid(list(step)) for step in zip(*pictures, strict=True)]
        durations = [100] * len(others) + [2000]  # milliseconds
        first.save(folder / "samples.gif", save_all=True, append_images=others, duration=durations, loop=0)


def main(config: SampleConfig) -> None:
    # A process that has drawn its share waits for the slowest, however long that takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(config.pipeline, config.scheduler_class, config.settings).to(accelerator.device)
    pipe.set_progress_bar_config(leave=False, disable=not accelerator.is_main_process)

    # The batches are the same whatever the number of processes, and so are the network's roundings.
    batches = [
        range(start, min(start + config.batch_size, config.num_images))
        for start in range(0, config.num_images, config.batch_size)
    ]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    pictures = []
    with tqdm(total=sum(map(len, mine)), unit="image", disable=not accelerator.is_main_process) as bar:
        for indices in mine:
            pictures += draw(pipe, config, indices)
            bar.update(len(indices))

    pictures = sorted(gather_object(pictures), key=lambda picture: picture[0])
    if accelerator.is_main_process:
        save(config, [frames for _, frames in pictures])
        print(f"Saved {len(pictures)} pictures in {Path(config.output_dir).resolve()}.")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(tyro.cli(SampleConfig, use_underscores=True))
    except ValueError as error:
        raise SystemExit(f"sample.py: {error}") from error
