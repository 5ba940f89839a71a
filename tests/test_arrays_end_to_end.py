"""From arrays to samples by the commands: signals, maps and volumes, in their own units."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, GaussianResidualModel, NCSNPipeline, UNetNDModel
from ncsn_diffusers.commands.sample import main as sample
from ncsn_diffusers.commands.train import main as train
from ncsn_diffusers.sheets import plot_fields

# channels and sizes; each channel has a mean and a standard deviation far from an image's
SHAPES = [(2, 12), (1, 37, 49), (2, 4, 6, 5)]
MEANS, STDS = [280.0, 2e-6], [12.0, 1e-6]


@pytest.fixture(autouse=True)
def one_process():
    AcceleratorState._reset_state(reset_partial_state=True)


def make_data(shape, num=60, seed=0):
    rng = np.random.default_rng(seed)
    mean, std = (np.array(values[: shape[0]]).reshape(-1, *[1] * (len(shape) - 1)) for values in (MEANS, STDS))
    return (mean + std * rng.standard_normal((num, *shape))).astype(np.float32)


def flags(**arguments):
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


# --- train ---


@pytest.mark.parametrize("shape", SHAPES)
def test_training_on_arrays_saves_their_units(shape, tmp_path, capsys):
    data = make_data(shape)
    np.save(tmp_path / "data.npy", data)
    settings = {"train_arrays": tmp_path / "data.npy", "data_unit": "K", "output_dir": tmp_path / "run"}
    settings |= {"block_out_channels": (8, 8), "max_train_steps": 3, "train_batch_size": 4, "mixed_precision": "no"}
    train(flags(**settings, eval_batch_size=2, lr_warmup_steps=1))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "run")
    axes = (0, *range(2, data.ndim))
    assert pipe.units.data_mean == pytest.approx(data.mean(axes, dtype=float).tolist(), rel=1e-9)
    assert pipe.units.data_std == pytest.approx(data.std(axes, dtype=float).tolist(), rel=1e-9)
    assert pipe.units.name == "K" and pipe.units.value_range is None
    assert pipe.sample_shape == shape and isinstance(pipe.unet, UNetNDModel)
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["train_arrays"].endswith("data.npy")
    # an untrained network returns about what it is given: values of the data's size, in the data's units
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(8, 10, generator=torch.Generator().manual_seed(0)).images
    for channel in range(shape[0]):
        distance = np.abs(drawn[:, channel] - MEANS[channel]) / STDS[channel]
        assert 0.05 < distance.mean() < 20
    assert any((tmp_path / "run").rglob("*.png"))


# --- sample ---


def save_gaussian(shape, folder):
    """A pipeline that draws white noise of `MEANS` and `STDS`, exactly."""
    unet = GaussianResidualModel(shape[1:], shape[0], rank=0)
    unet.remainder.fill_(0.25)
    pipe = NCSNPipeline(
        unet,
        AnnealedLangevinScheduler(),
        MEANS[: shape[0]],
        STDS[: shape[0]],
        None,
        "K",
        num_inference_steps=20,
    )
    pipe.save_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_saved_in_the_units_of_the_data(shape, tmp_path, capsys):
    save_gaussian(shape, tmp_path / "pipeline")
    sample([str(tmp_path / "pipeline"), *flags(num_images=40, output_dir=tmp_path / "out", dtype="float32")])
    assert f"Saved 40 samples in {tmp_path / 'out'}" in capsys.readouterr().out
    drawn = np.load(tmp_path / "out" / "samples.npy")
    assert drawn.shape == (40, *shape) and drawn.dtype == np.float32
    for channel in range(shape[0]):
        values = drawn[:, channel].astype(float)
        error = STDS[channel] / values.size**0.5
        assert values.mean() == pytest.approx(MEANS[channel], abs=5 * error)
        assert values.std() == pytest.approx(STDS[channel], rel=0.12)  # of 20 levels, and few numbers
    pipe = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    np.testing.assert_allclose(drawn[:3], pipe(3, generator=generators).images, rtol=1e-4)
    sheet = Image.open(tmp_path / "out" / "samples.png")
    assert np.array_equal(np.asarray(sheet), np.asarray(plot_fields(drawn[:24], "K")))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_in_a_file(shape, tmp_path):
    save_gaussian(shape, tmp_path / "pipeline")
    arguments = flags(num_images=3, batch_size=2, output_dir=tmp_path / "out", num_inference_steps=2)
    sample([str(tmp_path / "pipeline"), *arguments, "--save_images", "--no_save_grid"])
    together = np.load(tmp_path / "out" / "samples.npy")
    for i in range(3):
        assert np.array_equal(np.load(tmp_path / "out" / f"{i:05d}.npy"), together[i])
    assert not (tmp_path / "out" / "samples.png").exists()


@pytest.mark.parametrize("animation", ["gif", "filmstrip"])
def test_an_animation_is_for_images(animation, tmp_path):
    save_gaussian((1, 12), tmp_path / "pipeline")
    with pytest.raises(
        SystemExit, match=f"--animation='{animation}' is for images, and this pipeline draws other data"
    ):
        sample([str(tmp_path / "pipeline"), *flags(output_dir=tmp_path / "out", animation=animation)])
    assert not (tmp_path / "out").exists()


# What a picture shows is known where its data are: two values, 0 and 1, of which each panel has its own.


def colors_of(samples):
    image = np.asarray(plot_fields(samples, "K")).reshape(-1, 3)
    return {
        tuple(color)
        for color, number in zip(*np.unique(image, axis=0, return_counts=True), strict=True)
        if number > 300
    }


DARK, BRIGHT = (68, 1, 84), (253, 231, 36)  # the ends of viridis


def test_maps_are_shown_in_colors():
    samples = np.zeros((2, 1, 5, 8), np.float32)
    samples[1] = 300
    assert {DARK, BRIGHT} <= colors_of(samples)


def test_volumes_are_shown_by_their_middle_slice():
    samples = np.full((2, 1, 5, 6, 8), 150, np.float32)
    samples[0, :, 2], samples[1, :, 2] = 0, 300
    assert {DARK, BRIGHT} <= colors_of(samples)
    ends = np.full((2, 1, 5, 6, 8), 150, np.float32)
    ends[0, :, :2], ends[1, :, 3:] = 0, 300
    assert not {DARK, BRIGHT} <= colors_of(ends)


def test_channels_have_color_bars_of_their_own():
    samples = np.zeros((2, 2, 5, 8), np.float32)
    samples[1, 0], samples[1, 1] = 300, 1e-6  # the small one is not flat beside the large one
    image = np.asarray(plot_fields(samples, "K")).astype(int)
    rows = [half for half in np.array_split(image, 2)]
    for half in rows:
        assert ((half == BRIGHT).all(-1)).sum() > 1000 and ((half == DARK).all(-1)).sum() > 1000


def test_signals_are_shown_as_lines():
    samples = np.zeros((1, 1, 50), np.float32)
    samples[0, 0, 25:] = 1
    image = np.asarray(plot_fields(samples, "K")).astype(int)
    blue = (image == (31, 119, 180)).all(-1)
    columns = np.flatnonzero(blue.any(0))
    left, right = columns[: len(columns) // 3], columns[-(len(columns) // 3) :]
    assert np.flatnonzero(blue[:, left].any(1)).min() > np.flatnonzero(blue[:, right].any(1)).max()  # 0 below 1


# --- train from scratch ---


@pytest.mark.slow  # minutes
def test_autoregressive_signals_trained_from_scratch(tmp_path):
    correlation, length = 0.8, 32
    rng = np.random.default_rng(0)
    data = np.empty((20_000, 1, length))
    data[..., 0] = rng.standard_normal((20_000, 1))
    for i in range(1, length):
        innovation = math.sqrt(1 - correlation**2) * rng.standard_normal((20_000, 1))
        data[..., i] = correlation * data[..., i - 1] + innovation
    np.save(tmp_path / "data.npy", 280 + 12 * data)
    settings = {"train_arrays": tmp_path / "data.npy", "output_dir": tmp_path / "run", "block_out_channels": (32, 64)}
    settings |= {"max_train_steps": 1500, "train_batch_size": 64, "mixed_precision": "no", "eval_batch_size": 1}
    train(flags(**settings, checkpointing_steps=0, learning_rate=2e-3))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "run")
    pipe.set_progress_bar_config(disable=True)
    x = torch.from_numpy(pipe(2000, 50, generator=torch.Generator().manual_seed(1)).images[:, 0]).double()
    assert x.mean().item() == pytest.approx(280, abs=0.6)
    assert x.std().item() == pytest.approx(12, rel=0.05)
    x = (x - x.mean()) / x.std()
    for lag in range(1, 6):
        found = (x[:, lag:] * x[:, :-lag]).mean().item()
        print(f"lag {lag}: {found:.4f}, right: {correlation**lag:.4f}")
        assert found == pytest.approx(correlation**lag, rel=0.05)
