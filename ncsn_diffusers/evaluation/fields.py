"""
How far fields are from real ones, without a feature network: their values, their spectrum, and the two together.

Fields have the shape `(n, channels, length)`, `(n, channels, height, width)` or `(n, channels, depth, height, width)`,
and any units. Three questions are asked of n samples and a reference:

* **Marginals**: is each channel's distribution of values right? The Wasserstein-1 distance, in the units of the data:
  how far values have to be moved on average. See [`marginal_distances`].
* **Spectrum**: is the variance at each wavenumber right? The power spectrum of departures from the mean field, averaged
  over directions, over that of the reference, for each channel. See [`power_spectrum`] and [`spectrum_ratio`].
* **Everything at once**: the kernel distance of [`kernel_distance`](metrics.py) on values that are standardized by the
  reference, averaged over blocks so that a field has few numbers. See [`standardize`].

Each is reported beside its floor: the same of held-out fields, which no sample can be better than but by chance.
Whether a network repeats its training fields is seen from the nearest of these: [`nearest_fields`].
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from .metrics import Metric, kernel_distance, nearest_neighbors

_MAX_VALUES = 64  # of a field in a channel, for the kernel distance and neighbors
_NUM_BLOCKS = 10  # of fields, for the errors of the marginals and of the spectrum


def wasserstein_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """
    The Wasserstein-1 distance of two sets of numbers, ∫ |F_a(x) - F_b(x)| dx with their distribution functions F.

    Args:
        a, b (`torch.Tensor` of shape `(n,)` and `(m,)`): the numbers.

    Returns:
        `float`: in their units; 0 for equal sets.

    Raises:
        ValueError: a set is empty, has another shape or has values that are not finite.
    """
    for name, values in (("a", a), ("b", b)):
        if values.ndim != 1 or not len(values) or not values.isfinite().all():
            raise ValueError(f"`{name}` must be finite numbers of shape (n,), not {tuple(values.shape)}.")
    return _distance_of_sorted(*(values.double().sort().values for values in (a, b)))


def _distance_of_sorted(a: torch.Tensor, b: torch.Tensor) -> float:
    places = torch.cat([a, b]).sort().values
    shares = [torch.searchsorted(values, places[:-1], right=True) / len(values) for values in (a, b)]
    return ((shares[0] - shares[1]).abs() * places.diff()).sum().item()


def marginal_distances(reference: torch.Tensor, fields: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The [`wasserstein_distance`] of all values of each channel from those of the reference.

    Args:
        reference (`torch.Tensor` of shape `(m, channels, ...)`): real fields.
        fields (`torch.Tensor` of shape `(n, channels, ...)`): fields of the same shape.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances in the units of the data, and their standard errors by leaving
        out one of up to 10 blocks of fields at a time (the jackknife), each of shape `(channels,)` and float64.

    Raises:
        ValueError: the shapes do not fit, there are fewer than 2 fields, or values are not finite.
    """
    _check(reference=reference, fields=fields)
    blocks = torch.arange(len(fields)) % min(_NUM_BLOCKS, len(fields))
    distances, errors = [], []
    for channel in range(fields.shape[1]):
        real = reference[:, channel].flatten().double().sort().values  # once for all parts of the fields

        def distance(part: torch.Tensor, real: torch.Tensor = real) -> float:
            return _distance_of_sorted(real, part.flatten().double().sort().values)

        values = fields[:, channel]
        distances.append(distance(values))
        without = [distance(values[blocks != block]) for block in range(int(blocks.max()) + 1)]
        errors.append(_jackknife_error(torch.tensor(without, dtype=torch.float64)))
    return torch.tensor(distances, dtype=torch.float64), torch.stack(errors)


def power_spectrum(fields: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The power spectrum of each field, averaged over directions.

    With the discrete Fourier transform X of the N values x of a channel, the power at a wavevector is |X|²/N. It is
    averaged over wavevectors whose length, in cycles per grid step, rounds to the same multiple of one over the longest
    side, up to ½, which all directions have. White noise has its variance at each. Fields are taken to be periodic;
    those that are not have power at high wavenumbers from the jump at their edges, samples and real ones alike.

    Args:
        fields (`torch.Tensor` of shape `(n, channels, ...)`): with one to three axes after the channels.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: wavenumbers in cycles per grid step, `(bins,)`, and the power
        `(n, channels, bins)`, in squared units of the data, float64.

    Raises:
        ValueError: the shape is another, values are not finite, or a side is shorter than 2.
    """
    _check(fields=fields)
    sizes = fields.shape[2:]
    if min(sizes) < 2:
        raise ValueError(f"`fields` must have at least 2 values along each axis, not the shape {tuple(fields.shape)}.")
    axes = tuple(range(2, fields.ndim))
    power = torch.fft.fftn(fields.double(), dim=axes).abs().square() / math.prod(sizes)
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(size, dtype=torch.float64) for size in sizes), indexing="ij")
    lengths = torch.stack(frequencies).square().sum(0).sqrt().flatten()
    longest = max(sizes)
    bins = (lengths * longest).round().long()
    used = (bins > 0) & (bins <= longest // 2)
    numbers = bins[used].to(fields.device)
    counts = numbers.bincount(minlength=longest // 2 + 1).double()
    sums = torch.zeros(*fields.shape[:2], longest // 2 + 1, dtype=torch.float64, device=fields.device)
    sums.index_add_(2, numbers, power.flatten(2)[..., used.to(fields.device)])
    return torch.arange(1, longest // 2 + 1, dtype=torch.float64) / longest, (sums / counts)[..., 1:].cpu()


def spectrum_ratio(reference: torch.Tensor, fields: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The mean [`power_spectrum`] of fields over that of the reference, both less the reference's mean field, whose power
    would hide everything else. The reference's own departures from its mean are a little too small, by 1/m, and those
    of other fields too large: the ratio is corrected for both.

    Args:
        reference, fields: see [`marginal_distances`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: wavenumbers `(bins,)`, the ratio `(channels, bins)`, right
        where it is 1, and its standard error of both sets, of the same shape. NaN where the reference has no power.

    Raises:
        ValueError: see [`marginal_distances`] and [`power_spectrum`].
    """
    _check(reference=reference, fields=fields)
    mean, num = reference.double().mean(0), len(reference)
    (wavenumbers, real), (_, power) = power_spectrum(reference - mean), power_spectrum(fields - mean)
    ratio = (num - 1) / (num + 1) * power.mean(0) / real.mean(0)
    relative = [(x.std(0) / (len(x) ** 0.5 * x.mean(0))).square() for x in (real, power)]
    return wavenumbers, ratio, ratio * (relative[0] + relative[1]).sqrt()


def standardize(reference: torch.Tensor, fields: torch.Tensor, max_values: int = _MAX_VALUES) -> torch.Tensor:
    """
    Fields as features `(n, d)`: means of blocks, less the reference's mean at each place, in units of its standard
    deviation over all places of the channel.

    Args:
        reference, fields: see [`marginal_distances`].
        max_values (`int`, defaults to 64): how many blocks a channel has at most.

    Returns:
        `torch.Tensor` of shape `(n, d)`: float64.

    Raises:
        ValueError: see [`marginal_distances`], or a channel of the reference is constant.
    """
    _check(reference=reference, fields=fields)
    sizes = list(reference.shape[2:])
    while math.prod(sizes) > max_values:
        longest = sizes.index(max(sizes))
        sizes[longest] = math.ceil(sizes[longest] / 2)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(sizes) - 1]
    # centered first, in double precision: kelvin have few digits left in float32
    center = reference.double().mean(0)
    real, others = (pool(values.double() - center, sizes) for values in (reference, fields))
    scale = real.square().mean((0, *range(2, real.ndim))).sqrt()
    if not (scale > 0).all():
        constant = (scale <= 0).nonzero().flatten().tolist()
        raise ValueError(f"`reference` has the same values everywhere in the channels {constant}.")
    return (others / scale.reshape(-1, *[1] * len(sizes))).flatten(1)


def nearest_fields(
    fields: torch.Tensor, among: torch.Tensor, k: int = 1, max_values: int = _MAX_VALUES
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest training fields, by the root mean square difference of [`standardize`]d values.

    Args:
        fields (`torch.Tensor` of shape `(n, channels, ...)`): samples.
        among (`torch.Tensor` of shape `(m, channels, ...)`): training fields, m >= k.
        k (`int`, defaults to 1): how many.
        max_values (`int`, defaults to 64): see [`standardize`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances in standard deviations, and indices into `among`, each of shape
        `(n, k)`, the nearest first.
    """
    training, samples = standardize(among, among, max_values), standardize(among, fields, max_values)
    distances, indices = nearest_neighbors(samples, training, k)
    return distances / samples.shape[1] ** 0.5, indices


@dataclass
class FieldComparison:
    """
    What is reported of a set of fields.

    Args:
        metrics (`list[Metric]`): in the order of the report.
        wavenumbers (`list[float]` of length `bins`): in cycles per grid step.
        ratios, errors (`list` of shape `(channels, bins)`): see [`spectrum_ratio`].
    """

    metrics: list[Metric]
    wavenumbers: list[float]
    ratios: list[list[float]]
    errors: list[list[float]]


def compare_fields(reference: torch.Tensor, fields: torch.Tensor, unit: str | None = None) -> FieldComparison:
    """
    All metrics of a set of fields. Of held-out real fields, they are the floor.

    Args:
        reference (`torch.Tensor` of shape `(m, channels, ...)`): real fields, in the units of the data, m >= 20.
        fields (`torch.Tensor` of shape `(n, channels, ...)`): samples or held-out fields, in the same units, n >= 20.
        unit (`str`, *optional*): what the values are in, such as `"K"`, for the report.

    Raises:
        ValueError: the shapes do not fit, there are fewer than 20 fields, or a channel is constant.
    """
    kernel, kernel_error = kernel_distance(standardize(reference, reference), standardize(reference, fields))
    nearest = nearest_fields(fields, reference)[0].median().item()
    wavenumbers, ratios, errors = spectrum_ratio(reference, fields)
    units = "" if unit is None else f" ({unit})"
    metrics = [Metric("number", "fields", len(fields), "{:,}")]
    for i, (distance, error) in enumerate(zip(*marginal_distances(reference, fields), strict=True)):
        channel = f" of channel {i}" if reference.shape[1] > 1 else ""
        title = f"Wasserstein-1 distance of the values{channel}{units}"
        metrics.append(Metric(f"wasserstein_{i}", title, distance.item(), standard_error=error.item()))
    metrics += [
        Metric("kernel_distance", "kernel distance ± standard error", kernel, standard_error=kernel_error),
        Metric(
            "spectrum_error",
            "spectrum: root mean square of ln(power over the reference's)",
            ratios.log().square().nanmean().sqrt().item(),
            "{:.3f}",
        ),
        Metric("median_distance_to_nearest_reference", "median distance to the nearest reference field", nearest),
    ]
    return FieldComparison(metrics, wavenumbers.tolist(), ratios.tolist(), errors.tolist())


def _jackknife_error(values: torch.Tensor) -> torch.Tensor:
    """The standard error from results that each leave out one of n blocks."""
    num = len(values)
    return ((num - 1) / num * (values - values.mean()).square().sum()).sqrt()


def _check(**sets: torch.Tensor) -> None:
    shapes = {tuple(values.shape[1:]) for values in sets.values()}
    for name, values in sets.items():
        if not 3 <= values.ndim <= 5 or len(values) < 2 or not values.is_floating_point() or len(shapes) > 1:
            raise ValueError(
                f"`{name}` must be floating, of shape (n, channels, ...) with one to three more axes and n of at least "
                f"2, all sets alike, not {values.dtype} of shape {tuple(values.shape)}."
            )
        if not values.isfinite().all():
            raise ValueError(f"`{name}` has values that are not finite.")
