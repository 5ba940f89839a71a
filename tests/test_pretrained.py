"""The digits and the maps of temperature that come with the package."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from networks import AnyClassUNet

import ncsn_diffusers
from ncsn_diffusers import AnnealedLangevinScheduler, GaussianResidualModel, NCSNPipeline, pretrained
from ncsn_diffusers.evaluation import CLASSIFIERS, class_entropy, extract_features, load_digit_classifier


@pytest.fixture(scope="module")
def pipe():
    pipe = NCSNPipeline.from_pretrained(pretrained("mnist"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_loads_without_a_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    pipe = NCSNPipeline.from_pretrained(pretrained("mnist"))
    assert isinstance(pipe.scheduler, AnnealedLangevinScheduler)
    assert pipe.unet.dtype == torch.float32  # saved in half precision, and computed in single
    assert pipe.unet.config.sample_size == 28
    assert type(NCSNPipeline.from_pretrained(pretrained("temperature")).unet) is GaussianResidualModel


def test_maps_of_temperature():
    folder = Path(pretrained("temperature"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2e6
    assert "_name_or_path" not in (folder / "unet" / "config.json").read_text()
    pipe = NCSNPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    maps = pipe(200, generator=torch.Generator().manual_seed(0)).images[:, 0].astype(float)
    assert maps.shape == (200, 37, 49) and pipe.units.name == "K"
    # of the 384 training maps: mean and standard deviation at three points, and of all departures and maps' means
    for place, mean, std in (((18, 24), 288.379, 1.972), ((0, 0), 297.477, 1.242), ((36, 48), 274.561, 1.681)):
        values = maps[(slice(None), *place)]
        assert values.mean() == pytest.approx(mean, abs=3 * std / 200**0.5)
        assert values.std() == pytest.approx(std, rel=0.17)  # three standard errors, and 2 % of the chain
    assert maps.mean() == pytest.approx(286.2746, abs=0.32)
    assert maps.std() == pytest.approx(10.634, rel=0.02)
    assert (maps - maps.mean(0)).std() == pytest.approx(1.718, rel=0.12)
    assert maps.mean((1, 2)).std() == pytest.approx(1.469, rel=0.17)


def test_the_samples_of_maps_are_those_of_the_data():
    pytest.importorskip("iris_sample_data")
    netCDF4 = pytest.importorskip("netCDF4")  # noqa: N806
    import iris_sample_data

    files = [Path(iris_sample_data.path) / f"{name}_north_america.nc" for name in ("A1B", "E1")]
    data = np.concatenate([netCDF4.Dataset(file).variables["air_temperature"][:] for file in files]).astype(float)
    data = data[np.tile(np.arange(1860, 2100), 2) % 10 > 1]
    pipe = NCSNPipeline.from_pretrained(pretrained("temperature"))
    assert pipe.units.data_mean == pytest.approx(data.mean(), abs=1e-6)
    assert pipe.units.data_std == pytest.approx((data - data.mean(0)).std(), abs=1e-6)
    mean = pipe.units.to_data(pipe.unet.mean[None])[0, 0].numpy()
    np.testing.assert_allclose(mean, data.mean(0), atol=0.01)  # kelvin, in half precision


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_what_is_shipped(name):
    folder = Path(pretrained(name))
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    weights = files.pop("unet/diffusion_pytorch_model.safetensors")
    assert weights.stat().st_size < 8e6
    assert set(files) == {
        *("README.md", "loss.png", "samples.png"),
        *("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"),
    }
    assert sum(path.stat().st_size for path in files.values()) < 3e5
    assert json.loads(files["model_index.json"].read_text())["unet"] == ["diffusers", "UNet2DModel"]
    assert "_name_or_path" not in files["unet/config.json"].read_text()


def test_unknown_name():
    with pytest.raises(
        ValueError, match="`name` must be one of avatars, fashion_mnist, mnist, temperature, not 'cifar10'"
    ):
        pretrained("cifar10")
    with pytest.raises(ValueError, match=r"not '\.\./assets/mnist'"):
        pretrained("../assets/mnist")
    assert "pretrained" in ncsn_diffusers.__all__


def sureness_and_entropy(images):
    """How sure the classifier is of the digits, on average; and the entropy of their classes, 2.303 for even shares."""
    logits = extract_features(images, load_digit_classifier())
    return logits.softmax(1).max(1).values.mean().item(), class_entropy(logits)


def draw(pipe, steps, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, num_inference_steps=steps, generator=generator, output_type="pt").images


# Few of them quickly, more with `pytest -m slow`: so many images in so many steps.


# digits, at 97 % each: 46 of 50 or more with a probability of 98 %, 17 of 20 or more with one of 99.7 %; clothes, at
# 87 %: 38 of 50 or more with 99 %, 13 of 20 or more with 99.8 %
@pytest.mark.parametrize(
    ("name", "features", "each", "steps", "at_least"),
    [
        ("mnist", "digits", 2, 10, 17),
        ("fashion_mnist", "fashion", 2, 10, 13),
        pytest.param("mnist", "digits", 5, 20, 46, marks=pytest.mark.slow),
        pytest.param("fashion_mnist", "fashion", 5, 20, 38, marks=pytest.mark.slow),
    ],
)
def test_its_images_are_those_asked_for(name, features, each, steps, at_least):
    pipe = NCSNPipeline.from_pretrained(pretrained(name))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.num_classes == 10
    labels = torch.arange(10).repeat(each)
    classifier = load_digit_classifier(CLASSIFIERS[features])
    logits = extract_features(draw(pipe, steps, class_labels=labels), classifier)
    named = (logits.argmax(1) == labels).sum().item()
    sureness = logits.softmax(1).max(1).values.mean().item()
    print(f"{named} of {len(labels)} images are named as asked; the classifier is {sureness:.1%} sure of them")
    assert named >= at_least
    assert sureness > 0.8


# The entropy of the shares of even digits is 2.23 ± 0.03 of 64 of them, 2.09 ± 0.10 of 24. The classifier's sureness is
# 0.893 of those 64, each ± 0.2: less by two standard errors is 0.84 of 64 and 0.81 of 24, and 0.77 of 10.
@pytest.mark.parametrize(
    ("number", "steps", "sure", "varied"),
    [(24, 10, 0.81, 1.8), pytest.param(64, 20, 0.85, 2.1, marks=pytest.mark.slow)],
)
def test_without_a_label_it_draws_all_digits(pipe, number, steps, sure, varied):
    sureness, entropy = sureness_and_entropy(draw(pipe, steps, batch_size=number))
    assert sureness > sure
    assert entropy > varied


@pytest.mark.parametrize(
    ("number", "steps", "sure"), [(10, 12, 0.77), pytest.param(32, 30, 0.85, marks=pytest.mark.slow)]
)
def test_its_network_under_stock_pipelines(pipe, number, steps, sure):
    unet = AnyClassUNet.from_pretrained(pretrained("mnist"), subfolder="unet")
    stock = DDIMPipeline(unet, DDIMScheduler.from_config(pipe.scheduler.config))
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = stock(batch_size=number, num_inference_steps=steps, generator=generator, output_type="np").images
    assert sureness_and_entropy(torch.from_numpy(images).movedim(-1, 1))[0] > sure
