"""An evaluation of signals, maps and volumes: against exact networks, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ncsn_diffusers import AnnealedLangevinScheduler, GaussianResidualModel, NCSNPipeline
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.evaluation import EvaluateConfig, evaluate
from ncsn_diffusers.evaluation.fields import compare_fields
from ncsn_diffusers.likelihood import nats_per_number

pytest.importorskip("torch_fidelity")

SHAPES = [(2, 16), (1, 7, 9), (1, 4, 6, 5)]
MEANS, STDS = [280.0, 2e-6], [12.0, 1e-6]
QUICK = {"num_images": 200, "batch_size": 200, "num_inference_steps": 100, "loss_images": 0}


@pytest.fixture(autouse=True)
def one_process():
    AcceleratorState._reset_state(reset_partial_state=True)


def per_channel(values, shape):
    return np.array(values[: shape[0]]).reshape(-1, *[1] * (len(shape) - 1))


def make_noise(shape, num, seed):
    """White noise of `MEANS` and `STDS`."""
    z = np.random.default_rng(seed).standard_normal((num, *shape))
    return per_channel(MEANS, shape) + per_channel(STDS, shape) * z


def save_pipeline(folder, shape, **arguments):
    """One that draws such noise, exactly."""
    unet = GaussianResidualModel(shape[1:], shape[0], rank=0)
    unet.remainder.fill_(0.25)
    units = (MEANS[: shape[0]], STDS[: shape[0]], None, "K")
    NCSNPipeline(unet, AnnealedLangevinScheduler(), *units, **arguments).save_pretrained(folder)
    return folder


def run(folder, **arguments):
    return evaluate(EvaluateConfig(str(folder / "pipeline"), output_dir=str(folder / "out"), **QUICK | arguments))


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{len(shape) - 1}-D")
def case(request, tmp_path):
    """A folder with a pipeline, and data that are its own: 400 to compare with and 300 held out."""
    np.save(tmp_path / "train.npy", make_noise(request.param, 400, 0))
    np.save(tmp_path / "held_out.npy", make_noise(request.param, 300, 1))
    save_pipeline(tmp_path / "pipeline", request.param)
    return tmp_path, request.param


# --- What it writes ---


def test_the_exact_network_is_called_right(case, capsys):
    folder, shape = case
    arguments = {"train_arrays": str(folder / "train.npy"), "validation_arrays": str(folder / "held_out.npy")}
    arguments |= {"posterior": ("stations", "missing-pixels"), "posterior_images": 40, "posterior_steps": 40}
    found = run(folder, **arguments, loss_images=50, bits_per_dim=20)
    assert "No difference between 200 samples and held-out real data was found" in capsys.readouterr().out
    # the library's numbers
    reference, held_out = (
        torch.from_numpy(np.load(folder / f"{name}.npy"))[torch.randperm(size, generator=seeded(seed))[:most]]
        for name, size, seed, most in (("train", 400, 0, 400), ("held_out", 300, 1, 200))
    )
    samples = load_file(folder / "out" / "samples" / "00000000-00000200.safetensors")["samples"]
    for name, data in (("samples", samples.double()), ("floor", held_out)):
        comparison = compare_fields(reference, data, "K")
        for metric in comparison.metrics:
            assert found[name][metric.key] == pytest.approx(metric.value, rel=1e-6), metric.key
        np.testing.assert_allclose(found["spectrum"][name]["ratios"], comparison.ratios, rtol=1e-6)
    # white noise: each value as it is drawn, and the same power at all wavelengths
    for channel in range(shape[0]):
        values = samples[:, channel].double()
        assert values.std().item() == pytest.approx(STDS[channel], rel=0.05)
        assert found["samples"][f"wasserstein_{channel}"] < 0.08 * STDS[channel]
    assert np.abs(np.array(found["spectrum"]["samples"]["ratios"]) - 1).max() < 0.25
    # the loss and the likelihood of a Gaussian
    for level in found["loss_per_level"]:
        exact = 0.5 * 0.25 / (0.25 + level["sigma"] ** 2)
        assert level["loss"] == pytest.approx(exact, abs=5 * level["standard_error"] + 1e-6)
    entropy = np.mean([0.5 * math.log(2 * math.pi * math.e * std**2) for std in STDS[: shape[0]]])
    nats = found["nats_per_number"]
    assert nats["mean"] == pytest.approx(entropy, abs=4 * nats["standard_error"])
    assert nats["number"] == 20
    # the posterior is the prior where nothing was measured, and narrow where it was
    operators = found["posterior"]["operators"]
    assert len(operators) == 2 * shape[0]
    assert found["posterior"]["noise_std"] == pytest.approx([0.1 * std for std in STDS[: shape[0]]])
    for name, result in operators.items():
        assert result["coverage"] == pytest.approx(7 / 9, abs=0.04), name
        assert result["exact"]["coverage"] == pytest.approx(7 / 9, abs=0.04)
        assert result["spread_over_error"] == pytest.approx(1, abs=0.06)
        std = STDS[int(name[-1])] if shape[0] > 1 else STDS[0]
        share = 0.95 if name.startswith("stations") else 0.7
        # the CRPS of a standard normal is 1/√π, for 8 samples as for many
        assert result["crps"] == pytest.approx(std / math.sqrt(math.pi) * (share + (1 - share) * 0.1), rel=0.12)
    report = (folder / "out" / "report.md").read_text()
    assert "held out: 200 of `held_out.npy`" in report and "Reference: 400 of `train` of train.npy" in report
    assert "CRPS (K)" in report and "nats per number" in report
    for name in ("samples", "neighbors", "spectrum", "losses", "reliability"):
        assert Image.open(folder / "out" / f"{name}.png").width > 400
        assert f"({name}.png)" in report


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_what_is_wrong_is_said_in_the_units_of_the_data(tmp_path, capsys):
    shape = (1, 7, 9)
    save_pipeline(tmp_path / "pipeline", shape)
    np.save(tmp_path / "warm.npy", make_noise(shape, 300, 0) + 5)
    found = run(tmp_path, train_arrays=str(tmp_path / "warm.npy"))
    assert found["samples"]["wasserstein_0"] == pytest.approx(5, rel=0.1)  # kelvin
    assert "200 samples differ from real data: Wasserstein-1 distance of the values (K)" in capsys.readouterr().out


def test_a_wrong_spectrum_is_said_with_its_wavelengths(tmp_path, capsys):
    """The same values one by one, but smooth: the pipeline's white noise has too much power at short wavelengths."""
    shape, rng = (1, 16), np.random.default_rng(0)
    save_pipeline(tmp_path / "pipeline", shape)
    z = rng.standard_normal((400, 1, 16))
    for i in range(1, 16):
        z[..., i] = 0.8 * z[..., i - 1] + 0.6 * z[..., i]
    np.save(tmp_path / "smooth.npy", 280 + 12 * z)
    found = run(tmp_path, train_arrays=str(tmp_path / "smooth.npy"))
    said = capsys.readouterr().out
    assert "Wasserstein" not in said and "power" in said and "at wavelengths of 2 to" in said
    assert found["spectrum"]["samples"]["ratios"][0][-1] > 5


# --- The data ---


def test_the_runs_own_arrays_are_the_default(tmp_path, capsys):
    shape = (1, 7, 9)
    save_pipeline(tmp_path / "pipeline", shape)
    data = make_noise(shape, 200, 0)[:, 0]
    np.savez(tmp_path / "data.npz", other=np.zeros(3), field=data)
    recorded = {"train_arrays": str(tmp_path / "data.npz"), "array_key": "field", "channel_axis": "none"}
    recorded |= {"train_split": "train[:75%]", "validation_split": "train[75%:]", "dataset_name": None}
    (tmp_path / "pipeline" / "training_config.json").write_text(json.dumps(recorded))
    found = run(tmp_path, num_images=100)
    assert "Compared with what the pipeline was trained on: 'train[:75%]' of data.npz." in capsys.readouterr().out
    assert (found["data"]["num_reference"], found["data"]["num_held_out"]) == (150, 50)
    assert found["samples"]["wasserstein_0"] < 1
    # the floor is that of the held-out quarter
    rows = torch.from_numpy(data)[:, None]
    order = [torch.randperm(num, generator=seeded(seed)) for num, seed in ((150, 0), (50, 1))]
    floor = compare_fields(rows[:150][order[0]], rows[150:][order[1]], "K").metrics
    assert found["floor"]["kernel_distance"] == pytest.approx({m.key: m.value for m in floor}["kernel_distance"])
    (tmp_path / "data.npz").unlink()
    with pytest.raises(ValueError, match=r"trained on '.*data\.npz', which is not a file or folder here: name it with"):
        run(tmp_path)


def test_a_data_set_with_a_column_of_arrays(tmp_path):
    from datasets import Array2D, Dataset, Features

    shape = (1, 12)
    save_pipeline(tmp_path / "pipeline", shape)
    data = make_noise(shape, 60, 0).astype(np.float32)
    (tmp_path / "set").mkdir()
    dataset = Dataset.from_dict({"signal": list(data)}, Features({"signal": Array2D(shape, "float32")}))
    dataset.to_parquet(tmp_path / "set" / "train.parquet")
    found = run(tmp_path, num_images=25, train_data_dir=str(tmp_path / "set"))
    assert (found["data"]["num_reference"], found["data"]["num_held_out"]) == (35, 25)
    assert found["samples"]["wasserstein_0"] < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"The pipeline draws arrays of shape \(1, 12\) \(channels, sizes\), and its folder does not record"),
        ({"features": "random"}, "`features`='random' is for images"),
        ({"posterior": ("blurred",)}, "`blurred` is for two dimensions, not for fields of 12 points"),
        ({"num_images": 19}, "`num_images`: 19 samples are too few; at least 20 are needed"),
        ({"train_arrays": "few.npy"}, "the reference: 15 samples are too few; at least 20 are needed"),
        ({"train_arrays": "long.npy"}, r"'train' has arrays of shape \(1, 13\), and the pipeline draws \(1, 12\)"),
        ({"train_arrays": "nan.npy"}, "'train' has 3 values that are not finite"),
        ({"train_arrays": "nowhere.npy"}, "there is no file or folder"),
        ({"train_arrays": "good.npy", "channel_axis": "none"}, r"arrays of shape \(1, 1, 12\), and the pipeline"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, arguments, message):
    save_pipeline(tmp_path / "pipeline", (1, 12))
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", make_noise((1, 12), 60, 0))
    np.save("few.npy", make_noise((1, 12), 30, 0))
    np.save("long.npy", make_noise((1, 13), 60, 0))
    broken = make_noise((1, 12), 60, 0)
    broken[:3, 0, 5] = np.nan
    np.save("nan.npy", broken)
    if not {"train_arrays"} & set(arguments) and arguments:
        arguments = arguments | {"train_arrays": "good.npy"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_card_is_for_images(tmp_path):
    save_pipeline(tmp_path / "pipeline", (1, 12))
    (tmp_path / "pipeline" / "README.md").write_text("---\n---\n")
    with pytest.raises(ValueError, match="`update_model_card` is for images"):
        run(tmp_path, update_model_card=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_arrays": "v.npy"}, "`validation_arrays`='v.npy' needs `train_arrays`"),
        (
            {"train_arrays": "t.npy", "validation_arrays": "v.npy", "held_out_split": "test"},
            "Give `validation_arrays` or `held_out_split`, not both",
        ),
        ({"train_arrays": "t.npy", "dataset_name": "x"}, "Give `train_arrays` or `dataset_name`, not both"),
        ({"train_arrays": "t.npy", "resolution": 8}, "`resolution`=8 is for images"),
    ],
)
def test_settings_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig("nowhere", **arguments)


# --- The likelihood ---


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_nats_per_number_are_those_of_the_density_in_the_units_of_the_data(unit):
    """A Gaussian, of which one number has ½ log(2π s²) + (x - m)²/(2 s²) nats, with the noise of the smallest level."""
    shape = (2, 6)
    unet = GaussianResidualModel(shape[1:], 2, rank=0)
    unet.remainder.fill_(0.25)
    stds = [12.0 * unit, 0.5]
    pipe = NCSNPipeline(unet, AnnealedLangevinScheduler(), [280.0 * unit, 0.0], stds, None)
    z = torch.randn(5, *shape, generator=seeded(0), dtype=torch.float64)
    std = torch.tensor(stds, dtype=torch.float64)[:, None]
    x = pipe.units.mean(z) + std * z
    found = nats_per_number(
        Denoiser.of(unet, pipe.scheduler), x, [seeded(i) for i in range(5)], pipe.units, num_steps=50
    )
    variance = std**2 * (1 + 4 * 0.01**2)
    exact = 0.5 * ((2 * math.pi * variance).log() + (x - pipe.units.mean(x)) ** 2 / variance).flatten(1).mean(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="`data` must be floating"):
        nats_per_number(Denoiser.of(unet, pipe.scheduler), x.long(), [], pipe.units)
