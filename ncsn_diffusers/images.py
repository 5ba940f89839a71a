"""Ranges, 8 bits, one grid, and the one reader of image files: what training, pipelines and evaluation share."""

import math

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from .pipeline_ncsn import find_white, read_image

__all__ = ["find_white", "make_grid", "read_image", "to_model_range", "to_uint8"]


def to_model_range(images: torch.Tensor, data_min: float = -1.0) -> torch.Tensor:
    """Pictures in [0, 255] as float32 in [data_min, 1], the network's units of the data; any shape."""
    return images.float() / (255 / (1 - data_min)) + data_min


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """
    Quantise pictures to 8 bits, as writing them to a PNG file would.

    Args:
        images (`torch.Tensor` of any shape): floating in [0, 1], or uint8 already.

    Returns:
        `torch.Tensor` of the same shape, uint8 in [0, 255].

    Raises:
        ValueError: floating pictures leave [0, 1], as those in the network's range [-1, 1] do, or are not numbers.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"`images` must be uint8 or floating in [0, 1], not {images.dtype}.")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"`images` must lie in [0, 1], not from {images.min():g} to {images.max():g}.")
    return (images * 255).round().to(torch.uint8)


def make_grid(images: list[Image.Image], num_columns: int | None = None) -> Image.Image:
    """Side by side, in the shape nearest to a square unless `num_columns` says otherwise."""
    num_columns = num_columns or math.ceil(math.sqrt(len(images)))
    num_rows = math.ceil(len(images) / num_columns)
    blank = Image.new(images[0].mode, images[0].size)
    images = images + [blank] * (num_rows * num_columns - len(images))
    grid = make_image_grid(images, num_rows, num_columns)
    return grid.convert(images[0].mode)
