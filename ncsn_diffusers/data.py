"""
Pictures for training: a data set of the Hub, a local folder or the embedded digits, as batches of uint8 tensors.

Three sources share one interface, `shape`, `sample` and `batches`:

* [`CachedImages`]: decoded once and kept on the device, where they fit;
* [`LoadedImages`]: decoded anew each time by the workers of a `DataLoader`;
* [`StreamedImages`]: read in the order in which a streamed data set delivers them, never all at hand.

The order of the first two is a function of the seed and the step alone, the same for any number of processes: nothing
has to be saved for a run to go on exactly where it stopped. A stream's position is saved with the checkpoint.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from datasets import ClassLabel, Dataset, Image, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

EMBEDDED_DIGITS = Path(__file__).parent / "assets" / "mnist_train_10k.parquet"
CORRUPT_IMAGES = ("error", "skip")

_GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_SHUFFLE_BUFFER = 10_000  # rows of a stream that are held to be shuffled
_CHUNK = 64  # rows that are decoded together


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
        train_data_dir (`str`, *optional*): a folder of pictures, of parquet files or of WebDataset archives.
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
    if dataset_name is not None:
        return load_dataset(dataset_name, dataset_config_name, split=split, streaming=streaming)
    if train_data_dir is not None:
        if not Path(train_data_dir).is_dir():
            raise FileNotFoundError(f"`train_data_dir`={train_data_dir!r} is not a folder.")
        return load_dataset(train_data_dir, split=split, streaming=streaming)
    return load_dataset("parquet", data_files=str(EMBEDDED_DIGITS), split=split, streaming=streaming)


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; the message names it and says why."""


@dataclass(frozen=True)
class ImageReader:
    """
    Makes a uint8 array of shape `(channels, height, width)`, and a label, of a data set's row.

    16-bit pictures keep their upper eight bits, palettes become colours, and what is transparent is laid on white,
    unless `channels` is 4.

    Args:
        image_column (`str`): the column of pictures.
        label_column (`str`, *optional*): the column of labels.
        resolution (`int`, *optional*):
            Side of the square that each picture is resized (its shorter side) and cropped to; its own size otherwise.
        channels (`int`, *optional*): 1, 3 or 4; each picture's own, 1 or 3, when not given.
        random_crop (`bool`, defaults to `False`): crop at a random place instead of the centre.
        seed (`int`, defaults to 0): of the random places.
    """

    image_column: str
    label_column: str | None = None
    resolution: int | None = None
    channels: int | None = None
    random_crop: bool = False
    seed: int = 0

    def __call__(self, row: dict, place: tuple[int, int]) -> tuple[np.ndarray, int]:
        """
        Args:
            row (`dict`): with the picture not yet decoded: `{"bytes": …, "path": …}`.
            place (`tuple` of two ints): epoch and number of the row, on which a random crop depends.

        Raises:
            UnreadableImageError: the picture is corrupt, or the row holds none.
        """
        value = row[self.image_column]
        try:
            image = Image().decode_example(value)
            array = self._to_array(image, place)
        except Exception as error:  # PIL has no common class for what a corrupt file may raise
            path = value.get("path") if isinstance(value, dict) else None
            name = f"{path} (row {place[1]})" if path else f"row {place[1]}"
            raise UnreadableImageError(f"{name}: {type(error).__name__}: {error}") from error
        return array, int(row[self.label_column]) if self.label_column else 0

    def _to_array(self, image: PILImage.Image, place: tuple[int, int]) -> np.ndarray:
        if image.mode.startswith("I"):  # 16 bits
            image = PILImage.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        channels = self.channels or (1 if image.mode in _GRAY_MODES else 3)
        if channels != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
        image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
        if self.resolution is not None:
            image = self._resize_and_crop(image, place)
        array = np.asarray(image)
        return array[None] if channels == 1 else array.transpose(2, 0, 1)

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
    The columns of pictures and labels, and the data set with these alone, its pictures not decoded.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): with its features known.
        image_column (`str`, *optional*): the first column of pictures when not given.
        label_column (`str`, *optional*):
            The first column of class labels when not given, or else the one named `label` or `cls`.

    Raises:
        ValueError: there is no such column.
    """
    features = dataset.features or {}
    if image_column is None:
        image_column = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
    if image_column is None:
        raise ValueError(f"The data set needs a column of pictures; it has the columns {list(features)}.")
    if image_column not in features:
        raise ValueError(f"`image_column`={image_column!r} is not among the data set's columns, {list(features)}.")
    if label_column is None:
        label_column = next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
        label_column = label_column or next((name for name in ("label", "cls") if name in features), None)
    elif label_column not in features:
        raise ValueError(f"`label_column`={label_column!r} is not among the data set's columns, {list(features)}.")
    dataset = dataset.select_columns([image_column] + ([label_column] if label_column else []))
    return dataset.cast_column(image_column, Image(decode=False)), image_column, label_column


def encode_labels(
    dataset: Dataset | IterableDataset, label_column: str | None
) -> tuple[Dataset | IterableDataset, int]:
    """
    Labels as class numbers from 0 up, and the number of classes. Names become numbers in alphabetical order.

    Raises:
        ValueError: there are no labels, or some below 0, or a streamed data set does not say how many classes it has.
    """
    if label_column is None:
        raise ValueError(
            f"`class_conditional` needs labels: none of the columns {list(dataset.features)} holds classes; "
            "`label_column` names one that does."
        )
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel) and isinstance(dataset, IterableDataset):
        raise ValueError(
            f"`label_column`={label_column!r} of the streamed data set is not a ClassLabel: its classes are not known "
            "beforehand. Without `streaming` they are counted."
        )
    if not isinstance(feature, ClassLabel) and feature.dtype == "string":
        dataset = dataset.class_encode_column(label_column)
        feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        num_classes, lowest = feature.num_classes, 0
        if isinstance(dataset, Dataset):
            lowest = min(dataset.unique(label_column), default=0)
    else:
        labels = dataset.unique(label_column)
        num_classes, lowest = max(labels) + 1, min(labels)
    if lowest < 0:
        raise ValueError(f"`label_column`={label_column!r} holds {lowest}; classes are numbered from 0.")
    return dataset, num_classes


def decode_images(dataset: Dataset, resolution: int | None = None, channels: int | None = None) -> torch.Tensor:
    """
    Every picture of a data set, decoded once: [`open_images`] where nothing but the pictures is of interest.

    Args:
        dataset (`datasets.Dataset`): with a column of pictures.
        resolution (`int`, *optional*): see [`ImageReader`].
        channels (`int`, *optional*): 1, 3 or 4; 1 if all pictures are gray and 3 otherwise when not given.

    Returns:
        `torch.Tensor` of shape `(num_images, channels, height, width)`, uint8.

    Raises:
        ValueError: there are no pictures, or one is corrupt, or they have several sizes and no `resolution` is given.
    """
    dataset, image_column, _ = find_columns(dataset)
    reader = ImageReader(image_column, resolution=resolution, channels=channels)
    return open_images(dataset, reader, torch.device("cpu"), max_cache_gb=math.inf).images


def to_model_range(images: torch.Tensor, data_min: float = -1.0) -> torch.Tensor:
    """Pictures in [0, 255] as float32 in [data_min, 1], the network's units of the data; any shape."""
    return images.float() / (255 / (1 - data_min)) + data_min


@dataclass(frozen=True)
class BatchOrder:
    """
    Which pictures make up a process's batches: each epoch has an order of its own, in which the processes take turns.

    Args:
        num_images (`int`): at least `batch_size * num_processes`; what remains of an epoch is left out.
        batch_size (`int`): pictures a batch.
        seed (`int`): of the orders.
    """

    num_images: int
    batch_size: int
    seed: int

    def order(self, epoch: int) -> torch.Tensor:
        """The epoch's permutation of the pictures, of shape `(num_images,)`, int64."""
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
    Pictures decoded once and kept on the device.

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
        """At most `num_images` pictures, spread over the data set: uint8 of shape `(n, channels, height, width)`."""
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
    Pictures that are decoded each time they are used, by the workers of a `DataLoader`.

    Args:
        dataset (`datasets.Dataset`): its pictures not decoded, none of them corrupt.
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
    Pictures read as a streamed data set delivers them, shuffled among the 10,000 that lie ahead.

    Where the data set has a multiple of `num_processes` files, each process reads its own; otherwise each reads all and
    keeps its share.

    Args:
        dataset (`datasets.IterableDataset`): its pictures not decoded.
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
        """The first `num_images` pictures: uint8 of shape `(n, channels, height, width)`."""
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
            raise ValueError("The data set has no readable picture.")
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
                            yield item, (epoch, row)
                if not readable:
                    raise ValueError("The data set has no readable picture for this process.")
                epoch, row = epoch + 1, 0

    def _read(self, row, place):
        try:
            return self.reader(row, place)
        except UnreadableImageError as error:
            if self.corrupt_images == "error":
                raise
            tqdm.write(f"Left out a picture that cannot be read: {error}")
            return None


class _Rows(torch.utils.data.Dataset):
    """The pictures of a data set by (epoch, row)."""

    def __init__(self, dataset: Dataset, reader: ImageReader, keep_errors: bool = False):
        self.dataset, self.reader, self.keep_errors = dataset, reader, keep_errors

    def __getitem__(self, place: tuple[int, int]):
        try:
            return self.reader(self.dataset[place[1]], place)
        except UnreadableImageError as error:
            if self.keep_errors:
                return error, 0
            raise


def _collate(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    arrays, labels = zip(*items, strict=True)
    return torch.from_numpy(np.stack(arrays)), torch.tensor(labels)


def _collate_stream(items):
    pictures, positions = zip(*items, strict=True)
    return *_collate(pictures), positions[-1]


def open_images(
    dataset: Dataset | IterableDataset,
    reader: ImageReader,
    device: torch.device,
    corrupt_images: str = "error",
    max_cache_gb: float = 4.0,
    num_workers: int = 0,
) -> CachedImages | LoadedImages | StreamedImages:
    """
    Make a data set ready for training: every picture of one that is not streamed is decoded once, so that a corrupt one
    is found before the training begins. The processes share the work; each gets all pictures.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): its pictures not decoded: see [`find_columns`].
        reader ([`ImageReader`]): for its rows.
        device (`torch.device`): where the batches go.
        corrupt_images (`str`, defaults to `"error"`): or `"skip"`, to report pictures that cannot be read and go on.
        max_cache_gb (`float`, defaults to 4.0): the largest cache, in units of 10⁹ bytes; see [`CachedImages`].
        num_workers (`int`, defaults to 0): processes that decode.

    Raises:
        ValueError: pictures are corrupt, or there are none, or several sizes and no `resolution`.
    """
    if isinstance(dataset, IterableDataset):
        if reader.resolution is None:
            raise ValueError("`streaming` needs `resolution`: the sizes of the pictures are not known beforehand.")
        if reader.channels is None:
            first = next(iter(dataset), None)
            channels = 3 if first is None else len(reader(first, (0, 0))[0])
            reader = replace(reader, channels=channels)
        return StreamedImages(dataset, reader, num_workers, device, reader.seed, corrupt_images)

    process = PartialState()
    rows = np.array_split(np.arange(len(dataset)), process.num_processes)[process.process_index]
    loader = DataLoader(
        _Rows(dataset, reader, keep_errors=True),
        batch_sampler=[[(0, int(row)) for row in part] for part in np.split(rows, range(_CHUNK, len(rows), _CHUNK))],
        num_workers=num_workers,
        collate_fn=list,
    )
    progress = tqdm(total=len(rows), desc="Decoding", unit="image", leave=False, disable=not process.is_main_process)
    keep, arrays, labels, shapes, errors, num_bytes = not reader.random_crop, [], [], set(), {}, 0
    for row, (array, label) in zip(rows.tolist(), itertools.chain.from_iterable(loader), strict=True):
        progress.update()
        if isinstance(array, UnreadableImageError):
            errors[row] = str(array)
            continue
        shapes.add(array.shape)
        num_bytes += array.nbytes
        keep = keep and num_bytes * process.num_processes <= max_cache_gb * 1e9
        if keep:
            arrays.append(array)
            labels.append(label)
        else:
            arrays.clear()
    progress.close()

    # What one process has found out all must know, so that all go on, or end, together.
    found = gather_object([(shapes, errors, keep)])
    shapes, errors = set().union(*(f[0] for f in found)), {k: v for f in found for k, v in f[1].items()}
    if errors:
        message = "\n".join(list(errors.values())[:20] + ["…"] * (len(errors) > 20))
        if corrupt_images == "error":
            raise ValueError(
                f"{len(errors)} of {len(dataset)} pictures cannot be read. Mend or remove them, or leave them out with "
                f"`corrupt_images`='skip':\n{message}"
            )
        if process.is_main_process:
            tqdm.write(f"Left out {len(errors)} of {len(dataset)} pictures, which cannot be read:\n{message}")
    shape = _common_shape(shapes)
    if all(f[2] for f in found):
        images = np.stack([np.broadcast_to(array, shape) for array in arrays]) if arrays else np.empty((0, *shape))
        images = torch.from_numpy(images.astype(np.uint8, copy=False)).to(device)
        labels = torch.tensor(labels, dtype=torch.int64, device=device)
        return CachedImages(_gather_rows(images), _gather_rows(labels))
    dataset = dataset.select([row for row in range(len(dataset)) if row not in errors]) if errors else dataset
    return LoadedImages(dataset, replace(reader, channels=shape[0]), shape, num_workers, device)


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order, however many each has."""
    if PartialState().num_processes == 1:
        return rows
    lengths = gather_object([len(rows)])
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    parts = gather(padded).split(max(lengths))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _common_shape(shapes: set[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Channels, height and width of pictures that may be gray or coloured, but must be of one size."""
    if not shapes:
        raise ValueError("The data set has no picture.")
    sizes = {shape[1:] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"`resolution` must be given: the pictures have {len(sizes)} sizes (height, width), among them "
            f"{sorted(sizes)[:3]}."
        )
    return max(shapes)


def _spread(num_rows: int, num: int) -> torch.Tensor:
    """At most `num` of so many rows, evenly spread: data sets are often sorted by class."""
    return torch.linspace(0, num_rows - 1, min(num, num_rows)).round().long()
