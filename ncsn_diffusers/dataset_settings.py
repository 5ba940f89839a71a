"""The settings that say which data to use, shared by training and evaluation."""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal


@dataclass
class DatasetSettings:
    """Data set"""

    dataset_name: str | None = None
    """Name of a data set on the Hub, or a folder that `datasets.load_dataset` reads."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    train_data_dir: str | None = None
    """Folder of image files, parquet files or WebDataset archives."""
    image_column: str | None = None
    """Column of images; by default the first one."""
    label_column: str | None = None
    """Column of labels; by default the first column of class labels."""
    resolution: int | None = None
    """Side of the square that images are resized and cropped to; by default their own size."""
    channels: int | None = None
    """1 (gray), 3 (color) or 4 (color and transparency); by default 1 if all images are gray, otherwise 3."""


@dataclass
class ArrayFiles:
    """Arrays"""

    train_arrays: str | None = None
    """File of arrays (.npy or .npz) or folder of such files, of shape (samples, channels, length), (samples, channels,
    height, width) or (samples, channels, depth, height, width)."""
    validation_arrays: str | None = None
    """The same for the validation loss, instead of `validation_split`."""
    array_key: str | None = None
    """Name of the array in .npz files; by default the only one."""
    array_per_file: bool = False
    """Each file holds one array, without the axis of samples."""
    array_column: str | None = None
    """Column of arrays of a data set: Array2D to Array5D, or lists of numbers; by default the only one, if there is no
    column of images."""
    channel_axis: int | Literal["none"] | None = None
    """Number of the axis of channels, where that of samples is 0; none: the arrays have no channels. By default 1."""

    def check_array_files(self) -> None:
        """
        Raises:
            ValueError: a setting is out of its range, or contradicts another one.
        """
        if isinstance(self.channel_axis, str) and self.channel_axis != "none":
            raise ValueError(f"`channel_axis` must be the number of an axis or none, not {self.channel_axis!r}.")
        if self.train_arrays is None:
            for name in ("validation_arrays", "array_key", "array_per_file"):
                if getattr(self, name):
                    raise ValueError(f"`{name}`={getattr(self, name)!r} needs `train_arrays`.")
            return
        for name in ("dataset_name", "train_data_dir", "array_column"):
            if getattr(self, name, None) is not None:
                raise ValueError(
                    f"Give `train_arrays` or `{name}`, not both ({self.train_arrays!r} and {getattr(self, name)!r})."
                )
        if self.validation_arrays is not None and getattr(self, "validation_split", None) is not None:
            raise ValueError(
                f"Give `validation_arrays` or `validation_split`, not both ({self.validation_arrays!r} and "
                f"{self.validation_split!r})."
            )
        self.refuse_image_settings("`train_arrays`")

    def refuse_image_settings(self, where: str) -> None:
        """
        Raises:
            ValueError: a setting that is for images alone is given with data that are arrays, named `where`.
        """
        reasons = {
            "random_flip": "a mirror image of a field need not be one of its kind",
            "random_crop": "a network for arrays is trained at their own size",
            "resolution": "arrays are used at their own size",
            "channels": "arrays have the channels that they have",
            "streaming": "arrays are read from the disk as they are used",
            "image_column": "`array_column` names a column of arrays",
            "corrupt_images": "values that are not finite are refused",
        }
        defaults = {field.name: field.default for field in fields(self)}
        for name, reason in reasons.items():
            value: Any = getattr(self, name, None)
            if name in defaults and value != defaults[name]:
                raise ValueError(f"`{name}`={value!r} is for images, and {where} holds arrays: {reason}.")
        if getattr(self, "class_conditional", False) and self.train_arrays is not None:
            raise ValueError(
                f"`class_conditional` needs labels, which {where} has none of: a data set with a column of arrays and "
                "one of labels has both."
            )


@dataclass
class ArraySettings(ArrayFiles):
    """Units of arrays"""

    value_range: tuple[float, float] | None = None
    """Least and largest value that the data can have, which become -1 and 1 unless `data_mean` or `data_std` is given;
    with it, images of more than 8 bits keep their values."""
    data_mean: tuple[float, ...] | None = None
    """Mean that is subtracted, one for all channels or one for each; by default that of the data."""
    data_std: tuple[float, ...] | None = None
    """Standard deviation that becomes 0.5, one for all channels or one for each; by default that of the data."""
    data_unit: str | None = None
    """Unit of the data, such as K, for labels and messages."""

    def check_array_settings(self) -> None:
        """
        Raises:
            ValueError: a setting is out of its range, or contradicts another one.
        """
        if self.value_range is not None:
            low, high = self.value_range
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"`value_range` must be two rising numbers, not {low:g} {high:g}.")
        for name in ("data_mean", "data_std"):
            values = getattr(self, name)
            if values is not None and not (
                len(values) and all(math.isfinite(v) and (v > 0 or name == "data_mean") for v in values)
            ):
                wanted = "finite numbers" if name == "data_mean" else "numbers above 0"
                raise ValueError(f"`{name}` must be {wanted}, one for all channels or one for each, not {values}.")
        self.check_array_files()

    def refuse_array_settings(self, where: str) -> None:
        """
        Raises:
            ValueError: a setting that is for arrays alone is given with images of 8 bits, named `where`.
        """
        for name in ("channel_axis", "data_mean", "data_std", "data_unit"):
            if getattr(self, name) is not None:
                hint = "" if name == "channel_axis" else "; with `value_range` images of more than 8 bits are arrays"
                raise ValueError(f"`{name}`={getattr(self, name)!r} is for arrays, and {where} holds images{hint}.")


def without_parents(name: str, is_folder: bool = False) -> str:
    """The last part of a local folder's path, since the rest is the user's own, and a name on the Hub as it is."""
    if is_folder or os.path.isdir(name) or os.path.isabs(name) or name.startswith((".", "~")):
        return Path(os.path.abspath(os.path.expanduser(name))).name
    return name
