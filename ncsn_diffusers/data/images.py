"""
Images as batches of uint8 tensors. Three kinds of sources share one interface with arrays (arrays.py), `units`,
`shape`, `sample`, `batches` and `to_network`:

* [`CachedImages`]: decoded once and kept on the device, if they fit;
* [`LoadedImages`]: decoded each time by the workers of a `DataLoader`;
* [`StreamedImages`]: read in the order in which a streamed data set delivers them, never all in memory.

A stream's position is saved with the checkpoint; the others need none (batches.py).
"""

import hashlib
import inspect
import io
import itertools
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from datasets import ClassLabel, Dataset, IterableDataset, Value
from datasets import __version__ as datasets_version
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image as PILImage
from PIL import ImageFile, ImageOps
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..checked_files import CheckedFiles
from ..image_files import is_deep
from ..images import check_pixels, exceeds_pixels, find_white, read_image, to_model_range
from ..units import Units
from .batches import BatchOrder, spread
from .columns import find_columns, is_missing
from .sources import file_paths, say

CORRUPT_IMAGES = ("error", "skip")

_SHUFFLE_BUFFER = 10_000  # rows of a stream that are held to be shuffled
_CHUNK = 64  # rows that are decoded together


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
        random_crop (`bool`, defaults to `False`): crop at a random place instead of the center.
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
            image = self._open(row)
            white = find_white(image) if image.mode in ("F", "I") else None
            mode, image = image.mode, read_image(image, self.channels)
            if self.resolution is not None:
                image = self._resize_and_crop(image, place)
            array = np.asarray(image)
        except Exception as error:  # PIL has no common class for what a corrupt file may raise
            raise UnreadableImageError(f"{self.name(row, place)}: {type(error).__name__}: {error}") from error
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return array, self._label(row, place), None if white is None else (mode, white)

    def read_numbers(self, row: dict, place: tuple[int, int]) -> np.ndarray:
        """
        The numbers of a gray image of more than 8 bits as they are, not scaled to 8: float64 `(1, height, width)`.

        Raises:
            UnreadableImageError: the image is corrupt, or has 8 bits a channel.
        """
        try:
            image = self._open(row)
            if not is_deep(image):
                raise ValueError(
                    f"an image of mode {image.mode}: `value_range` is for gray images of more than 8 bits, whose "
                    "numbers Pillow reads"
                )
            image = ImageOps.exif_transpose(image)
            if self.resolution is not None:
                image = PILImage.fromarray(np.asarray(image).astype(np.float32))
                image = self._resize_and_crop(image, place)
            return np.asarray(image).astype(np.float64)[None]
        except Exception as error:
            raise UnreadableImageError(f"{self.name(row, place)}: {type(error).__name__}: {error}") from error

    def find_size(self, row: dict) -> tuple[int, int] | None:
        """The image's width and height, by its header; None if it cannot be read."""
        try:
            return self._open(row).size
        except Exception:  # PIL has no common class for what a corrupt file may raise
            return None

    def name(self, row: dict, place: tuple[int, int]) -> str:
        """The row's path and number, for messages."""
        path = self._file(row)["path"]
        return f"{path} (row {place[1]})" if path else f"row {place[1]}"

    def _open(self, row: dict) -> PILImage.Image:
        """The image, not yet decoded, and of no more pixels than the limit."""
        path, content = (self._file(row)[name] for name in ("path", "bytes"))
        if content is None and not path:
            raise ValueError("the row holds no image")
        if content is None and not is_local_path(path):
            with xopen(path, "rb") as file:
                content = file.read()
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        image = PILImage.open(path if content is None else io.BytesIO(content))
        if self.resolution is not None and exceeds_pixels(image):  # a JPEG file can be decoded at half its size
            image.draft(None, (2 * self.resolution, 2 * self.resolution))
        check_pixels(image)
        return image

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
        if is_missing(label):
            return self.num_classes is not None
        return self.num_classes is None or 0 <= label < self.num_classes

    def _label(self, row: dict, place: tuple[int, int]) -> int:
        if self.label_column is None:
            return 0
        label = row[self.label_column]
        if self._takes(label):
            return self.num_classes if is_missing(label) else int(label)
        if is_missing(label):
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


class _Images:
    """What the kinds of sources have in common."""

    units = Units()

    @staticmethod
    def to_network(batch: torch.Tensor) -> torch.Tensor:
        """A batch in the network's units: uint8 becomes float32 in [-1, 1]."""
        return to_model_range(batch)


class CachedImages(_Images):
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
        return self.images[spread(len(self), num_images)]

    def take(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in their order, and their labels, as in a batch."""
        return self.images[rows], self.labels[rows]

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """This process's batches, for ever: uint8 `(batch_size, …)` and int64 `(batch_size,)`, on the device."""
        for _, rows in BatchOrder(len(self), batch_size, seed).batches(first_batch, self.images.device):
            yield self.images[rows], self.labels[rows]


class LoadedImages(_Images):
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
        rows = spread(len(self), num_images).tolist()
        return torch.from_numpy(np.stack([self.reader(self.dataset[row], (0, row))[0] for row in rows]))

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """As [`CachedImages.batches`]."""
        orders = BatchOrder(len(self), batch_size, seed).batches(first_batch)
        loader = DataLoader(
            _Rows(self.dataset, self.reader),
            batch_sampler=([(epoch, row) for row in rows.tolist()] for epoch, rows in orders),
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class StreamedImages(_Images):
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
        rows = tqdm(self.dataset, desc="Reading", unit="image", total=num_images, leave=False)
        arrays = list(itertools.islice(_readable(rows, self.reader, self.rows.corrupt_images), num_images))
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
    remember(checked, [f[3] for f in found])
    if num_known := sum(f[4] for f in found):
        say(f"{num_known:,} of {len(dataset):,} images passed the check at an earlier start and are unchanged.")
    if errors:
        message = "\n".join(list(errors.values())[:20] + ["…"] * (len(errors) > 20))
        if corrupt_images == "error":
            raise ValueError(
                f"{len(errors)} of {len(dataset)} images cannot be read. Repair or remove them, or leave them out with "
                f"`corrupt_images`='skip':\n{message}"
            )
        say(f"Left out {len(errors)} of {len(dataset)} images, which cannot be read:\n{message}")
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
    paths = file_paths(dataset, reader.image_column)
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


def remember(checked: CheckedFiles, records: list[pa.Table]) -> None:
    """Keep what is new for the next start; one that cannot be kept costs a warning."""
    if any(map(len, records)) and PartialState().is_local_main_process:
        try:
            checked.save(records)
        except OSError as error:
            tqdm.write(
                f"All files will be checked again at the next start, because the cache cannot be written: {error}"
            )


def _channels_of_stream(dataset: IterableDataset, reader: ImageReader, corrupt_images: str) -> int:
    """3 where the first image that can be read says so: as in a data set at hand, one in color decides for all."""
    first = next(_readable(dataset, reader, corrupt_images), None)
    if first is None:
        raise ValueError("The data set has no readable image.")
    if len(first) == 1:
        raise ValueError(
            "`streaming` needs `channels`, 1 or 3: the first image is gray, and whether all are is not known "
            "beforehand."
        )
    return len(first)


def _readable(rows: Iterable[dict], reader: ImageReader, corrupt_images: str) -> Iterator[np.ndarray]:
    """The arrays of those images of a stream that can be read."""
    for i, row in enumerate(rows):
        try:
            array = reader(row, (0, i))[0]
        except UnreadableImageError:
            if corrupt_images == "error":
                raise
            continue
        yield array


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order, however many each has."""
    if PartialState().num_processes == 1:
        return rows
    lengths = gather_object([len(rows)])
    padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    parts = gather(padded).split(max(lengths))
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _common_shape(shapes: set[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Channels, height and width of images that may be gray or colored, but must be of one size."""
    if not shapes:
        raise ValueError("The data set has no image.")
    sizes = {shape[1:] for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"`resolution` must be given: the images have {len(sizes)} sizes (height, width), among them "
            f"{sorted(sizes)[:3]}."
        )
    return max(shapes)
