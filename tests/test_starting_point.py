"""Runs that begin with the weights of a pipeline (`pretrained_model_name_or_path`)."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from networks import conditional_unet, quiet_pipeline, small_unet
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, pretrained
from ncsn_diffusers.networks_ncsn import RefineNet2DModel
from ncsn_diffusers.training import Trainer, TrainingConfig, checkpoints, train
from ncsn_diffusers.training.config import training_command
from ncsn_diffusers.units import Units, image_units

pytestmark = pytest.mark.usefixtures("quick_pictures")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def small(tmp_path):
    """Settings of a short run on 30 images of noise, of 8×8 pixels and three classes."""
    random = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    defaults = {"train_data_dir": str(tmp_path / "images"), "output_dir": str(tmp_path / "out"), "train_batch_size": 10}
    defaults |= {"eval_batch_size": 2, "num_epochs": 1, "lr_warmup_steps": 1, "mixed_precision": "no"}
    return lambda **arguments: TrainingConfig(**defaults | arguments)


LEVELS = {"num_train_timesteps": 100, "sigma_min": 0.02, "sigma_max": 20.0, "prediction_type": "epsilon"}


def save(folder, unet=None, cls=NCSNPipeline, **arguments):
    scheduler = arguments.pop("scheduler", None) or AnnealedLangevinScheduler(**LEVELS)
    pipe = quiet_pipeline(unet or small_unet(), scheduler, cls=cls, **arguments)
    pipe.save_pretrained(folder)
    return pipe


def weights(unet):
    return torch.cat([p.detach().flatten() for p in unet.parameters()])


def test_a_run_begins_with_the_weights_of_a_pipeline(small, tmp_path):
    source = save(tmp_path / "source", num_inference_steps=7)
    trainer = Trainer(small(pretrained_model_name_or_path=str(tmp_path / "source"), learning_rate=2e-3))
    assert torch.equal(weights(trainer.unet), weights(source.unet))
    assert torch.equal(weights(trainer.eval_unet), weights(source.unet))
    pipe = trainer.train()
    assert trainer.step == 3
    assert not torch.equal(weights(pipe.unet), weights(source.unet))
    # the network stays what it was, which no setting could say: without attention, and groups of 2 channels
    saved = NCSNPipeline.from_pretrained(tmp_path / "out")
    for name in ("down_block_types", "norm_num_groups", "block_out_channels"):
        assert np.array_equal(saved.unet.config[name], source.unet.config[name])
    for name, value in {**LEVELS, "conditioning": "timestep", "rho": 7.0}.items():
        assert saved.scheduler.config[name] == value
    assert saved.config.num_inference_steps == 7
    # what was taken from it is recorded, and the rest is the run's own
    recorded = json.loads((tmp_path / "out" / "training_config.json").read_text())
    expected = {**LEVELS, "architecture": "unet", "block_out_channels": [8, 8], "layers_per_block": 1}
    expected |= {"add_attention": True}  # in the middle alone, as diffusers names it
    expected |= {"conditioning": "timestep", "noise_distribution": "lognormal", "learning_rate": 2e-3}
    assert {name: recorded[name] for name in expected} == expected
    assert recorded["pretrained_model_name_or_path"] == str(tmp_path / "source")
    command = "--train_data_dir images --pretrained_model_name_or_path source --train_batch_size 10 --num_epochs 1"
    assert command in recorded["command"]
    assert "sigma" not in recorded["command"] and "prediction_type" not in recorded["command"]


@pytest.mark.parametrize("name", ["mnist", "ann/digits"])
def test_the_command_keeps_names(name):
    config = TrainingConfig(pretrained_model_name_or_path=name, loss_weighting="sigma_squared")
    expected = f"--pretrained_model_name_or_path {name} --loss_weighting sigma_squared"
    assert training_command(config).endswith(f"commands.train {expected}")


def test_half_precision_is_trained_in_float32(small, tmp_path):
    source = save(tmp_path / "source", small_unet().half())
    trainer = Trainer(small(pretrained_model_name_or_path=str(tmp_path / "source")))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in trainer.unet.parameters())
    assert torch.equal(weights(trainer.unet), weights(source.unet).float())
    saved = train(small(pretrained_model_name_or_path=str(tmp_path / "source")))
    assert saved.unet.dtype == torch.float32


@pytest.mark.parametrize("kind", ["ours", "ddpm"])
def test_it_resumes_without_the_pipeline(small, tmp_path, kind):
    if kind == "ours":
        save(tmp_path / "source")
    else:
        save(tmp_path / "source", cls=DDPMPipeline, scheduler=DDPMScheduler(num_train_timesteps=50, beta_end=0.2))
    arguments = {"pretrained_model_name_or_path": str(tmp_path / "source"), "checkpointing_steps": 1}
    whole = train(small(output_dir=str(tmp_path / "whole"), **arguments))
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    shutil.rmtree(tmp_path / "source")
    resumed = train(small(resume_from_checkpoint="latest", **arguments))
    assert torch.equal(weights(resumed.unet), weights(whole.unet))
    configs = [NCSNPipeline.from_pretrained(tmp_path / name).scheduler.config for name in ("whole", "out")]
    assert configs[0] == configs[1]
    if kind == "ddpm":  # its own levels, which are not geometric
        alphas = DDPMScheduler(num_train_timesteps=50, beta_end=0.2).alphas_cumprod.double()
        sigmas = resumed.scheduler.ladder.sigma_at(torch.arange(50, dtype=torch.float64))
        torch.testing.assert_close(sigmas, ((1 - alphas) / alphas).sqrt(), rtol=1e-4, atol=0)
    assert checkpoints.latest(tmp_path / "out").name == "checkpoint-3"
    for name in (None, str(tmp_path / "other")):
        arguments["pretrained_model_name_or_path"] = name
        with pytest.raises(ValueError, match=rf"_path`={name!r}: the run to resume began with those of '.*/source'"):
            Trainer(small(resume_from_checkpoint="latest", **arguments))


def test_a_run_that_began_otherwise_takes_no_pipeline(small, tmp_path):
    save(tmp_path / "source")
    train(small(block_out_channels=(8, 8), checkpointing_steps=1))
    with pytest.raises(ValueError, match=r"source': the run to resume began with random weights, and goes on"):
        Trainer(small(pretrained_model_name_or_path=str(tmp_path / "source"), resume_from_checkpoint="latest"))


def test_the_digits_that_come_with_the_package(small, tmp_path):
    random = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "digits" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{i}.png")
    data = {"train_data_dir": str(tmp_path / "digits"), "class_conditional": True}
    trainer = Trainer(small(**data, pretrained_model_name_or_path="mnist"))
    source = NCSNPipeline.from_pretrained(pretrained("mnist"))
    assert torch.equal(weights(trainer.unet), weights(source.unet.float()))
    assert trainer.unet.config.num_class_embeds == 11
    shutil.rmtree(tmp_path / "digits" / "9")
    with pytest.raises(ValueError, match=r"images are of 9 classes, and the network of .*='mnist' knows 10\."):
        Trainer(small(**data, pretrained_model_name_or_path="mnist"))


def test_a_pipeline_of_the_hub(small, tmp_path, hub):
    source = save(tmp_path / "source")
    hub.publish("ann/noise", tmp_path / "source")
    trainer = Trainer(small(pretrained_model_name_or_path="ann/noise"))
    assert torch.equal(weights(trainer.unet), weights(source.unet))
    with pytest.raises(ValueError, match=r"`pretrained_model_name_or_path`='ann/nothing' cannot be loaded: "):
        Trainer(small(pretrained_model_name_or_path="ann/nothing"))


def test_a_refinenet(small, tmp_path):
    scheduler = AnnealedLangevinScheduler(
        num_train_timesteps=10, sigma_min=0.02, sigma_max=2.0, prediction_type="score", conditioning="sigma"
    )
    network = RefineNet2DModel(sample_size=8, in_channels=1, block_out_channels=(8, 8, 8), dilations=(1, 2, 4))
    source = save(tmp_path / "source", network, scheduler=scheduler)
    trainer = Trainer(small(pretrained_model_name_or_path=str(tmp_path / "source")))
    assert trainer.config.architecture == "ncsnv2"
    assert (trainer.config.noise_distribution, trainer.config.loss_weighting) == ("uniform", "sigma_squared")
    assert torch.equal(weights(trainer.unet), weights(source.unet))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "sample"}, r"`prediction_type`='sample' does not fit .*source', which has 'epsilon'"),
        ({"conditioning": "sigma"}, r"`conditioning`='sigma' does not fit .*source', which has 'timestep'"),
        ({"sigma_max": 50.0}, r"`sigma_max`=50.0 does not fit .*source', which has 20.0"),
        ({"sigma_max": "auto"}, r"`sigma_max`='auto' does not fit .*source', which has 20.0"),
        ({"num_train_timesteps": 10}, r"`num_train_timesteps`=10 does not fit .*source', which has 100"),
        ({"block_out_channels": (16, 16)}, r"`block_out_channels`=\(16, 16\) does not fit .* which has \(8, 8\)"),
        ({"layers_per_block": 2}, r"`layers_per_block`=2 does not fit .*source', which has 1"),
        ({"add_attention": False}, r"`add_attention`=False does not fit .*source', which has True"),
        ({"architecture": "ncsnv2"}, r"`architecture`='ncsnv2' does not fit .*source', which has 'unet'"),
        ({"channels": 3}, r"`channels`: the images have 3, and the network of .*source' takes 1; --channels 1 makes"),
        (
            {"resolution": 16},
            r"`resolution`: the images have 16×16 pixels, .* takes 8×8; --resolution 8 makes them fit",
        ),
        ({"class_conditional": True}, r"`class_conditional`=True does not fit .*source': its network knows no classes"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_images_are_read(small, tmp_path, settings, message):
    save(tmp_path / "source")
    config = partial(small, pretrained_model_name_or_path=str(tmp_path / "source"), train_data_dir="nowhere")
    with pytest.raises(ValueError, match=message):
        Trainer(config(**settings))
    same = {**LEVELS, "block_out_channels": (8, 8), "architecture": "unet", "channels": 1, "resolution": 8}
    with pytest.raises(FileNotFoundError, match="`train_data_dir`='nowhere' is not a folder"):  # all of which fit
        Trainer(config(**same))


def test_images_that_do_not_fit_are_refused(small, tmp_path):
    save(tmp_path / "colors", small_unet(channels=3, out_channels=3))
    with pytest.raises(ValueError, match=r"`channels`: the images have 1, .*colors' takes 3; --channels 3 makes"):
        Trainer(small(pretrained_model_name_or_path=str(tmp_path / "colors")))
    save(tmp_path / "large", small_unet(sample_size=(8, 16)))
    with pytest.raises(ValueError, match=r"`resolution`: the images have 8×8 pixels, .*large' takes 8×16\."):
        Trainer(small(pretrained_model_name_or_path=str(tmp_path / "large")))
    save(tmp_path / "classes", conditional_unet())
    with pytest.raises(
        ValueError, match=r"`class_conditional`=False .*classes': its network is given the class of each"
    ):
        Trainer(small(pretrained_model_name_or_path=str(tmp_path / "classes")))
    save(tmp_path / "variance", small_unet(out_channels=2), scheduler=DDIMScheduler())
    with pytest.raises(
        ValueError, match=r"variance'.*(takes 1 channels and returns 2|`out_channels` must equal `in_channels`=1)"
    ):
        Trainer(small(pretrained_model_name_or_path=str(tmp_path / "variance")))
    save(tmp_path / "range", **image_units(0.0))  # [0, 1] to the network, too
    with pytest.raises(ValueError, match=r"the data set holds images, .* `data_mean`=0.0, `data_std`=0.5, .*as arrays"):
        Trainer(small(pretrained_model_name_or_path=str(tmp_path / "range")))
    with pytest.raises(ValueError, match=r"_path`='nothing' cannot be loaded: "):
        Trainer(small(pretrained_model_name_or_path="nothing"))


def test_arrays_keep_the_units_of_the_pipeline(small, tmp_path):
    save(tmp_path / "range", **image_units(0.0))
    images = torch.rand(30, 1, 8, 8)
    trainer = Trainer(small(pretrained_model_name_or_path=str(tmp_path / "range"), train_data_dir=None), images)
    assert trainer.images.units == Units(data_mean=0.0, data_std=0.5, value_range=(0, 1))
    torch.testing.assert_close(trainer.images.arrays, images)  # [0, 1] to the network
    for name, given in (("data_std", (0.25,)), ("value_range", (0, 2))):
        settings = {"pretrained_model_name_or_path": str(tmp_path / "range"), "train_data_dir": None, name: given}
        with pytest.raises(ValueError, match=f"`{name}`=.* does not fit the network to go on with, which has"):
            Trainer(small(**settings), images)
    trainer = Trainer(small(**settings | {"data_mean": (0.0,), "value_range": (0, 1), "data_unit": "lx"}), images)
    assert trainer.images.units.name == "lx"
