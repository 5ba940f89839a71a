"""What a run reports: log.jsonl, the trackers of accelerate, sample grids and the loss curve."""

import io
import json
import math
import time
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
from tqdm.auto import tqdm

from ..atomic_files import CANNOT_WRITE, replacing, write_text
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .config import TrainingConfig, training_command

_LEVEL_BINS = 8
_LEVEL_LOSS = "loss at sigma "  # and the range, in log.jsonl
# Where the trackers show what log.jsonl has: they make a section of what comes before the slash.
_TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "skipped_steps": "optimizer/skipped_steps",
    "learning_rate": "optimizer/learning_rate",
    "ema_decay": "optimizer/ema_decay",
    "images_per_second": "speed/images_per_second",
    "epoch": "speed/epoch",
}
_MAX_SKIPPED_IN_A_ROW = 20  # fp16's loss scale is halved at each of them: after 20 any would fit


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
        write_text(self.output_dir / "training_config.json", json.dumps(saved, indent=2) + "\n")
        # a run that resumes takes the steps after its checkpoint a second time
        records = [record for record in self._read() if record["step"] <= step] if step else []
        if changes:
            records.append({"step": step, "changed_settings": changes})
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        if config.logger:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
            self.accelerator.init_trackers("ncsn", plain)

    def _read(self) -> list[dict]:
        """The records so far. A line that was cut short, by a kill or a full disk, is left out, with a message."""
        records, broken = [], []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                record["step"] + 0  # a number
            except (ValueError, TypeError, KeyError):
                broken.append(str(number))
            else:
                records.append(record)
        if broken:
            what = f"line {broken[0]} is" if len(broken) == 1 else f"lines {', '.join(broken)} are"
            tqdm.write(f"{self.path}: {what} damaged, as by a kill or a full disk, and left out.")
        return records

    def write(self, record: dict) -> None:
        """Append a record, of which `"step"` is one key."""
        with warn_unless_written("The trackers' record"):
            values = {_tag(key): value for key, value in record.items() if key != "step"}
            self.accelerator.log(values, step=record["step"])
        if self.accelerator.is_main_process:
            with warn_unless_written("log.jsonl"):
                _append(self.path, json.dumps(record) + "\n")

    def write_samples(self, grid: Image.Image, name: str, step: int) -> None:
        """Save a sheet of samples as an image file of this name, and send it to the trackers."""
        if not self.accelerator.is_main_process:
            return
        with warn_unless_written(name), replacing(self.output_dir / name) as aside:
            grid.save(aside)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with warn_unless_written("The trackers' record"):
                    tracker.log_images({"samples/drawn": np.asarray(grid.convert("RGB"))[None]}, step=step, **layout)


def _tag(key: str) -> str:
    """The trackers' name of a key of log.jsonl."""
    return key.replace(_LEVEL_LOSS, "loss by sigma/") if key.startswith(_LEVEL_LOSS) else _TAGS[key]


def _append(path: Path, line: str) -> None:
    """Add a line to a file, or nothing of it where the disk is full."""
    with open(path, "ab", buffering=0) as file:
        size, content = file.seek(0, io.SEEK_END), line.encode()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError as error:
            file.truncate(size)
            error.filename = str(path)
            raise


class LossPerLevel:
    """
    Mean loss in eight equal parts of log sigma. It is kept on the device, so that a step does not wait for it.

    Args:
        scheduler ([`AnnealedLangevinScheduler`]): whose noise levels are divided.
        device (`torch.device`): of the losses.
    """

    def __init__(self, scheduler: AnnealedLangevinScheduler, device: torch.device):
        low, high = (math.log(scheduler.config[name]) for name in ("sigma_min", "sigma_max"))
        edges = np.exp(np.linspace(low, high, _LEVEL_BINS + 1))
        self.names = [f"{low:.2g} to {high:.2g}" for low, high in pairwise(edges)]
        self.edges = torch.tensor(edges[1:-1], dtype=torch.float32, device=device)
        # Sum and number of the finite losses, and number of the others
        self.sums = torch.zeros(3, _LEVEL_BINS, device=device)

    def add(self, sigmas: torch.Tensor, losses: torch.Tensor) -> None:
        """Count losses of shape `(batch,)` at these noise levels, of the same shape."""
        bins = (sigmas[:, None] >= self.edges).sum(1)
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


class StepStatistics:
    """
    What a run reports of its steps. All of it stays on the device until it is logged, so that a step does not wait.

    Args:
        scheduler ([`AnnealedLangevinScheduler`]): whose noise levels are divided; see [`LossPerLevel`].
        num_steps (`int`): of the run.
        num_micro_steps (`int`): batches in each step.
        device (`torch.device`): of the losses.
    """

    def __init__(
        self, scheduler: AnnealedLangevinScheduler, num_steps: int, num_micro_steps: int, device: torch.device
    ):
        self.losses = torch.zeros(num_steps, device=device)
        self.level_losses = LossPerLevel(scheduler, device)
        self.grad_norm = torch.zeros((), device=device)
        # Number of steps whose gradient was not finite: in all, and since the last one that was
        self.skipped = torch.zeros(2, dtype=torch.long, device=device)
        self.num_micro_steps = num_micro_steps
        self.reported_skips = 0
        self.restart_clock(0)

    def restart_clock(self, step: int) -> None:
        """Measure the throughput from this step on."""
        self.clock = time.perf_counter(), step

    def add_losses(self, step: int, sigmas: torch.Tensor, losses: torch.Tensor) -> None:
        """Count losses of shape `(batch,)` of one batch of a step, at these noise levels, of the same shape."""
        self.level_losses.add(sigmas, losses)
        self.losses[step] += losses.mean() / self.num_micro_steps

    def add_gradient(self, norm: torch.Tensor) -> torch.Tensor:
        """Count the norm of a gradient, of shape `()`; whether the gradient is not finite, of the same shape."""
        broken = ~norm.isfinite()
        self.grad_norm = torch.where(broken, self.grad_norm, norm)
        self.skipped = torch.stack([self.skipped[0] + broken, (self.skipped[1] + 1) * broken])
        return broken

    def collect(self, accelerator: Accelerator, step: int, window: int, batch_size: int) -> dict:
        """
        The record of all processes at a step. The loss is the mean of the finite ones of the last `window` steps, and
        missing if none is; `batch_size` images make up a step of all processes.

        Raises:
            FloatingPointError: the gradients of many steps in a row were not finite.
        """
        part = slice(max(0, step - window), step)
        self.losses[part] = accelerator.reduce(self.losses[part], "mean")
        recent = self.losses[part].cpu()
        level_losses, broken_levels = self.level_losses.collect(accelerator)
        skipped, in_a_row = self.skipped.tolist()
        if skipped > self.reported_skips and accelerator.is_main_process:
            tqdm.write(f"Steps skipped, as their gradient was not finite: {skipped - self.reported_skips}.")
        self.reported_skips = skipped
        if in_a_row >= min(_MAX_SKIPPED_IN_A_ROW, len(self.losses)):
            levels = f", nor the loss at noise levels sigma {', '.join(broken_levels)}" if broken_levels else ""
            raise FloatingPointError(
                f"The gradient was not finite at {in_a_row} steps in a row, up to step {step}{levels}."
            )
        start, start_step = self.clock
        record = {"step": step, "loss": recent[recent.isfinite()].mean().item()}
        if not math.isfinite(record["loss"]):
            del record["loss"]
        record |= {
            "grad_norm": float(self.grad_norm),
            "skipped_steps": skipped,
            "images_per_second": (step - start_step) * batch_size / (time.perf_counter() - start),
        }
        self.restart_clock(step)
        return record | {_LEVEL_LOSS + name: value for name, value in level_losses.items()}

    def state_dict(self, step: int) -> dict:
        """What a checkpoint holds of the first `step` steps."""
        return {"losses": self.losses[:step].cpu(), "skipped": self.skipped.cpu()}

    def load_state_dict(self, state: dict, step: int) -> None:
        """Take up what [`state_dict`] has returned."""
        self.losses[:step] = state["losses"][: len(self.losses)].to(self.losses.device)
        self.skipped = state["skipped"].to(self.losses.device)
        self.reported_skips = int(self.skipped[0])


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
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120)
