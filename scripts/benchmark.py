"""
Measurements behind the numbers in README.md and docs/results.md: `python scripts/benchmark.py --help`. Those beside
deepinv, which only they need, are in `benchmark_posterior.py`.

One file, because it is one command: each function below is a subcommand, and they share how they load and save.
"""

import itertools
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import tyro
from datasets import load_dataset
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch.nn import functional as F  # noqa: N812
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, precision
from ncsn_diffusers.data import decode_images, load_training_data, open_array_files, open_arrays
from ncsn_diffusers.evaluation import (
    CLASSIFIERS,
    DigitClassifier,
    class_entropy,
    extract_features,
    find_classifier,
    frechet_distance,
    kernel_distance,
    load_digit_classifier,
    precision_recall,
    require_torch_fidelity,
    share_found,
    to_uint8,
)
from ncsn_diffusers.images import make_grid, to_model_range, to_pil
from ncsn_diffusers.kept_batches import KeptBatches, fingerprint
from ncsn_diffusers.pretrained import find_pipeline
from ncsn_diffusers.sampling import cast, describe_scheduler, make_generators, open_processes
from ncsn_diffusers.settings import DType
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

DEFAULT, AT_EQUAL_LEVELS, REAL = "annealed Langevin", " at equal levels", "real images"  # in the names of rows
# Samplers compared at the same number of evaluations, each with its best settings.
FAST_SAMPLERS = {
    DEFAULT: ("AnnealedLangevinScheduler", {}),
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
    f"DPM-Solver++{AT_EQUAL_LEVELS}": ("DPMSolverMultistepScheduler", {}),
    f"SDE-DPM-Solver++{AT_EQUAL_LEVELS}": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    # the levels are replaced; of the spacings, "leading" is the one that starts with the variance sigma_1² + 1
    f"Euler ancestral{AT_EQUAL_LEVELS}": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}),
}
REAL_SETS = 10  # at most, for the floor
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
    pipe = NCSNPipeline.from_pretrained(find_pipeline(pipeline or "mnist"))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def classes_in_turn(pipe: NCSNPipeline, indices: Iterable[int]) -> dict[str, list[int]]:
    """The argument with which image i is of class i, modulo their number; none for a network without classes."""
    return {} if pipe.num_classes is None else {"class_labels": [i % pipe.num_classes for i in indices]}


def load_classifier(path: str | None, images: torch.Tensor, labels: torch.Tensor) -> DigitClassifier:
    """That in the file, or else the shipped one that gives the images `(n, 1, 28, 28)` their labels `(n,)`."""
    path = path or CLASSIFIERS.get(find_classifier(images, labels))
    if path is None:
        raise SystemExit("--classifier: none that comes with the package finds the labels of such images: name a file.")
    try:
        classifier = load_digit_classifier(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--classifier: {error}") from error
    if (found := share_found(classifier, images, labels)) < 0.5:
        raise SystemExit(f"--classifier {path} names only {found:.0%} of the images as their labels do.")
    return classifier


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
    labels = pipe.make_denoiser(batch_size=len(x)).labels
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
    synchronizations = count_synchronizations(whole)
    pairs = [(seconds(whole), seconds(bare)) for _ in tqdm(range(repeats), unit="pair")]
    ratios = [a / b for a, b in pairs]
    print(f"pipeline   {statistics.median(a for a, _ in pairs):8.3f} s")
    print(f"bare calls {statistics.median(b for _, b in pairs):8.3f} s")
    print(f"ratio      {statistics.median(ratios):8.3f}   (lowest {min(ratios):.3f}, highest {max(ratios):.3f})")
    rows = [{"pipeline_seconds": a, "bare_seconds": b, "ratio": a / b} for a, b in pairs]
    settings = {"batch_size": batch_size, "num_inference_steps": num_inference_steps}
    settings["synchronizations"] = synchronizations
    save_json(output, rows, pipeline=pipeline, **settings, compile_backend=compile_backend)


def count_synchronizations(function: Callable[[], Any]) -> int | None:
    """How often `function` waits for the GPU, by torch's own count; `None` where there is none."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


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

    shown = []
    for runner, scheduler, num_inference_steps in tqdm(rows.values(), unit="row"):
        runner.scheduler = scheduler
        arguments = {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
        arguments |= classes_in_turn(pipe, range(num_images))
        images = runner(batch_size=num_images, num_inference_steps=num_inference_steps, **arguments).images
        shown += to_pil(to_uint8(images))
    make_grid(shown, num_images, margin=2, min_width=600, row_titles=list(rows)).save(output)
    print(f"Saved {Path(output).resolve()}.")


def samplers(
    pipeline: PipelineName = None,
    dataset_name: str = "ylecun/mnist",
    budgets: tuple[int, ...] = (6, 10, 20, 50),
    names: tuple[str, ...] = tuple(FAST_SAMPLERS | EQUAL_LEVELS),
    num_images: int = 1000,
    num_sets: int = 1,
    batch_size: int = 50,
    seed: int = 0,
    dtype: DType = "float32",
    classifier: str | None = None,
    output: str = "samplers",
    overwrite_output_dir: bool = False,
) -> None:
    """
    The Fréchet distance of samples to real images over the number of network evaluations, for each sampler.

    Distances are taken to the data set's `test` split, in the features of the classifier that knows its images: digits,
    Fashion-MNIST, or others by `--classifier`. The floor is the distance of as many images of its `train` split, for up
    to ten such sets. The table also has the kernel distance (which does not depend on the number of images) in these
    features and in the raw pixels, class entropy (2.303 for even shares), precision and recall. A class-conditional
    pipeline draws its classes in turn. Rows "at equal levels" are solvers of diffusers on the levels of annealed
    Langevin. With several sets of images, distance, precision and recall are means over the sets, and the end shows by
    how much each sampler's distance is above that of annealed Langevin with as many evaluations, set by set, so from
    the same noise, with the standard error over the sets.

    The table is written to OUTPUT.json row by row, and the plot to OUTPUT.png. The samples' features are kept in the
    folder OUTPUT, batch by batch: a run that was cut short goes on where it stopped, and one with more images draws
    only the rest. Under `accelerate launch` processes share the work, and the results do not depend on their number.

    Args:
        pipeline: A pipeline of 28×28 grayscale images: its folder, or the name of one of the package; mnist by default.
        dataset_name: The real images, on the Hub or in a folder, with the splits `train` and `test`.
        budgets: Numbers of network evaluations.
        names: Which samplers; NCSNv2 is available too, for a budget of 1160.
        num_images: Images for each distance; only Fréchet distances of the same number compare.
        num_sets: Sets of so many images for each row.
        batch_size: Images per call.
        seed: Seed of the first image of every row; image i uses seed + i, so all rows start from the same noise.
        dtype: What the network computes in.
        classifier: File of a classifier that scripts/train_digit_classifier.py wrote, for images that none of the
            package's knows.
        output: Path of the two files, without their endings, and of the folder.
        overwrite_output_dir: Replace samples in the folder that were drawn with other settings.
    """
    unknown = set(names) - set(SAMPLERS)
    if unknown:
        raise SystemExit(f"--names must be among {', '.join(SAMPLERS)}, not {', '.join(sorted(unknown))}.")
    if num_sets < 1:
        raise SystemExit(f"--num_sets must be at least 1, not {num_sets}.")
    check_output(output)
    try:
        require_torch_fidelity()
    except ImportError as error:
        raise SystemExit(f"benchmark.py: {error}") from error
    num_features = DigitClassifier().head.in_features
    if num_images <= num_features:
        raise SystemExit(f"--num_images {num_images} must be above the features' number, {num_features}.")
    accelerator = open_processes()
    pipe = load(pipeline).to(accelerator.device)
    cast(pipe, dtype)
    config, weights = pipe.scheduler.config, fingerprint(*pipe.unet.state_dict().values())
    with accelerator.main_process_first():  # one prepares the data set's cache, the others read it
        dataset = load_dataset(dataset_name)
    if num_images > len(dataset["train"]):
        raise SystemExit(f"--num_images {num_images} is above the {len(dataset['train'])} images of the split `train`.")
    test = dataset["test"].shuffle(seed=seed)
    real_images = decode_images(test)
    classifier = load_classifier(classifier, real_images, torch.tensor(test["label"][:]))
    real, real_pixels = extract_features(real_images, classifier.features), to_pixels(real_images)
    kept = KeptBatches(accelerator, Path(output))
    rows = []

    def compare(name, evaluations, features, pixels):
        if not accelerator.is_main_process:
            return
        kernel, kernel_error = kernel_distance(real, features)
        pixel_kernel, pixel_kernel_error = kernel_distance(real_pixels, pixels)
        sets = features.split(num_images)
        distances = [frechet_distance(real, part) for part in sets]
        precision, recall = np.mean([precision_recall(real, part) for part in sets], 0).tolist()
        rows.append(
            {
                "sampler": name,
                "evaluations": evaluations,
                "distance": statistics.mean(distances),
                "set_distances": distances,
                "kernel_distance": kernel,
                "kernel_distance_standard_error": kernel_error,
                "pixel_kernel_distance": pixel_kernel,
                "pixel_kernel_distance_standard_error": pixel_kernel_error,
                "class_entropy": class_entropy(classifier.head(features.to(classifier.head.weight))),
                "precision": precision,
                "recall": recall,
            }
        )
        settings = {"pipeline": pipeline, "dataset_name": dataset_name, "num_images": num_images, "num_sets": num_sets}
        save_json(output, rows, **settings, seed=seed, dtype=dtype)
        shown = [value for value in rows[-1].values() if not isinstance(value, list)]
        tqdm.write(" ".join(f"{v:>14.4f}" if isinstance(v, float) else f"{v:>32}" for v in shown))

    def describe_samples(indices):
        generators = make_generators(seed, indices)
        arguments = {"generator": generators, "output_type": "pt", **classes_in_turn(pipe, indices)}
        images = to_uint8(pipe(len(indices), num_levels, **arguments).images).cpu()
        return {"features": extract_features(images, classifier.features), "pixels": to_pixels(images)}

    accelerator.print(" ".join(f"{title:>32}" for title in ("sampler", "evaluations")), end=" ")
    titles = ("distance", "kernel", "standard error", "pixel kernel", "standard error")
    titles += ("class entropy", "precision", "recall")
    accelerator.print(" ".join(f"{title:>14}" for title in titles))
    shuffled = torch.randperm(len(dataset["train"]), generator=torch.Generator().manual_seed(seed))
    for i in range(min(len(shuffled) // num_images, REAL_SETS)):
        images = decode_images(dataset["train"].select(shuffled[i * num_images : (i + 1) * num_images]))
        compare(REAL, 0, extract_features(images, classifier.features), to_pixels(images))
    for name, evaluations in itertools.product(names, budgets):
        num_levels = max(1, evaluations // SAMPLERS[name][1].get("num_langevin_steps", 1))
        pipe.scheduler = make_scheduler(name, config)
        pipe.scheduler.set_timesteps(num_levels)
        evaluations = len(pipe.scheduler.timesteps)
        depends_on = {"pipeline": weights, "timesteps": pipe.scheduler.timesteps.tolist()}
        depends_on |= {"batch_size": batch_size, "seed": seed, "classes_in_turn": pipe.num_classes}
        depends_on |= {"classifier": fingerprint(*classifier.state_dict().values())}
        depends_on |= describe_scheduler(pipe.scheduler)
        try:
            drawn = kept.compute(
                f"{name}, {evaluations}",
                depends_on,
                num_images * num_sets,
                batch_size,
                describe_samples,
                may_replace=overwrite_output_dir,
            )
        except (ValueError, FloatingPointError) as error:
            raise SystemExit(f"benchmark.py: {error}") from error
        compare(name, evaluations, drawn["features"], drawn["pixels"])
    if accelerator.is_main_process:
        for name, evaluations, above, error in above_default(rows):
            print(f"{name:>32}{evaluations:>6} evaluations: {above:+.4f} ± {error:.4f} above {DEFAULT}")
        plot_samplers(output)
    accelerator.end_training()


def above_default(rows: list[dict]) -> list[tuple[str, int, float, float]]:
    """
    Sampler, evaluations, and the mean over the sets of images by which its distance is above the default's with as many
    evaluations, with the standard error of that mean; of rows with several sets.
    """
    default = {row["evaluations"]: row["set_distances"] for row in rows if row["sampler"] == DEFAULT}
    found = []
    for row in rows:
        distances = row["set_distances"]
        if row["sampler"] in (DEFAULT, REAL) or len(distances) < 2 or row["evaluations"] not in default:
            continue
        above = np.subtract(distances, default[row["evaluations"]])
        error = above.std(ddof=1) / len(above) ** 0.5
        found.append((row["sampler"], row["evaluations"], float(above.mean()), float(error)))
    return found


# Compositions of a class c, as the arguments of a call.
COMPOSITIONS = {
    "the class": lambda c: {"class_labels": {c: 1.0}},
    "p(x|c)², scores summed at one level": None,  # by `draw_summed`
    "p(x|c)²": lambda c: {"class_labels": {c: 2.0}},
    "√p(x|c)": lambda c: {"class_labels": {c: 0.5}},
    "guidance 3": lambda c: {"class_labels": c, "guidance_scale": 3.0},
    "guidance 3 below sigma 1.5": lambda c: {"class_labels": c, "guidance_scale": 3.0, "guidance_max_sigma": 1.5},
    "guidance 3, resampled": lambda c: {"class_labels": c, "guidance_scale": 3.0, "resample": True},
    "and the next class": lambda c: {"class_labels": {c: 1.0, (c + 1) % 10: 1.0, None: -1.0}},
}


def draw_summed(pipe: NCSNPipeline, c: int, num: int, num_inference_steps: int, generator) -> torch.Tensor:
    """Digits of p(x|c)² as it should not be done: the score is doubled at the network's own level."""
    scheduler = AnnealedLangevinScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    scheduler.set_timesteps(num_inference_steps)
    scheduler.set_begin_index(0)
    x = scheduler.init_noise_sigma * torch.randn(num, *pipe.sample_shape, generator=generator)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        denoised = x + 2 * (pipe.denoise(x, sigma, c) - x)
        x = scheduler.step(denoised, t, x, generator=generator).prev_sample
    return pipe.units.to_data(x)


@torch.no_grad()
def compositions(
    pipeline: PipelineName = None,
    num_images: int = 200,
    num_inference_steps: int = 20,
    seed: int = 0,
    dataset_name: str = "ylecun/mnist",
    output: str = "compositions",
) -> None:
    """
    Digits of each class by guidance, temperature, "and", and with weights: how many are named as asked by the
    classifier, and how far they are from test digits; with a picture of ten of each.

    Args:
        pipeline: Folder of a class-conditional pipeline of digits; the one that comes with the package by default.
        num_images: Digits of each row, a multiple of the number of classes.
        num_inference_steps: Noise levels.
        seed: Of the generators, one for each class.
        dataset_name: The data set whose split "test" they are compared with.
        output: Path of measurements and picture, without its ending.
    """
    check_output(output)
    pipe, classifier, num = load(pipeline), load_digit_classifier(), num_images // 10
    real = extract_features(decode_images(load_dataset(dataset_name, split="test")), classifier.features)
    rows, shown = [], []
    for name, make_arguments in COMPOSITIONS.items():
        images, ancestors = [], 0
        for c in range(10):
            generator = torch.Generator().manual_seed(seed + c)
            if make_arguments is None:
                drawn = draw_summed(pipe, c, num, num_inference_steps, generator)
            else:
                arguments = {"generator": generator, "output_type": "pt", **make_arguments(c)}
                drawn = pipe(num, num_inference_steps, **arguments).images
            ancestors += pipe.resampling_report.num_ancestors if "resampled" in name else num
            images.append(drawn.cpu())
        images = torch.cat(images)
        shown += to_pil(to_uint8(images[::num]))
        features = extract_features(images, classifier.features)
        named = classifier.head(features.to(classifier.head.weight)).argmax(1)
        asked = torch.arange(10).repeat_interleave(num)
        rows.append(
            {
                "composition": name,
                "named_as_asked": (named == asked).double().mean().item(),
                "frechet_distance": frechet_distance(features, real),
                "ancestors": ancestors,
            }
        )
        row = rows[-1]
        print(f"{name:36} {row['named_as_asked']:7.1%} {row['frechet_distance']:8.2f} {ancestors:5d} ancestors")
    save_json(output, rows, num_images=num_images, num_inference_steps=num_inference_steps, seed=seed)
    row_titles = [name.replace(", ", ",\n") for name in COMPOSITIONS]
    make_grid(shown, 10, margin=2, min_width=600, row_titles=row_titles).save(f"{output}.png")


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as features of shape `(n, channels · height · width)` in [0, 1], which no sampler was tuned on."""
    return images.flatten(1).float() / 255


# How `plot_samplers` draws each: color (Okabe and Ito's, which color-blind people can tell apart), marker, line.
SAMPLER_LINES = {
    DEFAULT: ("#0072B2", "o", "-"),
    "DDIM": ("#E69F00", "v", "-"),
    "DPM-Solver++": ("#009E73", "s", "-"),
    "SDE-DPM-Solver++": ("#D55E00", "^", "-"),
    "UniPC": ("#CC79A7", "D", "--"),
    "SA-Solver": ("#56B4E9", "P", "-"),
    "Euler ancestral": ("#000000", "X", "-"),
    "NCSNv2": ("#000000", "*", "none"),
}


def plot_samplers(output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT")] = "samplers") -> None:
    """
    Draw OUTPUT.png, distance over evaluations, from the table OUTPUT.json of `samplers`, without sampling.

    The samplers at levels of their own are on the left and those on the levels of the default on the right. The band is
    from the nearest to the farthest set of real images.

    Args:
        output: Path of the two files, without their endings.
    """
    record = json.loads(Path(f"{output}.json").read_text())
    own, equal, real = {}, {}, []
    for row in record["rows"]:
        if row["sampler"] == REAL:
            real.append(row["distance"])
        else:
            name = row["sampler"].removesuffix(AT_EQUAL_LEVELS)
            group = own if name == row["sampler"] else equal
            group.setdefault(name, []).append((row["evaluations"], row["distance"]))
    default = {DEFAULT: own[DEFAULT]} if DEFAULT in own else {}
    panels = {"levels of their own": own} | ({"on the levels of the default": equal | default} if equal else {})
    sets = f"{len(real)} sets of real images" if len(real) > 1 else REAL
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        # the default is first in the legend, and thick, so that it and a line on top of it are both seen
        for name in sorted(lines, key=lambda name: name != DEFAULT):
            color, marker, style = SAMPLER_LINES[name]
            look = {"linewidth": 6, "markersize": 12} if name == DEFAULT else {"linewidth": 1.5, "markersize": 6}
            label = f"{name}, the default" if name == DEFAULT else name
            axis.plot(*zip(*lines[name], strict=True), color=color, marker=marker, linestyle=style, label=label, **look)
        axis.axhspan(min(real), max(real), color="#d0d0d0", linewidth=1, zorder=0, label=sets)
        budgets = sorted({evaluations for line in lines.values() for evaluations, _ in line})
        axis.set(xscale="log", xlabel="network evaluations", title=title)
        axis.set_ylabel(f"Fréchet distance, {record['num_images']} images")
        axis.set_xticks(budgets, [str(budget) for budget in budgets])
        axis.minorticks_off()
        if max(distance for line in lines.values() for _, distance in line) > 5 * min(real):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)
    figure.savefig(f"{output}.png", dpi=110)
    print(f"Saved {Path(output).resolve()}.png.")


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
    add_attention: bool | None = None,
    mixed_precision: str | None = None,
    compile: bool | None = None,
    num_steps: int = 20,
    rounds: int = 5,
    output: str = "training",
) -> None:
    """
    Throughput of the training step on the embedded digits, beside others on the same network in the same precision with
    the data in memory, measured in turn.

    The others are a plain loop (eager, decoded images in memory), the step of diffusers' own script for unconditional
    training (examples/unconditional_image_generation, written out here: an accelerator, DDPM's noise, the average in a
    model of its own, decoded images in memory), the training step on one constant batch, and the network alone, forward
    and backward. On a CPU the time is that of the process, so that other work on the machine does not count.

    Args:
        train_batch_size: Images per step.
        block_out_channels: The network's channels.
        layers_per_block: The network's layers per level.
        add_attention: Whether the network has attention; by default as training chooses.
        mixed_precision: Of all rows: no, fp16 or bf16; by default what training chooses.
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
                add_attention=add_attention,
                mixed_precision=mixed_precision,
                compile=compile,
                max_train_steps=1000 + num_steps * 2 * (rounds + 1),
                checkpointing_steps=0,
            )
        )
        batches = trainer.images.batches(train_batch_size, seed=0)
        constant = itertools.repeat(next(batches))
        digits = to_model_range(decode_images(load_training_data()))  # so that no other row decodes images
        loops = {
            "training step": lambda: trainer.training_step(batches),
            "a constant batch": lambda: trainer.training_step(constant),
            "plain loop": make_plain_step(trainer, digits),
            "diffusers' script": make_diffusers_step(trainer, digits),
            "network alone": make_network_step(trainer, digits),
        }
        on_gpu = trainer.device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        seconds, memory = {name: [] for name in loops}, {}
        for _ in tqdm(range(rounds + 1), unit="round"):
            for name, step in loops.items():
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                    torch.cuda.synchronize()
                start = clock()
                for _ in range(num_steps):
                    step()
                if on_gpu:
                    torch.cuda.synchronize()
                    memory[name] = torch.cuda.max_memory_allocated() / 1e9
                seconds[name].append(clock() - start)
        synchronizations = count_synchronizations(lambda: [trainer.training_step(batches) for _ in range(num_steps)])

    images, mixed_precision = num_steps * train_batch_size, trainer.accelerator.mixed_precision
    print(f"every row in {precision.DESCRIPTIONS[mixed_precision]}")
    for name, times in seconds.items():
        peak = f"   peak memory {memory[name]:.2f} GB" if memory else ""
        unit = "second" if on_gpu else "CPU second"
        print(f"{name:20} {images / statistics.median(times[1:]):9.1f} images a {unit}{peak}")
    for name in [name for name in loops if name != "training step"]:
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds["training step"][1:], strict=True)]
        print(f"throughput over {name:20} {statistics.median(ratios):6.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")
    rows = [
        {"loop": name, "images_per_second": [images / t for t in times[1:]], "peak_memory_gb": memory.get(name)}
        for name, times in seconds.items()
    ]
    settings = {"train_batch_size": train_batch_size, "block_out_channels": block_out_channels}
    settings |= {
        "layers_per_block": layers_per_block,
        "add_attention": add_attention,
        "mixed_precision": mixed_precision,
        "synchronizations": synchronizations,
    }
    save_json(output, rows, **settings, compile=trainer.compiled)


def machine(
    pipeline: PipelineName = None,
    batch_size: int = 64,
    num_inference_steps: int = 50,
    num_steps: int = 20,
    rounds: int = 5,
    output: str = "machine",
) -> None:
    """
    One table of what this machine does: training, sampling, evaluation, their memory, and how often they wait for a
    GPU. It runs `training`, `overhead` and `memory`, and measures the features of an evaluation.

    Args:
        pipeline: Folder of the pipeline; the digits that come with the package by default.
        batch_size: Images per call, and per training step.
        num_inference_steps: Network evaluations per call.
        num_steps: Training steps per round.
        rounds: Rounds, after one to warm up, whose median counts.
        output: Path of the table, OUTPUT.md, and of the measurements, OUTPUT-training.json and so on.
    """
    check_output(output)
    training(batch_size, num_steps=num_steps, rounds=rounds, output=f"{output}-training")
    overhead(pipeline, batch_size, num_inference_steps, rounds, output=f"{output}-overhead")
    memory(pipeline, batch_size, (num_inference_steps,), f"{output}-memory")
    trained, sampled, stored = (
        json.loads(Path(f"{output}-{name}.json").read_text()) for name in ("training", "overhead", "memory")
    )
    loops = {row["loop"]: row["images_per_second"] for row in trained["rows"]}
    over_plain = [a / b for a, b in zip(loops["training step"], loops["plain loop"], strict=True)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = load_digit_classifier().to(device)
    digits = decode_images(load_training_data().select(range(2000)))
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        # on the CPU in the end: it waits for the device
        extract_features(digits, lambda batch: classifier.features(batch.to(device)))
        rates.append(len(digits) / (time.perf_counter() - start))
    seconds = statistics.median(row["pipeline_seconds"] for row in sampled["rows"])
    (peak,) = stored["rows"]

    def on_gpu(value):
        return "no GPU" if value is None else f"{value:.6g}"

    held = next(row["peak_memory_gb"] for row in trained["rows"] if row["loop"] == "training step")
    held = None if held is None else 1000 * held

    kind = "a second" if trained["device"] != "cpu" else "a CPU second"
    precision_used = precision.DESCRIPTIONS[trained["mixed_precision"]]
    lines = [
        f"| {trained['device']}, torch {trained['torch']}, {batch_size} images a batch | |",
        "| --- | --- |",
        f"| training in {precision_used}, images {kind} | {statistics.median(loops['training step']):.1f} |",
        f"| training step over a plain loop | {statistics.median(over_plain):.2f} |",
        f"| times that {num_steps} training steps wait for the GPU | {on_gpu(trained['synchronizations'])} |",
        f"| peak memory of a training step, MB | {on_gpu(held)} |",
        f"| sampling, images a second at {num_inference_steps} evaluations | {batch_size / seconds:.2f} |",
        f"| a call over its bare network evaluations | {statistics.median(r['ratio'] for r in sampled['rows']):.3f} |",
        f"| times that a call waits for the GPU | {on_gpu(sampled['synchronizations'])} |",
        f"| peak memory of a call, MB | {peak['peak_bytes'] / 1e6:.1f} |",
        f"| features of an evaluation, images a second | {statistics.median(rates[1:]):.0f} |",
    ]
    Path(f"{output}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def arrays(
    num_arrays: int = 262_144,
    size: int = 64,
    batch_size: int = 32,
    num_batches: int = 2_000,
    rounds: int = 5,
    output: str = "arrays",
) -> None:
    """
    Time of a training batch of fields that are read from a .npy file, beside the same fields kept in memory, measured
    in turn; with the time of the first pass over the file, and the memory that reading takes.

    Args:
        num_arrays: Fields in the file, which is written to the temporary folder.
        size: Side of a field.
        batch_size: Fields per batch.
        num_batches: Batches per round, at random places of the file.
        rounds: Rounds, whose median ratio counts.
        output: Path of the measurements, without its ending .json.
    """
    check_output(output)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fields.npy"
        shape = (num_arrays, 1, size, size)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        generator = np.random.default_rng(0)
        for start in range(0, num_arrays, 4096):
            chunk = file[start : start + 4096]
            chunk[:] = generator.standard_normal(chunk.shape, dtype=np.float32)
        del file, chunk
        rows, seconds = open_array_files(str(path))["train"], {}
        start, before = time.perf_counter(), resident_bytes()
        from_file = open_arrays(rows, torch.device("cpu"), max_cache_gb=0)
        first_pass = time.perf_counter() - start

        def draw(data):
            batches = data.batches(batch_size, seed=0)
            start = time.perf_counter()
            for _ in range(num_batches):
                next(batches)
            return time.perf_counter() - start

        draw(from_file)
        extra = max(0, resident_bytes() - before)
        data = {"from the file": from_file, "in memory": open_arrays(rows, torch.device("cpu"), max_cache_gb=1e9)}
        for _ in tqdm(range(rounds), unit="round"):
            for name, source in data.items():
                seconds.setdefault(name, []).append(draw(source))
    for name, times in seconds.items():
        print(f"{name:16} {1000 * statistics.median(times) / num_batches:7.3f} ms a batch")
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"ratio {ratio:.2f}; first pass {first_pass:.1f} s; reading takes {extra / 1e6:.0f} MB")
    rows = [{"data": name, "seconds": times} for name, times in seconds.items()]
    settings = {"num_arrays": num_arrays, "size": size, "batch_size": batch_size, "num_batches": num_batches}
    save_json(output, rows, **settings, first_pass_seconds=first_pass, extra_bytes=extra)


def resident_bytes() -> int:
    """The memory of this process, as Linux tells it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_autocast(trainer: Trainer) -> Callable[[], Any]:
    """The precision that the trainer computes in, as a context."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[trainer.accelerator.mixed_precision]
    return lambda: torch.autocast(trainer.device.type, dtype, enabled=dtype is not None)


def shuffled_batches(digits: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches of decoded images by a DataLoader, again and again."""
    loader = DataLoader(digits, batch_size, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def make_plain_step(trainer: Trainer, digits: torch.Tensor) -> Callable[[], None]:
    """One step of a plain loop on the trainer's network: no accelerator and no fusing."""
    config, device = trainer.config, trainer.device
    unet = make_unet(config, trainer.images.shape).to(device)
    scheduler = DDPMScheduler.from_config(trainer.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate)
    ema = EMAModel(unet.parameters(), use_ema_warmup=True)
    batches, autocast = shuffled_batches(digits, config.train_batch_size), make_autocast(trainer)
    scaler = torch.amp.GradScaler(device.type, enabled=trainer.accelerator.mixed_precision == "fp16")

    def step():
        clean = next(batches).to(device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, len(scheduler), (len(clean),), device=device)
        with autocast():
            output = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = F.mse_loss(output.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()  # for the progress bar, each step

    return step


def make_diffusers_step(trainer: Trainer, digits: torch.Tensor) -> Callable[[], None]:
    """One step of diffusers' train_unconditional.py with its defaults and `--use_ema`, on the trainer's network."""
    accelerator, config = trainer.accelerator, trainer.config
    unet = make_unet(config, trainer.images.shape)
    ema = EMAModel(
        unet.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=type(unet),
        model_config=unet.config,
    )
    ema.to(accelerator.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10_000)
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    batches = shuffled_batches(digits, config.train_batch_size)

    def step():
        clean = next(batches).to(accelerator.device)
        noise = torch.randn(clean.shape, device=clean.device)
        timesteps = torch.randint(0, len(scheduler), (len(clean),), device=clean.device).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(unet):
            loss = F.mse_loss(unet(noisy, timesteps).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(unet.parameters())
        loss.detach().item()

    return step


def make_network_step(trainer: Trainer, digits: torch.Tensor) -> Callable[[], None]:
    """The trainer's network alone, forward and backward, on one batch: what no loop can be faster than, uncompiled."""
    config, device = trainer.config, trainer.device
    unet = make_unet(config, trainer.images.shape).to(device)
    clean, autocast = digits[: config.train_batch_size].to(device), make_autocast(trainer)
    timesteps = torch.arange(len(clean), device=device)

    def step():
        with autocast():
            output = unet(clean, timesteps).sample
        F.mse_loss(output.float(), clean).backward()
        unet.zero_grad()

    return step


if __name__ == "__main__":
    commands = {
        "overhead": overhead,
        "memory": memory,
        "schedulers": schedulers,
        "samplers": samplers,
        "plot_samplers": plot_samplers,
        "compositions": compositions,
        "convergence": convergence,
        "training": training,
        "machine": machine,
        "arrays": arrays,
    }
    tyro.extras.subcommand_cli_from_dict(commands, use_underscores=True)
