"""
What an evaluation can be told. Nothing here imports torch or diffusers, which takes seconds: `--help` and a misspelt
flag are answered at once.
"""

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from ..dataset_settings import ArrayFiles, DatasetSettings, without_parents
from ..settings import DType, SamplingConfig

OperatorName = Literal["missing-pixels", "stations", "pixelated", "blurred"]
FeaturesName = Literal["digits", "fashion", "random", "inception"]


@dataclass
class ReportSettings:
    """Output"""

    output_dir: str = "evaluation"
    """Folder for the report, the plots and the kept batches; every process must see it."""

    overwrite_output_dir: bool = False
    """Replace samples in `output_dir` that were drawn with other settings."""

    update_model_card: bool = False
    """Write the metrics into the metadata of the README.md in the pipeline's folder."""


@dataclass
class ReferenceSettings:
    """Reference images"""

    reference_split: str | None = None
    """Split, or slice of one, that the samples are compared with; by default the one that the pipeline was trained on,
    as its folder records it, or else train."""

    held_out_split: str | None = None
    """Split whose distance from the reference is the floor; by default the validation split that the pipeline's folder
    records, or else `num_images` of the reference, at most half."""

    max_reference_images: int | None = None
    """Use this many images of the reference, drawn at random; all by default."""


@dataclass
class MetricSettings:
    """Metrics"""

    features: str | None = None
    """Features to compare images by: `digits` or `fashion` (classifiers of 28×28 digits and of Fashion-MNIST),
    `inception` (the FID's network, a download of 91 MB), `random` (random weights, which need no download and take any
    images), or a file that scripts/train_digit_classifier.py wrote. By default the classifier that finds the labels of
    28×28 gray images, and `random` for others."""

    loss_images: int = 500
    """Held-out images that the network's loss at each noise level is averaged over; 0 for none."""

    bits_per_dim: int = 0
    """Held-out images whose likelihood is estimated, with 4 evaluations and backward passes per step; 0 for none. Of
    other data than images it is reported as nats per number."""

    likelihood_steps: int = 25
    """Integration steps of the likelihood."""

    branch_images: int = 100
    """Of a class-conditional network: images that its outputs with and without a class are compared on; 0 for none."""


@dataclass
class PosteriorSettings:
    """Images given a measurement"""

    posterior: tuple[OperatorName, ...] = ()
    """Measurements of held-out images, given which images are drawn and judged; none by default."""

    posterior_images: int = 16
    """Held-out images that are measured."""

    posterior_samples: int = 8
    """Samples for each measurement."""

    posterior_noise_std: float | None = None
    """Standard deviation of the measurements' noise, in units of the data; by default 0.025 for images, which are in
    [0, 1], and a tenth of each channel's standard deviation for other data."""

    posterior_steps: int = 25
    """Noise levels of these samples, each of which takes two network evaluations."""


# Fields come in the reverse order of the bases: `pipeline`, of SamplingConfig, is the first.
@dataclass
class EvaluateConfig(
    PosteriorSettings, MetricSettings, ReferenceSettings, ArrayFiles, DatasetSettings, ReportSettings, SamplingConfig
):
    """
    Evaluate a trained pipeline: its samples against real images, and its network on held-out ones.

    Writes metrics.json and report.md, and keeps the samples and their features, so that a run that was cut short goes
    on where it stopped. With no data set named, samples are compared with the images that the pipeline was trained on,
    as its folder records them, or else with the embedded digits. Signals, maps and volumes are compared without
    features, in their own units.

    Raises:
        ValueError: a setting is out of its range.
    """

    validation_arrays: str | None = None
    """The same for held-out arrays, instead of `held_out_split`."""

    num_images: int = 5000
    """Number of samples."""

    batch_size: int = 100
    """Samples per batch on each device."""

    dtype: DType = "float32"
    """The network's type; float32 on every machine by default, so that no metric depends on what a machine computes
    fast in. The chain, the loss and the likelihood stay in float32."""

    def __post_init__(self):
        self.check_least(max_reference_images=1, resolution=1, likelihood_steps=1)
        self.check_least(posterior_images=2, posterior_samples=2, posterior_steps=1)
        operators = get_args(OperatorName)
        for name in self.posterior:
            if name not in operators or self.posterior.count(name) > 1:
                raise ValueError(f"`posterior` must be different ones of {', '.join(operators)}, not {self.posterior}.")
        if self.features not in (None, *get_args(FeaturesName)) and not Path(self.features).is_file():
            raise ValueError(
                f"`features` must be {', '.join(get_args(FeaturesName))} or the file of a classifier, not "
                f"{self.features!r}."
            )
        if self.posterior_noise_std is not None and not 0 < self.posterior_noise_std < math.inf:
            raise ValueError(f"`posterior_noise_std` must be above 0, not {self.posterior_noise_std}.")
        for name in ("loss_images", "bits_per_dim", "branch_images"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ValueError(f"`{name}` must be 0 or at least 2, for a standard error, not {getattr(self, name)}.")
        if self.validation_arrays is not None and self.held_out_split is not None:
            raise ValueError(
                f"Give `validation_arrays` or `held_out_split`, not both ({self.validation_arrays!r} and "
                f"{self.held_out_split!r})."
            )
        self.check_array_files()
        if self.channels not in (None, 1, 3, 4):
            raise ValueError(f"`channels` must be 1, 3 or 4, not {self.channels}.")
        super().__post_init__()
        if self.update_model_card and (self.pipeline is None or not (Path(self.pipeline) / "README.md").is_file()):
            raise ValueError(
                f"`update_model_card` needs a model card, {Path(self.pipeline or 'PIPELINE') / 'README.md'}."
            )


def evaluation_command(config: EvaluateConfig) -> str:
    """The bash command that evaluates with these settings, as one line. Local folders are cut down to their names."""
    words = ["ncsn-diffusers", "evaluate", *([without_parents(config.pipeline)] if config.pipeline else [])]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name == "pipeline":
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
            continue
        if field.name in ("dataset_name", "train_data_dir", "train_arrays", "validation_arrays", "output_dir"):
            value = without_parents(value)
        words += [f"--{field.name}", *(map(str, value) if isinstance(value, tuple | list) else [str(value)])]
    return shlex.join(words)
