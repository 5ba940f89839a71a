"""
One picture of many samples, whatever they are: a grid of images; lines for signals; maps with a color bar; the middle
slices of volumes.
"""

import io

import numpy as np
import torch
from PIL import Image

from .images import make_grid, to_pil, to_uint8
from .units import Units

SHEET = {"margin": 2, "min_width": 600}  # pixels: small images are enlarged, and keep apart
MOST_FIELDS = 24  # of which axes with their labels can be read
MOST_FIELDS_OF_CHANNELS = 6  # maps of several channels, which have a row for each
MOST_CHANNELS = 8
_WIDTH = 800  # pixels of a plot


def sample_sheet(samples: torch.Tensor, units: Units, num_columns: int | None = None) -> Image.Image:
    """
    A picture of samples.

    Args:
        samples (`torch.Tensor` of shape `(n, channels, ...)`): In the units of the data, as "pt" has them.
        units ([`Units`]): Those of the pipeline.
        num_columns (`int`, *optional*): Of a grid of images.

    Returns:
        `PIL.Image.Image`: images in a grid, with whole pixels enlarged; of other data the first samples as plots.
    """
    if units.is_image and samples.ndim == 4 and samples.shape[1] in (1, 3, 4):
        return make_grid(to_pil(to_uint8(samples)), num_columns, **SHEET)
    return plot_fields(samples[:MOST_FIELDS].numpy(force=True), units.name)


Limits = list[tuple[float, float]]  # the least and the largest value shown, of each channel


def plot_fields(
    samples: np.ndarray,
    unit: str | None = None,
    limits: Limits | None = None,
    width: float = 10.0,
    measured: np.ndarray | None = None,
) -> Image.Image:
    """
    Plots: signals `(n, channels, length)` as lines, a panel each; maps `(n, channels, height, width)`, and the slice
    through the middle of volumes `(n, channels, depth, height, width)`, in colors, a row and a color bar for each
    channel.

    Args:
        samples (`np.ndarray`): As above; of maps of several channels, the first `MOST_FIELDS_OF_CHANNELS`.
        unit (`str`, *optional*): What the values are in.
        limits (list of pairs, *optional*): As [`find_limits`] returns them; those of `samples` when not given.
        width (`float`, defaults to 10): In inches, of 800 pixels. Labels are larger, and panels fewer, in a narrow one.
        measured (`np.ndarray` of shape `(channels, ...)`, *optional*):
            Values that are marked in each panel; NaN where there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = cut_shown(samples)
    marks = [] if measured is None else cut_shown(measured[None])[0]
    num, channels = samples.shape[:2]
    if samples.ndim == 3:
        columns = min(num, 4)
        rows = -(-num // columns)
        figure = Figure((width, 0.1 * width + rows * max(1.2, 0.18 * width)), dpi=_WIDTH / width, layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        if limits is not None:
            low, high = min(low for low, _ in limits), max(high for _, high in limits)
            margin = 0.05 * (high - low) or 1
            panels[0].set_ylim(low - margin, high + margin)
        for i, axes in enumerate(panels):
            axes.set_visible(i < num)
            if i < num:
                axes.plot(samples[i].T, linewidth=1)
            for channel, values in enumerate(marks):
                axes.plot(values, "o", markersize=4, color=f"C{channel}", clip_on=False)
        figure.supylabel(unit or "")
    else:
        columns = min(num, round(0.8 * width) if channels == 1 else MOST_FIELDS_OF_CHANNELS)
        rows = -(-num // columns) if channels == 1 else channels
        wide = (width - 0.8) / columns  # beside the color bar
        height = 0.1 + rows * (0.1 + wide * samples.shape[2] / samples.shape[3])
        figure = Figure((width, height), dpi=_WIDTH / width, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        panels = [(i // columns, i % columns, i, 0) for i in range(num)]
        if channels > 1:
            panels = [(c, i, i, c) for c in range(channels) for i in range(columns)]
        for axes in grid.flat:
            axes.set_axis_off()
        for channel, (low, high) in enumerate(limits or find_limits(samples)):  # channels may have ranges of their own
            for row, column, i, c in panels:
                if c == channel:
                    axes = grid[row, column]
                    image = axes.imshow(samples[i, c], vmin=low, vmax=high, interpolation="nearest")
                    if len(marks):
                        y, x = np.isfinite(marks[c]).nonzero()
                        axes.scatter(x, y, 16, marks[c][y, x], vmin=low, vmax=high, edgecolors="red", linewidths=1)
            where = grid if channels == 1 else grid[channel]
            figure.colorbar(image, ax=where, label=unit or "", shrink=0.8)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")


def cut_shown(samples: np.ndarray) -> np.ndarray:
    """The part of samples `(n, channels, ...)` that is shown: `MOST_CHANNELS`, and the middle slice of volumes."""
    samples = samples[:, :MOST_CHANNELS]
    return samples[:, :, samples.shape[2] // 2] if samples.ndim == 5 else samples


def find_limits(samples: np.ndarray) -> Limits:
    """
    The least and the largest value of what is shown of each channel; of maps and volumes without the least and the
    largest 0.5 %, which would take the colors from the others.
    """
    samples = cut_shown(samples)
    share = 0 if samples.ndim == 3 else 0.005
    quantiles = (np.quantile(samples[:, channel], [share, 1 - share]) for channel in range(samples.shape[1]))
    return [(low, high) for low, high in quantiles]
