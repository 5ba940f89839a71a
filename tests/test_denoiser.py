import math

import pytest
import torch
from networks import MIXTURE, AnalyticUNet, ClassUNet, quiet_pipeline, small_unet, train_sigmas

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNDenoiser, NCSNPipeline
from ncsn_diffusers.units import image_units

X = torch.randn(4, 1, 2, 4, generator=torch.Generator().manual_seed(0))
VARIANTS = [{}, {"prediction_type": "epsilon"}, {"prediction_type": "score", "conditioning": "sigma"}]


def analytic_pipeline(black=-1, **arguments):
    scheduler = AnnealedLangevinScheduler(**arguments)
    unet = AnalyticUNet(train_sigmas(scheduler).tolist(), **arguments)
    return NCSNPipeline(unet, scheduler, **image_units(black))


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("sigma", [0.02, 1.0, torch.tensor([0.1, 0.5, 2.0, 30.0])])
def test_denoise_and_score_are_those_of_the_mixture(arguments, sigma):
    pipe, sigmas = analytic_pipeline(**arguments), torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
    x = X * (1 + sigmas**2) ** 0.5
    expected = MIXTURE.denoised(x.flatten(1).double(), torch.as_tensor(sigma).double().reshape(-1, 1))
    expected = expected.reshape(X.shape).float()
    torch.testing.assert_close(pipe.denoise(x, sigma), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pipe.score(x, sigma) * sigmas**2, expected - x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_denoise_and_score_are_in_float32(dtype):
    pipe, x = analytic_pipeline(), X.to(dtype)
    assert torch.equal(pipe.denoise(x, 0.01), pipe.denoise(x.float(), 0.01))
    assert torch.equal(pipe.score(x, 0.01), pipe.score(x.float(), 0.01))  # the dtypes, too


def test_below_the_smallest_level_the_score_stays():
    pipe, x = analytic_pipeline(), 0.3 * X
    score = pipe.score(x, 0.01)
    torch.testing.assert_close(pipe.denoise(x, 0.005), x + 0.005**2 * score, rtol=1e-4, atol=1e-5)
    assert torch.equal(pipe.denoise(x, 0.0), x)


def test_denoise_of_a_class():
    scheduler, means = AnnealedLangevinScheduler(), torch.tensor([[0.5] * 8, [-0.5] * 8])
    pipe = NCSNPipeline(ClassUNet(means, 0.2, train_sigmas(scheduler).tolist()), scheduler)
    found = pipe.denoise(torch.zeros(2, 1, 2, 4), 10.0, class_labels=[0, 1]).flatten(1)
    torch.testing.assert_close(found, means, rtol=0.01, atol=0)


def test_a_callback_may_ask_for_the_score_of_a_guided_chain():
    scheduler, means = AnnealedLangevinScheduler(), torch.tensor([[0.5] * 8, [-0.5] * 8])
    pipe = quiet_pipeline(ClassUNet(means, 0.2, train_sigmas(scheduler).tolist()), scheduler)
    scores = []

    def look(pipe, i, t, tensors):
        scores.append(pipe.score(torch.zeros(1, 1, 2, 4), 10.0, class_labels=1))

    images = pipe(
        500,
        10,
        class_labels=0,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=look,
    ).images
    assert abs(images.mean() - 3 * 0.5) < 0.02  # N(w mean, deviation²); without guidance 0.5
    for score in scores:  # of the class itself, unguided: (mean - x)/(deviation² + sigma²)
        torch.testing.assert_close(score, torch.full_like(score, -0.5 / (0.2**2 + 10**2)), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("x", "sigma", "labels", "message"),
    [
        (X[:, :, :1], 1.0, None, "`x` must have the shape"),
        (X, torch.ones(3), None, "`sigma` must be a number or one for each of the 4 samples"),
        (X, -1.0, None, "`sigma` must be from 0 to 50"),
        (X, 60.0, None, "`sigma` must be from 0 to 50"),
        (X, math.nan, None, "`sigma` must be from 0 to 50"),
        (X, 1.0, 3, "unconditional"),
    ],
)
def test_denoise_refuses(x, sigma, labels, message):
    with pytest.raises(ValueError, match=message):
        analytic_pipeline().denoise(x, sigma, labels)


def test_score_refuses_levels_below_the_smallest():
    with pytest.raises(ValueError, match=r"`sigma` must be at least 0\.01"):
        analytic_pipeline().score(X, 0.001)


@pytest.mark.parametrize("black", [-1, 0])
def test_denoiser_of_images_in_0_to_1(black):
    pipe = analytic_pipeline(black)
    scale = 1 - black
    x = torch.rand(4, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    denoiser = NCSNDenoiser(pipe)
    expected = (pipe.denoise(scale * x + black, scale * 0.3) - black) / scale
    torch.testing.assert_close(denoiser(x, 0.3), expected)
    torch.testing.assert_close(denoiser(x, torch.full((4, 1, 1, 1), 0.3)), expected)
    assert len(list(denoiser.parameters())) == len(list(pipe.unet.parameters()))


def test_gradients_flow():
    denoiser = NCSNDenoiser(NCSNPipeline(small_unet(), AnnealedLangevinScheduler()))
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    denoiser(x, 0.3).sum().backward()
    assert x.grad.abs().sum() > 0
    # as deepinv's moment matching asks for them
    _, pull_back = torch.func.vjp(lambda x: denoiser(x, torch.full((1, 1, 1, 1), 0.3)), x.detach())
    (found,) = pull_back(torch.ones_like(x))
    torch.testing.assert_close(found, x.grad)


def test_deepinv_samples_with_it():
    deepinv = pytest.importorskip("deepinv")
    mask = (torch.rand(1, 2, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    physics = deepinv.physics.Inpainting((1, 2, 4), mask=mask, noise_model=deepinv.physics.GaussianNoise(0.02))
    x = (MIXTURE.means[:1].reshape(1, 1, 2, 4).float() + 1) / 2
    sampler = deepinv.sampling.DDRM(NCSNDenoiser(analytic_pipeline()), sigmas=torch.linspace(1, 0.01, 30).numpy())
    sample = sampler(physics(x), physics)
    # the first component's pixels, as the known ones tell
    assert (sample - x).abs().mean() < 0.15
