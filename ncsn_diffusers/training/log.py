"""What a run reports: log.jsonl, the trackers of accelerate, sample grids and the loss curve."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..images import make_grid
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .config import TrainingConfig, training_command

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch and safetensors report it
_LEVEL_BINS = 8


@contextmanager
def warn_unless_written(name: str) -> Iterator[None]:
    """Turn the failure to write a file that the run can do without into a warning."""
    try:
        yield
    except CANNOT_WRITE as failure:
        tqdm.write(f"{name} could not be written: {failure}.")


class RunLog:
    """
    log.jsonl and the trackers; every process calls these methods, and the main one writes.

    Args:
        accelerator (`Accelerator`): the run's processes and trackers.
        output_dir (`Path`): where log.jsonl and training_config.json are written.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        self.accelerator, self.output_dir = accelerator, output_dir
        self.path = output_dir / "log.jsonl"

    def start(self, config: TrainingConfig, step: int, changes: dict) -> None:
        """
        Write training_config.json, begin log.jsonl or cut it off after `step`, and start the trackers.

        Args:
            config ([`TrainingConfig`]): the run's settings.
            step (`int`): number of the last step before this run, 0 unless it resumes.
            changes (`dict`): what [`changed_settings`] found on resuming.
        """
        if not self.accelerator.is_main_process:
            return
        settings = asdict(config)
        saved = settings | {"command": training_command(config)}
        (self.output_dir / "training_config.json").write_text(json.dumps(saved, indent=2) + "\n")
        # a run that resumes takes the steps after its checkpoint a second time
        lines = self.path.read_text().splitlines() if self.path.exists() and step else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if changes:
            kept.append(json.dumps({"step": step, "changed_settings": changes}))
        self.path.write_text("".join(line + "\n" for line in kept))
        if config.logger:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
            self.accelerator.init_trackers("ncsn", plain)

    def write(self, record: dict) -> None:
        """Append a record, of which `"step"` is one key."""
        with warn_unless_written("The trackers' record"):
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        if self.accelerator.is_main_process:
            with warn_unless_written("log.jsonl"), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def write_samples(self, images: list[Image.Image], num_columns: int | None, name: str, step: int) -> None:
        """Save a grid of the samples as an image file of this name, and send it to the trackers."""
        if not self.accelerator.is_main_process:
            return
        grid = make_grid(images, num_columns)
        scale = max(1, 512 // grid.width)  # small images are hard to judge by eye
        grid = grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)
        with warn_unless_written(name):
            grid.save(self.output_dir / name)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with warn_unless_written("The trackers' record"):
                    tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, **layout)


class LossPerLevel:
    """
    Mean loss in eight equal parts of log sigma. It is kept on the device, so that a step does not wait for it.

    Args:
        scheduler ([`AnnealedLangevinScheduler`]): whose noise levels are divided.
        device (`torch.device`): of the losses.
    """

    def __init__(self, scheduler: AnnealedLangevinScheduler, device: torch.device):
        self.scheduler = scheduler
        self.low, self.high = (math.log(scheduler.config[name]) for name in ("sigma_min", "sigma_max"))
        edges = np.exp(np.linspace(self.low, self.high, _LEVEL_BINS + 1))
        self.names = [f"{low:.2g} to {high:.2g}" for low, high in pairwise(edges)]
        # Sum and number of the finite losses, and number of the others
        self.sums = torch.zeros(3, _LEVEL_BINS, device=device)

    def add(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Count losses of shape `(batch,)` at these timesteps, of the same shape."""
        log_sigma = self.scheduler.t_to_sigma(timesteps).log()
        bins = ((log_sigma - self.low) * (_LEVEL_BINS / (self.high - self.low))).long().clamp(0, _LEVEL_BINS - 1)
        finite = losses.isfinite()
        self.sums.index_add_(1, bins, torch.stack([torch.where(finite, losses, 0.0), finite, ~finite]))

    def collect(self, accelerator: Accelerator) -> tuple[dict[str, float], list[str]]:
        """The mean of each part over all processes, the parts where a loss was not finite; counting starts again."""
        losses, counts, broken = accelerator.reduce(self.sums, "sum").cpu()
        self.sums = torch.zeros_like(self.sums)
        means = {
            name: (loss / count).item() for name, loss, count in zip(self.names, losses, counts, strict=True) if count
        }
        return means, [name for name, count in zip(self.names, broken, strict=True) if count]


def save_loss_curve(losses: torch.Tensor, weighting: str, path: Path) -> None:
    """
    Plot the loss of each step and its running mean.

    Args:
        losses (`torch.Tensor` of shape `(num_steps,)`): on the CPU; those that are not finite are left out.
        weighting (`str`): the `loss_weighting` they were computed with.
        path (`Path`): of the image file.
    """
    window, smooth = max(1, len(losses) // 50), losses
    if len(losses):
        finite = losses.isfinite()  # one loss that is not would remove its whole window
        sums = torch.stack([torch.where(finite, losses, 0.0), finite.float()])
        smooth, share = torch.nn.functional.avg_pool1d(sums[:, None], window, stride=1)[:, 0]
        smooth = smooth / share
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", alpha=0.25, label="each step")
    axes.plot(range(window // 2, window // 2 + len(smooth)), smooth, color="tab:blue", label=f"mean of {window} steps")
    weight = "½ (1 + sigma²)" if weighting == "edm" else "½"
    axes.set(xlabel="step", ylabel=f"{weight} ‖sigma score + z‖² per dimension", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
