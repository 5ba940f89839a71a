"""Which columns of a data set hold what is trained on, and its labels as class numbers."""

import math
import re
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, Image, IterableDataset, Value


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
        labels = [label for label in dataset.unique(label_column) if not is_missing(label)]
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


def is_missing(label) -> bool:
    return label is None or label != label  # a table of floats has nan instead
