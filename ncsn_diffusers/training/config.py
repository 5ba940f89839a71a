"""The settings of a training run."""

from dataclasses import dataclass
from typing import Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from diffusers.optimization import SchedulerType

from ..data import CORRUPT_IMAGES
from ..scheduling_annealed_langevin import CONDITIONINGS, PREDICTION_TYPES
from ..score_matching import DISTRIBUTIONS, WEIGHTINGS

# diffusers' piecewise_constant needs rules, which are no number to give on a command line
LR_SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind.value != "piecewise_constant")


@dataclass
class TrainingConfig:
    """Train a noise conditional score network; with no argument, on 10,000 digits of MNIST."""

    dataset_name: str | None = None
    """Name of a data set on the Hub, or a folder that `datasets.load_dataset` reads."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    train_data_dir: str | None = None
    """Folder of pictures, of parquet files or of WebDataset archives to train on."""
    train_split: str = "train"
    """Split to train on, or a slice of one: train[:90%]."""
    validation_split: str | None = None
    """Split, or slice of one, whose loss is reported at `eval_steps` (its first 10,000 pictures); none by default."""
    streaming: bool = False
    """Read the data set as it is used, without a copy on the disk; needs `resolution` and `max_train_steps`."""
    image_column: str | None = None
    """Column of pictures; the first one by default."""
    label_column: str | None = None
    """Column of labels; the first column of class labels by default."""
    class_conditional: bool = False
    """Train a network that is given the class of the picture."""
    class_dropout_prob: float = 0.1
    """Share of the pictures whose label is withheld, so that the network learns to do without, for guidance."""
    resolution: int | None = None
    """Side of the square that the pictures are resized and cropped to; their own size by default."""
    channels: int | None = None
    """1 (gray), 3 (colour) or 4 (colour and transparency); gray where all pictures are, and colour, by default."""
    random_crop: bool = False
    """Crop at a random place instead of the centre."""
    random_flip: bool = False
    """Mirror half of the pictures."""
    corrupt_images: str = "error"
    """What to do about pictures that cannot be read: error, before the training begins, or skip."""
    max_cache_gb: float = 4.0
    """Pictures that take up to so many GB are decoded once and kept on the device."""
    dataloader_num_workers: int | None = None
    """Processes that decode pictures; by default none on a CPU, and up to 8 beside a GPU."""

    output_dir: str = "ncsn-mnist"
    """Folder for the trained pipeline, checkpoints, log.jsonl, samples.png and loss.png."""
    overwrite_output_dir: bool = False
    """Train although `output_dir` holds a pipeline or checkpoints already, and replace them."""
    resume_from_checkpoint: str | None = None
    """Folder of a checkpoint to go on from, or latest: the last complete one in `output_dir`, if there is any."""
    checkpointing_steps: int = 500
    """Steps between two checkpoints; 0 for none."""
    checkpoints_total_limit: int = 2
    """How many checkpoints are kept."""
    eval_steps: int | None = None
    """Steps between two grids of samples (samples-STEP.png) and validation losses; only at the end by default."""
    logger: str | None = None
    """Tracker of accelerate: tensorboard, wandb, …, or all that are installed; log.jsonl is written in any case."""
    push_to_hub: bool = False
    """Publish the pipeline on the Hub at each checkpoint and at the end; see `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to publish in, NAME or ORGANISATION/NAME; named after `output_dir` by default."""
    hub_private_repo: bool = False
    """Make that repository a private one."""
    seed: int = 0
    """The same seed gives the same weights on the same machine."""

    block_out_channels: tuple[int, ...] = (32, 64, 64)
    """Channels of the network's levels; each level but the last halves the picture."""
    layers_per_block: int = 1
    """Residual layers a level."""
    num_train_timesteps: int | Literal["auto"] = 1000
    """Number of noise levels; auto: so many that neighbours overlap (NCSNv2, technique 2)."""
    sigma_min: float = 0.01
    """Smallest noise level, on pictures in [-1, 1]."""
    sigma_max: float | Literal["auto"] = 50.0
    """Largest noise level, on pictures in [-1, 1]; auto: the largest distance of two pictures (NCSNv2, technique 1)."""
    prediction_type: str = "v_prediction"
    """What the network returns: v_prediction, epsilon, sample or score."""
    conditioning: str = "timestep"
    """What the network is given: timestep (the level's index), or sigma (as NCSN++ is)."""

    train_batch_size: int = 32
    """Pictures a process at a time."""
    gradient_accumulation_steps: int = 1
    """How many times so many pictures make one step."""
    eval_batch_size: int = 64
    """Pictures in a grid of samples."""
    num_epochs: int = 4
    """Passes over the data."""
    max_train_steps: int | None = None
    """Number of steps, instead of `num_epochs`."""
    learning_rate: float = 1e-3
    """Learning rate after the warm-up."""
    lr_scheduler: str = "cosine"
    """Name of a learning-rate schedule of diffusers.optimization."""
    lr_warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.99
    """AdamW's beta2."""
    adam_weight_decay: float = 1e-6
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, and sample and save that."""
    ema_inv_gamma: float = 1.0
    """The average's decay is 1 - (1 + step/ema_inv_gamma)^-ema_power, up to ema_max_decay."""
    ema_power: float = 0.75
    """See ema_inv_gamma."""
    ema_max_decay: float = 0.9999
    """See ema_inv_gamma."""
    noise_distribution: str = "lognormal"
    """How noise levels are drawn: lognormal, or uniform over the levels (the paper)."""
    log_sigma_mean: float = -0.8
    """Mean of log sigma, for lognormal."""
    log_sigma_std: float = 1.4
    """Standard deviation of log sigma, for lognormal."""
    loss_weighting: str = "edm"
    """Weight of a level's loss: edm, which weighs the error of a v-prediction equally, or sigma_squared (the paper)."""
    mixed_precision: str | None = None
    """no, fp16 or bf16; by default what `accelerate launch` was told, or else bf16 on a GPU that has it."""
    compile: bool | None = None
    """Compile the network; by default on a GPU, for 1000 steps or more."""

    def __post_init__(self):
        for name, choices in (
            ("prediction_type", PREDICTION_TYPES),
            ("conditioning", CONDITIONINGS),
            ("noise_distribution", DISTRIBUTIONS),
            ("loss_weighting", WEIGHTINGS),
            ("mixed_precision", (None, "no", "fp16", "bf16")),
            ("lr_scheduler", LR_SCHEDULERS),
            ("corrupt_images", CORRUPT_IMAGES),
            ("channels", (None, 1, 3, 4)),
            ("logger", (None, "all", *sorted(map(str, LOGGER_TYPE_TO_CLASS)))),
        ):
            value = getattr(self, name)
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
        if not self.block_out_channels or any(channels % 8 for channels in self.block_out_channels):
            raise ValueError(f"`block_out_channels` must be multiples of 8, not {self.block_out_channels}.")
        if self.streaming and self.max_train_steps is None:
            raise ValueError("`streaming` needs `max_train_steps`: how long an epoch is is not known beforehand.")
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"`{name}`={getattr(self, name)} needs `push_to_hub`.")
        if self.random_crop and self.resolution is None:
            raise ValueError("`random_crop` needs `resolution`, the side of what is left.")
