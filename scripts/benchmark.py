"""Measurements behind the README's figures: `python scripts/benchmark.py --help`."""

import statistics
import time
from pathlib import Path

import diffusers
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import tyro
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline

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


def load(pipeline: str) -> NCSNPipeline:
    pipe = NCSNPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def overhead(
    pipeline: tyro.conf.Positional[str], batch_size: int = 16, num_inference_steps: int = 50, repeats: int = 5
) -> None:
    """
    Time of the pipeline over the time of its network calls alone, the two in turn in one run.

    Args:
        pipeline: Folder of the pipeline.
        batch_size: Pictures a call.
        num_inference_steps: Network evaluations a call.
        repeats: Pairs of runs; the median of their ratios counts.
    """
    pipe = load(pipeline)
    x = pipe(batch_size, num_inference_steps, output_type="latent").images.to(pipe.unet.dtype)  # warms up, too
    timesteps = pipe.scheduler.timesteps

    @torch.no_grad()
    def bare():
        for t in timesteps:
            pipe.unet(x, t)

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


def schedulers(
    pipeline: tyro.conf.Positional[str], output: str = "schedulers.png", num_images: int = 12, seed: int = 0
) -> None:
    """
    Draw a row of pictures with each scheduler, swapped in by `from_config` alone.

    Args:
        pipeline: Folder of the pipeline.
        output: The picture's file.
        num_images: Pictures a row.
        seed: Seed of each row.
    """
    pipe = load(pipeline)
    config = pipe.scheduler.config
    paper = AnnealedLangevinScheduler.from_config(config, noise_rule="euler_maruyama", num_langevin_steps=5)
    rows = {
        "annealed Langevin,\nconsistent, 50": (pipe, pipe.scheduler, 50),
        "annealed Langevin,\nEuler–Maruyama, 232×5": (pipe, paper, 232),
    }
    for label, name in STOCK_SCHEDULERS.items():
        rows[f"{label}, 50"] = (pipe, getattr(diffusers, name).from_config(config), 50)
    for name in ("DDIM", "DDPM"):
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
        stock: DiffusionPipeline = getattr(diffusers, f"{name}Pipeline")(pipe.unet, scheduler)
        stock.set_progress_bar_config(disable=True)
        rows[f"diffusers' own\n{name}Pipeline, 50"] = (stock.to(pipe.device), scheduler, 50)

    figure, axes = plt.subplots(len(rows), 1, figsize=(0.6 * num_images + 2.4, 0.62 * len(rows)), layout="constrained")
    for axis, (label, (runner, scheduler, num_inference_steps)) in zip(
        axes, tqdm(rows.items(), unit="row"), strict=True
    ):
        runner.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        images = runner(
            batch_size=num_images, num_inference_steps=num_inference_steps, generator=generator, output_type="pt"
        ).images
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).cpu(), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(output, dpi=110, bbox_inches="tight")
    print(f"Saved {Path(output).resolve()}.")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"overhead": overhead, "schedulers": schedulers}, use_underscores=True)
