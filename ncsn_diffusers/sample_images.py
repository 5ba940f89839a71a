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
from .kept_batches import GO_ON, KeptBatches, fingerprint
from .sampling import Sampler
from .settings import SampleConfig
from .sheets import SHEET, sample_sheet
from .units import Units

_KEPT = "unfinished"  # folder of the batches of a run that is not done


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
    if config.animation is not None and not pipe.draws_images:
        raise ValueError(f"`animation`={config.animation!r} is for images, and this pipeline draws other data.")
    num_columns, num_images = None, config.num_images
    if sampler.class_labels is None and pipe.num_classes is not None:
        sampler.class_labels, num_columns = tuple(range(pipe.num_classes)), class_columns(pipe.num_classes)
    if num_images is None:
        in_turn = len(sampler.class_labels or [None])
        num_images = 64 // in_turn * in_turn or 64
    folder.mkdir(parents=True, exist_ok=True)

    def sample_batch(indices: range) -> dict[str, torch.Tensor]:
        batch = sample_frames(sampler, config, indices)
        if config.save_images:
            for i, sample in zip(indices, batch["frames"][:, -1], strict=True):
                save_one(sample, folder / f"{i:05d}")
        return batch

    kept = KeptBatches(accelerator, folder)
    depends_on = {"pipeline": fingerprint(*pipe.unet.state_dict().values()), **sampler.describe()}
    if config.animation is not None:
        depends_on |= {name: getattr(config, name) for name in ("animation_shows", "num_frames")}
    depends_on |= {"animation": config.animation is not None, "save_images": config.save_images}
    batches = kept.compute(
        _KEPT,
        depends_on,
        num_images,
        config.batch_size,
        sample_batch,
        may_replace=config.overwrite_output_dir,
        title="samples",
    )
    if accelerator.is_main_process:
        save_together(config, batches, pipe.units, num_columns, folder)
        print(f"Saved {num_images} {'images' if pipe.draws_images else 'samples'} in {folder.resolve()}.")
    kept.remove(_KEPT)
    accelerator.end_training()


def sample_frames(sampler: Sampler, config: SampleConfig, indices: range) -> dict[str, torch.Tensor]:
    """
    "frames" `(n, num_frames, channels, ...)` of each sample, the last of which is the sample itself: uint8 for images,
    float32 in their units for other data; and "sigmas" `(n, num_frames - 1)`, the noise levels of the others.
    """
    steps, levels, arguments = [], [], {}
    if config.animation is not None:
        name = {"denoised": "denoised", "noisy": "latents"}[config.animation_shows]

        def keep_step(pipe, step, timestep, tensors):
            steps.append(tensors[name].cpu())
            levels.append(tensors["sigma"].item())

        arguments = {"callback_on_step_end": keep_step, "callback_on_step_end_tensor_inputs": [name, "sigma"]}
    samples = sampler.sample(indices, output_type="pt", **arguments).cpu()
    if not sampler.pipe.draws_images:
        return {"frames": samples[:, None], "sigmas": torch.zeros(len(indices), 0)}
    chosen = np.linspace(0, len(steps) - 1, config.num_frames)[:-1].round().astype(int) if steps else []
    frames = [to_uint8(frame) for frame in (*(sampler.pipe.units.to_data(steps[k]) for k in chosen), samples)]
    sigmas = torch.tensor([levels[k] for k in chosen], dtype=torch.float32)
    return {"frames": torch.stack(frames, 1), "sigmas": sigmas.expand(len(indices), -1).contiguous()}


def save(image: Image.Image, path: Path, **options) -> None:
    """
    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path, GO_ON) as aside:
        image.save(aside, **options)


def save_array(array: torch.Tensor, path: Path) -> None:
    """
    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path, GO_ON) as aside, open(aside, "wb") as file:
        np.save(file, array.numpy())


def save_one(sample: torch.Tensor, path: Path) -> None:
    """Save a sample in a file of its own, whose suffix is added to `path`."""
    if sample.dtype == torch.uint8:
        save(to_pil(sample[None])[0], path.with_suffix(".png"))
    else:
        save_array(sample, path.with_suffix(".npy"))


def save_together(
    config: SampleConfig, batches: dict[str, torch.Tensor], units: Units, num_columns: int | None, folder: Path
) -> None:
    """Save what shows all samples, of what [`sample_frames`] returns."""
    frames = batches["frames"]
    if frames.dtype != torch.uint8:
        save_array(frames[:, -1], folder / "samples.npy")
        if config.save_grid:
            save(sample_sheet(frames[:, -1], units), folder / "samples.png")
        return
    if config.save_grid:
        save(make_grid(to_pil(frames[:, -1]), num_columns, **SHEET), folder / "samples.png")
    if config.animation == "filmstrip":
        titles = [*(f"σ = {sigma:.3g}" for sigma in batches["sigmas"][0].tolist()), "image"]
        strip = make_grid(to_pil(frames.flatten(0, 1)), len(titles), **SHEET, titles=titles)
        save(strip, folder / "filmstrip.png")
    if config.animation == "gif":
        first, *others = [make_grid(to_pil(step), num_columns, **SHEET) for step in frames.unbind(1)]
        durations = [100] * len(others) + [2000]  # milliseconds
        options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
        save(first, folder / "samples.gif", **options)
