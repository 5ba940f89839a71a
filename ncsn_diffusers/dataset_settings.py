"""The settings that say which images to use, shared by training and evaluation."""

from dataclasses import dataclass


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
    """1 (gray), 3 (colour) or 4 (colour and transparency); by default 1 if all images are gray, otherwise 3."""
