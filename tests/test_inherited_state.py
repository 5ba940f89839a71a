"""What a call must not depend on: the states that a caller has set, and waiting for the device."""

from contextlib import contextmanager

import pytest
import torch
from networks import AnalyticUNet, WithVariance, conditional_unet, quiet_pipeline, small_unet, train_sigmas
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    NCSNDenoiser,
    NCSNInpaintPipeline,
    NCSNPipeline,
    NCSNPosteriorPipeline,
)
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.operators import LinearOperator
from ncsn_diffusers.score_matching import draw_sigmas, score_matching_loss, stratified


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "inference mode": torch.inference_mode,
    "TF32": lambda: matmul_precision("medium"),
}

KERNEL = torch.tensor([[[[0.1, 0.2, 0.1], [0.0, 0.5, 0.1], [0.0, 0.0, 0.0]]]])
OPERATORS = {
    "matrix": (torch.randn(5, 8, generator=seeded(2)) / 3, (5,)),
    "convolution": (lambda x: F.conv2d(x, KERNEL, padding=1), (1, 2, 4)),
    "averages": (lambda x: F.avg_pool2d(x, 2), (1, 1, 2)),
    "product": (lambda x: x.flatten(1) @ torch.ones(8, 2, dtype=torch.float32) / 8, (2,)),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("by_gradients", [False, True])
def test_operators_compute_in_float32(name, state, by_gradients, monkeypatch):
    if by_gradients:
        monkeypatch.setattr("ncsn_diffusers.operators.MAX_SPECTRAL", 0)
    given, shape = OPERATORS[name]
    x, r = torch.randn(3, 1, 2, 4, generator=seeded()), torch.randn(3, *shape, generator=seeded(1))

    def compute():
        operator = LinearOperator(given, x.shape)
        return operator.A(x), operator.A_adjoint(r), *operator.solve(operator.A(x), 2.0, 0.01)

    expected = compute()
    with STATES[state]():
        found = compute()
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


PICTURE = torch.rand(1, 1, 2, 4, generator=seeded(3))
MEASUREMENTS = {
    name: PICTURE.flatten(1) @ operator.T if name == "matrix" else operator(PICTURE)
    for name, (operator, _) in OPERATORS.items()
}


def draw(call, network=None):
    """Samples of the mixture in 2 × 4 pixels, by each of the calls."""
    unet = network or AnalyticUNet(train_sigmas(AnnealedLangevinScheduler()).tolist())
    mask = torch.tensor([[True, False, True, False], [False, True, False, True]])
    settings = {"num_inference_steps": 8, "generator": seeded(), "output_type": "latent"}
    if call == "sample":
        return quiet_pipeline(unet)(4, **settings).images
    if call == "image":
        return quiet_pipeline(unet)(4, image=PICTURE, **settings).images
    if call == "inpaint":
        return quiet_pipeline(unet, cls=NCSNInpaintPipeline)(PICTURE, mask, 4, **settings).images
    pipe = quiet_pipeline(unet, cls=NCSNPosteriorPipeline)
    return pipe(MEASUREMENTS[call], OPERATORS[call][0], 0.1, 4, **settings).images


CALLS = ["sample", "image", "inpaint", *OPERATORS]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_calls_draw_the_same_in_any_state(call, state):
    expected = draw(call)
    with STATES[state]():
        # networks of the user's are the user's; this one computes in float64 whatever the state
        found = draw(call, AnalyticUNet(train_sigmas(AnnealedLangevinScheduler()).tolist()).float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("state", STATES)
def test_classes_are_drawn_the_same_in_any_state(state):
    def labels():
        return quiet_pipeline(conditional_unet())._draw_classes(50, seeded()).tolist()

    expected = labels()
    with STATES[state]():
        assert labels() == expected


# --- What a network predicts besides ---


@pytest.mark.parametrize("call", CALLS)
def test_a_predicted_variance_is_left_out(call):
    network = AnalyticUNet(train_sigmas(AnnealedLangevinScheduler()).tolist())
    assert torch.equal(draw(call, WithVariance(network)), draw(call, network))


def test_a_predicted_variance_is_left_out_of_d_and_the_score():
    unet = small_unet()
    plain, besides = NCSNPipeline(unet, AnnealedLangevinScheduler()), quiet_pipeline(WithVariance(unet))
    x, sigmas = torch.randn(3, 1, 8, 8, generator=seeded()), torch.tensor([0.1, 1.0, 10.0])
    with torch.no_grad():
        assert torch.equal(besides.denoise(x, sigmas), plain.denoise(x, sigmas))
        assert torch.equal(besides.score(x, 0.5), plain.score(x, 0.5))
        assert torch.equal(NCSNDenoiser(besides)(x, 0.3), NCSNDenoiser(plain)(x, 0.3))


# --- The device is not waited for ---


class CountReads(TorchDispatchMode):
    """How often a number is read from a tensor, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def count_reads(call):
    with CountReads() as reads:
        call()
    return reads.count


def test_reads_are_counted():
    x = torch.ones(3)
    assert count_reads(lambda: (x[0].item(), float(x[1]), bool(x[2] > 0), x[torch.tensor(1)])) == 4


IMAGE, MASK = torch.full((1, 1, 8, 8), 0.5), torch.eye(8)
MATRIX = torch.randn(6, 64, generator=seeded(2))
BLUR = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
LOOPS = {
    "sampling": (NCSNPipeline, lambda pipe, **k: pipe(2, **k)),
    "two steps a level": (NCSNPipeline, lambda pipe, **k: pipe(2, num_langevin_steps=2, **k)),
    "from an image": (NCSNPipeline, lambda pipe, **k: pipe(2, image=IMAGE, strength=1.0, **k)),
    "guidance": (NCSNPipeline, lambda pipe, **k: pipe(class_labels=[0, 1], guidance_scale=2.0, **k)),
    "a product": (NCSNPipeline, lambda pipe, **k: pipe(class_labels={0: 1, 1: 1, None: -1}, **k)),
    "interpolation": (NCSNPipeline, lambda pipe, **k: pipe.interpolate([seeded(0), seeded(1)], 3, **k)),
    "inpainting": (NCSNInpaintPipeline, lambda pipe, **k: pipe(IMAGE, MASK, **k)),
    "a mask": (NCSNPosteriorPipeline, lambda pipe, **k: pipe(IMAGE[..., 0], lambda x: x[..., 0], 0.1, **k)),
    "a matrix": (NCSNPosteriorPipeline, lambda pipe, **k: pipe(torch.zeros(1, 6), MATRIX, 0.1, **k)),
    "exactly": (NCSNPosteriorPipeline, lambda pipe, **k: pipe(torch.zeros(1, 6), MATRIX, 0.0, **k)),
    "conjugate gradients": (NCSNPosteriorPipeline, lambda pipe, **k: pipe(BLUR(IMAGE), BLUR, 0.1, **k)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_reads_nothing_from_the_device(name, monkeypatch):
    if name == "conjugate gradients":
        monkeypatch.setattr("ncsn_diffusers.operators.MAX_SPECTRAL", 0)
    cls, call = LOOPS[name]
    classes = name in ("guidance", "a product")
    pipe = quiet_pipeline(conditional_unet() if classes else small_unet(), cls=cls)
    few, many = (count_reads(lambda n=n: call(pipe, num_inference_steps=n, output_type="latent")) for n in (4, 9))
    assert few == many


def test_training_reads_nothing_from_the_device():
    unet, scheduler = small_unet(), AnnealedLangevinScheduler()
    denoiser, data = Denoiser.of(unet, scheduler), torch.randn(4, 1, 8, 8)

    def step():
        for distribution in ("lognormal", "uniform"):
            sigmas = draw_sigmas(scheduler.ladder, stratified(torch.rand(4)), distribution)
            score_matching_loss(denoiser, data, torch.randn_like(data), sigmas, "edm").mean().backward()

    step()  # what is read once, such as the ladder
    assert count_reads(step) == 0
