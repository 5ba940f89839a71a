"""What an evaluation leaves: report.md, its plots and grids, and the figures in a model card."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from PIL import Image


def make_grid(rows: list[list[torch.Tensor]], margin: int = 2) -> Image.Image:
    """uint8 pictures `(channels, height, width)` in rows, on white."""
    channels, height, width = rows[0][0].shape
    shape = (channels, len(rows) * (height + margin) + margin, max(map(len, rows)) * (width + margin) + margin)
    grid = np.full(shape, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = margin + i * (height + margin), margin + j * (width + margin)
            grid[:, top : top + height, left : left + width] = picture.numpy()
    if channels not in (1, 3, 4):
        grid = grid[:1]
    image = Image.fromarray(grid[0] if len(grid) == 1 else grid.transpose(1, 2, 0))
    scale = max(1, round(64 / height))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def plot_classes(shares: dict[str, dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    names, width = list(shares["samples"]), 0.8 / len(shares)
    for k, (label, values) in enumerate(shares.items()):
        places = np.arange(len(names)) + (k - (len(shares) - 1) / 2) * width
        axes.bar(places, list(values.values()), width, label=label.replace("_", "-"))
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="share", xlabel="class")
    figure.legend(loc="outside upper center", ncols=len(shares))
    figure.savefig(path, dpi=100)


def plot_losses(levels: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    sigmas, losses, errors = ([level[key] for level in levels] for key in ("sigma", "loss", "standard_error"))
    axes.errorbar(sigmas, losses, errors, marker="o", capsize=3)
    axes.set(xscale="log", yscale="log", xlabel="sigma, in units of the data", ylabel="loss a dimension")
    figure.savefig(path, dpi=100)


def make_report(metrics: dict[str, Any]) -> str:
    """report.md, whose pictures lie beside it."""
    samples, data = metrics["sampling"], metrics["data"]
    levels = "num_inference_steps" if samples["sigmas"] is None else "sigmas"
    figures = {"samples": metrics["samples"], "held-out real pictures": metrics["floor"]}
    held_out = f"of `{data['held_out_split']}`" if data["held_out_split"] else "others of the same"
    lines = [
        f"# {metrics['pipeline']}",
        "",
        f"{samples['num_images']:,} samples, {samples['evaluations']:,} network evaluations each: "
        f"{samples['scheduler']}, {levels}={samples[levels]}, seed {samples['seed']}, {samples['dtype']}.",
        "",
        f"Reference: {data['num_reference']:,} pictures of `{data['reference_split']}` of {data['name']}; held out: "
        f"{data['num_held_out']:,} {held_out}. Features: {metrics['features']}.",
        "",
        "| compared with the reference | " + " | ".join(figures) + " |",
        "| --- |" + " --- |" * len(figures),
    ]
    for key, title, form in (
        ("number", "pictures", "{:,}"),
        ("frechet_distance", "Fréchet distance", "{:.4g}"),
        ("kernel_distance", "kernel distance ± standard error", "{:.4g}"),
        ("precision", "precision", "{:.3f}"),
        ("recall", "recall", "{:.3f}"),
        ("class_entropy", "entropy of the classes (nats)", "{:.4f}"),
        ("median_distance_to_nearest_reference", "distance to the nearest reference picture, median", "{:.4g}"),
    ):
        if key in metrics["samples"]:
            cells = [form.format(column[key]) for column in figures.values()]
            if key == "kernel_distance":
                errors = [column["kernel_distance_standard_error"] for column in figures.values()]
                cells = [f"{cell} ± {error:.2g}" for cell, error in zip(cells, errors, strict=True)]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The right column is the floor: what real pictures that the reference does not hold come to. Each distance "
        "depends on the features and on the number of pictures, and compares only with one of the same. Precision and "
        "recall (k = 3) take as many pictures of the reference as of the others.",
        "",
        "![samples](samples.png)",
        "",
        "## Nearest training pictures",
        "",
        "Each row: a sample, then the training pictures whose features are nearest. Where samples are learnt by heart, "
        "their distance to the nearest is well below that of held-out pictures.",
        "",
        "![samples and their neighbours](neighbours.png)",
    ]
    if "class_shares" in metrics:
        lines += ["", "## Classes", "", f"By {metrics['classes_by']}.", "", "![shares of the classes](classes.png)"]
    if "loss_per_level" in metrics:
        lines += [
            "",
            "## The network",
            "",
            "Denoising score matching loss ½ ‖sigma score + z‖² a dimension, of "
            f"{metrics['loss_images']:,} held-out pictures:",
            "",
            "![loss at each noise level](losses.png)",
            "",
            "| sigma | loss | standard error |",
            "| --- | --- | --- |",
        ]
        lines += [
            f"| {level['sigma']:.4g} | {level['loss']:.4g} | {level['standard_error']:.2g} |"
            for level in metrics["loss_per_level"]
        ]
    if "bits_per_dim" in metrics:
        bits = metrics["bits_per_dim"]
        lines += [
            "",
            f"Likelihood: {bits['mean']:.3f} ± {bits['standard_error']:.2g} bits per dimension, an upper bound, of "
            f"{bits['number']:,} held-out pictures, uniformly dequantised, by the probability-flow ODE in "
            f"{bits['steps']} Runge-Kutta steps with one Hutchinson probe.",
        ]
    return "\n".join(lines) + "\n"


def update_model_card(path: Path, metrics: dict[str, Any], is_fid: bool) -> None:
    """Put the figures into the card's metadata, in place of an earlier evaluation's on the same data."""
    card = ModelCard.load(path)
    number, evaluations = metrics["samples"]["number"], metrics["sampling"]["evaluations"]
    figures = {
        "frechet_distance": ("fid" if is_fid else "frechet-distance", "FID" if is_fid else "Fréchet distance"),
        "kernel_distance": ("kid" if is_fid else "kernel-distance", "KID" if is_fid else "Kernel distance"),
        "precision": ("improved-precision", "Precision"),
        "recall": ("improved-recall", "Recall"),
    }
    dataset = {"dataset_type": metrics["data"]["id"], "dataset_name": metrics["data"]["name"]}
    dataset["dataset_split"] = metrics["data"]["reference_split"]
    task = {"task_type": "unconditional-image-generation"}
    results = []
    for key, (kind, title) in figures.items():
        name = f"{title} ({number:,} samples, {evaluations:,} evaluations each, features: {metrics['features']})"
        value = round(metrics["samples"][key], 4)
        results.append(EvalResult(**task, **dataset, metric_type=kind, metric_name=name, metric_value=value))
    if "bits_per_dim" in metrics:
        bits = metrics["bits_per_dim"]
        name = f"Bits per dimension ({bits['number']:,} pictures, upper bound)"
        value = round(bits["mean"], 4)
        results.append(EvalResult(**task, **dataset, metric_type="bits-per-dim", metric_name=name, metric_value=value))
    written = {(result.unique_identifier, result.metric_type) for result in results}
    kept = [r for r in card.data.eval_results or [] if (r.unique_identifier, r.metric_type) not in written]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    card.save(path)
