"""
The demo page: what it draws is what the pipelines draw, whatever else runs beside it; what cannot be right is refused
with a sentence. The page itself is spoken to by gradio's client, where gradio is installed.
"""

import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from networks import Gaussian, GaussianUNet, conditional_unet, quiet_pipeline, small_unet, train_sigmas
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNInpaintPipeline
from ncsn_diffusers.commands import demo
from ncsn_diffusers.demo import Chains, launch, page, serve
from ncsn_diffusers.demo.chains import (
    MAX_FRAMES,
    MAX_SEED,
    find_levels,
    fit_image,
    largest_blur,
    list_blocks,
    make_operator,
    read_mask,
    read_upload,
)
from ncsn_diffusers.hub import push_to_hub
from ncsn_diffusers.images import make_grid
from ncsn_diffusers.operators import LinearOperator
from ncsn_diffusers.sampling import make_generators

SHAPE = (1, 8, 8)


class GatedUNet(torch.nn.Module):
    """A network that waits, at each evaluation, until it is let through: so a test decides how far a run gets."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.evaluations, self.passes = unet, 0, threading.Semaphore(0)

    config = property(lambda self: self.unet.config)
    dtype = property(lambda self: self.unet.dtype)
    device = property(lambda self: self.unet.device)

    def forward(self, *args, **kwargs):
        assert self.passes.acquire(timeout=60)
        self.evaluations += 1
        return self.unet(*args, **kwargs)


@pytest.fixture
def pipe():
    return quiet_pipeline(small_unet())


@pytest.fixture
def chains(pipe):
    return Chains(pipe)


def end(run):
    """The run's frames and result."""
    for _ in run.steps():
        pass
    assert run.done
    return run.frames, run.result


def draw(pipe, scheduler=None, seed=0, num_images=1, levels=None, **arguments):
    """What the pipeline itself draws, as a grid."""
    scheduler = (scheduler or type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe = quiet_pipeline(pipe.unet, scheduler)
    generators = make_generators(seed, range(num_images))
    images = pipe(batch_size=num_images, num_inference_steps=levels, generator=generators, **arguments).images
    return make_grid(images)


def same(image, expected):
    return image.mode == expected.mode and np.array_equal(np.asarray(image), np.asarray(expected))


# --- Runs ---


@pytest.mark.parametrize(
    ("scheduler", "levels"),
    [(AnnealedLangevinScheduler, 9), (EulerDiscreteScheduler, 9), (HeunDiscreteScheduler, 5)],
)
def test_draw_is_what_the_pipeline_draws(pipe, chains, scheduler, levels):
    frames, image = end(chains.draw("any", 9, scheduler.__name__, 3, 2))
    assert same(image, draw(pipe, scheduler, 3, 2, levels))
    assert [frame.step for frame in frames] == list(range(1, 10))
    assert {frame.num_steps for frame in frames} == {9}
    sigmas = [frame.sigma for frame in frames]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[0] > 10 * sigmas[-1]
    assert frames[-1].denoised.size == frames[-1].noisy.size == image.size == (16, 8)


def test_a_frame_holds_the_estimate_of_its_level_and_the_sample_after_the_step(pipe, chains):
    found = []

    def callback(pipe, step, timestep, tensors):
        found.append({name: tensor.clone() for name, tensor in tensors.items()})

    names = ["latents", "denoised", "sigma"]
    draw(pipe, seed=1, levels=5, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    frames, _ = end(chains.draw("any", 5, "AnnealedLangevinScheduler", 1, 1))
    for frame, tensors in zip(frames, found, strict=True):
        assert frame.sigma == tensors["sigma"].item()
        for image, name in ((frame.denoised, "denoised"), (frame.noisy, "latents")):
            pixels = (tensors[name][0, 0].clamp(-1, 1) + 1) * 127.5
            np.testing.assert_allclose(np.asarray(image), pixels, atol=0.51)  # rounding to 8 bits


def test_of_a_long_chain_few_frames_are_kept_and_the_last(chains):
    frames, _ = end(chains.draw("any", 120, "EulerDiscreteScheduler", 0, 1))
    steps = [frame.step for frame in frames]
    assert len(steps) == MAX_FRAMES and steps[0] == 1 and steps[-1] == 120
    assert {b - a for a, b in itertools.pairwise(steps)} <= {2, 3}


def test_classes(pipe):
    pipe = quiet_pipeline(conditional_unet())
    chains = Chains(pipe)
    assert chains.classes == ["any", "0", "1", "2"]
    drawn = {}
    for label, arguments in (("any", {}), ("0", {"class_labels": 0}), ("2", {"class_labels": 2})):
        _, drawn[label] = end(chains.draw(label, 4, "AnnealedLangevinScheduler", 0, 1))
        assert same(drawn[label], draw(pipe, levels=4, **arguments))
    assert not same(drawn["0"], drawn["2"]) and not same(drawn["any"], drawn["2"])
    image = Image.new("L", (8, 8), 128)
    for label in ("3", "in turn"):
        with pytest.raises(ValueError, match=f"Class must be any, or from 0 to 2, not '{label}'"):
            chains.restore(image, "noisy", None, None, 0.5, label, 2, 0)


def test_classes_in_turn(pipe):
    pipe = quiet_pipeline(conditional_unet())
    chains = Chains(pipe)
    _, image = end(chains.draw("in turn", 4, "AnnealedLangevinScheduler", 4, 2))
    assert same(image, draw(pipe, seed=4, num_images=2, levels=4, class_labels=[1, 2]))
    _, ((grid, _),) = end(chains.compare("in turn", 4, ["AnnealedLangevinScheduler"], 4, 2))
    assert same(grid, image)
    for run in (
        lambda: chains.draw("3", 4, "AnnealedLangevinScheduler", 0, 1),
        lambda: chains.compare("3", 4, ["DDIMScheduler"], 0, 1),
    ):
        with pytest.raises(ValueError, match="Class must be in turn, any, or from 0 to 2, not '3'"):
            run()


def test_a_network_without_classes_takes_the_class_in_turn_as_any(pipe, chains):
    # the buttons that draw an example ask for it
    _, image = end(chains.draw("in turn", 4, "AnnealedLangevinScheduler", 4, 2))
    assert same(image, draw(pipe, seed=4, num_images=2, levels=4))


@pytest.mark.parametrize(
    ("scheduler", "evaluations", "levels"),
    [
        (AnnealedLangevinScheduler, 20, 20),
        (HeunDiscreteScheduler, 20, 10),  # 2 n - 1
        (HeunDiscreteScheduler, 21, 11),
        (PNDMScheduler, 20, 11),  # n + 9
        (PNDMScheduler, 13, 4),
        (EulerDiscreteScheduler, 1, 1),
    ],
)
def test_levels_for_a_number_of_evaluations(scheduler, evaluations, levels):
    scheduler = scheduler.from_config(AnnealedLangevinScheduler().config)
    assert find_levels(scheduler, evaluations) == levels
    scheduler.set_timesteps(levels)
    assert len(scheduler.timesteps) <= evaluations


def test_levels_of_several_langevin_steps():
    assert find_levels(AnnealedLangevinScheduler(num_langevin_steps=5), 24) == 4
    with pytest.raises(ValueError, match="Evaluations must be at least 5 for AnnealedLangevinScheduler, not 4"):
        find_levels(AnnealedLangevinScheduler(num_langevin_steps=5), 4)
    with pytest.raises(ValueError, match="Evaluations must be at least 13 for PNDMScheduler, not 12"):
        find_levels(PNDMScheduler.from_config(AnnealedLangevinScheduler().config), 12)


def test_a_pipeline_with_a_long_chain_of_its_own_may_take_it():
    scheduler = AnnealedLangevinScheduler(num_langevin_steps=5, noise_rule="euler_maruyama", solver_order=1)
    chains = Chains(quiet_pipeline(small_unet(), scheduler, num_inference_steps=60), max_evaluations=100)
    assert chains.evaluations == chains.max_evaluations == 301  # with the final denoising
    assert chains.levels == chains.max_levels(4) == 60
    chains = Chains(quiet_pipeline(small_unet()), max_evaluations=100)
    assert (chains.evaluations, chains.max_evaluations, chains.levels, chains.max_levels(4)) == (50, 100, 25, 25)


def test_networks_that_are_given_sigma_have_one_scheduler():
    scheduler = AnnealedLangevinScheduler(conditioning="sigma", prediction_type="score")
    assert Chains(quiet_pipeline(small_unet(), scheduler)).schedulers == ["AnnealedLangevinScheduler"]
    assert "HeunDiscreteScheduler" in Chains(quiet_pipeline(small_unet())).schedulers
    own = Chains(quiet_pipeline(small_unet(), HeunDiscreteScheduler.from_config(AnnealedLangevinScheduler().config)))
    assert own.schedulers[:2] == ["HeunDiscreteScheduler", "AnnealedLangevinScheduler"]


def gated():
    unet = GatedUNet(small_unet())
    pipe = quiet_pipeline(small_unet())
    pipe.unet = unet
    return unet, Chains(pipe)


def test_stop_ends_the_pipeline_after_its_step():
    unet, chains = gated()
    run = chains.draw("any", 50, "AnnealedLangevinScheduler", 0, 1)
    unet.passes.release(3)
    steps = run.steps()
    while next(steps).step < 3:
        pass
    run.stop()
    unet.passes.release(50)
    run.wait()
    assert unet.evaluations == 4  # that which had begun
    assert run.frames[-1].step == 4
    assert same(run.result, run.frames[-1].denoised)


def test_who_leaves_stops_the_run():
    unet, chains = gated()
    run = chains.draw("any", 50, "AnnealedLangevinScheduler", 0, 1)
    unet.passes.release(1)
    steps = run.steps()
    next(steps)
    steps.close()
    unet.passes.release(50)
    run.wait()
    assert unet.evaluations == 2


def test_runs_beside_one_another_do_not_mix(pipe, chains):
    cases = [(name, seed) for seed in range(2) for name in ("AnnealedLangevinScheduler", "DPMSolverMultistepScheduler")]
    runs = [chains.draw("any", 12, name, seed, 1) for name, seed in cases]
    stopped = chains.draw("any", 200, "AnnealedLangevinScheduler", 0, 1)
    stopped.stop()
    for (name, seed), run in zip(cases, runs, strict=True):
        frames, image = end(run)
        assert len(frames) == 12
        assert same(image, end(chains.draw("any", 12, name, seed, 1))[1])
    stopped.wait()
    assert len(stopped.frames) < 10
    assert not pipe.interrupt and pipe.num_timesteps is None  # nobody runs the shared one


def test_errors_of_the_work_come_to_who_watches():
    pipe = quiet_pipeline(small_unet())
    torch.nn.init.constant_(pipe.unet.conv_out.bias, torch.nan)
    run = Chains(pipe).draw("any", 3, "AnnealedLangevinScheduler", 0, 1)
    with pytest.raises(FloatingPointError, match="AnnealedLangevinScheduler"):
        end(run)


def test_compare_draws_the_same_seed_under_each_scheduler(pipe, chains):
    names = ["AnnealedLangevinScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]
    _, result = end(chains.compare("any", 20, names, 5, 2))
    assert [caption for _, caption in result] == [
        "AnnealedLangevinScheduler: 20 evaluations",
        "HeunDiscreteScheduler: 19 evaluations",
        "PNDMScheduler: 20 evaluations",
    ]
    for (image, _), scheduler, levels in zip(
        result, (AnnealedLangevinScheduler, HeunDiscreteScheduler, PNDMScheduler), (20, 10, 11), strict=True
    ):
        assert same(image, draw(pipe, scheduler, 5, 2, levels))


# --- Inpainting and restoring ---


def paint(box, size=(80, 80)):
    """A layer of the editor, painted in a rectangle."""
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    layer.paste((228, 87, 46, 255), box)
    return layer


def test_inpainting_keeps_what_is_not_painted(pipe, chains):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    _, result = end(chains.inpaint(image, [paint((0, 0, 40, 80))], "any", 4, 7))
    assert len(result) == 3
    for completion in result:
        assert same(completion.crop((4, 0, 8, 8)), image.crop((4, 0, 8, 8)))
        assert not same(completion, image)
    mask = Image.fromarray(np.repeat([[255] * 4 + [0] * 4], 8, 0).astype(np.uint8))
    expected = quiet_pipeline(pipe.unet, cls=NCSNInpaintPipeline)(
        image, mask, batch_size=3, num_inference_steps=4, generator=make_generators(7, range(3))
    ).images
    assert all(map(same, result, expected))


def test_the_mask_is_what_is_covered_by_half():
    mask = np.asarray(read_mask([paint((0, 0, 24, 16)), paint((70, 66, 80, 80))], (8, 8)))
    expected = np.zeros((8, 8))
    expected[:2, :2] = 255  # the third column is covered by 4 of 10 pixels
    expected[7, 7] = 255  # and the seventh row by 4 of 10
    np.testing.assert_array_equal(mask, expected)
    for layers in (None, [], [paint((0, 0, 3, 3))]):
        with pytest.raises(ValueError, match="Nothing is painted: paint over"):
            read_mask(layers, (8, 8))


def smooth_pipeline():
    """The perfect network for smooth Gaussian images of 8 × 8 pixels around black and white's middle."""
    y, x = np.mgrid[:8, :8].reshape(2, -1)
    distances = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    gaussian = Gaussian(np.zeros(64), 0.09 * np.exp(-distances / 8) + 1e-4 * np.eye(64))
    scheduler = AnnealedLangevinScheduler()
    return gaussian, quiet_pipeline(GaussianUNet(gaussian, 8, 8, train_sigmas(scheduler)), scheduler)


@pytest.mark.parametrize("damage", ["pixelated", "blurred", "noisy"])
def test_what_is_restored_fits_the_damaged_image(damage):
    gaussian, pipe = smooth_pipeline()
    chol = torch.linalg.cholesky(gaussian.covariance)
    truth = (chol @ torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).reshape(8, 8)
    image = Image.fromarray(((truth.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
    _, result = end(Chains(pipe).restore(image, damage, 2, 0.8, 0.1, "any", 12, 3))
    captions = [caption for _, caption in result]
    assert captions == [damage, "restored", "restored", "restored"]
    operator = make_operator(damage, 2, 0.8, SHAPE)
    arrays = [torch.from_numpy(np.array(i)).float()[None, None] / 127.5 - 1 for i in (image, *(r for r, _ in result))]
    measured = operator(arrays[1]) if damage == "pixelated" else arrays[1]
    # the damaged image is A x + n
    noise = measured - operator(arrays[0])
    assert 0.07 < noise.std() < 0.13
    restored = torch.cat(arrays[2:])
    # and so is it of what is restored: the residual is the noise's size, 0.1, to sampling error
    residual = (operator(restored) - measured).square().mean().sqrt()
    assert 0.06 < residual < 0.14
    # the restored images come nearer to the image than draws of the prior, which are √2 · 0.3 away
    assert (restored - arrays[0]).square().mean().sqrt() < 0.25
    assert not torch.equal(restored[0], restored[1])


def test_the_noise_is_not_that_of_the_first_sample():
    _, pipe = smooth_pipeline()
    image = Image.new("L", (8, 8), 128)
    _, result = end(Chains(pipe).restore(image, "noisy", None, None, 0.2, "any", 2, 5))
    damaged = torch.from_numpy(np.array(result[0][0])).double().flatten() / 127.5 - 1
    start = torch.randn(64, generator=torch.Generator().manual_seed(5)).double()
    assert abs(torch.corrcoef(torch.stack([damaged, start]))[0, 1]) < 0.5  # four standard errors


def test_operators():
    x = torch.zeros(1, 1, 28, 28)
    x[..., 14, 13] = 1
    for damage, block, blur in (("pixelated", 7, None), ("blurred", None, 1.5), ("noisy", None, None)):
        operator = make_operator(damage, block, blur, (1, 28, 28))
        LinearOperator(operator, (2, 1, 28, 28))  # which tries out that it is linear, with an adjoint
        torch.testing.assert_close(operator(torch.full_like(x, 0.3)), torch.full_like(operator(x), 0.3))
    y = make_operator("blurred", None, 1.5, (1, 28, 28))(x)[0, 0].double()
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    expected = torch.exp(-((rows - 14) ** 2 + (columns - 13) ** 2) / (2 * 1.5**2)) / (2 * math.pi * 1.5**2)
    torch.testing.assert_close(y, expected.double(), rtol=0, atol=1e-3)  # cut off at 3 standard deviations
    assert make_operator("pixelated", 7, None, (1, 28, 28))(x)[0, 0, 2, 1] == 1 / 49
    assert list_blocks((1, 28, 28)) == [2, 4, 7] and largest_blur((1, 28, 28)) == 3.5
    three = make_operator("blurred", None, 1.0, (3, 32, 32))(torch.randn(2, 3, 32, 32))
    assert three.shape == (2, 3, 32, 32)


# --- What is refused ---

GOOD = {
    "draw": {"label": "any", "evaluations": 3, "scheduler": "AnnealedLangevinScheduler", "seed": 0, "num_images": 1},
    "compare": {"label": "any", "evaluations": 3, "schedulers": ["DDIMScheduler"], "seed": 0, "num_images": 1},
    "inpaint": {
        "image": Image.new("L", (8, 8)),
        "layers": [paint((0, 0, 40, 40))],
        "label": "any",
        "levels": 2,
        "seed": 0,
    },
    "restore": {
        "image": Image.new("L", (8, 8)),
        "damage": "noisy",
        "block": 2,
        "blur": 1.0,
        "noise_std": 0.1,
        "label": "any",
        "levels": 2,
        "seed": 0,
    },
}
SEED = f"Seed must be a whole number from 0 to {MAX_SEED}, not "
BAD = [
    ("draw", "evaluations", 0, "Evaluations must be a whole number from 1 to 200, not 0."),
    ("draw", "evaluations", 201, "Evaluations must be a whole number from 1 to 200, not 201."),
    ("draw", "evaluations", 2.5, "Evaluations must be a whole number from 1 to 200, not 2.5."),
    ("draw", "evaluations", None, "Evaluations must be a whole number from 1 to 200, not empty."),
    ("draw", "evaluations", "many", "Evaluations must be a whole number from 1 to 200, not 'many'."),
    ("draw", "evaluations", math.nan, "Evaluations must be a whole number from 1 to 200, not nan."),
    ("draw", "evaluations", True, "Evaluations must be a whole number from 1 to 200, not True."),
    ("draw", "scheduler", "PlainScheduler", "Scheduler must be one of AnnealedLangevinScheduler, "),
    ("draw", "scheduler", ["DDIMScheduler"], "Scheduler must be one of AnnealedLangevinScheduler, "),
    ("draw", "seed", -1, SEED + "-1."),
    ("draw", "seed", math.inf, SEED + "inf."),
    ("draw", "seed", 2**32, SEED + "4294967296."),
    ("draw", "num_images", 17, "Images must be a whole number from 1 to 16, not 17."),
    ("compare", "evaluations", 0, "Evaluations must be a whole number from 1 to 200, not 0."),
    ("compare", "schedulers", [], "Schedulers: choose from 1 to 6 of them."),
    ("compare", "schedulers", None, "Schedulers: choose from 1 to 6 of them."),
    ("compare", "schedulers", list("abcdefg"), "Schedulers: choose from 1 to 6 of them."),
    ("compare", "schedulers", ["DDIMScheduler", 3], "Scheduler must be one of AnnealedLangevinScheduler, "),
    ("compare", "seed", 0.5, SEED + "0.5."),
    ("compare", "num_images", 0, "Images must be a whole number from 1 to 16, not 0."),
    ("inpaint", "image", None, "There is no image yet: draw an example, or upload one."),
    ("inpaint", "layers", None, "Nothing is painted: paint over the part of the image that is to be drawn anew."),
    ("inpaint", "levels", 51, "Noise levels must be a whole number from 1 to 50, not 51."),
    ("inpaint", "seed", "x" * 1000, SEED + "'xxxxxxxxxxxx...xxxxxxxxxxxxx'."),
    ("restore", "image", None, "There is no image yet: draw an example, or upload one."),
    ("restore", "damage", "torn", "Damage must be one of pixelated, blurred, noisy, not 'torn'."),
    ("restore", "noise_std", 2.1, "Noise must be a number from 0 to 2, not 2.1."),
    ("restore", "noise_std", 0, "Noise must be above 0 for a noisy image."),
    ("restore", "noise_std", math.nan, "Noise must be a number from 0 to 2, not nan."),
    ("restore", "levels", 101, "Noise levels must be a whole number from 1 to 100, not 101."),
    ("restore", "seed", None, SEED + "empty."),
]


@pytest.mark.parametrize(("method", "field", "value", "sentence"), BAD)
def test_bad_input_is_refused_with_what_would_be_accepted(chains, method, field, value, sentence):
    with pytest.raises(ValueError) as error:
        getattr(chains, method)(**{**GOOD[method], field: value})
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("method", GOOD)
def test_good_input_is_not(chains, method):
    end(getattr(chains, method)(**GOOD[method]))


@pytest.mark.parametrize(
    ("damage", "block", "blur", "sentence"),
    [
        ("pixelated", 3, None, "Block must be one of 2 pixels, not 3."),
        ("pixelated", None, None, "Block must be one of 2 pixels, not empty."),
        ("blurred", None, 1.1, "Blur must be a number from 0.3 to 1, not 1.1."),
        ("blurred", None, "much", "Blur must be a number from 0.3 to 1, not 'much'."),
    ],
)
def test_damage_that_the_image_does_not_allow(damage, block, blur, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_operator(damage, block, blur, SHAPE)


def test_limits_and_networks_that_cannot_be_shown():
    for name in ("max_evaluations", "max_images"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, not 0"):
            Chains(quiet_pipeline(small_unet()), **{name: 0})
    with pytest.raises(ValueError, match="1, 3 or 4 channels, and the network has 2"):
        Chains(quiet_pipeline(small_unet(channels=2, out_channels=2)))


# --- Uploads ---


def test_uploads_are_fitted_and_deleted(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    large = Image.fromarray(pixels).resize((24, 24), Image.Resampling.NEAREST)
    wide = Image.new("L", (40, 24), 7)
    wide.paste(large, (8, 0))
    for image in (large, wide, large.convert("RGB"), large.convert("RGBA")):
        image.save(tmp_path / "image.png")
        assert same(read_upload(tmp_path / "image.png", SHAPE), Image.fromarray(pixels))
        assert not list(tmp_path.iterdir())
    assert fit_image(large, (3, 8, 4)).size == (4, 8) and fit_image(large, (3, 8, 4)).mode == "RGB"
    assert fit_image(Image.new("L", (2, 2), 9), (4, 8, 8)).mode == "RGBA"


def test_uploads_that_are_no_images_are_deleted_too(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(whole)
    for content in (b"", b"text", whole.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not an image that can be read: upload a PNG, JPEG or WebP file"):
            read_upload(path, SHAPE)
        assert not path.exists()
    with pytest.raises(ValueError, match="not an image that can be read"):
        read_upload(path, SHAPE)  # gone already
    monkeypatch.setattr("ncsn_diffusers.demo.chains.MAX_PIXELS", 4095)
    with pytest.raises(ValueError, match="64 × 64 pixels: upload one of 4,095 or less"):
        read_upload(whole, SHAPE)
    assert not whole.exists()


# --- The page ---


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"needs gradio.*pip install 'ncsn_diffusers\[demo\]'"):
        launch("there is no such pipeline")


def test_limits_are_refused_before_the_pipeline_is_loaded():
    pytest.importorskip("gradio")
    with pytest.raises(ValueError, match="`num_parallel` must be at least 1, not 0"):
        launch("there is no such pipeline", num_parallel=0)


class Visitor:
    """A client of the page, with a session of its own. Image files come as PIL images."""

    def __init__(self, url, folder):
        client_class = pytest.importorskip("gradio_client").Client
        self.client = client_class(url, download_files=folder, verbose=False, analytics_enabled=False)

    def submit(self, name, *values):
        return self.client.submit(*values, api_name=f"/{name}")

    def __call__(self, name, *values):
        return self.read(self.client.predict(*values, api_name=f"/{name}"))

    def read(self, value):
        if isinstance(value, list | tuple):
            return [self.read(part) for part in value]
        if isinstance(value, dict) and "image" in value:
            return self.read(value["image"]), value["caption"]
        if isinstance(value, str) and value.endswith(".png"):
            with Image.open(value) as image:
                return image.copy()
        return value

    def refusal(self, name, *values):
        """The sentence that the page shows."""
        with pytest.raises(Exception) as error:
            self.client.predict(*values, api_name=f"/{name}")
        assert type(error.value).__name__ == "AppError"
        return str(error.value)


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("gradio")
    with serve(quiet_pipeline(small_unet()), num_parallel=3) as url:
        yield url


@pytest.fixture
def visitor(url, tmp_path):
    return Visitor(url, str(tmp_path / "downloads"))


def test_the_page_draws_what_the_pipeline_draws_and_goes_back(visitor, pipe):
    job = visitor.submit("draw", "any", 7, "HeunDiscreteScheduler", 4, 2)
    denoised, noisy, status, slider, level = visitor.read(job.result(timeout=60))
    assert same(denoised, draw(pipe, HeunDiscreteScheduler, 4, 2, 4))
    assert noisy.size == (16, 8) and "Done." in status and '<progress value="7" max="7">' in status
    assert (slider["value"], slider["maximum"], slider["interactive"]) == (7, 7, True)
    assert level.startswith("After step 7 of 7. Noise level: σ = ")
    frames, _ = end(Chains(pipe).draw("any", 7, "HeunDiscreteScheduler", 4, 2))
    for position in (1, 4, 7):
        denoised, noisy, level = visitor("go_back", position)
        assert same(noisy, frames[position - 1].noisy)
        if position < 7:
            assert same(denoised, frames[position - 1].denoised)
        assert level == f"After step {position} of 7. Noise level: σ = {frames[position - 1].sigma:.3g}"


def test_the_page_refuses_with_a_sentence(visitor, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    assert "There is no chain to go back through yet" in visitor.refusal("go_back", 1)
    own = "AnnealedLangevinScheduler"
    for method, field, value, sentence in BAD:
        if method in ("draw", "compare") and field not in ("scheduler", "schedulers"):
            values = {**GOOD[method], field: value}
            if isinstance(value, float) and not math.isfinite(value):
                continue  # JSON has no such numbers
            assert sentence in visitor.refusal(method, *values.values()), (method, field, value)
    assert "is not in the list of choices" in visitor.refusal("draw", "any", 3, "PlainScheduler", 0, 1)
    assert "is not in the list of choices" in visitor.refusal("draw", "7", 3, own, 0, 1)
    assert "choose from 1 to 6" in visitor.refusal("compare", "any", 3, [], 0, 1)
    nothing = {"background": None, "layers": [], "composite": None}
    assert "There is no image yet" in visitor.refusal("inpaint", nothing, "any", 2, 0)
    assert "There is no image yet" in visitor.refusal("restore", "noisy", 2, 1, 0.1, "any", 2, 0)
    assert "Seed must be a whole number" in visitor.refusal("example_inpaint", -1)
    (tmp_path / "image.png").write_bytes(b"text")
    file = gradio_client.handle_file(str(tmp_path / "image.png"))
    assert "not an image that can be read" in visitor.refusal("upload_inpaint", file)
    visitor("example_inpaint", 0)
    assert "Nothing is painted" in visitor.refusal("inpaint", nothing, "any", 2, 0)
    visitor("example_restore", 0)
    assert "Noise must be a number from 0 to 2, not 3" in visitor.refusal("restore", "noisy", 2, 1, 3, "any", 2, 0)
    assert "Blur must be a number from 0.3 to 1" in visitor.refusal("restore", "blurred", 2, 9, 1, "any", 2, 0)


def test_an_upload_is_inpainted_restored_and_not_kept(visitor, pipe, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "mine.png")
    paint((0, 0, 168, 336), (336, 336)).save(tmp_path / "layer.png")
    handle = gradio_client.handle_file
    visitor("upload_inpaint", handle(str(tmp_path / "mine.png")))
    assert not [path for path in folder.rglob("mine*") if path.is_file()]
    painted = {"background": None, "layers": [handle(str(tmp_path / "layer.png"))], "composite": None}
    gallery, status = visitor("inpaint", painted, "any", 3, 5)
    expected = end(Chains(pipe).inpaint(image, [paint((0, 0, 40, 80))], "any", 3, 5))[1]
    assert len(gallery) == 3 and "Done." in status
    for (completion, _), wanted in zip(gallery, expected, strict=True):
        assert same(completion, wanted)
        assert same(completion.crop((4, 0, 8, 8)), image.crop((4, 0, 8, 8)))
    shown = visitor("upload_restore", handle(str(tmp_path / "mine.png")))
    assert same(shown, image)
    assert not [path for path in folder.rglob("mine*") if path.is_file()]
    gallery, _ = visitor("restore", "pixelated", 2, 1, 0.1, "any", 2, 5)
    expected = end(Chains(pipe).restore(image, "pixelated", 2, 1, 0.1, "any", 2, 5))[1]
    assert [caption for _, caption in gallery] == ["pixelated", "restored", "restored", "restored"]
    assert all(same(found, wanted) for (found, _), (wanted, _) in zip(gallery, expected, strict=True))


def test_the_page_compares(visitor, pipe):
    gallery, _ = visitor("compare", "any", 5, ["AnnealedLangevinScheduler", "HeunDiscreteScheduler"], 2, 2)
    captions = ["AnnealedLangevinScheduler: 5 evaluations", "HeunDiscreteScheduler: 5 evaluations"]
    assert [caption for _, caption in gallery] == captions
    assert same(gallery[0][0], draw(pipe, seed=2, num_images=2, levels=5))
    assert same(gallery[1][0], draw(pipe, HeunDiscreteScheduler, 2, 2, 3))


def test_two_visitors_do_not_mix(url, pipe, tmp_path):
    visitors = [Visitor(url, str(tmp_path / str(i))) for i in range(2)]
    names = [AnnealedLangevinScheduler, HeunDiscreteScheduler]
    # while the one draws, so does the other
    jobs = [visitor.submit("draw", "any", 20, names[i].__name__, i, 1) for i, visitor in enumerate(visitors)]
    for i, levels in enumerate((20, 10)):
        assert same(visitors[i].read(jobs[i].result(timeout=120))[0], draw(pipe, names[i], i, 1, levels))
    # and each goes back through a chain of their own
    steps = [visitor("go_back", 19)[2].partition(".")[0] for visitor in visitors]
    assert steps == ["After step 19 of 20", "After step 19 of 19"]


@pytest.fixture
def gated_page(tmp_path):
    pytest.importorskip("gradio")
    pipe = quiet_pipeline(small_unet())
    pipe.unet = unet = GatedUNet(pipe.unet)
    with serve(pipe, num_parallel=1) as url:
        yield unet, url
        unet.passes.release(1000)  # whatever still waits


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def let_end(unet):
    """Let the network go on, an evaluation at a time, until nobody asks for another; how many there were."""
    while True:
        number, end = unet.evaluations, time.monotonic() + 3
        unet.passes.release()
        while unet.evaluations == number:
            if time.monotonic() > end:
                return number
            time.sleep(0.02)


def test_stop_and_cancel_end_the_pipeline(gated_page, tmp_path):
    unet, url = gated_page
    visitor = Visitor(url, str(tmp_path / "one"))
    job = visitor.submit("draw", "any", 50, "AnnealedLangevinScheduler", 0, 1)
    unet.passes.release(5)
    wait_for(lambda: unet.evaluations == 5 and job.outputs())
    stop = visitor.submit("stop_draw")
    step = let_end(unet)
    assert step < 50
    denoised, _, status, slider, _ = visitor.read(stop.result(timeout=60))
    assert f"Stopped at step {step} of 50." in status and slider["maximum"] == step
    # what was drawn by then can be gone back through
    assert visitor("go_back", 2)[2].startswith("After step 2 of 50")
    assert same(visitor("go_back", step)[0], denoised)

    # the client's own way: gradio forgets the run, and that ends it
    unet.passes, unet.evaluations = threading.Semaphore(0), 0
    job = visitor.submit("draw", "any", 50, "AnnealedLangevinScheduler", 0, 1)
    unet.passes.release(2)
    wait_for(lambda: unet.evaluations == 2 and job.outputs())
    cancel = threading.Thread(target=job.cancel)  # which waits for the present step
    cancel.start()
    assert let_end(unet) < 50
    cancel.join()

    # one that waits in the queue behind another's
    unet.passes, unet.evaluations = threading.Semaphore(0), 0
    other = Visitor(url, str(tmp_path / "other"))
    first = other.submit("draw", "any", 4, "AnnealedLangevinScheduler", 0, 1)
    wait_for(lambda: first.status().code.name in ("PROCESSING", "ITERATING"))
    second = visitor.submit("draw", "any", 50, "AnnealedLangevinScheduler", 0, 1)
    wait_for(lambda: second.status().code.name == "IN_QUEUE")
    second.cancel()
    assert let_end(unet) == 4
    assert "Done." in first.result(timeout=60)[2]


def call(url, name, *values):
    """The page's answer, as text, without gradio's client, which calls others itself."""
    data, kind = json.dumps({"data": values}).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}gradio_api/call/{name}", data, kind)) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}") as response:
        return response.read().decode()


def test_nothing_is_kept_and_nobody_else_is_called(monkeypatch):
    pytest.importorskip("gradio")
    hosts, look_up, before = set(), socket.getaddrinfo, os.environ.get("GRADIO_TEMP_DIR")

    def record(host, *args, **kwargs):
        hosts.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", record)
    monkeypatch.setattr(page, "DISK_SECONDS", (1, 5))
    with serve(quiet_pipeline(small_unet())) as url:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert "Done." in call(url, "draw", "any", 3, "AnnealedLangevinScheduler", 0, 1)
        assert [path for path in folder.rglob("*") if path.is_file()]
        wait_for(lambda: not [path for path in folder.rglob("*") if path.is_file()])  # by age
        with urllib.request.urlopen(url) as response:
            html = response.read().decode()
        assert "fonts.googleapis" not in html and '"analytics_enabled":false' in html
    assert not folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before
    assert url.startswith("http://127.0.0.1:")
    assert hosts <= {"127.0.0.1", "localhost"}


def test_the_command_hands_its_settings_on(monkeypatch):
    given = []
    monkeypatch.setattr(demo, "launch", lambda **settings: given.append(settings))
    demo.main(["--port", "8000", "--max_evaluations", "30"], "ncsn-diffusers demo")
    limits = {"max_evaluations": 30, "max_images": 16, "num_parallel": 1}
    assert given == [{"pipeline": None, "host": "127.0.0.1", "port": 8000, "open_browser": False, **limits}]


@pytest.mark.slow
def test_a_space_runs_from_its_folder(hub, pipe, tmp_path):
    """Downloaded, in a process that does not know of this repository, with the model from the Hub."""
    pytest.importorskip("gradio")
    push_to_hub(pipe, "digits", space=True)
    space, temporary = tmp_path / "space", tmp_path / "tmp"
    temporary.mkdir()
    for name, content in hub.files("spaces/ann/digits").items():
        path = space / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with open(space / "ncsn_diffusers" / "__init__.py", "a") as file:
        file.write("\nprint(__file__, flush=True)\n")
    environment = {name: value for name, value in hub.environment(tmp_path / "home").items() if name != "PYTHONPATH"}
    environment |= {"TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == f"{space / 'ncsn_diffusers' / '__init__.py'}\n"
            url = re.search(r"at (http://127\.0\.0\.1:\d+/)", process.stdout.readline())[1]
            visitor = Visitor(url, str(tmp_path / "downloads"))
            assert same(visitor("draw", "any", 4, "AnnealedLangevinScheduler", 1, 2)[0], draw(pipe, None, 1, 2, 4))
            assert list(temporary.glob("ncsn-demo-*/*"))
        finally:
            process.terminate()
    assert process.returncode == 0
    assert not list(temporary.glob("ncsn-demo-*"))
