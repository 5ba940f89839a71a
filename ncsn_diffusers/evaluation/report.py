"""What an evaluation leaves for people: report.md, its plots and grids, and the metadata of a model card."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from PIL import Image

from ..images import make_grid, to_pil
from .calibration import NUM_SIMULATIONS
from .metrics import Metric


def make_image(rows: list[torch.Tensor]) -> Image.Image:
    """Rows of uint8 images `(n, channels, height, width)`, the first the longest, large enough to judge by eye."""
    grid = make_grid([image for row in rows for image in to_pil(row)], num_columns=len(rows[0]), margin=2)
    scale = max(1, round(64 / rows[0].shape[-2]))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def plot_classes(shares: dict[str, dict[str, float]], path: Path) -> None:
    """The share of each class, from `class_shares` of metrics.json."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    names, width = list(shares["samples"]), 0.8 / len(shares)
    for k, (label, values) in enumerate(shares.items()):
        places = np.arange(len(names)) + (k - (len(shares) - 1) / 2) * width
        axes.bar(places, list(values.values()), width, label=label)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="share", xlabel="class")
    figure.legend(loc="outside upper center", ncols=len(shares))
    figure.savefig(path, dpi=100)


def plot_losses(levels: list[dict[str, float]], path: Path) -> None:
    """The loss over the noise level, from `loss_per_level` of metrics.json."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    sigmas, losses, errors = ([level[key] for level in levels] for key in ("sigma", "loss", "standard_error"))
    axes.errorbar(sigmas, losses, errors, marker="o", capsize=3)
    axes.set(xscale="log", yscale="log", xlabel="sigma, in units of the data", ylabel="loss per dimension")
    figure.savefig(path, dpi=100)


def plot_reliability(operators: dict[str, dict[str, Any]], path: Path) -> None:
    """Coverage of the central intervals of the samples against what is right, from `posterior` of metrics.json."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
    for k, (name, operator) in enumerate(operators.items()):
        right, actual, error = (
            [interval[key] for interval in operator["reliability"]] for key in ("nominal", "actual", "standard_error")
        )
        exact, deviation = (
            np.array([interval[key] for interval in operator["exact"]["reliability"]])
            for key in ("actual", "standard_error")
        )
        color = f"C{k}"
        axes.fill_between(right, exact - 2 * deviation, exact + 2 * deviation, color=color, alpha=0.15, linewidth=0)
        axes.errorbar(right, actual, error, color=color, marker="o", capsize=3, label=name)
    axes.set(xlabel="right coverage", ylabel="coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def make_report(
    record: dict[str, Any],
    samples: list[Metric],
    floor: list[Metric],
    bits: Metric | None,
    calibrated: dict[str, list[Metric]],
) -> str:
    """
    report.md, whose images lie beside it.

    Args:
        record (`dict`): what metrics.json holds.
        samples, floor (`list[Metric]`): the metrics of the samples and of held-out real images, in the same order.
        bits ([`Metric`], *optional*): bits per dimension of held-out images.
        calibrated (`dict`):
            Metrics of samples given a measurement by the operator's name, each followed by those of exact ones, which
            may be fewer; empty where there are none.
    """
    sampling, data = record["sampling"], record["data"]
    levels = "num_inference_steps" if sampling["sigmas"] is None else "sigmas"
    held_out = f"of `{data['held_out_split']}`" if data["held_out_split"] else "others of the same"
    lines = [
        f"# {record['pipeline']}",
        "",
        f"{sampling['num_images']:,} samples, {sampling['evaluations']:,} network evaluations each: "
        f"{sampling['scheduler']}, {levels}={sampling[levels]}, seed {sampling['seed']}, {sampling['dtype']}.",
        "",
        f"Reference: {data['num_reference']:,} images of `{data['reference_split']}` of {data['name']}; held out: "
        f"{data['num_held_out']:,} {held_out}. Features: {record['features']}.",
        "",
        "| compared with the reference | samples | held-out real images |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {metric.title} | {metric} | {other} |" for metric, other in zip(samples, floor, strict=True)]
    lines += [
        "",
        "The right column is the floor: real images that the reference does not contain. Distances depend on the "
        "features and on the number of images, and compare only where both are the same. Precision and recall (k = 3) "
        "use as many images of the reference as of the set that is compared.",
        "",
        "![samples](samples.png)",
        "",
        "## Nearest training images",
        "",
        "Each row: a sample, then the training images with the nearest features. If samples are memorised, their "
        "distance to the nearest is well below that of held-out images.",
        "",
        "![samples and their neighbours](neighbours.png)",
    ]
    if "class_shares" in record:
        as_asked = record.get("named_as_asked")
        named = "" if as_asked is None else f" It names {as_asked:.1%} of the samples as the class that was asked for."
        lines += [
            "",
            "## Classes",
            "",
            f"By {record['classes_by']}.{named}",
            "",
            "![shares of the classes](classes.png)",
        ]
    if "loss_per_level" in record:
        lines += [
            "",
            "## The network",
            "",
            "Denoising score matching loss ½ ‖sigma score + z‖² per dimension, mean of "
            f"{record['loss_images']:,} held-out images:",
            "",
            "![loss at each noise level](losses.png)",
            "",
            "| sigma | loss | standard error |",
            "| --- | --- | --- |",
        ]
        lines += [
            f"| {level['sigma']:.4g} | {level['loss']:.4g} | {level['standard_error']:.2g} |"
            for level in record["loss_per_level"]
        ]
    if bits is not None:
        estimate = record["bits_per_dim"]
        lines += [
            "",
            f"Likelihood: {bits} {bits.title}, an upper bound, of {estimate['number']:,} held-out images, uniformly "
            f"dequantised, by the probability-flow ODE in {estimate['steps']} Runge-Kutta steps with one Hutchinson "
            "probe.",
        ]
    if calibrated:
        lines += ["", *_posterior_lines(record["posterior"], calibrated)]
    return "\n".join(lines) + "\n"


def _posterior_lines(posterior: dict[str, Any], calibrated: dict[str, list[Metric]]) -> list[str]:
    columns = {metric.key: metric.title for metrics in calibrated.values() for metric in metrics}
    rows = [
        [name, *(str(found.get(key, "")) for key in columns)]
        for name, found in ((name, {m.key: m for m in metrics}) for name, metrics in calibrated.items())
    ]
    table = [["operator", *columns.values()], ["---"] * (1 + len(columns)), *rows]
    return [
        "## Given a measurement",
        "",
        f"{posterior['images']:,} held-out images, {posterior['samples']:,} samples each given A x + noise of standard "
        f"deviation {posterior['noise_std']:g} in units of the data, {posterior['evaluations']:,} network evaluations "
        "for each sample.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        "± is the standard error over the images. Coverage is the share of the pixels whose true value lies between "
        "the least and the largest sample; variance over squared error has the factor for the number of samples in "
        "it. Below what is right, samples are too sure of themselves. Pixels where the truth and all samples agree do "
        "not count. Misfit is ‖y - A x‖² over its mean for the truth. PSNR is for a range of 1.",
        "",
        f"Rows named exact are the floor: {NUM_SIMULATIONS} simulations, with as many images and samples, of the exact "
        "posterior of a Gaussian with the mean and the covariance of reference images. Their ± is the standard "
        "deviation of one simulation.",
        "",
        "![coverage of central intervals](reliability.png)",
        "",
        "Coverage of all central intervals of the samples; bands: exact samples, two standard deviations each way.",
    ]


def update_model_card(
    path: Path,
    record: dict[str, Any],
    samples: list[Metric],
    bits: Metric | None,
    calibrated: dict[str, list[Metric]],
) -> None:
    """
    Write the metrics into the card's metadata, in place of an earlier evaluation's on the same data.

    Args:
        path (`Path`): the card.
        record, samples, bits, calibrated: see [`make_report`].
    """
    card = ModelCard.load(path)
    sampling, data = record["sampling"], record["data"]
    drawn = f"{sampling['num_images']:,} samples, {sampling['evaluations']:,} evaluations each"
    entries = [(metric, f"{drawn}, features: {record['features']}") for metric in samples if metric.card_type]
    if bits is not None:
        entries.append((bits, f"{record['bits_per_dim']['number']:,} images, upper bound"))
    for name in record.get("posterior", {}).get("operators", ()):
        given = f"{name}, {record['posterior']['images']:,} images, {record['posterior']['samples']:,} samples each"
        entries += [(metric, given) for metric in calibrated[name] if metric.card_type]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data["id"],
            dataset_name=data["name"],
            dataset_split=data["reference_split"],
            metric_type=metric.card_type,
            metric_name=f"{metric.card_title} ({conditions})",
            metric_value=round(metric.value, 4),
        )
        for metric, conditions in entries
    ]
    written = {(result.unique_identifier, result.metric_type) for result in results}
    kept = [r for r in card.data.eval_results or [] if (r.unique_identifier, r.metric_type) not in written]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    card.save(path)
