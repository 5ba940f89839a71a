"""
Images for training: a data set on the Hub, a local folder or the embedded digits, as batches of uint8 tensors.

Three sources share one interface, `shape`, `sample` and `batches`:

* [`CachedImages`]: decoded once and kept on the device, if they fit;
* [`LoadedImages`]: decoded each time by the workers of a `DataLoader`;
* [`StreamedImages`]: read in the order in which a streamed data set delivers them, never all in memory.

The order of the first two depends only on the seed and the step and is the same for any number of processes, so
nothing has to be saved for a run to resume exactly where it stopped. A stream's position is saved with the checkpoint.

All of this is one file because each part assumes what the one before it settled: the loader which files are images, the
columns how rows hold them, the reader what becomes of them, and the sources that every image can be read.
"""

import hashlib
import inspect
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import escape
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets import __version__ as datasets_version
from datasets.data_files import DataFilesList
from datasets.distributed import split_dataset_by_node
from huggingface_hub import DatasetCard
from PIL import Image as PILImage
from PIL import ImageFile
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .checked_files import CheckedFiles
from .images import find_white, read_image

EMBEDDED_DIGITS = Path(__file__).parent / "assets" / "mnist_train_10k.parquet"
CORRUPT_IMAGES = ("error", "skip")

_SHUFFLE_BUFFER = 10_000  # rows of a stream that are held to be shuffled
_CHUNK = 64  # rows that are decoded together
_SHARDS = 1024  # parts of a folder that is streamed, whose order is shuffled as well

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TABLES = (".parquet", ".arrow", ".tar")
_NO_DECODER = (".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg")  # PIL knows these by name alone
# How `datasets` recognises splits; see `_find_splits` for where they count.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_PATTERNS = {
    split: re.compile(rf"(^|[-._ 0-9])({'|'.join(words)})($|[-._ 0-9])", re.IGNORECASE)
    for split, words in _SPLIT_WORDS.items()
}


def load_training_data(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """
    A split of a data set.

    Args:
        dataset_name (`str`, *optional*): the name of a data set on the Hub, or a folder that `load_dataset` reads.
        dataset_config_name (`str`, *optional*): the configuration of that data set.
        train_data_dir (`str`, *optional*): a folder of images, of parquet files or of WebDataset archives.
        split (`str`, defaults to `"train"`): the split, or a slice of one in the manner of `datasets`: `"train[:90%]"`.
        streaming (`bool`, defaults to `False`): read the data set as it is used, without a copy on the disk.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: of the first 10,000 training digits of MNIST when nothing is
        named.

    Raises:
        ValueError: both a name and a folder are given, or a configuration without a name, or there is no such split.
        FileNotFoundError: there is no such folder.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError(
            f"Give `dataset_name` or `train_data_dir`, not both ({dataset_name!r} and {train_data_dir!r})."
        )
    if dataset_config_name is not None and dataset_name is None:
        raise ValueError(f"`dataset_config_name`={dataset_config_name!r} needs `dataset_name`.")
    if train_data_dir is not None and not Path(train_data_dir).is_dir():
        raise FileNotFoundError(f"`train_data_dir`={train_data_dir!r} is not a folder.")
    if dataset_name is None and train_data_dir is None:
        return load_dataset("parquet", data_files=str(EMBEDDED_DIGITS), split=split, streaming=streaming)
    if dataset_name is not None and not Path(dataset_name).is_dir():
        return load_dataset(dataset_name, dataset_config_name, split=split, streaming=streaming)
    return _load_folder(os.path.abspath(dataset_name or train_data_dir), dataset_config_name, split, streaming)


def _load_folder(folder: str, config_name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    """A folder that a data set was saved to, or of a declared configuration, or of tables, or of images."""
    if os.path.exists(os.path.join(folder, "dataset_dict.json")):
        return _select_split(folder, load_from_disk(folder), split, streaming)
    if os.path.exists(os.path.join(folder, "state.json")):
        dataset = load_from_disk(folder)
        name = str(dataset.split or "train")
        return _select_split(folder, {name if name.isidentifier() else "train": dataset}, split, streaming)
    card = os.path.join(folder, "README.md")
    if config_name is not None or (os.path.exists(card) and "configs" in DatasetCard.load(card).data.to_dict()):
        return load_dataset(folder, config_name, split=split, streaming=streaming)

    paths = _list_files(folder)
    metadata = [path for path in paths if os.path.basename(path) in _METADATA]
    tables = [path for path in paths if _suffix(path) in _TABLES and path not in metadata]
    suffixes = _readable_suffixes()
    used = tables or [path for path in paths if _suffix(path) in suffixes]
    if not used:
        return load_dataset(folder, split=split, streaming=streaming)
    splits, depth = _find_splits(folder, used, names_count=bool(tables))
    if tables:
        metadata = []
    elif len(splits) > 1:  # each beside or below which there are images of one split alone
        metadata = [p for p in metadata if len(_splits_below(os.path.dirname(p), splits)) == 1]
    _say_left_out(folder, sorted({*paths} - {*used, *metadata, "README.md"}))
    if tables:
        files = {name: [escape(os.path.join(folder, path)) for path in paths] for name, paths in splits.items()}
        return load_dataset(folder, data_files=files, split=split, streaming=streaming)
    if metadata:
        datasets = _folder_with_metadata(folder, splits, metadata)
        if split in splits and len(datasets[split]) < len(splits[split]):
            missing = len(splits[split]) - len(datasets[split])
            _say(f"{missing} images of {folder!r} are left out: {metadata} do not name them.")
        return _select_split(folder, datasets, split, streaming)
    return _select_split(folder, _image_folder(folder, splits, depth), split, streaming)


def _list_files(folder: str) -> list[str]:
    """Paths below the folder, sorted, without what is hidden; links are followed."""
    paths = []
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__MACOSX", "__pycache__")
            and not here.startswith(os.path.realpath(os.path.join(root, name)) + os.sep)  # a link to what holds it
        ]
        start = os.path.join(os.path.relpath(root, folder), "") if root != folder else ""
        paths += [start + name for name in names if not name.startswith(".")]
    return sorted(paths)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


@lru_cache(maxsize=1 << 16)  # few folders hold millions of images
def _parts(folder: str) -> tuple[str, ...]:
    return Path(folder).parts


def _readable_suffixes() -> set[str]:
    suffixes = PILImage.registered_extensions()
    return {suffix for suffix, kind in suffixes.items() if kind in PILImage.OPEN and suffix not in _NO_DECODER}


def _say(message: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(message)


def _say_left_out(folder: str, paths: list[str]) -> None:
    if not paths:
        return
    counts = Counter(_suffix(path) or "without a suffix" for path in paths)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    examples = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
    _say(f"Left out {len(paths)} file(s) of {folder!r}, which are not read: {kinds} ({examples}).")


def _find_splits(folder: str, paths: list[str], names_count: bool) -> tuple[dict[str, list[str]], int | None]:
    """
    The paths by split, and how deep below the folder lies what names it.

    There are splits only where folders of one depth divide all paths (with `names_count`, files as well): names alone
    would take `train.png` for a split, or a class of trains. Where some paths remain outside, all are of the split
    "train", unless two splits are named: then mixing them might train on test images.
    """
    parts = [_parts(os.path.dirname(path)) for path in paths]
    if names_count:
        parts = [(*part, Path(path).stem) for part, path in zip(parts, paths, strict=True)]
    seen, best, best_depth = {}, [], None
    for depth in range(max(map(len, parts))):
        names = [_split_of(part[depth]) if depth < len(part) else None for part in parts]
        for name, path in zip(names, paths, strict=True):
            if name is not None:
                seen.setdefault(name, path)
        if None not in names and len(set(names)) > len(set(best)):
            best, best_depth = names, depth
    if best and len(set(best)) in (len(seen), 2, 3):
        grouped = {name: [p for n, p in zip(best, paths, strict=True) if n == name] for name in _SPLIT_WORDS}
        return {name: group for name, group in grouped.items() if group}, best_depth
    if len(seen) > 1:
        raise ValueError(
            f"{folder!r} names splits ({', '.join(f'{name}: {path}' for name, path in seen.items())}), but they do not "
            f"divide its {len(paths)} files. Give the folder of one split, or let each split have a folder of its own "
            "and nothing lie beside these."
        )
    for name, path in seen.items():
        _say(f"{path} is not taken for the split {name!r}, since other files of {folder!r} are in none: all are used.")
    return {"train": paths}, None


@lru_cache(maxsize=1 << 16)
def _split_of(part: str) -> str | None:
    return next((name for name, pattern in _SPLIT_PATTERNS.items() if pattern.search(part)), None)


def _splits_below(folder: str, splits: dict[str, list[str]]) -> list[str]:
    start = os.path.join(folder, "")
    return [name for name, paths in splits.items() if any(path.startswith(start) for path in paths)]


def _folder_with_metadata(folder: str, splits: dict[str, list[str]], metadata: list[str]) -> dict[str, Dataset]:
    """
    Data sets by split, as `datasets` makes them of the images that metadata files name.

    `datasets` caches what it makes. Left to itself it looks up every image at each start to see whether its cache is
    still valid, which takes most of the time. What it caches are the images' paths and their metadata, so it is given
    the list of paths and the metadata files' sizes and times instead.
    """
    files = {}
    for name, paths in splits.items():
        named = [os.path.join(folder, p) for p in metadata if name in _splits_below(os.path.dirname(p), splits)]
        states = [os.stat(path) for path in named]
        stamps = [(f"{state.st_size} {state.st_mtime_ns}", str(state.st_ctime_ns)) for state in states]
        files[name] = DataFilesList([os.path.join(folder, path) for path in paths] + named, stamps)
    datasets = load_dataset("imagefolder", data_files=files)
    if len(metadata) > 1:  # `datasets` reads them in the order of a set, which differs between processes
        for name, dataset in datasets.items():
            image_column = next((column for column, kind in dataset.features.items() if isinstance(kind, Image)), None)
            if image_column is not None:
                paths = [path or "" for path in _file_paths(dataset, image_column)]
                datasets[name] = dataset.select(sorted(range(len(paths)), key=paths.__getitem__))
    return datasets


def _file_paths(dataset: Dataset, image_column: str) -> list[str | None]:
    """Each image's file, or `None` if the data set itself holds its bytes."""
    if not isinstance(dataset.features[image_column], Image):
        return [None] * len(dataset)
    dataset, paths = dataset.select_columns([image_column]).with_format("arrow"), []
    for start in range(0, len(dataset), 10_000):
        files = dataset[start : start + 10_000][image_column].combine_chunks()
        paths += pc.if_else(files.field("bytes").is_null(), files.field("path"), None).to_pylist()
        if start == 0 and not any(paths):  # no need to read a large table of images
            return [None] * len(dataset)
    return paths


def _image_folder(folder: str, splits: dict[str, list[str]], depth: int | None) -> dict[str, Dataset]:
    """
    Data sets of the images by split, with the name of their folder as `label` if there are several at one depth.

    (`datasets` has this, too, but takes splits from names, brackets in paths for patterns, and fewer formats than PIL.)
    """

    def folders(path):
        parts = _parts(os.path.dirname(path))
        return parts if depth is None else parts[:depth] + parts[depth + 1 :]

    parts = {folders(path) for paths in splits.values() for path in paths}
    names = sorted({part[-1] for part in parts if part})
    labelled = len({len(part) for part in parts}) == 1 and len(names) > 1
    datasets = {}
    for split, paths in splits.items():
        columns = {"image": [os.path.join(folder, path) for path in paths]}
        features = {"image": Value("string")}
        if labelled:
            number = {name: i for i, name in enumerate(names)}
            columns["label"] = [number[folders(path)[-1]] for path in paths]
            features["label"] = ClassLabel(names=names)
        datasets[split] = Dataset.from_dict(columns, Features(features)).cast_column("image", Image())
    return datasets


def _select_split(folder: str, splits: dict[str, Dataset], split: str, streaming: bool) -> Dataset | IterableDataset:
    """`split`, in the manner of `load_dataset`, of data sets at hand."""
    spec = "+".join(splits) if split == "all" else split
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(dataset) for name, dataset in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"`split`={split!r}: {folder!r} has the split(s) {', '.join(splits)}. {error}") from error
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    dataset = rows[0] if len(rows) == 1 else concatenate_datasets(rows)
    return dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), _SHARDS))) if streaming else dataset


class UnreadableImageError(ValueError):
    """An image that cannot be decoded, or not with certainty; the message names it and says why."""


@dataclass(frozen=True)
class ImageReader:
    """
    Makes a uint8 array of shape `(channels, height, width)`, and a label, of a data set's row.

    [`read_image`] reads the image; a row without a label gets the number after the last class, which stands for no
    label.

    Args:
        image_column (`str`): the column of images.
        label_column (`str`, *optional*): the column of labels.
        resolution (`int`, *optional*):
            Side of the square that each image is resized (its shorter side) and cropped to; its own size otherwise.
        channels (`int`, *optional*): 1, 3 or 4; each image's own, 1 or 3, when not given.
        random_crop (`bool`, defaults to `False`): crop at a random place instead of the centre.
        seed (`int`, defaults to 0): of the random places.
        num_classes (`int`, *optional*): the number of classes; without it each row must have a label.
    """

    image_column: str
    label_column: str | None = None
    resolution: int | None = None
    channels: int | None = None
    random_crop: bool = False
    seed: int = 0
    num_classes: int | None = None

    def __call__(self, row: dict, place: tuple[int, int]) -> tuple[np.ndarray, int]:
        """
        Args:
            row (`dict`): with the image not yet decoded: `{"bytes": …, "path": …}`, or the file's bytes.
            place (`tuple` of two ints): epoch and number of the row, on which a random crop depends.

        Raises:
            UnreadableImageError: the image is corrupt, or its range is not certain, or the row holds none.
            ValueError: the row's label is not among the classes.
        """
        return self.read(row, place)[:2]

    def read(self, row: dict, place: tuple[int, int]) -> tuple[np.ndarray, int, tuple[str, float] | None]:
        """As calling it, and beside array and label the image's mode and white where these were found by its values."""
        try:
            image = Image().decode_example(self._file(row))
            white = find_white(image) if image.mode in ("F", "I") else None
            mode, image = image.mode, read_image(image, self.channels)
            if self.resolution is not None:
                image = self._resize_and_crop(image, place)
            array = np.asarray(image)
        except Exception as error:  # PIL has no common class for what a corrupt file may raise
            raise UnreadableImageError(f"{self.name(row, place)}: {type(error).__name__}: {error}") from error
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return array, self._label(row, place), None if white is None else (mode, white)

    def name(self, row: dict, place: tuple[int, int]) -> str:
        """The row's path and number, for messages."""
        path = self._file(row)["path"]
        return f"{path} (row {place[1]})" if path else f"row {place[1]}"

    def _file(self, row: dict) -> dict:
        value = row[self.image_column]
        value = value if isinstance(value, dict) else {"bytes": value}
        return {"bytes": value.get("bytes"), "path": value.get("path")}

    def takes_labels(self, dataset: Dataset) -> bool:
        """Whether every row's label is a class, or is missing and may be."""
        if self.label_column is None:
            return True
        if not isinstance(dataset.features[self.label_column], ClassLabel | Value):
            return False
        labels = dataset.unique(self.label_column)
        return all(isinstance(label, int | float | None) and self._takes(label) for label in labels)

    def _takes(self, label) -> bool:
        if _is_missing(label):
            return self.num_classes is not None
        return self.num_classes is None or 0 <= label < self.num_classes

    def _label(self, row: dict, place: tuple[int, int]) -> int:
        if self.label_column is None:
            return 0
        label = row[self.label_column]
        if self._takes(label):
            return self.num_classes if _is_missing(label) else int(label)
        if _is_missing(label):
            raise ValueError(f"{self.name(row, place)} has no label in `label_column`={self.label_column!r}.")
        raise ValueError(
            f"{self.name(row, place)} has {label} in `label_column`={self.label_column!r}; the classes are "
            f"numbered from 0 to {self.num_classes - 1}, and a missing label is empty."
        )

    def _resize_and_crop(self, image: PILImage.Image, place: tuple[int, int]) -> PILImage.Image:
        resolution = self.resolution
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), PILImage.Resampling.BILINEAR)
        left, top = (width - resolution) // 2, (height - resolution) // 2
        if self.random_crop:
            random = np.random.default_rng((self.seed, *place))
            left, top = (random.integers(2 * margin + 1) for margin in (left, top))
        return image.crop((left, top, left + resolution, top + resolution))


def find_columns(
    dataset: Dataset | IterableDataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[Dataset | IterableDataset, str, str | None]:
    """
    The columns of images and labels, and the data set with these alone, its images not decoded.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with its features known.
        image_column (`str`, *optional*): the first column of images when not given.
        label_column (`str`, *optional*):
            The first column of class labels when not given, or else the one named `label` or `cls`.

    Raises:
        ValueError: there is no such column.
    """
    features = dataset.features or {}
    if image_column is None:
        image_column = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
        image_column = image_column or next((name for name in features if _holds_files(features[name])), None)
    types = {name: _type_name(feature) for name, feature in features.items()}
    accepted = "images, encoded files (binary), or a struct of `bytes` and `path`"
    if image_column is None:
        raise ValueError(f"The data set needs a column of {accepted}; it has {types or 'no columns'}.")
    if image_column not in features:
        raise ValueError(f"`image_column`={image_column!r} is not among the data set's columns, {list(features)}.")
    feature = features[image_column]
    if not (isinstance(feature, Image) or _holds_files(feature) or _type_name(feature) in ("string", "large_string")):
        raise ValueError(
            f"`image_column`={image_column!r} holds {types[image_column]}; it must hold {accepted}, or paths (string)."
        )
    if label_column is None:
        label_column = next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
        label_column = label_column or next((name for name in ("label", "cls") if name in features), None)
    elif label_column not in features:
        raise ValueError(f"`label_column`={label_column!r} is not among the data set's columns, {list(features)}.")
    dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    if not _holds_files(feature):
        dataset = dataset.cast_column(image_column, Image(decode=False))
    return dataset, image_column, label_column


def _holds_files(feature) -> bool:
    if isinstance(feature, dict):  # a struct
        return "bytes" in feature and {*feature} <= {"bytes", "path"} and _holds_files(feature["bytes"])
    return _type_name(feature) in ("binary", "large_binary")


def _type_name(feature) -> str:
    """A column's type in words, in all versions of `datasets`."""
    if isinstance(feature, dict):
        return "a struct of " + ", ".join(f"{name} ({_type_name(part)})" for name, part in feature.items())
    part = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if part is not None:
        return f"lists of {_type_name(part)}"
    if isinstance(feature, Value):
        return feature.dtype
    return type(feature).__name__


def encode_labels(
    dataset: Dataset | IterableDataset, label_column: str | None, class_names: Sequence[str] | None = None
) -> tuple[Dataset | IterableDataset, int]:
    """
    Labels as class numbers from 0 up, and the number of classes. Names become numbers in alphabetical order, or in that
    of `class_names`; missing labels stay missing, see [`ImageReader`].

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with its features known.
        label_column (`str`, *optional*): see [`find_columns`].
        class_names (`Sequence[str]`, *optional*):
            The names by number in another split, whose labels these are to agree with: see [`find_class_names`].

    Raises:
        ValueError: there are no labels, or they are not names or whole numbers from 0, or a name is not among
            `class_names`, or a streamed data set does not say how many classes it has.
    """
    if label_column is None:
        raise ValueError(
            f"`class_conditional` needs labels: none of the columns {list(dataset.features)} holds classes; "
            "`label_column` names one that does."
        )
    feature, kind = dataset.features[label_column], _type_name(dataset.features[label_column])
    if not isinstance(feature, ClassLabel) and not re.match("(large_)?string|u?int|float|bool", kind):
        raise ValueError(
            f"`label_column`={label_column!r} holds {kind}; it must hold one class a row: a ClassLabel, a name "
            "(string) or a whole number from 0."
        )
    if not isinstance(feature, ClassLabel) and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`label_column`={label_column!r} of the streamed data set is not a ClassLabel: its classes are not known "
            "beforehand. Without `streaming` they are counted."
        )
    if "string" in kind:
        if class_names is None:
            dataset = dataset.class_encode_column(label_column)
        else:
            unknown = sorted(set(dataset.unique(label_column)) - {*class_names, None})
            if unknown:
                raise ValueError(
                    f"`label_column`={label_column!r} holds {unknown[0]!r}, which is not among the classes of the "
                    f"training data, {', '.join(class_names)}."
                )
            dataset = dataset.cast_column(label_column, Value("string"))
            dataset = dataset.cast_column(label_column, ClassLabel(names=list(class_names)))
        feature = dataset.features[label_column]
    labels = []
    if isinstance(dataset, Dataset):
        labels = [label for label in dataset.unique(label_column) if not _is_missing(label)]
        if not labels:
            raise ValueError(f"`label_column`={label_column!r} has no label in any row.")
    wrong = next((label for label in labels if label < 0 or label != math.floor(label)), None)
    if wrong is not None:
        raise ValueError(
            f"`label_column`={label_column!r} holds {wrong}; classes are numbered from 0, and a missing label is empty."
        )
    return dataset, feature.num_classes if isinstance(feature, ClassLabel) else int(max(labels)) + 1


def find_class_names(dataset: Dataset | IterableDataset, label_column: str | None) -> list[str] | None:
    """The names of the classes by number, of what [`encode_labels`] returns; `None` if they are numbers alone."""
    feature = dataset.features.get(label_column)
    return feature.names if isinstance(feature, ClassLabel) else None


def _is_missing(label) -> bool:
    return label is None or label != label  # a table of floats has nan instead


def decode_images(dataset: Dataset, resolution: int | None = None, channels: int | None = None) -> torch.Tensor:
    """
    Every image of a data set, decoded once: [`open_images`] where nothing but the images is of interest.

    Args:
        dataset (`datasets.Dataset`): with a column of images.
        resolution (`int`, *optional*): see [`ImageReader`].
        channels (`int`, *optional*): 1, 3 or 4; 1 if all images are gray and 3 otherwise when not given.

    Returns:
        `torch.Tensor` of shape `(num_images, channels, height, width)`, uint8.

    Raises:
        ValueError: there are no images, or one is corrupt, or they have several sizes and no `resolution` is given.
    """
    dataset, image_column, _ = find_columns(dataset)
    reader = ImageReader(image_column, resolution=resolution, channels=channels)
    return open_images(dataset, reader, torch.device("cpu"), max_cache_gb=math.inf).images


@dataclass(frozen=True)
class BatchOrder:
    """
    Which images make up a process's batches: each epoch has an order of its own, in which the processes take turns.

    Args:
        num_images (`int`): at least `batch_size * num_processes`; what remains of an epoch is left out.
        batch_size (`int`): images a batch.
        seed (`int`): of the orders.
    """

    num_images: int
    batch_size: int
    seed: int

    def order(self, epoch: int) -> torch.Tensor:
        """The epoch's permutation of the images, of shape `(num_images,)`, int64."""
        entropy = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        return torch.randperm(self.num_images, generator=torch.Generator().manual_seed(int(entropy[0])))

    def slices(self, first_batch: int = 0) -> Iterator[tuple[int, slice]]:
        """The epochs, and the parts of their orders, of this process's batches from number `first_batch` on."""
        process = PartialState()
        per_epoch = self.num_images // (self.batch_size * process.num_processes)
        for batch in itertools.count(first_batch):
            epoch, turn = divmod(batch, per_epoch)
            start = (turn * process.num_processes + process.process_index) * self.batch_size
            yield epoch, slice(start, start + self.batch_size)


class CachedImages:
    """
    Images decoded once and kept on the device.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`): uint8, on the device.
        labels (`torch.Tensor` of shape `(num_images,)`): int64, on the device.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels = images, labels
        self.shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, num_images: int) -> torch.Tensor:
        """At most `num_images` images, spread over the data set: uint8 of shape `(n, channels, height, width)`."""
        return self.images[_spread(len(self), num_images)]

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """This process's batches, for ever: uint8 `(batch_size, …)` and int64 `(batch_size,)`, on the device."""
        orders, order_epoch, order = BatchOrder(len(self), batch_size, seed), None, None
        for epoch, part in orders.slices(first_batch):
            if epoch != order_epoch:  # to the device once an epoch: a copy each step would make the host wait
                order_epoch, order = epoch, orders.order(epoch).to(self.images.device)
            yield self.images[order[part]], self.labels[order[part]]


class LoadedImages:
    """
    Images that are decoded each time they are used, by the workers of a `DataLoader`.

    Args:
        dataset (`datasets.Dataset`): its images not decoded, none of them corrupt.
        reader ([`ImageReader`]): which makes them all of one shape.
        shape (`tuple` of three ints): that shape.
        num_workers (`int`): processes that decode.
        device (`torch.device`): where the batches go.
    """

    def __init__(self, dataset: Dataset, reader: ImageReader, shape, num_workers: int, device: torch.device):
        self.dataset, self.reader, self.shape = dataset, reader, tuple(shape)
        self.num_workers, self.device = num_workers, device

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, num_images: int) -> torch.Tensor:
        """As [`CachedImages.sample`]."""
        rows = _spread(len(self), num_images).tolist()
        return torch.from_numpy(np.stack([self.reader(self.dataset[row], (0, row))[0] for row in rows]))

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """As [`CachedImages.batches`]."""
        orders = BatchOrder(len(self), batch_size, seed)
        loader = DataLoader(
            _Rows(self.dataset, self.reader),
            batch_sampler=_places(orders, first_batch),
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def _places(orders: BatchOrder, first_batch: int) -> Iterator[list[tuple[int, int]]]:
    """Batches of (epoch, row)."""
    order_epoch, order = None, None
    for epoch, part in orders.slices(first_batch):
        if epoch != order_epoch:
            order_epoch, order = epoch, orders.order(epoch).tolist()
        yield [(epoch, row) for row in order[part]]


class StreamedImages:
    """
    Images read as a streamed data set delivers them, shuffled among the 10,000 that lie ahead.

    Where the data set has a multiple of `num_processes` files, each process reads its own; otherwise each reads all and
    keeps its share.

    Args:
        dataset (`datasets.IterableDataset`): its images not decoded.
        reader ([`ImageReader`]): with a resolution and a number of channels.
        num_workers (`int`): threads that decode, beside the training; with 0 it decodes itself.
        device (`torch.device`): where the batches go.
        seed (`int`): of the shuffling.
        corrupt_images (`str`): `"error"` or `"skip"`.
    """

    def __init__(self, dataset, reader, num_workers: int, device: torch.device, seed: int, corrupt_images: str):
        process = PartialState()
        shuffled = split_dataset_by_node(dataset, process.process_index, process.num_processes)
        shuffled = shuffled.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        self.dataset, self.reader, self.num_workers, self.device = dataset, reader, num_workers, device
        self.rows = _StreamedRows(shuffled, reader, max(1, num_workers), corrupt_images)
        self.position = [0, 0]  # epoch, and rows of it that have been used, of this process
        self.shape = tuple(self.sample(1).shape[1:])

    def sample(self, num_images: int) -> torch.Tensor:
        """The first `num_images` images: uint8 of shape `(n, channels, height, width)`."""
        arrays = []
        for i, row in enumerate(tqdm(self.dataset, desc="Reading", unit="image", total=num_images, leave=False)):
            try:
                arrays.append(self.reader(row, (0, i))[0])
            except UnreadableImageError:
                if self.rows.corrupt_images == "error":
                    raise
            if len(arrays) == num_images:
                break
        if not arrays:
            raise ValueError("The data set has no readable image.")
        return torch.from_numpy(np.stack(arrays))

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """As [`CachedImages.batches`], from `self.position` on, which counts along."""
        self.rows.position = tuple(self.position)
        loader = DataLoader(
            self.rows,
            batch_size=batch_size,
            num_workers=min(1, self.num_workers),
            collate_fn=_collate_stream,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels, position in loader:
            self.position = list(position)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _StreamedRows(torch.utils.data.IterableDataset):
    """((array, label), position) for ever, where position is how far the stream has been read by then."""

    def __init__(self, dataset: IterableDataset, reader: ImageReader, num_threads: int, corrupt_images: str):
        self.dataset, self.reader, self.num_threads = dataset, reader, num_threads
        self.corrupt_images, self.position = corrupt_images, (0, 0)

    def __iter__(self):
        epoch, row = self.position
        guesses = {}
        with ThreadPool(self.num_threads) as pool:
            while True:
                self.dataset.set_epoch(epoch)
                rows, readable = itertools.islice(self.dataset, row, None), row > 0
                while chunk := list(itertools.islice(rows, _CHUNK)):
                    places = [(epoch, i) for i in range(row, row + len(chunk))]
                    for item in pool.starmap(self._read, zip(chunk, places, strict=True)):
                        row += 1
                        if item is not None:
                            readable = True
                            guesses.setdefault(item[2], f"image {row - 1}")
                            _check_guesses(guesses)
                            yield item[:2], (epoch, row)
                if not readable:
                    raise ValueError("The data set has no readable image for this process.")
                epoch, row = epoch + 1, 0

    def _read(self, row, place):
        try:
            return self.reader.read(row, place)
        except UnreadableImageError as error:
            if self.corrupt_images == "error":
                raise
            tqdm.write(f"Left out an image that cannot be read: {error}")
            return None


class _Rows(torch.utils.data.Dataset):
    """The images of a data set by (epoch, row)."""

    def __init__(self, dataset: Dataset, reader: ImageReader):
        self.dataset, self.reader = dataset, reader

    def __getitem__(self, place: tuple[int, int]):
        return self.reader(self.dataset[place[1]], place)


class _RowsAtFirst(_Rows):
    """The same with what [`ImageReader.read`] finds, and an error in place of an image that cannot be read."""

    def __getitem__(self, place: tuple[int, int]):
        try:
            return self.reader.read(self.dataset[place[1]], place)
        except UnreadableImageError as error:
            return error, 0, None


def _check_guesses(guesses: dict[tuple[str, float] | None, str]) -> None:
    """One data set has one white in a mode: else its images would be scaled differently. The values name examples."""
    for mode in ("F", "I"):
        whites = {guess[1]: example for guess, example in guesses.items() if guess is not None and guess[0] == mode}
        if len(whites) > 1:
            found = " and ".join(f"{white:g} in {example}" for white, example in whites.items())
            raise ValueError(
                f"Images of mode {mode} seem to have different values of white, {found}: which is right for all is not "
                "certain. Scale them yourself and save them with 8 bits."
            )


def _collate(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    arrays, labels = zip(*items, strict=True)
    return torch.from_numpy(np.stack(arrays)), torch.tensor(labels)


def _collate_stream(items):
    images, positions = zip(*items, strict=True)
    return *_collate(images), positions[-1]


def open_images(
    dataset: Dataset | IterableDataset,
    reader: ImageReader,
    device: torch.device,
    corrupt_images: str = "error",
    max_cache_gb: float = 4.0,
    num_workers: int = 0,
) -> CachedImages | LoadedImages | StreamedImages:
    """
    Make a data set ready for training.

    Unless it is streamed, every image is decoded once, so that a corrupt one is found before training starts. Image
    files that passed at an earlier start, under the same settings, and have not changed since are not decoded again,
    unless all images fit in the cache and their pixels are needed. The processes share the work; each gets all images.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): its images not decoded: see [`find_columns`].
        reader ([`ImageReader`]): for its rows.
        device (`torch.device`): where the batches go.
        corrupt_images (`str`, defaults to `"error"`): or `"skip"`, to report images that cannot be read and go on.
        max_cache_gb (`float`, defaults to 4.0): the largest cache, in units of 10⁹ bytes; see [`CachedImages`].
        num_workers (`int`, defaults to 0): processes that decode.

    Raises:
        ValueError: images are corrupt, or there are none, or several sizes and no `resolution`.
    """
    if isinstance(dataset, IterableDataset):
        if reader.resolution is None:
            raise ValueError("`streaming` needs `resolution`: the sizes of the images are not known beforehand.")
        if reader.channels is None:
            reader = replace(reader, channels=_channels_of_stream(dataset, reader, corrupt_images))
        return StreamedImages(dataset, reader, num_workers, device, reader.seed, corrupt_images)

    process = PartialState()
    rows = np.array_split(np.arange(len(dataset)), process.num_processes)[process.process_index]
    checked = _checked_files(dataset, rows, reader)
    known, findings = checked.find()
    findings = {(tuple(shape), guess and tuple(guess)): number for number, (shape, guess) in enumerate(findings)}
    if not reader.takes_labels(dataset):
        known[:] = -1  # read every row, so that the error names the one whose label is wrong
    sizes = np.array([math.prod(shape) for shape, _ in findings], dtype=np.int64)
    num_bytes, max_bytes = int(sizes[known[known >= 0]].sum()), max_cache_gb * 1e9 / process.num_processes
    keep = not reader.random_crop and num_bytes <= max_bytes
    to_read = rows if keep else rows[known < 0]
    loader = DataLoader(
        _RowsAtFirst(dataset, reader),
        batch_sampler=[
            [(0, int(row)) for row in part] for part in np.split(to_read, range(_CHUNK, len(to_read), _CHUNK))
        ],
        num_workers=num_workers,
        collate_fn=list,
    )
    progress = tqdm(total=len(to_read), desc="Decoding", unit="image", leave=False, disable=not process.is_main_process)
    arrays, labels, errors, numbers = [], [], {}, known.copy()
    for row, (array, label, guess) in zip(to_read.tolist(), itertools.chain.from_iterable(loader), strict=True):
        progress.update()
        place = row - rows[0]
        if isinstance(array, UnreadableImageError):
            errors[row], numbers[place] = str(array), -1
            continue
        numbers[place] = findings.setdefault((array.shape, guess), len(findings))
        num_bytes += array.nbytes if known[place] < 0 else 0
        keep = keep and num_bytes <= max_bytes
        if keep:
            arrays.append(array)
            labels.append(label)
        else:
            arrays.clear()
    progress.close()

    # Every process must know what the others found, so that all continue or stop together.
    row_of = dict(zip(numbers.tolist(), rows.tolist(), strict=True))
    examples = {finding: row_of[number] for finding, number in findings.items() if number in row_of}
    new = checked.records(np.where(numbers == known, -1, numbers), list(findings))
    found = gather_object([(examples, errors, keep, new, len(rows) - len(to_read))])
    examples, errors = ({key: value for f in found for key, value in f[i].items()} for i in (0, 1))
    _remember(checked, [f[3] for f in found])
    if process.is_main_process and (num_known := sum(f[4] for f in found)):
        tqdm.write(f"{num_known:,} of {len(dataset):,} images passed the check at an earlier start and are unchanged.")
    if errors:
        message = "\n".join(list(errors.values())[:20] + ["…"] * (len(errors) > 20))
        if corrupt_images == "error":
            raise ValueError(
                f"{len(errors)} of {len(dataset)} images cannot be read. Repair or remove them, or leave them out with "
                f"`corrupt_images`='skip':\n{message}"
            )
        if process.is_main_process:
            tqdm.write(f"Left out {len(errors)} of {len(dataset)} images, which cannot be read:\n{message}")
    _check_guesses({guess: reader.name(dataset[row], (0, row)) for (_, guess), row in examples.items()})
    shape = _common_shape({shape for shape, _ in examples})
    if all(f[2] for f in found):
        images = np.stack([np.broadcast_to(array, shape) for array in arrays]) if arrays else np.empty((0, *shape))
        images = torch.from_numpy(images.astype(np.uint8, copy=False)).to(device)
        labels = torch.tensor(labels, dtype=torch.int64, device=device)
        return CachedImages(_gather_rows(images), _gather_rows(labels))
    dataset = dataset.select([row for row in range(len(dataset)) if row not in errors]) if errors else dataset
    return LoadedImages(dataset, replace(reader, channels=shape[0]), shape, num_workers, device)


def _checked_files(dataset: Dataset, rows: np.ndarray, reader: ImageReader) -> CheckedFiles:
    """What earlier starts found in the files of these rows."""
    paths = _file_paths(dataset, reader.image_column)
    absolute = [path for path in paths if path and os.path.isabs(path)]
    folder = os.path.commonpath([min(absolute), max(absolute)]) if absolute else ""
    code = b"".join(Path(file).read_bytes() for file in (__file__, inspect.getfile(read_image)))
    PILImage.init()  # registers the formats that Pillow reads
    settings = [
        *(reader.channels, reader.resolution),
        *(datasets_version, PILImage.__version__, sorted(PILImage.OPEN)),
        *(PILImage.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        hashlib.sha256(code).hexdigest(),
    ]
    return CheckedFiles([paths[row] for row in rows], folder, settings)


def _remember(checked: CheckedFiles, records: list[pa.Table]) -> None:
    if any(map(len, records)) and PartialState().is_local_main_process:
        try:
            checked.save(records)
        except OSError as error:
            tqdm.write(
                f"All images will be checked again at the next start, because the cache cannot be written: {error}"
            )


def _channels_of_stream(dataset: IterableDataset, reader: ImageReader, corrupt_images: str) -> int:
    """3 where the first image that can be read says so: as in a data set at hand, one in colour decides for all."""
    for i, row in enumerate(dataset):
        try:
            channels = len(reader(row, (0, i))[0])
        except UnreadableImageError:
            if corrupt_images == "error":
                raise
            continue
        if channels == 1:
            raise ValueError(
                "`streaming` needs `channels`, 1 or 3: the first image is gray, and whether all are is not known "
                "beforehand."
            )
        return channels
    raise ValueError("The data set has no readable image.")


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order, however many each has."""
    if PartialState().num_processes == 1:
        return rows
    lengths = gather_object([len(rows)])
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    parts = gather(padded).split(max(lengths))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _common_shape(shapes: set[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Channels, height and width of images that may be gray or coloured, but must be of one size."""
    if not shapes:
        raise ValueError("The data set has no image.")
    sizes = {shape[1:] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"`resolution` must be given: the images have {len(sizes)} sizes (height, width), among them "
            f"{sorted(sizes)[:3]}."
        )
    return max(shapes)


def _spread(num_rows: int, num: int) -> torch.Tensor:
    """At most `num` of so many rows, evenly spread: data sets are often sorted by class."""
    return torch.linspace(0, num_rows - 1, min(num, num_rows)).round().long()
