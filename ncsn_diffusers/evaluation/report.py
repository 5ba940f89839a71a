"""What an evaluation leaves for people: report.md, its plots and grids, and the metadata of a model card."""

import math
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from PIL import Image

from ..atomic_files import replacing
from ..images import make_grid, to_pil
from ..kept_batches import GO_ON
from .calibration import NUM_SIMULATIONS, Calibration
from .record import (
    BranchRecord,
    ClassRecord,
    EvaluationRecord,
    LevelLoss,
    LikelihoodRecord,
    LossRecord,
    PosteriorRecord,
)


def make_image(rows: list[torch.Tensor]) -> Image.Image:
    """Rows of uint8 images `(n, channels, height, width)`, the first the longest, large enough to judge by eye."""
    grid = make_grid([image for row in rows for image in to_pil(row)], num_columns=len(rows[0]), margin=2)
    scale = max(1, round(64 / rows[0].shape[-2]))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def plot_classes(shares: dict[str, dict[str, float]], path: Path) -> None:
    """The share of each class in each set."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    names, width = list(shares["samples"]), 0.8 / len(shares)
    for k, (label, values) in enumerate(shares.items()):
        places = np.arange(len(names)) + (k - (len(shares) - 1) / 2) * width
        axes.bar(places, list(values.values()), width, label=label)
    axes.set(xticks=range(len(names)), xticklabels=names, ylabel="share", xlabel="class")
    figure.legend(loc="outside upper center", ncols=len(shares))
    figure.savefig(path, dpi=100)


def plot_losses(levels: list[LevelLoss], path: Path) -> None:
    """The loss over the noise level."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    sigmas, losses, errors = zip(*((level.sigma, level.loss, level.standard_error) for level in levels), strict=True)
    axes.errorbar(sigmas, losses, errors, marker="o", capsize=3)
    axes.set(xscale="log", yscale="log", xlabel="sigma, in the network's units", ylabel="loss per dimension")
    figure.savefig(path, dpi=100)


def plot_reliability(operators: dict[str, tuple[Calibration, Calibration]], path: Path) -> None:
    """
    By how much the central intervals of the samples cover more of the truths than is right, for each operator: of the
    samples themselves, and of exact ones as a band.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="gray", linestyle="--", linewidth=1)
    for k, (name, (samples, exact)) in enumerate(operators.items()):
        right, actual, error = _columns(samples.reliability)
        _, of_exact, deviation = _columns(exact.reliability)
        color, marker = f"C{k}", "osD^vPX"[k % 7]
        excess = of_exact - right
        axes.fill_between(right, excess - 2 * deviation, excess + 2 * deviation, color=color, alpha=0.15, linewidth=0)
        beside = right + 0.008 * (k - (len(operators) - 1) / 2)  # so that no error bar hides another
        axes.errorbar(beside, actual - right, error, color=color, marker=marker, capsize=3, label=name)
    axes.set(xlabel="right coverage", ylabel="coverage above right (below 0: too narrow)", xlim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=100)


def _columns(reliability: list[dict[str, float]]) -> list[np.ndarray]:
    """Of the intervals, the right coverage, the actual one, and its standard error."""
    return [np.array([interval[key] for interval in reliability]) for key in ("nominal", "actual", "standard_error")]


def make_verdict(record: EvaluationRecord) -> str:
    """
    What the distances say, in one sentence. Whether samples and held-out images differ is judged by the kernel
    distance, whose mean does not depend on the number of images, by precision and recall, and, where there are as many
    images of both, by the Fréchet distance.
    """
    samples, floor = ({metric.key: metric for metric in metrics} for metrics in (record.samples, record.floor))
    frechet = f"Fréchet distance {samples['frechet_distance']}, floor {floor['frechet_distance']}"
    kernel, kernel_floor = samples["kernel_distance"], floor["kernel_distance"]
    error = math.hypot(kernel.standard_error, kernel_floor.standard_error)
    number = f"{record.sampling.num_images:,} samples"
    least = min(record.sampling.num_images, record.data.num_held_out)
    is_outside = any(  # by more than three of the errors that counting has
        floor[key].value - samples[key].value > 3 / math.sqrt(2 * least) for key in ("precision", "recall")
    )
    ratio = samples["frechet_distance"].value / max(floor["frechet_distance"].value, 1e-12)
    is_far = ratio > 1.5 and record.data.num_held_out > 0.8 * record.sampling.num_images  # of as many images
    if kernel.value - kernel_floor.value > 2 * error or is_outside or is_far:
        times = f", {ratio:.2g} times" if 1.05 <= ratio < 1e6 else ""
        return f"**{number} differ from real images ({frechet}{times}).**"
    if kernel_floor.value - kernel.value > 2 * error:
        return f"**{number} are nearer to the reference than held-out real images are ({frechet}), see below.**"
    return f"**No difference between {number} and held-out real images was found in these features ({frechet}).**"


def explain_below_floor(record: EvaluationRecord) -> list[str]:
    """What it means that distances lie below their floor: a paragraph for each that does."""
    samples, floor = ({metric.key: metric for metric in metrics} for metrics in (record.samples, record.floor))
    paragraphs = []
    names = {"frechet_distance": "Fréchet distance", "kernel_distance": "kernel distance"}
    below = [name for key, name in names.items() if samples[key].value < floor[key].value]
    if below:
        text = (
            f"The {' and the '.join(below)} of the samples {'lies' if len(below) == 1 else 'lie'} below the floor. No "
            "network can be better than real images: the difference is chance, "
        )
        if record.data.num_held_out < record.sampling.num_images and "Fréchet distance" in below:
            text += (
                f"the bias of the Fréchet distance of few images ({record.data.num_held_out:,} held-out images beside "
                f"{record.sampling.num_images:,} samples), "
            )
        text += "held-out images of another kind than the reference, or a network that repeats its training images."
        paragraphs += [text, ""]
    key = "median_distance_to_nearest_reference"
    if samples[key].value < 0.9 * floor[key].value:
        share = 1 - samples[key].value / floor[key].value
        paragraphs += [
            f"The samples are {share:.0%} nearer to their nearest reference images than held-out images are: look "
            "below whether they repeat training images, or are only plainer than real ones.",
            "",
        ]
    return paragraphs


def report_head(record: EvaluationRecord, verdict: str, are_images: bool) -> list[str]:
    """The report from its title to the table of metrics."""
    sampling, data = record.sampling, record.data
    levels = "num_inference_steps" if sampling.sigmas is None else "sigmas"
    held_out = f"of `{data.held_out_split}`" if data.held_out_split else "others of the same"
    return [
        f"# {record.pipeline}",
        "",
        verdict,
        "",
        f"{record.date}, `{record.command}`",
        "",
        f"{sampling.num_images:,} samples, {sampling.evaluations:,} network evaluations each: "
        f"{sampling.scheduler}, {levels}={getattr(sampling, levels)}, seed {sampling.seed}, {sampling.dtype}.",
        "",
        f"Reference: {data.num_reference:,} {'images ' if are_images else ''}of `{data.reference_split}` of "
        f"{data.name}; held out: {data.num_held_out:,} {held_out}."
        f"{f' Features: {record.features}.' if are_images else ''}",
        "",
        f"| compared with the reference | samples | held-out real {'images' if are_images else 'data'} |",
        "| --- | --- | --- |",
        *(
            f"| {metric.title} | {metric} | {other} |"
            for metric, other in zip(record.samples, record.floor, strict=True)
        ),
        "",
    ]


def make_report(record: EvaluationRecord) -> str:
    """report.md, whose images lie beside it."""
    lines = [
        *report_head(record, make_verdict(record), are_images=True),
        "The right column is the floor: real images that the reference does not contain. Distances depend on the "
        "features and on the number of images, and compare only where both are the same. Precision and recall (k = 3) "
        "use as many images of the reference as of the set that is compared.",
        "",
        *explain_below_floor(record),
        "![samples](samples.png)",
        "",
        "## Nearest training images",
        "",
        "Each row: a sample, then the training images with the nearest features. If samples are memorized, their "
        "distance to the nearest is well below that of held-out images.",
        "",
        "![samples and their neighbors](neighbors.png)",
    ]
    for part, describe in (
        (record.classes, _class_lines),
        (record.losses, loss_lines),
        (record.likelihood, _likelihood_lines),
        (record.branches, _branch_lines),
        (record.posterior, _posterior_lines),
    ):
        if part is not None:
            lines += ["", *describe(part)]
    return "\n".join(lines) + "\n"


def _class_lines(classes: ClassRecord) -> list[str]:
    as_asked = classes.named_as_asked
    named = "" if as_asked is None else f" It names {as_asked:.1%} of the samples as the class that was asked for."
    return ["## Classes", "", f"By {classes.classes_by}.{named}", "", "![shares of the classes](classes.png)"]


def loss_lines(losses: LossRecord, what: str = "images") -> list[str]:
    """The section on the network's loss, of so many `what`."""
    return [
        "## The network",
        "",
        f"Denoising score matching loss ½ ‖sigma score + z‖² per dimension, mean of {losses.number:,} held-out {what}:",
        "",
        "![loss at each noise level](losses.png)",
        "",
        "| sigma | loss | standard error |",
        "| --- | --- | --- |",
        *(f"| {level.sigma:.4g} | {level.loss:.4g} | {level.standard_error:.2g} |" for level in losses.levels),
    ]


def _likelihood_lines(likelihood: LikelihoodRecord) -> list[str]:
    return [
        f"Likelihood: {likelihood.bits} {likelihood.bits.title}, an upper bound, of {likelihood.number:,} held-out "
        f"images, uniformly dequantized, by the probability-flow ODE in {likelihood.steps} Runge-Kutta steps with one "
        "Hutchinson probe.",
    ]


def _branch_lines(branches: BranchRecord) -> list[str]:
    ratio, most = branches.log_ratio, branches.most
    fits = ratio.value - 2 * ratio.standard_error <= most
    verdict = (
        "The outputs with and without a class can belong together."
        if fits
        else "The outputs with and without a class do not belong together, and guidance and compositions, which use "
        "their difference, exaggerate it."
    )
    return [
        "## With and without a class",
        "",
        f"log p(c|x)/p(c) of {branches.number:,} samples of known class, by the network's own errors: {ratio} nats; "
        f"{most:.2f}, the logarithm of the number of classes, is the most that is possible. {verdict}",
    ]


def calibration_table(posterior: PosteriorRecord) -> list[str]:
    """A row for each operator, and one for exact samples."""
    found = {}
    for name, (samples, exact) in posterior.operators.items():
        found[name], found[f"{name}, exact"] = samples.metrics, exact.metrics
    columns = {metric.key: metric.title for metrics in found.values() for metric in metrics}
    table = [["operator", *columns.values()], ["---"] * (1 + len(columns))]
    for name, metrics in found.items():
        values = {metric.key: str(metric) for metric in metrics}
        table.append([name, *(values.get(key, "") for key in columns)])
    return [f"| {' | '.join(cells)} |" for cells in table]


def _posterior_lines(posterior: PosteriorRecord) -> list[str]:
    return [
        "## Given a measurement",
        "",
        f"{posterior.images:,} held-out images, {posterior.samples:,} samples each given A x + noise of standard "
        f"deviation {posterior.noise_std:g} in units of the data, {posterior.evaluations:,} network evaluations "
        "for each sample.",
        "",
        *calibration_table(posterior),
        "",
        "± is the standard error over the images. CRPS is the continuous ranked probability score, for a range of 1: "
        "the less, the better. Coverage is the share of the pixels whose true value lies between the least and the "
        "largest sample; spread over error is the root of the samples' variance over the squared error of their mean, "
        "with the factor for the number of samples in it. Below what is right, samples are too sure of themselves. "
        "For coverage, pixels where the truth and all samples agree do not count. Misfit is ‖y - A x‖² over its mean "
        "for the truth. "
        "PSNR is for a range of 1.",
        "",
        f"Rows named exact are the floor: {NUM_SIMULATIONS} simulations, with as many images and samples, of the exact "
        "posterior of a Gaussian with the mean and the covariance of reference images. Their ± is the standard "
        "deviation of one simulation.",
        "",
        "![coverage of central intervals](reliability.png)",
        "",
        "Coverage of all central intervals of the samples above what is right; bands: exact samples, two standard "
        "deviations each way.",
    ]


def update_model_card(path: Path, record: EvaluationRecord) -> None:
    """
    Write the metrics into the card's metadata, in place of an earlier evaluation's on the same data.

    Args:
        path (`Path`): the card.
        record ([`EvaluationRecord`]): what was found.

    Raises:
        OSError: the card cannot be written, and stays as it was.
    """
    card = ModelCard.load(path)
    drawn = f"{record.sampling.num_images:,} samples, {record.sampling.evaluations:,} evaluations each"
    entries = [(metric, f"{drawn}, features: {record.features}") for metric in record.samples if metric.card_type]
    if record.likelihood is not None:
        entries.append((record.likelihood.bits, f"{record.likelihood.number:,} images, upper bound"))
    if record.posterior is not None:
        measured = f"{record.posterior.images:,} images, {record.posterior.samples:,} samples each"
        for name, (samples, _) in record.posterior.operators.items():
            entries += [(metric, f"{name}, {measured}") for metric in samples.metrics if metric.card_type]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=record.data.id,
            dataset_name=record.data.name,
            dataset_split=record.data.reference_split,
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
    with replacing(path, GO_ON) as aside:
        card.save(aside)
