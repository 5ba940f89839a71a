"""
What `ncsn-diffusers sample` does. Each batch is kept in the output folder as soon as it is drawn, and removed when all
that was asked for has been made of it: a run that was cut short goes on where it stopped.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .atomic_files import replacing
from .images import class_columns, make_grid, to_pil, to_uint8
from .kept_batches import KeptBatches, fingerprint
from .sampling import Sampler
from .settings import SampleConfig

_KEPT = "unfinished"  # folder of the batches of a run that is not done
_GO_ON = "Make room and start the same command again: it goes on where it stopped."


def sample_images(config: SampleConfig) -> None:
    """
    Draw images and save what the config asks for. Under `accelerate launch` the processes share the work, and each of
    them makes this call.

    Raises:
        ValueError: the pipeline cannot be loaded or given what the config asks for, or `output_dir` holds images of an
            unfinished run with other settings.
        OSError: a file cannot be written.
        FloatingPointError: an image is not finite.
    """
    sampler = Sampler(config)
    accelerator, pipe, folder = sampler.accelerator, sampler.pipe, Path(config.output_dir)
    num_columns, num_images = None, config.num_images
    if sampler.class_labels is None and pipe.num_classes is not None:
        sampler.class_labels, num_columns = tuple(range(pipe.num_classes)), class_columns(pipe.num_classes)
    if num_images is None:
        in_turn = len(sampler.class_labels or [None])
        num_images = 64 // in_turn * in_turn or 64
    folder.mkdir(parents=True, exist_ok=True)

    def sample_batch(indices: range) -> dict[str, torch.Tensor]:
        frames = sample_frames(sampler, config, indices)
        if config.save_images:
            for i, image in zip(indices, to_pil(frames[:, -1]), strict=True):
                save(image, folder / f"{i:05d}.png")
        return {"frames": frames}

    kept = KeptBatches(accelerator, folder)
    depends_on = {"pipeline": fingerprint(*pipe.unet.state_dict().values()), **sampler.describe()}
    if config.animation is not None:
        depends_on |= {name: getattr(config, name) for name in ("animation_shows", "num_frames")}
    depends_on |= {"animation": config.animation is not None, "save_images": config.save_images}
    frames = kept.compute(
        _KEPT,
        depends_on,
        num_images,
        config.batch_size,
        sample_batch,
        may_replace=config.overwrite_output_dir,
        title="samples",
    )["frames"]
    if accelerator.is_main_process:
        save_together(config, frames, num_columns, folder)
        print(f"Saved {num_images} images in {folder.resolve()}.")
    kept.remove(_KEPT)
    accelerator.end_training()


def sample_frames(sampler: Sampler, config: SampleConfig, indices: range) -> torch.Tensor:
    """uint8 frames `(n, num_frames, channels, height, width)` of each image, the last of which is the image itself."""
    steps, arguments = [], {}
    if config.animation is not None:
        name = {"denoised": "denoised", "noisy": "latents"}[config.animation_shows]

        def keep_step(pipe, step, timestep, tensors):
            steps.append(tensors[name].cpu())

        arguments = {"callback_on_step_end": keep_step, "callback_on_step_end_tensor_inputs": [name]}
    images = sampler.sample(indices, output_type="pt", **arguments)
    chosen = np.linspace(0, len(steps) - 1, config.num_frames)[:-1].round().astype(int) if steps else []
    shown = [sampler.pipe.image_processor.postprocess(steps[k], output_type="pt") for k in chosen]
    return torch.stack([to_uint8(frame).cpu() for frame in (*shown, images)], 1)


def save(image: Image.Image, path: Path, **options) -> None:
    """
    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path, _GO_ON) as aside:
        image.save(aside, **options)


def save_together(config: SampleConfig, frames: torch.Tensor, num_columns: int | None, folder: Path) -> None:
    """Save what shows all images, of frames `(n, num_frames, channels, height, width)`."""
    if config.save_grid:
        save(make_grid(to_pil(frames[:, -1]), num_columns), folder / "samples.png")
    if config.animation == "filmstrip":
        save(make_grid(to_pil(frames.flatten(0, 1)), frames.shape[1]), folder / "filmstrip.png")
    if config.animation == "gif":
        first, *others = [make_grid(to_pil(step), num_columns) for step in frames.unbind(1)]
        durations = [100] * len(others) + [2000]  # milliseconds
        options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
        save(first, folder / "samples.gif", **options)
