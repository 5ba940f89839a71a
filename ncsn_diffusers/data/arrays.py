"""
Arrays as batches in the network's units: signals, maps and volumes of any number of channels.

An array has the shape (samples, channels, length), (samples, channels, height, width) or (samples, channels, depth,
height, width). It is read from .npy files, which stay on the disk, .npz files, a column of a data set, or images of
more than 8 bits. Integers and float64 keep what they have until they are in the network's units: the mean is subtracted
in float64, and only then are the numbers rounded to float32.

One pass over the data finds mean, standard deviation and range of each channel, from which [`choose_units`] makes the
[`Units`], and values that are not finite. What it finds of a file is remembered until the file changes. Then the arrays
are kept on the device ([`CachedArrays`]), if they fit, or are read as they are needed ([`LoadedArrays`]).
"""

import hashlib
import math
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm

from ..checked_files import CheckedFiles
from ..units import Units
from .batches import BatchOrder, spread
from .images import ImageReader, remember
from .sources import find_splits, list_files, say, say_left_out, select_ranges

ChannelAxis = int | Literal["none"] | None

_CHUNK = 2**22  # values that are looked at together, as float64
_BLOCK = 2**16  # values that are converted together: they stay in the processor's cache
_MAX_SAMPLE = 10**9  # bytes of a sample of the data
_AHEAD = 2  # batches that are read while the network trains
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


# Where arrays are


class _Part:
    """
    An array whose first axis counts samples, in one place.

    Args:
        shape (`tuple` of ints): of the whole, `(samples, ...)`.
        dtype (`np.dtype`): of its numbers.
        name (`str`): what messages call it.
        path (`str`, *optional*): the file that alone decides what is in it.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype, name: str, path: str | None = None):
        self.shape, self.dtype, self.name, self.path = tuple(shape), np.dtype(dtype), name, path
        if self.dtype.kind not in "iuf":
            hint = ": real and imaginary part are two channels" if self.dtype.kind == "c" else ""
            raise ValueError(f"{name} holds {dtype}; arrays must hold real numbers{hint}.")

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Rows in rising order."""
        raise NotImplementedError


class _Memory(_Part):
    def __init__(self, array: np.ndarray, name: str, path: str | None = None):
        super().__init__(array.shape, array.dtype, name, path)
        self.array = array

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.array[rows]


class _File(_Part):
    """
    A .npy file, of which rows are read as they are needed.

    They are read, not mapped into memory: the memory stays small whatever the file's size, and scattered rows come
    twice as fast, since the kernel does not handle each page on its own.
    """

    def __init__(self, path: str, is_sample: bool):
        array = _load(path, mmap_mode="r")  # for its header
        super().__init__((1, *array.shape) if is_sample else array.shape, array.dtype, path, os.path.abspath(path))
        self.is_sample, self.offset = is_sample, array.offset
        self.order = "C" if array.flags.c_contiguous else "F"

    def read(self, rows: np.ndarray) -> np.ndarray:
        if self.order == "F":  # a row is scattered over the file
            array = _load(self.path, mmap_mode="r")
            return np.array(array[None] if self.is_sample else array[rows])
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        buffer, size = memoryview(values.reshape(-1).view(np.uint8)), values.nbytes // len(rows)
        with open(self.path, "rb", buffering=0) as file:
            for first, last in _find_runs(rows):
                file.seek(self.offset + int(rows[first]) * size)
                start, stop = first * size, (last + 1) * size
                while start < stop:
                    num = file.readinto(buffer[start:stop])  # Linux reads 2 GB at most
                    if not num:
                        raise ValueError(f"{self.path} has become shorter than it was when the run began.")
                    start += num
        return values


def _find_runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Where in rising numbers those that follow each other without a gap begin and end."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    return list(zip([0, *(breaks + 1).tolist()], [*breaks.tolist(), len(rows) - 1], strict=True))


def _load(path: str, **arguments):
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is no regular file.")
    try:
        return np.load(path, allow_pickle=False, **arguments)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers: {error}") from error


class _Column(_Part):
    """A column of a data set whose rows are arrays, or lists of numbers."""

    def __init__(self, dataset: Dataset, column: str):
        if not len(dataset):
            raise ValueError("The data set has no array.")
        self.dataset, self.column, self.name = dataset.select_columns([column]).with_format("arrow"), column, ""
        first = self._read(np.zeros(1, dtype=np.int64))
        super().__init__((len(dataset), *first.shape[1:]), first.dtype, f"column {column!r}")

    def read(self, rows: np.ndarray) -> np.ndarray:
        values = self._read(rows)
        if values.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{self.name}: row {rows[0]} has the shape {values.shape[1:]}, and row 0 {self.shape[1:]}; all must "
                "have the same."
            )
        return values

    def _read(self, rows: np.ndarray) -> np.ndarray:
        # not as numpy, for which `datasets` rounds to float32
        values = self.dataset[rows.tolist()][self.column].combine_chunks()
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        shape = [len(rows)]
        while pa.types.is_nested(values.type):
            lengths = pc.list_value_length(values).fill_null(-1).to_numpy()
            wrong = lengths != (max(0, lengths[0]) if len(lengths) else 0)
            if wrong.any():
                row = rows[int(np.argmax(wrong)) // math.prod(shape[1:])]
                raise ValueError(
                    f"column {self.column!r}: row {row} is missing, or its lists are of another length than those of "
                    f"row {rows[0]}; all rows must have one shape."
                )
            shape.append(int(lengths[0]) if len(lengths) else 0)
            values = values.flatten()
        if values.null_count:
            row = rows[pc.index(values.is_null(), True).as_py() // math.prod(shape[1:])]
            raise ValueError(
                f"column {self.column!r}: {values.null_count:,} numbers are missing, the first in row {row}."
            )
        return values.to_numpy(zero_copy_only=False).reshape(shape)


class _DeepImages(_Part):
    """Images of more than 8 bits, as the numbers in their files."""

    def __init__(self, dataset: Dataset, reader: ImageReader):
        self.dataset, self.reader = dataset, reader
        if not len(dataset):
            raise ValueError("The data set has no image.")
        array = reader.read_numbers(dataset[0], (0, 0))
        super().__init__((len(dataset), *array.shape), np.float64, f"column {reader.image_column!r}")

    def read(self, rows: np.ndarray) -> np.ndarray:
        arrays = []
        for row in rows.tolist():
            array = self.reader.read_numbers(self.dataset[row], (0, row))
            if array.shape != self.shape[1:]:
                raise ValueError(
                    f"`resolution` must be given: {self.reader.name(self.dataset[row], (0, row))} has "
                    f"{array.shape[1]}×{array.shape[2]} pixels, and the first image {self.shape[2]}×{self.shape[3]}."
                )
            arrays.append(array)
        return np.stack(arrays)


class ArrayRows:
    """
    Arrays of one shape from one place or several, one after another.

    Args:
        parts (`list`): the places.
        indices (`np.ndarray`, *optional*): which of all their rows; by default all.
    """

    def __init__(self, parts: list[_Part], indices: np.ndarray | None = None):
        self.parts = parts
        self.starts = np.cumsum([0] + [part.shape[0] for part in parts])
        self.indices = np.arange(self.starts[-1]) if indices is None else indices
        self.shape = parts[0].shape[1:]
        self.dtype = np.result_type(*{part.dtype for part in parts})
        for part in parts:
            if part.shape[1:] != self.shape:
                raise ValueError(
                    f"{part.name} holds arrays of shape {part.shape[1:]}, and {parts[0].name} of {self.shape}; all "
                    "must have the same. Of files that each hold one array, --array_per_file says so."
                )

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, rows: np.ndarray) -> "ArrayRows":
        """Some of the rows, by number."""
        return ArrayRows(self.parts, self.indices[rows])

    def split(self) -> Iterator[tuple[_Part, np.ndarray]]:
        """Each place with those of its own rows that are among these, in rising order."""
        indices = np.sort(self.indices)
        for part, start, stop in zip(self.parts, self.starts, self.starts[1:], strict=False):
            own = indices[np.searchsorted(indices, start) : np.searchsorted(indices, stop)]
            if len(own):
                yield part, own - start

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            rows (`np.ndarray` of shape `(n,)`): numbers of rows.

        Returns:
            `tuple` of two arrays: the rows, in the order in which they lie in their places, of shape `(n, *shape)`; and
            where in `rows` each of them was asked for, of shape `(n,)`.
        """
        indices = self.indices[rows]
        order = np.argsort(indices, kind="stable")
        indices = indices[order]
        places = np.searchsorted(self.starts, indices, side="right") - 1
        numbers = np.unique(places)
        if len(numbers) == 1:
            return self.parts[numbers[0]].read(indices - self.starts[numbers[0]]), order
        values = [self.parts[number].read(indices[places == number] - self.starts[number]) for number in numbers]
        return np.concatenate(values, dtype=self.dtype), order


def open_array_files(path: str, array_key: str | None = None, array_per_file: bool = False) -> dict[str, ArrayRows]:
    """
    A .npy or .npz file, or a folder of such files, by split.

    A folder divides into splits as one of tables does: by folders or file names such as `train` and `test`. Files of a
    split follow each other in the order of their names. .npy files stay on the disk, .npz files are read into memory.

    Args:
        path (`str`): the file or folder.
        array_key (`str`, *optional*): the array's name in .npz files, which one that holds several needs.
        array_per_file (`bool`, defaults to `False`): each file holds one array, without an axis of samples.

    Raises:
        FileNotFoundError: there is no such file or folder, or no array in it.
        ValueError: a file holds no array of numbers, or not one of that name, or shapes differ.
    """
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"`train_arrays`: there is no file or folder {path!r}.")
    if not os.path.isdir(path):
        if Path(path).suffix.lower() not in (".npy", ".npz"):
            raise ValueError(f"{path!r} is neither a .npy nor a .npz file, nor a folder of such files.")
        return {"train": ArrayRows([_open_file(path, array_key, array_per_file)])}
    files = list_files(path)
    used = [file for file in files if Path(file).suffix.lower() in (".npy", ".npz")]
    if not used:
        raise FileNotFoundError(f"The folder {path!r} holds no .npy or .npz file.")
    say_left_out(path, [file for file in files if file not in {*used, "README.md"}])
    splits, _ = find_splits(path, used, names_count=True)
    return {
        name: ArrayRows([_open_file(os.path.join(path, file), array_key, array_per_file) for file in files])
        for name, files in splits.items()
    }


def _open_file(path: str, array_key: str | None, is_sample: bool) -> _Part:
    if Path(path).suffix.lower() == ".npy":
        if array_key is not None:
            raise ValueError(f"`array_key`={array_key!r} is for .npz files, and {path} holds one array.")
        return _File(path, is_sample)
    with _load(path) as archive:
        keys = list(archive.keys())
        if array_key is None and len(keys) != 1:
            raise ValueError(f"{path} holds {len(keys)} arrays: give `array_key`, one of {', '.join(keys)}.")
        if array_key is not None and array_key not in keys:
            raise ValueError(f"{path} has no `array_key`={array_key!r}; it holds {', '.join(keys)}.")
        try:
            array = archive[array_key or keys[0]]
        except ValueError as error:
            raise ValueError(f"{path}: {array_key or keys[0]} cannot be read as numbers: {error}") from error
    return _Memory(array[None] if is_sample else array, path, os.path.abspath(path))


def select_arrays(where: str, splits: dict[str, ArrayRows], split: str) -> ArrayRows:
    """
    A split, or a slice of one in the manner of `datasets`: `"train[:90%]"`.

    Raises:
        ValueError: there is no such split, or it is empty.
    """
    ranges = select_ranges(where, {name: len(rows) for name, rows in splits.items()}, split)
    rows = [splits[name].select(np.arange(start, stop)) for name, start, stop in ranges if stop > start]
    if not rows:
        raise ValueError(f"`split`={split!r} of {where} holds no array.")
    if len({id(part) for r in rows for part in r.parts}) == len(rows[0].parts):  # slices of one split
        return ArrayRows(rows[0].parts, np.concatenate([r.indices for r in rows]))
    parts = [part for r in rows for part in r.parts]
    starts = np.cumsum([0] + [r.starts[-1] for r in rows])
    indices = np.concatenate([r.indices + start for r, start in zip(rows, starts, strict=False)])
    return ArrayRows(parts, indices)


def to_array_rows(data) -> ArrayRows:
    """
    A tensor, or what is like an ndarray or an xarray DataArray, as rows. It is not copied where it need not be.

    Raises:
        ValueError: it holds no real numbers, or some of them are masked.
    """
    name = f"`data` ({type(data).__name__} of shape {tuple(getattr(data, 'shape', ()))})"
    if hasattr(data, "dims") and hasattr(data, "values"):
        sizes = ", ".join(f"{dim} {size}" for dim, size in zip(data.dims, data.shape, strict=True))
        name = f"`data` ({type(data).__name__} of {sizes})"
        data = data.values
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu()
        data = (data.float() if data.dtype == torch.bfloat16 else data).numpy()
    if isinstance(data, np.ma.MaskedArray) and np.ma.is_masked(data):
        raise ValueError(
            f"{name}: {np.ma.count_masked(data):,} values are masked. Fill them or leave out their samples."
        )
    array = data if isinstance(data, np.memmap) else np.asarray(data)
    if array.ndim < 2:
        raise ValueError(f"{name} must have an axis of samples and at least one more.")
    return ArrayRows([_Memory(array, name)])


def array_column_rows(dataset: Dataset, array_column: str) -> ArrayRows:
    """The arrays of a column, as [`find_array_column`] finds it."""
    return ArrayRows([_Column(dataset, array_column)])


def deep_image_rows(dataset: Dataset, reader: ImageReader) -> ArrayRows:
    """
    The numbers in gray images of more than 8 bits, unscaled.

    Args:
        dataset (`datasets.Dataset`): its images not decoded.
        reader ([`ImageReader`]): of which the column and the resolution count.
    """
    return ArrayRows([_DeepImages(dataset, reader)])


# Channels


def find_channel_axis(shape: Sequence[int], channel_axis: ChannelAxis, where: str) -> int | None:
    """
    The axis of channels, `None` if there is none.

    Args:
        shape (`tuple` of ints): of all arrays, `(samples, ...)`.
        channel_axis (`int` or `"none"`, *optional*): its number, where that of samples is 0; 1 when not given.
        where (`str`): the arrays, for messages.

    Raises:
        ValueError: there is no such axis, or it is not certain which one it is, or the arrays do not have one to three
            further axes.
    """
    shape = tuple(shape)
    axis = 1 if channel_axis is None else channel_axis
    if axis != "none":
        if not isinstance(axis, int) or not -len(shape) < axis < len(shape) or axis == 0:
            raise ValueError(
                f"`channel_axis`={channel_axis!r}: {where} has the shape {shape}, whose axis 0 counts samples; the "
                f"axis of channels is one of 1 to {len(shape) - 1}, or none."
            )
        axis %= len(shape)
    num_sizes = len(shape) - 1 - (axis != "none")
    if num_sizes not in _AXES:
        hint = " --channel_axis none says that they have no channels." if num_sizes == 0 else ""
        raise ValueError(
            f"{where} has the shape {shape}; it must be (samples, channels, length), (samples, channels, height, "
            f"width) or (samples, channels, depth, height, width).{hint}"
        )
    if channel_axis is None and len(shape) > 3 and shape[-1] <= 4 < 8 <= shape[1]:
        raise ValueError(
            f"{where} has the shape {shape}: whether axis 1 or the last one counts channels is not certain. Give "
            f"`channel_axis`: 1, {len(shape) - 1}, or none."
        )
    return None if axis == "none" else axis


def describe_shape(shape: Sequence[int]) -> str:
    """Channels and sizes in words: "2 channels, height × width 37×49"."""
    channels, *sizes = shape
    names = " × ".join(_AXES[len(sizes)])
    return f"{channels} channel{'s' * (channels != 1)}, {names} {'×'.join(map(str, sizes))}"


# Statistics


@dataclass
class Statistics:
    """
    Of each channel: float64 arrays of shape `(channels,)`.

    Args:
        number (`int`): values of a channel.
        mean, squares (`np.ndarray`): mean, and sum of squared differences from it.
        low, high (`np.ndarray`): least and largest value.
    """

    number: int
    mean: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __post_init__(self):
        for name in ("mean", "squares", "low", "high"):
            setattr(self, name, np.asarray(getattr(self, name), dtype=np.float64))

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.squares / self.number)

    def __add__(self, other: "Statistics") -> "Statistics":
        """Of both together: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm (1979), eq. 2.1."""
        number = self.number + other.number
        difference = other.mean - self.mean
        return Statistics(
            number,
            self.mean + difference * (other.number / number),
            self.squares + other.squares + difference**2 * (self.number * other.number / number),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )


class _NotFinite:
    """How many values are not finite, and where the first one is."""

    def __init__(self):
        self.number, self.first = 0, None

    def add(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """
        Args:
            name (`str`): what messages call the array.
            rows (`np.ndarray` of shape `(n,)`): numbers of its rows.
            values (`np.ndarray` of shape `(n, ...)`): what is in them.
        """
        broken = ~np.isfinite(values)
        if self.first is None:
            index = tuple(int(i) for i in np.unravel_index(int(np.argmax(broken)), broken.shape))
            self.first = f"the first, {values[index]}, at index {(int(rows[index[0]]), *index[1:])} of {name}"
        self.number += int(np.count_nonzero(broken))


def measure(rows: ArrayRows, channel_axis: int | None) -> Statistics:
    """
    Statistics of all rows, in one pass; files that were measured before and have not changed are not read.

    Raises:
        ValueError: values are not finite; the message says how many, and where the first one is.
    """
    places = list(rows.split())
    whole = [part.path if part.path and len(own) == part.shape[0] else None for part, own in places]
    paths = [path for path in whole if path]
    folder = os.path.commonpath([min(paths), max(paths)]) if paths else ""
    settings = [
        *("arrays", channel_axis, rows.shape, [part.dtype.str for part, _ in places[:1]], np.__version__),
        hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    ]
    for part, own in places:
        if part.path and len(own) != part.shape[0]:  # a part of a file is remembered as that part
            settings.append([part.path, [own[list(run)].tolist() for run in _find_runs(own)]])
    checked = CheckedFiles([part.path for part, _ in places], folder, settings)
    known, findings = checked.find()
    num_values = sum(len(own) for (_, own), number in zip(places, known, strict=True) if number < 0)
    progress = tqdm(total=num_values, desc="Measuring", unit="array", leave=False)
    found, numbers, not_finite, total = list(findings), known.copy(), _NotFinite(), None
    for place, (part, own) in enumerate(places):
        if known[place] < 0:
            before = not_finite.number
            statistics = _measure_part(part, own, channel_axis, not_finite, progress)
            if not_finite.number > before:
                continue
            numbers[place] = len(found)
            found.append({name: np.asarray(value).tolist() for name, value in asdict(statistics).items()})
        else:
            statistics = Statistics(**findings[known[place]])
        total = statistics if total is None else total + statistics
    progress.close()
    if not_finite.number:
        values = math.prod(rows.shape) * len(rows)
        raise ValueError(
            f"{not_finite.number:,} of {values:,} values are NaN or infinite: {not_finite.first}. Fill them, or leave "
            "out the samples that hold them."
        )
    remember(checked, [checked.records(np.where(numbers == known, -1, numbers), found)])
    if (known >= 0).any():
        say(
            f"{int((known >= 0).sum()):,} of {len(places):,} files were measured at an earlier start and are unchanged."
        )
    return total


def _measure_part(part, own, channel_axis, not_finite, progress) -> Statistics | None:
    total = None
    size = max(1, math.prod(part.shape[1:]))
    step = max(1, _CHUNK // size)
    for start in range(0, len(own), step):
        rows = own[start : start + step]
        values = part.read(rows)
        chunk = _measure_values(values, channel_axis)
        if chunk is None:
            not_finite.add(part.name, rows, values)
        else:
            total = chunk if total is None else total + chunk
        progress.update(len(rows))
    return total


def _measure_values(values: np.ndarray, channel_axis: int | None) -> Statistics | None:
    """Statistics of values of shape (rows, ...); `None` if one is not finite."""
    by_channel = values[None] if channel_axis is None else np.moveaxis(values, channel_axis, 0)
    columns = []
    for channel in by_channel:
        channel = channel.astype(np.float64)
        low, high = channel.min(), channel.max()
        if not (np.isfinite(low) and np.isfinite(high)):  # NaN is both
            return None
        mean = channel.mean()
        channel -= mean
        columns.append((mean, np.square(channel, out=channel).sum(), low, high))
    return Statistics(values.size // len(by_channel), *np.array(columns).T)


def choose_units(
    statistics: Statistics,
    value_range: Sequence[float] | None = None,
    data_mean: Sequence[float] | None = None,
    data_std: Sequence[float] | None = None,
    data_unit: str | None = None,
) -> Units:
    """
    The units of arrays: what is given, or else mean and standard deviation of each channel.

    Args:
        statistics ([`Statistics`]): of the data.
        value_range (pair of floats, *optional*):
            The least and the largest value that data can have. Where neither mean nor standard deviation is given, it
            becomes [-1, 1].
        data_mean, data_std (sequences of floats, *optional*): one for all channels, or one for each.
        data_unit (`str`, *optional*): what the numbers are, such as "K".

    Raises:
        ValueError: values lie outside `value_range`, a channel is constant and its scale not given, or there is another
            number of means than channels.
    """
    channels = len(statistics.mean)
    unit = f" {data_unit}" if data_unit else ""
    found = [f"{low:g} to {high:g}{unit}" for low, high in zip(statistics.low, statistics.high, strict=True)]
    if value_range is not None:
        low, high = value_range
        for channel, values in enumerate(found):
            if statistics.low[channel] < low or statistics.high[channel] > high:
                raise ValueError(
                    f"`value_range`={low:g} {high:g}: channel {channel} of the data has values from {values}, outside "
                    "of it."
                )
        if data_mean is None and data_std is None:
            data_mean, data_std = ((low + high) / 2,), ((high - low) / 4,)
    for name, given in (("data_mean", data_mean), ("data_std", data_std)):
        if given is not None and len(given) not in (1, channels):
            raise ValueError(
                f"`{name}` has {len(given)} numbers, and the data {channels} channels: give one, or one for each."
            )
    if data_std is None:
        constant = np.flatnonzero(statistics.low == statistics.high)
        if len(constant):
            channel = constant[0]
            raise ValueError(
                f"{len(constant)} of {channels} channels are constant, channel {channel} with the value "
                f"{statistics.low[channel]:g}{unit}: they have no scale. Leave them out, or give `data_std`."
            )
    mean = statistics.mean if data_mean is None else np.broadcast_to(np.float64(data_mean), channels)
    std = statistics.std if data_std is None else np.broadcast_to(np.float64(data_std), channels)
    units = Units(
        data_mean=mean.tolist(),
        data_std=std.tolist(),
        value_range=None if value_range is None else tuple(value_range),
        name=data_unit,
    )
    center, spread_ = (statistics.mean - mean) / (2 * std), statistics.std / (2 * std)
    strange = np.flatnonzero((np.abs(center) > 5) | (spread_ > 5) | (spread_ < 0.05))
    if len(strange):
        channel = strange[0]
        low, high = ((v[channel] - mean[channel]) / (2 * std[channel]) for v in (statistics.low, statistics.high))
        say(
            f"Channel {channel} of the data has values from {found[channel]}, which with a mean of {mean[channel]:g} "
            f"and a standard deviation of {std[channel]:g} become {low:.3g} to {high:.3g} in the network's units. The "
            "default noise levels fit a mean of 0 and a standard deviation of 0.5: is the unit the right one?"
        )
    return units


# Sources of batches


class CachedArrays:
    """
    Arrays kept on the device, in the network's units.

    Args:
        arrays (`torch.Tensor` of shape `(num_arrays, channels, ...)`): float32, on the device.
        labels (`torch.Tensor` of shape `(num_arrays,)`): int64, on the device.
        units ([`Units`]): of the data.
    """

    def __init__(self, arrays: torch.Tensor, labels: torch.Tensor, units: Units):
        self.arrays, self.labels, self.units = arrays, labels, units
        self.shape = tuple(arrays.shape[1:])

    def __len__(self) -> int:
        return len(self.arrays)

    def sample(self, num_arrays: int) -> torch.Tensor:
        """At most `num_arrays` arrays, spread over the data set: float32 `(n, channels, ...)`, in network units."""
        return self.arrays[spread(len(self), num_arrays)]

    def take(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows in their order, and their labels, as in a batch."""
        return self.arrays[rows], self.labels[rows]

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """This process's batches, for ever: float32 `(batch_size, channels, ...)` and int64 `(batch_size,)`."""
        orders = BatchOrder(len(self), batch_size, seed)
        for _, rows in orders.batches(first_batch, self.arrays.device):
            yield self.arrays[rows], self.labels[rows]

    @staticmethod
    def to_network(batch: torch.Tensor) -> torch.Tensor:
        """The batch itself, which is in the network's units."""
        return batch


class LoadedArrays:
    """
    Arrays that are read each time they are used, while the network trains on those before.

    Args:
        rows ([`ArrayRows`]): the arrays.
        channel_axis (`int`, *optional*): of `(samples, ...)`; without one there is one channel.
        labels (`np.ndarray` of shape `(num_arrays,)`): int64.
        units ([`Units`]): of the data.
        device (`torch.device`): where the batches go.
    """

    def __init__(
        self, rows: ArrayRows, channel_axis: int | None, labels: np.ndarray, units: Units, device: torch.device
    ):
        self.rows, self.channel_axis, self.labels, self.units, self.device = rows, channel_axis, labels, units, device
        sizes = list(rows.shape)
        channels = 1 if channel_axis is None else sizes.pop(channel_axis - 1)
        self.shape = (channels, *sizes)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, num_arrays: int) -> torch.Tensor:
        """As [`CachedArrays.sample`], and no more than 1 GB."""
        num_arrays = min(num_arrays, max(2, _MAX_SAMPLE // (4 * math.prod(self.shape))))
        return self._read(spread(len(self), num_arrays).numpy())[0].to(self.device)

    def take(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`CachedArrays.take`]."""
        return tuple(tensor.to(self.device) for tensor in self._read(np.arange(len(self))[rows]))

    def batches(self, batch_size: int, seed: int, first_batch: int = 0):
        """As [`CachedArrays.batches`]."""
        orders, waiting = BatchOrder(len(self), batch_size, seed).batches(first_batch), deque()
        with ThreadPoolExecutor(1) as pool:
            while True:
                while len(waiting) <= _AHEAD:
                    waiting.append(pool.submit(self._read, next(orders)[1].numpy(), self.device.type == "cuda"))
                arrays, labels = waiting.popleft().result()
                yield arrays.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    to_network = staticmethod(CachedArrays.to_network)

    def cache(self) -> CachedArrays:
        """All arrays on the device."""
        arrays = torch.empty((len(self), *self.shape))
        step = max(1, _CHUNK // math.prod(self.shape))
        for start in tqdm(range(0, len(self), step), desc="Reading", unit="chunk", leave=False):
            rows = np.arange(start, min(start + step, len(self)))
            self._convert(*self.rows.read(rows), arrays[start : start + step].numpy())
        return CachedArrays(arrays.to(self.device), torch.from_numpy(self.labels).to(self.device), self.units)

    def _read(self, rows: np.ndarray, pin: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        arrays = torch.empty((len(rows), *self.shape), pin_memory=pin)
        self._convert(*self.rows.read(rows), arrays.numpy())
        return arrays, torch.from_numpy(self.labels[rows])

    def _convert(self, values: np.ndarray, places: np.ndarray, out: np.ndarray) -> None:
        """Values as they are stored, into the rows `places` of `out`: subtracted in float64, then rounded."""
        if self.channel_axis is None:
            values = values[:, None]
        elif self.channel_axis != 1:
            values = np.moveaxis(values, self.channel_axis, 1)
        shape = (-1, *[1] * (len(self.shape) - 1))
        mean, scale = (np.float64(v).reshape(shape) for v in (self.units.data_mean, self.units.data_std))
        scale = 2 * scale
        step = max(1, _BLOCK // math.prod(self.shape))
        for start in range(0, len(values), step):
            block = values[start : start + step] - mean
            block /= scale
            out[places[start : start + step]] = block


def open_arrays(
    rows: ArrayRows,
    device: torch.device,
    channel_axis: ChannelAxis = None,
    labels: np.ndarray | None = None,
    units: Units | None = None,
    max_cache_gb: float = 4.0,
    **units_settings,
) -> CachedArrays | LoadedArrays:
    """
    Make arrays ready for training: one pass over them, unless it is remembered, checks them and finds their units.

    Args:
        rows ([`ArrayRows`]): the arrays.
        device (`torch.device`): where the batches go.
        channel_axis (`int` or `"none"`, *optional*): see [`find_channel_axis`].
        labels (`np.ndarray` of shape `(num_arrays,)`, *optional*): int64 classes.
        units ([`Units`], *optional*): those of other data, which the network was or will be trained on.
        max_cache_gb (`float`, defaults to 4.0):
            Arrays that take no more than this as float32, in units of 10⁹ bytes over all processes, stay on the device.
        units_settings: see [`choose_units`].

    Raises:
        ValueError: the shape does not say what is what, values are not finite, or the units do not fit them.
    """
    axis = find_channel_axis((len(rows), *rows.shape), channel_axis, rows.parts[0].name)
    if not math.prod(rows.shape):
        raise ValueError(f"{rows.parts[0].name} holds arrays of shape {rows.shape}, which are empty.")
    statistics = _measure_once(rows, axis)
    if units is None:
        units = choose_units(statistics, **units_settings)
    else:
        channels = len(statistics.mean)
        for values in (units.data_mean, units.data_std):
            if isinstance(values, list) and len(values) != channels:
                raise ValueError(
                    f"{rows.parts[0].name} has {channels} channels, and the units to go on with are of {len(values)}."
                )
        units = replace(units, name=units.name or units_settings.get("data_unit"))
        _check_settings(units, **units_settings)
        mean, std = np.atleast_1d(units.data_mean), np.atleast_1d(units.data_std)
        choose_units(statistics, units.value_range, mean, std, units.name)  # that the values fit them
    labels = np.zeros(len(rows), dtype=np.int64) if labels is None else labels
    arrays = LoadedArrays(rows, axis, labels, units, device)
    num_bytes = 4 * len(rows) * math.prod(rows.shape)
    return arrays.cache() if num_bytes <= max_cache_gb * 1e9 / PartialState().num_processes else arrays


def _check_settings(units: Units, **settings) -> None:
    """
    Raises:
        ValueError: a setting of [`choose_units`] is given, and differs from what the units to go on with have.
    """
    for name, given in settings.items():
        kept = units.name if name == "data_unit" else getattr(units, name)
        if given is None:
            continue
        values, expected = np.atleast_1d(given), np.atleast_1d(kept)
        same_number = 1 in (len(values), len(expected)) or len(values) == len(expected)
        if not same_number or np.any(values != expected):
            raise ValueError(f"`{name}`={given!r} does not fit the network to go on with, which has {kept!r}.")


def _measure_once(rows: ArrayRows, channel_axis: int | None) -> Statistics:
    """By the main process, for all: they must go on with the same numbers, or stop together."""
    answer = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = measure(rows, channel_axis)
        except (ValueError, OSError) as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]
