"""
Whether samples of a posterior are spread as they should be: coverage, variance over squared error, misfit and PSNR.

n images x0 are measured, y = A x0 + noise, and k samples are drawn of each posterior p(x0 | y). If the sampler is
right, the truth and the k samples of one image are k + 1 independent draws of one distribution, and nothing but their
names tells them apart. What follows from that holds for any distribution, and needs no knowledge of the posterior:

* The number of samples below the truth, its rank, is each of 0, ..., k with the same probability, pixel by pixel. So
  the truth lies between the least and the largest of the k samples with probability (k - 1)/(k + 1), and between the
  (j + 1)-th from below and the (j + 1)-th from above with probability (k - 1 - 2 j)/(k + 1): [`nominal_coverage`].
* With v the posterior's variance, the samples' own variance (divided by k - 1) has the mean v, and the squared error of
  their mean the mean v (1 + 1/k): the truth's own scatter, and that of a mean of k. So (1 + 1/k) times the one, over
  the other, is 1: [`variance_ratio`]. Below 1 the samples are too sure of themselves.
* The sample fits the measurement as well as the truth does: ‖y - A x‖²/(m noise_std²), for m numbers in y, is 1 on
  average: [`misfit`].

Images have the shape `(n, channels, height, width)` and samples `(n, k, channels, height, width)`, in [0, 1] unless
another range is named. Pixels of one image depend on each other: standard errors are those of n independent images.

Pixels that hardly vary
-----------------------
The background of digits is black in every image. Truth and samples agree there, up to noise below a grey level, and who
lies above whom says nothing of the posterior. But such pixels cannot be left out by the spread of the samples: that
keeps wide intervals and drops narrow ones, and makes a bad sampler look good. Two rules treat the truth and the samples
alike, so that what is right stays exactly what it was:

* All values are rounded to multiples of `tolerance` first. Where the truth equals some of the samples, its rank is each
  of those that it could have with the same weight.
* A pixel counts where the k + 1 values are not all equal then.

The variance ratio sums variances and errors before it divides, so that such pixels add nothing to either.
"""

import math
from collections.abc import Callable

import torch

TOLERANCE = 0.02  # of [0, 1] images: 5 of 255 grey levels


def nominal_coverage(num_samples: int, trim: int = 0) -> float:
    """
    The probability that a value lies between the least and the largest of `num_samples` others from its distribution,
    when the `trim` least and the `trim` largest are dropped.

    Raises:
        ValueError: fewer than 2 samples would be left.
    """
    if num_samples < 2 or not 0 <= trim <= num_samples / 2 - 1:
        raise ValueError(f"`trim`={trim} of each end must leave at least 2 of `num_samples`={num_samples}.")
    return (num_samples - 1 - 2 * trim) / (num_samples + 1)


def coverage(
    samples: torch.Tensor, truths: torch.Tensor, trim: int = 0, tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """
    How often the truth lies between the least and the largest sample, pixel by pixel.

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, height, width)`): k samples for each of n images.
        truths (`torch.Tensor` of shape `(n, channels, height, width)`): the images.
        trim (`int`, defaults to 0): how many of the least and of the largest samples are dropped first.
        tolerance (`float`, defaults to 0.02):
            Values are compared as multiples of it, and pixels where all are equal do not count; above 0, in units of
            the images.

    Returns:
        `tuple[float, float]`: the share of the pixels of all images, right where it is
        `nominal_coverage(k, trim)`, and its standard error. NaN where no pixel varies; the error is NaN for one image.

    Raises:
        ValueError: shapes do not fit, values are not finite, `tolerance` is not above 0, or `trim` leaves fewer than 2.
    """
    _check(samples, truths)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"`tolerance` must be above 0, not {tolerance}.")
    k = samples.shape[1]
    nominal_coverage(k, trim)
    samples, truths = ((images.double() / tolerance).round() for images in (samples, truths))
    truths = truths[:, None]
    below, equal = (samples < truths).sum(1), (samples == truths).sum(1)
    # of the ranks below, ..., below + equal, those from trim + 1 to k - 1 - trim
    inside = ((below + equal).clamp(max=k - 1 - trim) - below.clamp(min=trim + 1) + 1).clamp(min=0)
    covered = inside / (equal + 1.0)
    counts = equal < k
    return ratio_and_error((covered * counts).flatten(1).sum(1), counts.flatten(1).sum(1))


def variance_ratio(samples: torch.Tensor, truths: torch.Tensor) -> tuple[float, float]:
    """
    The samples' variance over the squared error of their mean, times 1 + 1/k, summed over the pixels of all images.

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, height, width)`): k samples for each of n images, k >= 2.
        truths (`torch.Tensor` of shape `(n, channels, height, width)`): the images.

    Returns:
        `tuple[float, float]`: the ratio, right where it is 1 and below 1 where the samples are too sure, and its
        standard error, NaN for one image.

    Raises:
        ValueError: shapes do not fit, or values are not finite.
    """
    _check(samples, truths)
    samples, truths, k = samples.double(), truths.double(), samples.shape[1]
    variances = (1 + 1 / k) * samples.var(1).flatten(1).sum(1)
    errors = (samples.mean(1) - truths).square().flatten(1).sum(1)
    return ratio_and_error(variances, errors)


def misfit(
    samples: torch.Tensor,
    measurements: torch.Tensor,
    operator: Callable[[torch.Tensor], torch.Tensor],
    noise_std: float,
) -> torch.Tensor:
    """
    ‖y - A x‖²/(m noise_std²) of each sample x, for m numbers in y (the real and the imaginary part of complex ones).

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, height, width)`): k samples for each of n images.
        measurements (`torch.Tensor` of shape `(n, ...)`): y, in the units that A gives for `samples`.
        operator (function): A, of `(batch_size, channels, height, width)`.
        noise_std (`float`): the standard deviation of the measurements' noise, above 0, in the same units.

    Returns:
        `torch.Tensor` of shape `(n, k)`: float64, with the mean 1 for the right posterior.

    Raises:
        ValueError: shapes do not fit, or `noise_std` is not above 0.
    """
    if samples.ndim != 5 or len(samples) != len(measurements):
        raise ValueError(
            f"`samples` of shape (n, k, channels, height, width) and `measurements` of shape (n, ...) must be for the "
            f"same n images, not of shape {tuple(samples.shape)} and {tuple(measurements.shape)}."
        )
    if not 0 < noise_std < math.inf:
        raise ValueError(f"`noise_std` must be above 0, not {noise_std}: without noise there is nothing to divide by.")
    rows = []
    for x, y in zip(samples, measurements, strict=True):
        measured = operator(x)
        if measured.shape[1:] != y.shape:
            raise ValueError(
                f"`measurements` must have the shape (n, {', '.join(map(str, measured.shape[1:]))}), as `operator` "
                f"returns it, not {tuple(measurements.shape)}."
            )
        residual = (torch.view_as_real(y - measured) if y.is_complex() else y - measured).double()
        rows.append(residual.square().flatten(1).mean(1) / noise_std**2)
    return torch.stack(rows)


def psnr(images: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """
    -10 log10 of the mean squared error of each image, in decibels: for images in [0, 1], whose range is 1.

    Args:
        images (`torch.Tensor` of shape `(..., channels, height, width)`): samples or their mean.
        truths (`torch.Tensor` of a shape that fits): the images that are meant; `truths[:, None]` for samples.

    Returns:
        `torch.Tensor` of shape `(...)`: float64, infinite where the two are equal.
    """
    return -10 * (images.double() - truths.double()).square().mean((-3, -2, -1)).log10()


def ratio_and_error(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """Σ a_i/Σ b_i over n independent images, both of shape `(n,)`, and its standard error to first order."""
    a, b, n = numerators.double(), denominators.double(), len(numerators)
    ratio = a.sum() / b.sum()
    error = ((a - ratio * b).square().sum() * n / (n - 1)).sqrt() / b.sum() if n > 1 else torch.tensor(math.nan)
    return ratio.item(), error.item()


def _check(samples: torch.Tensor, truths: torch.Tensor) -> None:
    if samples.ndim != 5 or samples.shape[1] < 2 or truths.shape != samples[:, 0].shape or not samples.numel():
        raise ValueError(
            "`samples` must have the shape (n, k, channels, height, width), with k of at least 2, and `truths` "
            f"(n, channels, height, width), not {tuple(samples.shape)} and {tuple(truths.shape)}."
        )
    for name, values in (("samples", samples), ("truths", truths)):
        if not values.isfinite().all():
            raise ValueError(f"`{name}` has values that are not finite.")
