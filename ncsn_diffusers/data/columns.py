"""Which columns of a data set hold what is trained on, and its labels as class numbers."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, IterableDataset, Value

_MANY_CLASSES = 1000  # above which a class has several rows


def find_columns(
    dataset: Dataset | IterableDataset,
    image_column: str | None = None,
    label_column: str | None = None,
    is_array: bool = False,
) -> tuple[Dataset | IterableDataset, str, str | None]:
    """
    The columns of images and labels, and the data set with these alone, its images not decoded.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with its features known.
        image_column (`str`, *optional*): the only column of images when not given.
        label_column (`str`, *optional*):
            The first column of class labels when not given, or else the one named `label` or `cls`.
        is_array (`bool`, defaults to `False`): `image_column` is one of arrays, see [`find_array_column`].

    Raises:
        ValueError: there is no such column, or there are several of images and none is named.
    """
    features = dataset.features or {}
    feature = features.get(image_column)
    if not is_array:
        image_column, feature = _find_image_column(features, image_column)
    if label_column is None:
        label_column = next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
        label_column = label_column or next((name for name in ("label", "cls") if name in features), None)
    elif label_column not in features:
        raise ValueError(f"`label_column`={label_column!r} is not among the data set's columns, {list(features)}.")
    dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    if not is_array and not _holds_files(feature):
        dataset = dataset.cast_column(image_column, Image(decode=False))
    return dataset, image_column, label_column


def check_label_column(dataset: Dataset | IterableDataset, label_column: str | None) -> None:
    """
    What the features alone say against the labels, before anything is done with them.

    Raises:
        ValueError: several columns hold class labels and none is named, or there are far more classes than rows.
    """
    features = dataset.features or {}
    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if label_column is None and len(found) > 1:
        raise ValueError(
            f"The data set has {len(found)} columns of class labels: `label_column` names one of {', '.join(found)}."
        )
    name = label_column or next(iter(found), None)
    if name in found and isinstance(dataset, Dataset) and features[name].num_classes > _MANY_CLASSES:
        _check_number(name, features[name].num_classes, len(dataset))


def _find_image_column(features: dict, image_column: str | None) -> tuple[str, Any]:
    """Its name, and its feature."""
    if image_column is None:
        found = [name for name, feature in features.items() if isinstance(feature, Image)]
        found = found or [name for name, feature in features.items() if _holds_files(feature)]
        if len(found) > 1:
            hint = ""
            if "__key__" in features and any("." in name for name in found):
                hint = (
                    " In a WebDataset a column's name is what follows the first dot of the files' names, so img.0.png "
                    "and img.1.png are two images of one sample: rename the files if they are samples of their own."
                )
            raise ValueError(
                f"The data set has {len(found)} columns of images: `image_column` names one of {', '.join(found)}."
                + hint
            )
        image_column = found[0] if found else None
    types = {name: _type_name(feature) for name, feature in features.items()}
    accepted = "images, encoded files (binary), or a struct of `bytes` and `path`"
    if image_column is None:
        raise ValueError(f"The data set needs a column of {accepted}; it has {types or 'no columns'}.")
    if image_column not in features:
        raise ValueError(f"`image_column`={image_column!r} is not among the data set's columns, {list(features)}.")
    feature = features[image_column]
    if not (_is_image(feature) or _type_name(feature) in ("string", "large_string")):
        raise ValueError(
            f"`image_column`={image_column!r} holds {types[image_column]}; it must hold {accepted}, or paths (string)."
        )
    return image_column, feature


def find_array_column(dataset: Dataset | IterableDataset, array_column: str | None = None) -> str | None:
    """
    The column of arrays: Array2D to Array5D, or lists of numbers.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with its features known.
        array_column (`str`, *optional*): its name; by default the only one, if the data set has no column of images.

    Returns:
        `str`, or `None` if no column is named and there is one of images, or none of arrays.

    Raises:
        ValueError: there is no such column, or it holds something else, or there are several to choose from.
    """
    types = {name: _type_name(feature) for name, feature in (dataset.features or {}).items()}
    arrays = [name for name, kind in types.items() if _is_array(kind)]
    if array_column is not None:
        if array_column not in types:
            raise ValueError(f"`array_column`={array_column!r} is not among the data set's columns, {list(types)}.")
        if array_column not in arrays:
            raise ValueError(
                f"`array_column`={array_column!r} holds {types[array_column]}; it must hold arrays (Array2D to "
                "Array5D) or lists of numbers."
            )
        return array_column
    if not arrays or any(_is_image(feature) for feature in dataset.features.values()):
        return None
    if len(arrays) > 1:
        raise ValueError(
            f"The data set has several columns of arrays; `array_column` names one of {', '.join(arrays)}."
        )
    return arrays[0]


def _is_array(type_name: str) -> bool:
    return re.fullmatch(r"Array[2-5]D|(lists of )+(float|double|u?int)\d*", type_name) is not None


def _is_image(feature) -> bool:
    return isinstance(feature, Image) or _holds_files(feature)


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
    dataset: Dataset | IterableDataset,
    label_column: str | None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> tuple[Dataset | IterableDataset, int]:
    """
    Labels as class numbers from 0 up, and the number of classes. Names become numbers in alphabetical order, or in that
    of `class_names`; missing labels stay missing, see [`ImageReader`].

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with its features known.
        label_column (`str`, *optional*): see [`find_columns`].
        class_names (`Sequence[str]`, *optional*):
            The names by number in another split, whose labels these are to agree with: see [`find_class_names`].
        num_classes (`int`, *optional*): how many classes that split has, of which this one may lack some.

    Raises:
        ValueError: there are no labels, or they are not names or whole numbers from 0, or a name is not among
            `class_names`, or a streamed data set does not say how many classes it has, or they look like numbers of
            the rows: there are more classes than rows, or over a thousand with fewer than two rows each, or gaps
            between the numbers.
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
    if "string" in kind and num_classes is None:
        _check_number(label_column, len(set(dataset.unique(label_column)) - {None}), len(dataset))
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
        labels = [label for label in dataset.unique(label_column) if not is_missing(label)]
        if not labels:
            raise ValueError(f"`label_column`={label_column!r} has no label in any row.")
    wrong = next((label for label in labels if label < 0 or label != math.floor(label)), None)
    if wrong is not None:
        raise ValueError(
            f"`label_column`={label_column!r} holds {wrong}; classes are numbered from 0, and a missing label is empty."
        )
    if isinstance(feature, ClassLabel):
        return dataset, feature.num_classes
    number = int(max(labels)) + 1
    if num_classes is None:
        _check_number(label_column, number, len(dataset))
        if number > len(labels):
            missing = sorted({*range(number)} - {int(label) for label in labels})
            raise ValueError(
                f"`label_column`={label_column!r} holds whole numbers up to {number - 1}, of which {len(missing):,} "
                f"occur in no row, the first {missing[0]}: classes are numbered from 0 without gaps. A ClassLabel "
                "column may have some."
            )
    return dataset, max(number, num_classes or 0)


def _check_number(label_column: str, number: int, num_rows: int) -> None:
    """A label must say something about more than its own row."""
    if number > num_rows or (number > _MANY_CLASSES and number > num_rows / 2):
        raise ValueError(
            f"`label_column`={label_column!r} would make {number:,} classes of {num_rows:,} rows, as numbers or names "
            "of the rows themselves do: name a column of classes."
        )


def find_class_names(dataset: Dataset | IterableDataset, label_column: str | None) -> list[str] | None:
    """The names of the classes by number, of what [`encode_labels`] returns; `None` if they are numbers alone."""
    feature = dataset.features.get(label_column)
    return feature.names if isinstance(feature, ClassLabel) else None


def is_missing(label) -> bool:
    return label is None or label != label  # a table of floats has nan instead


def read_labels(dataset: Dataset, label_column: str, num_classes: int) -> np.ndarray:
    """
    The labels of every row, int64 of shape `(num_rows,)`; one that is missing becomes `num_classes`.

    Raises:
        ValueError: a label is not among the classes.
    """
    labels = [num_classes if is_missing(label) else int(label) for label in dataset[label_column]]
    wrong = next((row for row, label in enumerate(labels) if not 0 <= label <= num_classes), None)
    if wrong is not None:
        raise ValueError(
            f"row {wrong} has {labels[wrong]} in `label_column`={label_column!r}; the classes are numbered from 0 to "
            f"{num_classes - 1}, and a missing label is empty."
        )
    return np.array(labels, dtype=np.int64)
