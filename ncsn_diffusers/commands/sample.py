"""Draw images: `ncsn-diffusers sample PIPELINE`, or with `accelerate launch -m` on several devices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image, ImageFont
from tqdm.auto import tqdm

from ..hub.loading import NCSNPipeline
from ..images import class_columns, make_grid
from ..settings import DType, SamplingConfig, make_batches
from .cli import run

EXAMPLE = "ncsn-diffusers sample my-ncsn --num_images 16 --num_inference_steps 20"
SHEET = {"margin": 2, "min_width": 600}  # pixels: small images are enlarged, and keep apart
COLUMN_WIDTH = 64  # pixels at least, of a filmstrip, for the noise level above it


@dataclass
class SampleConfig(SamplingConfig):
    """
    Draw images with a trained pipeline.

    A class-conditional pipeline draws its classes in turn, a column for each, unless `class_labels` says otherwise. The
    images are the same for any number of processes.
    """

    dtype: DType | None = None
    """The network's type; by default bfloat16 on a CPU with instructions for it, otherwise float32. The chain itself
    stays in float32."""

    output_dir: str = "samples"
    """Folder for the images."""

    save_grid: bool = True
    """Save a grid of all images, `samples.png`, with small images enlarged."""

    save_images: bool = False
    """Save each image as a file in its own size, `00000.png` and so on."""

    animation: Literal["gif", "filmstrip"] | None = None
    """Save the annealing as `samples.gif`, or as `filmstrip.png` with a row per image and the noise level (in units of
    the data, before the step) above each column."""

    animation_shows: Literal["denoised", "noisy"] = "denoised"
    """What the animation shows: the denoised estimate at each step, or the noisy sample itself."""

    num_frames: int = 12
    """Frames of the animation, evenly spaced over the steps; the last is the image itself."""

    def __post_init__(self):
        self.check_least(num_frames=1)
        if not (self.save_grid or self.save_images or self.animation):
            raise ValueError("Nothing would be saved: `save_grid`, `save_images` or `animation` is needed.")
        super().__post_init__()


def record_frames(config: SampleConfig, frames: list[tuple[torch.Tensor, float]]) -> dict[str, Any]:
    """Arguments that make the pipeline append to `frames` what the animation shows, a batch and sigma per step."""
    if config.animation is None:
        return {}
    name = {"denoised": "denoised", "noisy": "latents"}[config.animation_shows]

    def callback(pipe, step, timestep, tensors):
        frames.append((tensors[name].cpu(), tensors["sigma"].item()))

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [name, "sigma"]}


def draw(
    pipe: NCSNPipeline, config: SampleConfig, indices: range, titles: list[str]
) -> list[tuple[int, list[Image.Image]]]:
    """For each image its index and its frames, the last of which is the image. `titles` becomes those of the frames."""
    steps = []
    images = config.draw(pipe, indices, **record_frames(config, steps))
    chosen = np.linspace(0, len(steps) - 1, config.num_frames)[:-1].round().astype(int) if steps else []
    frames = [*(pipe.image_processor.postprocess(steps[k][0]) for k in chosen), images]
    titles[:] = [*(f"σ = {steps[k][1]:.3g}" for k in chosen), "image"]
    return list(zip(indices, map(list, zip(*frames, strict=True)), strict=True))


def save(config: SampleConfig, images: list[list[Image.Image]], num_columns: int | None, titles: Sequence[str]) -> None:
    """Save what the config asks for; `images` holds the frames of each image, and `titles` names them."""
    folder = Path(config.output_dir)
    if config.save_grid:
        make_grid([frames[-1] for frames in images], num_columns, **SHEET).save(folder / "samples.png")
    if config.save_images:
        for i, frames in enumerate(images):
            frames[-1].save(folder / f"{i:05d}.png")
    if config.animation == "filmstrip":
        import matplotlib

        frames = [frame for frames in images for frame in frames]
        sheet = SHEET | {"min_width": max(SHEET["min_width"], COLUMN_WIDTH * config.num_frames)}
        font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 12)  # Greek, too
        make_grid(frames, config.num_frames, **sheet, titles=titles, font=font).save(folder / "filmstrip.png")
    if config.animation == "gif":
        first, *others = [make_grid(list(step), num_columns, **SHEET) for step in zip(*images, strict=True)]
        durations = [100] * len(others) + [2000]  # milliseconds
        first.save(folder / "samples.gif", save_all=True, append_images=others, duration=durations, loop=0)


def sample(config: SampleConfig) -> None:
    accelerator, pipe = config.open()
    num_columns = None
    if config.class_labels is None and pipe.num_classes is not None:
        config.class_labels, num_columns = tuple(range(pipe.num_classes)), class_columns(pipe.num_classes)
    if config.num_images is None:
        in_turn = len(config.class_labels or [None])
        config.num_images = 64 // in_turn * in_turn or 64
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    batches = make_batches(config.num_images, config.batch_size)
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    images, titles = [], []
    with tqdm(total=sum(map(len, mine)), unit="image", disable=not accelerator.is_main_process) as bar:
        for indices in mine:
            images += draw(pipe, config, indices, titles)
            bar.update(len(indices))

    images = sorted(gather_object(images), key=lambda image: image[0])
    if accelerator.is_main_process:
        save(config, [frames for _, frames in images], num_columns, titles)
        print(f"Saved {len(images)} images in {Path(config.output_dir).resolve()}.")
    accelerator.end_training()


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(SampleConfig, sample, EXAMPLE, arguments, name)


if __name__ == "__main__":
    main()
