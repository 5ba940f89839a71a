"""
Where the truth ranks among samples, pixel by pixel, and how often it lies within their range. evaluation/calibration.py
says what is right, and why.
"""

import math

import torch


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


def rank_histogram(
    samples: torch.Tensor, truths: torch.Tensor, tolerance: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How often the truth has each rank among the samples, pixel by pixel: 0 below all of them, k above all.

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, ...)`): k samples for each of n images or fields, k >= 2.
        truths (`torch.Tensor` of shape `(n, channels, ...)`): the images or fields.
        tolerance (`float`, defaults to 0):
            Values are compared as multiples of it, in units of the data; 0 compares them as they are. Pixels where
            all are equal do not count.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the shares, right where each is 1/(k + 1), and their standard errors, each
        of shape `(k + 1,)` and float64. NaN where no pixel varies; the errors are NaN for one image.

    Raises:
        ValueError: shapes do not fit, values are not finite, or `tolerance` is below 0 or not finite.
    """
    below, equal, counts = _find_ranks(samples, truths, tolerance)
    number = counts.flatten(1).sum(1)
    shares = []
    for rank in range(samples.shape[1] + 1):
        could_be = (below <= rank) & (rank <= below + equal) & counts
        shares.append(ratio_and_error((could_be / (equal + 1.0)).flatten(1).sum(1), number))
    shares, errors = torch.tensor(shares, dtype=torch.float64).T
    return shares, errors


def coverage(samples: torch.Tensor, truths: torch.Tensor, trim: int = 0, tolerance: float = 0.0) -> tuple[float, float]:
    """
    How often the truth lies between the least and the largest sample, pixel by pixel.

    Args:
        samples, truths, tolerance: as of [`rank_histogram`].
        trim (`int`, defaults to 0): how many of the least and of the largest samples are dropped first.

    Returns:
        `tuple[float, float]`: the share of the pixels of all images, right where it is
        `nominal_coverage(k, trim)`, and its standard error. NaN where no pixel varies; the error is NaN for one image.

    Raises:
        ValueError: as of [`rank_histogram`], or `trim` leaves fewer than 2 samples.
    """
    below, equal, counts = _find_ranks(samples, truths, tolerance)
    k = samples.shape[1]
    nominal_coverage(k, trim)
    # of the ranks below, ..., below + equal, those from trim + 1 to k - 1 - trim
    inside = ((below + equal).clamp(max=k - 1 - trim) - below.clamp(min=trim + 1) + 1).clamp(min=0)
    covered = inside / (equal + 1.0)
    return ratio_and_error((covered * counts).flatten(1).sum(1), counts.flatten(1).sum(1))


def _find_ranks(
    samples: torch.Tensor, truths: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each pixel, how many samples lie below the truth, how many equal it, and whether it counts."""
    check_shapes(samples, truths)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` must be at least 0, not {tolerance}.")
    if tolerance:
        samples, truths = ((values.double() / tolerance).round() for values in (samples, truths))
    truths = truths[:, None]
    below, equal = (samples < truths).sum(1), (samples == truths).sum(1)
    return below, equal, equal < samples.shape[1]


def ratio_and_error(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """Σ a_i/Σ b_i over n independent images, both of shape `(n,)`, and its standard error to first order."""
    a, b, n = numerators.double(), denominators.double(), len(numerators)
    ratio = a.sum() / b.sum()
    error = ((a - ratio * b).square().sum() * n / (n - 1)).sqrt() / b.sum() if n > 1 else torch.tensor(math.nan)
    return ratio.item(), error.item()


def check_shapes(samples: torch.Tensor, truths: torch.Tensor) -> None:
    if samples.ndim < 4 or samples.shape[1] < 2 or truths.shape != samples[:, 0].shape or not samples.numel():
        raise ValueError(
            "`samples` must have the shape (n, k, channels, ...), with k of at least 2 and one to three more axes, and "
            f"`truths` (n, channels, ...), not {tuple(samples.shape)} and {tuple(truths.shape)}."
        )
    for name, values in (("samples", samples), ("truths", truths)):
        if not values.isfinite().all():
            raise ValueError(f"`{name}` has values that are not finite.")
