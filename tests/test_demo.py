"""
The demo page: what it draws is what the pipelines draw, whatever else runs beside it; what cannot be right is refused
with a sentence. The page itself is spoken to by gradio's client, where gradio is installed.
"""

import base64
import io
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from networks import FieldUNet, Gaussian, GaussianUNet, conditional_unet, quiet_pipeline, small_unet, train_sigmas
from PIL import Image, ImageFile

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNInpaintPipeline, NCSNPipeline, pretrained
from ncsn_diffusers.commands import demo
from ncsn_diffusers.demo import Chains, FieldChains, launch, page, serve
from ncsn_diffusers.demo.chains import (
    MAX_FRAMES,
    MAX_FRAMES_OF_FIELDS,
    MAX_SEED,
    FieldError,
    Opening,
    find_levels,
    fit_image,
    largest_blur,
    list_blocks,
    make_operator,
    read_mask,
    read_upload,
)
from ncsn_diffusers.hub import push_to_hub
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
    for _ in run.start().steps():
        pass
    assert run.done
    return run.frames, run.result


def draw(pipe, scheduler=None, seed=0, num_images=1, levels=None, **arguments):
    """What the pipeline itself draws."""
    scheduler = (scheduler or type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe = quiet_pipeline(**{**pipe.components, "scheduler": scheduler})
    generators = make_generators(seed, range(num_images))
    return pipe(batch_size=num_images, num_inference_steps=levels, generator=generators, **arguments).images


def same(found, expected):
    """Whether two images, or lists of images, are equal."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found.mode == expected.mode and np.array_equal(np.asarray(found), np.asarray(expected))


# --- Runs ---


@pytest.mark.parametrize(
    ("scheduler", "levels"),
    [(AnnealedLangevinScheduler, 9), (EulerDiscreteScheduler, 9), (HeunDiscreteScheduler, 5)],
)
def test_draw_is_what_the_pipeline_draws(pipe, chains, scheduler, levels):
    frames, images = end(chains.draw("any", 9, scheduler.__name__, 3, 2))
    assert same(images, draw(pipe, scheduler, 3, 2, levels))
    assert [frame.step for frame in frames] == list(range(1, 10))
    assert {frame.num_steps for frame in frames} == {9}
    sigmas = [frame.sigma for frame in frames]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[0] > 10 * sigmas[-1]
    assert [image.size for image in frames[-1].denoised + frames[-1].noisy] == 4 * [(8, 8)]


def test_a_frame_holds_the_estimate_of_its_level_and_the_sample_after_the_step(pipe, chains):
    found = []

    def callback(pipe, step, timestep, tensors):
        found.append({name: tensor.clone() for name, tensor in tensors.items()})

    names = ["latents", "denoised", "sigma"]
    draw(pipe, seed=1, levels=5, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    frames, _ = end(chains.draw("any", 5, "AnnealedLangevinScheduler", 1, 1))
    for frame, tensors in zip(frames, found, strict=True):
        assert frame.sigma == tensors["sigma"].item()
        for (image,), name in ((frame.denoised, "denoised"), (frame.noisy, "latents")):
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
    _, ((images, _),) = end(chains.compare("in turn", 4, ["AnnealedLangevinScheduler"], 4, 2))
    assert same(images, image)
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
    with pytest.raises(ValueError, match="Evaluations must be at least 5 for Annealed Langevin, not 4"):
        find_levels(AnnealedLangevinScheduler(num_langevin_steps=5), 4)
    with pytest.raises(ValueError, match="Evaluations must be at least 13 for PNDM, not 12"):
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
    run = chains.draw("any", 50, "AnnealedLangevinScheduler", 0, 1).start()
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
    run = chains.draw("any", 50, "AnnealedLangevinScheduler", 0, 1).start()
    unet.passes.release(1)
    steps = run.steps()
    next(steps)
    steps.close()
    unet.passes.release(50)
    run.wait()
    assert unet.evaluations == 2


def test_runs_beside_one_another_do_not_mix(pipe, chains):
    cases = [(name, seed) for seed in range(2) for name in ("AnnealedLangevinScheduler", "DPMSolverMultistepScheduler")]
    runs = [chains.draw("any", 12, name, seed, 1).start() for name, seed in cases]
    stopped = chains.draw("any", 200, "AnnealedLangevinScheduler", 0, 1).start()
    stopped.stop()
    for (name, seed), run in zip(cases, runs, strict=True):
        run.wait()
        frames, image = run.frames, run.result
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
        "Annealed Langevin, 20 evaluations",
        "Heun, 19 evaluations",
        "PNDM, 20 evaluations",
    ]
    for (images, _), scheduler, levels in zip(
        result, (AnnealedLangevinScheduler, HeunDiscreteScheduler, PNDMScheduler), (20, 10, 11), strict=True
    ):
        assert same(images, draw(pipe, scheduler, 5, 2, levels))


# --- Inpainting and restoring ---


LEFT_HALF = "11110000" * 8  # of 8 × 8 pixels


def test_inpainting_keeps_what_is_not_painted(pipe, chains):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    _, result = end(chains.inpaint(image, LEFT_HALF, "any", 4, 7))
    assert len(result) == 3
    for completion in result:
        assert same(completion.crop((4, 0, 8, 8)), image.crop((4, 0, 8, 8)))
        assert not same(completion, image)
    mask = Image.fromarray(np.repeat([[255] * 4 + [0] * 4], 8, 0).astype(np.uint8))
    expected = quiet_pipeline(pipe.unet, cls=NCSNInpaintPipeline)(
        image, mask, batch_size=3, num_inference_steps=4, generator=make_generators(7, range(3))
    ).images
    assert same(result, expected)


def test_the_mask_is_a_character_for_each_pixel():
    mask = read_mask("100" + "001", (3, 2))
    np.testing.assert_array_equal(np.asarray(mask), [[255, 0, 0], [0, 0, 255]])
    with pytest.raises(ValueError, match="Nothing is painted: paint over"):
        read_mask("000000", (3, 2))
    for wrong in (None, "", "10000", "10000x", 111111, ["1"] * 6, {"layers": []}, "1" * 10**6):
        with pytest.raises(
            ValueError, match="The mask must be a text of 6 characters, 1 where the image is to be"
        ) as e:
            read_mask(wrong, (3, 2))
        assert len(str(e.value)) < 200


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
    noise_std = 0.05  # of [0, 1]
    chol = torch.linalg.cholesky(gaussian.covariance)
    truth = (chol @ torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).reshape(8, 8)
    image = Image.fromarray(((truth.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
    _, result = end(Chains(pipe).restore(image, damage, 2, 0.8, noise_std, "any", 12, 3))
    captions = [caption for _, caption in result]
    assert captions == ["image", damage, "restored", "restored", "restored"]
    assert same(result.pop(0)[0], image)
    operator = make_operator(damage, 2, 0.8, SHAPE)
    arrays = [torch.from_numpy(np.array(i)).float()[None, None] / 255 for i in (image, *(r for r, _ in result))]
    measured = operator(arrays[1]) if damage == "pixelated" else arrays[1]
    # the damaged image is A x + n
    noise = measured - operator(arrays[0])
    assert 0.7 * noise_std < noise.std() < 1.3 * noise_std
    restored = torch.cat(arrays[2:])
    # and so is it of what is restored: the residual is the noise's size, to sampling error
    residual = (operator(restored) - measured).square().mean().sqrt()
    assert 0.6 * noise_std < residual < 1.4 * noise_std
    # the restored images come nearer to the image than draws of the prior, which are √2 · 0.15 away
    assert (restored - arrays[0]).square().mean().sqrt() < 0.125
    assert not torch.equal(restored[0], restored[1])


def test_the_noise_is_not_that_of_the_first_sample():
    _, pipe = smooth_pipeline()
    image = Image.new("L", (8, 8), 128)
    _, result = end(Chains(pipe).restore(image, "noisy", None, None, 0.1, "any", 2, 5))
    damaged = torch.from_numpy(np.array(result[1][0])).double().flatten() / 127.5 - 1
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
        "mask": LEFT_HALF,
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
    ("draw", "seed", 10**400, SEED + "10000000"),
    ("draw", "evaluations", [20], "Evaluations must be a whole number from 1 to 200, not [20]."),
    ("draw", "num_images", {"a": 1}, "Images must be a whole number from 1 to 16, not {'a': 1}."),
    ("draw", "num_images", 17, "Images must be a whole number from 1 to 16, not 17."),
    ("compare", "evaluations", 0, "Evaluations must be a whole number from 1 to 200, not 0."),
    ("compare", "schedulers", [], "Schedulers: choose from 1 to 6 of them."),
    ("compare", "schedulers", None, "Schedulers: choose from 1 to 6 of them."),
    ("compare", "schedulers", list("abcdefg"), "Schedulers: choose from 1 to 6 of them."),
    ("compare", "schedulers", ["DDIMScheduler", 3], "Scheduler must be one of AnnealedLangevinScheduler, "),
    ("compare", "seed", 0.5, SEED + "0.5."),
    ("compare", "num_images", 0, "Images must be a whole number from 1 to 16, not 0."),
    ("inpaint", "image", None, "There is no image yet: choose an example, or upload one."),
    ("inpaint", "mask", "0" * 64, "Nothing is painted: paint over the part of the image that is to be drawn anew."),
    ("inpaint", "levels", 51, "Noise levels must be a whole number from 1 to 50, not 51."),
    ("inpaint", "seed", "x" * 1000, SEED + "'xxxxxxxxxxxx...xxxxxxxxxxxxx'."),
    ("restore", "image", None, "There is no image yet: choose an example, or upload one."),
    ("restore", "damage", "torn", "Damage must be one of pixelated, blurred, noisy, not 'torn'."),
    ("restore", "noise_std", 2.1, "Noise must be a number from 0 to 1, not 2.1."),
    ("restore", "noise_std", 10**400, "Noise must be a number from 0 to 1, not 1000000"),
    ("restore", "noise_std", None, "Noise must be a number from 0 to 1, not empty."),
    ("restore", "damage", ["noisy"], "Damage must be one of pixelated, blurred, noisy, not ['noisy']."),
    ("restore", "noise_std", 0, "Noise must be above 0 for a noisy image."),
    ("restore", "noise_std", math.nan, "Noise must be a number from 0 to 1, not nan."),
    ("restore", "levels", 101, "Noise levels must be a whole number from 1 to 100, not 101."),
    ("restore", "seed", None, SEED + "empty."),
]


@pytest.mark.parametrize(("method", "field", "value", "sentence"), BAD)
def test_bad_input_is_refused_with_what_would_be_accepted(chains, method, field, value, sentence):
    with pytest.raises(FieldError) as error:
        getattr(chains, method)(**{**GOOD[method], field: value})
    assert str(error.value).startswith(sentence) and error.value.field == field


@pytest.mark.parametrize("method", GOOD)
def test_good_input_is_not(chains, method):
    end(getattr(chains, method)(**GOOD[method]))


@pytest.mark.parametrize(
    ("damage", "block", "blur", "sentence"),
    [
        ("pixelated", 3, None, "Block must be one of 2 pixels, not 3."),
        ("pixelated", [2], None, r"Block must be one of 2 pixels, not \[2\]."),
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
    with pytest.raises(ValueError, match="`Chains` is for images, and this pipeline draws fields"):
        Chains(quiet_pipeline(small_unet(channels=2, out_channels=2)))
    with pytest.raises(ValueError, match="`FieldChains` is for fields, and this pipeline draws images"):
        FieldChains(quiet_pipeline(small_unet()))


# --- Fields ---

KELVIN, VOLTS = (280.0, 12.0), (2e-6, 1e-6)  # mean and standard deviation


def field_pipeline(shape, units=(KELVIN, VOLTS), unit="K"):
    """The exact network of correlated fields, and their Gaussian in the network's units."""
    channels, *sizes = shape
    positions = torch.cartesian_prod(*[torch.arange(float(size)) for size in sizes]).reshape(-1, len(sizes))
    across = 0.6 + 0.4 * torch.eye(channels).double()
    covariance = 0.25 * torch.kron(across, torch.exp(-torch.cdist(positions, positions).double() / 3))
    gaussian = Gaussian(torch.linspace(-0.2, 0.2, len(covariance)), covariance)
    scheduler = AnnealedLangevinScheduler()
    network = FieldUNet(gaussian, shape, train_sigmas(scheduler))
    means, stds = zip(*(units[i % len(units)] for i in range(channels)), strict=True)
    arguments = {"data_mean": list(means), "data_std": list(stds), "value_range": None, "data_unit": unit}
    return gaussian, quiet_pipeline(network, scheduler, **arguments)


def standardize(field, pipe):
    """As rows, in the network's units, by their definition."""
    return pipe.units.to_network(torch.as_tensor(field)).flatten(1).double()


FIELDS = [(1, 24), (2, 7), (1, 5, 6), (2, 3, 4), (1, 3, 4, 2), (9, 2, 2, 2)]


@pytest.mark.parametrize("shape", FIELDS)
def test_fields_are_drawn_as_the_pipeline_draws_them(shape):
    _, pipe = field_pipeline(shape)
    chains = FieldChains(pipe)
    frames, samples = end(chains.draw("any", 60, "AnnealedLangevinScheduler", 3, 2))
    np.testing.assert_array_equal(samples, draw(pipe, None, 3, 2, 60))
    assert samples.shape == (2, *shape)
    assert len(frames) == MAX_FRAMES_OF_FIELDS and frames[-1].step == 60
    shown = samples[:, :8, shape[1] // 2] if len(shape) == 4 else samples  # eight channels, the middle slice
    spread = chains.pipe.units.scale(torch.zeros(1, *shape)).flatten()[: shown.shape[1]].numpy()
    spread = spread.reshape(-1, *[1] * (shown.ndim - 2))
    np.testing.assert_allclose(frames[-1].denoised / spread, shown / spread, rtol=0, atol=0.05)  # in data's units
    assert np.abs((frames[0].noisy - shown) / spread).mean() > 5  # not clipped
    _, ((pictures, _),) = end(chains.compare("any", 5, ["HeunDiscreteScheduler"], 3, 2))
    samples = draw(pipe, HeunDiscreteScheduler, 3, 2, 3)
    assert same(pictures, chains.to_pictures(samples, chains.find_limits(samples)))


@pytest.mark.parametrize(
    ("shape", "units", "number"),
    [((1, 5, 6), [KELVIN], 4), ((2, 24), [KELVIN], 1), ((2, 7), [KELVIN, VOLTS], 2), ((1, 3, 4, 2), [KELVIN], 23)],
)
def test_a_measured_field_has_the_exact_posterior_mean(shape, units, number):
    gaussian, pipe = field_pipeline(shape, units)
    chains = FieldChains(pipe, max_images=400)
    share = 0.2  # standard deviations of the data
    noise_std = share if len(units) > 1 else share * 12
    _, example = end(chains.measure("any", number, noise_std, 400, 40, 5))
    np.testing.assert_array_equal(example.truth, draw(pipe, None, 5)[0])
    known = ~np.isnan(example.measured)
    assert (known.reshape(shape[0], -1).sum(1) == number).all() and (known == known[:1]).all()
    # the textbook's formula, in the network's units, where the noise is half of `share`
    known = torch.from_numpy(known.ravel())
    y = standardize(np.nan_to_num(example.measured)[None], pipe)[0, known]
    truth = standardize(example.truth[None], pipe)[0]
    assert 0.1 < (y - truth[known]).square().mean().sqrt() / (share / 2) < 2
    cross = gaussian.covariance[:, known]
    gain = cross @ torch.linalg.inv(cross[known] + (share / 2) ** 2 * torch.eye(int(known.sum())))
    mean = gaussian.mean + gain @ (y - gaussian.mean[known])
    deviation = (gaussian.covariance - gain @ cross.T).diag().sqrt()
    samples = standardize(example.samples, pipe)
    # four standard errors of 400 samples, and 1 % of the data's deviation
    assert ((samples.mean(0) - mean).abs() < 4 * deviation / 20 + 0.005).all()
    assert abs(samples.std(0) / deviation - 1).max() < 0.2
    # the summary is of the points between
    between = np.isnan(example.measured)[0]
    errors = (example.samples.mean(0) - example.truth)[:, between]
    for error, spread in zip(errors, example.samples.var(0, ddof=1)[:, between], strict=True):
        for value in (error, spread**0.5):
            assert f"{(value.astype(float) ** 2).mean() ** 0.5:.2g}" in example.summary
    values, truths = example.samples[:, :, between], example.truth[:, between]
    inside = ((values.min(0) < truths) & (truths < values.max(0))).mean()
    assert f"samples' range at {inside:.0%} of these points; right is 100%" in example.summary  # 399/401
    assert " K (RMSE" in example.summary
    assert [caption for _, caption in example.figures] == [
        "truth and 1 station" if number == 1 else f"truth and {number} stations",
        "mean of 400 samples",
        "mean minus truth",
        "sample 1",
        "sample 2",
        "standard deviation",
    ]


def test_the_range_of_nine_samples_holds_the_truth_as_often_as_is_right(monkeypatch):
    monkeypatch.setattr(FieldChains, "plot_one", lambda *_: [])  # plots take the time
    _, pipe = field_pipeline((1, 24))
    pipe.register_to_config(num_inference_steps=12)
    chains, shares = FieldChains(pipe), []
    for seed in range(40):
        _, example = end(chains.measure("any", 3, 1.2, 9, 12, 100 * seed))
        shares.append(int(re.search(r"range at (\d+)% of these points; right is 80%", example.summary)[1]))
    assert np.mean(shares) == pytest.approx(80, abs=3 * np.std(shares) / 40**0.5)


def test_without_noise_the_stations_are_kept():
    _, pipe = field_pipeline((1, 5, 6))
    _, example = end(FieldChains(pipe).measure("any", 6, 0, 3, 5, 1))
    known = ~np.isnan(example.measured)
    np.testing.assert_array_equal(example.measured[known], example.truth[known])
    np.testing.assert_allclose(example.samples[:, known], np.tile(example.truth[known], (3, 1)), atol=1e-3)  # kelvin


def test_a_stopped_measurement_has_no_samples():
    _, pipe = field_pipeline((1, 24))
    run = FieldChains(pipe).measure("any", 3, 1.2, 4, 20, 0)
    run.stop()
    assert end(run)[1] is None and len(run.frames) == 1
    run = FieldChains(pipe).measure("any", 3, 1.2, 4, 20, 0)
    watch = run.watch

    def stop_in_the_second_chain():
        run.stopped = run.result is not None
        return watch()

    run.watch = stop_in_the_second_chain
    _, example = end(run)
    assert example.samples is None and example.summary == ""
    assert [caption for _, caption in example.figures] == ["truth and 3 stations"]


FIELD_GOOD = {"label": "any", "num_stations": 3, "noise_std": 1.2, "num_samples": 2, "levels": 2, "seed": 0}
FIELD_BAD = [
    ("num_stations", 0, "Stations must be a whole number from 1 to 23, not 0."),
    ("num_stations", 24, "Stations must be a whole number from 1 to 23, not 24."),
    ("num_stations", [3], "Stations must be a whole number from 1 to 23, not [3]."),
    ("noise_std", -0.1, "Noise must be a number from 0 to 120, not -0.1."),
    ("noise_std", 121, "Noise must be a number from 0 to 120, not 121."),
    ("noise_std", math.nan, "Noise must be a number from 0 to 120, not nan."),
    ("noise_std", math.inf, "Noise must be a number from 0 to 120, not inf."),
    ("noise_std", "much", "Noise must be a number from 0 to 120, not 'much'."),
    ("num_samples", 1, "Samples must be a whole number from 2 to 16, not 1."),
    ("num_samples", 17, "Samples must be a whole number from 2 to 16, not 17."),
    ("levels", 101, "Noise levels must be a whole number from 1 to 100, not 101."),
    ("seed", None, SEED + "empty."),
]


@pytest.mark.parametrize(("field", "value", "sentence"), FIELD_BAD)
def test_bad_measurements_are_refused(field, value, sentence):
    chains = FieldChains(field_pipeline((1, 24))[1])
    with pytest.raises(FieldError) as error:
        chains.measure(**{**FIELD_GOOD, field: value})
    assert str(error.value) == sentence and error.value.field == field


def test_what_plots_leave_out_is_said():
    def describe(shape):
        return FieldChains(field_pipeline(shape)[1])

    assert describe((1, 24)).part == describe((8, 3, 4)).part == ""
    assert describe((9, 24)).part == "Shown: the first 8 of 9 channels."
    shown = "Shown: the first 8 of 9 channels and the middle slice of each volume."
    assert describe((9, 2, 2, 2)).part == shown
    chains = describe((2, 3, 4))  # a sheet of maps of several channels has six at most
    assert chains.max_images == 6 and chains.max_samples == 16
    with pytest.raises(FieldError, match="Samples must be a whole number from 1 to 6, not 7"):
        chains.draw("any", 3, "AnnealedLangevinScheduler", 0, 7)


@pytest.mark.parametrize("shape", [(1, 5, 8), (1, 3, 5, 8)])
def test_colors_stand_for_the_values_that_are_given(shape):
    chains = FieldChains(field_pipeline(shape)[1])

    def count(values, color):
        (picture,) = chains.to_pictures(np.full((1, *shape), values, np.float32), [(270, 290)])
        return (np.asarray(picture) == color).all(-1).sum()

    dark, bright = (68, 1, 84), (253, 231, 36)  # the ends of viridis
    assert count(260, dark) > 10_000 and count(300, bright) > 10_000
    assert count(280, dark) < 5000 and count(280, bright) < 5000  # the color bar's


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
    Image.new("L", (8, 8)).save(path, "TIFF")  # whose reader is not needed
    with pytest.raises(ValueError, match="not an image that can be read: upload a PNG, JPEG or WebP file"):
        read_upload(path, SHAPE)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
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


def read_figures(text):
    """The images that the page shows: pairs of a list of images and their caption."""
    figures = []
    for figure in re.findall("<figure>(.*?)</figure>", text):
        urls = re.findall('src="data:image/png;base64,([^"]*)"', figure)
        images = [Image.open(io.BytesIO(base64.b64decode(url))) for url in urls]
        figures.append((images, re.search("<figcaption>(.*)</figcaption>", figure)[1]))
    return figures


class Visitor:
    """A client of the page, with a session of its own."""

    def __init__(self, url, folder):
        client_class = pytest.importorskip("gradio_client").Client
        self.client = client_class(url, download_files=folder, verbose=False, analytics_enabled=False)

    def submit(self, name, *values):
        return self.client.submit(*values, api_name=f"/{name}")

    def __call__(self, name, *values):
        return self.client.predict(*values, api_name=f"/{name}")

    def call_error(self, name, *values):
        """The sentence of an error."""
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
    shown, slider, level, status = job.result(timeout=60)
    (denoised, caption), (noisy, _) = read_figures(shown)
    assert same(denoised, draw(pipe, HeunDiscreteScheduler, 4, 2, 4)) and caption == "denoised"
    assert noisy[1].size == (8, 8) and "Done." in status and '<progress value="7" max="7">' in status
    assert (slider["value"], slider["maximum"], slider["interactive"]) == (7, 7, True)
    assert level.startswith("After step 7 of 7. Noise level: σ = ")
    frames, _ = end(Chains(pipe).draw("any", 7, "HeunDiscreteScheduler", 4, 2))
    for position in (1, 4, 7):
        shown, level = visitor("go_back", position)
        (denoised, _), (noisy, caption) = read_figures(shown)
        assert same(noisy, frames[position - 1].noisy) and caption == "noisy"
        if position < 7:
            assert same(denoised, frames[position - 1].denoised)
        assert level == f"After step {position} of 7. Noise level: σ = {frames[position - 1].sigma:.3g}"
    for position in (0, 8, None, 10**400):
        assert "has positions from 1 to 7, and no other" in visitor.call_error("go_back", position)


def test_the_page_opens_with_images(visitor, pipe):
    shown, slider, level, status = visitor("open_draw")
    (images, _), _ = read_figures(shown)
    assert same(images, draw(pipe, None, 0, 9)) and slider["interactive"] and status == ""
    assert level.startswith("After step 50 of 50.")
    assert visitor("go_back", 3)[1].startswith("After step 3 of 50.")
    shown, _ = visitor("open_compare")
    assert [caption for _, caption in read_figures(shown)] == [
        f"{name}, 20 evaluations" for name in ("Annealed Langevin", "DDIM", "DPM-Solver++")
    ]
    assert same(read_figures(shown)[0][0], draw(pipe, None, 0, 4, 20))
    shown, _ = visitor("open_inpaint")
    lower = "0" * 32 + "1" * 32
    expected = end(Chains(pipe).inpaint(images[0], lower, "any", 25, 0))[1]
    assert [caption for _, caption in read_figures(shown)] == ["completion 1", "completion 2", "completion 3"]
    assert same([found for (found,), _ in read_figures(shown)], expected)
    shown, _ = visitor("open_restore")
    assert [caption for _, caption in read_figures(shown)] == ["image", "pixelated", *3 * ["restored"]]
    assert same(read_figures(shown)[0][0], images[:1])


def test_what_cannot_be_drawn_at_the_opening_is_said():
    pipe = quiet_pipeline(small_unet())
    torch.nn.init.constant_(pipe.unet.conv_out.bias, torch.nan)
    opening = Opening(Chains(pipe))
    for tab in ("draw", "inpaint", "restore", "compare"):
        with pytest.raises(FloatingPointError, match="AnnealedLangevinScheduler"):
            opening.wait(tab)


def call(url, name, data):
    """The page's answer, as text, without gradio's client, which calls others itself. `data` may be JSON already."""
    body, kind = data if isinstance(data, str) else json.dumps({"data": data}), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}gradio_api/call/{name}", body.encode(), kind)
        ) as response:
            event = json.load(response)["event_id"]
    except urllib.error.HTTPError as error:
        return error.read().decode()
    with urllib.request.urlopen(f"{url}gradio_api/call/{name}/{event}") as response:
        return response.read().decode()


def test_what_is_wrong_is_said_at_its_field(url):
    places = {"draw": list(GOOD["draw"]), "compare": list(GOOD["compare"])}
    for method, field, value, sentence in BAD:
        if method in places:
            answer = json.loads(call(url, method, list({**GOOD[method], field: value}.values())))["detail"]
            wrong = {places[method][i]: found["message"] for i, found in enumerate(answer) if not found["is_valid"]}
            assert wrong.keys() == {field} and wrong[field].startswith(sentence)
    assert "There is no image yet" in call(url, "inpaint", [LEFT_HALF, "any", 2, 0])
    assert "There is no image yet" in call(url, "restore", ["noisy", 2, 1, 0.1, "any", 2, 0])
    assert "There is no chain to go back through yet" in call(url, "go_back", [1])
    assert "example must be a whole number from 0 to 5" in call(url, "example_restore", [10**400])
    assert "No file has come" in call(url, "upload_restore", [None, ""])


def test_requests_of_no_shape_that_the_page_sends_are_answered_with_a_sentence(url):
    sentence = "The request must hold one value for each field, as the page sends it. Fields: "
    file = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    for name, data in (
        ("draw", ["any"]),
        ("draw", [file] * 5),
        ("inpaint", [file, "any", 2, 0]),
        ("upload_inpaint", ["/etc/hostname", ""]),
        ("upload_inpaint", [file, ""]),
        ("upload_restore", [[None], ""]),
    ):
        assert sentence in call(url, name, data), (name, data)
    assert "valid list" in call(url, "draw", '{"data": null}')
    assert "JSON" in call(url, "draw", "{")


def test_large_requests_are_refused_before_they_are_read(url):
    request = urllib.request.Request(f"{url}gradio_api/call/draw", b" " * (2**20 + 1))
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 413
    assert error.value.read() == b"A request may have 1,048,576 bytes, not 1,048,577."
    # of an upload there may be more; without a length, the connection ends
    for path, size in (("upload", 11 * 2**20 + 1), ("call/draw", 2**20 + 1)):
        request = urllib.request.Request(f"{url}gradio_api/{path}", (b" " * 2**16 for _ in range(size // 2**16 + 1)))
        with pytest.raises(OSError):
            urllib.request.urlopen(request)
    assert "Done." in call(url, "draw", ["any", 3, "AnnealedLangevinScheduler", 0, 1])


def test_an_upload_is_inpainted_restored_and_not_kept(visitor, pipe, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (8, 8), dtype=np.uint8))
    image.resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "mine.png")
    file = gradio_client.handle_file(str(tmp_path / "mine.png"))
    visitor("upload_inpaint", file, "")
    assert not [path for path in folder.rglob("mine*") if path.is_file()]
    shown, status = visitor("inpaint", LEFT_HALF, "any", 3, 5)
    assert "Done." in status
    assert same(
        [found for (found,), _ in read_figures(shown)], end(Chains(pipe).inpaint(image, LEFT_HALF, "any", 3, 5))[1]
    )
    assert "Nothing is painted" in visitor("inpaint", "0" * 64, "any", 3, 5)[1]
    assert visitor("upload_restore", file, "")[0].startswith("<img ")
    assert not [path for path in folder.rglob("mine*") if path.is_file()]
    shown, _ = visitor("restore", "pixelated", 2, 1, 0.1, "any", 2, 5)
    expected = end(Chains(pipe).restore(image, "pixelated", 2, 1, 0.1, "any", 2, 5))[1]
    assert [caption for _, caption in read_figures(shown)] == ["image", "pixelated", "restored", "restored", "restored"]
    assert same([found for (found,), _ in read_figures(shown)], [wanted for wanted, _ in expected])
    # what is no image leaves the image as it is
    (tmp_path / "text.png").write_bytes(b"text")
    text = gradio_client.handle_file(str(tmp_path / "text.png"))
    chosen, status = visitor("upload_restore", text, "")
    assert chosen.startswith("<img ") and "not an image that can be read" in status
    assert visitor("restore", "pixelated", 2, 1, 0.1, "any", 2, 5)[0] == shown
    # an example in its place
    visitor("example_restore", 1)
    shown, _ = visitor("restore", "pixelated", 2, 1, 0.1, "any", 2, 5)
    assert same(read_figures(shown)[0][0], draw(pipe, None, 1))


def test_the_page_compares(visitor, pipe):
    shown, _ = visitor("compare", "any", 5, ["AnnealedLangevinScheduler", "HeunDiscreteScheduler"], 2, 2)
    (langevin, first), (heun, second) = read_figures(shown)
    assert (first, second) == ("Annealed Langevin, 5 evaluations", "Heun, 5 evaluations")
    assert same(langevin, draw(pipe, seed=2, num_images=2, levels=5))
    assert same(heun, draw(pipe, HeunDiscreteScheduler, 2, 2, 3))


def test_two_visitors_do_not_mix(url, pipe, tmp_path):
    visitors = [Visitor(url, str(tmp_path / str(i))) for i in range(2)]
    names = [AnnealedLangevinScheduler, HeunDiscreteScheduler]
    # while the one draws, so does the other
    jobs = [visitor.submit("draw", "any", 20, names[i].__name__, i, 1) for i, visitor in enumerate(visitors)]
    for i, levels in enumerate((20, 10)):
        shown = jobs[i].result(timeout=120)[0]
        assert same(read_figures(shown)[0][0], draw(pipe, names[i], i, 1, levels))
    # and each goes back through a chain of their own
    steps = [visitor("go_back", 19)[1].partition(".")[0] for visitor in visitors]
    assert steps == ["After step 19 of 20", "After step 19 of 19"]


@pytest.fixture
def gated_page(tmp_path):
    pytest.importorskip("gradio")
    pipe = quiet_pipeline(small_unet())
    pipe.unet = unet = GatedUNet(pipe.unet)
    unet.passes.release(1000)
    with serve(pipe, num_parallel=1) as url:
        call(url, "open_compare", [])  # the last of what the page opens with
        unet.passes, unet.evaluations = threading.Semaphore(0), 0
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
    shown, slider, _, status = stop.result(timeout=60)
    assert f"Stopped at step {step} of 50." in status and slider["maximum"] == step
    # what was drawn by then can be gone back through
    assert visitor("go_back", 2)[1].startswith("After step 2 of 50")
    assert visitor("go_back", step)[0] == shown

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
    assert "Done." in first.result(timeout=60)[3]


def upload(url, content):
    """The path of an uploaded file."""
    part = b'Content-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + content
    body, kind = b"--b\r\n" + part + b"\r\n--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}gradio_api/upload", body, kind)) as response:
        return json.load(response)[0]


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

        def list_files():
            return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]

        assert "Done." in call(url, "draw", ["any", 3, "AnnealedLangevinScheduler", 0, 1])
        assert not list_files()  # images are no files
        upload(url, b"never read")
        assert len(list_files()) == 1
        wait_for(lambda: not list_files())  # by age
        with urllib.request.urlopen(url) as response:
            html = response.read().decode()
        assert "fonts.googleapis" not in html and '"analytics_enabled":false' in html
    assert not folder.exists()
    assert os.environ.get("GRADIO_TEMP_DIR") == before
    assert url.startswith("http://127.0.0.1:")
    assert hosts <= {"127.0.0.1", "localhost"}


def test_what_a_killed_server_left_goes_at_the_next_start(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, others = tmp_path / "ncsn-demo-left", tmp_path / "others"
    for folder in (left, others):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "upload.png").touch()
    with serve(quiet_pipeline(small_unet())):
        living = Path(os.environ["GRADIO_TEMP_DIR"])
        assert sorted(tmp_path.iterdir()) == sorted([living, others])
        with serve(quiet_pipeline(small_unet())):
            assert living.exists()
    assert list(tmp_path.iterdir()) == [others]


def test_the_command_hands_its_settings_on(monkeypatch):
    given = []
    monkeypatch.setattr("ncsn_diffusers.demo.launch", lambda **settings: given.append(settings))
    demo.main(["--port", "8000", "--max_evaluations", "30"], "ncsn-diffusers demo")
    limits = {"max_evaluations": 30, "max_images": 16, "num_parallel": 1}
    assert given == [{"pipeline": None, "host": "127.0.0.1", "port": 8000, "open_browser": False, **limits}]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "fields"])
def test_a_space_runs_from_its_folder(kind, hub, pipe, tmp_path):
    """Downloaded, in a process that does not know of this repository, with the model from the Hub."""
    pytest.importorskip("gradio")
    if kind == "fields":
        pipe = NCSNPipeline.from_pretrained(pretrained("temperature"))
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
            if kind == "fields":
                shown, summary, _ = visitor("measure", "any", 90, 0.2, 3, 5, 1)
                assert len(read_figures(shown)) == 6 and " K (RMSE)" in summary
            else:
                shown = visitor("draw", "any", 4, "AnnealedLangevinScheduler", 1, 2)[0]
                assert same(read_figures(shown)[0][0], draw(pipe, None, 1, 2, 4))
            assert list(temporary.glob("ncsn-demo-*"))
        finally:
            process.terminate()
    assert process.returncode == 0
    assert not list(temporary.glob("ncsn-demo-*"))


# --- The page of fields: at the end, for a second server takes the folder of uploads from the first ---


@pytest.fixture(scope="module")
def field_url():
    pytest.importorskip("gradio")
    with serve(field_pipeline((1, 5, 6))[1]) as url:
        yield url


def list_tabs(url):
    with urllib.request.urlopen(f"{url}config") as response:
        components = json.load(response)["components"]
    return [component["props"]["label"] for component in components if component["type"] == "tabitem"]


def test_the_page_of_fields_has_no_tabs_of_images(url, field_url):
    assert list_tabs(url) == ["Draw", "Inpaint", "Restore", "Compare"]
    assert list_tabs(field_url) == ["Draw", "Measure", "Compare"]
    with urllib.request.urlopen(f"{field_url}gradio_api/info") as response:
        names = json.load(response)["named_endpoints"]
    assert "/measure" in names and not {name for name in names if re.search("inpaint|restore|upload|example", name)}


def test_the_page_of_fields_draws_measures_and_compares(field_url, tmp_path):
    _, pipe = field_pipeline((1, 5, 6))
    chains, visitor = FieldChains(pipe), Visitor(field_url, str(tmp_path / "downloads"))
    shown, slider, _, status = visitor("draw", "any", 30, "HeunDiscreteScheduler", 4, 2)
    frames, samples = end(chains.draw("any", 30, "HeunDiscreteScheduler", 4, 2))
    limits = chains.find_limits(samples)
    (denoised, caption), (noisy, _) = read_figures(shown)
    assert caption == "denoised" and "Done." in status and slider["maximum"] == 25
    assert same(denoised, chains.to_pictures(samples, limits))
    shown, _ = visitor("go_back", 2)  # under the same colors
    (denoised, _), (noisy, _) = read_figures(shown)
    assert same(denoised, chains.to_pictures(frames[1].denoised, limits))
    assert same(noisy, chains.to_pictures(frames[1].noisy, limits))
    shown, summary, status = visitor("measure", "any", 4, 2.5, 3, 5, 7)
    _, example = end(chains.measure("any", 4, 2.5, 3, 5, 7))
    assert summary == example.summary and "Done." in status
    expected = [(caption, pictures) for pictures, caption in example.figures]
    for (pictures, caption), (name, wanted) in zip(read_figures(shown), expected, strict=True):
        assert caption == name and same(pictures, wanted)
    shown, _ = visitor("compare", "any", 5, ["AnnealedLangevinScheduler", "DDIMScheduler"], 2, 2)
    samples = draw(pipe, None, 2, 2, 5)
    (pictures, _), (_, caption) = read_figures(shown)
    assert same(pictures, chains.to_pictures(samples, chains.find_limits(samples))) and caption == "DDIM, 5 evaluations"


def test_the_page_of_fields_opens_with_plots(field_url):
    assert "After step 50 of 50." in call(field_url, "open_draw", [])
    assert "right is 80%" in call(field_url, "open_measure", [])
    assert "DPM-Solver++, 20 evaluations" in call(field_url, "open_compare", [])


def test_what_is_wrong_with_a_measurement_is_said_at_its_field(field_url):
    answer = json.loads(call(field_url, "measure", list({**FIELD_GOOD, "noise_std": -1}.values())))["detail"]
    assert [found["is_valid"] for found in answer] == [True, True, False, True, True, True]
    assert answer[2]["message"] == "Noise must be a number from 0 to 120, not -1."
