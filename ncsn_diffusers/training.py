"""Training a noise conditional score network: one documented configuration, one loop under accelerate."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, also where there is no display

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL.Image import Resampling
from tqdm.auto import tqdm

from .data import decode_images, load_training_data, to_model_range
from .pipeline_ncsn import NCSNPipeline
from .scheduling_annealed_langevin import CONDITIONINGS, PREDICTION_TYPES, AnnealedLangevinScheduler
from .score_matching import DISTRIBUTIONS, draw_timesteps, score_matching_loss, stratified


@dataclass
class TrainingConfig:
    """Train a noise conditional score network; with no argument, on 10,000 digits of MNIST."""

    dataset_name: str | None = None
    """Name of a data set on the Hub, or a folder that `datasets.load_dataset` reads."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    train_data_dir: str | None = None
    """Folder of pictures to train on."""
    resolution: int | None = None
    """Side of the square that the pictures are resized and centre-cropped to; their own size by default."""
    random_flip: bool = False
    """Mirror half of the pictures."""
    output_dir: str = "ncsn-mnist"
    """Folder for the trained pipeline, samples.png and loss.png."""
    overwrite_output_dir: bool = False
    """Train although `output_dir` holds a pipeline already, and replace it."""
    seed: int = 0
    """The same seed gives the same weights on the same machine."""

    block_out_channels: tuple[int, ...] = (32, 64, 64)
    """Channels of the network's levels; each level but the last halves the picture."""
    layers_per_block: int = 1
    """Residual layers a level."""
    num_train_timesteps: int = 1000
    """Number of noise levels."""
    sigma_min: float = 0.01
    """Smallest noise level, on pictures in [-1, 1]."""
    sigma_max: float = 50.0
    """Largest noise level, on pictures in [-1, 1]."""
    prediction_type: str = "v_prediction"
    """What the network returns: v_prediction, epsilon, sample or score."""
    conditioning: str = "timestep"
    """What the network is given: timestep (the level's index), or sigma (as NCSN++ is)."""

    train_batch_size: int = 32
    """Pictures a step and process."""
    eval_batch_size: int = 64
    """Pictures in samples.png."""
    num_epochs: int = 4
    """Passes over the data."""
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
    mixed_precision: str = "no"
    """no, fp16 or bf16, as accelerate has it."""

    def __post_init__(self):
        for name, choices in (
            ("prediction_type", PREDICTION_TYPES),
            ("conditioning", CONDITIONINGS),
            ("noise_distribution", DISTRIBUTIONS),
            ("mixed_precision", ("no", "fp16", "bf16")),
            ("lr_scheduler", tuple(kind.value for kind in SchedulerType)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, not {value!r}.")
        for name in ("train_batch_size", "eval_batch_size", "num_epochs", "layers_per_block", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, not {value}.")
        for name in ("learning_rate", "log_sigma_std", "ema_inv_gamma", "ema_power"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.ema_max_decay < 1:
            raise ValueError(f"`ema_max_decay` must be at least 0 and below 1, not {self.ema_max_decay}.")
        if not self.block_out_channels or any(channels % 8 for channels in self.block_out_channels):
            raise ValueError(f"`block_out_channels` must be multiples of 8, not {self.block_out_channels}.")


def make_unet(config: TrainingConfig, channels: int, height: int, width: int) -> UNet2DModel:
    """
    A [`UNet2DModel`] for pictures of this shape, with attention on its last level.

    Raises:
        ValueError: a side cannot be halved as often as `block_out_channels` asks for.
    """
    num_levels = len(config.block_out_channels)
    divisor = 2 ** (num_levels - 1)
    if height % divisor or width % divisor:
        raise ValueError(
            f"`resolution`: pictures of {height}×{width} cannot be halved {num_levels - 1} times, as "
            f"`block_out_channels`={config.block_out_channels} asks for; both sides must be multiples of {divisor}."
        )
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        time_embedding_type="fourier" if config.conditioning == "sigma" else "positional",
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D",) * (num_levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (num_levels - 1),
        norm_num_groups=min(math.gcd(c, 32) for c in config.block_out_channels),
    )


def train(config: TrainingConfig) -> NCSNPipeline:
    """
    Train as `config` says, save the pipeline, samples.png and loss.png in `config.output_dir`, return the pipeline.

    An interrupt (Ctrl-C) ends the training early; what has been trained is saved all the same.

    Raises:
        ValueError: an option does not fit the data.
        FileExistsError: `output_dir` holds a pipeline and `overwrite_output_dir` is not given.
        FloatingPointError: the loss is not finite.
    """
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    output_dir = Path(config.output_dir)
    if (output_dir / "model_index.json").exists() and not config.overwrite_output_dir:
        raise FileExistsError(
            f"`output_dir`={config.output_dir!r} holds a pipeline already: name another folder, or replace it with "
            "--overwrite_output_dir."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    if accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        # `accelerate launch` leaves a CPU process one thread, and the other cores idle
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))

    scheduler = AnnealedLangevinScheduler(
        num_train_timesteps=config.num_train_timesteps,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        prediction_type=config.prediction_type,
        conditioning=config.conditioning,
    )
    with accelerator.main_process_first():  # one process prepares the data set's cache, the others read it
        dataset = load_training_data(config.dataset_name, config.dataset_config_name, config.train_data_dir)
    images = decode_images(dataset, config.resolution).to(accelerator.device)
    batch_size = config.train_batch_size
    steps_per_epoch = len(images) // (batch_size * accelerator.num_processes)
    if steps_per_epoch < 1:
        raise ValueError(
            f"`train_batch_size`={batch_size} on {accelerator.num_processes} process(es) is more than the "
            f"{len(images)} pictures of the data set."
        )
    num_steps = steps_per_epoch * config.num_epochs

    unet = make_unet(config, *images.shape[1:])
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    # Not prepared by accelerate, which would step it once for each process: it counts optimizer steps.
    lr_scheduler = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=num_steps
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = None
    if config.use_ema:
        ema = EMAModel(
            unet.parameters(),
            decay=config.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            foreach=True,
        )

    # All processes shuffle alike and take turns; the noise of each is its own.
    shuffler = torch.Generator().manual_seed(config.seed)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed + accelerator.process_index)
    losses = torch.zeros(num_steps, device=accelerator.device)
    step = 0
    progress = tqdm(total=num_steps, desc="Training", unit="step", disable=not accelerator.is_main_process)
    try:
        for _ in range(config.num_epochs):
            order = torch.randperm(len(images), generator=shuffler).to(accelerator.device)
            mine = order.split(batch_size)[accelerator.process_index :: accelerator.num_processes]
            for batch in mine[:steps_per_epoch]:
                clean = to_model_range(images[batch])
                uniform = torch.rand(2, batch_size, generator=generator, device=accelerator.device)
                if config.random_flip:
                    clean = torch.where((uniform[1] < 0.5)[:, None, None, None], clean.flip(-1), clean)
                noise = torch.randn(clean.shape, generator=generator, device=accelerator.device)
                timesteps = draw_timesteps(
                    scheduler,
                    stratified(uniform[0]),
                    config.noise_distribution,
                    config.log_sigma_mean,
                    config.log_sigma_std,
                )
                loss = score_matching_loss(model, scheduler, clean, noise, timesteps).mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                lr_scheduler.step()
                if ema is not None:
                    ema.step(unet.parameters())
                losses[step] = loss.detach()
                step += 1
                progress.update()
                if step % 20 == 0 or step == num_steps:  # reading the loss waits for the device
                    progress.set_postfix(loss=f"{_recent_loss(losses[:step]):.4f}")
    except KeyboardInterrupt:
        accelerator.print(f"\nInterrupted after {step} of {num_steps} steps; saving what has been trained.")
    progress.close()

    unet = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if ema is not None and step:
        ema.copy_to(unet.parameters())
    pipeline = NCSNPipeline(unet=unet.eval(), scheduler=scheduler)
    if accelerator.is_main_process:
        pipeline.save_pretrained(output_dir)
        _save_loss_curve(losses[:step].cpu(), output_dir / "loss.png")
        _save_samples(pipeline, config, output_dir / "samples.png")
        accelerator.print(f"Saved the pipeline, samples.png and loss.png in {output_dir}.")
    accelerator.end_training()
    return pipeline


def _recent_loss(losses: torch.Tensor) -> float:
    recent = losses[-20:].mean().item()
    if not math.isfinite(recent):
        raise FloatingPointError(
            f"The loss is {recent} after {len(losses)} steps; a lower `learning_rate` or mixed_precision='no' may help."
        )
    return recent


def _save_samples(pipeline: NCSNPipeline, config: TrainingConfig, path: Path) -> None:
    pipeline.set_progress_bar_config(desc="Sampling", unit="step")
    generator = torch.Generator().manual_seed(config.seed)
    images = pipeline(batch_size=config.eval_batch_size, generator=generator).images
    columns = math.ceil(math.sqrt(len(images)))
    blank = [images[0].point(lambda _: 0)] * (-len(images) % columns)
    grid = make_image_grid(images + blank, rows=math.ceil(len(images) / columns), cols=columns)
    enlargement = max(1, 512 // grid.width)  # small pictures are hard to judge by eye
    grid.resize((grid.width * enlargement, grid.height * enlargement), Resampling.NEAREST).save(path)


def _save_loss_curve(losses: torch.Tensor, path: Path) -> None:
    window = max(1, len(losses) // 50)
    smooth = torch.nn.functional.avg_pool1d(losses[None], window, stride=1)[0] if len(losses) else losses
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(losses, color="tab:blue", alpha=0.25, label="each step")
    axes.plot(range(window // 2, window // 2 + len(smooth)), smooth, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="½ ‖sigma score + z‖² a dimension", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
