"""
The training loop, under accelerate.

[`Trainer`] reads from top to bottom: what is set up before the loop, the loop, one step of it, the log, the evaluation,
the checkpoints. They share one state, so they are one file. The settings are in config.py, the network in network.py,
the data in images.py.

Everything random in a step (levels, noise, flips, dropped labels) depends only on the seed and the number of the step.
It is drawn for the whole batch of all processes, and each process takes its part. So two processes with half the batch
each follow one with the whole batch, and a run that resumes from a checkpoint equals one that never stopped.
"""

import copy
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ..hub.loading import NCSNPipeline
from ..hub.upload import BackgroundPush
from ..hub.weights import WEIGHTS
from ..images import class_columns, to_model_range, to_pil, to_uint8
from ..precision import fast_memory_format
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..score_matching import draw_timesteps, score_matching_loss, stratified
from . import checkpoints
from .config import FIXED_SETTINGS, TrainingConfig, changed_settings
from .images import choose_noise_levels, open_training_images, open_validation_images
from .log import CANNOT_WRITE, LossPerLevel, RunLog, save_loss_curve, warn_unless_written
from .network import check_size, describe_choice, make_network
from .processes import interrupts, make_accelerator, together

_EVALUATIONS = 50  # of the network, by which the saved pipeline draws, as any pipeline where nothing else is said
_LOGGING_STEPS = 20  # between two looks at the loss, each of which waits for the device
_COMPILING_PAYS_STEPS = 1000  # compiling takes about a minute
_EVAL_CHUNK = 64  # images whose validation loss is computed together: the result must not depend on the batch size
_MAX_SKIPPED_IN_A_ROW = 20  # fp16's loss scale is halved at each of them: after 20 any would fit


def train(config: TrainingConfig) -> NCSNPipeline:
    """
    Train as `config` says, save the pipeline, samples.png and loss.png in `config.output_dir`, return the pipeline.

    An interrupt (Ctrl-C or SIGTERM) ends training early and saves a checkpoint and the pipeline. A step whose gradient
    is not finite changes no weights; `skipped_steps` in log.jsonl counts these steps.

    Raises:
        ValueError: a setting does not fit the data, another setting, or the checkpoint to resume from.
        OSError: `output_dir` cannot be written to, or its disk is too full for the run.
        BlockingIOError: another process is training in `output_dir`.
        FileExistsError: `output_dir` holds a pipeline or checkpoints, and neither `overwrite_output_dir` nor
            `resume_from_checkpoint` is given.
        FloatingPointError: 20 gradients in a row are not finite, or the weights are not.
    """
    return Trainer(config).train()


class Trainer:
    """
    One training run. [`train`] makes one and calls [`Trainer.train`].

    Args:
        config ([`TrainingConfig`]): the run's settings.
    """

    def __init__(self, config: TrainingConfig):
        self.accelerator = make_accelerator(config)
        # what was chosen is recorded with the run, and kept by one that resumes
        self.config = config = replace(config, mixed_precision=self.accelerator.mixed_precision)
        self.device = self.accelerator.device
        self.output_dir = Path(config.output_dir)
        self.log = RunLog(self.accelerator, self.output_dir)
        self.lock = None
        try:
            self.checkpoint = self._prepare_output_dir()
            self.uploads = self._prepare_uploads()
            self._open_images()
            self._make_models()
            self._clear_output_dir()  # only now that the data and settings are found good
            with together(self.accelerator):
                self._check_disk()
        except BaseException:
            self._unlock()  # the process of a notebook lives on
            raise

    # Before the loop

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def _prepare_output_dir(self) -> Path | None:
        """Lock the output folder; the checkpoint to resume from, if any."""
        config, folder = self.config, self.output_dir
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                self.lock = checkpoints.lock(folder)  # first, since another run may change what is found
        wanted = config.resume_from_checkpoint
        checkpoint = checkpoints.find(wanted, folder)
        if wanted not in (None, "latest") and not checkpoints.is_complete(checkpoint):
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
        return checkpoint

    def _clear_output_dir(self) -> None:
        """Delete what this run replaces."""
        folder = self.output_dir
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                if self.checkpoint is None:
                    checkpoints.remove_all(folder)
                    for path in (folder / "loss.png", folder / "samples.png", *folder.glob("samples-*.png")):
                        path.unlink(missing_ok=True)  # an upload would show them as those of this run
                checkpoints.remove_incomplete(folder)

    def _prepare_uploads(self) -> BackgroundPush | None:
        config, uploads = self.config, None
        with together(self.accelerator):
            if config.push_to_hub and self.accelerator.is_main_process:
                repo_id = config.hub_model_id or self.output_dir.resolve().name
                uploads = BackgroundPush(repo_id, self.output_dir, private=config.hub_private_repo or None)
        return uploads

    def _open_images(self) -> None:
        config = self.config
        if config.resolution is not None:
            check_size(config, config.resolution, config.resolution)  # before the data are read
        self.images, classes = open_training_images(config, self.accelerator)
        self.num_classes, self.class_names = (classes.number, classes.names) if classes else (None, None)
        self.validation = open_validation_images(config, self.accelerator, self.images.shape, classes)
        self.num_steps, self.steps_per_epoch = config.max_train_steps, None
        if not config.streaming:
            total = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
            self.steps_per_epoch = len(self.images) // total
            if self.steps_per_epoch < 1:
                raise ValueError(
                    f"`train_batch_size`={config.train_batch_size} on {self.accelerator.num_processes} process(es), "
                    f"times `gradient_accumulation_steps`={config.gradient_accumulation_steps}, is more than the "
                    f"{len(self.images)} images of the data set."
                )
            self.num_steps = self.num_steps or self.steps_per_epoch * config.num_epochs

    def _make_models(self) -> None:
        config, accelerator = self.config, self.accelerator
        # A run that resumes keeps the levels that were chosen, even if images have been added since.
        before = {} if self.checkpoint is None else checkpoints.read_manifest(self.checkpoint)
        levels = before.get("noise_levels") or choose_noise_levels(config, self.images)  # version 0.1 kept none
        self.scheduler = AnnealedLangevinScheduler(
            **levels,
            **self._sampler_settings(levels["num_train_timesteps"]),
            prediction_type=config.prediction_type,
            conditioning=config.conditioning,
        )
        set_seed(config.seed)  # after the data is opened: data loaders draw from the same generator
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.memory_format = fast_memory_format(self.device, dtype, len(self.images.shape) - 1)
        unet = make_network(config, self.scheduler, self.images.shape, self.num_classes)
        accelerator.print(describe_choice(config, *self.images.shape[1:]))
        unet = unet.to(self.device, memory_format=self.memory_format)
        # What is sampled, evaluated and saved: the moving average, or else the weights, copied when needed.
        self.eval_unet = copy.deepcopy(unet).eval().requires_grad_(False)
        if accelerator.num_processes == 1:
            # In training mode these blocks copy their input to the other layout and back, for DistributedDataParallel's
            # sake. Nothing else in them depends on the mode: dropout is a module of its own.
            for block in unet.modules():
                if isinstance(block, ResnetBlock2D):
                    block.training = False
        self.compiled = config.compile
        if self.compiled is None:
            on_gpu = self.device.type == "cuda" and config.architecture == "unet"
            self.compiled = on_gpu and self.num_steps >= _COMPILING_PAYS_STEPS
        if self.compiled:
            # CUDA graphs reuse the memory of gradients that accumulate or wait for other processes
            alone = accelerator.num_processes == config.gradient_accumulation_steps == 1
            unet.compile(mode="reduce-overhead" if alone else "default", dynamic=False)
        self.unet = unet
        self.weights, self.averages = list(unet.parameters()), list(self.eval_unet.parameters())
        optimizer = torch.optim.AdamW(unet.parameters(), **self._adamw_settings(), fused=True)
        # Counts optimizer steps; prepared by accelerate, it would advance once for each process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.num_steps
        )
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler, self.eval_unet, self)

        self.step, self.positions = 0, None
        self.changes = {}  # of the settings, since the checkpoint
        self.losses = torch.zeros(self.num_steps, device=self.device)
        self.generator = torch.Generator(self.device)
        self.level_losses = LossPerLevel(self.scheduler, self.device)
        # Number of steps whose gradient was not finite: in all, and since the last one that was. Read only for the log.
        self.skipped = torch.zeros(2, dtype=torch.long, device=self.device)
        self.skipped_before = 0
        self.grad_norm = torch.zeros((), device=self.device)

    def _knows_few_levels_only(self, num_levels: int) -> bool:
        """Whether the network was trained on a few levels, far from each other, and must not be asked in between."""
        config = self.config
        return config.architecture == "ncsn" and config.noise_distribution == "uniform" and num_levels < _EVALUATIONS

    def _sampler_settings(self, num_levels: int) -> dict:
        """The scheduler's settings that the saved pipeline draws with: of few levels each takes several steps."""
        if not self._knows_few_levels_only(num_levels):
            return {}
        return {"rho": None, "num_langevin_steps": _EVALUATIONS // max(1, num_levels)}  # the scheduler checks it

    def _adamw_settings(self) -> dict:
        config = self.config
        return {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
        }

    def _check_disk(self) -> None:
        """Raise an OSError now if the run's checkpoints would not fit on the disk."""
        config = self.config
        weights = 4 * sum(p.numel() for p in self.weights)
        # weights, their average and AdamW's two moments; an old checkpoint is deleted after the new one is written
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
        with together(self.accelerator):
            self.log.start(config, self.step, self.changes)
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
        with interrupts() as interrupt:
            self.clock = time.perf_counter(), self.step
            while self.step < self.num_steps and not (stopped := self._any_interrupted(interrupt)):
                self.training_step(batches)
                progress.update()
                last = self.step == self.num_steps
                checkpoint = config.checkpointing_steps and self.step % config.checkpointing_steps == 0
                evaluate = config.eval_steps and self.step % config.eval_steps == 0 and not last
                if checkpoint or evaluate or last or self.step % _LOGGING_STEPS == 0:
                    progress.set_postfix(loss=f"{self._write_log():.4f}")
                if checkpoint:
                    self._save_checkpoint()
                    saved_step = self.step
                    if self.uploads is not None and not last:
                        self.uploads.push(self._make_pipeline(to_save=True), f"Step {self.step}")
                if evaluate:
                    self._evaluate(f"samples-{self.step}.png")
                if checkpoint or evaluate:
                    self.clock = time.perf_counter(), self.step  # the throughput is that of training alone
        progress.close()
        if stopped:
            accelerator.print(f"\nInterrupted after {self.step} of {self.num_steps} steps; saving.")
            if self.step > self.clock[1]:
                self._write_log()  # what is not finite must not be saved
        if config.checkpointing_steps and self.step > saved_step:
            self._save_checkpoint()

        self._check_finite()
        pipeline = self._make_pipeline(to_save=True)
        with together(self.accelerator):
            if accelerator.is_main_process:
                try:
                    checkpoints.replace_files(self.output_dir, pipeline.save_pretrained, WEIGHTS)
                except CANNOT_WRITE as failure:
                    raise OSError(
                        f"`output_dir`={config.output_dir!r}: the pipeline could not be written: {failure}. Make room, "
                        "and go on with --resume_from_checkpoint latest; the last good checkpoint is "
                        f"{checkpoints.latest(self.output_dir)}."
                    ) from failure
        if accelerator.is_main_process:
            with warn_unless_written("loss.png"):
                save_loss_curve(self.losses[: self.step].cpu(), config.loss_weighting, self.output_dir / "loss.png")
        self._evaluate("samples.png")
        accelerator.print(f"Saved the pipeline, samples.png and loss.png in {self.output_dir}.")
        if self.uploads is not None:
            self.uploads.push(pipeline, "End of training")
            self.uploads.finish()
        accelerator.end_training()
        pipeline.unet.requires_grad_(True)  # as for any network that is loaded
        return pipeline

    def training_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Take one optimizer step. The host never waits for the device here.

        Args:
            batches (iterator of `torch.Tensor` pairs):
                uint8 images of shape `(train_batch_size, channels, height, width)`, and labels; a step takes
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
                # If the loss is not finite neither is its gradient, which all processes see.
                accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
                if accelerator.sync_gradients:
                    self._skip_unless_finite(accelerator.clip_grad_norm_(self.weights, config.max_grad_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()

            self.level_losses.add(timesteps[rows], losses.detach())
            self.losses[self.step] += loss.detach() / num_micro
        self.lr_scheduler.step()
        self.step += 1
        if config.use_ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, 1 - self._ema_decay())

    def _skip_unless_finite(self, grad_norm: torch.Tensor) -> None:
        """Have the optimizer skip a step whose gradient is not finite; the host need not know."""
        broken = ~grad_norm.isfinite()
        self.grad_norm = torch.where(broken, self.grad_norm, grad_norm)
        self.skipped = torch.stack([self.skipped[0] + broken, (self.skipped[1] + 1) * broken])
        self.optimizer.optimizer.found_inf = broken.float()  # as a GradScaler does for fp16

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

    def _any_interrupted(self, interrupt: threading.Event) -> bool:
        """Whether any process was interrupted: they must stop together, or one would wait for the others forever."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return interrupt.is_set()
        if self.device.type != "cpu" and self.step % _LOGGING_STEPS:  # a GPU would be waited for
            return False
        flag = torch.tensor(float(interrupt.is_set()), device=self.device)
        return accelerator.reduce(flag, "sum").item() > 0

    # The log, and whether the weights are finite

    def _write_log(self) -> float:
        """Write a record to log.jsonl and the trackers; the mean of the finite losses of the last 20 steps."""
        accelerator = self.accelerator
        window = slice(max(0, self.step - _LOGGING_STEPS), self.step)
        self.losses[window] = accelerator.reduce(self.losses[window], "mean")
        recent = self.losses[window].cpu()
        level_losses, broken_levels = self.level_losses.collect(accelerator)
        skipped, in_a_row = self.skipped.tolist()
        if skipped > self.skipped_before and accelerator.is_main_process:
            tqdm.write(f"Steps skipped, as their gradient was not finite: {skipped - self.skipped_before}.")
        self.skipped_before = skipped
        if in_a_row >= min(_MAX_SKIPPED_IN_A_ROW, self.num_steps):
            levels = f", nor the loss at noise levels sigma {', '.join(broken_levels)}" if broken_levels else ""
            raise FloatingPointError(
                f"The gradient was not finite at {in_a_row} steps in a row, up to step {self.step}{levels}. "
                f"{self._last_good()}"
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
        self.log.write(record | {f"loss at sigma {name}": value for name, value in level_losses.items()})
        self.clock = time.perf_counter(), self.step
        return loss

    def _last_good(self) -> str:
        return (
            f"The last good checkpoint is {checkpoints.latest(self.output_dir) or 'none'}; a lower `learning_rate` or "
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

    # Evaluation

    @torch.no_grad()
    def _make_pipeline(self, to_save: bool = False) -> NCSNPipeline:
        """
        The pipeline of the averaged weights, or of the weights themselves without `use_ema`. To draw with, it shares
        the trainer's network; to save, it has a copy with contiguous weights, since diffusers 0.32 saves no others.
        """
        if not self.config.use_ema:
            torch._foreach_copy_(self.averages, self.weights)
        unet = self.eval_unet
        if to_save:
            unet = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
        num_levels = len(self.scheduler)
        num_inference_steps = num_levels if self._knows_few_levels_only(num_levels) else _EVALUATIONS
        return NCSNPipeline(unet=unet, scheduler=self.scheduler, num_inference_steps=num_inference_steps)

    def _evaluate(self, name: str) -> None:
        """Save a grid of samples under this name and log the validation loss; every process does its share."""
        pipeline = self._make_pipeline()
        try:
            images = self._draw(pipeline)
        except FloatingPointError as failure:  # the weights are finite, and may get better
            self.accelerator.print(f"{name} could not be drawn: {failure}")
        else:
            self.log.write_samples(to_pil(to_uint8(images)), class_columns(self.num_classes), name, self.step)
        if self.validation is not None:
            self.log.write({"step": self.step, "validation_loss": self._validation_loss()})

    def _draw(self, pipeline: NCSNPipeline) -> torch.Tensor:
        """Samples `(eval_batch_size, channels, height, width)` in [0, 1], the same for any number of processes."""
        accelerator, num = self.accelerator, self.config.eval_batch_size
        pipeline.set_progress_bar_config(
            desc="Sampling", unit="step", leave=False, disable=not accelerator.is_main_process
        )
        # Rounded up: the collective needs equally many from all
        mine = [
            i * accelerator.num_processes + accelerator.process_index
            for i in range(-(-num // accelerator.num_processes))
        ]
        arguments = {"batch_size": len(mine)}
        if self.num_classes is not None:
            arguments = {"class_labels": [i % self.num_classes for i in mine]}
        generators = [torch.Generator().manual_seed(self.config.seed + i) for i in mine]
        with together(self.accelerator):
            images = pipeline(**arguments, generator=generators, output_type="pt").images
        images = accelerator.gather(images).reshape(accelerator.num_processes, len(mine), *images.shape[1:])
        return images.transpose(0, 1).flatten(0, 1)[:num]

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The mean loss of the weights that would be saved, with the same levels and noise each time."""
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
        """What a checkpoint holds besides weights, optimizer and schedule."""
        return {
            "step": self.step,
            "losses": self.losses[: self.step].cpu(),
            "skipped": self.skipped.cpu(),
            "positions": self.positions,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up what [`Trainer.state_dict`] has returned."""
        self.step = state["step"]
        self.losses[: self.step] = state["losses"][: self.num_steps].to(self.device)
        if "skipped" in state:  # not in checkpoints of version 0.1
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

    def _order(self) -> dict[str, int | None]:
        """On what the order of the images depends, besides the settings."""
        num_images = None if self.config.streaming else len(self.images)
        return {"num_processes": self.accelerator.num_processes, "num_images": num_images}

    def _save_checkpoint(self) -> None:
        """Save a checkpoint. One that cannot be written costs a warning, not the run."""
        self._check_finite()
        accelerator = self.accelerator
        self.positions = gather_object([self.images.position]) if self.config.streaming else None
        try:
            with together(accelerator):
                folder = checkpoints.begin(self.output_dir, self.step)
                accelerator.save_state(folder)
            with together(accelerator):
                if accelerator.is_main_process:
                    manifest = {"step": self.step, "config": asdict(self.config)}
                    names = ("num_train_timesteps", "sigma_min", "sigma_max")
                    manifest["noise_levels"] = {name: self.scheduler.config[name] for name in names}
                    manifest |= self._order() | {"class_names": self.class_names}
                    checkpoints.commit(folder, manifest, self.config.checkpoints_total_limit)
        except CANNOT_WRITE as failure:
            if accelerator.is_main_process:
                checkpoints.remove_incomplete(self.output_dir)
                tqdm.write(
                    f"The checkpoint of step {self.step} could not be written: {failure}. The last good one is "
                    f"{checkpoints.latest(self.output_dir)}; the training goes on."
                )

    def _resume(self, checkpoint: Path) -> None:
        manifest = checkpoints.read_manifest(checkpoint)
        self.changes = changed_settings(manifest["config"], self.config)
        for name, now in self._order().items():
            if manifest.get(name, now) != now:  # version 0.1 kept none
                self.changes[name] = {"before": manifest[name], "now": now}
        for name in FIXED_SETTINGS:
            if name in self.changes:
                before, now = self.changes[name]["before"], self.changes[name]["now"]
                raise ValueError(
                    f"`{name}`: the network of {checkpoint} was trained with {before!r}, and cannot go on with {now!r}."
                )
        changes = "; ".join(f"{name}: {change['before']} → {change['now']}" for name, change in self.changes.items())
        if changes:
            self.accelerator.print(f"Going on with other settings than before: {changes}.")
        before = manifest.get("class_names") or self.class_names
        if before != self.class_names and len(before) == self.num_classes:  # with another number the weights do not fit
            raise ValueError(
                f"`resume_from_checkpoint`: the classes of {checkpoint} are {', '.join(before)}, and those of the data "
                f"are {', '.join(self.class_names or ['numbers'])}: their numbers would change their meaning."
            )
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
        if self.config.use_ema and not manifest["config"].get("use_ema", True):
            with torch.no_grad():
                torch._foreach_copy_(self.averages, self.weights)  # the checkpoint's are not averages
        self.accelerator.print(f"Going on from {checkpoint}.")
        last = checkpoints.latest(self.output_dir)
        if last is not None and checkpoints.read_manifest(last)["step"] > self.step:
            self.accelerator.print(f"Later checkpoints, up to {last}, are given up: the next one replaces them.")

    def _apply_settings(self) -> None:
        """Make AdamW and the schedule follow this run's settings, not those loaded with their state."""
        schedule, settings = self.lr_scheduler, self._adamw_settings()
        schedule.base_lrs = [settings["lr"]] * len(self.optimizer.param_groups)
        for group, factor in zip(self.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=settings["lr"] * factor(self.step))
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
