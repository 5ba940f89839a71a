"""
What users hand to the pipelines, read and checked: data in any format, as a tensor in the network's units, and class
labels. What cannot work is a ValueError that names the argument, the value and what is accepted.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from PIL import Image

from .checks import check_number
from .image_files import read_image
from .units import Units

# In the network's units, where the data's deviation is ½: numbers beyond it are warned about.
_SUSPICIOUS = 5.0

ClassLabels = int | Sequence[int] | torch.Tensor | Mapping[int | None, float]

logger = logging.get_logger(__name__)


def read_data(
    name: str,
    data,
    shape: tuple[int, ...],
    units: Units,
    processor: VaeImageProcessor | None = None,
    missing: bool = False,
    center: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """
    Args:
        name (`str`): What messages call the data.
        data (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): In the units of the data.
        shape (`tuple` of ints): `(channels, *sizes)` that the network takes.
        units ([`Units`]): Their units.
        processor ([`VaeImageProcessor`], *optional*): For images in any of its formats; other data are arrays.
        missing (`bool`, defaults to `False`): Whether NaN may stand for what is unknown.
        center (`torch.Tensor` of shape `shape`, or a number, defaults to 0.0):
            What the training data lie around, in the network's units.

    Returns:
        `torch.Tensor` of shape `(n, *shape)`: float32, in the network's units.

    Raises:
        ValueError: the data have another shape or type, are not finite or are outside their range.
    """
    data = read_images(name, data, shape[0], processor) if processor else _read_array(name, data, shape)
    check_shape(name, data, shape, is_image=processor is not None)
    known = data[~data.isnan()] if missing else data
    if not known.isfinite().all():
        raise ValueError(f"`{name}` must hold finite numbers.")
    low, high = (known.min().item(), known.max().item()) if known.numel() else (0.0, 0.0)
    limits = units.value_range
    if limits is not None:
        slack = 1e-3 * (limits[1] - limits[0])  # of rounding, and of resizing
        if known.numel() and not (low >= limits[0] - slack and high <= limits[1] + slack):
            raise ValueError(
                f"`{name}` must hold numbers from {limits[0]:g} to {limits[1]:g}"
                f"{', or be an 8-bit image' if processor else ''}, not {low:g} to {high:g}."
            )
        return units.to_network(data.clamp(*limits)).float()
    data = units.to_network(data)
    if (data - center).nan_to_num().abs().max() > _SUSPICIOUS:
        unit = f" {units.name}" if units.name else ""
        logger.warning(
            f"`{name}` holds {low:g} to {high:g}, but the network's training data have mean {units.data_mean} and "
            f"standard deviation {units.data_std}{unit}: is it in the same unit?"
        )
    return data.float()


def check_shape(name: str, data: torch.Tensor, shape: tuple[int, ...], is_image: bool) -> None:
    if tuple(data.shape[1:]) != tuple(shape):
        axes = "channels, height, width" if is_image else f"channels and {len(shape) - 1} sizes"
        raise ValueError(
            f"`{name}` must be {' × '.join(map(str, shape))} ({axes}) for this network, not "
            f"{' × '.join(map(str, data.shape[1:]))}{': resize it first' if is_image else ''}."
        )


def read_images(name: str, image, channels: int, processor: VaeImageProcessor) -> torch.Tensor:
    """Images or masks in any format of [`VaeImageProcessor`] as a float32 tensor, 8 bits in [0, 1]."""
    images = image if isinstance(image, list) else [image]
    try:
        images = [_from_8_bit(i, channels) for i in images]
        return processor.preprocess(images if isinstance(image, list) else images[0]).float()
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` must be an image, an array or a tensor, or a list of such, all of one size, not "
            f"{type(image).__name__}: {error}"
        ) from error


def _from_8_bit(image, channels: int):
    if isinstance(image, Image.Image):
        return read_image(image, channels)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.astype(np.float32) / 255
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8:
        return image.float() / 255
    return image


def _read_array(name: str, data, shape: tuple[int, ...]) -> torch.Tensor:
    """An array or a tensor `(n, *shape)`, or one without the first axis, or a list of these."""
    accepted = f"an array or a tensor of shape (n, {', '.join(map(str, shape))})"
    try:
        items = [torch.as_tensor(d) for d in (data if isinstance(data, list) else [data])]
        array = torch.stack(items) if isinstance(data, list) else items[0]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be {accepted}, not {type(data).__name__}: {error}") from error
    if array.is_complex() or array.dtype == torch.bool:
        raise ValueError(f"`{name}` must be {accepted}, of real numbers, not {array.dtype}.")
    array = array if array.is_floating_point() else array.double()
    return array[None] if array.ndim == len(shape) else array


def read_labels(class_labels: ClassLabels, num_classes: int | None, knows_no_label: bool) -> torch.Tensor | dict:
    """
    Classes as an int64 tensor of shape `()` or `(n,)`, or a dictionary of classes and weights.

    Args:
        class_labels (`int`, sequence of ints, `torch.Tensor` or mapping): As the user gives them.
        num_classes (`int`, *optional*): The network's; `None` for an unconditional one.
        knows_no_label (`bool`): Whether `None` may be among the classes of a dictionary.

    Raises:
        ValueError: they are of another type, or the network does not know them.
    """
    if num_classes is None:
        raise ValueError(
            "`class_labels` are for a class-conditional network, and this one is unconditional: its config has no "
            "`num_class_embeds`."
        )
    accepted = f"ints from 0 to {num_classes - 1}"
    if isinstance(class_labels, Mapping):
        known = [*range(num_classes), *([None] if knows_no_label else [])]
        if not class_labels or not all(not isinstance(c, bool) and c in known for c in class_labels):
            raise ValueError(
                f"`class_labels` with weights must be a dictionary of {accepted}"
                f"{', or None for no label,' if knows_no_label else ''} and their weights, not {class_labels!r}."
            )
        for weight in class_labels.values():
            check_number("a weight of `class_labels`", weight, above=-math.inf, below=math.inf)
        return dict(class_labels)
    accepted = f"an int or a list of {accepted}, of shape (batch_size,)"
    try:
        labels = torch.as_tensor(class_labels)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"`class_labels` must be {accepted}, not {class_labels!r}.") from error
    integral = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integral or labels.ndim > 1 or not labels.numel():
        raise ValueError(f"`class_labels` must be {accepted}, not {class_labels!r}.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"`class_labels` must be {accepted}, not {labels.tolist()}.")
    return labels.long()


def read_shares(shares: Sequence[float] | None, num_embeddings: int | None, null_class: int | None):
    """
    The classes' shares as a list of floats.

    Raises:
        ValueError: their number is not that of the classes, or one is negative or not finite, or all are 0.
    """
    if shares is None:
        return None
    num = (num_embeddings or 0) - (null_class is not None)
    if len(shares) != num or not all(0 <= share < math.inf for share in shares) or not sum(shares) > 0:
        raise ValueError(f"`class_shares` must be {max(num, 0)} numbers of at least 0, not {list(shares)!r}.")
    return [float(share) for share in shares]
