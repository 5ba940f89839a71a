"""The images of a run, and the noise levels that they call for."""

import math
import os
from dataclasses import dataclass

from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from ..data import (
    CachedImages,
    ImageReader,
    LoadedImages,
    StreamedImages,
    encode_labels,
    find_class_names,
    find_columns,
    load_training_data,
    open_images,
)
from ..noise_levels import choose_num_train_timesteps, choose_sigma_max
from .config import TrainingConfig

_MAX_VALIDATION_IMAGES = 10_000
_AUTO_IMAGES = 60_000  # spread over the data set, from which sigma_max is chosen

Images = CachedImages | LoadedImages | StreamedImages


@dataclass(frozen=True)
class Classes:
    """The number of classes, and their names by number where the labels are not numbers alone."""

    number: int
    names: list[str] | None


def open_training_images(config: TrainingConfig, accelerator: Accelerator) -> tuple[Images, Classes | None]:
    """The images to train on, and their classes if the network is given them."""
    dataset, columns, classes = _open_split(config, accelerator, config.train_split, config.streaming)
    num_classes = classes and classes.number
    reader = ImageReader(*columns, config.resolution, config.channels, config.random_crop, config.seed, num_classes)
    num_workers = _choose_num_workers(config, accelerator)
    images = open_images(dataset, reader, accelerator.device, config.corrupt_images, config.max_cache_gb, num_workers)
    channels, height, width = images.shape
    accelerator.print(
        f"Training on {'a stream of' if config.streaming else f'{len(images):,}'} images ({channels} channels, "
        f"{height}×{width}) {'without classes' if num_classes is None else f'of {num_classes:,} classes'}, "
        f"from {' and '.join(f'`{name}`' for name in columns if name is not None)}."  # of several the first is taken
    )
    return images, classes


def open_validation_images(
    config: TrainingConfig, accelerator: Accelerator, shape: tuple[int, int, int], classes: Classes | None
) -> CachedImages | None:
    """
    The first images of `validation_split`, if there is one. Its labels are numbered as those of the training data.

    Args:
        config ([`TrainingConfig`]): the run's settings.
        accelerator (`Accelerator`): the run's processes.
        shape (`tuple` of three ints): channels, height and width of the training images.
        classes ([`Classes`], *optional*): theirs.

    Raises:
        ValueError: the images differ from those to train on in shape, or one is of a class that these do not have.
    """
    if config.validation_split is None:
        return None
    where = f"`validation_split`={config.validation_split!r}"
    try:
        dataset, columns, found = _open_split(config, accelerator, config.validation_split, False, classes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if classes is not None and (found.names != classes.names or found.number > classes.number):
        raise ValueError(f"{where} has {_describe(found)}, the training data {_describe(classes)}.")
    dataset = dataset.select(range(min(len(dataset), _MAX_VALIDATION_IMAGES)))
    reader = ImageReader(*columns, config.resolution, shape[0], num_classes=classes and classes.number)
    num_workers = _choose_num_workers(config, accelerator)
    images = open_images(dataset, reader, accelerator.device, config.corrupt_images, math.inf, num_workers)
    if images.shape != shape:
        raise ValueError(
            f"{where} has images of shape {images.shape}, the training data {shape}: `resolution` and `channels` make "
            "the shapes agree."
        )
    return images


def _describe(classes: Classes) -> str:
    names = classes.names or []
    examples = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"{classes.number} classes" + (f" ({examples})" if names else ", which are numbers")


def _open_split(
    config: TrainingConfig, accelerator: Accelerator, split: str, streaming: bool, classes: Classes | None = None
) -> tuple[Dataset | IterableDataset, tuple[str, str | None], Classes | None]:
    """
    A split, its columns of images and of labels, and its classes, whose names are numbered as those of `classes`; the
    last two only if they are used.
    """
    with accelerator.main_process_first():  # one process fills the cache of data sets, the others read it
        dataset = load_training_data(
            config.dataset_name, config.dataset_config_name, config.train_data_dir, split, streaming
        )
    dataset, image_column, label_column = find_columns(dataset, config.image_column, config.label_column)
    if not config.class_conditional:
        return dataset, (image_column, None), None
    dataset, num_classes = encode_labels(dataset, label_column, classes and classes.names)
    return dataset, (image_column, label_column), Classes(num_classes, find_class_names(dataset, label_column))


def _choose_num_workers(config: TrainingConfig, accelerator: Accelerator) -> int:
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers
    share = (os.cpu_count() or 1) // accelerator.num_processes
    return 0 if accelerator.device.type == "cpu" else min(8, share)


def choose_noise_levels(config: TrainingConfig, images: Images) -> dict:
    """Number, smallest and largest of the noise levels, as the scheduler's arguments; "auto" is chosen by the data."""
    sigma_max, num_levels = config.sigma_max, config.num_train_timesteps
    if sigma_max == "auto":
        sigma_max = choose_sigma_max(images.sample(_AUTO_IMAGES))
    if num_levels == "auto":
        num_levels = choose_num_train_timesteps(config.sigma_min, sigma_max, math.prod(images.shape))
    return {"num_train_timesteps": num_levels, "sigma_min": config.sigma_min, "sigma_max": sigma_max}
