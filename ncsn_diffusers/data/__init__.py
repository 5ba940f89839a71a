"""Data for training: images and arrays, as batches with one interface."""

from .batches import BatchOrder
from .columns import encode_labels, find_class_names, find_columns
from .images import (
    CORRUPT_IMAGES,
    CachedImages,
    ImageReader,
    LoadedImages,
    StreamedImages,
    UnreadableImageError,
    decode_images,
    open_images,
)
from .sources import EMBEDDED_DIGITS, load_training_data

__all__ = [
    "CORRUPT_IMAGES",
    "EMBEDDED_DIGITS",
    "BatchOrder",
    "CachedImages",
    "ImageReader",
    "LoadedImages",
    "StreamedImages",
    "UnreadableImageError",
    "decode_images",
    "encode_labels",
    "find_class_names",
    "find_columns",
    "load_training_data",
    "open_images",
]
