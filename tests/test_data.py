import io
import itertools
import json
import os
import tarfile

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import features
from test_training import small_config

from ncsn_diffusers.data import (
    EMBEDDED_DIGITS,
    BatchOrder,
    CachedImages,
    ImageReader,
    LoadedImages,
    StreamedImages,
    UnreadableImageError,
    check_label_column,
    decode_images,
    encode_labels,
    find_class_names,
    find_columns,
    load_training_data,
    open_images,
)
from ncsn_diffusers.images import to_model_range
from ncsn_diffusers.training import train

CPU = torch.device("cpu")


def save_images(folder, modes, size=(12, 8)):
    """Images (width, height) with a left half of 40 and a right half of 200."""
    folder.mkdir(exist_ok=True, parents=True)
    array = np.full((size[1], size[0]), 40, dtype=np.uint8)
    array[:, size[0] // 2 :] = 200
    for i, mode in enumerate(modes):
        PILImage.fromarray(array).convert(mode).save(folder / f"{i}.png")
    return folder


def test_embedded_digits():
    dataset = load_training_data()
    images = decode_images(dataset)
    assert images.shape == (10_000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert dataset["label"][:10] == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as MNIST's training set begins
    assert set(dataset["label"]) == set(range(10))
    assert EMBEDDED_DIGITS.stat().st_size < 3_000_000
    # ink on paper, as the known statistics of MNIST's training set have it
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=0.002)


def test_folder_of_gray_images_stays_gray(tmp_path):
    images = decode_images(load_training_data(train_data_dir=str(save_images(tmp_path / "gray", ["L", "L", "1"]))))
    assert images.shape == (3, 1, 8, 12)
    assert images[0, 0, 0].tolist() == [40] * 6 + [200] * 6


@pytest.mark.parametrize("modes", [["RGB", "RGB"], ["L", "RGB"], ["P", "L"], ["RGBA", "L"]])
def test_other_images_become_rgb(tmp_path, modes):
    images = decode_images(load_training_data(train_data_dir=str(save_images(tmp_path / "color", modes))))
    assert images.shape == (2, 3, 8, 12)
    assert images[:, :, 0].tolist() == [[[40] * 6 + [200] * 6] * 3] * 2


def test_resolution_resizes_and_crops_the_center(tmp_path):
    folder = save_images(tmp_path / "wide", ["L"], size=(24, 8))
    save_images(folder / "tall", ["L"], size=(10, 30))
    images = decode_images(load_training_data(train_data_dir=str(folder)), resolution=8)
    assert images.shape == (2, 1, 8, 8)
    for image in images:
        assert image[0, 4, 0] == 40
        assert image[0, 4, -1] == 200


def test_sizes_must_agree_without_a_resolution(tmp_path):
    folder = save_images(tmp_path / "mixed", ["L"], size=(24, 8))
    save_images(folder / "other", ["L"], size=(10, 30))
    with pytest.raises(ValueError, match=r"`resolution` must be given: the images have 2 sizes .*\(8, 24\)"):
        decode_images(load_training_data(train_data_dir=str(folder)))


def test_dataset_by_name(tmp_path):
    # a folder of Parquet files stands in for a data set of the Hub: `load_dataset` reads both alike
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    dataset = Dataset.from_dict({"photo": [PILImage.fromarray(array)] * 3, "kind": [0, 1, 2]})
    dataset.cast_column("photo", Image()).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    images = decode_images(load_training_data(dataset_name=str(tmp_path)))
    assert torch.equal(images, torch.from_numpy(array).expand(3, 1, 8, 8))


def test_configuration_of_a_dataset(tmp_path):
    for name, value in (("dark", 10), ("light", 240)):
        dataset = Dataset.from_dict({"image": [PILImage.new("L", (4, 4), value)]}).cast_column("image", Image())
        (tmp_path / name).mkdir()
        dataset.to_parquet(tmp_path / name / "train.parquet")
    configs = [{"config_name": n, "data_files": f"{n}/train.parquet"} for n in ("dark", "light")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    images = decode_images(load_training_data(dataset_name=str(tmp_path), dataset_config_name="light"))
    assert images.unique().tolist() == [240]


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="Give `dataset_name` or `train_data_dir`, not both"):
        load_training_data(dataset_name="mnist", train_data_dir="images")
    with pytest.raises(ValueError, match="`dataset_config_name`='plain' needs `dataset_name`"):
        load_training_data(dataset_config_name="plain")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_training_data(train_data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"needs a column of images, .*; it has \{'text': 'string'\}"):
        decode_images(Dataset.from_dict({"text": ["no image"]}))


def test_model_range():
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


# What becomes of an image


def read(image, **arguments):
    """The array that `ImageReader` makes of a PIL image, saved losslessly first."""
    file = io.BytesIO()
    image.save(file, "TIFF" if image.mode == "I;16B" else "PNG")
    return ImageReader("image", **arguments)({"image": {"bytes": file.getvalue(), "path": None}}, (0, 0))[0]


def test_16_bit_images_are_scaled_and_rounded():
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert read(PILImage.fromarray(values)).tolist() == [[[0, 1, 128, 255]]]


def test_transparent_pixels_are_laid_on_white():
    array = np.full((1, 3, 4), 100, dtype=np.uint8)
    array[0, :, 3] = (0, 51, 255)  # not, a fifth and fully opaque
    image = PILImage.fromarray(array)
    assert read(image)[:, 0].tolist() == [[255, 224, 100]] * 3
    assert read(image, channels=1)[:, 0].tolist() == [[255, 224, 100]]
    assert read(image, channels=4)[:, 0].tolist() == [[100] * 3] * 3 + [[0, 51, 255]]
    assert read(image.convert("LA"))[:, 0].tolist() == [[255, 224, 100]]


def test_palettes_become_colors():
    image = PILImage.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert read(image)[:, 0].tolist() == [[10, 40], [20, 50], [30, 60]]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_an_animation_the_first_image_is_read(tmp_path, name):
    frames = [PILImage.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    lossless = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    assert decode_images(load_training_data(train_data_dir=str(tmp_path)))[:, :, 0, 0].tolist() == [[255, 0, 0]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_asked_for(channels):
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        image = PILImage.new("RGB", (2, 1), "white")
        image.putpixel((1, 0), (0, 0, 0))
        expected = [[[255, 0]]] * min(channels, 3) + [[[255, 255]]] * (channels == 4)  # and opaque
        assert read(image.convert(mode), channels=channels).tolist() == expected


def test_random_crop_depends_on_epoch_and_row_alone():
    image = PILImage.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(8, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    row = {"image": {"bytes": file.getvalue(), "path": None}}
    reader = ImageReader("image", resolution=8, random_crop=True)
    lefts = [int(reader(row, (epoch, 0))[0][0, 0, 0]) for epoch in range(300)]
    assert set(lefts) == set(range(33))  # every place, and none beyond
    assert lefts == [int(reader(row, (epoch, 0))[0][0, 0, 0]) for epoch in range(300)]
    assert int(ImageReader("image", resolution=8)(row, (0, 0))[0][0, 0, 0]) == 16


# Which columns


def gray_images(num_rows=12, size=(4, 4), **columns):
    """Row i is a gray image of 10 i."""
    images = [PILImage.new("L", size, 10 * i) for i in range(num_rows)]
    features = Features({"image": Image()} | {name: feature for name, (feature, _) in columns.items()})
    return Dataset.from_dict({"image": images} | {n: v for n, (_, v) in columns.items()}, features=features)


def test_columns_are_found_or_named():
    labels = (ClassLabel(names=["a", "b"]), [0, 1] * 6)
    dataset = gray_images(number=(Value("int64"), list(range(12))), kind=labels, cls=labels)
    assert find_columns(dataset)[1:] == ("image", "kind")
    assert find_columns(dataset, label_column="number")[1:] == ("image", "number")
    assert find_columns(dataset)[0].column_names == ["image", "kind"]
    assert find_columns(gray_images())[1:] == ("image", None)
    with pytest.raises(ValueError, match=r"`image_column`='photo' is not among the data set's columns, \['image', "):
        find_columns(dataset, image_column="photo")
    with pytest.raises(ValueError, match=r"`label_column`='class' is not among"):
        find_columns(dataset, label_column="class")


def test_labels_become_numbers():
    names = gray_images(3, kind=(Value("string"), ["dog", "cat", "dog"]))
    dataset, num_classes = encode_labels(names, "kind")
    assert (dataset["kind"][:], num_classes) == ([1, 0, 1], 2)
    assert encode_labels(gray_images(3, kind=(Value("int64"), [1, 2, 0])), "kind")[1] == 3
    assert encode_labels(gray_images(2, kind=(Value("int64"), [11, 2])), "kind", num_classes=12)[1] == 12
    assert encode_labels(gray_images(2, kind=(ClassLabel(num_classes=7), [1, 2])), "kind")[1] == 7
    with pytest.raises(ValueError, match="`label_column`='kind' holds -1; classes are numbered from 0"):
        encode_labels(gray_images(2, kind=(ClassLabel(num_classes=7), [1, -1])), "kind")
    with pytest.raises(ValueError, match=r"`class_conditional` needs labels: none of the columns \['image'\]"):
        encode_labels(gray_images(), None)
    stream = gray_images(2, kind=(Value("int64"), [1, 2])).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"`label_column`='kind' of the streamed data set is not a ClassLabel"):
        encode_labels(stream, "kind")


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_names_of_either_type_are_classes_and_may_be_missing(kind):
    names = Dataset(pa.table({"kind": pa.array(["dog", None, "cat"], getattr(pa, kind)())}))
    dataset, num_classes = encode_labels(names, "kind")
    assert (dataset["kind"][:], num_classes) == ([1, None, 0], 2)
    dataset, num_classes = encode_labels(names, "kind", ["ant", "cat", "cow", "dog"])  # of another split
    assert (dataset["kind"][:], num_classes) == ([3, None, 1], 4)
    assert find_class_names(dataset, "kind") == ["ant", "cat", "cow", "dog"]
    with pytest.raises(ValueError, match="holds 'dog', which is not among the classes of the training data, ant, cat"):
        encode_labels(names, "kind", ["ant", "cat"])


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_label_means_no_label(streaming):
    """The embedding after those of the classes, which stands for no label."""
    dataset = gray_images(3, kind=(ClassLabel(names=["a", "b"]), [1, None, 0]))
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    dataset, num_classes = encode_labels(find_columns(dataset)[0], "kind")
    images = open_images(dataset, ImageReader("image", "kind", 4, 1, num_classes=num_classes), CPU)
    batch, labels = next(images.batches(3, seed=0))
    assert dict(zip(batch[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == {0: 1, 10: 2, 20: 0}
    with pytest.raises(ValueError, match=r"row \d has no label in `label_column`='kind'"):
        next(open_images(dataset, ImageReader("image", "kind", 4, 1), CPU).batches(3, seed=0))


def test_label_of_a_stream_that_is_no_class():
    dataset = gray_images(3, kind=(ClassLabel(names=["a", "b"]), [1, -1, 0])).to_iterable_dataset()
    dataset, num_classes = encode_labels(find_columns(dataset)[0], "kind")
    images = open_images(dataset, ImageReader("image", "kind", 4, 1, num_classes=num_classes), CPU)
    with pytest.raises(ValueError, match="has -1 in `label_column`='kind'; the classes are numbered from 0 to 1"):
        next(images.batches(3, seed=0))


def test_labels_of_other_types():
    def encode(values, kind=None):
        return encode_labels(Dataset(pa.table({"kind": pa.array(values, kind)})), "kind")

    assert encode([0.0, None, 1.0])[1] == 2  # as pandas writes whole numbers of which some are missing
    assert encode([0.0, float("nan"), 1.0])[1] == 2
    assert encode([True, False])[1] == 2
    with pytest.raises(ValueError, match=r"`label_column`='kind' holds 0\.5; classes are numbered from 0"):
        encode([0.5, 1.0])
    with pytest.raises(ValueError, match="`label_column`='kind' holds lists of int64; it must hold one class a row"):
        encode([[1], [1, 2]])
    with pytest.raises(ValueError, match="`label_column`='kind' holds null"):
        encode([None, None])
    with pytest.raises(ValueError, match="`label_column`='kind' has no label in any row"):
        encode([None, None], pa.int64())
    with pytest.raises(ValueError, match=r"`label_column`='kind' holds a struct of a \(int64\)"):
        encode([{"a": 1}])


def png(value):
    file = io.BytesIO()
    PILImage.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "bytes alone"])
def test_columns_of_encoded_files(kind, streaming):
    """What other writers of parquet files leave behind."""
    files = [png(10 * i) for i in range(3)]
    if kind == "struct":
        column = pa.array([{"bytes": file, "path": None} for file in files])
    elif kind == "bytes alone":
        column = pa.array([{"bytes": file} for file in files])
    else:
        column = pa.array(files, getattr(pa, kind)())
    dataset = Dataset(pa.table({"number": [1, 2, 3], "photo": column}))
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    images = opened(dataset, resolution=4, channels=1)
    assert sorted(take(images, 1, batch_size=3)) == [0, 10, 20]


def test_columns_that_hold_no_image_are_named_with_their_types():
    numbers = {"a": pa.array([[1, 2]]), "b": pa.array([{"x": 1, "bytes": b""}]), "c": pa.array([b""])}
    lists = Dataset.from_dict({"images": [[PILImage.new("L", (4, 4))]]}, features=Features({"images": [Image()]}))
    with pytest.raises(ValueError, match=r"needs a column of images, .*it has \{'images': 'lists of Image'\}"):
        find_columns(lists)
    dataset = Dataset(pa.table(numbers))
    assert find_columns(dataset)[1] == "c"
    with pytest.raises(ValueError, match="`image_column`='a' holds lists of int64; it must hold images"):
        find_columns(dataset, "a")
    with pytest.raises(ValueError, match=r"`image_column`='b' holds a struct of .*x \(int64\)"):
        find_columns(dataset, "b")


# Where images come from


def numbered(folder, *names):
    """Images of values 0, 1, 2 and so on."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (4, 4), i).save(folder / name)
    return folder


def values(folder, **arguments):
    return decode_images(load_training_data(train_data_dir=str(folder), **arguments))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("argument", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names",
    [[f"{i}.png" for i in range(9)] + ["train.png"], ["my_test_shot.png"], ["val-1.png", "train-1.png", "c.png"]],
)
def test_names_of_images_are_no_splits(tmp_path, names, streaming, argument):
    numbered(tmp_path, *names)
    dataset = load_training_data(**{argument: str(tmp_path)}, streaming=streaming)
    images = opened(dataset, resolution=4, channels=1)
    assert sorted(take(images, 1, batch_size=len(names))) == list(range(len(names)))


def test_class_that_is_called_train(tmp_path, capsys):
    numbered(tmp_path, *(f"{kind}/{i}.png" for kind in ("car", "dog", "train") for i in range(8)))
    dataset = load_training_data(train_data_dir=str(tmp_path))
    assert dataset.features["label"].names == ["car", "dog", "train"]
    assert dataset["label"][:] == [0] * 8 + [1] * 8 + [2] * 8
    assert values(tmp_path) == list(range(24))
    assert "train/0.png is not taken for the split 'train'" in capsys.readouterr().out


def test_splits_of_a_folder_and_their_classes(tmp_path):
    folder = numbered(tmp_path / "a", "train/cat/0.png", "train/dog/1.png", "test/dog/0.png", "test/dog/1.png")
    dataset = load_training_data(train_data_dir=str(folder), split="test")
    assert dataset.features["label"].names == ["cat", "dog"]
    assert dataset["label"][:] == [1, 1]
    assert values(folder, split="test") == [2, 3]
    assert values(folder, split="train+test[:50%]") == [0, 1, 2]
    assert values(folder, split="all") == [0, 1, 2, 3]
    folder = numbered(tmp_path / "b", "set/cat/Train/0.png", "set/dog/Train/0.png", "set/dog/Val/0.png")
    dataset = load_training_data(train_data_dir=str(folder))
    assert (dataset.features["label"].names, dataset["label"][:]) == (["cat", "dog"], [0, 1])
    assert values(folder, split="validation") == [2]
    assert values(numbered(tmp_path / "coco", "train2017/0.png", "val2017/0.png")) == [0]
    with pytest.raises(ValueError, match=r"`split`='train': .* has the split\(s\) test\."):
        load_training_data(train_data_dir=str(numbered(tmp_path / "test", "test/0.png")))


def test_splits_that_do_not_divide_a_folder_are_refused(tmp_path):
    numbered(tmp_path, "train/0.png", "test/0.png", "cover.png")
    with pytest.raises(ValueError, match=r"names splits \(.*test: test/0\.png.*\), but they do not divide its 3 files"):
        load_training_data(train_data_dir=str(tmp_path))


def test_splits_of_parquet_files(tmp_path):
    for name, number in (("train-1", 1), ("train-2", 2), ("cifar-test", 3)):
        gray_images(number).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "notes.txt").write_text("by hand")
    assert values(tmp_path) == [0, 0, 10]
    assert values(tmp_path, split="test") == [0, 10, 20]
    gray_images(4).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(ValueError, match="do not divide its 4 files"):
        values(tmp_path)
    (tmp_path / "cifar-test.parquet").unlink()
    assert values(tmp_path) == [0, 10, 20, 30, 0, 0, 10]


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_a_folder(tmp_path, metadata, capsys):
    if metadata.endswith("csv") and datasets.__version__ < "5" and pandas.__version__ >= "3":
        pytest.skip("datasets before 5 takes the strings of pandas 3 for no strings, and says so")
    folder = numbered(tmp_path / "a [1]", "0.png", "train.png", "test.png")
    rows = [("0.png", "x"), ("train.png", "y"), ("test.png", "x")]
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    if metadata.endswith("csv"):
        lines = ["file_name,label"] + [",".join(row) for row in rows]
    (folder / metadata).write_text("\n".join(lines))
    dataset = load_training_data(train_data_dir=str(folder))
    assert sorted(dataset["label"]) == ["x", "x", "y"]
    assert sorted(values(folder)) == [0, 1, 2]
    assert "Left out" not in capsys.readouterr().out


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    numbered(tmp_path, "0.png", "1.JPG")
    PILImage.new("L", (4, 4), 2).save(tmp_path / "2.webp", lossless=True)
    for name in ("0.txt", "1.json", "3.heic", ".hidden", "README.md"):
        (tmp_path / name).write_text("text")
    assert sorted(values(tmp_path)) == [0, 1, 2]
    message = capsys.readouterr().out
    assert "Left out 3 file(s) of" in message
    for part in ("1 .heic", "1 .txt", "1 .json", "3.heic"):
        assert part in message


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_formats_that_pil_reads(tmp_path, capsys):
    PILImage.new("RGB", (4, 4), "white").save(tmp_path / "0.avif")
    numbered(tmp_path, "1.png")
    assert sorted(values(tmp_path)) == [0, 255]
    assert "Left out" not in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["run [1]", "a*b?", "[test]"])
def test_folder_with_signs_of_patterns_in_its_name(tmp_path, name, streaming):
    folder = numbered(tmp_path / name, "0.png", "1.png")
    dataset = load_training_data(train_data_dir=str(folder), streaming=streaming)
    assert [row["image"].getpixel((0, 0)) for row in dataset] == [0, 1]
    gray_images(5).to_parquet(tmp_path / name / "0.parquet")
    dataset = load_training_data(dataset_name=str(folder), streaming=streaming)
    assert [row["image"].getpixel((0, 0)) for row in dataset] == [0, 10, 20, 30, 40]


def test_saved_datasets(tmp_path):
    gray_images(4).save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == [0, 10, 20, 30]
    assert values(tmp_path / "one", split="train[1:3]") == [10, 20]
    DatasetDict(train=gray_images(3), test=gray_images(2)).save_to_disk(tmp_path / "two [2]")
    assert values(tmp_path / "two [2]") == [0, 10, 20]
    assert values(tmp_path / "two [2]", split="test") == [0, 10]
    stream = load_training_data(train_data_dir=str(tmp_path / "two [2]"), streaming=True)
    assert [row["image"].getpixel((0, 0)) for row in stream] == [0, 10, 20]
    with pytest.raises(ValueError, match=r"`split`='validation': .* has the split\(s\) train, test"):
        values(tmp_path / "two [2]", split="validation")


def test_links_are_followed_once(tmp_path):
    numbered(tmp_path / "elsewhere", "0.png", "1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set", target_is_directory=True)
    assert values(tmp_path / "set") == [0, 1]


def test_one_white_for_all_images(tmp_path):
    for i, (dtype, high) in enumerate([("int32", 200), ("int32", 60_000), ("float32", 0.5), ("float32", 200)]):
        PILImage.fromarray(np.array([[0, high]], dtype)).save(tmp_path / f"{i}.tiff")
    paths = {i: str(tmp_path / f"{i}.tiff") for i in range(4)}

    def dataset(*numbers):
        return Dataset.from_dict({"image": [paths[i] for i in numbers]}).cast_column("image", Image())

    assert decode_images(dataset(0, 2))[:, 0, 0].tolist() == [[0, 200], [0, 128]]
    assert decode_images(dataset(1, 3))[:, 0, 0].tolist() == [[0, 233], [0, 200]]
    for first, second in ((0, 1), (2, 3)):
        with pytest.raises(ValueError, match=rf"different values of white, .*{first}\.tiff .*{second}\.tiff"):
            decode_images(dataset(first, second))
        stream = opened(dataset(first, second).to_iterable_dataset(), resolution=1, channels=1)
        with pytest.raises(ValueError, match="different values of white"):
            next(stream.batches(2, seed=0))


def test_splits_and_streams(tmp_path):
    numbered(tmp_path / "set", *(f"train/{i}.png" for i in range(4)), "test/0.png", "test/1.png")
    folder = str(tmp_path / "set")
    assert values(folder, split="test") == [4, 5]
    assert values(folder, split="train[:75%]") == [0, 1, 2]
    stream = load_training_data(dataset_name=folder, streaming=True)
    assert [row["image"].getpixel((0, 0)) for row in stream] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="validation"):
        load_training_data(train_data_dir=folder, split="validation")


def test_parquet_folder(tmp_path):
    gray_images(kind=(ClassLabel(names=["a", "b"]), [0, 1] * 6)).to_parquet(tmp_path / "train.parquet")
    dataset, _, label_column = find_columns(load_training_data(train_data_dir=str(tmp_path)))
    images = open_images(dataset, ImageReader("image", label_column), CPU)
    assert images.images[:, 0, 0, 0].tolist() == [10 * i for i in range(12)]
    assert images.labels.tolist() == [0, 1] * 6


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_folder(tmp_path, streaming):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(3):
            file = io.BytesIO()
            PILImage.new("RGB", (8, 8), (i, 0, 255)).save(file, "PNG")
            for name, content in ((f"{i}.png", file.getvalue()), (f"{i}.cls", str(i).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    dataset, image_column, label_column = find_columns(
        load_training_data(train_data_dir=str(tmp_path), streaming=streaming)
    )
    assert (image_column, label_column) == ("png", "cls")
    images = open_images(dataset, ImageReader("png", "cls", resolution=8), CPU)
    batch, labels = next(images.batches(3, seed=0))
    assert batch.shape == (3, 3, 8, 8)
    assert batch[:, 0, 0, 0].tolist() == labels.tolist()
    assert sorted(labels.tolist()) == [0, 1, 2]


def archive(folder, *names):
    """A WebDataset of images of values 0, 10, 20 and so on, and of labels, the first digits of their files' names."""
    folder.mkdir()
    images = itertools.count()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name in names:
            content = name[0].encode() if name.endswith("cls") else png(10 * next(images))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return load_training_data(train_data_dir=str(folder))


def test_images_of_a_webdataset_are_one_column(tmp_path):
    dots = archive(tmp_path / "dots", "img.0.png", "img.1.png", "img.2.png")
    with pytest.raises(ValueError, match=r"3 columns of images: .* one of 0\.png, 1\.png, 2\.png\..*the first dot"):
        find_columns(dots)
    pairs = archive(tmp_path / "pairs", "0.seg.png", "0.png", "1.seg.png", "1.png")
    with pytest.raises(ValueError, match=r"2 columns of images: `image_column` names one of seg\.png, png"):
        find_columns(pairs)
    dataset, *_ = find_columns(pairs, "png")
    assert sorted(opened(dataset).images[:, 0, 0, 0].tolist()) == [10, 30]
    with pytest.raises(ValueError, match=r"images of 2 types \(2 \.png, 1 \.jpg\)"):
        archive(tmp_path / "mixed", "0.png", "1.jpg", "2.png")


def test_labels_that_the_first_samples_of_a_webdataset_lack(tmp_path):
    dataset = archive(tmp_path / "set", *(f"{i}.png" for i in range(6)), "6.png", "6.cls")
    dataset, image_column, label_column = find_columns(dataset)
    assert (image_column, label_column) == ("png", "cls")
    assert dataset["cls"][:] == [None] * 6 + [6]


def test_archive_that_is_none(tmp_path):
    (tmp_path / "0.tar").write_text("no archive" * 100)
    with pytest.raises(ValueError, match=r"0\.tar is no readable \.tar archive"):
        load_training_data(train_data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("names", "classes", "labels", "said"),
    [
        (["train/a/images/0.png", "train/b/images/1.png", "val/images/2.png"], ["a", "b"], [0, 1], ""),
        (["cat/2020/0.png", "dog/2020/1.png"], ["cat", "dog"], [0, 1], ""),
        (["cat/2020/0.png", "cat/2021/1.png", "dog/2020/2.png"], None, None, "outer or an inner one of cat/2020"),
        (["x/cat/0.png", "x/dog/1.png", "y/rose/2.png"], ["cat", "dog", "rose"], [0, 1, 2], "'cat' for one in x/cat"),
        (["cat/0.png", "dog/a/1.png"], None, None, "images lie at several depths"),
    ],
)
def test_folders_of_classes(tmp_path, capsys, names, classes, labels, said):
    dataset = load_training_data(train_data_dir=str(numbered(tmp_path / "set", *names)))
    assert (dataset.features["label"].names if "label" in dataset.features else None) == classes
    assert (dataset["label"][:] if classes else None) == labels
    output = capsys.readouterr().out
    assert said in output if said else "class" not in output


def test_metadata_that_leaves_its_folder(tmp_path):
    numbered(tmp_path, "set/0.png", "1.png")
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "../1.png", "label": "a"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl of .* cannot be used: .*\.\./1\.png"):
        load_training_data(train_data_dir=str(tmp_path / "set"))


def test_labels_that_number_the_rows_are_refused():
    def encode(values, kind):
        return encode_labels(gray_images(len(values), (1, 1), kind=(kind, values)), "kind")

    with pytest.raises(ValueError, match="`label_column`='kind' would make 3,000,001 classes of 2 rows"):
        encode([5, 3_000_000], Value("int64"))
    with pytest.raises(ValueError, match="holds whole numbers up to 2, of which 1 occur in no row, the first 1"):
        encode([0, 2, 2], Value("int64"))
    with pytest.raises(ValueError, match=r"would make 1,200 classes of 1,200 rows"):
        encode([f"a{i}" for i in range(1200)], Value("string"))
    assert encode([i // 2 for i in range(2400)], Value("int64"))[1] == 1200
    labels = (ClassLabel(names=["a", "b"]), [0, 1, 1])
    with pytest.raises(ValueError, match="2 columns of class labels: `label_column` names one of kind, cls"):
        check_label_column(gray_images(3, kind=labels, cls=labels), None)
    check_label_column(gray_images(3, kind=labels, cls=labels), "cls")
    with pytest.raises(ValueError, match=r"`label_column`='kind' would make 2,000 classes of 2 rows"):
        check_label_column(gray_images(2, kind=(ClassLabel(num_classes=2000), [5, 3])), None)


# Images of too many pixels, and files that are none


def test_images_of_too_many_pixels_are_not_decoded(monkeypatch):
    file = io.BytesIO()
    PILImage.fromarray(np.full((40, 40), 40_000, np.uint16)).save(file, "PNG")
    row = {"image": {"bytes": file.getvalue(), "path": None}}
    with monkeypatch.context() as patch:
        patch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1000)
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("it is decoded"))
        with pytest.raises(UnreadableImageError, match=r"row 3: .* 40×40 pixels, more than the limit of 1,000"):
            ImageReader("image", resolution=4)(row, (0, 3))
    with monkeypatch.context() as patch:
        patch.setattr(PILImage, "MAX_IMAGE_PIXELS", None)
        assert ImageReader("image", resolution=4)(row, (0, 3))[0].shape == (1, 4, 4)


def test_large_jpeg_files_are_decoded_at_a_reduced_size(monkeypatch):
    array = np.zeros((64, 64), np.uint8)
    array[:, 32:] = 200
    file = io.BytesIO()
    PILImage.fromarray(array).save(file, "JPEG", quality=95)
    row = {"image": {"bytes": file.getvalue(), "path": None}}
    whole = ImageReader("image", resolution=8)(row, (0, 0))[0]
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 3000)
    reduced = ImageReader("image", resolution=8)(row, (0, 0))[0]
    assert np.abs(reduced.astype(int) - whole).max() <= 10
    with pytest.raises(UnreadableImageError, match="64×64 pixels, more than the limit of 3,000"):
        ImageReader("image")(row, (0, 0))


def test_a_pipe_is_no_image(tmp_path):
    numbered(tmp_path, "0.png")
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png \(row 1\): ValueError: it is no regular file"):
        values(tmp_path)


# Opening


def opened(dataset, resolution=None, seed=0, channels=None, **arguments):
    dataset, *columns = find_columns(dataset)
    return open_images(dataset, ImageReader(*columns, resolution, channels, seed=seed), CPU, **arguments)


def take(images, num_batches, batch_size=5, seed=3, first_batch=0):
    batches = images.batches(batch_size, seed, first_batch)
    return torch.cat([next(batches)[0][:, 0, 0, 0] for _ in range(num_batches)]).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_and_loaded_images_come_in_the_same_order(num_workers):
    cached = opened(gray_images(), num_workers=num_workers)
    loaded = opened(gray_images(), num_workers=num_workers, max_cache_gb=0)
    assert (type(cached), type(loaded)) == (CachedImages, LoadedImages)
    assert cached.shape == loaded.shape == (1, 4, 4)
    order = take(cached, 6)
    assert order == take(loaded, 6)
    for epoch in (order[:10], order[10:20], order[20:]):
        assert len(set(epoch)) == 10  # two batches of an epoch of 12 share no image
    assert order[:10] != order[10:20]
    assert order[15:] == take(cached, 3, first_batch=3) == take(loaded, 3, first_batch=3)
    assert order != take(cached, 6, seed=4)
    assert torch.equal(cached.sample(3), loaded.sample(3))
    assert cached.sample(3)[:, 0, 0, 0].tolist() == [0, 60, 110]
    assert cached.sample(100)[:, 0, 0, 0].tolist() == [10 * i for i in range(12)]


def test_processes_take_turns(monkeypatch):
    PartialState()
    alone = [part for _, part in zip(range(6), BatchOrder(48, 8, 0).slices(), strict=False)]
    shares = []
    for index in (0, 1):
        monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
        monkeypatch.setitem(PartialState._shared_state, "process_index", index)
        shares.append([part for _, part in zip(range(6), BatchOrder(48, 4, 0).slices(), strict=False)])
    for (epoch, whole), (epoch_0, first), (epoch_1, second) in zip(alone, *shares, strict=True):
        assert epoch == epoch_0 == epoch_1
        assert (first.start, first.stop, second.stop) == (whole.start, second.start, whole.stop)


def test_gray_and_color_share_a_shape():
    dataset = gray_images(2)
    mixed = Dataset.from_dict({"image": [dataset[1]["image"], PILImage.new("RGB", (4, 4), "red")]})
    mixed = mixed.cast_column("image", Image())
    assert opened(mixed).images[:, :, 0, 0].tolist() == [[10, 10, 10], [255, 0, 0]]
    loaded = opened(mixed, max_cache_gb=0)
    assert sorted(next(loaded.batches(2, 0))[0][:, :, 0, 0].tolist()) == [[10, 10, 10], [255, 0, 0]]


def test_random_crops_are_not_cached():
    """Each epoch cuts anew: over many of them, from every place."""
    ramp = PILImage.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(4, 0))
    dataset, *columns = find_columns(Dataset.from_dict({"image": [ramp]}).cast_column("image", Image()))
    images = open_images(dataset, ImageReader(*columns, 4, random_crop=True), CPU)
    assert isinstance(images, LoadedImages)
    rows = {tuple(batch[0, 0, 0].tolist()) for batch, _ in itertools.islice(images.batches(1, seed=0), 60)}
    assert rows == {tuple(range(i, i + 4)) for i in range(5)}


@pytest.fixture
def broken(tmp_path):
    """Ten images, of which 3.png is cut short and 7.png is none."""
    folder = save_images(tmp_path / "broken", ["L"] * 10)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (folder / "7.png").write_text("not an image")
    return str(folder)


@pytest.mark.parametrize("max_cache_gb", [1, 0])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_images_are_named_before_training(broken, capsys, max_cache_gb, num_workers):
    arguments = {"max_cache_gb": max_cache_gb, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"2 of 10 images cannot be read.*`corrupt_images`='skip'") as error:
        opened(load_training_data(train_data_dir=broken), **arguments)
    assert "3.png" in str(error.value)
    assert "7.png" in str(error.value)
    images = opened(load_training_data(train_data_dir=broken), corrupt_images="skip", **arguments)
    assert len(images) == 8
    assert take(images, 2, batch_size=4) == [40] * 8
    assert "Left out 2 of 10 images" in capsys.readouterr().out


def test_corrupt_images_of_a_stream(broken, capsys):
    stream = load_training_data(train_data_dir=broken, streaming=True)
    images = opened(stream, resolution=8, channels=1, corrupt_images="skip")
    assert take(images, 4) == [40] * 20
    assert capsys.readouterr().out.count("3.png") >= 2  # once an epoch
    with pytest.raises(UnreadableImageError, match=r"(3|7)\.png"):
        take(opened(stream, resolution=8, channels=1), 4)


def test_no_image():
    with pytest.raises(ValueError, match="The data set has no image"):
        opened(gray_images(0))
    with pytest.raises(ValueError, match="The data set has no readable image"):
        opened(gray_images(1).to_iterable_dataset().filter(lambda _: False), resolution=4)


# Streams


def stream(num_rows=30):
    return gray_images(num_rows - 5).to_iterable_dataset(num_shards=3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_is_shuffled_and_goes_on_where_it_stopped(num_workers):
    images = opened(stream(), resolution=4, channels=1, num_workers=num_workers)
    assert isinstance(images, StreamedImages)
    batches = images.batches(10, seed=0)
    seen = torch.cat([next(batches)[0][:, 0, 0, 0] for _ in range(3)])
    position = images.position
    following = [next(batches)[0][:, 0, 0, 0].tolist() for _ in range(3)]
    assert sorted(seen[:25].tolist()) == [10 * i for i in range(25)]  # an epoch is every image once
    assert seen[:25].tolist() != sorted(seen[:25].tolist())
    assert position == [1, 5]

    again = opened(stream(), resolution=4, channels=1, num_workers=num_workers)
    again.position = position
    batches = again.batches(10, seed=0)
    assert [next(batches)[0][:, 0, 0, 0].tolist() for _ in range(3)] == following
    other = opened(stream(), resolution=4, channels=1, num_workers=num_workers, seed=1)
    assert next(other.batches(10, seed=0))[0][:, 0, 0, 0].tolist() != seen[:10].tolist()


def test_stream_needs_a_resolution_and_finds_its_channels():
    with pytest.raises(ValueError, match="`streaming` needs `resolution`"):
        opened(stream())
    assert opened(stream(), resolution=4, channels=1).shape == (1, 4, 4)
    sample = opened(stream(), resolution=4, channels=1).sample(7)
    assert torch.equal(sample, torch.arange(0, 70, 10, dtype=torch.uint8)[:, None, None, None].expand(7, 1, 4, 4))


def test_stream_that_begins_gray_is_not_taken_for_gray():
    images = [PILImage.new("L", (4, 4), 9), PILImage.new("RGB", (4, 4), "red")]
    mixed = Dataset.from_dict({"image": images}).cast_column("image", Image())
    with pytest.raises(ValueError, match="`streaming` needs `channels`, 1 or 3: the first image is gray"):
        opened(mixed.to_iterable_dataset(), resolution=4)
    color = opened(mixed.select([1, 0]).to_iterable_dataset(), resolution=4)
    assert sorted(next(color.batches(2, 0))[0][:, :, 0, 0].tolist()) == [[9, 9, 9], [255, 0, 0]]


def test_first_image_of_a_stream_may_be_corrupt(tmp_path):
    folder = save_images(tmp_path / "set", ["RGB"] * 3)
    (folder / "0.png").write_text("not an image")
    stream = load_training_data(train_data_dir=str(folder), streaming=True)
    images = opened(stream, resolution=8, corrupt_images="skip")
    assert images.shape == (3, 8, 8)
    assert take(images, 2, batch_size=2) == [40] * 4
    with pytest.raises(UnreadableImageError, match=r"0\.png"):
        opened(stream, resolution=8)


def test_numbers_of_images_and_classes_are_printed_at_the_start(tmp_path, capsys):
    numbered(tmp_path / "set", *(f"{kind}/{i}.png" for kind in ("car", "dog", "train") for i in range(8)))
    arguments = {"train_data_dir": str(tmp_path / "set"), "output_dir": str(tmp_path / "out"), "max_train_steps": 1}
    train(small_config(resolution=8, class_conditional=True, **arguments))
    assert "Training on 24 images (1 channels, 8×8) of 3 classes, from `image` and `label`." in capsys.readouterr().out
