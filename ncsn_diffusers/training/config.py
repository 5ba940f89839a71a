"""The settings of a training run, and the command line that repeats it."""

import json
import shlex
from dataclasses import asdict, dataclass, fields, replace
from decimal import Decimal
from typing import Any, Literal

from ..dataset_settings import ArraySettings, DatasetSettings, without_parents

# The settings whose defaults depend on the architecture. Those of ncsn and ncsnv2 are the papers', for images in
# [-1, 1] instead of [0, 1], with fewer channels.
_REFINENET = {"block_out_channels": (32, 64, 64, 64), "prediction_type": "score", "conditioning": "sigma"}
_PAPERS = {"sigma_min": 0.02, "noise_distribution": "uniform", "loss_weighting": "sigma_squared"}
ARCHITECTURES = {
    "unet": {  # its `block_out_channels` and `add_attention` depend on the size of the data
        "layers_per_block": 1,
        "prediction_type": "v_prediction",
        "conditioning": "timestep",
        "num_train_timesteps": 1000,
        "sigma_min": 0.01,
        "sigma_max": 50.0,
        "noise_distribution": "lognormal",
        "loss_weighting": "edm",
    },
    "ncsn": {**_REFINENET, **_PAPERS, "num_train_timesteps": 10, "sigma_max": 2.0},
    "ncsnv2": {**_REFINENET, **_PAPERS, "num_train_timesteps": "auto", "sigma_max": "auto"},
}

# The network and what it knows, which a pipeline gives where `pretrained_model_name_or_path` names one
GIVEN_BY_PIPELINE = (
    *("architecture", "block_out_channels", "layers_per_block", "add_attention", "prediction_type", "conditioning"),
    *("num_train_timesteps", "sigma_min", "sigma_max"),
)
# The last two have defaults that depend on the architecture
_KNOWN_ONCE_LOADED = (*GIVEN_BY_PIPELINE, "noise_distribution", "loss_weighting")

# Settings that define what the network's input and output mean: a run cannot resume with others
FIXED_SETTINGS = (
    *("pretrained_model_name_or_path", "architecture"),
    *("num_train_timesteps", "sigma_min", "sigma_max", "prediction_type", "conditioning"),
    *("channel_axis", "value_range", "data_mean", "data_std"),
)
# Settings that do not affect the weights: a run may resume with others without a message
HARMLESS_SETTINGS = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "eval_steps",
    "eval_batch_size",
    "logger",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "max_cache_gb",
    "dataloader_num_workers",
)


@dataclass
class DataSettings:
    """Splits, classes and preprocessing"""

    train_split: str = "train"
    """Split to train on, or a slice of one: train[:90%]."""
    validation_split: str | None = None
    """Split, or slice of one, for the validation loss at `eval_steps` (its first 10,000 images); by default none."""
    streaming: bool = False
    """Read the data set during training, without a copy on disk; needs `resolution` and `max_train_steps`."""
    class_conditional: bool = False
    """Train a network that is given the class of each image."""
    class_dropout_prob: float = 0.1
    """Probability of hiding an image's label, so that the network also learns to do without one, for guidance."""
    random_crop: bool = False
    """Crop at a random place instead of the center; needs `resolution`."""
    random_flip: bool = False
    """Flip half of the images horizontally, at random."""
    corrupt_images: str = "error"
    """What to do with images that cannot be read: error, before training begins, or skip."""
    max_cache_gb: float = 4.0
    """Images that fit in this many GB are decoded once and kept on the device."""
    dataloader_num_workers: int | None = None
    """Processes that decode images; by default none on a CPU and up to 8 with a GPU."""


@dataclass
class RunSettings:
    """Output, checkpoints and publishing"""

    output_dir: str = "ncsn-mnist"
    """Folder for the trained pipeline, checkpoints, log.jsonl, samples.png and loss.png."""
    overwrite_output_dir: bool = False
    """Replace the pipeline and checkpoints that `output_dir` already holds."""
    resume_from_checkpoint: str | None = None
    """Folder of a checkpoint to resume from; latest: the last complete one in `output_dir`, if there is any."""
    checkpointing_steps: int = 500
    """Steps between checkpoints; 0 for no checkpoints."""
    checkpoints_total_limit: int = 2
    """Maximum number of checkpoints to keep."""
    eval_steps: int | None = None
    """Steps between sample grids (samples-STEP.png) and validation losses; by default only at the end."""
    eval_batch_size: int = 64
    """Images in a sample grid."""
    logger: str | None = None
    """Tracker of accelerate: tensorboard, wandb, …, or all that are installed; log.jsonl is always written."""
    push_to_hub: bool = False
    """Upload the pipeline to the Hub at each checkpoint and at the end; log in with `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to upload to, NAME or ORGANIZATION/NAME; by default the name of `output_dir`."""
    hub_private_repo: bool = False
    """Make that repository private."""


@dataclass
class NetworkSettings:
    """Network"""

    pretrained_model_name_or_path: str | None = None
    """Pipeline whose weights a new run begins with: a folder, an id on the Hub, or mnist, the digits that come with the
    package. Its network, noise levels, prediction_type and conditioning are kept."""
    architecture: Literal["unet", "ncsn", "ncsnv2"] | None = None
    """unet; or a RefineNet that returns the score: of the 2019 paper (ncsn) or the 2020 paper (ncsnv2). By default
    unet."""
    block_out_channels: tuple[int, ...] | None = None
    """Channels of each level of the network, which each but the last halves the image; by default 32 64 64, and as many
    further levels of 64 as leave at most 24 × 24 points. Of a RefineNet, channels of each stage: the last two are
    dilated, those between them and the first halve the image; by default 32 64 64 64, in the papers 128 256 256 256."""
    layers_per_block: int | None = None
    """Residual layers per level of a unet; by default 1."""
    add_attention: bool | None = None
    """Self-attention on the last level and in the middle of a unet; by default where the last level has more than 8 × 8
    points."""
    prediction_type: str | None = None
    """What the network predicts: v_prediction, epsilon, sample or score; by default v_prediction, and score for a
    RefineNet."""
    conditioning: str | None = None
    """How the network is told the noise level: timestep (its index), or sigma (as in NCSN++); by default timestep, and
    sigma for a RefineNet."""


@dataclass
class NoiseSettings:
    """Noise levels and loss"""

    num_train_timesteps: int | Literal["auto"] | None = None
    """Number of noise levels; auto: as many as it takes for neighbors to overlap (NCSNv2, technique 2). By default
    1000; ncsn 10, ncsnv2 auto."""
    sigma_min: float | None = None
    """Smallest noise level, for images in [-1, 1]; by default 0.01, and 0.02 for ncsn and ncsnv2."""
    sigma_max: float | Literal["auto"] | None = None
    """Largest noise level, for images in [-1, 1]; auto: the largest distance between images (NCSNv2, technique 1). By
    default 50; ncsn 2, ncsnv2 auto."""
    noise_distribution: str | None = None
    """How noise levels are drawn: lognormal, or uniform over the levels (the papers); by default lognormal, and uniform
    for ncsn and ncsnv2."""
    log_sigma_mean: float = -0.8
    """Mean of log sigma, for lognormal."""
    log_sigma_std: float = 1.4
    """Standard deviation of log sigma, for lognormal."""
    loss_weighting: str | None = None
    """Weight of the loss at each level: edm (weighs v-prediction errors equally), or sigma_squared (the papers); by
    default edm, and sigma_squared for ncsn and ncsnv2."""


@dataclass
class OptimizerSettings:
    """Optimization"""

    train_batch_size: int = 32
    """Images per batch and process."""
    gradient_accumulation_steps: int = 1
    """Batches accumulated per optimizer step."""
    num_epochs: int = 4
    """Passes over the data."""
    max_train_steps: int | None = None
    """Number of optimizer steps, instead of `num_epochs`."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    lr_scheduler: str = "cosine"
    """Name of a learning-rate schedule of diffusers.optimization."""
    lr_warmup_steps: int = 50
    """Steps over which the learning rate rises from 0; without effect on `constant`, unlike `constant_with_warmup`."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.99
    """AdamW's beta2."""
    adam_weight_decay: float = 1e-6
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights; it is what is sampled from and saved."""
    ema_inv_gamma: float = 1.0
    """The decay of the average is 1 - (1 + step/ema_inv_gamma)^-ema_power, up to ema_max_decay."""
    ema_power: float = 0.75
    """See ema_inv_gamma."""
    ema_max_decay: float = 0.9999
    """See ema_inv_gamma."""
    mixed_precision: str | None = None
    """no, fp16 or bf16; by default that of the checkpoint to resume from, or what `accelerate launch` was given, or
    else bf16 on a GPU that supports it or a CPU with instructions for it."""
    compile: bool | None = None
    """Compile the network, a unet; by default on a GPU for runs of 1000 steps or more."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same weights on the same machine."""


@dataclass
class TrainingConfig(
    OptimizerSettings, NoiseSettings, NetworkSettings, RunSettings, DataSettings, ArraySettings, DatasetSettings
):
    """Train a noise conditional score network; without arguments, on 10,000 MNIST digits."""

    def __post_init__(self):
        # here, because they import torch and diffusers: `--help` and a misspelt flag are answered without
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from diffusers.optimization import SchedulerType

        from ..data import CORRUPT_IMAGES
        from ..scheduling_annealed_langevin import CONDITIONINGS, PREDICTION_TYPES
        from ..score_matching import DISTRIBUTIONS, WEIGHTINGS

        # piecewise_constant needs a list of rules, for which there is no setting
        lr_schedulers = tuple(kind.value for kind in SchedulerType if kind.value != "piecewise_constant")
        starts_anew = self.pretrained_model_name_or_path is None
        if starts_anew and self.architecture is None:
            self.architecture = "unet"
        for name, default in ARCHITECTURES.get(self.architecture, {}).items():
            if getattr(self, name) is None and (starts_anew or name not in GIVEN_BY_PIPELINE):
                setattr(self, name, default)
        for name, choices in (
            ("architecture", ARCHITECTURES),
            ("prediction_type", PREDICTION_TYPES),
            ("conditioning", CONDITIONINGS),
            ("noise_distribution", DISTRIBUTIONS),
            ("loss_weighting", WEIGHTINGS),
            ("mixed_precision", (None, "no", "fp16", "bf16")),
            ("lr_scheduler", lr_schedulers),
            ("corrupt_images", CORRUPT_IMAGES),
            ("channels", (None, 1, 3, 4)),
            ("logger", (None, "all", *sorted(map(str, LOGGER_TYPE_TO_CLASS)))),
        ):
            value = getattr(self, name)
            if value is None and not starts_anew and name in _KNOWN_ONCE_LOADED:
                continue
            if value not in choices:
                accepted = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"`{name}` must be one of {accepted}, not {value!r}.")
        for name, least in (
            ("train_batch_size", 1),
            ("eval_batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("num_epochs", 1),
            ("max_train_steps", 1),
            ("layers_per_block", 1),
            ("resolution", 1),
            ("eval_steps", 1),
            ("checkpoints_total_limit", 1),
            ("checkpointing_steps", 0),
            ("dataloader_num_workers", 0),
            ("max_cache_gb", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, not {value}.")
        for name in ("learning_rate", "log_sigma_std", "ema_inv_gamma", "ema_power", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, not {getattr(self, name)}.")
        for name in ("ema_max_decay", "class_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and below 1, not {getattr(self, name)}.")
        channels = self.block_out_channels
        if starts_anew and channels is not None and (not channels or any(number % 8 for number in channels)):
            raise ValueError(f"`block_out_channels` must be multiples of 8, not {channels}.")
        if self.architecture not in (None, "unet"):
            self._check_refinenet()
        if self.streaming and self.max_train_steps is None:
            raise ValueError("`streaming` needs `max_train_steps`: the length of an epoch is not known beforehand.")
        lognormal = self.noise_distribution in (None, "lognormal")
        for names, is_used, needed in (  # elsewhere they would do nothing
            (("hub_model_id", "hub_private_repo"), self.push_to_hub, "`push_to_hub`"),
            (("label_column", "class_dropout_prob"), self.class_conditional, "`class_conditional`"),
            (("log_sigma_mean", "log_sigma_std"), lognormal, "`noise_distribution`='lognormal'"),
            (("ema_inv_gamma", "ema_power", "ema_max_decay"), self.use_ema, "`use_ema`"),
        ):
            for name in names:
                value = getattr(self, name)
                if value != self.__dataclass_fields__[name].default and not is_used:
                    raise ValueError(f"`{name}`={value} needs {needed}.")
        if self.random_crop and self.resolution is None:
            raise ValueError("`random_crop` needs `resolution`, the side of the crop.")
        self.check_array_settings()

    def _check_refinenet(self) -> None:
        architecture = f"`architecture`={self.architecture!r}"
        for name in ("prediction_type", "conditioning"):
            value, only = getattr(self, name), ARCHITECTURES[self.architecture][name]
            if value not in (None, only):
                raise ValueError(f"`{name}` must be {only} with {architecture}, not {value!r}.")
        if self.class_conditional:
            raise ValueError(
                f"`class_conditional` needs `architecture`='unet': with {architecture} the network knows no classes."
            )
        if self.compile:
            raise ValueError(f"`compile` needs `architecture`='unet'; with {architecture} it has not been tried.")
        if self.layers_per_block is not None:
            raise ValueError(
                f"`layers_per_block`={self.layers_per_block} is for `architecture`='unet': with {architecture} each "
                "stage has two residual blocks."
            )
        if self.add_attention is not None:
            raise ValueError(
                f"`add_attention`={self.add_attention} is for `architecture`='unet': with {architecture} the network "
                "has no attention."
            )
        if self.block_out_channels is not None and len(self.block_out_channels) < 3:
            raise ValueError(
                f"`block_out_channels` must be at least three with {architecture}, not {self.block_out_channels}: the "
                "last two stages are dilated."
            )


def record_given_data(config: TrainingConfig, data: Any) -> TrainingConfig:
    """
    The settings, with a word in the place of the data that were given from Python: no command could name these.

    Raises:
        ValueError: the settings name data, too.
    """
    if data is None:
        return config
    for name in ("dataset_name", "dataset_config_name", "train_data_dir", "train_arrays"):
        if getattr(config, name) is not None:
            raise ValueError(f"Give `data` or `{name}`={getattr(config, name)!r}, not both.")
    return replace(config, train_data_dir="DATA")


def changed_settings(before: dict[str, Any], config: TrainingConfig) -> dict[str, dict[str, Any]]:
    """
    The settings that differ from those of a checkpoint's manifest and may affect the weights, each as
    `{"before": value, "now": value}`.
    """
    now = json.loads(json.dumps(asdict(config)))
    return {
        name: {"before": value, "now": now.get(name)}
        for name, value in before.items()
        if value != now.get(name) and name not in HARMLESS_SETTINGS
    }


def training_command(config: TrainingConfig) -> str:
    """
    The bash command that trains with these settings, as one line.

    It gives the settings that differ from the defaults and may affect the weights, but not those that
    `pretrained_model_name_or_path` implies. Local folders are cut down to their names: the command is published on the
    model card.
    """
    words = ["accelerate", "launch", "-m", "ncsn_diffusers.commands.train"]
    defaults = {"architecture": "unet", **ARCHITECTURES.get(config.architecture, {})}
    if config.pretrained_model_name_or_path is not None:
        defaults |= {name: getattr(config, name) for name in GIVEN_BY_PIPELINE}
    for field in fields(config):
        value = getattr(config, field.name)
        if value == defaults.get(field.name, field.default) or field.name in HARMLESS_SETTINGS:
            continue
        if field.type is bool:
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
            continue
        paths = ("dataset_name", "train_data_dir", "train_arrays", "validation_arrays", "pretrained_model_name_or_path")
        if field.name in paths:
            is_folder = field.name not in ("dataset_name", "pretrained_model_name_or_path")
            value = without_parents(value, is_folder=is_folder)
        # -1e-05 would be read as a flag
        values = [_without_exponent(v) for v in value] if isinstance(value, tuple | list) else [str(value)]
        if len(values) == 1 and values[0].startswith("-"):
            words.append(f"--{field.name}={values[0]}")
        else:
            words += [f"--{field.name}", *values]
    return shlex.join(words)


def _without_exponent(value: float | int | str) -> str:
    return f"{Decimal(str(value)):f}".removesuffix(".0") if isinstance(value, float) else str(value)
