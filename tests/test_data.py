import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from ncsn_diffusers.data import EMBEDDED_DIGITS, decode_images, load_training_data, to_model_range


def save_pictures(folder, modes, size=(12, 8)):
    """Pictures (width, height) with a left half of 40 and a right half of 200."""
    folder.mkdir(exist_ok=True)
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
    assert len(set(dataset["label"])) == 10
    assert EMBEDDED_DIGITS.stat().st_size < 3_000_000
    # ink on paper, as the known statistics of MNIST's training set have it
    assert images.float().mean().item() / 255 == pytest.approx(0.1307, abs=0.002)


def test_folder_of_gray_pictures_stays_gray(tmp_path):
    images = decode_images(load_training_data(train_data_dir=str(save_pictures(tmp_path / "gray", ["L", "L", "1"]))))
    assert images.shape == (3, 1, 8, 12)
    assert images[0, 0, 0].tolist() == [40] * 6 + [200] * 6


@pytest.mark.parametrize("modes", [["RGB", "RGB"], ["L", "RGB"], ["P", "L"], ["RGBA", "L"]])
def test_other_pictures_become_rgb(tmp_path, modes):
    images = decode_images(load_training_data(train_data_dir=str(save_pictures(tmp_path / "colour", modes))))
    assert images.shape == (2, 3, 8, 12)
    assert images[:, :, 0].tolist() == [[[40] * 6 + [200] * 6] * 3] * 2


def test_resolution_resizes_and_crops_the_centre(tmp_path):
    folder = save_pictures(tmp_path / "wide", ["L"], size=(24, 8))
    save_pictures(folder / "tall", ["L"], size=(10, 30))
    images = decode_images(load_training_data(train_data_dir=str(folder)), resolution=8)
    assert images.shape == (2, 1, 8, 8)
    for image in images:
        assert image[0, 4, 0] == 40
        assert image[0, 4, -1] == 200


def test_sizes_must_agree_without_a_resolution(tmp_path):
    folder = save_pictures(tmp_path / "mixed", ["L"], size=(24, 8))
    save_pictures(folder / "other", ["L"], size=(10, 30))
    with pytest.raises(ValueError, match=r"`resolution` must be given: the pictures have 2 sizes .*\(8, 24\)"):
        decode_images(load_training_data(train_data_dir=str(folder)))


def test_dataset_by_name(tmp_path):
    # a folder of Parquet files stands in for a data set of the Hub: `load_dataset` reads both alike
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    dataset = Dataset.from_dict({"picture": [PILImage.fromarray(array)] * 3, "kind": [0, 1, 2]})
    dataset.cast_column("picture", Image()).to_parquet(tmp_path / "train-00000-of-00001.parquet")
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
        load_training_data(dataset_name="mnist", train_data_dir="pictures")
    with pytest.raises(ValueError, match="`dataset_config_name`='plain' needs `dataset_name`"):
        load_training_data(dataset_config_name="plain")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_training_data(train_data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"needs a column of pictures .* columns \['text'\]"):
        decode_images(Dataset.from_dict({"text": ["no picture"]}))


def test_model_range():
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
