"""What an evaluation found, as one record: metrics.json, report.md and the model card are read from it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from .calibration import Calibration
from .metrics import Metric, to_dict


@dataclass
class SamplingRecord:
    """How the samples were drawn; `evaluations` of the network for each."""

    scheduler: str
    scheduler_config: dict[str, Any]
    num_inference_steps: int
    sigmas: tuple[float, ...] | None
    num_langevin_steps: int | None
    class_labels: tuple[int, ...] | None
    guidance_scale: float
    seed: int
    dtype: str
    batch_size: int
    num_images: int
    evaluations: int


@dataclass
class DataRecord:
    """The real images: `id` on the Hub or the folder's name, and `name` in words."""

    id: str
    name: str
    reference_split: str
    num_reference: int
    held_out_split: str | None
    num_held_out: int


@dataclass
class ClassRecord:
    """The share of each class among the samples and the held-out images, and what names an image's class."""

    classes_by: str
    class_shares: dict[str, dict[str, float]] = field(default_factory=dict)
    named_as_asked: float | None = None


@dataclass
class LevelLoss:
    """The network's loss at one noise level."""

    sigma: float
    loss: float
    standard_error: float


@dataclass
class LossRecord:
    """The network's loss at each noise level, of `number` held-out images."""

    number: int
    levels: list[LevelLoss]


@dataclass
class LikelihoodRecord:
    """Bits per dimension of `number` held-out images, or nats per number of other data, in `steps` steps."""

    bits: Metric
    number: int
    steps: int


@dataclass
class BranchRecord:
    """Whether a network's outputs with and without a class belong together: see `branches.py`."""

    log_ratio: Metric
    number: int
    most: float


@dataclass
class PosteriorRecord:
    """
    Samples given measurements, for each operator (and channel of data that are no images) those of the pipeline and
    exact ones. `noise_std` is that of all channels or of each.
    """

    images: int
    samples: int
    noise_std: float | list[float]
    steps: int
    evaluations: int = 0
    operators: dict[str, tuple[Calibration, Calibration]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        settings = {key: value for key, value in vars(self).items() if key != "operators"}
        operators = {
            name: samples.to_dict() | {"exact": exact.to_dict()} for name, (samples, exact) in self.operators.items()
        }
        return settings | {"operators": operators}


@dataclass
class SpectrumRecord:
    """
    The power spectra of data that are no images over that of the reference.

    Args:
        unit (`str`, *optional*): of the data.
        wavenumbers (`list[float]` of length `bins`): in cycles per grid step.
        samples, floor (`dict`):
            Of samples and of held-out data, `"ratios"` and their standard errors `"errors"`, `(channels, bins)`.
    """

    unit: str | None
    wavenumbers: list[float]
    samples: dict[str, list[list[float]]]
    floor: dict[str, list[list[float]]]


@dataclass
class EvaluationRecord:
    """
    All of an evaluation.

    Args:
        pipeline (`str`): its name, without the folders around it.
        date, command (`str`): when it was evaluated, and how.
        features (`str`): which features the distances are of, in words.
        versions (`dict`): of the packages that compute the metrics.
        sampling, data: what the metrics depend on.
        samples, floor (`list[Metric]`): of the samples and of held-out real images, in the same order.
        classes, losses, likelihood, branches, posterior: what else was asked for.
        spectrum ([`SpectrumRecord`], *optional*): of data that are no images.
    """

    pipeline: str
    date: str
    command: str
    features: str
    versions: dict[str, str]
    sampling: SamplingRecord
    data: DataRecord
    samples: list[Metric]
    floor: list[Metric]
    classes: ClassRecord | None = None
    losses: LossRecord | None = None
    likelihood: LikelihoodRecord | None = None
    branches: BranchRecord | None = None
    posterior: PosteriorRecord | None = None
    spectrum: SpectrumRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it: what was not asked for is left out."""
        entries = {key: getattr(self, key) for key in ("pipeline", "date", "command", "features", "versions")}
        entries |= {"sampling": asdict(self.sampling), "data": asdict(self.data)}
        entries |= {"samples": to_dict(self.samples), "floor": to_dict(self.floor)}
        if self.classes is not None:
            entries |= {key: value for key, value in asdict(self.classes).items() if value is not None}
        if self.losses is not None:
            entries |= {"loss_images": self.losses.number, "loss_per_level": [vars(x) for x in self.losses.levels]}
        if self.likelihood is not None:
            bits = self.likelihood.bits
            entries[bits.key] = {"mean": bits.value, "standard_error": bits.standard_error}
            entries[bits.key] |= {"number": self.likelihood.number, "steps": self.likelihood.steps}
        if self.branches is not None:
            entries["branches"] = self.branches.log_ratio.to_dict()
            entries["branches"] |= {"number": self.branches.number, "most": self.branches.most}
        if self.posterior is not None:
            entries["posterior"] = self.posterior.to_dict()
        if self.spectrum is not None:
            entries["spectrum"] = asdict(self.spectrum)
        return entries
