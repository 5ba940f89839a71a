"""What evaluations of images and of other data share: where real data are, kept batches, the network's loss."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import precision
from ..atomic_files import replacing
from ..dataset_settings import DatasetSettings
from ..denoiser import Denoiser
from ..hub.loading import NCSNPipeline
from ..kept_batches import GO_ON, KeptBatches, fingerprint
from ..ladder import Ladder
from ..likelihood import loss_per_level
from ..pipeline_ncsn_posterior import NCSNPosteriorPipeline
from ..sampling import NOISE_SEED, Sampler, describe_scheduler, make_generators
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .config import EvaluateConfig, evaluation_command, without_parents
from .metrics import Metric, mean_and_error
from .record import EvaluationRecord, LevelLoss, LikelihoodRecord, LossRecord, PosteriorRecord, SamplingRecord
from .report import plot_losses, plot_reliability

SOURCES = ("train_arrays", "dataset_name", "train_data_dir")  # settings that name data
_NUM_LEVELS = 12  # of the loss
_LONG_RUN = 600  # seconds of network evaluations, from which on a way to save some is worth a line


@dataclass(frozen=True)
class RealSource:
    """Where the real images come from: the settings of the data set, its splits, and whose choice that is."""

    settings: DatasetSettings
    reference_split: str
    held_out_split: str | None
    is_recorded: bool = False

    @property
    def name(self) -> str | None:
        """The data's name or their place, without the folders around it; `None` for the embedded digits."""
        name = next((found for key in SOURCES if (found := getattr(self.settings, key, None))), None)
        return None if name is None else without_parents(name)


def find_source(config: EvaluateConfig, pipeline: str, kind: type[DatasetSettings] = DatasetSettings) -> RealSource:
    """
    The data that the config names; else those that the pipeline was trained on, as training_config.json in its folder
    records them, with the config's own settings before the recorded ones; else a source without a name. `kind` has the
    settings.

    Raises:
        ValueError: the recorded file or folder is not there.
    """
    names = [field.name for field in fields(kind)]
    settings = kind(**{name: getattr(config, name) for name in names})
    splits = {"reference_split": config.reference_split or "train", "held_out_split": config.held_out_split}
    if any(getattr(settings, name, None) for name in SOURCES):
        return RealSource(settings, **splits)
    path = Path(pipeline) / "training_config.json"
    if not path.is_file():
        return RealSource(settings, **splits)
    recorded = json.loads(path.read_text())
    defaults = kind()
    own = {name: value for name, value in vars(settings).items() if value != getattr(defaults, name)}
    settings = kind(**{name: recorded.get(name, getattr(defaults, name)) for name in names} | own)
    splits["reference_split"] = config.reference_split or recorded.get("train_split") or "train"
    if config.held_out_split is None and config.reference_split is None:
        splits["held_out_split"] = recorded.get("validation_split")
    for name in ("train_data_dir", "train_arrays", "validation_arrays"):
        place = getattr(settings, name, None)
        if place is not None and not Path(place).exists():
            what = "folder" if name == "train_data_dir" else "file or folder"
            raise ValueError(
                f"The pipeline was trained on {place!r}, which is not a {what} here: name it with `{name}`."
            )
    return RealSource(settings, **splits, is_recorded=True)


@contextmanager
def count_evaluations(pipe: NCSNPipeline, num: int) -> Iterator[Callable[[], torch.Tensor]]:
    """How often each of `num` images has gone through the network, for each of them."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield lambda: torch.full((num,), sum(rows) // num)
    finally:
        hook.remove()


def sample_posterior(
    pipe: NCSNPosteriorPipeline,
    config: EvaluateConfig,
    operator: Callable,
    measurements: torch.Tensor,
    noise_std: float | torch.Tensor,
    indices: range,
) -> dict[str, torch.Tensor]:
    """
    Samples in the units of the data, in float32, because a misfit of images sees the rounding to 8 bits, and how often
    each went through the network. Sample i is of measurement i // `posterior_samples`.
    """
    with count_evaluations(pipe, len(indices)) as evaluations:
        samples = pipe(
            measurements[[i // config.posterior_samples for i in indices]],
            operator,
            noise_std,
            num_inference_steps=config.posterior_steps,
            num_langevin_steps=config.num_langevin_steps,
            generator=make_generators(config.seed, indices),
            output_type="pt",
        ).images
    return {"samples": samples.float().cpu(), "evaluations": evaluations()}


def measure(
    config: EvaluateConfig, data: torch.Tensor, operator: Callable, noise_std: float | torch.Tensor
) -> torch.Tensor:
    """
    Measurements `(n, ...)` of data in their own units, with noise of one standard deviation or of one for each channel.
    The noise of sample i is the same whatever n, and not that of the chains.
    """
    measured = operator(data)
    shape, generators = measured.shape[1:], make_generators(config.seed + NOISE_SEED, range(len(data)))
    if isinstance(noise_std, torch.Tensor):
        noise_std = noise_std.reshape(-1, *[1] * (measured.ndim - 2))
    return measured + noise_std * torch.stack([torch.randn(shape, generator=g) for g in generators])


class Run:
    """
    A run of [`evaluate`].

    Args:
        config ([`EvaluateConfig`]): what to evaluate, and how.
        sampler ([`Sampler`]): with the pipeline.
    """

    held_out: torch.Tensor  # real data in the form in which they are kept

    def __init__(self, config: EvaluateConfig, sampler: Sampler):
        self.config, self.sampler, self.folder = config, sampler, Path(config.output_dir)
        self.accelerator, self.pipe = sampler.accelerator, sampler.pipe
        self.pipe.unet.requires_grad_(False)
        self.weights = fingerprint(*self.pipe.unet.state_dict().values())
        self.kept = KeptBatches(self.accelerator, self.folder)

    @cached_property
    def held_out_fingerprint(self) -> str:
        return fingerprint(self.held_out)

    def to_network(self, data: torch.Tensor) -> torch.Tensor:
        """Some of `held_out` in the network's units, float32."""
        raise NotImplementedError

    def say_source(self, source: RealSource, otherwise: str) -> None:
        if source.is_recorded:
            self.accelerator.print(
                f"Compared with what the pipeline was trained on: {source.reference_split!r} of "
                f"{source.name or otherwise}."
            )

    @torch.no_grad()
    def suggest_bfloat16(self) -> None:
        """Say what `--dtype bfloat16` would save in a long run, by the time of one evaluation in each."""
        config, pipe, device = self.config, self.pipe, self.accelerator.device
        is_fast = precision.cpu_has_bfloat16() if device.type == "cpu" else device.type == "cuda"
        if self.sampler.dtype != "float32" or not is_fast or not self.accelerator.is_main_process:
            return
        x = torch.zeros(min(config.batch_size, config.num_images), *pipe.sample_shape, device=device)

        def seconds(unet: torch.nn.Module) -> float:
            whole, times = pipe.unet, []
            pipe.unet = unet
            try:
                for _ in range(3):  # the first to warm up
                    start = time.perf_counter()
                    pipe.denoise(x, 1.0).cpu()
                    times.append(time.perf_counter() - start)
            finally:
                pipe.unet = whole
            return min(times[1:])

        half = copy.deepcopy(pipe.unet).bfloat16()
        half.to(memory_format=precision.fast_memory_format(device, torch.bfloat16, len(pipe.sample_shape) - 1))
        steps = self.sampler.num_inference_steps if config.sigmas is None else len(config.sigmas)
        calls = steps * config.num_images / len(x) / self.accelerator.num_processes
        whole, saving = calls * seconds(pipe.unet), 0.0
        if whole > _LONG_RUN:
            saving = whole - calls * seconds(half)
        if saving > 0.2 * whole:
            compiled = "" if config.compile else " `--compile` saves time in a run this long, too."
            print(
                f"The network's evaluations will take about {whole / 60:.0f} minutes; --dtype bfloat16 would save "
                f"about {saving / 60:.0f} of them.{compiled}"
            )

    def held_out_batch(self, rows: range) -> tuple[torch.Tensor, list[torch.Generator], Denoiser]:
        """Held-out data, their generators, and the denoiser of as many that are told no class."""
        data = self.held_out[rows.start : rows.stop].to(self.accelerator.device)
        generators = make_generators(self.config.seed, rows)
        return data, generators, self.pipe.make_denoiser(batch_size=len(data))

    def in_full_precision(self) -> tuple[Ladder, dict[str, Any]]:
        """The levels that the network, now in float32, was trained on; what results of held-out data depend on."""
        self.pipe.unet.float()  # a likelihood needs more digits than half precision has
        ladder = AnnealedLangevinScheduler.from_config(self.pipe.scheduler.config)
        depends_on = {
            "pipeline": self.weights,
            "ladder": dict(ladder.config),
            "images": self.held_out_fingerprint,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
        }
        return ladder.ladder, depends_on

    def prepare_posterior(self, record: PosteriorRecord) -> tuple[NCSNPosteriorPipeline, dict[str, Any]]:
        """The pipeline that draws samples given measurements, and what these depend on."""
        config, pipe = self.config, NCSNPosteriorPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(leave=False, disable=not self.accelerator.is_main_process)
        depends_on = {
            "pipeline": self.weights,
            "images": self.held_out_fingerprint,
            "samples": record.samples,
            "noise_std": record.noise_std,
            "steps": config.posterior_steps,
            "dtype": self.sampler.dtype,
            **describe_scheduler(pipe.scheduler),
            **{name: getattr(config, name) for name in ("num_langevin_steps", "seed", "batch_size")},
        }
        return pipe, depends_on

    def measure_likelihood(self, name: str, function: Callable, **metric: Any) -> LikelihoodRecord | None:
        """The mean of `function`, [`bits_per_dim`] or [`nats_per_number`], over held-out data."""
        config, number = self.config, min(self.config.bits_per_dim, len(self.held_out))
        if not number:
            return None
        _, depends_on = self.in_full_precision()

        def compute(rows: range) -> dict[str, torch.Tensor]:
            data, generators, denoiser = self.held_out_batch(rows)
            return {"values": function(denoiser, data, generators, self.pipe.units, config.likelihood_steps)}

        depends_on |= {"likelihood_steps": config.likelihood_steps}
        values = self.kept.compute(name, depends_on, number, config.batch_size, compute)["values"]
        mean, error = mean_and_error(values)
        return LikelihoodRecord(Metric(value=mean, standard_error=error, **metric), number, config.likelihood_steps)

    def evaluate_losses(self) -> LossRecord | None:
        """The network's loss at each noise level, of held-out data."""
        number = min(self.config.loss_images, len(self.held_out))
        if not number:
            return None
        ladder, depends_on = self.in_full_precision()
        sigmas = np.geomspace(ladder.largest, ladder.smallest, _NUM_LEVELS).tolist()

        def compute_losses(rows: range) -> dict[str, torch.Tensor]:
            data, generators, denoiser = self.held_out_batch(rows)
            x0 = self.to_network(data)
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0.device)
            return {"losses": loss_per_level(denoiser, x0, noise, sigmas).T.cpu()}

        depends_on |= {"sigmas": sigmas}
        table = self.kept.compute("losses", depends_on, number, self.config.batch_size, compute_losses)
        columns = zip(sigmas, table["losses"].T, strict=True)
        return LossRecord(number, [LevelLoss(sigma, *mean_and_error(column)) for sigma, column in columns])

    def describe(self, evaluations: int) -> dict[str, Any]:
        """What [`EvaluationRecord`] holds of every run."""
        return {
            "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            "command": evaluation_command(self.config),
            "versions": {name: version(name) for name in ("ncsn_diffusers", "diffusers", "torch", "torch-fidelity")},
            "sampling": SamplingRecord(
                **self.sampler.describe(), num_images=self.config.num_images, evaluations=evaluations
            ),
        }

    def write(self, name: str, function: Callable[[Path], Any]) -> None:
        """A file of the report, by a function that writes to the path that it is given."""
        with replacing(self.folder / name, GO_ON) as aside:
            function(aside)

    def save_record(self, record: EvaluationRecord, report: str) -> None:
        """metrics.json, report.md and the plots that every report has."""
        if record.losses is not None:
            self.write("losses.png", partial(plot_losses, record.losses.levels))
        if record.posterior is not None:
            self.write("reliability.png", partial(plot_reliability, record.posterior.operators))
        self.write("metrics.json", lambda path: path.write_text(json.dumps(record.to_dict(), indent=2) + "\n"))
        self.write("report.md", lambda path: path.write_text(report))
