"""
How good a pipeline is whose data are no images: signals, maps and volumes, in their own units.

No feature network is needed: values, spectrum and standardized means of blocks are compared with real data
([fields.py](fields.py)), each beside its floor. With `--posterior`, samples given measurements of held-out data are
judged for each channel in its own unit.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..data import (
    ArrayRows,
    array_column_rows,
    find_array_column,
    find_channel_axis,
    load_training_data,
    open_array_files,
    select_arrays,
)
from ..dataset_settings import ArrayFiles, DatasetSettings
from ..likelihood import nats_per_number
from ..sampling import Sampler
from ..sheets import plot_fields
from .calibration import calibrate_exact_channels, calibrate_values, make_operator
from .config import EvaluateConfig, without_parents
from .field_report import make_field_report, make_field_verdict, plot_spectra
from .fields import compare_fields, nearest_fields
from .record import DataRecord, EvaluationRecord, LikelihoodRecord, PosteriorRecord, SpectrumRecord
from .run import RealSource, Run, count_evaluations, find_source, measure, sample_posterior

_LEAST = 20  # samples, and real ones
_MOST_REFERENCE = 10_000  # real samples that are compared with, unless it is said how many
_MOST_VALUES = 10**8  # of them
_MOST_GAUSSIAN = 500  # real samples that the floor's Gaussian has its mean and covariance from
_SHARE_OF_NOISE = 0.1  # of the measurements, in standard deviations of the data
_NUM_SHOWN = 24


@dataclass
class FieldSettings(ArrayFiles, DatasetSettings):
    """What says where arrays are."""


def find_field_source(config: EvaluateConfig, pipeline: str, shape: tuple[int, ...]) -> RealSource:
    """
    The arrays that the config names, or else those that the pipeline was trained on.

    Raises:
        ValueError: neither are known, or they are not there.
    """
    found = find_source(config, pipeline, FieldSettings)
    if found.name is None:
        raise ValueError(
            f"The pipeline draws arrays of shape {shape} (channels, sizes), and its folder does not record what it was "
            "trained on: name arrays like these with `train_arrays`."
        )
    return found


def open_rows(settings: FieldSettings, split: str) -> ArrayRows:
    """
    Raises:
        ValueError: there is no such split, or it holds no arrays.
    """
    if settings.train_arrays is not None:
        splits = open_array_files(settings.train_arrays, settings.array_key, settings.array_per_file)
        return select_arrays(f"`train_arrays`={settings.train_arrays!r}", splits, split)
    dataset = load_training_data(settings.dataset_name, settings.dataset_config_name, settings.train_data_dir, split)
    column = find_array_column(dataset, settings.array_column)
    if column is None:
        raise ValueError(
            f"{split!r} has no column of arrays, but {', '.join(dataset.features)}. Images of more than 8 bits are "
            "compared as arrays: save them as a .npy file, and name it with `train_arrays`."
        )
    return array_column_rows(dataset, column)


def read_rows(rows: ArrayRows, channel_axis, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """
    Arrays `(n, *shape)`, float64 in their own units.

    Raises:
        ValueError: they have another shape than the pipeline's, or values that are not finite.
    """
    axis = find_channel_axis((len(rows), *rows.shape), channel_axis, where)
    values, places = rows.read(np.arange(len(rows)))
    values = values[np.argsort(places)].astype(np.float64)
    values = values[:, None] if axis is None else np.moveaxis(values, axis, 1)
    if values.shape[1:] != shape:
        raise ValueError(
            f"{where} has arrays of shape {values.shape[1:]}, and the pipeline draws {shape} (channels, sizes): "
            "`channel_axis` says which axis counts channels."
        )
    broken = (~np.isfinite(values)).sum()
    if broken:
        raise ValueError(f"{where} has {broken:,} values that are not finite: fill them, or leave out their samples.")
    return torch.from_numpy(values)


class FieldEvaluation(Run):
    """One run of [`evaluate`] on data that are no images."""

    def __init__(self, config: EvaluateConfig, sampler: Sampler):
        super().__init__(config, sampler)
        shape = self.shape = self.pipe.sample_shape
        self.units = self.pipe.units
        self.refuse_image_settings()
        self.operators = {name: make_operator(name, shape) for name in config.posterior}
        self.source = find_field_source(config, sampler.name, shape)
        self.say_source(self.source, "")
        self.reference, self.held_out = self.load()
        numbers = {"`num_images`": config.num_images, "the reference": len(self.reference)}
        for name, number in (numbers | {"the held-out data": len(self.held_out)}).items():
            if number < _LEAST:
                raise ValueError(f"{name}: {number} samples are too few; at least {_LEAST} are needed of each.")
        self.folder.mkdir(parents=True, exist_ok=True)

    def refuse_image_settings(self) -> None:
        config = self.config
        for name in ("features", "resolution", "channels", "image_column"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}`={getattr(config, name)!r} is for images, and the pipeline draws others.")
        if config.update_model_card:
            raise ValueError("`update_model_card` is for images, and the pipeline draws other data.")
        if self.pipe.num_classes is not None and config.branch_images:
            self.accelerator.print("The outputs with and without a class are compared for images alone.")

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reference and held-out data in random order, float64."""
        config, source = self.config, self.source
        settings: Any = source.settings
        most = config.max_reference_images or min(_MOST_REFERENCE, max(_LEAST, _MOST_VALUES // math.prod(self.shape)))

        def read(rows: ArrayRows, num: int, seed: int, where: str) -> torch.Tensor:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num].numpy()
            return read_rows(rows.select(order), settings.channel_axis, self.shape, where)

        with self.accelerator.main_process_first():  # one prepares the data set's cache, the others read it
            rows = open_rows(settings, source.reference_split)
            held_out = None
            if settings.validation_arrays is not None:
                files = open_array_files(settings.validation_arrays, settings.array_key, settings.array_per_file)
                held_out = select_arrays(f"`validation_arrays`={settings.validation_arrays!r}", files, "all")
            elif source.held_out_split is not None:
                held_out = open_rows(settings, source.held_out_split)
        reference = read(rows, most, config.seed, repr(source.reference_split))
        if held_out is not None:
            # another order: two splits sorted alike would be paired in the same one
            return reference, read(held_out, config.num_images, config.seed + 1, "the held-out data")
        num = min(config.num_images, len(reference) // 2)
        return reference[num:], reference[:num]

    def to_network(self, data: torch.Tensor) -> torch.Tensor:
        return self.units.to_network(data).float()

    def run(self) -> dict[str, Any] | None:
        config = self.config
        if not (self.folder / "samples").exists():
            self.suggest_bfloat16()
        table = self.kept.compute(
            "samples",
            {"pipeline": self.weights, **self.sampler.describe()},
            config.num_images,
            config.batch_size,
            self.draw_samples,
            may_replace=config.overwrite_output_dir,
        )
        samples = table["samples"]
        parts = {
            "posterior": self.evaluate_posterior(),
            "losses": self.evaluate_losses(),
            "likelihood": self.evaluate_likelihood(),
        }
        found = None
        if self.accelerator.is_main_process:
            record = self.describe_run(samples, table["evaluations"].max().item(), parts)
            found = json.loads(json.dumps(record.to_dict()))  # so that what is returned is what the file holds
            self.save(record, samples)
            print(f"{make_field_verdict(record).strip('*')} See {self.folder.resolve() / 'report.md'}.")
        self.accelerator.end_training()
        return found

    def draw_samples(self, indices: range) -> dict[str, torch.Tensor]:
        with count_evaluations(self.pipe, len(indices)) as evaluations:
            samples = self.sampler.sample(indices, output_type="pt")
        return {"samples": samples.cpu(), "evaluations": evaluations()}

    def evaluate_likelihood(self) -> LikelihoodRecord | None:
        """Nats per number of held-out data."""
        return self.measure_likelihood(
            "nats-per-number", nats_per_number, key="nats_per_number", title="nats per number"
        )

    def evaluate_posterior(self) -> PosteriorRecord | None:
        """
        Whether samples given a measurement of held-out data are spread as they should be, for each channel. Other
        processes than the main one judge nothing.
        """
        if not self.operators:
            return None
        config = self.config
        truths = self.held_out[: config.posterior_images].float()
        num, k, channels = len(truths), config.posterior_samples, self.shape[0]
        scale = self.units.scale(truths.double()).expand(channels, *[1] * (truths.ndim - 2))
        noise_std = scale / 2 * _SHARE_OF_NOISE
        if config.posterior_noise_std is not None:
            noise_std = torch.full_like(scale, config.posterior_noise_std)
        record = PosteriorRecord(num, k, noise_std.flatten().tolist(), config.posterior_steps)
        pipe, depends_on = self.prepare_posterior(record)
        for name, operator in self.operators.items():
            y = measure(config, truths, operator, noise_std.float())
            function = partial(sample_posterior, pipe, config, operator, y, noise_std.flatten().float())
            table = self.kept.compute(f"posterior-{name}", depends_on, num * k, config.batch_size, function)
            record.evaluations = table["evaluations"].max().item()
            if self.accelerator.is_main_process:
                samples = table["samples"].unflatten(0, (num, k))
                # each measurement in units of its noise, which is then 1 for all channels
                reference = self.reference[:_MOST_GAUSSIAN] / noise_std
                exact = calibrate_exact_channels(reference, operator, 1.0, num, k)
                for channel in range(channels):
                    part = slice(channel, channel + 1)
                    key = name if channels == 1 else f"{name}, channel {channel}"
                    record.operators[key] = (
                        calibrate_values(samples[:, :, part], truths[:, part], unit=self.units.name),
                        exact[channel],
                    )
        return record

    def describe_run(self, samples: torch.Tensor, evaluations: int, parts: dict[str, Any]) -> EvaluationRecord:
        """The record of the run."""
        source, unit = self.source, self.units.name
        settings: Any = source.settings
        held_out_split = source.held_out_split
        if settings.validation_arrays is not None:
            held_out_split = without_parents(settings.validation_arrays)
        found, floor = (compare_fields(self.reference, data.double(), unit) for data in (samples, self.held_out))
        return EvaluationRecord(
            pipeline=without_parents(self.sampler.name),
            features="standardized means of blocks",
            data=DataRecord(
                id=source.name,
                name=source.name,
                reference_split=source.reference_split,
                num_reference=len(self.reference),
                held_out_split=held_out_split,
                num_held_out=len(self.held_out),
            ),
            samples=found.metrics,
            floor=floor.metrics,
            spectrum=SpectrumRecord(
                unit,
                found.wavenumbers,
                {"ratios": found.ratios, "errors": found.errors},
                {"ratios": floor.ratios, "errors": floor.errors},
            ),
            **self.describe(evaluations),
            **parts,
        )

    def save(self, record: EvaluationRecord, samples: torch.Tensor) -> None:
        """metrics.json, report.md and its plots."""
        unit = self.units.name
        num_pairs = 4 if len(self.shape) == 2 or self.shape[0] == 1 else 3  # what plot_fields shows in a row
        # held-out data of the training split may have been trained on, too
        is_own = record.data.held_out_split is not None
        training = self.reference if is_own else torch.cat([self.reference, self.held_out])
        nearest = training[nearest_fields(samples[:num_pairs].double(), training)[1][:, 0]].float()
        pairs = torch.stack([samples[:num_pairs], nearest], dim=1).flatten(0, 1)
        self.write("samples.png", lambda path: plot_fields(samples[:_NUM_SHOWN].numpy(), unit).save(path))
        self.write("neighbors.png", lambda path: plot_fields(pairs.numpy(), unit).save(path))
        self.write("spectrum.png", partial(plot_spectra, record.spectrum))
        self.save_record(record, make_field_report(record))
