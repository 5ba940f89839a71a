"""Ranges, 8 bits, one grid, and the one reader of image files: what training, pipelines and evaluation share."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image, ImageDraw, ImageFont

from .image_files import check_pixels, exceeds_pixels, find_white, read_image

__all__ = [
    "check_pixels",
    "class_columns",
    "exceeds_pixels",
    "find_white",
    "make_gaussian_blur",
    "make_grid",
    "read_image",
    "to_model_range",
    "to_pil",
    "to_uint8",
]

_LINE_HEIGHT = 16  # of titles, in pixels
_TITLE_GAP = 4  # pixels between titles


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 255] as float32 in [-1, 1]; any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """
    Quantize images to 8 bits, as writing them to a PNG file would.

    Args:
        images (`torch.Tensor` of any shape): floating in [0, 1], or uint8 already.

    Returns:
        `torch.Tensor` of the same shape, uint8 in [0, 255].

    Raises:
        ValueError: floating images leave [0, 1], as those in the network's range [-1, 1] do, or are not numbers.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"`images` must be uint8 or floating in [0, 1], not {images.dtype}.")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"`images` must lie in [0, 1], not from {images.min():g} to {images.max():g}.")
    return (images * 255).round().to(torch.uint8)


def make_gaussian_blur(std: float, radius: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    A Gaussian blur with reflection at the edges, which is linear.

    Args:
        std (`float`): the standard deviation, in pixels.
        radius (`int`): pixels at which the Gaussian is cut off.

    Returns:
        function: from floating images of shape `(n, channels, height, width)`, with more than `radius` pixels each way,
            to images of the same shape.
    """
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / std) ** 2)
    weights = weights / weights.sum()

    def blur(images: torch.Tensor) -> torch.Tensor:
        channels, kernel = images.shape[1], weights.to(images)
        images = F.pad(images, (radius, radius, radius, radius), mode="reflect")
        for shape in ((-1, 1), (1, -1)):
            images = F.conv2d(images, kernel.reshape(1, 1, *shape).expand(channels, 1, -1, -1), groups=channels)
        return images

    return blur


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """uint8 images of shape `(n, 1, 3 or 4, height, width)` as PIL images of mode L, RGB or RGBA."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def make_grid(
    images: list[Image.Image],
    num_columns: int | None = None,
    margin: int = 0,
    min_width: int = 0,
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """
    Images side by side, row by row.

    Args:
        images (`list[Image.Image]`): of one size and one mode, which is the grid's too.
        num_columns (`int`, *optional*): by default the grid is as close to a square as possible.
        margin (`int`, defaults to 0):
            Pixels around each image. With a margin the background is white; without one, unused places are black
            (transparent where the images are RGBA).
        min_width (`int`, defaults to 0):
            The least width of the columns together, in pixels. Each pixel of the images becomes a square of as many
            pixels as that and the titles take; images that are large enough stay as they are.
        titles (`Sequence[str]`, *optional*): One above each column, black on white; `"\\n"` starts a new line.
        row_titles (`Sequence[str]`, *optional*): One to the left of each row.

    Raises:
        ValueError: the images differ in size or mode, there are none, or there is not one title for each column or row.
    """
    if len({(image.mode, image.size) for image in images}) != 1:
        kinds = sorted({f"{image.mode} {image.width}×{image.height}" for image in images})
        raise ValueError(f"`images` must be of one mode and size, not {', '.join(kinds) or 'an empty list'}.")
    num_columns = min(num_columns or math.ceil(math.sqrt(len(images))), len(images))
    num_rows = math.ceil(len(images) / num_columns)
    for name, given, number, what in (
        ("titles", titles, num_columns, "columns"),
        ("row_titles", row_titles, num_rows, "rows"),
    ):
        if given and len(given) != number:
            raise ValueError(f"`{name}` must be one for each of the {number} {what}, not {len(given)}.")
    least = [(min_width - (num_columns + 1) * margin) / (num_columns * images[0].width)]
    top = left = 0
    if titles:
        widths, heights = zip(*(_measure(title) for title in titles), strict=True)
        top = max(heights) + _TITLE_GAP
        least.append((max(widths) + _TITLE_GAP - margin) / images[0].width)
    if row_titles:
        widths, heights = zip(*(_measure(title) for title in row_titles), strict=True)
        left = max(widths) + _TITLE_GAP
        least.append((max(heights) - margin) / images[0].height)
    scale = max(1, *(math.ceil(value) for value in least))
    images = [image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST) for image in images]
    width, height = images[0].width + margin, images[0].height + margin
    size = (left + num_columns * width + margin, top + num_rows * height + margin)
    grid = Image.new(images[0].mode, size, "white" if margin else 0)
    grid.paste("white", (0, 0, size[0], top))
    grid.paste("white", (0, 0, left, size[1]))
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        middle = left + margin + column * width + images[0].width / 2
        draw.text((middle, top / 2), title, fill="black", font=_title_font(), anchor="mm", align="center")
    for row, title in enumerate(row_titles):
        middle = top + margin + row * height + images[0].height / 2
        place = (left - _TITLE_GAP / 2, middle)
        draw.text(place, title, fill="black", font=_title_font(), anchor="rm", align="right")
    for i, image in enumerate(images):
        row, column = divmod(i, num_columns)
        grid.paste(image, (left + margin + column * width, top + margin + row * height))
    return grid


@cache
def _title_font() -> ImageFont.FreeTypeFont:
    """DejaVu, as matplotlib has it: Pillow's own font knows no Greek and no mathematical signs."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 12)


def _measure(title: str) -> tuple[int, int]:
    """Width and height of a title in pixels; all titles of as many lines have one height."""
    font, lines = _title_font(), title.split("\n")
    return math.ceil(max(font.getlength(line) for line in lines)), _LINE_HEIGHT * len(lines)


def class_columns(num_classes: int | None) -> int | None:
    """`num_columns` of a grid whose images take the classes in turn: one for each, in a row of readable length."""
    return num_classes if num_classes is not None and 4 <= num_classes <= 16 else None
