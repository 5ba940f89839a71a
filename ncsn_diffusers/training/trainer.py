"""
Training a noise conditional score network: one documented configuration, one loop under accelerate.

What a step draws at random (levels, noise, mirroring, dropped labels) is a function of the seed and the step's number
alone, drawn for the whole batch of all processes, of which each takes its part. So two processes with half the batch
each follow one with the whole, and a run that goes on from a checkpoint equals one that never stopped.
"""

import copy
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..data import ImageReader, encode_labels, find_columns, load_training_data, open_images
from ..hub.loading import NCSNPipeline
from ..hub.upload import BackgroundPush
from ..images import make_grid, to_model_range
from ..noise_levels import choose_num_train_timesteps, choose_sigma_max
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..score_matching import draw_timesteps, score_matching_loss, stratified
from .checkpoints import (
    aside,
    complete,
    is_complete,
    latest_checkpoint,
    lock,
    read_manifest,
    remove_all,
    remove_incomplete,
    replace_files,
)
from .config import TrainingConfig

_LOGGING_STEPS = 20  # between two looks at the loss, each of which waits for the device
_LEVEL_BINS = 8  # of log sigma, for the loss per noise level
_COMPILING_PAYS_STEPS = 1000  # compiling takes about a minute
_EVAL_CHUNK = 64  # pictures whose validation loss is found together: the result must not depend on the batch size
_AUTO_IMAGES = 60_000  # from so many pictures, spread over the data set, sigma_max is chosen
_MAX_SKIPPED_IN_A_ROW = 20  # fp16's loss scale is halved at each of them: 20 find any that fits
_CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # what a full disk is called by Python, torch, safetensors


def make_unet(
    config: TrainingConfig, channels: int, height: int, width: int, num_classes: int | None = None
) -> UNet2DModel:
    """
    A [`UNet2DModel`] for pictures of this shape, with attention on its last level. With `num_classes` its class
    embedding has one entry more, the last, which stands for no label.

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
        # A group of one channel would take away all that the embeddings of level and class add to it.
        norm_num_groups=math.gcd(32, math.gcd(*config.block_out_channels) // 4),
        attention_head_dim=math.gcd(64, config.block_out_channels[-1]),  # diffusers' heads of 8 are slow
        resnet_time_scale_shift="scale_shift",  # after the norm, where nothing takes them away
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def train(config: TrainingConfig) -> NCSNPipeline:
    """
    Train as `config` says, save the pipeline, samples.png and loss.png in `config.output_dir`, return the pipeline.

    An interrupt (Ctrl-C, or SIGTERM) ends the training early; a checkpoint and what has been trained are saved. A step
    whose gradient is not finite changes no weight; `skipped_steps` in log.jsonl counts them.

    Raises:
        ValueError: an option does not fit the data, another option, or the checkpoint to go on from.
        OSError: `output_dir` cannot be written to, or its disk is too full for the run.
        BlockingIOError: another process is training in `output_dir`.
        FileExistsError: `output_dir` holds a pipeline or checkpoints, and neither `overwrite_output_dir` nor
            `resume_from_checkpoint` is given.
        FloatingPointError: 20 gradients in a row are not finite, or the weights are not.
    """
    return Trainer(config).train()


class Trainer:
    """
    One run: [`train`] makes one and calls [`Trainer.train`].

    Args:
        config ([`TrainingConfig`]): the run's settings.
    """

    def __init__(self, config: TrainingConfig):
        self.config = config
        mixed_precision = _mixed_precision(config)
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
            AcceleratorState._reset_state()  # it would hold a process to the precision of its first run
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=_check_logger(config.logger),
            project_dir=config.output_dir,
        )
        if self.accelerator.distributed_type not in _REPLICATED:
            raise ValueError(
                f"{self.accelerator.distributed_type} shards the network, of which the loop needs each process to hold "
                "a replica: choose multi-GPU without it in `accelerate config`."
            )
        self.device = self.accelerator.device
        self.output_dir = Path(config.output_dir)
        if self.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
            # `accelerate launch` leaves a CPU process one thread, and the other cores idle
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.accelerator.num_processes))

        self.lock = None
        try:
            self.checkpoint = self._prepare_output_dir()
            self.uploads = None
            with self._together():
                if config.push_to_hub and self.accelerator.is_main_process:
                    repo_id = config.hub_model_id or self.output_dir.resolve().name
                    self.uploads = BackgroundPush(repo_id, self.output_dir, private=config.hub_private_repo or None)
            self._open_data()
            self._make_models()
            with self._together():
                self._check_disk()
        except BaseException:
            self._unlock()  # a notebook goes on living
            raise

    # Before the loop

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """
        What fails in one process fails in all, which would else wait for it for ever in the next collective operation.
        There must be none within.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        kind = FloatingPointError if isinstance(failure, FloatingPointError) else OSError
        failures = gather_object([None if failure is None else (kind, str(failure))])
        if failure is not None:
            raise failure
        for kind, message in filter(None, failures):
            raise kind(message)

    def _prepare_output_dir(self) -> Path | None:
        """The checkpoint to go on from, in an output folder that can be written to."""
        config, folder = self.config, self.output_dir
        with self._together():
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                self.lock = lock(folder)  # first, since another run may change what is found
        wanted = config.resume_from_checkpoint
        checkpoint = latest_checkpoint(folder) if wanted == "latest" else Path(wanted) if wanted else None
        if wanted not in (None, "latest") and not is_complete(checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint`={wanted!r} is not a complete checkpoint; 'latest' finds the last complete "
                f"one in {config.output_dir!r}."
            )
        held = (folder / "model_index.json").exists() or (wanted is None and any(folder.glob("checkpoint-*")))
        if held and checkpoint is None and not config.overwrite_output_dir:
            raise FileExistsError(
                f"`output_dir`={config.output_dir!r} holds a pipeline or checkpoints already: name another folder, go "
                "on with --resume_from_checkpoint latest, or replace them with --overwrite_output_dir."
            )
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        with self._together():
            if self.accelerator.is_main_process:
                if checkpoint is None:
                    remove_all(folder)
                remove_incomplete(folder)
        return checkpoint

    def _open_data(self) -> None:
        config = self.config
        num_workers = config.dataloader_num_workers
        if num_workers is None:
            share = (os.cpu_count() or 1) // self.accelerator.num_processes
            num_workers = 0 if self.device.type == "cpu" else min(8, share)

        def load(split, streaming):
            with self.accelerator.main_process_first():  # one prepares the data set's cache, the others read it
                dataset = load_training_data(
                    config.dataset_name, config.dataset_config_name, config.train_data_dir, split, streaming
                )
            dataset, image_column, label_column = find_columns(dataset, config.image_column, config.label_column)
            num_classes = None
            if config.class_conditional:
                dataset, num_classes = encode_labels(dataset, label_column)
            return dataset, num_classes, (image_column, label_column if config.class_conditional else None)

        dataset, self.num_classes, columns = load(config.train_split, config.streaming)
        reader = ImageReader(
            *columns, config.resolution, config.channels, config.random_crop, config.seed, self.num_classes
        )
        self.images = open_images(dataset, reader, self.device, config.corrupt_images, config.max_cache_gb, num_workers)
        shape = "{} channels, {}×{}".format(*self.images.shape)
        self.accelerator.print(
            f"Training on {'a stream of' if config.streaming else f'{len(self.images):,}'} images ({shape})"
            + (f" of {self.num_classes:,} classes." if self.num_classes is not None else ", without classes.")
        )
        self.validation = None
        if config.validation_split is not None:
            dataset, num_classes, columns = load(config.validation_split, streaming=False)
            dataset = dataset.select(range(min(len(dataset), 10_000)))
            reader = ImageReader(*columns, config.resolution, self.images.shape[0], num_classes=num_classes)
            self.validation = open_images(dataset, reader, self.device, config.corrupt_images, math.inf, num_workers)
            if self.validation.shape != self.images.shape or num_classes != self.num_classes:
                raise ValueError(
                    f"`validation_split`={config.validation_split!r} has pictures of shape {self.validation.shape} and "
                    f"{num_classes} classes, the training data {self.images.shape} and {self.num_classes}: "
                    "`resolution` and `channels` make the shapes agree."
                )

        self.num_steps, self.steps_per_epoch = config.max_train_steps, None
        if not config.streaming:
            total = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
            self.steps_per_epoch = len(self.images) // total
            if self.steps_per_epoch < 1:
                raise ValueError(
                    f"`train_batch_size`={config.train_batch_size} on {self.accelerator.num_processes} process(es), "
                    f"times `gradient_accumulation_steps`={config.gradient_accumulation_steps}, is more than the "
                    f"{len(self.images)} pictures of the data set."
                )
            self.num_steps = self.num_steps or self.steps_per_epoch * config.num_epochs

    def _make_models(self) -> None:
        config, accelerator = self.config, self.accelerator
        self.scheduler = AnnealedLangevinScheduler(
            **_choose_noise_levels(config, self.images),
            prediction_type=config.prediction_type,
            conditioning=config.conditioning,
        )
        set_seed(config.seed)  # here, since data loaders draw from the same generator
        # A CPU's convolutions in bf16 are the exception that takes longer with the channels last.
        on_cpu_in_bf16 = self.device.type == "cpu" and accelerator.mixed_precision == "bf16"
        self.memory_format = torch.contiguous_format if on_cpu_in_bf16 else torch.channels_last
        unet = make_unet(config, *self.images.shape, self.num_classes).to(self.device, memory_format=self.memory_format)
        # What is sampled, judged and saved: the moving average, or a copy made when it is needed.
        self.eval_unet = copy.deepcopy(unet).eval().requires_grad_(False)
        self.compiled = config.compile
        if self.compiled is None:
            self.compiled = self.device.type == "cuda" and self.num_steps >= _COMPILING_PAYS_STEPS
        if self.compiled:
            # CUDA graphs reuse the memory of gradients that accumulate or wait for other processes
            alone = accelerator.num_processes == config.gradient_accumulation_steps == 1
            unet.compile(mode="reduce-overhead" if alone else "default", dynamic=False)
        self.unet = unet
        self.weights, self.averages = list(unet.parameters()), list(self.eval_unet.parameters())
        optimizer = torch.optim.AdamW(unet.parameters(), **self._adamw_settings(), fused=True)
        # Not prepared by accelerate, which would step it once for each process: it counts optimizer steps.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.num_steps
        )
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler, self.eval_unet, self)

        self.step, self.positions = 0, None
        self.changes = {}  # of the settings, on going on
        self.losses = torch.zeros(self.num_steps, device=self.device)
        self.generator = torch.Generator(self.device)
        # Sum and number of the finite losses, and number of the others, in equal parts of log sigma
        self.level_losses = torch.zeros(3, _LEVEL_BINS, device=self.device)
        # Steps whose gradient was not finite: all of them, and those since the last good one. The host reads it when
        # it logs, not at each step.
        self.skipped = torch.zeros(2, dtype=torch.long, device=self.device)
        self.skipped_before = 0
        self.log_range = [math.log(self.scheduler.config[name]) for name in ("sigma_min", "sigma_max")]
        self.grad_norm = torch.zeros((), device=self.device)

    def _adamw_settings(self) -> dict:
        config = self.config
        return {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
        }

    def _check_disk(self) -> None:
        """Raise an OSError where the run's checkpoints would not fit, instead of losing the run to it."""
        config = self.config
        weights = 4 * sum(p.numel() for p in self.weights)
        # weights, their average and AdamW's two moments; a new checkpoint is whole before an old one goes
        needed = weights * (4 * (config.checkpoints_total_limit + 1) if config.checkpointing_steps else 1)
        free = shutil.disk_usage(self.output_dir).free
        if free < needed:
            raise OSError(
                f"`output_dir`={config.output_dir!r}: the disk has {free / 1e9:.3g} GB left, and "
                f"{config.checkpoints_total_limit} checkpoints and the pipeline take {needed / 1e9:.3g} GB. Make room, "
                "name a folder on another disk, or set --checkpointing_steps 0."
            )

    # The loop

    def train(self) -> NCSNPipeline:
        """Run to the end, or until an interrupt; see [`train`]."""
        try:
            if self.checkpoint is not None:
                self._resume(self.checkpoint)
            return self._train()
        finally:
            self._unlock()

    def _train(self) -> NCSNPipeline:
        config, accelerator = self.config, self.accelerator
        with self._together():
            self._start_log()
        batches = self.images.batches(
            config.train_batch_size, config.seed, self.step * config.gradient_accumulation_steps
        )
        progress = tqdm(
            total=self.num_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        saved_step, stopped = self.step, False
        with _interrupts() as interrupt:
            self.model.train()
            self.clock = time.perf_counter(), self.step
            while self.step < self.num_steps and not (stopped := self._all_hear(interrupt)):
                self.training_step(batches)
                progress.update()
                last = self.step == self.num_steps
                checkpoint = config.checkpointing_steps and self.step % config.checkpointing_steps == 0
                evaluate = config.eval_steps and self.step % config.eval_steps == 0 and not last
                if checkpoint or evaluate or last or self.step % _LOGGING_STEPS == 0:
                    progress.set_postfix(loss=f"{self._log():.4f}")
                if checkpoint:
                    self._save_checkpoint()
                    saved_step = self.step
                    if self.uploads is not None and not last:
                        self.uploads.push(self._make_pipeline(to_save=True), f"Step {self.step}")
                if evaluate:
                    self._evaluate(self._make_pipeline(), self.output_dir / f"samples-{self.step}.png")
                if checkpoint or evaluate:
                    self.clock = time.perf_counter(), self.step  # the throughput is the training's
        progress.close()
        if stopped:
            accelerator.print(f"\nInterrupted after {self.step} of {self.num_steps} steps; saving.")
            if self.step > self.clock[1]:
                self._log()  # what is not finite must not be saved
        if config.checkpointing_steps and self.step > saved_step:
            self._save_checkpoint()

        self._check_finite()
        pipeline = self._make_pipeline(to_save=True)
        with self._together():
            if accelerator.is_main_process:
                try:
                    replace_files(self.output_dir, pipeline.save_pretrained)
                except _CANNOT_WRITE as failure:
                    raise OSError(
                        f"`output_dir`={config.output_dir!r}: the pipeline could not be written: {failure}. Make room, "
                        "and go on with --resume_from_checkpoint latest; the last good checkpoint is "
                        f"{latest_checkpoint(self.output_dir)}."
                    ) from failure
        if accelerator.is_main_process:
            with _warning("loss.png"):
                _save_loss_curve(self.losses[: self.step].cpu(), config.loss_weighting, self.output_dir / "loss.png")
        self._evaluate(self._make_pipeline(), self.output_dir / "samples.png")
        accelerator.print(f"Saved the pipeline, samples.png and loss.png in {self.output_dir}.")
        if self.uploads is not None:
            self.uploads.push(pipeline, "End of training")
            self.uploads.finish()
        accelerator.end_training()
        pipeline.unet.requires_grad_(True)  # as of any network that is loaded
        return pipeline

    def training_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        One optimizer step. The host never waits for the device here.

        Args:
            batches (iterator of `torch.Tensor` pairs):
                uint8 pictures of shape `(train_batch_size, channels, height, width)`, and labels; it is asked for
                `gradient_accumulation_steps` of them.
        """
        config, accelerator = self.config, self.accelerator
        size, num_micro = config.train_batch_size, config.gradient_accumulation_steps
        all_size = size * accelerator.num_processes
        seed = np.random.SeedSequence((config.seed, self.step, 1)).generate_state(1, np.uint64)
        self.generator.manual_seed(int(seed[0] >> 1))
        uniform = torch.rand(3, num_micro * all_size, generator=self.generator, device=self.device)
        timesteps = self._draw_timesteps(uniform[0])
        for micro in range(num_micro):
            images, labels = next(batches)
            noise = torch.randn(all_size, *images.shape[1:], generator=self.generator, device=self.device)
            noise = noise[accelerator.process_index * size :][:size]
            start = micro * all_size + accelerator.process_index * size
            rows = slice(start, start + size)

            clean = to_model_range(images)
            if config.random_flip:
                clean = torch.where((uniform[1, rows] < 0.5)[:, None, None, None], clean.flip(-1), clean)
            clean = clean.contiguous(memory_format=self.memory_format)
            labels = self._with_dropout(labels, uniform[2, rows])
            with accelerator.accumulate(self.model):
                losses = score_matching_loss(
                    self.model, self.scheduler, clean, noise, timesteps[rows], labels, config.loss_weighting
                )
                loss = losses.mean()
                # A loss that is not finite makes its gradient so, which all processes share.
                accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
                if accelerator.sync_gradients:
                    self._skip_unless_finite(accelerator.clip_grad_norm_(self.weights, config.max_grad_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()

            losses = losses.detach()
            bins, finite = self._bins(timesteps[rows]), losses.isfinite()
            sums = torch.stack([torch.where(finite, losses, 0.0), finite, ~finite])
            self.level_losses.index_add_(1, bins, sums)
            self.losses[self.step] += loss.detach() / num_micro
        self.lr_scheduler.step()
        self.step += 1
        if config.use_ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, 1 - self._ema_decay())

    def _skip_unless_finite(self, grad_norm: torch.Tensor) -> None:
        """Have the optimizer leave out a step whose gradient is not finite, which the device alone knows of."""
        broken = ~grad_norm.isfinite()
        self.grad_norm = torch.where(broken, self.grad_norm, grad_norm)
        self.skipped = torch.stack([self.skipped[0] + broken, (self.skipped[1] + 1) * broken])
        self.optimizer.optimizer.found_inf = broken.float()  # as a GradScaler sets it, which does so for fp16

    def _draw_timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        config = self.config
        return draw_timesteps(
            self.scheduler,
            stratified(uniform),
            config.noise_distribution,
            config.log_sigma_mean,
            config.log_sigma_std,
        )

    def _with_dropout(self, labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor | None:
        if self.num_classes is None:
            return None
        return torch.where(uniform < self.config.class_dropout_prob, self.num_classes, labels)

    def _ema_decay(self) -> float:
        config = self.config
        return min(config.ema_max_decay, 1 - (1 + self.step / config.ema_inv_gamma) ** -config.ema_power)

    def _bins(self, timesteps: torch.Tensor) -> torch.Tensor:
        low, high = self.log_range
        log_sigma = self.scheduler.t_to_sigma(timesteps).log()
        return ((log_sigma - low) * (_LEVEL_BINS / (high - low))).long().clamp(0, _LEVEL_BINS - 1)

    def _all_hear(self, interrupt: threading.Event) -> bool:
        """Whether to stop, on which all processes must agree: one that goes on alone waits for the others for ever."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return interrupt.is_set()
        if self.device.type != "cpu" and self.step % _LOGGING_STEPS:  # there it makes the host wait for the device
            return False
        flag = torch.tensor(float(interrupt.is_set()), device=self.device)
        return accelerator.reduce(flag, "sum").item() > 0

    # What is written while it runs

    def _log(self) -> float:
        """
        Write the last steps' figures to log.jsonl and the trackers; the mean loss of the last 20 steps, as far as it
        is finite.
        """
        accelerator = self.accelerator
        window = slice(max(0, self.step - _LOGGING_STEPS), self.step)
        sums = accelerator.reduce(torch.cat([self.level_losses.flatten(), self.losses[window]]), "sum")
        self.losses[window] = sums[3 * _LEVEL_BINS :] / accelerator.num_processes
        sums, recent = sums.cpu(), self.losses[window].cpu()
        losses, counts, broken = sums[: 3 * _LEVEL_BINS].reshape(3, _LEVEL_BINS)
        self.level_losses.zero_()
        edges = np.exp(np.linspace(*self.log_range, _LEVEL_BINS + 1))
        names = [f"{low:.2g} to {high:.2g}" for low, high in pairwise(edges)]
        skipped, in_a_row = self.skipped.tolist()
        if skipped > self.skipped_before and accelerator.is_main_process:
            tqdm.write(f"Steps skipped, as their gradient was not finite: {skipped - self.skipped_before}.")
        self.skipped_before = skipped
        if in_a_row >= min(_MAX_SKIPPED_IN_A_ROW, self.num_steps):
            levels = ", ".join(name for name, count in zip(names, broken, strict=True) if count)
            raise FloatingPointError(
                f"The gradient was not finite at {in_a_row} steps in a row, up to step {self.step}"
                f"{f', nor the loss at noise levels sigma {levels}' if levels else ''}. {self._last_good()}"
            )
        start, start_step = self.clock
        total = self.config.train_batch_size * self.config.gradient_accumulation_steps * accelerator.num_processes
        loss = recent[recent.isfinite()].mean().item()
        record = {"step": self.step}
        if math.isfinite(loss):
            record["loss"] = loss
        record |= {
            "learning_rate": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": float(self.grad_norm),
            "skipped_steps": skipped,
            "images_per_second": (self.step - start_step) * total / (time.perf_counter() - start),
        }
        if self.steps_per_epoch:
            record["epoch"] = self.step / self.steps_per_epoch
        if self.config.use_ema:
            record["ema_decay"] = self._ema_decay()
        record |= {
            f"loss at sigma {name}": (loss / count).item()
            for name, loss, count in zip(names, losses, counts, strict=True)
            if count
        }
        self._write(record)
        self.clock = time.perf_counter(), self.step
        return loss

    def _last_good(self) -> str:
        return (
            f"The last good checkpoint is {latest_checkpoint(self.output_dir) or 'none'}; a lower `learning_rate` or "
            "`mixed_precision`='no' may help."
        )

    def _is_finite(self) -> bool:
        """Whether weights, their averages and the optimizer's moments are finite, in all processes."""
        moments = [s[name] for s in self.optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        tensors = [*self.weights, *self.averages, *moments]
        broken = torch.stack([~tensor.detach().isfinite().all() for tensor in tensors]).any().float()
        return self.accelerator.reduce(broken, "sum").item() == 0

    def _check_finite(self) -> None:
        if not self._is_finite():
            raise FloatingPointError(
                f"The weights, or the optimizer's moments, are not finite at step {self.step}, and are not saved. "
                f"{self._last_good()}"
            )

    def _start_log(self) -> None:
        if not self.accelerator.is_main_process:
            return
        config = asdict(self.config)
        (self.output_dir / "training_config.json").write_text(json.dumps(config, indent=2) + "\n")
        path = self.output_dir / "log.jsonl"
        # a run that goes on from a checkpoint takes the steps after it once more
        lines = path.read_text().splitlines() if path.exists() and self.step else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        if self.changes:
            kept.append(json.dumps({"step": self.step, "changed_settings": self.changes}))
        path.write_text("".join(line + "\n" for line in kept))
        if self.config.logger:
            plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
            self.accelerator.init_trackers("ncsn", plain)

    def _write(self, record: dict) -> None:
        with _warning("The trackers' record"):
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
        if self.accelerator.is_main_process:
            with _warning("log.jsonl"), open(self.output_dir / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    @torch.no_grad()
    def _make_pipeline(self, to_save: bool = False) -> NCSNPipeline:
        """
        The pipeline of the weights that count: with the trainer's own network, to draw with, or with a copy whose
        weights are contiguous, as diffusers 0.32 saves no others.
        """
        if not self.config.use_ema:
            torch._foreach_copy_(self.averages, self.weights)
        unet = self.eval_unet
        if to_save:
            unet = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
        return NCSNPipeline(unet=unet, scheduler=self.scheduler)

    def _evaluate(self, pipeline: NCSNPipeline, path: Path) -> None:
        """Draw a grid of samples to `path`, report the validation loss; every process does its share."""
        images = None
        try:
            images = self._draw(pipeline)
        except FloatingPointError as failure:  # the weights are finite, and may get better
            self.accelerator.print(f"{path.name} could not be drawn: {failure}")
        if images is not None and self.accelerator.is_main_process:
            grid = _enlarge(make_grid(pipeline.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy())))
            with _warning(path.name):
                grid.save(path)
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    with _warning("The trackers' record"):
                        tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=self.step, **layout)
        if self.validation is not None:
            self._write({"step": self.step, "validation_loss": self._validation_loss()})

    def _draw(self, pipeline: NCSNPipeline) -> torch.Tensor:
        """The grid's pictures, (eval_batch_size, channels, height, width) in [0, 1], however many processes draw."""
        accelerator, num = self.accelerator, self.config.eval_batch_size
        pipeline.set_progress_bar_config(
            desc="Sampling", unit="step", leave=False, disable=not accelerator.is_main_process
        )
        # Rounded up, so that all draw equally many, for the collective
        mine = [
            i * accelerator.num_processes + accelerator.process_index
            for i in range(-(-num // accelerator.num_processes))
        ]
        arguments = {"batch_size": len(mine)}
        if self.num_classes is not None:
            arguments = {"class_labels": [i % self.num_classes for i in mine]}
        generators = [torch.Generator().manual_seed(self.config.seed + i) for i in mine]
        with self._together():
            images = pipeline(**arguments, generator=generators, output_type="pt").images
        images = accelerator.gather(images).reshape(accelerator.num_processes, len(mine), *images.shape[1:])
        return images.transpose(0, 1).flatten(0, 1)[:num]

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The loss of the weights that would be saved, with the same levels and noise each time."""
        config, accelerator, data = self.config, self.accelerator, self.validation
        total = torch.zeros((), device=self.device)
        for chunk in range(accelerator.process_index, math.ceil(len(data) / _EVAL_CHUNK), accelerator.num_processes):
            rows = slice(chunk * _EVAL_CHUNK, (chunk + 1) * _EVAL_CHUNK)
            images = to_model_range(data.images[rows])
            self.generator.manual_seed(chunk)
            uniform = torch.rand(len(images), generator=self.generator, device=self.device)
            noise = torch.randn(images.shape, generator=self.generator, device=self.device)
            timesteps = self._draw_timesteps(uniform)
            labels = None if self.num_classes is None else data.labels[rows]
            with accelerator.autocast():
                total += score_matching_loss(
                    self.eval_unet, self.scheduler, images, noise, timesteps, labels, config.loss_weighting
                ).sum()
        return accelerator.reduce(total, "sum").item() / len(data)

    # Checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint holds beside weights, optimizer and schedule."""
        return {
            "step": self.step,
            "losses": self.losses[: self.step].cpu(),
            "skipped": self.skipped.cpu(),
            "positions": self.positions,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where [`Trainer.state_dict`] was taken."""
        self.step = state["step"]
        self.losses[: self.step] = state["losses"][: self.num_steps].to(self.device)
        if "skipped" in state:  # checkpoints of version 0.1 have none
            self.skipped = state["skipped"].to(self.device)
            self.skipped_before = int(self.skipped[0])
        positions = state["positions"]
        if positions is not None:
            if len(positions) != self.accelerator.num_processes:
                raise ValueError(
                    f"`streaming`: the checkpoint knows how far each of {len(positions)} processes has read, and now "
                    f"there are {self.accelerator.num_processes}."
                )
            self.images.position = positions[self.accelerator.process_index]

    def _save_checkpoint(self) -> None:
        """
        Write the run's state aside and rename it when it is complete, so that a folder checkpoint-STEP is a whole one
        at any moment. A checkpoint that cannot be written costs a warning, not the run.
        """
        self._check_finite()
        accelerator, folder = self.accelerator, aside(self.output_dir, self.step)
        self.positions = gather_object([self.images.position]) if self.config.streaming else None
        try:
            with self._together():
                accelerator.save_state(folder)
            with self._together():
                if accelerator.is_main_process:
                    manifest = {"step": self.step, "config": asdict(self.config)}
                    complete(self.output_dir, self.step, manifest, self.config.checkpoints_total_limit)
        except _CANNOT_WRITE as failure:
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                tqdm.write(
                    f"The checkpoint of step {self.step} could not be written: {failure}. The last good one is "
                    f"{latest_checkpoint(self.output_dir)}; the training goes on."
                )

    def _resume(self, checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        now = json.loads(json.dumps(asdict(self.config)))
        before = manifest["config"]
        self.changes = {
            name: {"before": value, "now": now.get(name)}
            for name, value in before.items()
            if value != now.get(name) and name not in _HARMLESS
        }
        for name in _MEANING:
            if name in self.changes:
                raise ValueError(
                    f"`{name}`: the network of {checkpoint} was trained with {before[name]!r}, and cannot go on with "
                    f"{now[name]!r}."
                )
        changes = "; ".join(f"{name}: {change['before']} → {change['now']}" for name, change in self.changes.items())
        if changes:
            self.accelerator.print(f"Going on with other settings than before: {changes}.")
        if manifest["step"] > self.num_steps:
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} has {manifest['step']} steps behind it, more than the "
                f"{self.num_steps} of the run; more `num_epochs` or `max_train_steps` let it go on."
            )
        try:
            self.accelerator.load_state(checkpoint)
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} holds another network than these settings make. {changes}"
            ) from error
        if not self._is_finite():
            raise ValueError(
                f"`resume_from_checkpoint`: {checkpoint} holds weights that are not finite; go on from an earlier one."
            )
        self._apply_settings()
        if self.config.use_ema and not before.get("use_ema", True):
            with torch.no_grad():
                torch._foreach_copy_(self.averages, self.weights)  # those of the checkpoint are of no step
        self.accelerator.print(f"Going on from {checkpoint}.")

    def _apply_settings(self) -> None:
        """Let AdamW and the schedule follow the config, and not the one whose state has been loaded."""
        schedule, settings = self.lr_scheduler, self._adamw_settings()
        schedule.base_lrs = [settings["lr"]] * len(self.optimizer.param_groups)
        for group, factor in zip(self.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=settings["lr"] * factor(self.step))
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


_REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)
# Settings by which a network's input and output are understood: with others it is another network
_MEANING = ("num_train_timesteps", "sigma_min", "sigma_max", "prediction_type", "conditioning")
# Settings that may change between one part of a run and the next without a word
_HARMLESS = (
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


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one acts as ever."""
    interrupt = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield interrupt
        return

    def handle(number, _):
        signal.signal(number, previous[number])
        interrupt.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _warning(name: str) -> Iterator[None]:
    """A file that the run can do without costs a warning where it cannot be written."""
    try:
        yield
    except _CANNOT_WRITE as failure:
        tqdm.write(f"{name} could not be written: {failure}.")


def _mixed_precision(config: TrainingConfig) -> str:
    if config.mixed_precision is not None:
        return config.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" also where nobody has chosen
    if launched == "no" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return launched


def _check_logger(logger: str | None) -> str | None:
    available = sorted(map(str, get_available_trackers()))
    if logger not in (None, "all", *available):
        raise ValueError(
            f"`logger`={logger!r} needs a package that is not installed; at hand are: {', '.join(available) or 'none'}."
        )
    return logger


def _choose_noise_levels(config: TrainingConfig, images) -> dict:
    """The ladder's size and ends, where "auto" asks for it from the data."""
    sigma_max, num_levels = config.sigma_max, config.num_train_timesteps
    if sigma_max == "auto":
        sigma_max = choose_sigma_max(images.sample(_AUTO_IMAGES))
    if num_levels == "auto":
        num_levels = choose_num_train_timesteps(config.sigma_min, sigma_max, math.prod(images.shape))
    return {"num_train_timesteps": num_levels, "sigma_min": config.sigma_min, "sigma_max": sigma_max}


def _enlarge(grid: Image.Image) -> Image.Image:
    enlargement = max(1, 512 // grid.width)  # small pictures are hard to judge by eye
    return grid.resize((grid.width * enlargement, grid.height * enlargement), Image.Resampling.NEAREST)


def _save_loss_curve(losses: torch.Tensor, weighting: str, path: Path) -> None:
    window, smooth = max(1, len(losses) // 50), losses
    if len(losses):
        finite = losses.isfinite()  # a loss that is not would take its whole window away
        sums = torch.stack([torch.where(finite, losses, 0.0), finite.float()])
        smooth, share = torch.nn.functional.avg_pool1d(sums[:, None], window, stride=1)[:, 0]
        smooth = smooth / share
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", alpha=0.25, label="each step")
    axes.plot(range(window // 2, window // 2 + len(smooth)), smooth, color="tab:blue", label=f"mean of {window} steps")
    weight = "½ (1 + sigma²)" if weighting == "edm" else "½"
    axes.set(xlabel="step", ylabel=f"{weight} ‖sigma score + z‖² a dimension", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
