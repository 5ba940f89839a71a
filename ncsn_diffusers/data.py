"""Pictures for training: a data set of the Hub, a local folder or the embedded digits, as one uint8 tensor."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from tqdm.auto import tqdm

EMBEDDED_DIGITS = Path(__file__).parent / "assets" / "mnist_train_10k.parquet"


def load_training_data(
    dataset_name: str | None = None, dataset_config_name: str | None = None, train_data_dir: str | None = None
) -> Dataset:
    """
    The train split of a data set.

    Args:
        dataset_name (`str`, *optional*): the name of a data set on the Hub, or a folder that `load_dataset` reads.
        dataset_config_name (`str`, *optional*): the configuration of that data set.
        train_data_dir (`str`, *optional*): a folder of pictures.

    Returns:
        `datasets.Dataset`: the first 10,000 training digits of MNIST when nothing is named.

    Raises:
        ValueError: both a name and a folder are given, or a configuration without a name.
        FileNotFoundError: there is no such folder.
    """
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError(
            f"Give `dataset_name` or `train_data_dir`, not both ({dataset_name!r} and {train_data_dir!r})."
        )
    if dataset_config_name is not None and dataset_name is None:
        raise ValueError(f"`dataset_config_name`={dataset_config_name!r} needs `dataset_name`.")
    if dataset_name is not None:
        return load_dataset(dataset_name, dataset_config_name, split="train")
    if train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise FileNotFoundError(f"`train_data_dir`={train_data_dir!r} is not a folder.")
        return load_dataset("imagefolder", data_dir=train_data_dir, split="train")
    return load_dataset("parquet", data_files=str(EMBEDDED_DIGITS), split="train")


def decode_images(dataset: Dataset, resolution: int | None = None) -> torch.Tensor:
    """
    Decode every picture once. Grayscale data stay grayscale; everything else becomes RGB.

    Args:
        dataset (`datasets.Dataset`): with one column of pictures.
        resolution (`int`, *optional*):
            Side of the square that each picture is resized (its shorter side) and centre-cropped to; the pictures' own
            size when not given.

    Returns:
        `torch.Tensor` of shape `(num_images, channels, height, width)`, uint8.

    Raises:
        ValueError: the data set is empty, has no column of pictures, or has several sizes and no `resolution` is given.
    """
    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if not columns or not len(dataset):
        raise ValueError(
            f"The data set needs a column of pictures and at least one row; it has the columns {dataset.column_names} "
            f"and {len(dataset)} rows."
        )
    dataset = dataset.select_columns(columns[:1])
    images: list[np.ndarray] = []
    for row in tqdm(dataset, desc="Decoding", unit="image", leave=False):
        image = row[columns[0]]
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        if resolution is not None:
            image = _resize(image, resolution)
        images.append(np.asarray(image))

    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"`resolution` must be given: the pictures have {len(sizes)} sizes (height, width), among them "
            f"{sorted(sizes)[:3]}."
        )
    return torch.from_numpy(np.stack(_same_channels(images)).transpose(0, 3, 1, 2).copy())


def _resize(image: PILImage.Image, resolution: int) -> PILImage.Image:
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), PILImage.Resampling.BILINEAR)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _same_channels(images: list[np.ndarray]) -> list[np.ndarray]:
    if all(image.ndim == 2 for image in images):
        return [image[..., None] for image in images]
    return [np.broadcast_to(np.atleast_3d(image), (*image.shape[:2], 3)) for image in images]


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures in [0, 255] as float32 in [-1, 1], the network's units of the data; any shape."""
    return images.float() / 127.5 - 1
