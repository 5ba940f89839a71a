"""
Measurements behind the numbers in README.md and docs/results.md: `python scripts/benchmark.py --help`.

One file, because it is one command: each function below is a subcommand, and they share how they load and save.
"""

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import tyro
from datasets import load_dataset
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from torch.nn import functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    NCSNDenoiser,
    NCSNInpaintPipeline,
    NCSNPipeline,
    NCSNPosteriorPipeline,
    pretrained,
)
from ncsn_diffusers.data import decode_images, load_training_data
from ncsn_diffusers.evaluation import (
    class_entropy,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_digit_classifier,
    precision_recall,
    require_torch_fidelity,
    to_uint8,
)
from ncsn_diffusers.evaluation.calibration import coverage, misfit, nominal_coverage, psnr, variance_ratio
from ncsn_diffusers.evaluation.kept_batches import KeptBatches, fingerprint
from ncsn_diffusers.evaluation.metrics import mean_and_error
from ncsn_diffusers.settings import NOISE_SEED, DType, cast, describe_scheduler, make_generators, open_processes
from ncsn_diffusers.training import Trainer, TrainingConfig, make_unet

STOCK_SCHEDULERS = {
    "DDPM": "DDPMScheduler",
    "DDIM": "DDIMScheduler",
    "PNDM": "PNDMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
}

# Samplers compared at the same number of evaluations, each with its best settings.
FAST_SAMPLERS = {
    "annealed Langevin": ("AnnealedLangevinScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "SDE-DPM-Solver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "UniPC": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "SA-Solver": ("SASolverScheduler", {"use_karras_sigmas": True}),
}
# The same solvers on the levels of annealed Langevin: what is left is the difference of the steps.
EQUAL_LEVELS = {
    "DPM-Solver++ at equal levels": ("DPMSolverMultistepScheduler", {}),
    "SDE-DPM-Solver++ at equal levels": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    # the levels are replaced; of the spacings, "leading" is the one that starts with the variance sigma_1² + 1
    "Euler ancestral at equal levels": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}),
}
# Their yardstick, with 1,161 evaluations: 232 levels of 5 steps, and the final denoising.
NCSNV2 = {"NCSNv2": ("AnnealedLangevinScheduler", {"noise_rule": "euler_maruyama", "num_langevin_steps": 5})}

SAMPLERS = FAST_SAMPLERS | EQUAL_LEVELS | NCSNV2


def make_scheduler(name: str, config: dict[str, Any]) -> SchedulerMixin:
    """The sampler of this name among `SAMPLERS`, for the network that the config describes."""
    class_name, settings = SAMPLERS[name]
    scheduler_class = getattr(diffusers, class_name)
    if name in EQUAL_LEVELS:
        scheduler_class = at_equal_levels(scheduler_class, AnnealedLangevinScheduler.from_config(config))
    return scheduler_class.from_config(config, **settings)


def at_equal_levels(scheduler_class: type[SchedulerMixin], langevin: AnnealedLangevinScheduler) -> type[SchedulerMixin]:
    """
    A multistep or Euler scheduler of diffusers on the levels that `langevin` chooses for the same number of
    evaluations. Its timesteps are then fractional, like those of `langevin`.
    """

    class EqualLevels(scheduler_class):
        def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            langevin.set_timesteps(num_inference_steps, device)
            self.sigmas, self.timesteps = langevin.sigmas, langevin.timesteps

    return EqualLevels


PipelineName = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PIPELINE")]


def load(pipeline: str | None) -> NCSNPipeline:
    pipe = NCSNPipeline.from_pretrained(pipeline or pretrained("mnist"))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def classes_in_turn(pipe: NCSNPipeline, indices: Iterable[int]) -> dict[str, list[int]]:
    """The argument with which image i is of class i, modulo their number; none for a network without classes."""
    return {} if pipe.num_classes is None else {"class_labels": [i % pipe.num_classes for i in indices]}


def check_output(output: str) -> None:
    """Refuse an output that cannot be written, before any work is lost."""
    if not Path(output).absolute().parent.is_dir():
        raise SystemExit(f"--output {output} is not in a folder that exists.")


def save_json(output: str, rows: list[dict], **settings) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record = {"device": device, "torch": torch.__version__, **settings, "rows": rows}
    Path(f"{output}.json").write_text(json.dumps(record, indent=1) + "\n")


def bare_call(pipe: NCSNPipeline, x: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """The network alone at a timestep, with "no label" where it has classes, as the pipeline calls it."""
    labels = pipe.embedding_indices(None, len(x), x.device)
    arguments = {} if labels is None else {"class_labels": labels}
    return lambda t: pipe.unet(x, t, **arguments)


def overhead(
    pipeline: PipelineName = None,
    batch_size: int = 16,
    num_inference_steps: int = 50,
    repeats: int = 5,
    compile_backend: str | None = None,
    output: str = "overhead",
) -> None:
    """
    Time of the pipeline over the time of its network calls alone, measured in turn.

    Args:
        pipeline: Folder of the pipeline; the digits that come with the package by default.
        batch_size: Images per call.
        num_inference_steps: Network evaluations per call.
        repeats: Pairs of runs, whose median ratio counts.
        compile_backend: Compile the network with this backend of torch.compile, such as inductor; eager by default.
        output: Path of the measurements, without its ending .json.
    """
    check_output(output)
    pipe = load(pipeline)
    if compile_backend is not None:
        pipe.unet.compile(backend=compile_backend)
    x = pipe(batch_size, num_inference_steps, output_type="latent").images.to(pipe.unet.dtype)  # warms up, too
    timesteps = pipe.scheduler.timesteps

    network = bare_call(pipe, x)

    @torch.no_grad()
    def bare():
        for t in timesteps:
            network(t)

    def whole():
        pipe(batch_size=batch_size, num_inference_steps=num_inference_steps, output_type="pt")

    def seconds(function):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    bare()  # warm up
    pairs = [(seconds(whole), seconds(bare)) for _ in tqdm(range(repeats), unit="pair")]
    ratios = [a / b for a, b in pairs]
    print(f"pipeline   {statistics.median(a for a, _ in pairs):8.3f} s")
    print(f"bare calls {statistics.median(b for _, b in pairs):8.3f} s")
    print(f"ratio      {statistics.median(ratios):8.3f}   (lowest {min(ratios):.3f}, highest {max(ratios):.3f})")
    rows = [{"pipeline_seconds": a, "bare_seconds": b, "ratio": a / b} for a, b in pairs]
    settings = {"batch_size": batch_size, "num_inference_steps": num_inference_steps}
    save_json(output, rows, pipeline=pipeline, **settings, compile_backend=compile_backend)


def memory(
    pipeline: PipelineName = None, batch_size: int = 16, budgets: tuple[int, ...] = (10, 50), output: str = "memory"
) -> None:
    """
    Peak memory of the pipeline over that of one bare network call: the difference, in buffers of the sample's size.

    Args:
        pipeline: Folder of the pipeline; the digits that come with the package by default.
        batch_size: Images per call.
        budgets: Numbers of network evaluations.
        output: Path of the measurements, without its ending .json.
    """
    check_output(output)
    pipe = load(pipeline)
    x = pipe(batch_size, 2, output_type="latent").images.to(pipe.unet.dtype)  # warms up, too
    timestep, network = pipe.scheduler.timesteps[0], bare_call(pipe, x)
    with torch.no_grad():
        bare = peak_memory(lambda: network(timestep), x.device)
    rows = []
    print(f"one bare network call    {bare / 1e6:9.3f} MB")
    for budget in tqdm(budgets, unit="row"):
        peak = peak_memory(lambda n=budget: pipe(batch_size, n, output_type="latent"), x.device)
        extra = (peak - bare) / (x.numel() * 4)
        rows.append({"evaluations": budget, "peak_bytes": peak, "bare_bytes": bare, "extra_buffers": extra})
        tqdm.write(
            f"{budget:5d} evaluations        {peak / 1e6:9.3f} MB, {extra:.2f} buffers of the sample's size more"
        )
    save_json(output, rows, pipeline=pipeline, batch_size=batch_size)


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """The peak of the bytes that `function` allocates on the device."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def schedulers(
    pipeline: PipelineName = None, output: str = "schedulers.png", num_images: int = 10, seed: int = 0
) -> None:
    """
    Draw a row of images with each scheduler, swapped in by `from_config` alone.

    A class-conditional pipeline draws its classes in turn. Without classes there are rows of diffusers' own pipelines,
    too, which take none.

    Args:
        pipeline: Folder of the pipeline; the digits that come with the package by default.
        output: File of the plot.
        num_images: Images per row.
        seed: Seed of each row.
    """
    check_output(output)
    pipe = load(pipeline)
    config = pipe.scheduler.config
    paper = AnnealedLangevinScheduler.from_config(config, noise_rule="euler_maruyama", num_langevin_steps=5)
    rows = {
        "annealed Langevin,\nconsistent, 50": (pipe, pipe.scheduler, 50),
        "annealed Langevin,\nEuler–Maruyama, 232×5": (pipe, paper, 232),
    }
    for label, name in STOCK_SCHEDULERS.items():
        rows[f"{label}, 50"] = (pipe, getattr(diffusers, name).from_config(config), 50)
    for name in ("DDIM", "DDPM") if pipe.num_classes is None else ():
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
        stock: DiffusionPipeline = getattr(diffusers, f"{name}Pipeline")(pipe.unet, scheduler)
        stock.set_progress_bar_config(disable=True)
        rows[f"diffusers' own\n{name}Pipeline, 50"] = (stock.to(pipe.device), scheduler, 50)

    figure = Figure(figsize=(0.6 * num_images + 2.4, 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for axis, (label, (runner, scheduler, num_inference_steps)) in zip(
        axes, tqdm(rows.items(), unit="row"), strict=True
    ):
        runner.scheduler = scheduler
        arguments = {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
        arguments |= classes_in_turn(pipe, range(num_images))
        images = runner(batch_size=num_images, num_inference_steps=num_inference_steps, **arguments).images
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).cpu(), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(output, dpi=110, bbox_inches="tight")
    print(f"Saved {Path(output).resolve()}.")


def samplers(
    pipeline: PipelineName = None,
    dataset_name: str = "ylecun/mnist",
    budgets: tuple[int, ...] = (6, 10, 20, 50),
    names: tuple[str, ...] = tuple(FAST_SAMPLERS | EQUAL_LEVELS),
    num_images: int = 1000,
    batch_size: int = 50,
    seed: int = 0,
    dtype: DType = "float32",
    output: str = "samplers",
    overwrite_output_dir: bool = False,
) -> None:
    """
    The Fréchet distance of digits to real ones over the number of network evaluations, for each sampler.

    Distances are taken to the data set's `test` split, in the digit classifier's features. The floor is the distance of
    as many digits of its `train` split. The table also has the kernel distance (which does not depend on the number of
    digits) in these features and in the raw pixels, class entropy (2.303 for even shares), precision and recall. A
    class-conditional pipeline draws its classes in turn. Rows "at equal levels" are solvers of diffusers on the levels
    of annealed Langevin. The table is written to OUTPUT.json row by row, and the plot to OUTPUT.png. The samples'
    features are kept in the folder OUTPUT, batch by batch: a run that was cut short goes on where it stopped, and one
    with more images draws only the rest. Under `accelerate launch` processes share the work, and the results do not
    depend on their number.

    Args:
        pipeline: Folder of a pipeline that draws 28×28 grayscale digits; the one in the package by default.
        dataset_name: The real digits, on the Hub or in a folder, with the splits `train` and `test`.
        budgets: Numbers of network evaluations.
        names: Which samplers; NCSNv2 is available too, for a budget of 1160.
        num_images: Images for each distance; only Fréchet distances of the same number compare.
        batch_size: Images per call.
        seed: Seed of the first image of every row; image i uses seed + i, so all rows start from the same noise.
        dtype: What the network computes in.
        output: Path of the two files, without their endings, and of the folder.
        overwrite_output_dir: Replace samples in the folder that were drawn with other settings.
    """
    unknown = set(names) - set(SAMPLERS)
    if unknown:
        raise SystemExit(f"--names must be among {', '.join(SAMPLERS)}, not {', '.join(sorted(unknown))}.")
    check_output(output)
    try:
        require_torch_fidelity()
    except ImportError as error:
        raise SystemExit(f"benchmark.py: {error}") from error
    classifier = load_digit_classifier()
    if num_images <= classifier.head.in_features:
        raise SystemExit(
            f"--num_images {num_images} must be above the features' number, {classifier.head.in_features}."
        )
    accelerator = open_processes()
    pipe = load(pipeline).to(accelerator.device)
    cast(pipe, dtype)
    config, weights = pipe.scheduler.config, fingerprint(*pipe.unet.state_dict().values())
    with accelerator.main_process_first():  # one prepares the data set's cache, the others read it
        dataset = load_dataset(dataset_name)
    real_images = decode_images(dataset["test"].shuffle(seed=seed))
    real, real_pixels = extract_features(real_images, classifier.features), to_pixels(real_images)
    kept = KeptBatches(accelerator, Path(output))
    rows = []

    def compare(name, evaluations, features, pixels):
        if not accelerator.is_main_process:
            return
        kernel, kernel_error = kernel_distance(real, features)
        pixel_kernel, pixel_kernel_error = kernel_distance(real_pixels, pixels)
        precision, recall = precision_recall(real, features)
        rows.append(
            {
                "sampler": name,
                "evaluations": evaluations,
                "distance": frechet_distance(real, features),
                "kernel_distance": kernel,
                "kernel_distance_standard_error": kernel_error,
                "pixel_kernel_distance": pixel_kernel,
                "pixel_kernel_distance_standard_error": pixel_kernel_error,
                "class_entropy": class_entropy(classifier.head(features.to(classifier.head.weight))),
                "precision": precision,
                "recall": recall,
            }
        )
        settings = {"pipeline": pipeline, "dataset_name": dataset_name, "num_images": num_images, "seed": seed}
        save_json(output, rows, **settings, dtype=dtype)
        tqdm.write(" ".join(f"{v:>14.4f}" if isinstance(v, float) else f"{v:>32}" for v in rows[-1].values()))

    def draw(indices):
        generators = make_generators(seed, indices)
        arguments = {"generator": generators, "output_type": "pt", **classes_in_turn(pipe, indices)}
        images = to_uint8(pipe(len(indices), num_levels, **arguments).images).cpu()
        return {"features": extract_features(images, classifier.features), "pixels": to_pixels(images)}

    accelerator.print(" ".join(f"{title:>32}" for title in ("sampler", "evaluations")), end=" ")
    titles = ("distance", "kernel", "standard error", "pixel kernel", "standard error")
    titles += ("class entropy", "precision", "recall")
    accelerator.print(" ".join(f"{title:>14}" for title in titles))
    held_out = torch.randperm(len(dataset["train"]), generator=torch.Generator().manual_seed(seed))[:num_images]
    held_out_images = decode_images(dataset["train"].select(held_out))
    compare("real digits", 0, extract_features(held_out_images, classifier.features), to_pixels(held_out_images))
    for name, evaluations in itertools.product(names, budgets):
        num_levels = max(1, evaluations // SAMPLERS[name][1].get("num_langevin_steps", 1))
        pipe.scheduler = make_scheduler(name, config)
        pipe.scheduler.set_timesteps(num_levels)
        evaluations = len(pipe.scheduler.timesteps)
        depends_on = {"pipeline": weights, "timesteps": pipe.scheduler.timesteps.tolist()}
        depends_on |= {"batch_size": batch_size, "seed": seed, "classes_in_turn": pipe.num_classes}
        depends_on |= describe_scheduler(pipe.scheduler)
        try:
            drawn = kept.compute(
                f"{name}, {evaluations}", depends_on, num_images, batch_size, draw, may_replace=overwrite_output_dir
            )
        except (ValueError, FloatingPointError) as error:
            raise SystemExit(f"benchmark.py: {error}") from error
        compare(name, evaluations, drawn["features"], drawn["pixels"])
    if accelerator.is_main_process:
        plot_samplers(rows, num_images, output)
    accelerator.end_training()


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as features of shape `(n, channels · height · width)` in [0, 1], which no sampler was tuned on."""
    return images.flatten(1).float() / 255


def plot_samplers(rows: list[dict[str, Any]], num_images: int, output: str) -> None:
    """Distance over evaluations, from the table of [`samplers`], whose first row is the floor."""
    floor, *rows = rows
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, own in itertools.groupby(rows, key=lambda row: row["sampler"]):
        own = list(own)
        axis.loglog([row["evaluations"] for row in own], [row["distance"] for row in own], "o-", label=name)
    axis.axhline(floor["distance"], color="gray", linestyle="--", label=f"{num_images} real digits")
    budgets = sorted({row["evaluations"] for row in rows})
    axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.minorticks_off()
    axis.set(xlabel="network evaluations", ylabel=f"Fréchet distance, {num_images} digits")
    axis.legend()
    figure.savefig(f"{output}.png", dpi=110)
    print(f"Saved {Path(output).resolve()}.json and .png.")


def convergence(budgets: tuple[int, ...] = (6, 10, 20, 35, 50, 100, 250, 500), output: str = "convergence") -> None:
    """
    Error of the variance of Gaussian data over the number of evaluations, for first and second order, without sampling.

    The largest relative error over eigenvectors with standard deviations from 0.3 to 3. The score is linear, so the
    result is linear in the start and in each step's noise: a batch with one impulse for each gives exact coefficients.

    Args:
        budgets: Numbers of network evaluations.
        output: Path of the table, .json, and of the plot, .png, without their endings.
    """
    check_output(output)
    rows = []
    variances = torch.logspace(math.log10(0.3), math.log10(3), 21, dtype=torch.float64) ** 2
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for solver_order in (1, 2):
        scheduler = AnnealedLangevinScheduler(prediction_type="sample", solver_order=solver_order)
        errors = []
        for budget in budgets:
            scheduler.set_timesteps(budget)
            x = torch.zeros(budget + 1, len(variances), dtype=torch.float64)
            x[0] = scheduler.init_noise_sigma
            for i, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False)):
                noise = torch.zeros_like(x)
                noise[i + 1] = 1
                denoised = x * variances / (variances + sigma**2)
                x = scheduler.step(denoised, t, x, variance_noise=noise).prev_sample
            errors.append((x.square().sum(0) / variances - 1).abs().max().item())
            rows.append({"solver_order": solver_order, "evaluations": budget, "variance_error": errors[-1]})
            print(f"order {solver_order} {budget:5d} evaluations, variance off by {errors[-1]:8.3%}")
        axis.loglog(budgets, errors, "o-", label=f"order {solver_order}")
    axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.minorticks_off()
    axis.set(xlabel="evaluations", ylabel="largest relative error of the variance")
    axis.legend()
    figure.savefig(f"{output}.png", dpi=110)
    save_json(output, rows)
    print(f"Saved {Path(output).resolve()}.json and .png.")


def training(
    train_batch_size: int = 32,
    block_out_channels: tuple[int, ...] = (32, 64, 64),
    layers_per_block: int = 1,
    mixed_precision: str | None = None,
    compile: bool | None = None,
    num_steps: int = 20,
    rounds: int = 5,
    output: str = "training",
) -> None:
    """
    Throughput of the training step on the embedded digits, compared with a plain loop (eager, float32, as in diffusers'
    own script) and with the same step on one constant batch, measured in turn.

    Args:
        train_batch_size: Images per step.
        block_out_channels: The network's channels.
        layers_per_block: The network's layers per level.
        mixed_precision: Of the training step: no, fp16 or bf16; by default what training chooses.
        compile: Compile the network of the training step; by default what training chooses for a long run.
        num_steps: Steps per round.
        rounds: Rounds, after one to warm up, whose median ratio counts.
        output: Path of the measurements, without its ending .json.
    """
    check_output(output)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            TrainingConfig(
                output_dir=folder,
                train_batch_size=train_batch_size,
                block_out_channels=block_out_channels,
                layers_per_block=layers_per_block,
                mixed_precision=mixed_precision,
                compile=compile,
                max_train_steps=1000 + num_steps * 2 * (rounds + 1),
                checkpointing_steps=0,
            )
        )
        batches = trainer.images.batches(train_batch_size, seed=0)
        constant = itertools.repeat(next(batches))
        plain = plain_training_step(trainer)
        loops = {
            "training step": lambda: trainer.training_step(batches),
            "a constant batch": lambda: trainer.training_step(constant),
            "plain loop": plain,
        }
        seconds, memory = {name: [] for name in loops}, {}
        for _ in tqdm(range(rounds + 1), unit="round"):
            for name, step in loops.items():
                if trainer.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(num_steps):
                    step()
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize()
                    memory[name] = torch.cuda.max_memory_allocated() / 1e9
                seconds[name].append(time.perf_counter() - start)

    images = num_steps * train_batch_size
    for name, times in seconds.items():
        peak = f"   peak memory {memory[name]:.2f} GB" if memory else ""
        print(f"{name:20} {images / statistics.median(times[1:]):9.1f} images a second{peak}")
    for name in ("plain loop", "a constant batch"):
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["training step"][1:], strict=True)]
        print(f"throughput over {name:20} {statistics.median(ratios):6.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    rows = [
        {"loop": name, "images_per_second": [images / t for t in times[1:]], "peak_memory_gb": memory.get(name)}
        for name, times in seconds.items()
    ]
    settings = {"train_batch_size": train_batch_size, "block_out_channels": block_out_channels}
    settings |= {"layers_per_block": layers_per_block, "mixed_precision": trainer.accelerator.mixed_precision}
    save_json(output, rows, **settings, compile=trainer.compiled)


def plain_training_step(trainer: Trainer) -> Callable[[], None]:
    """One step of a plain loop on the trainer's network and images: PIL, a DataLoader, float32, no fusing."""
    config, device = trainer.config, trainer.device
    unet = make_unet(config, trainer.images.shape).to(device)
    scheduler = DDPMScheduler.from_config(trainer.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True)

    def collate(rows):
        arrays = [np.asarray(row["image"], dtype=np.float32) / 127.5 - 1 for row in rows]
        return torch.from_numpy(np.stack(arrays))[:, None]

    loader = DataLoader(load_training_data(), config.train_batch_size, shuffle=True, collate_fn=collate, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step():
        clean = next(batches).to(device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, len(scheduler), (len(clean),), device=device)
        output = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = F.mse_loss(output, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()  # for the progress bar, each step

    return step


# Posterior samples beside those of deepinv's samplers. Its import takes seconds, so that it waits until it is needed.


@dataclass
class Problem:
    """
    Measurements y = A x + n of images in [0, 1], as each method is given them.

    Args:
        pipe (`NCSNPipeline`): the network.
        make_physics (function): A as an object of `deepinv.physics`, for a noise of the given standard deviation.
        y (`torch.Tensor` of shape `(n, 1, height, width)`): the measurements, 0 where nothing was measured.
        noise_std (`float`): of n, in units of [0, 1].
        evaluations (`int`): how many network evaluations a sample may take.
    """

    pipe: NCSNPipeline
    make_physics: Callable[[float], Any]
    y: torch.Tensor
    noise_std: float
    evaluations: int

    @property
    def physics(self):
        return self.make_physics(self.noise_std)

    @property
    def device(self) -> torch.device:
        return self.y.device

    def to_unit_range(self, x: torch.Tensor) -> torch.Tensor:
        """From units of the data to those of [0, 1], without clipping."""
        black = self.pipe.config.data_min
        return (x - black) / (1 - black)

    @property
    def largest_level(self) -> float:
        """Of the network, in units of [0, 1]."""
        scheduler = AnnealedLangevinScheduler.from_config(self.pipe.scheduler.config)
        return scheduler.index_to_sigma(torch.tensor([len(scheduler) - 1.0])).item() / (1 - self.pipe.config.data_min)


def make_masking(kept: torch.Tensor) -> Callable[[float], Any]:
    """The measurement of the pixels where `kept`, `(height, width)`, is 1."""
    from deepinv.physics import DecomposablePhysics, GaussianNoise

    return lambda noise_std: DecomposablePhysics(
        mask=kept[None, None], noise_model=GaussianNoise(noise_std), device=kept.device
    )


def make_separable(matrix: torch.Tensor) -> Callable[[float], Any]:
    """The measurement M x Mᵀ for M `(m, height)`, whose singular vectors are products of those of M."""
    from deepinv.physics import DecomposablePhysics, GaussianNoise

    u, s, vh = torch.linalg.svd(matrix)
    m, n = matrix.shape
    rest = (0, n - m, 0, n - m)
    return lambda noise_std: DecomposablePhysics(
        U=lambda c: u @ c[..., :m, :m] @ u.mT,
        U_adjoint=lambda y: F.pad(u.mT @ y @ u, rest),
        V=lambda c: vh.mT @ c @ vh,
        V_adjoint=lambda x: vh @ x @ vh.mT,
        mask=F.pad(torch.outer(s, s), rest)[None, None],
        noise_model=GaussianNoise(noise_std),
        device=matrix.device,
    )


def make_task(name: str, seed: int, device: torch.device) -> Callable[[float], Any]:
    """The measurement of 28×28 digits that a row of [`posterior`] is about."""
    if name.startswith("missing pixels"):
        kept = torch.rand(28, 28, generator=torch.Generator().manual_seed(seed)) < 0.3
        return make_masking(kept.float().to(device))
    if name == "4x smaller":
        return make_separable(torch.eye(7, device=device).repeat_interleave(4, 1) / 4)
    axis = torch.arange(28.0, device=device)
    weights = torch.exp(-0.5 * ((axis[:, None] - axis) / 1.5) ** 2)  # a Gaussian of 1.5 pixels
    return make_separable(weights / weights.sum(1, keepdim=True))


def draw_ours(problem: Problem) -> torch.Tensor:
    pipe = NCSNPosteriorPipeline(problem.pipe.unet, problem.pipe.scheduler, problem.pipe.config.data_min)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": problem.evaluations // 2, "units": "image", "output_type": "latent"}
    return problem.to_unit_range(pipe(problem.y, problem.physics, problem.noise_std, **arguments).images)


def draw_inpainting(problem: Problem) -> torch.Tensor:
    pipe = NCSNInpaintPipeline(problem.pipe.unet, problem.pipe.scheduler, problem.pipe.config.data_min)
    pipe.set_progress_bar_config(disable=True)
    mask = 1 - problem.physics.mask
    # four evaluations at each level
    images = pipe(problem.y, mask, num_inference_steps=problem.evaluations // 4 + 1, output_type="latent").images
    return problem.to_unit_range(images)


def draw_ddrm(problem: Problem, eta: float, noise: str) -> torch.Tensor:
    from deepinv.sampling import DDRM

    # deepinv 0.5 divides the noise of each level by √2, which is right where the singular vectors are complex. Ours are
    # real, and "scaled" makes up for it: then x has the noise that the denoiser is told, as the paper has it.
    root = 2**0.5 if noise == "scaled" else 1.0
    sigmas = (root * torch.linspace(1, 0, problem.evaluations)).tolist()  # its default
    denoiser = NCSNDenoiser(problem.pipe)
    sampler = DDRM(lambda x, sigma: denoiser(x, sigma / root), sigmas=sigmas, eta=eta)
    return sampler(problem.y, problem.make_physics(root * problem.noise_std))


def make_solver(problem: Problem):
    """deepinv's DDPM steps at even times, from where its diffusion of [-1, 1] has the network's largest level."""
    from deepinv.sampling import DDPMSolver

    last = (math.sqrt(0.1**2 + 39.8 * math.log1p((2 * problem.largest_level) ** 2)) - 0.1) / 19.9
    return DDPMSolver(torch.linspace(last, 0, problem.evaluations + 1).double())  # log(1 + sigma²) = 0.1 t + 9.95 t²


def draw_dps(problem: Problem, guidance: str, weight: float) -> torch.Tensor:
    from deepinv.sampling import DPS

    settings = {"guidance": guidance, "weight": weight, "device": problem.device}
    sampler = DPS(NCSNDenoiser(problem.pipe), solver=make_solver(problem), **settings)
    return sampler(problem.y, problem.physics).float()


def draw_moment_matching(problem: Problem, cg_max_iter: int) -> torch.Tensor:
    from deepinv.sampling import MomentMatchingDataFidelity, PosteriorDiffusion, VariancePreservingDiffusion

    fidelity = MomentMatchingDataFidelity(cg_max_iter=cg_max_iter)
    diffusion = VariancePreservingDiffusion(alpha=1.0, device=problem.device)
    denoiser, solver = NCSNDenoiser(problem.pipe), make_solver(problem)
    sampler = PosteriorDiffusion(fidelity, denoiser, diffusion, solver, device=problem.device)
    return sampler(problem.y, problem.physics).float()


def draw_diffpir(problem: Problem, lambda_: float, zeta: float) -> torch.Tensor:
    from deepinv.optim import L2
    from deepinv.sampling import DiffPIR

    denoiser, largest = NCSNDenoiser(problem.pipe), problem.largest_level

    def denoise(x, sigma):
        # The first of its levels is above the network's: there x is noise, whatever the image, and is shrunk to it.
        share = min(1.0, largest / sigma.item())
        return denoiser(0.5 + share * (x - 0.5), share * sigma)

    settings = {"max_iter": problem.evaluations, "lambda_": lambda_, "zeta": zeta, "device": problem.device}
    return DiffPIR(denoise, L2(), sigma=problem.noise_std, **settings)(problem.y, problem.physics)


def combine(**values: tuple) -> list[dict[str, Any]]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


# Each method with the settings that the search is among.
POSTERIOR_METHODS: dict[str, tuple[Callable[..., torch.Tensor], list[dict[str, Any]]]] = {
    "ours": (draw_ours, [{}]),
    "DDRM": (draw_ddrm, combine(eta=(0.85, 1.0), noise=("as it is", "scaled"))),
    "DiffPIR": (draw_diffpir, combine(lambda_=(1.0, 3.0, 10.0, 30.0), zeta=(0.3, 1.0))),
    "DPS": (
        draw_dps,
        combine(guidance=("norm",), weight=(30.0, 100.0, 300.0, 1000.0))
        + combine(guidance=("annealed",), weight=(3.0, 10.0, 30.0)),
    ),
    # three backward passes at each level, or five
    "moment matching": (draw_moment_matching, combine(cg_max_iter=(1, 3))),
}
NOISELESS = "missing pixels, noiseless"
# Without noise ours stands beside inpainting alone: deepinv's samplers divide by the noise.
NOISELESS_METHODS = {"ours": (draw_ours, [{}]), "NCSNInpaintPipeline": (draw_inpainting, [{}])}
POSTERIOR_TASKS = ("missing pixels", "4x smaller", "blur", NOISELESS)


def crps(samples: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """
    The continuous ranked probability score, E|X - x0| - E|X - X'|/2, of each of n images, averaged over pixels, without
    the bias of few samples. It is least on average for samples of the right distribution: being too sure does not win.

    Args:
        samples (`torch.Tensor` of shape `(n, k, ...)`): k samples, at least 2, for each of n images.
        truths (`torch.Tensor` of shape `(n, ...)`): the images.
    """
    k = samples.shape[1]
    distances = sum((samples[:, i, None] - samples).abs().sum(1) for i in range(k)) / (k * (k - 1))
    return ((samples - truths[:, None]).abs().mean(1) - distances / 2).flatten(1).mean(1)


def draw_counted(draw: Callable, problem: Problem, batch_size: int, seed: int, settings: dict) -> tuple:
    """Samples for all measurements, in batches, with the evaluations and backward passes of each, and the seconds."""
    calls = {"evaluations": 0, "backward_passes": 0}

    def count(_, __, output):
        calls["evaluations"] += 1
        output = output[0] if isinstance(output, tuple) else output.sample
        if output.requires_grad:
            output.register_hook(count_backward)

    def count_backward(_):
        calls["backward_passes"] += 1

    handle = problem.pipe.unet.register_forward_hook(count)
    torch.manual_seed(seed)  # deepinv's samplers take no generator
    start = time.perf_counter()
    batches = problem.y.split(batch_size)
    try:
        samples = torch.cat([draw(replace(problem, y=y), **settings).detach() for y in batches]).cpu()
    finally:
        handle.remove()
    seconds = time.perf_counter() - start
    samples = samples.nan_to_num(0.0, 0.0, 0.0)  # one that has diverged is black
    return samples, {name: number / len(batches) for name, number in calls.items()}, seconds / len(problem.y)


def posterior(
    pipeline: PipelineName = None,
    dataset_name: str = "ylecun/mnist",
    tasks: tuple[str, ...] = POSTERIOR_TASKS,
    names: tuple[str, ...] = tuple(POSTERIOR_METHODS),
    num_images: int = 16,
    num_samples: int = 8,
    num_search_images: int = 4,
    num_search_samples: int = 2,
    evaluations: int = 50,
    noise_std: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
    output: str = "posterior",
) -> None:
    """
    Digits given a measurement: the posterior pipeline beside the samplers of deepinv, at equal network evaluations.

    Each method has the settings with the least continuous ranked probability score on other digits of the `test` split.
    The table has the PSNR of a sample and of the samples' mean, the misfit (right: 1), the share of the samples that
    the digit classifier names rightly, how often a pixel lies between the least and the largest sample, the samples'
    variance over their mean's squared error (right: 1), network evaluations, backward passes and seconds a sample, the
    score, and by how much it is above the task's first row, with the standard error of that over the images. It is
    written to OUTPUT.json row by row, with what the search has tried.

    Args:
        pipeline: Folder of a pipeline that draws 28×28 grayscale digits; the one in the package by default.
        dataset_name: The real digits, on the Hub or in a folder, with the split `test`.
        tasks: Which measurements.
        names: Which methods; inpainting joins the measurement without noise, where deepinv's cannot.
        num_images: Digits of the table.
        num_samples: Samples for each of them.
        num_search_images: Digits, apart from those, for the search of the settings.
        num_search_samples: Samples for each of them.
        evaluations: Network evaluations for a sample; even.
        noise_std: The noise's standard deviation, in units of the data.
        batch_size: Samples drawn at a time.
        seed: Seed of the choice of digits, of the missing pixels and of all noise.
        output: Path of the table, without its ending .json.
    """
    check_output(output)
    for option, given, known in (("tasks", tasks, POSTERIOR_TASKS), ("names", names, POSTERIOR_METHODS)):
        unknown = set(given) - set(known)
        if unknown:
            raise SystemExit(f"--{option} must be among {', '.join(known)}, not {', '.join(sorted(unknown))}.")
    for option, given, least in (
        ("num_images", num_images, 2),
        ("num_samples", num_samples, 2),
        ("num_search_images", num_search_images, 1),
        ("num_search_samples", num_search_samples, 2),
        ("batch_size", batch_size, 1),
    ):
        if given < least:
            raise SystemExit(f"--{option} must be at least {least}, not {given}.")
    if evaluations < 4 or evaluations % 2:
        raise SystemExit(f"--evaluations must be even and at least 4, not {evaluations}: ours takes two at each level.")
    if not 0 < noise_std < math.inf:
        raise SystemExit(f"--noise_std must be above 0, not {noise_std}: {NOISELESS!r} is the task without noise.")
    try:
        import deepinv
    except ImportError as error:
        raise SystemExit(
            f'benchmark.py: posterior needs deepinv, which `pip install -e ".[inverse]"` brings ({error}).'
        ) from error
    pipe = load(pipeline)
    if pipe.image_shape != (1, 28, 28):
        raise SystemExit(f"benchmark.py: posterior is for 28×28 grayscale digits, not images of {pipe.image_shape}.")
    dataset = load_dataset(dataset_name, split="test").shuffle(seed=seed)
    if len(dataset) < num_search_images + num_images:
        raise SystemExit(f"--num_images and --num_search_images must be {len(dataset)} at most, taken together.")
    dataset = dataset.select(range(num_search_images + num_images))
    digits, labels = decode_images(dataset) / 255, torch.tensor(dataset["label"])
    cast(pipe, "float32")
    searched, shown = digits[:num_search_images], digits[num_search_images:]
    labels, classifier = labels[num_search_images:], load_digit_classifier()
    rows, trials = [], []
    settings = {"pipeline": pipeline, "dataset_name": dataset_name, "num_images": num_images}
    settings |= {"num_samples": num_samples, "num_search_images": num_search_images}
    settings |= {"num_search_samples": num_search_samples, "noise_std": noise_std, "seed": seed}
    settings |= {"coverage_that_is_right": nominal_coverage(num_samples), "deepinv": deepinv.__version__}

    def measure(task, images, count, noise_seed):
        """The measurements, `count` times each, of digits."""
        std = 0.0 if task == NOISELESS else noise_std / (1 - pipe.config.data_min)
        make_physics = make_task(task, seed, pipe.device)
        y = make_physics(std).A(images.to(pipe.device))
        generator = torch.Generator().manual_seed(NOISE_SEED + noise_seed)
        noise = std * torch.randn(y.shape, generator=generator).to(y.device)
        y = torch.where(find_measured(make_physics), y + noise, 0.0)
        return Problem(pipe, make_physics, y.repeat_interleave(count, 0), std, evaluations)

    def find_measured(make_physics):
        return make_physics(0.0).A(torch.ones(1, 1, 28, 28, device=pipe.device)) != 0

    widths = (26, 20, 7, 7, 8, 8, 7, 9, 9, 12, 9, 9, 9, 11, 9)
    titles = ("measurement", "method", "PSNR", "of mean", "misfit", "worst", "named", "coverage", "variance")
    titles += ("evaluations", "backward", "seconds", "CRPS", "above first", "± error")
    print(" ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    for task in tasks:
        methods = NOISELESS_METHODS if task == NOISELESS else {name: POSTERIOR_METHODS[name] for name in names}
        problem, trial = measure(task, shown, num_samples, seed), measure(task, searched, num_search_samples, seed + 1)
        measured, first_scores = find_measured(problem.make_physics)[0].cpu(), None
        for name, (draw, candidates) in methods.items():
            best = []
            for candidate in candidates if len(candidates) > 1 else ():
                samples, _, _ = draw_counted(draw, trial, batch_size, seed + 1, candidate)
                score = crps(samples.clamp(0, 1).unflatten(0, (-1, num_search_samples)), searched).mean().item()
                best.append((score, candidate))
                trials.append({"task": task, "method": name, "settings": candidate, "crps": score})
            chosen = min(best, key=lambda pair: pair[0])[1] if best else candidates[0]
            samples, calls, seconds = draw_counted(draw, problem, batch_size, seed, chosen)
            samples = samples.unflatten(0, (-1, num_samples))
            y, physics = problem.y[::num_samples].cpu()[:, measured], problem.physics
            std = problem.noise_std or 1 / 255  # without noise, in units of a grey level
            fits = misfit(samples, y, lambda x: physics.A(x.to(pipe.device)).cpu()[:, measured], std)  # noqa: B023
            clipped = samples.clamp(0, 1)
            classes = extract_features(clipped.flatten(0, 1), classifier).argmax(1).reshape(-1, num_samples)
            scores = crps(clipped, shown)
            first_scores = scores if first_scores is None else first_scores
            above, above_error = mean_and_error(scores - first_scores)
            rows.append(
                {
                    "task": task,
                    "method": name,
                    "psnr_of_a_sample": psnr(clipped, shown[:, None]).mean().item(),
                    "psnr_of_the_mean": psnr(clipped.mean(1), shown).mean().item(),
                    "misfit": fits.mean().item(),
                    "misfit_worst": fits.max().item(),
                    "named_rightly": (classes == labels[:, None]).double().mean().item(),
                    "coverage": coverage(clipped, shown)[0],
                    "variance_ratio": variance_ratio(clipped, shown)[0],
                    **calls,
                    "seconds": seconds,
                    "crps": scores.mean().item(),
                    "crps_above_first": above,
                    "crps_above_first_standard_error": above_error,
                    "settings": chosen,
                }
            )
            save_json(output, rows, **settings, search=trials)
            values = list(rows[-1].values())[: len(widths)]
            texts = [value if isinstance(value, str) else f"{value:.4g}" for value in values]
            tqdm.write(" ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)))
    print(f"Saved {Path(output).resolve()}.json.")


if __name__ == "__main__":
    commands = {
        "overhead": overhead,
        "memory": memory,
        "schedulers": schedulers,
        "samplers": samplers,
        "convergence": convergence,
        "posterior": posterior,
        "training": training,
    }
    tyro.extras.subcommand_cli_from_dict(commands, use_underscores=True)
