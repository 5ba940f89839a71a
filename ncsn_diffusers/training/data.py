"""The data of a run, images or arrays, and the noise levels that they call for."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset, IterableDataset

from ..data import (
    ArrayRows,
    CachedArrays,
    CachedImages,
    ImageReader,
    LoadedArrays,
    LoadedImages,
    StreamedImages,
    array_column_rows,
    check_label_column,
    count_common,
    deep_image_rows,
    describe_shape,
    encode_labels,
    find_array_column,
    find_class_names,
    find_columns,
    load_training_data,
    open_array_files,
    open_arrays,
    open_images,
    read_labels,
    select_arrays,
    select_split,
    to_array_rows,
)
from ..noise_levels import choose_num_train_timesteps, choose_sigma_max
from ..units import Units
from .config import TrainingConfig

_MAX_VALIDATION_SAMPLES = 10_000
_AUTO_SAMPLES = 60_000  # spread over the data set, from which sigma_max is chosen

Data = CachedImages | LoadedImages | StreamedImages | CachedArrays | LoadedArrays


@dataclass(frozen=True)
class Classes:
    """The number of classes, and their names by number where the labels are not numbers alone."""

    number: int
    names: list[str] | None


@dataclass
class _Split:
    """
    A split, before it is opened.

    Args:
        where (`str`): the data, for messages.
        data (`datasets.Dataset`, `datasets.IterableDataset` or [`ArrayRows`]): its images, not decoded, or its arrays.
        columns (`tuple` of `str`): those of images or arrays and of labels that are used.
        classes ([`Classes`], *optional*): if they are used.
        labels (`np.ndarray` of shape `(num_arrays,)`, *optional*): those of arrays.
        lengths (`dict`, *optional*): numbers of samples by split, if they are known.
    """

    where: str
    data: Dataset | IterableDataset | ArrayRows
    columns: tuple[str | None, str | None] = (None, None)
    classes: Classes | None = None
    labels: np.ndarray | None = None
    lengths: dict[str, int] | None = None

    @property
    def source(self) -> str:
        """Where the data are, with the columns."""
        names = " and ".join(f"`{name}`" for name in self.columns if name is not None)
        return names or self.where


def open_training_data(
    config: TrainingConfig, accelerator: Accelerator, data: Any = None, units: Units | None = None
) -> tuple[Data, Classes | None]:
    """
    The data to train on, and their classes if the network is given them.

    Args:
        config ([`TrainingConfig`]): the run's settings.
        accelerator (`Accelerator`): the run's processes.
        data (`Any`, *optional*): instead of those that `config` names; see [`train`].
        units ([`Units`], *optional*): those of the network to go on with, which are kept even if data have been added.

    Raises:
        ValueError: the data cannot be read, do not fit a setting, or are images and the units are not theirs.
    """
    split = _open_split(config, accelerator, data, config.train_split, config.streaming)
    classes = f"of {split.classes.number:,} classes" if split.classes else "without classes"
    if isinstance(split.data, ArrayRows):
        if config.train_arrays is None and config.value_range is None:
            config.refuse_image_settings(split.where)
        arrays = _open_arrays(config, accelerator, split, units, data)
        accelerator.print(
            f"Training on {len(arrays):,} arrays ({describe_shape(arrays.shape)}) {classes}, from {split.source}. "
            + _describe_units(arrays.units)
        )
        if config.channel_axis is None and arrays.shape[0] > 1:
            accelerator.print(
                f"Axis 1 is taken for that of the {arrays.shape[0]} channels; `channel_axis` names another, or none."
            )
        return arrays, split.classes
    config.refuse_array_settings(split.where)
    if units is not None:
        _refuse_other_units(split.where, units)
    reader = _make_reader(config, split, config.channels, config.random_crop)
    if config.resolution is not None:
        _say_if_enlarged(accelerator, split.data, reader)
    images = open_images(
        split.data,
        reader,
        accelerator.device,
        config.corrupt_images,
        config.max_cache_gb,
        _choose_num_workers(config, accelerator),
    )
    channels, height, width = images.shape
    accelerator.print(
        f"Training on {'a stream of' if config.streaming else f'{len(images):,}'} images ({channels} channels, "
        f"{height}×{width}) {classes}, from {split.source}."
    )
    return images, split.classes


def open_validation_data(
    config: TrainingConfig,
    accelerator: Accelerator,
    training: Data,
    classes: Classes | None,
    data: Any = None,
) -> CachedImages | CachedArrays | LoadedArrays | None:
    """
    The first samples of `validation_split` or `validation_arrays`, if there are any. Labels are numbered as those of
    the training data, and arrays are in their units.

    Args:
        config ([`TrainingConfig`]): the run's settings.
        accelerator (`Accelerator`): the run's processes.
        training: what [`open_training_data`] returns.
        classes ([`Classes`], *optional*): as well.
        data (`Any`, *optional*): as for that.

    Raises:
        ValueError: the samples differ from those to train on in shape, or one is of a class that these do not have, or,
            in a slice of `train_arrays` or of `data`, is trained on.
    """
    if config.validation_arrays is not None:
        where = f"`validation_arrays`={config.validation_arrays!r}"
        rows = select_arrays(where, _open_files(config, config.validation_arrays), "all")
        split = _Split(where, rows)
    elif config.validation_split is not None:
        where = f"`validation_split`={config.validation_split!r}"
        try:
            split = _open_split(config, accelerator, data, config.validation_split, False, classes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    else:
        return None
    found = split.classes
    if classes is not None and (found.names != classes.names or found.number > classes.number):
        raise ValueError(f"{where} has {_describe(found)}, the training data {_describe(classes)}.")
    num = min(len(split.data), _MAX_VALIDATION_SAMPLES)
    if config.validation_arrays is None and split.lengths is not None:
        _check_held_out(config, split, where)
    if isinstance(split.data, ArrayRows):
        labels = None if split.labels is None else split.labels[:num]
        split = _Split(where, split.data.select(np.arange(num)), split.columns, found, labels)
        try:
            opened = _open_arrays(config, accelerator, split, training.units, data)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if opened.shape != training.shape:
            raise ValueError(
                f"{where} has arrays of {describe_shape(opened.shape)}, the training data "
                f"{describe_shape(training.shape)}."
            )
        return opened
    split.data = split.data.select(range(num))
    reader = _make_reader(config, split, training.shape[0], random_crop=False)
    num_workers = _choose_num_workers(config, accelerator)
    images = open_images(split.data, reader, accelerator.device, config.corrupt_images, math.inf, num_workers)
    if images.shape != training.shape:
        raise ValueError(
            f"{where} has images of shape {images.shape}, the training data {training.shape}: `resolution` and "
            "`channels` make the shapes agree."
        )
    return images


def _say_if_enlarged(accelerator: Accelerator, data: Dataset | IterableDataset, reader: ImageReader) -> None:
    """By the first image: the sizes of all are known only once all are decoded."""
    first = next(iter(data), None)
    size = None if first is None else reader.find_size(first)
    if size is not None and min(size) < reader.resolution:
        width, height = size
        accelerator.print(
            f"`resolution`={reader.resolution} enlarges images: the first has {width}×{height} pixels. They show no "
            f"more for it, and a step costs about {(reader.resolution / min(size)) ** 2:,.3g} times what it does at "
            f"{min(size)}."
        )


def _describe(classes: Classes) -> str:
    names = classes.names or []
    examples = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    return f"{classes.number} classes" + (f" ({examples})" if names else ", which are numbers")


def _refuse_other_units(where: str, units: Units) -> None:
    settings = {name: getattr(units, name) for name in ("data_mean", "data_std", "value_range")}
    if Units(**settings) != Units():
        found = ", ".join(f"`{name}`={value}" for name, value in settings.items())
        raise ValueError(
            f"{where} holds images, which a network sees in [-1, 1], and the one to go on with was trained on data of "
            f"{found}: give the images in these units, as arrays."
        )


def _describe_units(units: Units) -> str:
    def several(values):
        values = values if isinstance(values, list) else [values]
        words = [f"{value:g}" for value in values[:8]] + ["…"] * (len(values) > 8)
        return " ".join(words) + (f" {units.name}" if units.name else "")

    return f"In the network's units their mean is {several(units.data_mean)} → 0, and their standard deviation " + (
        f"{several(units.data_std)} → 0.5."
    )


def _open_split(
    config: TrainingConfig,
    accelerator: Accelerator,
    data: Any,
    split: str,
    streaming: bool,
    classes: Classes | None = None,
) -> _Split:
    """A split, whose classes' names are numbered as those of `classes`."""
    if config.train_arrays is not None:
        where, splits = f"`train_arrays`={config.train_arrays!r}", _open_files(config, config.train_arrays)
        return _Split(where, select_arrays(where, splits, split), lengths=_lengths(splits))
    lengths = None
    if data is None:
        with accelerator.main_process_first():  # one process fills the cache of data sets, the others read it
            dataset = load_training_data(
                config.dataset_name, config.dataset_config_name, config.train_data_dir, split, streaming
            )
    elif isinstance(data, Dataset):
        lengths = {"train": len(data)}
        dataset = select_split("`data`", {"train": data}, split, streaming=False)
    elif isinstance(data, IterableDataset):
        raise ValueError("`data` is a datasets.IterableDataset: name the data set, and let `streaming` read it.")
    else:
        if config.class_conditional:
            raise ValueError(
                "`class_conditional` needs labels: give `data` as a datasets.Dataset with a column of them."
            )
        splits = {"train": to_array_rows(data)}
        return _Split("`data`", select_arrays("`data`", splits, split), lengths=_lengths(splits))
    if config.class_conditional:
        check_label_column(dataset, config.label_column)
    array_column = find_array_column(dataset, config.array_column)
    image_column = config.image_column if array_column is None else array_column
    dataset, column, label_column = find_columns(dataset, image_column, config.label_column, array_column is not None)
    found = None
    if config.class_conditional:
        dataset, num_classes = encode_labels(
            dataset, label_column, classes and classes.names, classes and classes.number
        )
        found = Classes(num_classes, find_class_names(dataset, label_column))
    else:
        label_column = None
    opened = _Split("the data set", dataset, (column, label_column), found, lengths=lengths)
    if array_column is None and config.value_range is None:
        return opened
    if isinstance(dataset, IterableDataset):
        raise ValueError("`streaming` is for images of 8 bits, and the data set holds arrays.")
    if found is not None:
        opened.labels = read_labels(dataset, label_column, found.number)
    if array_column is not None:
        opened.data = array_column_rows(dataset, array_column)
    else:
        _refuse_for_deep_images(config)
        opened.data = deep_image_rows(dataset, _make_reader(config, opened, None, False))
    return opened


def _refuse_for_deep_images(config: TrainingConfig) -> None:
    for name in ("random_flip", "random_crop", "channels", "channel_axis"):
        if getattr(config, name) not in (None, False):
            raise ValueError(
                f"`{name}`={getattr(config, name)!r} does not go with `value_range`, for images with 8 bits."
            )
    if config.corrupt_images != "error":
        raise ValueError("`corrupt_images`='skip' does not go with `value_range`.")


def _check_held_out(config: TrainingConfig, split: _Split, where: str) -> None:
    both = count_common(split.where, split.lengths, config.train_split, config.validation_split)
    if both:
        raise ValueError(
            f"{where} has {both:,} samples that `train_split`={config.train_split!r} trains on: give slices that do "
            "not overlap, such as train[:90%] and train[90%:]."
        )


def _lengths(splits: dict[str, ArrayRows]) -> dict[str, int]:
    return {name: len(rows) for name, rows in splits.items()}


def _open_files(config: TrainingConfig, path: str) -> dict[str, ArrayRows]:
    return open_array_files(path, config.array_key, config.array_per_file)


def _make_reader(config: TrainingConfig, split: _Split, channels: int | None, random_crop: bool) -> ImageReader:
    num_classes = split.classes and split.classes.number
    return ImageReader(*split.columns, config.resolution, channels, random_crop, config.seed, num_classes)


def _open_arrays(
    config: TrainingConfig, accelerator: Accelerator, split: _Split, units: Units | None, data: Any
) -> CachedArrays | LoadedArrays:
    return open_arrays(
        split.data,
        accelerator.device,
        config.channel_axis,
        split.labels,
        units,
        config.max_cache_gb,
        value_range=config.value_range,
        data_mean=config.data_mean,
        data_std=config.data_std,
        data_unit=config.data_unit or getattr(data, "attrs", {}).get("units"),
    )


def _choose_num_workers(config: TrainingConfig, accelerator: Accelerator) -> int:
    if config.dataloader_num_workers is not None:
        return config.dataloader_num_workers
    share = (os.cpu_count() or 1) // accelerator.num_processes
    return 0 if accelerator.device.type == "cpu" else min(8, share)


def choose_noise_levels(config: TrainingConfig, data: Data) -> dict:
    """Number, smallest and largest of the noise levels, as the scheduler's arguments; "auto" is chosen by the data."""
    sigma_max, num_levels = config.sigma_max, config.num_train_timesteps
    if sigma_max == "auto":
        sigma_max = choose_sigma_max(data.sample(_AUTO_SAMPLES))
    if num_levels == "auto":
        num_levels = choose_num_train_timesteps(config.sigma_min, sigma_max, math.prod(data.shape))
    return {"num_train_timesteps": num_levels, "sigma_min": config.sigma_min, "sigma_max": sigma_max}
