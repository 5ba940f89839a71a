"""What a second start on the same files decodes again: what changed, and nothing else."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from ncsn_diffusers import checked_files
from ncsn_diffusers.checked_files import CheckedFiles
from ncsn_diffusers.data import (
    ImageReader,
    LoadedImages,
    UnreadableImageError,
    encode_labels,
    find_columns,
    load_training_data,
    open_images,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(checked_files, "_SETTLED", 0.0)
    return tmp_path / "cache" / "ncsn_diffusers"


@pytest.fixture
def folder(tmp_path):
    """Six gray images of values 0, 10, 20 and so on, in two classes, which all have the same number of bytes."""
    for i in range(6):
        write(tmp_path / "set" / ("cat", "dog")[i % 2] / f"{i}.bmp", 10 * i)
    return tmp_path / "set"


def write(path, value, size=(4, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


@pytest.fixture
def start(monkeypatch):
    """Open a folder as training does, without a cache on the device; which images were read for that, by name."""
    read = ImageReader.read

    def start(folder, max_cache_gb=0.0, corrupt_images="error", **arguments):
        names = []

        def read_and_note(self, row, place):
            names.append(os.path.basename(row["image"]["path"]))
            return read(self, row, place)

        dataset, image_column, label_column = find_columns(load_training_data(train_data_dir=str(folder)))
        num_classes = None
        if label_column is not None:
            dataset, num_classes = encode_labels(dataset, label_column)
        reader = ImageReader(image_column, label_column, num_classes=num_classes, **arguments)
        time.sleep(0.02)  # the file system's clock ticks
        with monkeypatch.context() as patch:
            patch.setattr(ImageReader, "read", read_and_note)
            try:
                return open_images(dataset, reader, torch.device("cpu"), corrupt_images, max_cache_gb)
            finally:
                start.read = sorted(names)

    return start


def contents(images):
    """Value and class of each image."""
    batch, labels = next(images.batches(len(images), seed=0))
    return dict(zip(batch[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


ALL = [f"{i}.bmp" for i in range(6)]


def test_files_that_have_passed_are_not_decoded_again(folder, start, capsys):
    first = start(folder)
    assert start.read == ALL
    assert "passed the check" not in capsys.readouterr().out
    second = start(folder)
    assert start.read == []
    assert isinstance(second, LoadedImages)
    assert "6 of 6 images passed the check at an earlier start" in capsys.readouterr().out
    assert first.shape == second.shape == (1, 4, 4)
    assert contents(first) == contents(second) == {0: 0, 10: 1, 20: 0, 30: 1, 40: 0, 50: 1}


def test_images_that_fit_are_read_all_the_same(folder, start):
    """On the device their pixels are needed, whatever is known."""
    start(folder)
    images = start(folder, max_cache_gb=1)
    assert start.read == ALL
    assert images.images[:, 0, 0, 0].tolist() == [0, 20, 40, 10, 30, 50]
    start(folder)
    assert start.read == []


def replace_keeping_times(path, content):
    """As `cp --preserve` or `tar` would: the same size and time of modification."""
    state = path.stat()
    assert len(content) == state.st_size
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_mtime_ns == state.st_mtime_ns


def add(folder):
    write(folder / "cat" / "6.bmp", 60)


def remove(folder):
    (folder / "cat" / "2.bmp").unlink()


def rename(folder):
    (folder / "cat" / "2.bmp").rename(folder / "cat" / "9.bmp")


def replace(folder):
    path = folder / "cat" / "2.bmp"
    write(path, 70)
    os.utime(path, (1, 1))


def replace_under_the_old_date(folder):
    write(folder.parent / "other.bmp", 70)
    replace_keeping_times(folder / "cat" / "2.bmp", (folder.parent / "other.bmp").read_bytes())


def swap(folder):
    first, second, aside = folder / "cat" / "2.bmp", folder / "cat" / "4.bmp", folder.parent / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def rename_class(folder):
    (folder / "cat").rename(folder / "eel")


@pytest.mark.parametrize(
    ("change", "read", "found"),
    [
        (add, ["6.bmp"], {0: 0, 10: 1, 20: 0, 30: 1, 40: 0, 50: 1, 60: 0}),
        (remove, [], {0: 0, 10: 1, 30: 1, 40: 0, 50: 1}),
        (rename, ["9.bmp"], {0: 0, 10: 1, 20: 0, 30: 1, 40: 0, 50: 1}),
        (replace, ["2.bmp"], {0: 0, 10: 1, 70: 0, 30: 1, 40: 0, 50: 1}),
        (replace_under_the_old_date, ["2.bmp"], {0: 0, 10: 1, 70: 0, 30: 1, 40: 0, 50: 1}),
        (swap, ["2.bmp", "4.bmp"], {0: 0, 10: 1, 20: 0, 30: 1, 40: 0, 50: 1}),
        (rename_class, ["0.bmp", "2.bmp", "4.bmp"], {0: 1, 10: 0, 20: 1, 30: 0, 40: 1, 50: 0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_changed_is_decoded_again_and_nothing_else(folder, start, change, read, found):
    start(folder)
    change(folder)
    images = start(folder)
    assert start.read == read
    assert contents(images) == found
    start(folder)
    assert start.read == []


def test_file_that_became_corrupt_under_its_old_size_and_date_is_found(folder, start):
    start(folder)
    replace_keeping_times(folder / "dog" / "3.bmp", b"x" * (folder / "dog" / "3.bmp").stat().st_size)
    with pytest.raises(ValueError, match=r"1 of 6 .* cannot be read(.|\n)*3\.bmp"):
        start(folder)


def test_image_that_changed_its_size_is_found(folder, start):
    start(folder)
    write(folder / "cat" / "2.bmp", 20, size=(8, 4))
    with pytest.raises(ValueError, match=r"`resolution` must be given: the .* have 2 sizes"):
        start(folder)
    assert start.read == ["2.bmp"]


def test_corrupt_files_are_not_remembered_and_the_others_are(folder, start):
    (folder / "cat" / "4.bmp").write_text("not an image")
    with pytest.raises(ValueError, match="1 of 6 "):
        start(folder)
    for _ in range(2):
        images = start(folder, corrupt_images="skip")
        assert start.read == ["4.bmp"]
        assert contents(images) == {0: 0, 10: 1, 20: 0, 30: 1, 50: 1}
    with pytest.raises(ValueError, match=r"1 of 6 .*(.|\n)*4\.bmp"):
        start(folder)


def test_other_settings_are_checked_anew(folder, start, monkeypatch):
    start(folder)
    for arguments in ({"channels": 3}, {"resolution": 2}):
        images = start(folder, **arguments)
        assert start.read == ALL
        assert images.shape == {"channels": (3, 4, 4), "resolution": (1, 2, 2)}[next(iter(arguments))]
        assert start(folder, **arguments).shape == images.shape
        assert start.read == []
    start(folder)
    assert start.read == []
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    start(folder)
    assert start.read == ALL


def test_random_crops_need_no_second_check(folder, start):
    for read in (ALL, []):
        images = start(folder, max_cache_gb=1, resolution=2, random_crop=True)
        assert start.read == read
        assert images.shape == (1, 2, 2)


def test_parts_of_one_folder_do_not_displace_each_other(tmp_path, start, monkeypatch):
    """A split by slices, say, whose parts are opened in turn."""
    for i in range(10):
        write(tmp_path / "set" / f"{i}.bmp", i)
    paths = [str(tmp_path / "set" / f"{i}.bmp") for i in range(10)]
    time.sleep(0.02)
    for part in (paths[:9], [paths[0], paths[9]], paths[1:9]):
        files = CheckedFiles(part, "set", [])
        numbers = np.zeros(len(part), dtype=np.int64)
        files.save([files.records(numbers, [[(1, 4, 4), None]])])
    numbers, findings = CheckedFiles(paths, "set", []).find()
    assert (numbers.tolist(), findings) == ([0] * 10, [[[1, 4, 4], None]])


def test_findings_of_each_file():
    path = str(Path(__file__))
    files = CheckedFiles([path, "missing.png", None, "/no/such/file.png", os.path.dirname(path)], "tests", [])
    findings = [[[3, 8, 8], None], [[1, 2, 9], ["F", 0.1]]]
    records = files.records(np.array([1, 0, 0, 0, -1]), findings)
    assert records["path"].to_pylist() == [path]  # what is no file has nothing by which it could be recognized
    files.save([records])
    numbers, found = files.find()
    assert numbers.tolist() == [0, -1, -1, -1, -1]
    assert found == [[[1, 2, 9], ["F", 0.1]]]


def test_files_that_may_still_be_changing_are_not_remembered(folder, start, monkeypatch):
    monkeypatch.setattr(checked_files, "_SETTLED", 60.0)
    for _ in range(2):
        start(folder)
        assert start.read == ALL


def whites(folder, *values):
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        if value is not None:
            Image.fromarray(np.array([[0, value]], "int32")).save(folder / f"{i}.tiff")


def test_whites_are_compared_with_those_of_files_known_before(tmp_path, start):
    whites(tmp_path / "set", 200, 250)
    start(tmp_path / "set")
    start(tmp_path / "set")
    assert start.read == []
    whites(tmp_path / "set", None, None, 60_000)
    with pytest.raises(ValueError, match=r"different values of white, .*\d\.tiff .*\d\.tiff"):
        start(tmp_path / "set")
    assert start.read == ["2.tiff"]


def test_labels_are_checked_although_the_files_are_known(tmp_path, start):
    write(tmp_path / "set" / "0.bmp", 0)
    write(tmp_path / "set" / "1.bmp", 10)
    rows = [{"file_name": "0.bmp", "label": 0}, {"file_name": "1.bmp", "label": 1}]
    metadata = tmp_path / "set" / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, rows)))
    start(tmp_path / "set")
    start(tmp_path / "set")
    assert start.read == []
    dataset, *columns = find_columns(load_training_data(train_data_dir=str(tmp_path / "set")))
    with pytest.raises(ValueError, match="has 1 in `label_column`='label'; the classes are numbered from 0 to 0"):
        open_images(dataset, ImageReader(*columns, num_classes=1), torch.device("cpu"), max_cache_gb=0)


# The cache


@pytest.mark.parametrize("damage", ["cut short", "one bit", "empty", "another table", "text", "a folder"])
def test_damaged_cache_is_passed_over_and_written_anew(folder, start, cache, damage):
    start(folder)
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[content.index(b"0.bmp")] ^= 1  # a path that reads like another
        file.write_bytes(content)
    elif damage == "another table":
        pa.parquet.write_table(pa.table({"path": ["a"]}), file)
    elif damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_text("" if damage == "empty" else "not a table")
    assert contents(start(folder)) == {0: 0, 10: 1, 20: 0, 30: 1, 40: 0, 50: 1}
    assert start.read == ALL
    start(folder)
    assert start.read == (ALL if damage == "a folder" else [])


def test_cache_that_cannot_be_written_costs_a_message(folder, start, cache, capsys):
    cache.parent.write_text("a file where the cache's folder would be")
    for _ in range(2):
        assert len(start(folder)) == 6
        assert start.read == ALL
        assert "at the next start" in capsys.readouterr().out


def test_full_disk_leaves_nothing_behind(folder, start, cache, capsys, monkeypatch):
    def write_table(table, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pyarrow.parquet.write_table", write_table)
        assert len(start(folder)) == 6
    assert "No space left on device" in capsys.readouterr().out
    assert list(cache.iterdir()) == []


def test_processes_that_write_at_once_never_leave_half_a_file(tmp_path):
    for i in range(40):
        write(tmp_path / "set" / f"{i}.bmp", i)
    paths = [str(tmp_path / "set" / f"{i}.bmp") for i in range(40)]
    time.sleep(0.02)
    everything = CheckedFiles(paths, "set", [])
    records = everything.records(np.arange(40), [[[1, 4, i], None] for i in range(40)])
    everything.save([records])
    seen = []

    def save_or_find(writes):
        for _ in range(20):
            files = CheckedFiles(paths, "set", [])
            if writes:
                files.save([records])
            numbers, findings = files.find()
            seen.append([findings[number][0][2] for number in numbers])

    threads = [threading.Thread(target=save_or_find, args=(writes,)) for writes in (True, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [list(range(40))] * 60


# Folders with metadata


def label(folder, labels):
    """Metadata files that give `labels`, by path; their own paths."""
    rows = {}
    for path, name in labels.items():
        rows.setdefault(os.path.dirname(path), []).append({"file_name": os.path.basename(path), "label": name})
    for place, lines in rows.items():
        (folder / place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [folder / place / "metadata.jsonl" for place in rows]


def described(folder):
    dataset = load_training_data(train_data_dir=str(folder)).cast_column("image", datasets.Image(decode=False))
    return [(os.path.relpath(row["image"]["path"], folder), row["label"]) for row in dataset]


def test_second_start_on_metadata_looks_no_image_up(tmp_path, start, monkeypatch):
    for i in range(3):
        write(tmp_path / "set" / f"{i}.bmp", i)
    label(tmp_path / "set", {f"{i}.bmp": "abc"[i] for i in range(3)})
    first = described(tmp_path / "set")
    assert first == [("0.bmp", "a"), ("1.bmp", "b"), ("2.bmp", "c")]

    def refuse(*_, **__):
        raise AssertionError("resolved or built again")

    monkeypatch.setattr("datasets.data_files._get_origin_metadata", refuse)
    monkeypatch.setattr("datasets.builder.DatasetBuilder._download_and_prepare", refuse)
    assert described(tmp_path / "set") == first
    assert sorted(contents(start(tmp_path / "set"))) == [0, 1, 2]


@pytest.mark.parametrize("keeps_date", [False, True])
def test_edited_metadata_are_noticed(tmp_path, keeps_date):
    write(tmp_path / "set" / "0.bmp", 0)
    (metadata,) = label(tmp_path / "set", {"0.bmp": "cat"})
    assert described(tmp_path / "set") == [("0.bmp", "cat")]
    time.sleep(0.02)
    content = metadata.read_bytes().replace(b"cat", b"dog")
    replace_keeping_times(metadata, content) if keeps_date else metadata.write_bytes(content)
    assert described(tmp_path / "set") == [("0.bmp", "dog")]


def test_images_that_come_and_go_beside_metadata_are_noticed(tmp_path, capsys):
    folder = tmp_path / "set"
    write(folder / "0.bmp", 0)
    write(folder / "1.bmp", 10)
    label(folder, {"0.bmp": "cat"})
    assert described(folder) == [("0.bmp", "cat")]
    assert "1 images of" in capsys.readouterr().out
    label(folder, {"0.bmp": "cat", "1.bmp": "dog"})
    assert described(folder) == [("0.bmp", "cat"), ("1.bmp", "dog")]
    (folder / "1.bmp").rename(folder / "2.bmp")
    label(folder, {"0.bmp": "cat", "2.bmp": "dog"})
    assert described(folder) == [("0.bmp", "cat"), ("2.bmp", "dog")]


def test_image_that_metadata_name_and_that_is_gone(tmp_path, start):
    folder = tmp_path / "set"
    write(folder / "0.bmp", 0)
    write(folder / "1.bmp", 10)
    label(folder, {"0.bmp": "cat", "1.bmp": "dog"})
    start(folder)
    (folder / "1.bmp").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 .* cannot be read(.|\n)*1\.bmp"):
        start(folder)


def test_order_of_several_metadata_files(tmp_path):
    """Each file of the images' folders has its rows; their order is the same in each process and on each machine."""
    paths = [f"{folder}/{i}.bmp" for folder in "abcdef" for i in range(2)]
    for i, path in enumerate(paths):
        write(tmp_path / "set" / path, i)
    label(tmp_path / "set", {path: path[0] for path in paths})
    assert described(tmp_path / "set") == [(path, path[0]) for path in paths]


def test_stream_of_a_folder_with_metadata(tmp_path):
    for i in range(4):
        write(tmp_path / "set" / f"{i}.bmp", i)
    label(tmp_path / "set", {f"{i}.bmp": "ab"[i % 2] for i in (3, 1, 2, 0)})
    stream = load_training_data(train_data_dir=str(tmp_path / "set"), split="train[:75%]", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [(row["image"].getpixel((0, 0)), row["label"]) for row in stream] == [(3, "b"), (1, "b"), (2, "a")]


def test_error_of_an_image_that_goes_bad_during_training(folder, start):
    start(folder)
    images = start(folder)
    (folder / "cat" / "0.bmp").write_text("not an image")
    with pytest.raises(UnreadableImageError, match=r"0\.bmp"):
        next(images.batches(6, seed=0))
