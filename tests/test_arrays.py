"""Arrays in the user's units: what is read, what is refused, and what reaches the network."""

import json
import os
import shlex
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Array3D, Array4D, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from test_training import small_config

from ncsn_diffusers import checked_files
from ncsn_diffusers.commands.cli import parse
from ncsn_diffusers.data import (
    CachedArrays,
    LoadedArrays,
    array_column_rows,
    arrays,
    choose_units,
    count_common,
    find_array_column,
    find_columns,
    measure,
    open_array_files,
    open_arrays,
    select_arrays,
    to_array_rows,
)
from ncsn_diffusers.training import Trainer, TrainingConfig, train
from ncsn_diffusers.training.config import training_command
from ncsn_diffusers.units import Units

CPU = torch.device("cpu")
SIZES = {1: (24,), 2: (5, 7), 3: (3, 4, 5)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(checked_files, "_SETTLED", 0.0)


def fields(num=40, channels=2, dims=2, dtype=np.float32, mean=281.0, std=9.0):
    """Temperatures, say: channel c has its own mean and standard deviation."""
    random = np.random.default_rng(0)
    values = random.standard_normal((num, channels, *SIZES[dims]))
    shape = (-1, *[1] * dims)
    scale = np.arange(1, channels + 1).reshape(shape)
    return (mean + std * scale * values + 10 * std * (scale - 1)).astype(dtype)


def opened(data, **arguments):
    rows = data if isinstance(data, arrays.ArrayRows) else to_array_rows(data)
    return open_arrays(rows, CPU, **arguments)


def saved(tmp_path, array, name="a.npy"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    np.save(tmp_path / name, array)
    return open_array_files(str(tmp_path / name))["train"]


def everything(source, batch_size=None):
    """One epoch, in the order of the rows."""
    batches = source.batches(batch_size or len(source), seed=3)
    values, order = next(batches)[0], arrays.BatchOrder(len(source), len(source), 3).order(0)
    return torch.empty_like(values).index_copy_(0, order, values)


# What reaches the network


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("channels", "mean", "std"), [(1, 281.0, 9.0), (5, 0.0, 1e-6), (2, -4e4, 2e3)])
@pytest.mark.parametrize("max_cache_gb", [1, 0])
def test_arrays_survive_the_way_to_the_network_and_back(dims, channels, mean, std, max_cache_gb, tmp_path):
    data = fields(40, channels, dims, mean=mean, std=std)
    source = opened(saved(tmp_path, data), max_cache_gb=max_cache_gb)
    assert type(source) is (CachedArrays if max_cache_gb else LoadedArrays)
    assert source.shape == (channels, *SIZES[dims])
    z = source.to_network(everything(source))
    assert z.dtype == torch.float32
    axes = (0, *range(2, 2 + dims))
    assert z.mean(axes).tolist() == pytest.approx([0] * channels, abs=1e-5)
    assert z.std(axes, correction=0).tolist() == pytest.approx([0.5] * channels, rel=1e-5)
    back = source.units.to_data(z).numpy()
    for c in range(channels):
        assert np.abs(back[:, c] - data[:, c]).max() <= 1e-6 * np.ptp(data[:, c])


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float64])
@pytest.mark.parametrize("max_cache_gb", [1, 0])
def test_numbers_are_rounded_only_after_the_mean_is_subtracted(dtype, max_cache_gb, tmp_path):
    """256 neighboring values stay 256; of float64, ones that float32 cannot tell apart at their height."""
    ramp = np.arange(256).reshape(64, 1, 4)
    data = 1e9 + ramp if dtype is np.float64 else (30_000 + ramp).astype(dtype)
    source = opened(saved(tmp_path, data), max_cache_gb=max_cache_gb)
    z = everything(source)
    assert len(z.unique()) == 256
    std = np.sqrt((256**2 - 1) / 12)  # of the uniform distribution on 256 numbers
    expected = (ramp - 127.5) / (2 * std)
    assert np.abs(z.numpy() - expected).max() < 1e-6


def test_value_range_becomes_minus_one_to_one():
    data = np.array([[[0, 1024]], [[2048, 4095]]], np.uint16)
    source = opened(data, value_range=(0, 4095), data_unit="counts")
    assert source.units == Units([4095 / 2], [4095 / 4], (0, 4095), "counts")
    z = source.sample(2)
    assert z.flatten().tolist() == pytest.approx([-1, 1024 / 2047.5 - 1, 2048 / 2047.5 - 1, 1], abs=1e-7)
    assert source.units.to_data(z).flatten().tolist() == [0, 1024, 2048, 4095]
    with pytest.raises(ValueError, match=r"`value_range`=0 4000: channel 0 of the data has values from 0 to 4095"):
        opened(data, value_range=(0, 4000))


def test_units_that_are_given():
    data = fields(mean=10.0, std=2.0)
    source = opened(data, data_mean=(10.0,), data_std=(2.0, 4.0))
    assert (source.units.data_mean, source.units.data_std) == ([10, 10], [2, 4])
    with pytest.raises(ValueError, match="`data_mean` has 3 numbers, and the data 2 channels"):
        opened(data, data_mean=(1.0, 2.0, 3.0))


def test_units_of_other_data_are_said(capsys):
    """Kelvin for a network of degrees Celsius."""
    opened(fields(channels=1), data_mean=(8.0,), data_std=(9.0,), data_unit="K")
    said = capsys.readouterr().out
    assert (
        "Channel 0 of the data has values from 2" in said and "with a mean of 8 and a standard deviation of 9" in said
    )
    assert "is the unit the right one?" in said
    opened(fields(channels=1), data_mean=(280.0,), data_std=(12.0,))
    assert "unit" not in capsys.readouterr().out


# Statistics


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_statistics_in_any_number_of_chunks(chunk, monkeypatch, tmp_path):
    monkeypatch.setattr(arrays, "_CHUNK", chunk)
    data = fields(17, 3, dtype=np.float64, mean=1e6, std=1e-3)
    found = measure(saved(tmp_path, data), 1)
    axes = (0, 2, 3)
    assert found.mean == pytest.approx(data.mean(axes), rel=1e-14)
    assert found.std == pytest.approx(data.std(axes), rel=1e-6)
    assert (found.low.tolist(), found.high.tolist()) == (data.min(axes).tolist(), data.max(axes).tolist())


def test_values_that_are_not_finite_are_counted_and_placed(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK", 100)
    data = fields()
    data[7, 1, 2, 3], data[31, 0, 0, 0], data[31, 0, 0, 1] = np.nan, -np.inf, np.nan
    message = r"3 of 2,800 values are NaN or infinite: the first, nan, at index \(7, 1, 2, 3\) of .*a\.npy"
    for _ in range(2):  # and remembers nothing of it
        with pytest.raises(ValueError, match=message):
            opened(saved(tmp_path, data))
    with pytest.raises(ValueError, match=r"the first, -inf, at index \(31, 0, 0, 0\)"):
        opened(saved(tmp_path, data).select(np.arange(20, 40)))


def test_values_that_are_not_finite_in_one_of_several_files(tmp_path):
    """Whether they come in the first file or in a later one, and beside files without any."""
    data = fields()
    broken = data.copy()
    broken[7, 1, 2, 3] = np.nan
    for names in ("abc", "cab"):
        folder = tmp_path / names
        folder.mkdir()
        for name, values in zip(names, (broken, data, data), strict=True):
            np.save(folder / f"{name}.npy", values)
        message = (
            rf"1 of 8,400 values are NaN or infinite: the first, nan, at index \(7, 1, 2, 3\) of .*{names[0]}\.npy"
        )
        with pytest.raises(ValueError, match=message):
            opened(open_array_files(str(folder))["train"])


def test_constant_channels_are_refused():
    data = fields()
    data[:, 1] = 7
    with pytest.raises(ValueError, match="1 of 2 channels are constant, channel 1 with the value 7 K: they have"):
        opened(data, data_unit="K")
    assert opened(data, data_std=(9.0,)).units.data_std == [9, 9]


def test_what_was_measured_is_remembered(tmp_path, monkeypatch, capsys):
    for i in range(3):
        saved(tmp_path, fields(10 + i, mean=100.0 * i), f"set/{i}.npy")
    read, names = arrays._File.read, []

    def read_and_note(self, rows):
        names.append(os.path.basename(self.path))
        return read(self, rows)

    monkeypatch.setattr(arrays._File, "read", read_and_note)

    def start(split="train"):
        names.clear()
        rows = select_arrays("set", open_array_files(str(tmp_path / "set")), split)
        return opened(rows, max_cache_gb=0).units, sorted({*names})

    first = start()
    assert first[1] == ["0.npy", "1.npy", "2.npy"]
    assert start() == (first[0], [])
    assert "3 of 3 files were measured at an earlier start" in capsys.readouterr().out
    np.save(tmp_path / "set" / "1.npy", fields(11, mean=-50.0))
    changed = start()
    assert changed[1] == ["1.npy"] and changed[0] != first[0]
    # of a slice, the files that lie in it are known, and the part of one is not the whole
    part = start("train[:5]")
    assert part[1] == ["0.npy"]
    assert part[0].data_mean == pytest.approx(fields(10, mean=0.0)[:5].mean((0, 2, 3), dtype=float).tolist(), rel=1e-6)
    assert start("train[:5]") == (part[0], [])


# Shapes


@pytest.mark.parametrize("axis", [3, -1])
def test_channels_on_another_axis(axis):
    data = fields()
    moved = opened(np.moveaxis(data, 1, -1), channel_axis=axis, max_cache_gb=0)
    assert moved.units.data_mean == pytest.approx(opened(data).units.data_mean, rel=1e-12)
    assert moved.shape == (2, 5, 7)
    assert torch.allclose(moved.sample(9), opened(data).sample(9), atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("max_cache_gb", [1, 0])
def test_no_channels(dims, max_cache_gb):
    data = fields(channels=1, dims=dims)
    source = opened(data[:, 0], channel_axis="none", max_cache_gb=max_cache_gb)
    assert source.shape == (1, *SIZES[dims])
    assert torch.equal(source.sample(9), opened(data).sample(9))


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        ((9, 24), None, r"has the shape \(9, 24\); it must be .*--channel_axis none says that they have no channels"),
        ((9, 2, 5, 7), 4, "`channel_axis`=4: .*the axis of channels is one of 1 to 3, or none"),
        ((9, 2, 5, 7), 0, r"`channel_axis`=0: .*\(9, 2, 5, 7\), whose axis 0 counts samples"),
        ((9, 2, 3, 4, 5), "none", r"it must be \(samples, channels, length\)"),
        ((9, 64, 64, 3), None, "whether axis 1 or the last one counts channels is not certain.*1, 3, or none"),
        ((0, 2, 5, 7), None, "holds no array"),
        ((9, 2, 0), None, r"holds arrays of shape \(2, 0\), which are empty"),
    ],
)
def test_shapes_that_do_not_fit(shape, axis, message):
    data = np.random.default_rng(0).standard_normal(shape)
    with pytest.raises(ValueError, match=message):
        opened(select_arrays("x", {"train": to_array_rows(data)}, "train"), channel_axis=axis)


def test_kinds_that_are_no_real_numbers():
    with pytest.raises(ValueError, match=r"holds complex128; .*real and imaginary part are two channels"):
        to_array_rows(np.ones((3, 1, 4), complex))
    with pytest.raises(ValueError, match="holds bool; arrays must hold real numbers"):
        to_array_rows(np.ones((3, 1, 4), bool))
    masked = np.ma.masked_equal(np.arange(12.0).reshape(3, 1, 4), 5)
    with pytest.raises(ValueError, match=r"`data` \(MaskedArray of shape \(3, 1, 4\)\): 1 values are masked"):
        to_array_rows(masked)


# Files


def test_npz_files_and_their_keys(tmp_path):
    data = fields()
    np.savez_compressed(tmp_path / "one.npz", t=data)
    np.savez(tmp_path / "two.npz", t=data, p=2 * data)
    open_file = open_array_files
    assert torch.equal(opened(open_file(str(tmp_path / "one.npz"))["train"]).sample(9), opened(data).sample(9))
    rows = open_file(str(tmp_path / "two.npz"), "p")["train"]
    assert opened(rows).units.data_mean == pytest.approx((2 * data).mean((0, 2, 3), dtype=float).tolist(), rel=1e-6)
    with pytest.raises(ValueError, match=r"two\.npz holds 2 arrays: give `array_key`, one of t, p"):
        open_file(str(tmp_path / "two.npz"))
    with pytest.raises(ValueError, match=r"two\.npz has no `array_key`='q'; it holds t, p"):
        open_file(str(tmp_path / "two.npz"), "q")
    np.save(tmp_path / "a.npy", data)
    with pytest.raises(ValueError, match=r"`array_key`='t' is for \.npz files"):
        open_file(str(tmp_path / "a.npy"), "t")


def test_folders_of_files(tmp_path, capsys):
    data = fields(40)
    for i, part in enumerate((data[:10], data[10:15], data[15:])):
        saved(tmp_path, part, f"set/{i}.npy")
    (tmp_path / "set" / "notes.txt").write_text("by hand")
    rows = open_array_files(str(tmp_path / "set"))["train"]
    assert "Left out 1 file(s)" in capsys.readouterr().out
    assert torch.allclose(opened(rows).sample(40), opened(data).sample(40), atol=1e-6)
    one = opened(rows, max_cache_gb=0)
    assert torch.equal(everything(one), opened(rows).arrays)
    saved(tmp_path, data[:, :, :4], "set/3.npy")
    with pytest.raises(ValueError, match=r"3\.npy holds arrays of shape \(2, 4, 7\), and .*0\.npy of \(2, 5, 7\)"):
        open_array_files(str(tmp_path / "set"))


def test_files_that_each_hold_one_array(tmp_path):
    data = fields(6)
    for i, array in enumerate(data):
        saved(tmp_path, array, f"set/{i}.npy")
    rows = open_array_files(str(tmp_path / "set"), array_per_file=True)["train"]
    assert torch.allclose(opened(rows, max_cache_gb=0).sample(6), opened(data).sample(6), atol=1e-6)


def test_splits_of_files(tmp_path):
    saved(tmp_path, fields(10), "set/train/0.npy")
    saved(tmp_path, fields(4), "set/test/0.npy")
    splits = open_array_files(str(tmp_path / "set"))
    lengths = {name: len(rows) for name, rows in splits.items()}
    assert lengths == {"train": 10, "test": 4}
    assert select_arrays("set", splits, "train[8:]+test[:3]").indices.tolist() == [8, 9, 10, 11, 12]
    assert count_common("set", lengths, "train", "train[90%:]+test") == 1
    assert count_common("set", lengths, "train[:90%]", "train[90%:]+test") == 0
    with pytest.raises(ValueError, match=r"`split`='validation': 'set' has the split\(s\) train, test"):
        select_arrays("set", splits, "validation")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*nowhere\.npy"):
        open_array_files(str(tmp_path / "nowhere.npy"))
    (tmp_path / "text.npy").write_text("1, 2, 3")
    with pytest.raises(ValueError, match=r"text\.npy cannot be read as arrays of numbers"):
        open_array_files(str(tmp_path / "text.npy"))
    np.save(tmp_path / "object.npy", np.array([{}, {}]))
    with pytest.raises(ValueError, match=r"object\.npy cannot be read as arrays of numbers"):
        open_array_files(str(tmp_path / "object.npy"))
    os.mkfifo(tmp_path / "fifo.npy")
    with pytest.raises(ValueError, match=r"fifo\.npy is no regular file"):
        open_array_files(str(tmp_path / "fifo.npy"))
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(ValueError, match=r"a\.csv' is neither a \.npy nor a \.npz file"):
        open_array_files(str(tmp_path / "a.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.npy or \.npz file"):
        open_array_files(str(tmp_path / "empty"))
    whole = saved(tmp_path, fields(), "cut.npy")
    assert len(whole) == 40
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:400])
    with pytest.raises(ValueError, match=r"cut\.npy cannot be read"):
        open_array_files(str(tmp_path / "cut.npy"))


# Columns of data sets and what Python holds


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_columns_of_arrays(dims, dtype):
    data = fields(channels=2, dims=dims).astype(dtype)
    feature = (Array2D, Array3D, Array4D)[dims - 1](shape=data.shape[1:], dtype=dtype)
    dataset = Dataset.from_dict(
        {"field": list(data), "number": range(40)}, Features(field=feature, number=Value("int8"))
    )
    assert find_array_column(dataset) == "field"
    rows = array_column_rows(find_columns(dataset, "field", None, True)[0].select(range(5, 40)), "field")
    assert rows.dtype == np.dtype(dtype)
    for max_cache_gb in (0, 1):
        assert torch.equal(opened(rows, max_cache_gb=max_cache_gb).sample(40), opened(data[5:]).sample(40))


def test_columns_of_lists():
    data = fields(channels=3, dims=1, dtype=np.float64)
    dataset = Dataset.from_dict({"signal": data.tolist(), "name": ["a"] * 40})
    assert find_array_column(dataset) == "signal"
    assert torch.equal(opened(array_column_rows(dataset, "signal")).sample(40), opened(data).sample(40))
    flat = Dataset.from_dict({"signal": data[:, 0].tolist()})
    source = opened(array_column_rows(flat, "signal"), channel_axis="none")
    assert torch.equal(source.sample(40), opened(data[:, :1]).sample(40))
    ragged = Dataset.from_dict({"signal": [[[1.0, 2.0]], [[1.0, 2.0]], [[1.0]]]})
    with pytest.raises(ValueError, match="column 'signal': row 2 is missing, or its lists are of another length"):
        opened(array_column_rows(ragged, "signal"))
    gap = Dataset.from_dict({"signal": [[[1.0, 2.0]], [[1.0, None]]]})
    with pytest.raises(ValueError, match="column 'signal': 1 numbers are missing, the first in row 1"):
        opened(array_column_rows(gap, "signal"))


def test_which_column_holds_arrays():
    image = PILImage.new("L", (4, 4))
    features = Features(image=Image(), box=Array2D((2, 2), "float32"), other=Array2D((2, 2), "float32"))
    rows = [np.zeros((2, 2), np.float32)]
    both = Dataset.from_dict({"image": [image], "box": rows, "other": rows}, features)
    assert find_array_column(both) is None
    assert find_array_column(both, "box") == "box"
    with pytest.raises(ValueError, match="several columns of arrays; `array_column` names one of box, other"):
        find_array_column(both.remove_columns("image"))
    with pytest.raises(ValueError, match="`array_column`='image' holds Image; it must hold arrays"):
        find_array_column(both, "image")
    with pytest.raises(ValueError, match="`array_column`='x' is not among the data set's columns"):
        find_array_column(both, "x")


def test_what_python_holds():
    data = fields()
    expected = opened(data).sample(9)
    labeled = SimpleNamespace(values=data, shape=data.shape, dims=("time", "level", "latitude", "longitude"))
    for given in (torch.from_numpy(data), torch.from_numpy(data).requires_grad_(), labeled, np.asfortranarray(data)):
        assert torch.equal(opened(given).sample(9), expected)
    assert opened(torch.from_numpy(data).bfloat16()).shape == (2, 5, 7)
    data[3, 0, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"index \(3, 0, 1, 2\) of `data` \(SimpleNamespace of time 40, level 2, "):
        opened(labeled)


# Batches


def test_cached_and_loaded_arrays_come_in_the_same_order(tmp_path):
    rows = saved(tmp_path, fields(23))
    cached, loaded = opened(rows), opened(rows, max_cache_gb=0)
    assert len(cached) == len(loaded) == 23

    def take(source, number, first_batch=0, seed=3):
        batches = source.batches(5, seed, first_batch)
        return torch.stack([next(batches)[0] for _ in range(number)])

    order = take(cached, 10)
    assert torch.equal(order, take(loaded, 10))
    assert torch.equal(order[6:], take(loaded, 4, first_batch=6))
    assert torch.equal(order[6:], take(cached, 4, first_batch=6))
    assert not torch.equal(order, take(loaded, 10, seed=4))
    epoch = {tuple(array.flatten().tolist()) for array in order[:4].flatten(0, 1)}
    assert len(epoch) == 20 and not torch.equal(order[:4], order[4:8])
    assert torch.equal(loaded.take(slice(3, 6))[0], cached.take(slice(3, 6))[0])


def test_files_in_the_order_of_fortran(tmp_path):
    data = fields(23)
    source = opened(saved(tmp_path, np.asfortranarray(data)), max_cache_gb=0)
    assert torch.equal(everything(source), opened(data).arrays)


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    source = opened(saved(tmp_path, fields(23)), max_cache_gb=0)
    os.truncate(tmp_path / "a.npy", 2000)
    with pytest.raises(ValueError, match=r"a\.npy has become shorter"):
        everything(source)


# Runs


@pytest.fixture
def run(tmp_path):
    def make(**arguments):
        return small_config(
            **{"output_dir": str(tmp_path / "out"), "max_train_steps": 2, "checkpointing_steps": 0, **arguments}
        )

    return make


def square(num=40):
    return fields(num, 1, 2)[:, :, :4, :4]


def test_training_on_a_file_and_going_on(tmp_path, run, capsys):
    np.save(tmp_path / "t.npy", square())
    arguments = {"train_arrays": str(tmp_path / "t.npy"), "data_unit": "K", "max_cache_gb": 0, "checkpointing_steps": 1}
    arguments |= {"train_split": "train[:75%]", "validation_split": "train[75%:]", "train_batch_size": 10}
    train(run(**arguments))
    said = capsys.readouterr().out
    assert "Training on 30 arrays (1 channel, height × width 4×4) without classes, from `train_arrays`=" in said
    assert "In the network's units their mean is 28" in said
    manifest = json.loads((tmp_path / "out" / "checkpoint-2" / "manifest.json").read_text())
    units = Units(**manifest["units"])
    assert units.name == "K" and units.data_mean == pytest.approx([square()[:30].mean(dtype=float)], rel=1e-9)
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert 0 < records[-1]["validation_loss"] < 10
    # more data: the units stay those of the network
    np.save(tmp_path / "t.npy", np.concatenate([square(), square() + 100]))
    trainer = Trainer(run(**arguments | {"max_train_steps": 3}, resume_from_checkpoint="latest"))
    assert len(trainer.images) == 60 and trainer.images.units == units
    assert trainer.validation.units == units


def test_training_on_a_tensor(run, tmp_path):
    trainer = Trainer(run(), torch.from_numpy(square()))
    assert trainer.images.shape == (1, 4, 4)
    recorded = training_command(trainer.config)
    assert " --train_data_dir DATA " in recorded
    with pytest.raises(ValueError, match="Give `data` or `train_data_dir`='x', not both"):
        Trainer(run(train_data_dir="x"), torch.from_numpy(square()))


def test_training_on_a_labeled_data_set_of_arrays(run):
    features = Features(field=Array3D((1, 4, 4), "float32"), kind=ClassLabel(names=["calm", "storm"]))
    kinds = [0, 1, None, 1] * 10
    dataset = Dataset.from_dict({"field": list(square()), "kind": kinds}, features)
    trainer = Trainer(run(class_conditional=True), dataset)
    assert trainer.class_names == ["calm", "storm"]
    assert trainer.images.labels.tolist() == [2 if kind is None else kind for kind in kinds]


def test_16_bit_images_keep_their_values(run, tmp_path):
    ramp = (30_000 + np.arange(256)).astype(np.uint16).reshape(16, 4, 4)
    for i, array in enumerate(ramp):
        (tmp_path / "set").mkdir(exist_ok=True)
        PILImage.fromarray(array).save(tmp_path / "set" / f"{i:02}.png")
    arguments = {"train_data_dir": str(tmp_path / "set"), "value_range": (29_000, 31_000), "train_batch_size": 4}
    trainer = Trainer(run(**arguments))
    z = trainer.images.arrays
    assert len(z.unique()) == 256
    assert trainer.images.units.to_data(z).round().flatten().tolist() == list(range(30_000, 30_256))
    trainer = Trainer(run(**arguments, resolution=2))
    assert trainer.images.shape == (1, 2, 2)
    PILImage.new("L", (4, 4)).save(tmp_path / "set" / "08.png")
    with pytest.raises(ValueError, match=r"08\.png .*an image of mode L: `value_range` is for gray images"):
        Trainer(run(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"random_flip": True}, "`random_flip`=True is for images, and `train_arrays` holds arrays: a mirror image"),
        ({"random_crop": True, "resolution": 8}, "`random_crop`=True is for images"),
        ({"resolution": 8}, "`resolution`=8 is for images.*at their own size"),
        ({"channels": 3}, "`channels`=3 is for images"),
        ({"class_conditional": True}, "`class_conditional` needs labels"),
        ({"train_data_dir": "x"}, "Give `train_arrays` or `train_data_dir`, not both"),
        ({"train_arrays": None, "array_key": "t"}, "`array_key`='t' needs `train_arrays`"),
        ({"train_arrays": None, "validation_arrays": "v"}, "`validation_arrays`='v' needs `train_arrays`"),
        ({"validation_arrays": "v", "validation_split": "test"}, "Give `validation_arrays` or `validation_split`"),
        ({"value_range": (1.0, 1.0)}, "`value_range` must be two rising numbers, not 1 1"),
        ({"data_std": (0.0,)}, "`data_std` must be numbers above 0"),
        ({"channel_axis": "last"}, "`channel_axis` must be the number of an axis or none, not 'last'"),
    ],
)
def test_settings_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"train_arrays": "t.npy"} | arguments)


def test_held_out_arrays_are_not_trained_on(run, tmp_path):
    np.save(tmp_path / "t.npy", square())
    np.save(tmp_path / "v.npy", fields(9, 1)[:, :, :4, :4])
    np.save(tmp_path / "w.npy", fields(9, 2)[:, :, :4, :4])
    arguments = {"train_arrays": str(tmp_path / "t.npy")}
    with pytest.raises(ValueError, match=r"`validation_split`='train\[90%:\]' has 4 samples that `train_split`="):
        Trainer(run(**arguments, validation_split="train[90%:]"))
    trainer = Trainer(run(**arguments, validation_arrays=str(tmp_path / "v.npy")))
    assert len(trainer.validation) == 9 and trainer.validation.units == trainer.images.units
    with pytest.raises(ValueError, match=r"`validation_arrays`='.*w\.npy': .*has 2 channels, and the units"):
        Trainer(run(**arguments, validation_arrays=str(tmp_path / "w.npy")))


def test_array_settings_with_images_are_refused(run, tmp_path):
    (tmp_path / "set").mkdir()
    PILImage.new("L", (8, 8)).save(tmp_path / "set" / "0.png")
    for name, value in (("data_mean", (1.0,)), ("channel_axis", "none"), ("data_unit", "K")):
        with pytest.raises(ValueError, match=f"`{name}`=.* is for arrays, and the data set holds images"):
            Trainer(run(train_data_dir=str(tmp_path / "set"), **{name: value}))


@pytest.mark.parametrize("axis", ["none", 2, -1])
def test_command_that_repeats_a_run(axis):
    config = TrainingConfig(train_arrays="/home/ann/t.npy", data_mean=(-1e-7, 2.5), channel_axis=axis)
    config = replace(config, value_range=(-273.15, 1e6))
    command = training_command(config)
    assert "--train_arrays t.npy" in command
    assert "--value_range -273.15 1000000 --data_mean -0.0000001 2.5" in command
    values = parse(TrainingConfig, shlex.split(command)[4:], "train", "")
    assert TrainingConfig(**values) == replace(config, train_arrays="t.npy")


def test_choose_units_needs_no_data():
    statistics = arrays.Statistics(4, [1.0], [16.0], [-1.0], [3.0])
    assert choose_units(statistics) == Units([1.0], [2.0], None)
