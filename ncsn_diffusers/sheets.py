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
_MOST_FIELDS = 24  # of which axes with their labels can be read
_MOST_CHANNELS = 8


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
    return plot_fields(samples[:_MOST_FIELDS].numpy(force=True), units.name)


def plot_fields(samples: np.ndarray, unit: str | None = None) -> Image.Image:
    """
    Plots: signals `(n, channels, length)` as lines, a panel each; maps `(n, channels, height, width)`, and the slice
    through the middle of volumes `(n, channels, depth, height, width)`, in colors, a row and a color bar for each
    channel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if samples.ndim == 5:
        samples = samples[:, :, samples.shape[2] // 2]
    samples = samples[:, :_MOST_CHANNELS]
    num, channels = samples.shape[:2]
    if samples.ndim == 3:
        columns = min(num, 4)
        rows = -(-num // columns)
        figure = Figure((10, 1 + 1.8 * rows), dpi=80, layout="constrained")
        for i, axes in enumerate(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat):
            axes.set_visible(i < num)
            if i < num:
                axes.plot(samples[i].T, linewidth=1)
        figure.supylabel(unit or "")
    else:
        columns = min(num, 8) if channels == 1 else min(num, 6)
        rows = -(-num // columns) if channels == 1 else channels
        figure = Figure(
            (10, 1 + 10 / columns * rows * samples.shape[2] / samples.shape[3]), dpi=80, layout="constrained"
        )
        grid = figure.subplots(rows, columns, squeeze=False)
        panels = [(i // columns, i % columns, i, 0) for i in range(num)]
        if channels > 1:
            panels = [(c, i, i, c) for c in range(channels) for i in range(columns)]
        for axes in grid.flat:
            axes.set_axis_off()
        for channel in range(channels):  # channels may have ranges of their own
            low, high = np.quantile(samples[:, channel], [0.005, 0.995])
            for row, column, i, c in panels:
                if c == channel:
                    image = grid[row, column].imshow(samples[i, c], vmin=low, vmax=high, interpolation="nearest")
            where = grid if channels == 1 else grid[channel]
            figure.colorbar(image, ax=where, label=unit or "", shrink=0.8)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")
