import math
from functools import partial
from itertools import pairwise

import diffusers
import networks
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from networks import (
    MIXTURE,
    AnalyticUNet,
    ClassUNet,
    Gaussian,
    GaussianUNet,
    Halving,
    conditional_unet,
    small_unet,
    train_sigmas,
)

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNInpaintPipeline, NCSNPipeline

quiet_pipeline = partial(networks.quiet_pipeline, cls=NCSNInpaintPipeline)


def small_pipeline(**arguments):
    return quiet_pipeline(small_unet(**arguments))


# --- The oracle: the conditional Gaussian ---


def rotated_prior():
    """2 × 4 pixels, deviations from 0.15 to 1 along random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))[0]
    deviations = torch.from_numpy(np.geomspace(0.15, 1, 8))
    return Gaussian(torch.linspace(-0.3, 0.3, 8), directions @ torch.diag(deviations**2) @ directions.T), (2, 4)


def smooth_prior():
    """4 × 4 pixels, deviation 0.5, whose correlation falls with their distance."""
    axis = torch.arange(4.0)
    positions = torch.cartesian_prod(axis, axis)
    return Gaussian(torch.linspace(-0.3, 0.3, 16), 0.25 * torch.exp(-torch.cdist(positions, positions) / 3)), (4, 4)


def inpaint_gaussian(prior, size, scheduler=None, num_samples=20_000, **arguments):
    """The drawn pixels of many samples, and the Gaussian that they should have; every other pixel is known."""
    pixels = len(prior.mean)
    drawn = torch.arange(pixels) % 2 == 0
    drawn[-2:] = True
    generator = torch.Generator().manual_seed(1)
    values = prior.mean + torch.linalg.cholesky(prior.covariance) @ torch.randn(
        pixels, dtype=torch.float64, generator=generator
    )
    image = (values.clamp(-1, 1).float() / 2 + 0.5).reshape(1, 1, *size)
    pipe = quiet_pipeline(GaussianUNet(prior, *size, train_sigmas(AnnealedLangevinScheduler()).tolist()), scheduler)
    samples = pipe(
        image, drawn.reshape(size), num_samples, generator=generator, output_type="latent", **arguments
    ).images
    values = (2 * image - 1).flatten().double()
    assert torch.equal(samples.flatten(1)[:, ~drawn].double(), values[~drawn].expand(num_samples, -1))
    return samples.flatten(1)[:, drawn].double(), prior.conditional(drawn, values)


def check_conditional(samples, expected, tolerance=0.03, covariance_tolerance=0.03):
    """
    Mean and covariance within 3 %, of the deviation and in Frobenius norm. 20,000 samples have a standard error of
    0.7 % of a deviation and 1 % of a variance.
    """
    deviations = expected.covariance.diag().sqrt()
    assert ((samples.mean(0) - expected.mean) / deviations).abs().max() < tolerance
    error = (samples.T.cov() - expected.covariance).norm() / expected.covariance.norm()
    assert error < covariance_tolerance


# 4,000 samples have standard errors of 1.6 % of a deviation and 4 % of the covariance's norm.
SMALL = {"tolerance": 0.08, "covariance_tolerance": 0.1}


def test_default_draws_the_conditional_gaussian():
    check_conditional(*inpaint_gaussian(*rotated_prior(), num_samples=40_000))


def test_default_draws_the_conditional_gaussian_of_smooth_images():
    check_conditional(*inpaint_gaussian(*smooth_prior(), num_samples=4000), **SMALL)


FAST = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in AnnealedLangevinScheduler._compatibles
        if name != "PNDMScheduler"
    ],
)
def test_stock_schedulers_draw_the_conditional_gaussian(name):
    scheduler = getattr(diffusers, name).from_config(AnnealedLangevinScheduler().config)
    check_conditional(*inpaint_gaussian(*rotated_prior(), scheduler, 4000), **SMALL)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "score", "conditioning": "sigma"},
        {"num_langevin_steps": 2},
    ],
)
def test_langevin_variants_draw_the_conditional_gaussian(arguments):
    prior, size = rotated_prior()
    scheduler = AnnealedLangevinScheduler(**arguments)
    network = {k: v for k, v in arguments.items() if k in ("prediction_type", "conditioning")}
    pipe = quiet_pipeline(GaussianUNet(prior, *size, train_sigmas(scheduler).tolist(), **network), scheduler)
    drawn = torch.tensor([[True, False, True, False], [False, True, True, True]])
    image = torch.full((1, 1, 2, 4), 0.6)
    generator = torch.Generator().manual_seed(0)
    samples = pipe(image, drawn, 4000, generator=generator, output_type="latent").images.flatten(1)
    expected = prior.conditional(drawn.flatten(), torch.full((8,), 0.2, dtype=torch.float64))
    check_conditional(samples[:, drawn.flatten()].double(), expected, **SMALL)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_langevin_steps": 2},
        {"sigmas": np.geomspace(30, 0.02, 60)},
        {"sigmas": np.geomspace(30, 0.02, 40).tolist(), "num_langevin_steps": 2},
    ],
)
def test_levels_and_steps_of_ones_own_draw_the_conditional_gaussian(arguments):
    check_conditional(*inpaint_gaussian(*rotated_prior(), num_samples=4000, **arguments), **SMALL)


def test_levels_are_the_ones_given():
    pipe, levels, shown = small_pipeline(), [20.0, 3.3, 0.5], []
    pipe(
        **GOOD,
        sigmas=levels,
        num_langevin_steps=2,
        callback_on_step_end=lambda pipe, i, t, tensors: shown.append(tensors["sigma"].item()),
        callback_on_step_end_tensor_inputs=["sigma"],
    )
    assert shown == pytest.approx(np.repeat(levels, 2), rel=1e-3)


# --- From what the image holds where it is drawn ---


def begin_from_the_image(scheduler_class, num_resamplings, num_langevin_steps=1, strength=0.5, steps=40):
    """
    Mean, over the image's own value, and variance of 8,000 drawn pixels, and what they should be. The pixels are
    independent, N(0, 0.5²), so that those drawn follow the recursion of passes and steps, whatever the known ones are.
    """
    scheduler = scheduler_class.from_config({**AnnealedLangevinScheduler(solver_order=1).config})
    prior = Gaussian(torch.zeros(8), 0.25 * torch.eye(8))
    pipe = quiet_pipeline(GaussianUNet(prior, 2, 4, train_sigmas(AnnealedLangevinScheduler()).tolist()), scheduler)
    langevin = scheduler_class is AnnealedLangevinScheduler
    samples = pipe(
        torch.full((1, 1, 2, 4), 0.9),  # 0.8 in units of the data
        torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]),
        2000,
        steps,
        num_resamplings,
        num_langevin_steps if langevin else None,
        strength=strength,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert (samples[:, :, 0, 1::2] == samples[0, 0, 0, 1]).all()  # known
    drawn = samples[:, :, 0, ::2].double()

    begin = round((1 - strength) * steps) * num_langevin_steps
    if langevin:
        rows = [(row.sigma, row.kappa, row.c) for row in scheduler.table[begin:]]
    else:  # Euler's rule for the probability flow
        sigmas = scheduler.sigmas.tolist()
        rows = [(sigma, after / sigma, 0.0) for sigma, after in pairwise(sigmas)][begin:]
    mean, variance = 1.0, rows[0][0] ** 2
    for sigma, kappa, c in rows:
        for _ in range(num_resamplings):  # (1)
            gain = 0.25 / (0.25 + 2 * sigma**2)
            mean, variance = gain * mean, gain**2 * variance + (1 + gain) ** 2 * sigma**2
        factor = kappa + (1 - kappa) * 0.25 / (0.25 + sigma**2)
        mean, variance = factor * mean, factor**2 * variance + c**2
    return (drawn.mean().item() / 0.8, drawn.var().item()), (mean, variance)


@pytest.mark.parametrize("num_resamplings", [0, 1])
@pytest.mark.parametrize("strength", [0.3, 0.5])
@pytest.mark.parametrize(
    ("scheduler_class", "num_langevin_steps"),
    [(AnnealedLangevinScheduler, 1), (AnnealedLangevinScheduler, 2), (EulerDiscreteScheduler, 1)],
)
def test_strength_begins_from_the_noised_image(scheduler_class, num_langevin_steps, strength, num_resamplings):
    observed, expected = begin_from_the_image(scheduler_class, num_resamplings, num_langevin_steps, strength)
    # 8,000 pixels: 0.6 % of the image's value and 1.6 % of the variance at one error
    assert observed[0] == pytest.approx(expected[0], abs=0.03)
    assert observed[1] == pytest.approx(expected[1], rel=0.06)


@pytest.mark.parametrize(
    ("scheduler_class", "evaluations"), [(AnnealedLangevinScheduler, 24), (HeunDiscreteScheduler, 35)]
)
def test_strength_is_the_share_of_the_steps(scheduler_class, evaluations):
    prior, size = rotated_prior()
    unet = GaussianUNet(prior, *size, train_sigmas(AnnealedLangevinScheduler()).tolist())
    pipe = quiet_pipeline(unet, scheduler_class.from_config(AnnealedLangevinScheduler().config))
    pipe(torch.rand(1, 1, 2, 4), torch.ones(2, 4), num_inference_steps=40, strength=0.3, num_resamplings=1)
    assert pipe.unet.evaluations == evaluations  # 12 levels, each with a pass and one step or, but for the last, two


def test_full_strength_pays_no_regard_to_what_is_drawn_over():
    pipe = small_pipeline()
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    images = []
    for value in (0.0, 1.0):
        image = torch.full((1, 1, 8, 8), 0.5)
        image[:, :, :4] = value
        images.append(pipe(image, mask, 1, 4, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    assert torch.equal(*images)


# --- Callbacks ---


def test_callback_classes_and_dynamic_guidance():
    pipe = quiet_pipeline(conditional_unet())
    forward, batches = pipe.unet.forward, []

    def recording_forward(sample, timestep, class_labels, return_dict=True):
        batches.append(class_labels.tolist())
        return forward(sample, timestep, class_labels, return_dict)

    pipe.unet.forward = recording_forward

    def callback(pipe, step_index, timestep, callback_kwargs):
        if step_index == int(pipe.num_timesteps * 0.4):
            pipe._guidance_scale = 0.0
        return callback_kwargs

    pipe(**GOOD, num_inference_steps=5, class_labels=2, guidance_scale=3.0, callback_on_step_end=callback)
    guided = 3 + 2 * 3  # steps and passes; none at the first level, above which there is nothing
    assert batches[:guided] == [[3, 2]] * guided
    assert batches[guided:] == [[2]] * (2 + 2 * 3)

    draws = [
        pipe(
            **GOOD,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=callback,
        ).images
        for callback in (
            Halving(cutoff_step_ratio=0.5),
            lambda pipe, i, t, tensors: {"latents": tensors["latents"] / 2} if i == 2 else None,
        )
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_49_evaluations_do(name):
    scheduler = name and getattr(diffusers, name).from_config(AnnealedLangevinScheduler().config)
    samples, expected = inpaint_gaussian(*rotated_prior(), scheduler, 4000, num_inference_steps=13)
    check_conditional(samples, expected, **SMALL)


def test_few_known_pixels_choose_between_modes():
    # 40 images of the mixture, one pixel of each known, 50 completions of each: the shares of the three components
    known = torch.zeros(8, dtype=torch.bool)
    known[0] = True
    images = MIXTURE.sample(40, torch.Generator().manual_seed(5))
    distances = (images[:, None, known] - MIXTURE.means[:, known]).square().sum(-1)
    expected = (MIXTURE.weights.log() - distances / (2 * 0.15**2)).softmax(-1)
    pipe = quiet_pipeline(AnalyticUNet(train_sigmas(AnnealedLangevinScheduler()).tolist()))
    samples = pipe(
        (images.float() / 2 + 0.5).clamp(0, 1).repeat_interleave(50, 0).reshape(-1, 1, 2, 4),
        ~known.reshape(2, 4),
        num_inference_steps=13,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images.flatten(1)
    distances = (samples[:, None, ~known] - MIXTURE.means[:, ~known]).square().sum(-1)
    shares = torch.nn.functional.one_hot(distances.argmin(1), 3).double().reshape(40, 50, 3).mean(1)
    # exact samples are off by 0.03, as there are but 50 of each
    assert ((shares - expected).abs().sum(1) / 2).mean() < 0.09


def test_steps_alone_would_not_do():
    scheduler = DDIMScheduler.from_config(AnnealedLangevinScheduler().config)
    samples, expected = inpaint_gaussian(*rotated_prior(), scheduler, 4000, num_resamplings=0)
    assert ((samples.mean(0) - expected.mean) / expected.covariance.diag().sqrt()).abs().max() > 0.15


def test_passes_keep_the_gaussian_that_they_find():
    # Equation (1), 20 times at each level: no variance is lost or won. The known pixel is independent of the others.
    prior, _ = rotated_prior()
    wider = Gaussian(torch.zeros(10), torch.block_diag(prior.covariance, torch.eye(2, dtype=torch.float64)))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    pipe = quiet_pipeline(GaussianUNet(wider, 2, 5, train_sigmas(AnnealedLangevinScheduler()).tolist()))
    samples = pipe(
        torch.full((1, 1, 2, 5), 0.5),
        mask,
        4000,
        num_inference_steps=25,
        num_resamplings=20,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images.flatten(1)[:, :8]
    variances = (samples.double() @ prior.eigenvectors).var(0)
    np.testing.assert_allclose(variances, prior.variances, rtol=0.08)  # the standard error is 2.2 %


def test_guidance_reaches_the_drawn_pixels():
    # independent pixels: the drawn ones are those of the guided class, N(2 means[0], 0.3²), whatever the known ones are
    scheduler = AnnealedLangevinScheduler()
    pipe = quiet_pipeline(ClassUNet([[0.3] * 8, [-0.3] * 8], 0.3, train_sigmas(scheduler).tolist()), scheduler)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    samples = pipe(
        torch.ones(1, 1, 2, 4),
        mask,
        2000,
        class_labels=0,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images[:, :, 0]
    assert samples.mean().item() == pytest.approx(0.6, abs=0.02)
    assert samples.std().item() == pytest.approx(0.3, rel=0.04)


# --- Known pixels ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scheduler_class", [AnnealedLangevinScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_known_pixels_are_kept_exactly(channels, scheduler_class):
    pipe = small_pipeline(channels=channels, out_channels=channels, sample_size=16)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    rng = np.random.default_rng(0)
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = pixels if channels == 1 else np.stack([pixels, pixels.T, pixels[::-1]], -1)
    mask = rng.random((16, 16)) < 0.5
    outputs = {
        output_type: pipe(
            PIL.Image.fromarray(pixels),
            PIL.Image.fromarray(mask),
            num_inference_steps=3,
            num_resamplings=1,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images
        for output_type in ("pil", "np", "pt", "latent")
    }
    drawn = np.asarray(outputs["pil"][0])
    assert np.array_equal(drawn[~mask], pixels[~mask])
    assert not np.array_equal(drawn[mask], pixels[mask])
    expected = torch.from_numpy(pixels.reshape(16, 16, channels)[~mask]).float() / 255
    assert torch.equal(outputs["latent"][0].permute(1, 2, 0)[~mask], 2 * expected - 1)
    torch.testing.assert_close(outputs["pt"][0].permute(1, 2, 0)[~mask], expected, rtol=0, atol=1e-7)
    np.testing.assert_allclose(outputs["np"][0][~mask], expected, atol=1e-7)


def test_an_early_stop_keeps_the_known_pixels_too():
    pipe = small_pipeline()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(8, 8)
    mask[:4] = 1

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1

    images = pipe(image, mask, num_inference_steps=5, output_type="latent", callback_on_step_end=callback).images
    assert torch.equal(images[:, :, 4:], 2 * image[:, :, 4:] - 1)
    assert not torch.equal(images[:, :, :4], 2 * image[:, :, :4] - 1)


# --- The call's arguments ---


def test_ways_to_give_a_mask():
    pipe = small_pipeline()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    bits = np.random.default_rng(0).random((8, 8)) < 0.5

    def draw(mask, **arguments):
        generator = torch.Generator().manual_seed(0)
        return pipe(image, mask, num_inference_steps=4, generator=generator, output_type="pt", **arguments).images

    expected = draw(bits)
    assert torch.equal((expected != image)[0, 0], torch.from_numpy(bits))
    pil = PIL.Image.fromarray(bits.astype(np.uint8) * 255)
    for mask in (
        pil,
        pil.convert("RGB"),
        [pil],
        PIL.Image.fromarray(bits),
        bits.astype(np.uint8),
        bits.astype(np.uint8) * 255,
        bits.astype(np.int64),
        bits.astype(np.float64),
        bits[None, ..., None],
        torch.from_numpy(bits),
        torch.from_numpy(bits)[None, None],
        torch.from_numpy(bits).long(),
        torch.from_numpy(bits) * 0.9,
    ):
        assert torch.equal(draw(mask), expected)


def strokes(background, stroke, mode="RGBA"):
    """A mask of 28 × 28 pixels whose upper half is painted."""
    pixels = np.full((28, 28, len(stroke)), background, np.uint8)
    pixels[:14] = stroke
    return PIL.Image.fromarray(pixels, mode)


MASKS = {
    "white strokes on transparent black": strokes((0, 0, 0, 0), (255, 255, 255, 255)),
    "white strokes on transparent white": strokes((255, 255, 255, 0), (255, 255, 255, 255)),
    "white strokes on opaque black": strokes((0, 0, 0, 255), (255, 255, 255, 255)),
    "strokes with soft edges": strokes((0, 0, 0, 0), (255, 255, 255, 200)),
    "gray and alpha": strokes((0, 0), (255, 255), "LA"),
    "gray and alpha, transparent white": strokes((255, 0), (255, 255), "LA"),
    "8 bits of 0 and 1": PIL.Image.fromarray(np.repeat([1, 0], 14 * 28).reshape(28, 28).astype(np.uint8)),
    "8 bits": PIL.Image.fromarray(np.repeat([255, 0], 14 * 28).reshape(28, 28).astype(np.uint8)),
    "1 bit": PIL.Image.fromarray(np.repeat([True, False], 14 * 28).reshape(28, 28)),
    "gray above one half": strokes((100, 100, 100), (140, 140, 140), "RGB"),
    "gray above one half, opaque": strokes((100, 100, 100, 255), (140, 140, 140, 255)),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_white_and_opaque_is_drawn(name):
    pipe = small_pipeline(sample_size=28)
    image = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    drawn = pipe(image, MASKS[name], num_inference_steps=1, num_resamplings=0, output_type="pt").images != image
    assert drawn[0, 0, :14].sum() > 0.95 * 392  # a few clip to black or white, as the image may be
    assert not drawn[0, 0, 14:].any()


def test_a_picture_with_a_hole_is_no_mask():
    pixels = np.random.default_rng(0).integers(60, 200, (28, 28, 4), dtype=np.uint8)
    pixels[:, :14, 3], pixels[:, 14:, 3] = 0, 255
    with pytest.raises(ValueError, match="a mask with transparency must be black and white where it is opaque"):
        small_pipeline(sample_size=28)(torch.zeros(1, 1, 28, 28), PIL.Image.fromarray(pixels))


def test_one_image_or_mask_serves_the_batch():
    pipe = small_pipeline()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).round()

    def draw(image, mask, seeds=(0, 1, 2), **arguments):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(image, mask, num_inference_steps=4, generator=generators, output_type="pt", **arguments).images

    expected = draw(images, masks)
    assert expected.shape == (3, 1, 8, 8)
    assert draw(images[0], masks).shape == draw(images, masks[0]).shape == (3, 1, 8, 8)
    torch.testing.assert_close(draw(images[0], masks)[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(images, masks[1])[1], expected[1], rtol=0, atol=1e-5)
    # an image does not depend on its batch
    torch.testing.assert_close(draw(images[2], masks[2], seeds=[2])[0], expected[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler_class", "steps_evaluations"),
    [(AnnealedLangevinScheduler, 10), (DDIMScheduler, 10), (HeunDiscreteScheduler, 19)],
)
def test_each_pass_is_one_evaluation(scheduler_class, steps_evaluations):
    prior, size = rotated_prior()
    scheduler = AnnealedLangevinScheduler()
    unet = GaussianUNet(prior, *size, train_sigmas(scheduler).tolist())
    pipe = quiet_pipeline(unet, scheduler_class.from_config(scheduler.config))
    sigmas = []
    pipe(
        torch.rand(1, 1, 2, 4),
        torch.ones(2, 4),
        num_inference_steps=10,
        num_resamplings=3,
        callback_on_step_end=lambda pipe, i, t, tensors: sigmas.append(tensors["sigma"].item()),
        callback_on_step_end_tensor_inputs=["sigma"],
    )
    # the passes look at √2 sigma, which must not lie above the chain
    levels = sum(2**0.5 * sigma <= sigmas[0] for sigma in set(sigmas))
    assert levels >= 8
    assert unet.evaluations == steps_evaluations + 3 * levels


def test_callback_sees_what_the_unconditional_pipelines_does():
    pipe = small_pipeline()
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, tensors["sigma"].item(), tuple(tensors["denoised"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else None

    images = pipe(
        torch.ones(1, 1, 8, 8),
        torch.ones(8, 8),
        num_inference_steps=5,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "sigma", "denoised"],
        output_type="latent",
    ).images
    assert [step for step, _, _ in seen] == list(range(5))
    np.testing.assert_allclose([sigma for _, sigma, _ in seen], pipe.scheduler.sigmas[:-1], rtol=1e-4)
    assert torch.equal(images, torch.zeros(1, 1, 8, 8))


def test_loads_any_pipelines_folder(tmp_path):
    pipe = small_pipeline()
    NCSNPipeline(pipe.unet, pipe.scheduler).save_pretrained(tmp_path)
    reloaded = NCSNInpaintPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    images = [
        p(torch.ones(1, 1, 8, 8), torch.eye(8), num_inference_steps=3, generator=torch.Generator().manual_seed(0))[0][0]
        for p in (pipe, reloaded, NCSNInpaintPipeline(**pipe.components))
    ]
    assert np.array_equal(images[0], images[1])


GOOD = {"image": torch.full((1, 1, 8, 8), 0.5), "mask_image": torch.ones(8, 8)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.rand(1, 1, 9, 8)}, "`image` must be 1 × 8 × 8 .* not 1 × 9 × 8: resize it first"),
        ({"image": torch.rand(1, 3, 8, 8)}, "`image` must be 1 × 8 × 8 .* not 3 × 8 × 8"),
        ({"image": None}, "`image` must be an image, an array or a tensor"),
        ({"image": torch.full((1, 1, 8, 8), math.inf)}, "`image` must hold finite numbers"),
        ({"mask_image": torch.ones(8, 9)}, "`mask_image` must be 1 × 8 × 8 .* not 1 × 8 × 9: resize it first"),
        ({"mask_image": PIL.Image.new("L", (4, 4), 255)}, "`mask_image` must be 1 × 8 × 8 .* not 1 × 4 × 4"),
        (
            {"mask_image": PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 255))},
            "`mask_image` leaves nothing to draw: it must be",
        ),
        ({"mask_image": torch.ones(1, 3, 8, 8)}, "`mask_image` must be 1 × 8 × 8 .* not 3 × 8 × 8"),
        ({"mask_image": "left half"}, "`mask_image` must be an image, an array or a tensor"),
        ({"mask_image": None}, "`mask_image` is needed where no NaN in `image` says what is to be drawn"),
        ({"mask_image": []}, "`mask_image` must be an image, an array or a tensor"),
        ({"mask_image": torch.zeros(8, 8)}, "`mask_image` leaves nothing to draw"),
        ({"mask_image": torch.full((8, 8), math.nan)}, "`mask_image` must hold numbers from 0 to 1"),
        ({"mask_image": torch.full((8, 8), 200.0)}, "`mask_image` must hold numbers from 0 to 1"),
        ({"mask_image": torch.eye(8) - 0.1}, "`mask_image` must hold numbers from 0 to 1"),
        ({"mask_image": 2 * np.eye(8, dtype=np.int64) - 1}, "`mask_image` must hold numbers from 0 to 1"),
        ({"mask_image": torch.ones(2, 1, 8, 8), "batch_size": 3}, "`mask_image` has 2 entries, but batch_size=3"),
        (
            {"image": torch.rand(2, 1, 8, 8), "mask_image": torch.ones(3, 1, 8, 8)},
            "`image` has 2 entries, but batch_size=3",
        ),
        ({"num_resamplings": -1}, "`num_resamplings` must be an int of at least 0, not -1"),
        ({"num_resamplings": 1.0}, "`num_resamplings` must be an int of at least 0, not 1.0"),
        ({"class_labels": 1}, "`class_labels` are for a class-conditional network"),
        ({"guidance_scale": 2.0}, "`guidance_scale`=2.0 guides towards a class"),
        ({"output_type": "jpeg"}, "`output_type` must be one of"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be an int from 1 to 100000"),
        ({"num_langevin_steps": 0}, "`num_langevin_steps` must be an int from 1"),
        ({"sigmas": [1, 2]}, "`sigmas` must fall from each value to the next"),
        ({"strength": 0}, "`strength` must be a finite number above 0 and at most 1, not 0"),
        ({"strength": 1.5}, "`strength` must be a finite number above 0 and at most 1, not 1.5"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "must be among"),
    ],
)
def test_bad_input_is_refused_before_the_first_evaluation(arguments, message):
    pipe = small_pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(**{**GOOD, **arguments})


def test_pndm_cannot_begin_anew():
    pipe = small_pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"`num_resamplings` needs a scheduler that can begin in the middle .* PNDM"):
        pipe(**GOOD)
    with pytest.raises(ValueError, match="`strength` needs a scheduler that can begin in the middle"):
        pipe(**GOOD, num_resamplings=0, strength=0.5)
    with pytest.raises(ValueError, match="`num_inference_steps`=3 is too few for PNDMScheduler"):
        pipe(**GOOD, num_inference_steps=3, num_resamplings=0)
    pipe(**GOOD, num_inference_steps=5, num_resamplings=0)


def test_stock_schedulers_refuse_what_only_langevin_knows():
    pipe = small_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`num_langevin_steps`=2 is for AnnealedLangevinScheduler; DDIMScheduler"):
        pipe(**GOOD, num_langevin_steps=2)
    with pytest.raises(ValueError, match=r"`sigmas`=\[2, 1\] is for AnnealedLangevinScheduler; DDIMScheduler"):
        pipe(**GOOD, sigmas=[2, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_loop_never_waits_for_the_gpu():
    pipe = small_pipeline().to("cuda")

    def callback(pipe, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < 8 else "default")

    pipe(
        **GOOD,
        num_inference_steps=10,
        generator=torch.Generator("cuda").manual_seed(0),
        callback_on_step_end=callback,
    )
