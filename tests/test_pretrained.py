"""The digits that come with the package."""

import json
import socket
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from networks import AnyClassUNet

import ncsn_diffusers
from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, pretrained
from ncsn_diffusers.evaluation import class_entropy, extract_features, load_digit_classifier


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


def test_what_is_shipped():
    folder = Path(pretrained("mnist"))
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
    with pytest.raises(ValueError, match="`name` must be one of mnist, not 'cifar10'"):
        pretrained("cifar10")
    with pytest.raises(ValueError, match=r"not '\.\./assets/mnist'"):
        pretrained("../assets/mnist")
    assert "pretrained" in ncsn_diffusers.__all__


def sureness_and_entropy(images):
    """How sure the classifier is of the digits, on average; and the entropy of their classes, 2.303 for even shares."""
    logits = extract_features(images, load_digit_classifier())
    return logits.softmax(1).max(1).values.mean().item(), class_entropy(logits)


def draw(pipe, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, num_inference_steps=20, generator=generator, output_type="pt").images


def test_its_digits_are_those_asked_for(pipe):
    assert pipe.num_classes == 10
    labels = torch.arange(10).repeat(5)
    logits = extract_features(draw(pipe, class_labels=labels), load_digit_classifier())
    named = (logits.argmax(1) == labels).sum().item()
    sureness = logits.softmax(1).max(1).values.mean().item()
    print(f"{named} of 50 digits are named as asked; the classifier is {sureness:.1%} sure of them")
    assert named >= 46  # of 50 at 97 % each: 46 or more with a probability of 98 %
    assert sureness > 0.9


def test_without_a_label_it_draws_all_digits(pipe):
    sureness, entropy = sureness_and_entropy(draw(pipe, batch_size=64))
    assert sureness > 0.85  # 0.893 for these 64, each ± 0.2
    assert entropy > 2.1  # of 64 even digits it is 2.23 ± 0.03


def test_its_network_under_stock_pipelines(pipe):
    unet = AnyClassUNet.from_pretrained(pretrained("mnist"), subfolder="unet")
    stock = DDIMPipeline(unet, DDIMScheduler.from_config(pipe.scheduler.config))
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = stock(batch_size=32, num_inference_steps=30, generator=generator, output_type="np").images
    assert sureness_and_entropy(torch.from_numpy(images).movedim(-1, 1))[0] > 0.85
