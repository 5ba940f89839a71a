"""What an evaluation of data that are no images leaves for people: report.md and the plot of spectra."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .record import EvaluationRecord, LikelihoodRecord, PosteriorRecord, SpectrumRecord
from .report import calibration_table, loss_lines, report_head

_MOST_CHANNELS = 8  # in the plot


def plot_spectra(spectrum: SpectrumRecord, path: Path) -> None:
    """The power of samples over that of the reference, and of held-out data as a band of two standard errors."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="gray", linestyle="--", linewidth=1)
    x = np.array(spectrum.wavenumbers)
    rows = zip(*(part[key] for part in (spectrum.samples, spectrum.floor) for key in ("ratios", "errors")), strict=True)
    for channel, row in enumerate(rows):
        ratio, error, floor, floor_error = map(np.array, row)
        if channel < _MOST_CHANNELS:
            low, high = floor - 2 * floor_error, floor + 2 * floor_error
            axes.fill_between(x, low.clip(1e-3), high, color=f"C{channel}", alpha=0.15, linewidth=0)
            axes.errorbar(x, ratio, error, color=f"C{channel}", marker=".", capsize=2, label=f"channel {channel}")
    axes.set(yscale="log", xlabel="wavenumber, cycles per grid step", ylabel="power over the reference's")
    if len(spectrum.samples["ratios"]) > 1:
        axes.legend()
    figure.savefig(path, dpi=100)


def find_differences(record: EvaluationRecord) -> list[str]:
    """
    In what samples differ from the reference by more than held-out data do, beyond chance: each channel's values and
    the kernel distance by more than three standard errors, the power at a wavenumber by more than four, since there are
    many.
    """
    samples, floor = ({metric.key: metric for metric in metrics} for metrics in (record.samples, record.floor))
    found = []
    for key, metric in samples.items():
        other = floor[key]
        if key.startswith("wasserstein") or key == "kernel_distance":
            error = math.hypot(metric.standard_error, other.standard_error)
            if metric.value - other.value > 3 * error:
                title = metric.title.removesuffix(" ± standard error")
                found.append(f"{title} {metric}, floor {other}")
    ratios, errors, others, other_errors = (
        np.array(part[key], dtype=float)
        for part in (record.spectrum.samples, record.spectrum.floor)
        for key in ("ratios", "errors")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.abs(np.log(ratios)) - np.abs(np.log(others))
        outside = excess > 4 * np.hypot(errors / ratios, other_errors / others)  # False where there is no power
    for channel in np.flatnonzero(outside.any(1)):
        bins = np.flatnonzero(outside[channel])
        lengths = [1 / record.spectrum.wavenumbers[i] for i in (bins[-1], bins[0])]
        worst = bins[np.argmax(np.abs(np.log(ratios[channel, bins])))]
        of_channel = f" of channel {channel}" if len(ratios) > 1 else ""
        found.append(
            f"power{of_channel} {ratios[channel, worst]:.2g} times the reference's (floor "
            f"{others[channel, worst]:.2g}), at wavelengths of {lengths[0]:.3g} to {lengths[1]:.3g} grid steps"
        )
    return found


def make_field_verdict(record: EvaluationRecord) -> str:
    """What [`find_differences`] finds, in one sentence."""
    number, found = f"{record.sampling.num_images:,} samples", find_differences(record)
    if found:
        return f"**{number} differ from real data: {'; '.join(found)}.**"
    return f"**No difference between {number} and held-out real data was found in values, spectrum and blocks.**"


def make_field_report(record: EvaluationRecord) -> str:
    """report.md, whose images lie beside it."""
    lines = [
        *report_head(record, make_field_verdict(record), are_images=False),
        "The right column is the floor: real data that the reference does not contain. The Wasserstein-1 distance is "
        "how far values have to be moved on average. The kernel distance and that to the nearest are of means of up to "
        "64 blocks for each channel, less the reference's mean map, in units of the reference's standard deviation.",
        "",
        "![samples](samples.png)",
        "",
        "## Spectrum",
        "",
        "Power of departures from the reference's mean, averaged over directions, over that of the reference, with "
        "standard errors; band: held-out data, two standard errors each way.",
        "",
        "![power spectrum](spectrum.png)",
        "",
        "## Nearest training data",
        "",
        "Pairs: a sample, and the training data that are nearest to it. If samples are memorized, their distance to "
        "the nearest is well below that of held-out data.",
        "",
        "![samples and their neighbors](neighbors.png)",
    ]
    if record.losses is not None:
        lines += ["", *loss_lines(record.losses, "arrays")]
    if record.likelihood is not None:
        lines += ["", _likelihood_line(record.likelihood, record.spectrum.unit)]
    if record.posterior is not None:
        lines += ["", *_posterior_lines(record.posterior, record.spectrum.unit)]
    return "\n".join(lines) + "\n"


def _likelihood_line(likelihood: LikelihoodRecord, unit: str | None) -> str:
    units = f"one over {unit}" if unit else "one over the data's unit"
    return (
        f"Likelihood: {likelihood.bits} {likelihood.bits.title}, the mean of -log p for densities in {units}, of "
        f"{likelihood.number:,} held-out arrays with noise of the smallest level, by the probability-flow ODE in "
        f"{likelihood.steps} Runge-Kutta steps with one Hutchinson probe."
    )


def _posterior_lines(posterior: PosteriorRecord, unit: str | None) -> list[str]:
    noise = ", ".join(f"{std:.4g}" for std in posterior.noise_std)
    return [
        "## Given a measurement",
        "",
        f"{posterior.images:,} held-out arrays, {posterior.samples:,} samples each given A x + noise of standard "
        f"deviation {noise}{f' {unit}' if unit else ''}{', by channel' if len(posterior.noise_std) > 1 else ''}; "
        f"{posterior.evaluations:,} network evaluations for each sample.",
        "",
        *calibration_table(posterior),
        "",
        "± is the standard error over the arrays. CRPS is the continuous ranked probability score: the less, the "
        "better. Coverage is the share of the values that lie between the least and the largest sample; spread over "
        "error is the root of the samples' variance over the squared error of their mean, with the factor for the "
        "number of samples in it. Below what is right, samples are too sure of themselves.",
        "",
        "Rows named exact are the floor: simulations, with as many arrays and samples, of the exact posterior of a "
        "Gaussian with the mean and the covariance of the reference. Their ± is the standard deviation of one "
        "simulation.",
        "",
        "![coverage of central intervals](reliability.png)",
        "",
        "Coverage of all central intervals of the samples above what is right; bands: exact samples, two standard "
        "deviations each way.",
    ]
