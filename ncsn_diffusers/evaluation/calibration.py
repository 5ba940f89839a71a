"""
Whether samples of a posterior are spread as they should be: ranks, coverage, CRPS, spread over error, misfit and PSNR.

n images x0 are measured, y = A x0 + noise, and k samples are drawn of each posterior p(x0 | y). If the sampler is
right, the truth and the k samples of one image are k + 1 independent draws of one distribution, and nothing but their
names tells them apart. What follows from that holds for any distribution, and needs no knowledge of the posterior:

* The number of samples below the truth, its rank, is each of 0, ..., k with the same probability, pixel by pixel. So
  the truth lies between the least and the largest of the k samples with probability (k - 1)/(k + 1), and between the
  (j + 1)-th from below and the (j + 1)-th from above with probability (k - 1 - 2 j)/(k + 1): [`nominal_coverage`].
* The shares of the ranks are the rank histogram, flat if the samples are right: [`rank_histogram`]. A hump in the
  middle means that samples are too wide, high ends that they are too narrow, a slope that they are off to one side.
* With v the posterior's variance, the samples' own variance (divided by k - 1) has the mean v, and the squared error of
  their mean the mean v (1 + 1/k): the truth's own scatter, and that of a mean of k. So (1 + 1/k) times the one, over
  the other, is 1: [`variance_ratio`], and its root is the [`spread_over_error`]. Below 1 the samples are too sure of
  themselves.
* The sample fits the measurement as well as the truth does: ‖y - A x‖²/(m noise_std²), for m numbers in y, is 1 on
  average: [`misfit`].

How good samples are, and not only how honest, is the continuous ranked probability score: [`crps`], in the units of the
data, least on average for samples of the right distribution.

Images have the shape `(n, channels, height, width)` and samples `(n, k, channels, height, width)`. Fields of one or
three dimensions have the shapes that go with them, and any units. Pixels of one image depend on each other: standard
errors are those of n independent images.

Pixels that hardly vary
-----------------------
The background of digits is black in every image. Truth and samples agree there, but for what is left of the sampler's
noise, a few of 255 gray levels; who lies above whom says nothing of the posterior. Such pixels must not be left out by
the spread of the samples alone: that keeps wide intervals and drops narrow ones, and makes a bad sampler look good.
Two rules treat the truth and the samples alike, so that what is right stays exactly what it was:

* All values are rounded to multiples of `tolerance` first, 0.05 for images in [0, 1]. Where the truth then equals some
  of the samples, its rank is each of those that it could have, with the same weight. Fields have no such background,
  and their values are compared as they are.
* A pixel counts where the k + 1 values are not all equal.

The variance ratio sums variances and errors before it divides, so that such pixels add nothing to either.

The floor
---------
How far from right may n images and k samples be by chance? [`simulate_exact`] draws them from the exact posterior of
the Gaussian that has the mean and the covariance of N images x_i, with centered rows X = (x_i - mean)/√(N - 1):

    x0 = mean + Xᵀ g,  g ~ N(0, I),    y = A mean + Bᵀ g + noise_std e,  B = X Aᵀ,

where g is again Gaussian given y. A sample is a prior one, g' and e', with the part taken back by which its own
measurement is not y (Hoffman & Ribak 1991, "Constrained realizations of Gaussian fields"):

    g' + (noise_std² + B Bᵀ)⁻¹ B (y - A mean - Bᵀ g' - noise_std e').

The system has N rows, however large the images are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from ..images import make_gaussian_blur
from ..ranks import check_shapes, coverage, nominal_coverage, rank_histogram, ratio_and_error
from .metrics import Metric, mean_and_error, to_dict

IMAGE_TOLERANCE = 0.05  # of images in [0, 1]
MISSING = 0.7  # of the pixels
STATIONS = 0.05  # of the points
BLOCK = 4  # pixels, along each axis
BLUR_STD, BLUR_RADIUS = 1.5, 4  # pixels
NUM_SIMULATIONS = 20  # of the floor

# Operators


def make_missing_pixels(shape: tuple[int, ...], name: str = "missing-pixels", share: float = 1 - MISSING):
    size = math.prod(shape[1:])
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    kept = order[size - round(share * size) :].sort().values
    if not len(kept):
        raise ValueError(f"`{name}` leaves nothing of {' × '.join(map(str, shape[1:]))} points.")
    return lambda x: x.flatten(2)[..., kept.to(x.device)]


def make_stations(shape: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    return make_missing_pixels(shape, "stations", STATIONS)


def make_pixelated(shape: tuple[int, int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    height, width = shape[1:]
    if height % BLOCK or width % BLOCK:
        raise ValueError(f"`pixelated` needs height and width in multiples of {BLOCK}, not {height} × {width} pixels.")
    return lambda x: F.avg_pool2d(x, BLOCK)


def make_blurred(shape: tuple[int, int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    height, width = shape[1:]
    if min(height, width) <= BLUR_RADIUS:
        raise ValueError(f"`blurred` needs more than {BLUR_RADIUS} pixels each way, not {height} × {width} pixels.")
    return make_gaussian_blur(BLUR_STD, BLUR_RADIUS)


# Each makes an operator for images or fields of a shape `(channels, ...)`.
OPERATORS = {
    "missing-pixels": make_missing_pixels,
    "stations": make_stations,
    "pixelated": make_pixelated,
    "blurred": make_blurred,
}


def make_operator(name: str, shape: tuple[int, int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    A linear operator by its name.

    Args:
        name (`str`):
            `"missing-pixels"` measures 30 % of the pixels, always the same ones; `"stations"` 5 % of them;
            `"pixelated"` the means of blocks of 4 × 4 pixels; `"blurred"` every pixel after a Gaussian blur of standard
            deviation 1.5 pixels, with reflection at the edges. The last two are for two dimensions.
        shape (`tuple` of ints): `(channels, ...)` of the images or fields.

    Returns:
        function: A, from `(batch_size, channels, ...)` to `(batch_size, channels, ...)`.

    Raises:
        ValueError: there is no such operator, or it does not fit the images.
    """
    if name not in OPERATORS:
        raise ValueError(f"There is no operator {name!r}; there are {', '.join(OPERATORS)}.")
    if name in ("pixelated", "blurred") and len(shape) != 3:
        raise ValueError(f"`{name}` is for two dimensions, not for fields of {' × '.join(map(str, shape[1:]))} points.")
    return OPERATORS[name](shape)


# Statistics


def crps(samples: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """
    The continuous ranked probability score E|X - x0| - E|X - X'|/2, averaged over the pixels, in units of the data,
    without the bias of few samples (the fair score of Ferro 2014, doi:10.1002/qj.2270). It is least on average for
    samples of the right distribution: being too sure does not win.

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, ...)`): k samples for each of n images or fields, k >= 2.
        truths (`torch.Tensor` of shape `(n, channels, ...)`): the images or fields.

    Returns:
        `torch.Tensor` of shape `(n,)`: float64.

    Raises:
        ValueError: shapes do not fit, or values are not finite.
    """
    check_shapes(samples, truths)
    samples, truths, k = samples.double(), truths.double(), samples.shape[1]
    errors = (samples - truths[:, None]).abs().mean(1)
    # of sorted values, Σ_ij |x_i - x_j| = 2 Σ_i (2 i - k - 1) x_i with i from 1
    weights = 2 * torch.arange(1, k + 1, dtype=torch.float64, device=samples.device) - k - 1
    spreads = (samples.sort(1).values * weights.reshape(-1, *[1] * (truths.ndim - 1))).sum(1) / (k * (k - 1))
    return (errors - spreads).flatten(1).mean(1)


def variance_ratio(samples: torch.Tensor, truths: torch.Tensor) -> tuple[float, float]:
    """
    The samples' variance over the squared error of their mean, times 1 + 1/k, summed over the pixels of all images.

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, ...)`): k samples for each of n images or fields, k >= 2.
        truths (`torch.Tensor` of shape `(n, channels, ...)`): the images or fields.

    Returns:
        `tuple[float, float]`: the ratio, right where it is 1 and below 1 where the samples are too sure, and its
        standard error, NaN for one image.

    Raises:
        ValueError: shapes do not fit, or values are not finite.
    """
    check_shapes(samples, truths)
    samples, truths, k = samples.double(), truths.double(), samples.shape[1]
    variances = (1 + 1 / k) * samples.var(1).flatten(1).sum(1)
    errors = (samples.mean(1) - truths).square().flatten(1).sum(1)
    return ratio_and_error(variances, errors)


def spread_over_error(samples: torch.Tensor, truths: torch.Tensor) -> tuple[float, float]:
    """The root of [`variance_ratio`], of the same arguments, right where it is 1, and its standard error."""
    ratio, error = variance_ratio(samples, truths)
    return math.sqrt(ratio), error / (2 * math.sqrt(ratio)) if ratio else math.nan


def misfit(
    samples: torch.Tensor,
    measurements: torch.Tensor,
    operator: Callable[[torch.Tensor], torch.Tensor],
    noise_std: float,
) -> torch.Tensor:
    """
    ‖y - A x‖²/(m noise_std²) of each sample x, for m numbers in y (the real and the imaginary part of complex ones).

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, ...)`): k samples for each of n images or fields.
        measurements (`torch.Tensor` of shape `(n, ...)`): y, in the units that A gives for `samples`.
        operator (function): A, of `(batch_size, channels, ...)`.
        noise_std (`float`): the standard deviation of the measurements' noise, above 0, in the same units.

    Returns:
        `torch.Tensor` of shape `(n, k)`: float64, with the mean 1 for the right posterior.

    Raises:
        ValueError: shapes do not fit, or `noise_std` is not above 0.
    """
    if samples.ndim < 4 or len(samples) != len(measurements):
        raise ValueError(
            f"`samples` of shape (n, k, channels, ...) and `measurements` of shape (n, ...) must be for the "
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
        truths (`torch.Tensor` of as many axes): the images that are meant; `truths[:, None]` for samples.

    Returns:
        `torch.Tensor` of shape `(...)`: float64, infinite where the two are equal.

    Raises:
        ValueError: the shapes do not fit.
    """
    # without the axis, each sample would be compared with the truth of another image
    if images.ndim != truths.ndim or any(m not in (1, n) for n, m in zip(images.shape, truths.shape, strict=True)):
        raise ValueError(
            "`truths` must have the axes of `images`, each as long or of length 1, not the shape "
            f"{tuple(truths.shape)} beside {tuple(images.shape)}: `truths[:, None]` goes with samples."
        )
    return -10 * (images.double() - truths.double()).square().mean((-3, -2, -1)).log10()


# The floor


def simulate_exact(
    images: torch.Tensor,
    operator: Callable[[torch.Tensor], torch.Tensor],
    noise_std: float,
    num_images: int,
    num_samples: int,
    seed: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    Images, their measurements and exact posterior samples of a Gaussian with the mean and covariance of `images`, again
    and again. The module's docstring has the equations.

    Args:
        images (`torch.Tensor` of shape `(N, channels, height, width)`): at least 2, in units of `noise_std`.
        operator (function): A, linear and real, of `(batch_size, channels, height, width)`.
        noise_std (`float`): the standard deviation of the measurements' noise, above 0.
        num_images, num_samples (`int`): n and k.
        seed (`int`, defaults to 0): of the random numbers.

    Yields:
        `tuple`: samples `(n, k, channels, height, width)`, truths `(n, channels, height, width)` and measurements
        `(n, ...)`, in the units of `images`.
    """
    generator = torch.Generator().manual_seed(seed)
    num, shape = len(images), images.shape[1:]
    mean = images.float().mean(0, keepdim=True)
    rows = (images.float() - mean) / (num - 1) ** 0.5
    measured_mean = operator(mean)
    measured_rows = torch.cat([operator(part) for part in rows.split(100)]).flatten(1)
    system = measured_rows.double() @ measured_rows.double().T + noise_std**2 * torch.eye(num, dtype=torch.float64)
    gain = torch.linalg.solve(system, measured_rows.double()).float()
    rows = rows.flatten(1)

    def simulate(*sizes):
        """g and Bᵀ g + noise_std e."""
        g = torch.randn(*sizes, num, generator=generator)
        noise = torch.randn(*sizes, measured_rows.shape[1], generator=generator)
        return g, g @ measured_rows + noise_std * noise

    while True:
        g, y = simulate(num_images)
        other, measured = simulate(num_images, num_samples)
        given_y = other + (y[:, None] - measured) @ gain.T
        samples, truths = (mean + (g @ rows).reshape(*g.shape[:-1], *shape) for g in (given_y, g))
        yield samples, truths, measured_mean + y.reshape(-1, *measured_mean.shape[1:])


# What is reported of an operator


@dataclass
class Calibration:
    """
    All that is reported of posterior samples.

    Args:
        metrics (`list[Metric]`): in the order of the report.
        reliability (`list[dict]`):
            For each central interval its `"nominal"` and `"actual"` coverage and the latter's `"standard_error"`, the
            widest first.
        ranks (`list[float]`): the share of each rank of the truth among k samples, right where it is 1/(k + 1).
    """

    metrics: list[Metric]
    reliability: list[dict[str, float]]
    ranks: list[float]

    def to_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        return to_dict(self.metrics) | {"reliability": self.reliability, "ranks": self.ranks}


def calibrate_values(
    samples: torch.Tensor, truths: torch.Tensor, tolerance: float = 0.0, unit: str | None = None
) -> Calibration:
    """
    What holds for any data: the score, and whether the samples are spread as they should be.

    Args:
        samples, truths, tolerance: as of [`rank_histogram`].
        unit (`str`, *optional*): what the values are in, such as `"K"`, for the report.
    """
    k = samples.shape[1]
    reliability = []
    for trim in range(k // 2):
        actual, error = coverage(samples, truths, trim, tolerance)
        reliability.append({"nominal": nominal_coverage(k, trim), "actual": actual, "standard_error": error})
    score, score_error = mean_and_error(crps(samples, truths))
    spread, spread_error = spread_over_error(samples, truths)
    metrics = [
        Metric("crps", "CRPS" if unit is None else f"CRPS ({unit})", score, "{:.4g}", standard_error=score_error),
        Metric(
            "coverage",
            f"coverage (right: {nominal_coverage(k):.3f})",
            reliability[0]["actual"],
            "{:.3f}",
            standard_error=reliability[0]["standard_error"],
            card_type="posterior-coverage",
            card_title="Coverage of the posterior's intervals",
        ),
        Metric(
            "spread_over_error",
            "spread over error (right: 1)",
            spread,
            "{:.2f}",
            standard_error=spread_error,
            card_type="posterior-spread-over-error",
            card_title="Posterior spread over error",
        ),
    ]
    return Calibration(metrics, reliability, rank_histogram(samples, truths, tolerance)[0].tolist())


def calibrate(
    samples: torch.Tensor,
    truths: torch.Tensor,
    measurements: torch.Tensor,
    operator: Callable[[torch.Tensor], torch.Tensor],
    noise_std: float,
) -> Calibration:
    """
    All that is reported of the posterior samples of one operator, for images.

    Args:
        samples (`torch.Tensor` of shape `(n, k, channels, height, width)`): in [0, 1].
        truths (`torch.Tensor` of shape `(n, channels, height, width)`): in [0, 1].
        measurements (`torch.Tensor` of shape `(n, ...)`): of images in [0, 1].
        operator (function): A.
        noise_std (`float`): the standard deviation of the measurements' noise, above 0.
    """
    k = samples.shape[1]
    of_samples, of_mean = psnr(samples, truths[:, None]).mean(1), psnr(samples.mean(1), truths)
    misfits = misfit(samples, measurements, operator, noise_std)
    metrics = []
    for key, title, values in (
        ("psnr", "PSNR of a sample", of_samples),
        ("psnr_of_mean", f"PSNR of the mean of {k}", of_mean),
        ("misfit", "misfit (right: 1)", misfits.mean(1)),
    ):
        value, error = mean_and_error(values)
        metrics.append(Metric(key, title, value, "{:.2f}", standard_error=error))
    metrics.append(Metric("largest_misfit", "largest misfit", misfits.max().item(), "{:.2f}"))
    spread = calibrate_values(samples, truths, IMAGE_TOLERANCE)
    return Calibration(metrics + spread.metrics, spread.reliability, spread.ranks)


def calibrate_exact(
    images: torch.Tensor,
    operator: Callable[[torch.Tensor], torch.Tensor],
    noise_std: float,
    num_images: int,
    num_samples: int,
) -> Calibration:
    """
    What [`calibrate`] says of exact samples: the floor.

    Args:
        images, operator, noise_std, num_images, num_samples: as of [`simulate_exact`].

    Returns:
        [`Calibration`]: as of [`average_simulations`], of 20.
    """
    simulations = simulate_exact(images, operator, noise_std, num_images, num_samples)
    return average_simulations(
        [calibrate(*simulation, operator, noise_std) for simulation in islice(simulations, NUM_SIMULATIONS)]
    )


def calibrate_exact_channels(
    fields: torch.Tensor,
    operator: Callable[[torch.Tensor], torch.Tensor],
    noise_std: float,
    num_fields: int,
    num_samples: int,
) -> list[Calibration]:
    """What [`calibrate_values`] says of exact samples, for each channel; arguments as of [`calibrate_exact`]."""
    simulations = simulate_exact(fields, operator, noise_std, num_fields, num_samples)
    runs = [
        [calibrate_values(samples[:, :, [c]], truths[:, [c]]) for c in range(fields.shape[1])]
        for samples, truths, _ in islice(simulations, NUM_SIMULATIONS)
    ]
    return [average_simulations(of_channel) for of_channel in zip(*runs, strict=True)]


def average_simulations(runs: Sequence[Calibration]) -> Calibration:
    """
    Means over simulations; each standard error is the standard deviation of one of them. There is no PSNR and no
    CRPS: these depend on the images, and here they are a Gaussian's.
    """

    def mean_and_deviation(values):
        values = torch.tensor(values, dtype=torch.float64)
        return values.mean().item(), values.std().item()

    metrics = []
    for same in zip(*(run.metrics for run in runs), strict=True):
        if not same[0].key.startswith(("psnr", "crps")):
            value, deviation = mean_and_deviation([metric.value for metric in same])
            metrics.append(Metric(same[0].key, same[0].title, value, same[0].form, standard_error=deviation))
    reliability = []
    for same in zip(*(run.reliability for run in runs), strict=True):
        actual, deviation = mean_and_deviation([interval["actual"] for interval in same])
        reliability.append({"nominal": same[0]["nominal"], "actual": actual, "standard_error": deviation})
    ranks = torch.tensor([run.ranks for run in runs], dtype=torch.float64).mean(0).tolist()
    return Calibration(metrics, reliability, ranks)
