"""
Where data come from: a data set on the Hub, a local folder or the embedded digits, as a `datasets.Dataset`.

A folder's layout decides what its files mean, and the rules are here: which files are images, which folders are splits,
which are classes. What is not read is said.
"""

import os
import re
import tarfile
from collections import Counter
from functools import lru_cache
from glob import escape
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
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
from datasets.data_files import DataFilesList
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import DatasetCard
from PIL import Image as PILImage
from tqdm.auto import tqdm

EMBEDDED_DIGITS = Path(__file__).parent.parent / "assets" / "mnist_train_10k.parquet"

_SHARDS = 1024  # parts of a folder that is streamed, whose order is shuffled as well

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TABLES = (".parquet", ".arrow", ".tar")
_NO_DECODER = (".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg")  # PIL knows these by name alone
# How `datasets` recognizes splits; see `find_splits` for where they count.
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
        return select_split(folder, load_from_disk(folder), split, streaming)
    if os.path.exists(os.path.join(folder, "state.json")):
        dataset = load_from_disk(folder)
        name = str(dataset.split or "train")
        return select_split(folder, {name if name.isidentifier() else "train": dataset}, split, streaming)
    card = os.path.join(folder, "README.md")
    if config_name is not None or (os.path.exists(card) and "configs" in DatasetCard.load(card).data.to_dict()):
        return load_dataset(folder, config_name, split=split, streaming=streaming)

    paths = list_files(folder)
    metadata = [path for path in paths if os.path.basename(path) in _METADATA]
    tables = [path for path in paths if _suffix(path) in _TABLES and path not in metadata]
    suffixes = _readable_suffixes()
    used = tables or [path for path in paths if _suffix(path) in suffixes]
    if not used:
        return load_dataset(folder, split=split, streaming=streaming)
    splits, depth = find_splits(folder, used, names_count=bool(tables))
    if tables:
        metadata = []
    elif len(splits) > 1:  # each beside or below which there are images of one split alone
        metadata = [p for p in metadata if len(_splits_below(os.path.dirname(p), splits)) == 1]
    say_left_out(folder, sorted({*paths} - {*used, *metadata, "README.md"}))
    if tables:
        files = {name: [escape(os.path.join(folder, path)) for path in paths] for name, paths in splits.items()}
        archives = [os.path.join(folder, path) for path in tables if _suffix(path) == ".tar"]
        features = _archive_features(folder, archives) if len(archives) == len(tables) else None
        return load_dataset(folder, data_files=files, split=split, streaming=streaming, features=features)
    if metadata:
        datasets = _folder_with_metadata(folder, splits, metadata)
        if split in splits and len(datasets[split]) < len(splits[split]):
            missing = len(splits[split]) - len(datasets[split])
            say(f"{missing} images of {folder!r} are left out: {metadata} do not name them.")
        return select_split(folder, datasets, split, streaming)
    return select_split(folder, _image_folder(folder, splits, depth), split, streaming)


def _archive_features(folder: str, archives: list[str]) -> Features | None:
    """
    The columns of WebDataset archives, where `datasets`, which looks at the first five samples, would miss some of
    them; `None` where all samples have the same. A sample that lacks a file has no value in its column.

    Raises:
        ValueError: the images are of several types, which would be columns of their own.
    """
    examples: dict[str, tuple[str, int, int]] = {}  # where the first file of each column is: archive, place and size
    kinds: Counter[tuple[str, ...]] = Counter()  # the columns that samples have
    for archive in archives:
        columns: dict[str, list[str]] = {}
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    match = re.fullmatch(r"((?:.*/|)[^./]+)[.]([^/]*)", member.name)  # as `datasets` names samples
                    if member.isfile() and match is not None:
                        columns.setdefault(match[1], []).append(match[2])
                        examples.setdefault(match[2], (archive, member.offset_data, member.size))
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{archive} is no readable .tar archive: {str(error).splitlines()[0]}") from error
        kinds.update(tuple(sorted(names)) for names in columns.values())
    if len(kinds) < 2:
        return None
    images = {name for name in examples if name.rpartition(".")[2].lower() in WebDataset.IMAGE_EXTENSIONS}
    of_one = [images.intersection(kind) for kind in kinds]
    if len(images) > 1 and all(len(names) <= 1 for names in of_one):
        counts = Counter({name: sum(kinds[kind] for kind in kinds if name in kind) for name in images})
        found = ", ".join(f"{count:,} .{name}" for name, count in counts.most_common())
        raise ValueError(
            f"The archives of {folder!r} hold images of {len(images)} types ({found}), and the type of a file is the "
            "column of its sample: convert them to one type, or pack them into folders or parquet files."
        )
    values, features = {}, {}
    for name, (archive, offset, size) in examples.items():
        with open(archive, "rb") as file:
            file.seek(offset)
            content, suffix = file.read(size), name.rpartition(".")[2].lower()
        values[name] = WebDataset.DECODERS[suffix](content) if suffix in WebDataset.DECODERS else content
    features = Features.from_arrow_schema(pa.Table.from_pylist([values]).schema)
    return Features(
        {name: Image() if name in images else feature for name, feature in features.items()}
        | {"__key__": Value("string"), "__url__": Value("string")}
    )


def list_files(folder: str) -> list[str]:
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


def say(message: str) -> None:
    if PartialState().is_main_process:
        tqdm.write(message)


def say_left_out(folder: str, paths: list[str]) -> None:
    if not paths:
        return
    counts = Counter(_suffix(path) or "without a suffix" for path in paths)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    examples = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
    say(f"Left out {len(paths)} file(s) of {folder!r}, which are not read: {kinds} ({examples}).")


def find_splits(folder: str, paths: list[str], names_count: bool) -> tuple[dict[str, list[str]], int | None]:
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
        say(f"{path} is not taken for the split {name!r}, since other files of {folder!r} are in none: all are used.")
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
    try:
        datasets = load_dataset("imagefolder", data_files=files)
    except DatasetGenerationError as error:  # which says no more than that there was one
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"{', '.join(metadata)} of {folder!r} cannot be used: {cause}") from error
    if len(metadata) > 1:  # `datasets` reads them in the order of a set, which differs between processes
        for name, dataset in datasets.items():
            image_column = next((column for column, kind in dataset.features.items() if isinstance(kind, Image)), None)
            if image_column is not None:
                paths = [path or "" for path in file_paths(dataset, image_column)]
                datasets[name] = dataset.select(sorted(range(len(paths)), key=paths.__getitem__))
    return datasets


def file_paths(dataset: Dataset, image_column: str) -> list[str | None]:
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
    Data sets of the images by split, with the name of their class's folder as `label`, see [`_find_classes`].

    (`datasets` has this, too, but takes splits from names, brackets in paths for patterns, and fewer formats than PIL.)
    """

    def folders(path):
        parts = _parts(os.path.dirname(path))
        return parts if depth is None else parts[:depth] + parts[depth + 1 :]

    level = _find_classes(folder, {name: {folders(path) for path in paths} for name, paths in splits.items()})
    names = set()
    if level is not None:
        num_levels = len(folders(splits[next(iter(splits))][0]))
        labeled = [s for s, paths in splits.items() if {len(folders(path)) for path in paths} == {num_levels}]
        names = sorted({folders(path)[level] for split in labeled for path in splits[split]})
        number = {name: i for i, name in enumerate(names)}
    datasets = {}
    for split, paths in splits.items():
        columns = {"image": [os.path.join(folder, path) for path in paths]}
        features = {"image": Value("string")}
        if level is not None and split in labeled:
            columns["label"] = [number[folders(path)[level]] for path in paths]
            features["label"] = ClassLabel(names=names)
        datasets[split] = Dataset.from_dict(columns, Features(features)).cast_column("image", Image())
    return datasets


def _find_classes(folder: str, parts: dict[str, set[tuple[str, ...]]]) -> int | None:
    """
    The level of folders whose names are the classes: the innermost one with several names, in the first split.

    There are none where images lie at several depths, or where one name occurs in several folders with different names
    themselves, as `2020` in `cat/2020` and `dog/2020` does: either level might be meant, or neither. This is said.

    Args:
        folder (`str`): for messages.
        parts (`dict`): by split, the folders in which there are images, each as the names from the outermost on.
    """
    first = next(iter(parts.values()))
    if len({len(part) for part in first}) > 1:
        if any(first):
            say(f"No folder of {folder!r} is taken for a class, since images lie at several depths.")
        return None
    levels = [i for i in range(len(next(iter(first)))) if len({part[i] for part in first}) > 1]
    if not levels:
        return None
    level = levels[-1]
    outer = {tuple(part[i] for i in levels) for part in first}
    names = {part[level] for part in first}
    if len(outer) > len(names):
        examples = ", ".join("/".join(part) for part in sorted(first)[:3])
        say(
            f"No folder of {folder!r} is taken for a class: whether an outer or an inner one of {examples} names it is "
            "not certain. Below the folders of classes, let no other folder differ in name."
        )
        return None
    if len(levels) > 1:
        example = "/".join(min(first))
        say(f"The inner folders of {folder!r} are taken for classes, {min(names)!r} for one in {example}.")
    return level


def select_ranges(where: str, lengths: dict[str, int], split: str) -> list[tuple[str, int, int]]:
    """
    The name of a split, and first row and end, of each part of `split`, in the manner of `load_dataset`.

    Args:
        where (`str`): the data, for messages.
        lengths (`dict`): number of rows by split.
        split (`str`): such as `"train[:90%]+test"`, or `"all"`.

    Raises:
        ValueError: there is no such split.
    """
    spec = "+".join(lengths) if split == "all" else split
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"`split`={split!r}: {where!r} has the split(s) {', '.join(lengths)}. {error}") from error
    return [(part.splitname, part.from_, part.to) for part in parts]


def count_common(where: str, lengths: dict[str, int], first: str, second: str) -> int:
    """How many rows two splits have in common; see [`select_ranges`]."""
    ranges = [select_ranges(where, lengths, split) for split in (first, second)]
    return sum(
        max(0, min(stop, other_stop) - max(start, other_start))
        for name, start, stop in ranges[0]
        for other, other_start, other_stop in ranges[1]
        if name == other
    )


def select_split(folder: str, splits: dict[str, Dataset], split: str, streaming: bool) -> Dataset | IterableDataset:
    """`split`, in the manner of `load_dataset`, of data sets at hand; `folder` names them in messages."""
    ranges = select_ranges(folder, {name: len(dataset) for name, dataset in splits.items()}, split)
    rows = [splits[name].select(range(start, stop)) for name, start, stop in ranges]
    dataset = rows[0] if len(rows) == 1 else concatenate_datasets(rows)
    return dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), _SHARDS))) if streaming else dataset
