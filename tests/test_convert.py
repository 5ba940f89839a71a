"""Checkpoints of others become pipelines that return what the originals' code returned (tests/convert_reference.py)."""

import collections
import io
import json
import math
import os
import signal
import time
import zipfile
from pathlib import Path

import convert_reference as reference
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.utils import logging as diffusers_logging
from forked import run_forked
from networks import MIXTURE, AnalyticUNet, GaussianMixture
from safetensors.torch import save_file

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline
from ncsn_diffusers.commands.convert import ConvertConfig, convert_checkpoint
from ncsn_diffusers.convert import convert
from ncsn_diffusers.convert.checkpoints import make_pipeline, make_scheduler
from ncsn_diffusers.hub import collect_files
from ncsn_diffusers.networks_ncsn import LevelUNet2DModel, RefineNet2DModel, SkipUNet2DModel

LADDER = reference.geometric(50, 0.01, 9)
NCSNV2 = reference.geometric(50, 0.01, 232)
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


@pytest.fixture
def said(caplog):
    diffusers_logging.enable_propagation()
    yield caplog
    diffusers_logging.disable_propagation()


def weights(name, ladder=None, seed=0):
    """The weights of a reference as the originals store them, in DataParallel."""
    state = reference.make_state(reference.read(name)[0], seed, ladder)
    return collections.OrderedDict((f"module.{key}", tensor) for key, tensor in state.items())


def converted(tmp_path, parts, **given):
    torch.save(parts, tmp_path / "checkpoint.pth")
    return convert(tmp_path / "checkpoint.pth", **given)


def assert_same(output, expected, tolerance):
    """Within `tolerance` of the largest value, for each image."""
    error = (output - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))
    assert error.max() < tolerance


# The networks give what the originals give


@torch.no_grad()
def test_ncsn(tmp_path, said):
    _, x, sigmas, expected = reference.read("ncsn")
    torch.save([weights("ncsn"), OPTIMIZER], tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as in 2019
    pipe = convert(tmp_path / "old.pth")
    assert_same(pipe.unet(x, sigmas).sample, expected, 1e-5)
    assert (pipe.units.data_mean, pipe.units.data_std) == (0, 0.5)  # the network sees [0, 1]
    assert (pipe.unet.config.sample_size, pipe.unet.config.in_channels) == (28, 1)
    assert "the optimizer's state (1 tensors)" in said.text
    assert "10 of them are assumed, from 1 to 0.01" in said.text


@torch.no_grad()
@pytest.mark.parametrize("name", ["ncsnv2", "ncsnv2deeper", "ncsnv2deepest"])
def test_ncsnv2(tmp_path, said, name):
    _, x, sigmas, expected = reference.read(name)
    average = {key.removeprefix("module."): tensor for key, tensor in weights(name, LADDER).items()}
    del average["sigmas"]  # a buffer
    parts = [weights(name, LADDER, seed=7), OPTIMIZER, 12, 3000, average]
    pipe = converted(tmp_path, parts, sample_size=16)
    assert_same(pipe.unet(x, sigmas).sample, expected, 1e-5)
    assert "the weights' moving average" in said.text
    assert f"the weights themselves ({len(average)} tensors)" in said.text
    assert pipe.scheduler.config.sigma_max == 50
    assert pipe.scheduler.config.num_train_timesteps == 9
    without = converted(tmp_path, [*parts[:1], *parts[1:4]], sample_size=16)
    assert not torch.equal(without.unet.conv_in.weight, pipe.unet.conv_in.weight)


@torch.no_grad()
def test_adversarial(tmp_path):
    _, x, sigmas, expected = reference.read("adversarial")
    parts = [weights("adversarial"), OPTIMIZER, 12, 3000, None]
    pipe = converted(tmp_path, parts, sample_size=16, sigma_max=50, num_train_timesteps=9)
    assert_same(pipe.unet(x, sigmas).sample * sigmas.reshape(-1, 1, 1, 1), expected, 1e-5)  # it returns sigma · score


@torch.no_grad()
def test_ncsnpp(tmp_path, said):
    _, x, sigmas, expected = reference.read("ncsnpp")
    ladder = reference.geometric(348, 0.01, 20)
    average = [t for k, t in weights("ncsnpp", ladder).items() if k not in ("module.sigmas", "module.all_modules.0.W")]
    model = {
        **weights("ncsnpp", ladder, seed=7),
        "module.all_modules.0.W": weights("ncsnpp", ladder)["module.all_modules.0.W"],
    }
    model["module.sigmas"] = torch.tensor(ladder, dtype=torch.float64)
    ema = {"decay": 0.999, "num_updates": 3, "shadow_params": average}
    pipe = converted(tmp_path, {"optimizer": OPTIMIZER, "model": model, "ema": ema, "step": 3})
    assert isinstance(pipe.unet, UNet2DModel)
    assert_same(pipe.unet(x, sigmas).sample, expected, 1e-6)
    config = pipe.scheduler.config
    assert (config.sigma_min, config.sigma_max, config.num_train_timesteps) == (0.01, 348, 20)
    assert pipe.unet.config.sample_size == 32
    assert "`optimizer` (1 tensors)" in said.text
    assert f"the weights themselves ({len(average)} tensors)" in said.text


@torch.no_grad()
def test_diffusers_ncsn(tmp_path):
    torch.manual_seed(0)
    sigmas = reference.geometric(10, 0.005, 10)
    levels = {"sigma_min": 0.005, "sigma_max": 10, "num_train_timesteps": 10}
    blocks = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    unet = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, norm_num_groups=4, **blocks)
    unet.register_buffer("sigmas", torch.tensor(sigmas))
    unet.save_pretrained(tmp_path / "unet")
    write(
        tmp_path / "unet" / "config.json",
        {**dict(unet.config), **levels, "num_train_timesteps": None, "_class_name": "UNet2DModelForNCSN"},
    )
    index = {
        "_class_name": ["pipeline_ncsn", "NCSNPipeline"],
        "unet": ["unet_2d_ncsn", "UNet2DModelForNCSN"],
        "scheduler": ["scheduling_ncsn", "AnnealedLangevinDynamicsScheduler"],
    }
    write(tmp_path / "model_index.json", index)
    sampler = {**levels, "num_annealed_steps": 100, "sampling_eps": 1e-5}
    write(tmp_path / "scheduler" / "scheduler_config.json", sampler)
    pipe = convert(tmp_path)
    assert isinstance(pipe.unet, LevelUNet2DModel)
    x = torch.rand(10, 1, 16, 16)
    torch.testing.assert_close(pipe.unet(x, torch.tensor(sigmas)).sample, unet(x, torch.arange(10)).sample)
    # x + ε/2 (sigma/sigma_L)² score, with ε = 1e-5
    config = pipe.scheduler.config
    assert (config.step_size, config.num_langevin_steps, config.denoise_final) == (0.2, 100, False)
    assert (pipe.units.data_mean, pipe.units.data_std) == (0, 0.5)  # the network sees [0, 1]
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(loaded.unet(x, 0.5).sample, pipe.unet(x, 0.5).sample)
    write(tmp_path / "scheduler" / "scheduler_config.json", {**sampler, "sigma_max": 20})
    with pytest.raises(OSError, match="must have `sigma_max`, and its unet must have the same"):
        convert(tmp_path)
    write(tmp_path / "scheduler" / "scheduler_config.json", {**sampler, "num_train_timesteps": 12})
    with pytest.raises(OSError, match="are not those of the scheduler's config"):
        convert(tmp_path)
    write(tmp_path / "scheduler" / "scheduler_config.json", sampler)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"unet/diffusion_pytorch_model.safetensors is missing"):
        convert(tmp_path)


def write(path, config):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config))


# The samplers


def parameters(pipe):
    """What (1) of the scheduler's docstring is at the first and the last step: sigma, kappa and c."""
    pipe.scheduler.set_timesteps(len(pipe.scheduler))
    rows = pipe.scheduler.table
    return len(rows), [(row.sigma, row.kappa, row.c) for row in (rows[0], rows[-1])]


def test_ncsns_sampler(tmp_path):
    pipe = converted(tmp_path, [weights("ncsn"), OPTIMIZER])
    number, (first, last) = parameters(pipe)
    # step_lr (sigma/sigma_L)² = 2e-5 · 1e4 at sigma = 1, and no denoising
    assert number == 10 * 100
    assert first == pytest.approx((1.0, 1 - 0.2, math.sqrt(2 * 0.2)))
    assert last == pytest.approx((0.01, 1 - 0.2, math.sqrt(2 * 2e-5)))


def test_ncsnv2s_sampler(tmp_path, said):
    average = {key.removeprefix("module."): t for key, t in weights("ncsnv2", LADDER).items()}
    del average["sigmas"]
    model = {**weights("ncsnv2", LADDER), "module.sigmas": torch.tensor(NCSNV2)}
    pipe = converted(tmp_path, [model, OPTIMIZER, 1, 2, average])
    number, (first, last) = parameters(pipe)
    assert number == 232 * 5 + 1
    assert first == pytest.approx((50.0, 1 - 0.062, 50 * math.sqrt(2 * 0.062)))
    assert last == (pytest.approx(0.01), 0.0, 0.0)
    assert pipe.unet.config.sample_size == 32
    assert "NCSNv2, CIFAR-10" in said.text
    assert "step_lr=6.2e-06" in said.text
    given = converted(
        tmp_path, [model, OPTIMIZER], sample_size=64, step_lr=3.1e-6, num_langevin_steps=2, denoise_final=False
    )
    assert given.unet.config.sample_size == 64
    number, (first, last) = parameters(given)
    assert number == 232 * 2
    assert last == pytest.approx((0.01, 1 - 0.031, 0.01 * math.sqrt(2 * 0.031)))


def test_adversarials_sampler(tmp_path):
    pipe = converted(tmp_path, [weights("adversarial"), OPTIMIZER], sigma_max=50, num_train_timesteps=232)
    assert pipe.scheduler.config.noise_rule == "consistent"
    number, (first, last) = parameters(pipe)
    assert number == 232
    ratio = (50 / 0.01) ** (-1 / 231)
    beta = math.sqrt(1 - ((1 - 0.056) / ratio) ** 2)
    assert first == pytest.approx((50.0, 1 - 0.056, 50 * ratio * beta))
    assert last == (pytest.approx(0.01), 0.0, 0.0)


def test_levels_that_are_not_geometric_are_kept(tmp_path):
    levels = [3.0, 2.0, 1.0, 0.5, 0.1, 0.05, 0.04, 0.03, 0.02]
    pipe = converted(tmp_path, [weights("ncsnv2", levels), OPTIMIZER], sample_size=16)
    sigmas = pipe.scheduler.ladder.sigma_at(torch.arange(9, dtype=torch.float64))
    assert sigmas.tolist() == pytest.approx(levels[::-1])


HALVED = GaussianMixture(MIXTURE.weights, 0.5 + MIXTURE.means / 2, MIXTURE.deviations / 2)  # data in [0, 1]


class HalvedUNet(AnalyticUNet):
    def denoised(self, x, sigma, class_labels):
        return HALVED.denoised(x, sigma)


NCSN_LEVELS = reference.geometric(1, 0.01, 10)
NCSN = {"sigmas": NCSN_LEVELS, "step_lr": 2e-5, "num_langevin_steps": 100, "denoise_final": False}
PAPERS = {
    "NCSN": {**NCSN, "knows_levels_only": True},
    "NCSNv2": {"sigmas": NCSNV2, "step_lr": 6.2e-6, "num_langevin_steps": 5},
    "adversarial": {"sigmas": NCSNV2, "step_lr": 5.6e-6, "is_consistent": True},
}
CONSISTENT = {"noise_rule": "consistent"}


# Shares of the mixture's components, which are 0.6, 0.3 and 0.1 in truth, and the components' deviation over its truth
@pytest.mark.parametrize(
    ("paper", "swap", "call", "evaluations", "shares", "deviation"),
    [
        ("NCSN", None, {}, 1000, (0.59, 0.31, 0.10), 1.02),
        ("NCSN", CONSISTENT, {"num_inference_steps": 10, "num_langevin_steps": 2}, 20, (0.55, 0.33, 0.12), 1.0),
        ("NCSNv2", None, {}, 1161, (0.57, 0.31, 0.12), 1.06),
        ("NCSNv2", CONSISTENT, {"num_inference_steps": 20}, 20, (0.62, 0.29, 0.09), 0.91),
        ("adversarial", None, {}, 232, (0.59, 0.31, 0.10), 0.98),
    ],
)
def test_samplers_on_a_perfect_network(paper, swap, call, evaluations, shares, deviation):
    scheduler = make_scheduler(**PAPERS[paper])
    unet = HalvedUNet(PAPERS[paper]["sigmas"], "score", "sigma")
    pipe = make_pipeline(unet, scheduler, 0)
    pipe.set_progress_bar_config(disable=True)
    if swap is not None:
        pipe.scheduler = AnnealedLangevinScheduler.from_config(pipe.scheduler.config, **swap)
    generator = torch.Generator().manual_seed(0)
    x = pipe(batch_size=3000, output_type="latent", generator=generator, **call).images.flatten(1).double()
    component = HALVED.responsibilities(x, 0.0).argmax(-1)
    spread = (x - HALVED.means[component]).square().mean().sqrt() / HALVED.deviations[0]
    assert unet.evaluations == evaluations
    assert HALVED.shares(x) == pytest.approx(shares, abs=0.03)  # standard error 0.009
    assert spread.item() == pytest.approx(deviation, abs=0.015)


def test_another_noise_rule_leaves_the_papers_steps():
    config = make_scheduler(**PAPERS["NCSN"]).config
    swapped = AnnealedLangevinScheduler.from_config(config, noise_rule="consistent").config
    assert (swapped.step_size, swapped.num_langevin_steps, swapped.denoise_final) == (None, 1, True)
    assert (swapped.rho, swapped.conditioning, swapped.sigma_max) == (None, "sigma", 1.0)
    given = AnnealedLangevinScheduler.from_config(config, noise_rule="consistent", step_size=0.3, num_langevin_steps=2)
    assert (given.config.step_size, given.config.num_langevin_steps) == (0.3, 2)
    same = AnnealedLangevinScheduler.from_config(config, noise_rule="euler_maruyama").config
    assert (same.step_size, same.num_langevin_steps, same.denoise_final) == (0.2, 100, False)


def test_the_number_of_levels_is_saved(tmp_path):
    pipe = converted(tmp_path, [weights("ncsn"), OPTIMIZER], num_langevin_steps=2)
    assert pipe.config.num_inference_steps == 10
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    images = [p(generator=torch.Generator().manual_seed(0), output_type="np").images for p in (pipe, loaded)]
    assert loaded.num_timesteps == 20
    assert (images[0] == images[1]).all()
    assert loaded.components["num_inference_steps"] == 10
    for number in (0, 100_001):  # which would not load again
        with pytest.raises(ValueError, match="`num_inference_steps` must be an int from 1 to 100000"):
            NCSNPipeline(pipe.unet, pipe.scheduler, num_inference_steps=number)
    index = tmp_path / "pipeline" / "model_index.json"
    write(index, {**json.loads(index.read_text()), "num_inference_steps": "10"})
    with pytest.raises(OSError, match="`num_inference_steps` must be a whole number"):
        NCSNPipeline.from_pretrained(tmp_path / "pipeline")


def test_a_chain_starts_around_the_middle_of_the_data():
    class Zero(HalvedUNet):
        def denoised(self, x, sigma, class_labels):
            self.started = x.mean().item()
            return x

    for data_min, middle in ((0, 0.5), (-1, 0.0)):
        unet = Zero([1.0, 0.5], "score", "sigma")
        pipe = make_pipeline(unet, make_scheduler([1.0, 0.5]), data_min)
        pipe(batch_size=20_000, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
        assert unet.started == pytest.approx(middle, abs=0.02)


# A converted pipeline is one of ours


def test_a_pipeline_of_ours(tmp_path):
    pipe = converted(tmp_path, [weights("ncsnv2", LADDER), OPTIMIZER], sample_size=16)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(loaded.unet, RefineNet2DModel)
    draw = {"num_inference_steps": 5, "output_type": "np"}
    images = [p(generator=torch.Generator().manual_seed(0), **draw).images for p in (pipe, loaded)]
    assert images[0].shape == (1, 16, 16, 3)
    assert (images[0] == images[1]).all()


@pytest.fixture
def saved(tmp_path):
    pipe = converted(tmp_path, [weights("ncsnv2", LADDER), OPTIMIZER], sample_size=16)
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_out_channels", [8] * 17),
        ("dilations", [1, 1, 2, 10**9]),
        ("dilations", "12"),
        ("sigmas", [1.0]),
        ("sigmas", [1.0, -1.0]),
        ("sigmas", [0.1, 1.0]),
        ("sample_size", None),
        ("_class_name", "UNet2DModel"),
    ],
)
def test_hostile_configs_are_refused(saved, key, value):
    path = saved / "unet" / "config.json"
    write(path, {**json.loads(path.read_text()), key: value})
    with pytest.raises(OSError, match=f"unet/config.json of '{saved}' cannot be used: .*{key}"):
        NCSNPipeline.from_pretrained(saved)


def test_weights_of_another_network_are_refused(saved):
    path = saved / "unet" / "config.json"
    write(path, {**json.loads(path.read_text()), "sigmas": [1.0, 0.1]})
    with pytest.raises(OSError, match=r"lacks \d+ tensors of the network: `.*embedding`"):
        NCSNPipeline.from_pretrained(saved)


def test_ncsnpp_is_loaded_again(tmp_path):
    model = weights("ncsnpp", reference.geometric(348, 0.01, 20))
    pipe = converted(tmp_path, {"model": model, "ema": None})
    pipe.save_pretrained(tmp_path / "pipeline")
    unet = NCSNPipeline.from_pretrained(tmp_path / "pipeline").unet
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), pipe.unet.parameters(), strict=True))


# What cannot be right is refused


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    with pytest.raises(OSError, match="might run code"):
        converted(tmp_path, [weights("ncsn"), Harmful()])
    with pytest.raises(OSError, match=r"might run code: save its tensors alone") as raised:
        converted(tmp_path, [weights("ncsn"), Path("x")])
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(OSError, match="neither a file nor a folder"):
        convert(tmp_path / "missing.pth")


def packed(name, content=b""):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, content)
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file: download it again"),
        (b"no checkpoint", "a file of text"),
        (b'{"a": 1}', "a file of text"),
        (b"<!DOCTYPE html><html>...", "a web page, and not the file that it links to"),
        (b"\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "a pointer of Git LFS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "a file of HDF5"),
        (b"\x93NUMPY\x01\x00" + bytes(99), "an array of NumPy"),
        (b"\x1f\x8b\x08\x00" + bytes(99), "a packed archive: unpack it"),
        (bytes(257) + b"ustar" + bytes(300), "a packed archive: unpack it"),
        (b"\x84\xa5model" + bytes(99), "no checkpoint of PyTorch, but MessagePack"),
        (b"\xde\x00\x11" + bytes(99), "no checkpoint of PyTorch, but MessagePack"),
        (packed("arrays.npy"), "a ZIP archive that torch has not written"),
        (packed("checkpoint/data.pkl")[:-10], "cut off, for the end of it is missing"),
        (packed("model/constants.pkl"), "a TorchScript program"),
        (bytes(range(255, 0, -1)), "damaged, or"),
        (b"\x80\x02}q\x00.", "damaged, or"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, kind):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"^'{path}' is {kind}") as raised:
        convert(path)
    assert "weights_only" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_checkpoint(tmp_path):
    for new in (True, False):
        path = tmp_path / "checkpoint.pth"
        torch.save([weights("ncsn"), OPTIMIZER], path, _use_new_zipfile_serialization=new)
        path.write_bytes(path.read_bytes()[: 3 * path.stat().st_size // 4])
        with pytest.raises(OSError, match=r"is (cut off|damaged)"):
            convert(path)
    save_file(weights("ncsn"), tmp_path / "checkpoint.safetensors")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="is damaged"):
        convert(path)


@pytest.mark.parametrize("new", [True, False])
def test_many_tensors_are_refused_at_once(tmp_path, new):
    state = {f"a{i}": torch.zeros(1) for i in range(21_000)}
    torch.save([state, {}], tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=new)
    start = time.process_time()
    with pytest.raises(OSError, match=r"holds 21,\d\d\d tensors, of 20,000 at most"):
        convert(tmp_path / "checkpoint.pth")
    assert time.process_time() - start < 1


# Weights alone


@torch.no_grad()
def test_state_dicts_alone(tmp_path, said):
    _, x, sigmas, expected = reference.read("ncsn")
    state = {key.removeprefix("module."): tensor for key, tensor in weights("ncsn").items()}
    save_file(state, tmp_path / "checkpoint.safetensors")
    torch.save({"state_dict": {f"net.{key}": tensor for key, tensor in state.items()}, "epoch": 3}, tmp_path / "b.pth")
    torch.save(weights("ncsn"), tmp_path / "c.pth")
    for name in ("checkpoint.safetensors", "b.pth", "c.pth"):
        pipe = convert(tmp_path / name)
        assert_same(pipe.unet(x, sigmas).sample, expected, 1e-5)
    assert "`state_dict` is used. Not used: `epoch`" in said.text
    _, x, sigmas, expected = reference.read("ncsnpp")
    pipe = converted(tmp_path, weights("ncsnpp", reference.geometric(348, 0.01, 20)))
    assert_same(pipe.unet(x, sigmas).sample, expected, 1e-6)
    for parts in ({"decay": 0.9, "num_updates": 3, "shadow_params": [x]}, {"ema": {"shadow_params": [x]}}):
        with pytest.raises(OSError, match=r"an? .*average alone, .* save it as \{'model'"):
            converted(tmp_path, parts)


def test_an_average_in_another_place_is_named(tmp_path, said):
    average = {key.removeprefix("module."): tensor for key, tensor in weights("ncsnv2", LADDER, seed=7).items()}
    for place in (2, 3, 4):
        parts = [weights("ncsnv2", LADDER), *[OPTIMIZER, 12, 3000][: place - 2], average]
        said.clear()
        pipe = converted(tmp_path, parts, sample_size=16)
        assert f"part {place}, which looks like weights, too" in said.text
        assert torch.equal(pipe.unet.conv_in.weight, weights("ncsnv2", LADDER)["module.begin_conv.weight"])


# What leaves no trace in the weights


@torch.no_grad()
def test_activations(tmp_path, said):
    _, x, sigmas, published = reference.read("ncsnv2")
    parts = [weights("ncsnv2", LADDER), OPTIMIZER]
    elu = converted(tmp_path, parts, sample_size=16)
    assert "nonlinearity='elu' (`act_fn`)" in said.text and "data in [0, 1] (`data_min`)" in said.text
    assert_same(elu.unet(x, sigmas).sample, published, 1e-5)
    for act_fn, act in (
        ("relu", lambda x: x.clamp(min=0)),
        ("leaky_relu", lambda x: x.clamp(min=0) + 0.2 * x.clamp(max=0)),
        ("silu", lambda x: x * x.sigmoid()),
    ):
        pipe = converted(tmp_path, parts, sample_size=16, act_fn=act_fn)
        pipe.save_pretrained(tmp_path / "pipe")
        found = NCSNPipeline.from_pretrained(tmp_path / "pipe").unet(x, sigmas).sample
        with pytest.MonkeyPatch.context() as patch:  # the network that gives what the originals' code gives
            for module in elu.unet.modules():
                if hasattr(module, "act"):
                    patch.setattr(module, "act", act)
            patch.setattr(elu.unet, "_act", act)
            expected = elu.unet(x, sigmas).sample
        assert_same(found, expected, 1e-5)
        assert (found - published).abs().max() > 0.1 * published.abs().max()
    with pytest.raises(ValueError, match="`act_fn` must be one of elu, relu, leaky_relu, silu, not 'lrelu'"):
        converted(tmp_path, parts, sample_size=16, act_fn="lrelu")
    with pytest.raises(ValueError, match="`act_fn`='relu': diffusers' network has the activation swish"):
        converted(tmp_path, {"model": weights("ncsnpp", reference.geometric(348, 0.01, 20))}, act_fn="relu")


# Small NCSN++, whose normalizations have other groups than diffusers' blocks


@torch.no_grad()
def test_the_reference_written_anew_is_the_originals():
    shapes, x, sigmas, expected = reference.read("ncsnpp")
    network = reference.NCSNpp(32, (1, 4, 4), 1, {1})
    assert network.shapes == shapes
    assert_same(
        network(reference.make_state(shapes, sigmas=reference.geometric(348, 0.01, 20)), x, sigmas), expected, 2e-6
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("nf", "ch_mult", "num_res_blocks", "attention", "network_class"),
    [
        (64, (1, 1, 2), 1, {1}, SkipUNet2DModel),
        (96, (1, 1, 1), 1, {1}, SkipUNet2DModel),
        (32, (1, 2, 3), 2, {1, 2}, SkipUNet2DModel),
        (32, (1, 2), 1, set(), UNet2DModel),
        (128, (1, 1, 2), 1, {1}, UNet2DModel),
    ],
)
def test_small_ncsnpp(tmp_path, nf, ch_mult, num_res_blocks, attention, network_class):
    network = reference.NCSNpp(nf, ch_mult, num_res_blocks, attention)
    state = reference.make_state(network.shapes, sigmas=reference.geometric(348, 0.01, 20))
    converted(tmp_path, {"model": state, "ema": None}).save_pretrained(tmp_path / "pipe")
    pipe = NCSNPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.unet) is network_class
    sigmas = torch.tensor([20.0, 0.5])
    x = reference.make_sample((2, 3, 16, 16), sigmas)
    assert_same(pipe.unet(x, sigmas).sample, network(state, x, sigmas), 2e-6)
    files = collect_files(tmp_path / "pipe", "ann/small")
    assert any(name.startswith("unet/networks_ncsn") for name in files) == (network_class is SkipUNet2DModel)


def test_ncsnpp_of_a_width_that_diffusers_blocks_have_not(tmp_path):
    state = reference.make_state(reference.NCSNpp(48, (1, 2), 1, {1}).shapes, sigmas=reference.geometric(348, 0.01, 20))
    with pytest.raises(OSError, match="a level has 48 channels, and its blocks need multiples of 32"):
        converted(tmp_path, {"model": state})


def without(state, *names):
    return {key: tensor for key, tensor in state.items() if key.removeprefix("module.") not in names}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: without(s, "res2.0.conv1.bias"), "lacks `res2.0.conv1.bias`"),
        (lambda s: {**s, "module.extra": torch.zeros(1)}, "has `extra`"),
        (lambda s: {**s, "module.end_conv.bias": torch.zeros(5)}, r"`end_conv.bias` has shape \[5\], and \[1\]"),
        (lambda s: {**s, "module.end_conv.bias": torch.tensor([math.nan])}, "`end_conv.bias` holds NaN"),
        (lambda s: {**s, "module.normalizer.embed.weight": torch.zeros(10, 16)}, r"not InstanceNorm\+\+"),
        (lambda s: {"module.down1.weight": torch.zeros(1)}, "no RefineNet of the NCSN papers but `down1.weight`"),
        (lambda s: {**s, "module.end_conv.bias": 3}, "must be a dictionary of tensors"),
    ],
)
def test_tensors_are_named(tmp_path, change, named):
    with pytest.raises(OSError, match=named):
        converted(tmp_path, [change(weights("ncsn")), OPTIMIZER])


def test_an_average_of_other_weights_is_refused(tmp_path):
    model = weights("ncsnv2", LADDER)
    average = {
        key.removeprefix("module."): t for key, t in model.items() if not key.endswith(("sigmas", "end_conv.bias"))
    }
    with pytest.raises(OSError, match=r"differ in `end_conv.bias`"):
        converted(tmp_path, [model, OPTIMIZER, 1, 2, average], sample_size=16)


@pytest.mark.parametrize("parts", [3, {"a": 1}, [], [torch.zeros(1)]])
def test_something_else_is_refused(tmp_path, parts):
    with pytest.raises(OSError, match="and no checkpoint of a kind that can be converted"):
        converted(tmp_path, parts)


def test_ncsnpp_that_diffusers_has_not_is_refused(tmp_path):
    model = weights("ncsnpp", reference.geometric(348, 0.01, 20))
    residual = {**without(model), "module.all_modules.6.Conv2d_0.weight": torch.zeros(32, 3, 3, 3)}
    with pytest.raises(OSError, match="progressive_input='residual'"):
        converted(tmp_path, {"model": residual, "ema": None})
    with pytest.raises(OSError, match="embedding_type='fourier'"):
        converted(tmp_path, {"model": without(model, "all_modules.0.W"), "ema": None})
    other = {key: t for key, t in model.items() if not key.startswith("module.all_modules.13.")}
    with pytest.raises(OSError, match="in another order"):
        converted(tmp_path, {"model": other, "ema": None})
    with pytest.raises(OSError, match="`shadow_params` of its `ema` do not have the shapes"):
        converted(tmp_path, {"model": model, "ema": {"shadow_params": [torch.zeros(3)]}})
    with pytest.raises(OSError, match="another network of score_sde"):
        converted(tmp_path, {"model": {"module.begin_conv.weight": torch.zeros(1)}, "ema": None})


@pytest.mark.parametrize(
    ("name", "given", "named"),
    [
        ("ncsnv2", {}, "`sample_size` must be given"),
        ("ncsnv2", {"sample_size": 16, "sigma_max": 3}, "`sigma_max`=3: the file has the noise levels"),
        ("ncsnv2", {"sample_size": 16, "num_langevin_steps": 3}, "needs `step_lr`"),
        ("ncsnv2", {"sample_size": 16, "step_lr": 2e-4}, "`step_lr`=0.0002 must be at most"),
        ("ncsnv2", {"sample_size": 0}, "`sample_size` must be above 0"),
        ("ncsnv2", {"sample_size": 16, "data_min": 0.5}, "`data_min` must be -1 or 0"),
        ("ncsn", {"num_train_timesteps": 12}, "the network has embeddings for 10 levels"),
        ("adversarial", {"sample_size": 16}, "`sigma_max` and `num_train_timesteps` must be given"),
        ("adversarial", {"sigma_max": 50, "num_train_timesteps": 1}, "at least 2 levels"),
    ],
)
def test_arguments_are_checked(tmp_path, name, given, named):
    with pytest.raises(ValueError, match=named):
        converted(tmp_path, [weights(name, LADDER), OPTIMIZER], **given)


# The command


def test_a_command_that_is_killed_can_be_given_again(tmp_path, monkeypatch):
    torch.save([weights("ncsnv2", LADDER), OPTIMIZER], tmp_path / "checkpoint.pth")
    folder = tmp_path / "pipelines" / "new"
    config = ConvertConfig(str(tmp_path / "checkpoint.pth"), str(folder), sample_size=16)
    for name in ("os.replace", "pathlib.Path.rename"):  # while it writes; when all is written
        process = os.fork()
        if process == 0:
            monkeypatch.setattr(name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            convert_checkpoint(config)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        assert not folder.exists() and len(list(folder.parent.iterdir())) == 1
    folder.mkdir()
    convert_checkpoint(config)
    assert [path.name for path in folder.parent.iterdir()] == ["new"]
    assert NCSNPipeline.from_pretrained(folder).unet.config.sample_size == 16
    with pytest.raises(FileExistsError, match="exists: give a new folder"):
        convert_checkpoint(config)


def test_command(tmp_path):
    torch.save([weights("ncsnv2", LADDER), OPTIMIZER], tmp_path / "checkpoint.pth")
    command = ["-m", "ncsn_diffusers.commands.convert", "checkpoint.pth", "pipeline"]
    result = run_forked(*command, "--sample_size", 16, "--data_min", -1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Saved a RefineNet2DModel of 117,323 parameters" in result.stdout
    assert "the optimizer's state (1 tensors)" in result.stderr
    pipe = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    assert (pipe.units.data_mean, pipe.units.data_std) == (0.5, 0.25)  # the network sees [-1, 1]
    assert not pipe.unet.config.center_input_sample
