"""The networks of the papers of 2019 and 2020, trained with `--architecture`."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline
from ncsn_diffusers.commands import cli
from ncsn_diffusers.commands.sample import SampleConfig, sample
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.hub.files import collect_files
from ncsn_diffusers.likelihood import loss_per_level
from ncsn_diffusers.networks_ncsn import RefineNet2DModel
from ncsn_diffusers.noise_levels import choose_num_train_timesteps
from ncsn_diffusers.score_matching import draw_sigmas, score_matching_loss
from ncsn_diffusers.training import Trainer, TrainingConfig, train
from ncsn_diffusers.training import trainer as training
from ncsn_diffusers.training.config import training_command
from ncsn_diffusers.training.network import make_network

PAPERS = ("ncsn", "ncsnv2")
FOLDERS = ("model_index.json", "unet", "scheduler")


# Images of independent Gaussian pixels, in [-1, 1]: dark on the left, bright on the right
MEAN, DEVIATION = np.repeat([-0.5, 0.5], 4), 0.15


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    """A folder of 200 gray images of 8×8."""
    folder = tmp_path_factory.mktemp("gaussian")
    pixels = MEAN + DEVIATION * np.random.default_rng(0).standard_normal((200, 8, 8))
    for i, array in enumerate(np.rint(127.5 * (pixels + 1)).clip(0, 255).astype(np.uint8)):
        Image.fromarray(array).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def small_config(**arguments):
    defaults = {"block_out_channels": (8, 8, 8), "train_batch_size": 20, "eval_batch_size": 1, "lr_warmup_steps": 1}
    return TrainingConfig(**defaults | {"mixed_precision": "no"} | arguments)


@pytest.fixture
def small(gaussian, tmp_path):
    return partial(small_config, train_data_dir=gaussian, output_dir=str(tmp_path / "out"))


@pytest.fixture(scope="module", params=PAPERS)
def run(request, gaussian, tmp_path_factory):
    """A network that has learned the two images: its architecture, its folder and the pipeline that came back."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp(request.param)
    config = small_config(
        architecture=request.param,
        train_data_dir=gaussian,
        output_dir=str(folder),
        max_train_steps=150,
        learning_rate=5e-3,
        validation_split="train",
        checkpointing_steps=0,
    )
    return request.param, folder, train(config)


def records(folder, name):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


# Settings


def test_defaults_are_the_papers():
    config = TrainingConfig(architecture="ncsn")
    assert (config.prediction_type, config.conditioning) == ("score", "sigma")
    assert (config.noise_distribution, config.loss_weighting) == ("uniform", "sigma_squared")
    # ten levels from 1 to 0.01 for images in [0, 1]
    assert (config.num_train_timesteps, config.sigma_max, config.sigma_min) == (10, 2.0, 0.02)
    config = TrainingConfig(architecture="ncsnv2")
    assert (config.num_train_timesteps, config.sigma_max, config.sigma_min) == ("auto", "auto", 0.02)
    config = TrainingConfig()
    assert (config.architecture, config.layers_per_block, config.block_out_channels) == ("unet", 1, None)  # by size
    assert (config.num_train_timesteps, config.sigma_max, config.sigma_min) == (1000, 50.0, 0.01)
    assert (config.prediction_type, config.conditioning) == ("v_prediction", "timestep")
    assert (config.noise_distribution, config.loss_weighting) == ("lognormal", "edm")


@pytest.mark.parametrize("architecture", PAPERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction_type": "v_prediction"}, "`prediction_type` must be score with `architecture`='ncsn"),
        ({"conditioning": "timestep"}, "`conditioning` must be sigma with `architecture`='ncsn"),
        ({"class_conditional": True}, "`class_conditional` needs `architecture`='unet'"),
        ({"compile": True}, "`compile` needs `architecture`='unet'"),
        ({"layers_per_block": 1}, "`layers_per_block`=1 is for `architecture`='unet'"),
        ({"add_attention": False}, "`add_attention`=False is for `architecture`='unet'"),
        ({"block_out_channels": (8, 8)}, r"`block_out_channels` must be at least three .* not \(8, 8\)"),
        ({"block_out_channels": (8, 8, 9)}, "`block_out_channels` must be multiples of 8"),
    ],
)
def test_what_cannot_be_right_is_refused(architecture, settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(architecture=architecture, **settings)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="`architecture` must be one of unet, ncsn, ncsnv2, not 'dit'"):
        TrainingConfig(architecture="dit")


def test_images_that_become_too_small_are_refused_before_they_are_read(small, monkeypatch):
    deep = {"architecture": "ncsnv2", "block_out_channels": (8,) * 5}
    with pytest.raises(ValueError, match=r"8×4 are halved 2 times by .*; both sides must be at least 8"):
        make_network(small(**deep), AnnealedLangevinScheduler(), (1, 8, 4))
    monkeypatch.setattr(training, "open_training_data", None)
    with pytest.raises(ValueError, match=r"4×4 are halved 2 times by .*; both sides must be at least 8"):
        train(small(**deep, resolution=4))
    with pytest.raises(ValueError, match=r"2×2 are a single point before .* halved 2 times.* side must be at least 3"):
        train(small(resolution=2))


@pytest.mark.parametrize("size", [(4, 4), (7, 9)])
def test_odd_and_small_images_are_taken(size):
    config = TrainingConfig(architecture="ncsnv2", block_out_channels=(8, 8, 8, 8))
    network = make_network(config, AnnealedLangevinScheduler(), (3, *size))
    assert network(torch.zeros(2, 3, *size), torch.ones(2)).sample.shape == (2, 3, *size)
    assert network.config.sample_size == (4 if size == (4, 4) else (7, 9))


@pytest.mark.parametrize("architecture", PAPERS)
def test_the_command_repeats_the_run(architecture):
    config = TrainingConfig(architecture=architecture, sigma_min=0.05, mixed_precision="bf16")
    words = training_command(config).split()
    assert words[4:] == ["--architecture", architecture, "--sigma_min", "0.05", "--mixed_precision", "bf16"]
    assert TrainingConfig(**cli.parse(TrainingConfig, words[4:], "name", "example")) == config


# The networks and their loss


def test_dilations_are_the_papers():
    for number, dilations in ((4, (1, 1, 2, 4)), (5, (1, 1, 1, 2, 4)), (6, (1, 1, 1, 1, 2, 4))):
        config = TrainingConfig(architecture="ncsnv2", block_out_channels=(8,) * number)
        assert tuple(make_network(config, AnnealedLangevinScheduler(), (3, 32, 32)).config.dilations) == dilations


def test_the_network_of_2019_knows_the_levels_that_are_trained(small):
    trainer = Trainer(small(architecture="ncsn"))
    sigmas = np.geomspace(2, 0.02, 10)
    assert trainer.unet.config.sigmas == pytest.approx(sigmas.tolist())
    found = draw_sigmas(trainer.scheduler.ladder, torch.arange(10) / 10, "uniform")
    assert trainer.unet._ladder.find(found).tolist() == pytest.approx(range(9, -1, -1), abs=1e-4)


def test_the_network_of_2020_takes_its_levels_from_the_data(small):
    trainer = Trainer(small(architecture="ncsnv2"))
    config = trainer.scheduler.config
    images = trainer.images.sample(200).flatten(1).double() / 127.5 - 1
    assert config.sigma_max == pytest.approx(torch.pdist(images).max().item())
    assert config.num_train_timesteps == choose_num_train_timesteps(0.02, config.sigma_max, 64)
    assert trainer.unet.config.sigmas is None


@torch.no_grad()
@pytest.mark.parametrize("architecture", PAPERS)
def test_the_loss_is_the_papers(small, architecture):
    """Equations 5 and 6 of the 2019 paper, with lambda = sigma² and divided by the number of dimensions."""
    trainer = Trainer(small(architecture=architecture, num_train_timesteps=10, sigma_max=2.0))
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 10, 1, 8, 8, generator=generator)
    sigmas = draw_sigmas(trainer.scheduler.ladder, torch.arange(10) / 10, "uniform")
    losses = score_matching_loss(Denoiser.of(trainer.unet, trainer.scheduler), x0, z, sigmas, "sigma_squared")
    sigma = torch.from_numpy(np.geomspace(0.02, 2, 10)).float().reshape(-1, 1, 1, 1)
    score = trainer.unet(x0 + sigma * z, sigma.flatten()).sample
    # -(x - x0)/sigma² = -z/sigma; the sum of x0 and 0.02 z is rounded, of which sigma² D makes 1e-5
    expected = sigma.flatten() ** 2 * 0.5 * (score + z / sigma).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


# Training


def test_it_learns(run):
    """
    At each level the loss of the score 0 is ½. That of the right score, (mean - x)/(s² + sigma²) for pixels of the
    deviation s, is ½ s²/(s² + sigma²).
    """
    _, folder, pipe = run
    assert isinstance(pipe.unet, RefineNet2DModel)
    sigmas = pipe.scheduler.ladder.sigma_at(torch.arange(len(pipe.scheduler), dtype=torch.float64))
    least = (0.5 * DEVIATION**2 / (DEVIATION**2 + sigmas**2)).mean().item()
    assert least < 0.25
    (loss,) = records(folder, "validation_loss")
    print(f"loss {loss:.4f}, of the right score {least:.4f}, of the score 0 0.5")  # for pytest -rP
    assert 0.9 * least < loss < 1.3 * least


@pytest.mark.parametrize("architecture", PAPERS)
def test_it_learns_real_images(tmp_path, architecture):
    """200 handwritten digits, made small."""
    config = small_config(
        architecture=architecture,
        train_split="train[:200]",
        validation_split="train[200:300]",
        resolution=8,
        max_train_steps=60,
        learning_rate=5e-3,
        output_dir=str(tmp_path),
        checkpointing_steps=0,
    )
    train(config)
    (loss,) = records(tmp_path, "validation_loss")
    print(f"{architecture}: held-out loss {loss:.4f}, of the score 0 0.5")
    assert loss < 0.4


def test_it_draws_what_it_has_learned(run):
    _, folder, _ = run
    pipe = NCSNPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    x = pipe(batch_size=64, generator=torch.Generator().manual_seed(0), output_type="latent").images[:, 0]
    assert pipe.num_timesteps == 50
    # After 150 steps ncsn had -0.44, 0.46 and 0.29 here, ncsnv2 -0.49, 0.49 and 0.08; each starts around 0.
    for half in (slice(0, 4), slice(4, 8)):
        assert x[..., half].mean().item() == pytest.approx(MEAN[half].mean(), abs=0.1)
    assert (x.mean(0) - torch.from_numpy(MEAN)).abs().max() < 0.4


def test_what_was_saved_draws_the_same(run):
    _, folder, trained = run
    pipe = NCSNPipeline.from_pretrained(folder)
    images = []
    for p in (pipe, trained):
        p.set_progress_bar_config(disable=True)
        images.append(p(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    assert torch.equal(*images)
    assert images[0].std() > 0.1


@pytest.mark.parametrize("number", [0, 1])
def test_a_ladder_has_at_least_two_levels(small, number):
    with pytest.raises(ValueError, match="`num_train_timesteps` must be"):
        train(small(architecture="ncsn", num_train_timesteps=number))


def test_how_it_is_drawn(run):
    architecture, folder, _ = run
    pipe = NCSNPipeline.from_pretrained(folder)
    config = pipe.scheduler.config
    if architecture == "ncsn":  # five steps at each of the levels that were trained, and at no other
        assert (pipe.config.num_inference_steps, config.num_langevin_steps, config.rho) == (10, 5, None)
        pipe.scheduler.set_timesteps(10)
        assert pipe.scheduler.timesteps.unique().tolist() == pytest.approx(np.geomspace(0.02, 2, 10).tolist(), rel=1e-4)
    else:
        assert (pipe.config.num_inference_steps, config.num_langevin_steps, config.rho) == (50, 1, 7.0)


def test_levels_in_between_are_drawn_where_they_were_trained_or_are_near(small):
    pipe = train(small(architecture="ncsn", noise_distribution="lognormal", max_train_steps=1))
    assert (pipe.config.num_inference_steps, pipe.scheduler.config.rho) == (50, 7.0)
    many = train(small(architecture="ncsn", num_train_timesteps=60, max_train_steps=1, overwrite_output_dir=True))
    assert (many.config.num_inference_steps, many.scheduler.config.rho) == (50, 7.0)


@pytest.mark.parametrize("architecture", PAPERS)
def test_half_precision_learns_the_same(small, tmp_path, architecture):
    losses = {}
    for precision in ("no", "bf16"):
        config = small(architecture=architecture, max_train_steps=8, mixed_precision=precision)
        train(config)
        (losses[precision],) = records(tmp_path / "out", "loss")
        shutil.rmtree(tmp_path / "out")
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


@pytest.mark.parametrize("architecture", PAPERS)
def test_going_on_equals_never_stopping(small, tmp_path, architecture):
    arguments = {"architecture": architecture, "max_train_steps": 4, "checkpointing_steps": 2}
    arguments |= {"checkpoints_total_limit": 5}
    whole = train(small(**arguments))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")  # as if it had been killed on the way
    for name in FOLDERS:
        (tmp_path / "out" / name).rename(tmp_path / name)
    parts = train(small(resume_from_checkpoint="latest", **arguments))
    for p, q in zip(whole.unet.parameters(), parts.unet.parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_architecture_cannot_go_on(small):
    ladder = {"num_train_timesteps": 10, "sigma_max": 2.0, "sigma_min": 0.02, "max_train_steps": 1}
    train(small(architecture="ncsn", **ladder))
    with pytest.raises(ValueError, match=r"`architecture`: the network of .* was trained with 'ncsn', .* 'ncsnv2'"):
        train(small(architecture="ncsnv2", resume_from_checkpoint="latest", **ladder))


# What is saved


def test_it_is_published_with_its_code(run):
    architecture, folder, _ = run
    files = collect_files(folder, "ann/gaussian", training_dir=folder)
    index = json.loads(files["model_index.json"])
    names = {f"{index['_class_name'][0]}.py", f"unet/{index['unet'][0]}.py", "unet/diffusion_pytorch_model.safetensors"}
    assert names <= files.keys()
    card = files["README.md"].decode()
    assert f"| architecture | {architecture} |" in card
    assert "| the network is given | sigma |\n| the network returns | score |" in card
    assert f"--architecture {architecture} --block_out_channels 8 8 8" in card
    assert "runs under annealed Langevin dynamics only" in card


def test_the_commands_take_it(run, tmp_path):
    _, folder, _ = run
    sample(SampleConfig(str(folder), num_images=2, output_dir=str(tmp_path), save_images=True, save_grid=False))
    pipe = NCSNPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for i, image in enumerate(pipe(batch_size=2, generator=generators).images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{i:05d}.png")), np.asarray(image))


def test_its_loss_at_each_level_is_below_that_of_the_score_0(run):
    """As `evaluate` computes it."""
    _, folder, _ = run
    pipe = NCSNPipeline.from_pretrained(folder)
    pixels, noise = torch.randn(2, 100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(MEAN).float() + DEVIATION * pixels
    sigmas = [1.0, 0.3, 0.1]
    losses = loss_per_level(pipe.make_denoiser(), images, noise, sigmas).mean(1)
    least = [0.5 * DEVIATION**2 / (DEVIATION**2 + sigma**2) for sigma in sigmas]
    assert losses.tolist() == pytest.approx(least, abs=0.1)
