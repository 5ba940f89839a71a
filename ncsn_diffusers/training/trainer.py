"""
The training loop, under accelerate.

[`Trainer`] reads from top to bottom: what it is built of, the run, one step of it, the evaluation, the checkpoints.
They share one state, so they are in one file. The other files hold the settings (config.py), the network (network.py),
the data (data.py) and what is reported (log.py).

Everything random in a step (levels, noise, flips, dropped labels) depends only on the seed and the number of the step.
It is drawn for the whole batch of all processes, and each process takes its part. So two processes with half the batch
each follow one with the whole batch, and a run that resumes from a checkpoint equals one that never stopped.
"""

import copy
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ..atomic_files import CANNOT_WRITE, remove_incomplete
from ..data import LoadedImages, StreamedImages, read_labels
from ..denoiser import Denoiser
from ..hub.loading import NCSNPipeline
from ..hub.upload import BackgroundPush
from ..images import class_columns
from ..precision import fast_attention, fast_memory_format
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..score_matching import draw_sigmas, score_matching_loss, stratified
from ..sheets import sample_sheet
from ..units import Units
from . import checkpoints
from .config import FIXED_SETTINGS, TrainingConfig, changed_settings, record_given_data
from .data import Data, choose_noise_levels, open_training_data, open_validation_data
from .log import RunLog, StepStatistics, save_loss_curve, warn_unless_written
from .memory import check_disk, check_memory, find_parent
from .network import check_size, count_tokens, describe_choice, make_network
from .processes import interrupts, make_accelerator, together
from .starting_point import check_images, fill_settings, find_starting_point

_EVALUATIONS = 50  # of the network, by which the saved pipeline draws, as any pipeline where nothing else is said
_LOGGING_STEPS = 20  # between two looks at the loss, each of which waits for the device
_COMPILING_PAYS_STEPS = 1000  # compiling takes about a minute
_EVAL_CHUNK = 64  # images whose validation loss is computed together: the result must not depend on the batch size
_STOPPING = "Interrupted: ending the step, then saving a checkpoint and the pipeline. A second time ends at once."


def train(config: TrainingConfig, data: Any = None) -> NCSNPipeline:
    """
    Train as `config` says, save the pipeline, samples.png and loss.png in `config.output_dir`, return the pipeline.

    An interrupt (Ctrl-C or SIGTERM) ends training early: a checkpoint and the pipeline are saved, and no samples drawn.
    A step whose gradient is not finite changes no weights; `skipped_steps` in log.jsonl counts these steps.

    Args:
        config ([`TrainingConfig`]): the run's settings.
        data (`Any`, *optional*):
            What to train on, instead of the data that `config` names: arrays of shape (samples, channels, length),
            (samples, channels, height, width) or (samples, channels, depth, height, width), as a `torch.Tensor`, an
            `np.ndarray`, or an xarray DataArray, whose attribute `units` becomes `data_unit`; or a `datasets.Dataset`
            with a column of images or arrays.

    Raises:
        ValueError: a setting does not fit the data, another setting, the environment, the memory, the checkpoint to
            resume from or the pipeline to begin with.
        OSError: `output_dir` cannot be written to, or its disk is too full for the run.
        BlockingIOError: another process is training in `output_dir`.
        FileExistsError: `output_dir` holds a pipeline or checkpoints, and neither `overwrite_output_dir` nor
            `resume_from_checkpoint` is given.
        FloatingPointError: 20 gradients in a row are not finite, or the weights are not.
    """
    return Trainer(config, data).train()


class Trainer:
    """
    One training run. The constructor reads, checks and builds; nothing is written, deleted or created before
    [`Trainer.train`].

    Args:
        config ([`TrainingConfig`]): the run's settings.
        data (`Any`, *optional*): what to train on, instead of the data that `config` names; see [`train`].

    Raises:
        See [`train`].
    """

    def __init__(self, config: TrainingConfig, data: Any = None):
        config = record_given_data(config, data)
        self.accelerator = accelerator = make_accelerator(config)
        self.device = accelerator.device
        self.output_dir = Path(config.output_dir)
        # the precision that was chosen is recorded with the run, and kept by one that resumes
        config = replace(config, mixed_precision=accelerator.mixed_precision)

        # Where the run begins
        with together(accelerator):
            self._check_output_dir()
        self.checkpoint = self._find_checkpoint(config)
        manifest = None if self.checkpoint is None else checkpoints.read_manifest(self.checkpoint)
        self.uploads = self._find_repository(config)
        with accelerator.main_process_first():  # one process downloads
            self.starting_point = find_starting_point(config, manifest)
        if self.starting_point is not None:
            config = fill_settings(config, self.starting_point)
        self.config = config
        if manifest is not None:
            self._check_fixed_settings(manifest)

        # The data
        self._check_resolution()
        units = self._kept_units(manifest)
        self.images, classes = open_training_data(config, accelerator, data, units)
        self.num_classes, self.class_names = (classes.number, classes.names) if classes else (None, None)
        self.class_shares = count_classes(self.images, self.num_classes)
        self.validation = open_validation_data(config, accelerator, self.images, classes, data)
        self.steps_per_epoch = self._count_steps_per_epoch()
        self.num_steps = config.max_train_steps or self.steps_per_epoch * config.num_epochs

        # The network, and its moving average or else a copy made when needed, which is sampled, evaluated and saved
        self.scheduler = self._make_scheduler(manifest)
        self.unet = self._make_unet()
        self.num_tokens = count_tokens(self.unet.config.block_out_channels, *self.images.shape[1:])
        self.eval_unet = copy.deepcopy(self.unet).eval().requires_grad_(False)
        self.weights, self.averages = list(self.unet.parameters()), list(self.eval_unet.parameters())
        superseded = checkpoints.find_all(self.output_dir) if self.checkpoint is None else []
        check_disk(config, sum(p.numel() for p in self.weights), superseded)
        self.compiled = self._compile()
        optimizer = torch.optim.AdamW(self.unet.parameters(), **self._adamw_settings(), fused=True)
        # Counts optimizer steps; prepared by accelerate, it would advance once for each process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.num_steps
        )
        self.model, self.optimizer = accelerator.prepare(self.unet, optimizer)
        accelerator.register_for_checkpointing(self.lr_scheduler, self.eval_unet, self)

        # What changes during the run
        self.step, self.positions = 0, None
        self.generator = torch.Generator(self.device)
        self.statistics = StepStatistics(
            self.scheduler, self.num_steps, config.gradient_accumulation_steps, self.device
        )
        self.log = RunLog(accelerator, self.output_dir)
        self.interrupt = threading.Event()

    # What it is built of

    def _check_output_dir(self) -> None:
        """Whether it can be written to, and no other run uses it."""
        parent = find_parent(self.output_dir)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OSError(f"`output_dir`={str(self.output_dir)!r}: {parent} is no folder that can be written to.")
        if self.accelerator.is_main_process:
            checkpoints.check_unlocked(self.output_dir)

    def _find_checkpoint(self, config: TrainingConfig) -> Path | None:
        """The checkpoint to resume from, if any, in an output folder that this run may use."""
        wanted, folder = config.resume_from_checkpoint, self.output_dir
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

    def _check_fixed_settings(self, manifest: dict) -> None:
        """Whether the checkpoint with this manifest was trained with the settings that must stay as they are."""
        changed = changed_settings(manifest["config"], self.config)
        for name in FIXED_SETTINGS:
            if name in changed:
                before, now = changed[name]["before"], changed[name]["now"]
                raise ValueError(
                    f"`{name}`: the network of {self.checkpoint} was trained with {before!r}, and cannot go on with "
                    f"{now!r}."
                )

    def _find_repository(self, config: TrainingConfig) -> BackgroundPush | None:
        """What uploads to the repository, whose name and token are good. It need not exist yet."""
        uploads = None
        with together(self.accelerator):
            if config.push_to_hub and self.accelerator.is_main_process:
                repo_id = config.hub_model_id or self.output_dir.resolve().name
                uploads = BackgroundPush(repo_id, self.output_dir, private=config.hub_private_repo or None)
        return uploads

    def _kept_units(self, manifest: dict | None) -> Units | None:
        """The units of the run to go on with or of the pipeline to begin with, kept even if data have been added."""
        if manifest is not None:
            return Units(**manifest["units"])
        return None if self.starting_point is None else self.starting_point.units

    def _check_resolution(self) -> None:
        """Whether images of the side `resolution` fit the network and the memory, before they are read."""
        config, start = self.config, self.starting_point
        if config.resolution is None:
            return
        size = (config.resolution, config.resolution)
        if start is None:
            check_size(config, *size)
        if config.compile or (config.compile is None and self.device.type == "cuda"):
            return
        if start is None:
            shape = (config.channels or 1, *size)
            network = make_network(config, AnnealedLangevinScheduler(), shape)
        else:
            network, shape = start.network, (start.network.config.in_channels, *size)
        check_memory(config, self.accelerator, network.to(self.device), shape)

    def _count_steps_per_epoch(self) -> int | None:
        """Optimizer steps in a pass over the data, or `None` for a stream."""
        config = self.config
        if config.streaming:
            return None
        steps = len(self.images) // self._batch_size()
        if steps < 1:
            raise ValueError(
                f"`train_batch_size`={config.train_batch_size} on {self.accelerator.num_processes} process(es), "
                f"times `gradient_accumulation_steps`={config.gradient_accumulation_steps}, is more than the "
                f"{len(self.images)} images of the data set."
            )
        return steps

    def _batch_size(self) -> int:
        """Images in an optimizer step, of all processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def _make_scheduler(self, manifest: dict | None) -> AnnealedLangevinScheduler:
        config = self.config
        if self.starting_point is not None:
            check_images(self.starting_point, self.images.shape, self.num_classes)
            return self.starting_point.scheduler
        # A run that resumes keeps the levels that were chosen, even if images have been added since.
        levels = choose_noise_levels(config, self.images) if manifest is None else manifest["noise_levels"]
        return AnnealedLangevinScheduler(
            **levels,
            **self._sampler_settings(levels["num_train_timesteps"]),
            prediction_type=config.prediction_type,
            conditioning=config.conditioning,
        )

    def _make_unet(self) -> torch.nn.Module:
        config, accelerator = self.config, self.accelerator
        set_seed(config.seed)  # after the data is opened: data loaders draw from the same generator
        if self.starting_point is None:
            unet = make_network(config, self.scheduler, self.images.shape, self.num_classes)
            accelerator.print(describe_choice(config, *self.images.shape[1:]))
        else:
            unet = self.starting_point.network
        unet = unet.to(self.device, memory_format=self._memory_format())
        if accelerator.num_processes == 1:
            # In training mode these blocks copy their input to the other layout and back, for DistributedDataParallel's
            # sake. Nothing else in them depends on the mode: dropout is a module of its own.
            for block in unet.modules():
                if isinstance(block, ResnetBlock2D):
                    block.training = False
        return unet

    def _memory_format(self) -> torch.memory_format:
        return fast_memory_format(self.device, self._dtype(), len(self.images.shape) - 1)

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32

    def _compile(self) -> bool:
        """Compile the network if it is asked for, or pays; if not, check that a step fits in the memory."""
        config = self.config
        compiled = config.compile
        if compiled is None:
            on_gpu = self.device.type == "cuda" and config.architecture == "unet"
            compiled = on_gpu and self.num_steps >= _COMPILING_PAYS_STEPS
        if compiled:
            # CUDA graphs reuse the memory of gradients that accumulate or wait for other processes
            alone = self.accelerator.num_processes == config.gradient_accumulation_steps == 1
            self.unet.compile(mode="reduce-overhead" if alone else "default", dynamic=False)
        else:
            check_memory(config, self.accelerator, self.unet, self.images.shape)
        return compiled

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

    # The run

    def train(self) -> NCSNPipeline:
        """Run to the end, or until an interrupt; see [`train`]."""
        lock = self._take_output_dir()
        try:
            changes = {} if self.checkpoint is None else self._resume(self.checkpoint)
            with together(self.accelerator):
                self.log.start(self.config, self.step, changes)
                if self.uploads is not None:
                    self.uploads.create_repository()
            with interrupts(_STOPPING if self.accelerator.is_main_process else "") as self.interrupt:
                stopped = self._run_steps()
                return self._finish(stopped)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise ValueError(
                f"`train_batch_size`={self.config.train_batch_size} takes more memory than {self.device} has: choose "
                "a smaller one (`gradient_accumulation_steps` makes up for it), or a smaller `resolution` or network. "
                f"The last good checkpoint is {checkpoints.latest(self.output_dir) or 'none'}."
            ) from error
        finally:
            if lock is not None:
                lock.close()  # the process of a notebook lives on

    def _take_output_dir(self) -> IO | None:
        """Lock the output folder and delete what this run replaces."""
        lock, folder = None, self.output_dir
        try:
            with together(self.accelerator):
                if self.accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                    lock = checkpoints.lock(folder)
                    if self._find_checkpoint(self.config) != self.checkpoint:
                        raise OSError(
                            f"`output_dir`={self.config.output_dir!r} was changed by another run: start again."
                        )
                    if self.checkpoint is None:
                        checkpoints.remove_all(folder)
                        for path in (folder / "loss.png", folder / "samples.png", *folder.glob("samples-*.png")):
                            path.unlink(missing_ok=True)  # an upload would show them as those of this run
                    remove_incomplete(folder)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return lock

    def _run_steps(self) -> bool:
        """Take the steps up to the last, or up to an interrupt; whether it was one."""
        config, accelerator = self.config, self.accelerator
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
        saved = logged = self.step
        stopped = False
        self.statistics.restart_clock(self.step)
        while self.step < self.num_steps and not (stopped := self._stops_here()):
            self.training_step(batches)
            progress.update()
            last = self.step == self.num_steps
            checkpoint = config.checkpointing_steps and self.step % config.checkpointing_steps == 0
            evaluate = config.eval_steps and self.step % config.eval_steps == 0 and not last
            if checkpoint or evaluate or last or self.step % _LOGGING_STEPS == 0:
                progress.set_postfix(loss=f"{self._write_log():.4f}")
                logged = self.step
            if checkpoint:
                self._save_checkpoint()
                saved = self.step
                if self.uploads is not None and not last:
                    self.uploads.push(self._make_pipeline(to_save=True), f"Step {self.step}")
            if evaluate:
                self._evaluate(f"samples-{self.step}.png")
            if checkpoint or evaluate:
                self.statistics.restart_clock(self.step)  # the throughput is that of training alone
        progress.close()
        if stopped:
            accelerator.print(f"Interrupted after {self.step} of {self.num_steps} steps; saving.")
            if self.step > logged:
                self._write_log()  # what is not finite must not be saved
        if config.checkpointing_steps and self.step > saved:
            self._save_checkpoint()
        return stopped

    def _finish(self, stopped: bool) -> NCSNPipeline:
        """Save, show and upload the pipeline. After an interrupt nothing is drawn, because that takes a while."""
        config, accelerator = self.config, self.accelerator
        self._check_finite()
        pipeline = self._make_pipeline(to_save=True)
        with together(accelerator):
            if accelerator.is_main_process:
                try:
                    pipeline.save_pretrained(self.output_dir)
                except CANNOT_WRITE as failure:
                    raise OSError(
                        f"`output_dir`={config.output_dir!r}: the pipeline could not be written: {failure}. Make room, "
                        "and go on with --resume_from_checkpoint latest; the last good checkpoint is "
                        f"{checkpoints.latest(self.output_dir)}."
                    ) from failure
        if accelerator.is_main_process:
            with warn_unless_written("loss.png"):
                save_loss_curve(
                    self.statistics.losses[: self.step].cpu(), config.loss_weighting, self.output_dir / "loss.png"
                )
        if stopped:
            accelerator.print(
                f"Saved the pipeline in {self.output_dir}, without samples; --resume_from_checkpoint latest goes on."
            )
        else:
            self._evaluate("samples.png")
            accelerator.print(f"Saved the pipeline, samples.png and loss.png in {self.output_dir}.")
        if self.uploads is not None:
            self.uploads.push(pipeline, "End of training")
            accelerator.print(f"Waiting for the upload to {self.uploads.repo_id}.")
            self.uploads.finish()
        accelerator.end_training()
        pipeline.unet.requires_grad_(True)  # as for any network that is loaded
        return pipeline

    def training_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """
        Take one optimizer step. The host never waits for the device here.

        Args:
            batches (iterator of `torch.Tensor` pairs):
                Data of shape `(train_batch_size, channels, ...)`, as `self.images` has them, and labels; a step takes
                `gradient_accumulation_steps` of them.
        """
        config, accelerator = self.config, self.accelerator
        size, num_micro = config.train_batch_size, config.gradient_accumulation_steps
        all_size, memory_format = size * accelerator.num_processes, self._memory_format()
        seed = np.random.SeedSequence((config.seed, self.step, 1)).generate_state(1, np.uint64)
        self.generator.manual_seed(int(seed[0] >> 1))
        uniform = torch.rand(3, num_micro * all_size, generator=self.generator, device=self.device)
        sigmas = self._draw_sigmas(uniform[0])
        for micro in range(num_micro):
            images, labels = next(batches)
            noise = torch.randn(all_size, *images.shape[1:], generator=self.generator, device=self.device)
            noise = noise[accelerator.process_index * size :][:size]
            start = micro * all_size + accelerator.process_index * size
            rows = slice(start, start + size)

            clean = self.images.to_network(images)
            if config.random_flip:
                clean = torch.where((uniform[1, rows] < 0.5)[:, None, None, None], clean.flip(-1), clean)
            if clean.ndim == 4:  # other formats are those of maps alone
                clean = clean.contiguous(memory_format=memory_format)
            labels = self._with_dropout(labels, uniform[2, rows])
            with accelerator.accumulate(self.model):
                denoiser = Denoiser.of(self.model, self.scheduler, labels)
                with fast_attention(self.device, self._dtype(), self.num_tokens):
                    losses = score_matching_loss(denoiser, clean, noise, sigmas[rows], config.loss_weighting)
                loss = losses.mean()
                # If the loss is not finite neither is its gradient, which all processes see.
                accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(self.weights, config.max_grad_norm)
                    # The optimizer skips a step whose gradient is not finite; the host need not know.
                    self.optimizer.optimizer.found_inf = self.statistics.add_gradient(grad_norm).float()
                self.optimizer.step()
                self.optimizer.zero_grad()

            self.statistics.add_losses(self.step, sigmas[rows], losses.detach())
        self.lr_scheduler.step()
        self.step += 1
        if config.use_ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, 1 - self._ema_decay())

    def _draw_sigmas(self, uniform: torch.Tensor) -> torch.Tensor:
        config = self.config
        return draw_sigmas(
            self.scheduler.ladder,
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

    def _stops_here(self) -> bool:
        """Whether an interrupt ends the run before the next step."""
        if self.accelerator.num_processes > 1 and self.device.type != "cpu" and self.step % _LOGGING_STEPS:
            return False  # a GPU would be waited for
        return self._any_interrupted()

    def _any_interrupted(self) -> bool:
        """Whether any process was interrupted: they must stop together, or one would wait for the others forever."""
        if self.accelerator.num_processes == 1:
            return self.interrupt.is_set()
        flag = torch.tensor(float(self.interrupt.is_set()), device=self.device)
        return self.accelerator.reduce(flag, "sum").item() > 0

    def _write_log(self) -> float:
        """Write a record to log.jsonl and the trackers; its loss, or NaN if it has none."""
        try:
            record = self.statistics.collect(self.accelerator, self.step, _LOGGING_STEPS, self._batch_size())
        except FloatingPointError as failure:
            raise FloatingPointError(f"{failure} {self._last_good()}") from failure
        record["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        if self.steps_per_epoch:
            record["epoch"] = self.step / self.steps_per_epoch
        if self.config.use_ema:
            record["ema_decay"] = self._ema_decay()
        self.log.write(record)
        return record.get("loss", math.nan)

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
        return NCSNPipeline(unet=unet, scheduler=self.scheduler, **self._pipeline_settings())

    def _pipeline_settings(self) -> dict:
        """What the pipeline keeps beside network and scheduler."""
        num_inference_steps, num_levels = _EVALUATIONS, len(self.scheduler)
        if self.starting_point is not None:
            num_inference_steps = self.starting_point.num_inference_steps
        elif self._knows_few_levels_only(num_levels):
            num_inference_steps = num_levels
        units = self.images.units
        return {
            "num_inference_steps": num_inference_steps,
            "data_mean": units.data_mean,
            "data_std": units.data_std,
            "value_range": units.value_range,
            "data_unit": units.name,
            "class_shares": self.class_shares,
        }

    def _evaluate(self, name: str) -> None:
        """
        Save a grid of samples under this name and log the validation loss; every process does its share. An interrupt
        ends it early.
        """
        pipeline = self._make_pipeline()
        try:
            images = self._draw(pipeline)
        except FloatingPointError as failure:  # the weights are finite, and may get better
            self.accelerator.print(f"{name} could not be drawn: {failure}")
        else:
            if self._any_interrupted():
                self.accelerator.print(f"{name} is left out.")
                return
            sheet = sample_sheet(images, pipeline.units, class_columns(self.num_classes))
            self.log.write_samples(sheet, name, self.step)
        if self.validation is not None:
            loss = self._validation_loss()
            if not self._any_interrupted():
                self.log.write({"step": self.step, "validation_loss": loss})

    def _draw(self, pipeline: NCSNPipeline) -> torch.Tensor:
        """Samples `(eval_batch_size, channels, ...)` in their units, the same for any number of processes."""
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

        def stop(pipeline: NCSNPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            pipeline._interrupt = self.interrupt.is_set()
            return tensors

        with together(self.accelerator):
            images = pipeline(**arguments, generator=generators, output_type="pt", callback_on_step_end=stop).images
        images = accelerator.gather(images).reshape(accelerator.num_processes, len(mine), *images.shape[1:])
        return images.transpose(0, 1).flatten(0, 1)[:num]

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """The mean loss of the weights that would be saved, with the same levels and noise each time."""
        config, accelerator, data = self.config, self.accelerator, self.validation
        total = torch.zeros((), device=self.device)
        for chunk in range(accelerator.process_index, math.ceil(len(data) / _EVAL_CHUNK), accelerator.num_processes):
            if self.interrupt.is_set():
                break  # whoever called does not use the result
            rows = slice(chunk * _EVAL_CHUNK, (chunk + 1) * _EVAL_CHUNK)
            images, labels = data.take(rows)
            images = data.to_network(images)
            self.generator.manual_seed(chunk)
            uniform = torch.rand(len(images), generator=self.generator, device=self.device)
            noise = torch.randn(images.shape, generator=self.generator, device=self.device)
            sigmas = self._draw_sigmas(uniform)
            labels = None if self.num_classes is None else labels
            with accelerator.autocast():
                denoiser = Denoiser.of(self.eval_unet, self.scheduler, labels)
                total += score_matching_loss(denoiser, images, noise, sigmas, config.loss_weighting).sum()
        return accelerator.reduce(total, "sum").item() / len(data)

    # Checkpoints

    def state_dict(self) -> dict:
        """What a checkpoint holds besides weights, optimizer and schedule."""
        return {
            "step": self.step,
            **self.statistics.state_dict(self.step),
            "positions": self.positions,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up what [`Trainer.state_dict`] has returned."""
        self.step = state["step"]
        self.statistics.load_state_dict(state, self.step)
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
                    manifest["units"] = asdict(self.images.units)
                    manifest |= self._order() | {"class_names": self.class_names}
                    if self.starting_point is not None:
                        manifest["starting_point"] = self.starting_point.to_dict()
                    checkpoints.commit(folder, manifest, self.config.checkpoints_total_limit)
        except CANNOT_WRITE as failure:
            if accelerator.is_main_process:
                remove_incomplete(self.output_dir)
                tqdm.write(
                    f"The checkpoint of step {self.step} could not be written: {failure}. The last good one is "
                    f"{checkpoints.latest(self.output_dir)}; the training goes on."
                )

    def _resume(self, checkpoint: Path) -> dict:
        """Take up a checkpoint; the settings that have changed since, see [`changed_settings`]."""
        manifest = checkpoints.read_manifest(checkpoint)
        changed = changed_settings(manifest["config"], self.config)
        for name, now in self._order().items():
            if manifest[name] != now:
                changed[name] = {"before": manifest[name], "now": now}
        changes = "; ".join(f"{name}: {change['before']} → {change['now']}" for name, change in changed.items())
        if changes:
            self.accelerator.print(f"Going on with other settings than before: {changes}.")
        before = manifest["class_names"] or self.class_names
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
        if self.config.use_ema and not manifest["config"]["use_ema"]:
            with torch.no_grad():
                torch._foreach_copy_(self.averages, self.weights)  # the checkpoint's are not averages
        self.accelerator.print(f"Going on from {checkpoint}.")
        last = checkpoints.latest(self.output_dir)
        if last is not None and checkpoints.read_manifest(last)["step"] > self.step:
            self.accelerator.print(f"Later checkpoints, up to {last}, are deleted when the next one is written.")
        return changed

    def _apply_settings(self) -> None:
        """Make AdamW and the schedule follow this run's settings, not those loaded with their state."""
        schedule, settings = self.lr_scheduler, self._adamw_settings()
        schedule.base_lrs = [settings["lr"]] * len(self.optimizer.param_groups)
        for group, factor in zip(self.optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=settings["lr"] * factor(self.step))
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def count_classes(images: Data, num_classes: int | None) -> list[float] | None:
    """
    The share of each class among the images that have a label; `None` without classes, and for a stream, whose labels
    are not known beforehand.
    """
    if num_classes is None or isinstance(images, StreamedImages):
        return None
    if isinstance(images, LoadedImages):
        labels = torch.from_numpy(read_labels(images.dataset, images.reader.label_column, num_classes))
    else:
        labels = torch.as_tensor(images.labels)
    counts = labels.bincount(minlength=num_classes)[:num_classes].double()
    return (counts / counts.sum()).tolist()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch had no memory left. On a CPU it has no error of its own for that."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
