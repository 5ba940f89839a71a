"""
Signals, fields and volumes in their own units, of 1, 2 and 5 channels: the exact network of a Gaussian, whose samples,
conditional samples and denoised estimates are known in closed form.
"""

import math

import diffusers
import numpy as np
import pytest
import torch
from networks import FieldUNet, Gaussian, quiet_pipeline, train_sigmas

from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    GaussianResidualModel,
    NCSNDenoiser,
    NCSNInpaintPipeline,
    NCSNPipeline,
    NCSNPosteriorPipeline,
)

SHAPES = [(1, 9), (2, 7), (5, 4), (1, 3, 4), (2, 3, 3), (5, 2, 2), (1, 2, 3, 2), (2, 2, 2, 3), (5, 2, 1, 2)]
# kelvin; volts; a percentage; metres; pascals
MEANS, STDS = [280.0, 2e-6, 50.0, -4000.0, 101_325.0], [12.0, 1e-6, 20.0, 900.0, 800.0]
SIGMAS = train_sigmas(AnnealedLangevinScheduler()).tolist()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_prior(shape):
    """
    In the network's units: deviation 1/2, means from -0.2 to 0.2, correlated with the distance of positions and, to
    0.6, with other channels.
    """
    channels, *sizes = shape
    positions = torch.cartesian_prod(*[torch.arange(float(size)) for size in sizes]).reshape(-1, len(sizes))
    space = torch.exp(-torch.cdist(positions, positions).double() / 3)
    across = 0.6 * torch.ones(channels, channels) + 0.4 * torch.eye(channels)
    covariance = 0.25 * torch.kron(across.double(), space)
    return Gaussian(torch.linspace(-0.2, 0.2, len(covariance)), covariance)


def make_pipeline(shape, cls=NCSNPipeline, scheduler=None, prior=None, mean=MEANS, std=STDS):
    """The exact network in the units of `MEANS` and `STDS`, unbounded."""
    channels = shape[0]
    units = {"data_mean": mean[:channels], "data_std": std[:channels], "value_range": None}
    unet = FieldUNet(prior or make_prior(shape), shape, SIGMAS)
    return quiet_pipeline(unet, scheduler, cls, **units)


def per_channel(values, shape):
    return torch.tensor(values[: shape[0]], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))


def to_user(z, shape):
    return per_channel(MEANS, shape) + 2 * per_channel(STDS, shape) * z.reshape(-1, *shape)


def standardized(x, shape):
    """Data in the user's units, n of them, by the definition of the units, as rows."""
    return ((torch.as_tensor(x).double() - per_channel(MEANS, shape)) / (2 * per_channel(STDS, shape))).flatten(1)


def draw_truth(prior, seed=0):
    noise = torch.randn(len(prior.mean), dtype=torch.float64, generator=seeded(seed))
    return prior.mean + torch.linalg.cholesky(prior.covariance) @ noise


def posterior(prior, matrix, y, noise_std):
    """The Gaussian of z given y = matrix z + noise, by the textbook's formula, for one noise_std or one each."""
    system = matrix @ prior.covariance @ matrix.T + torch.diag(torch.as_tensor(noise_std).expand(len(y)) ** 2)
    gain = prior.covariance @ matrix.T @ torch.linalg.inv(system)
    return Gaussian(prior.mean + gain @ (y - matrix @ prior.mean), prior.covariance - gain @ matrix @ prior.covariance)


def check_gaussian(samples, expected, mean=0.02, variance=0.04, spread=0.1):
    """
    Along the directions in which there is any spread: each mean within `mean` deviations, the average variance within
    `variance`, each within `variance + spread`, and each correlation within 0.02, all up to 3.5 standard errors; the
    tolerances of the tests of images.
    """
    kept = expected.variances > 1e-6 * expected.variances.max()
    w = (samples - expected.mean) @ expected.eigenvectors[:, kept] / expected.variances[kept].sqrt()
    (n, d), covariance = w.shape, w.T.cov()
    assert w.mean(0).abs().max() < mean + 3.5 / n**0.5
    assert abs(covariance.trace() / d - 1) < variance + 3 * (2 / (n * d)) ** 0.5
    assert (covariance.diag() - 1).abs().max() < variance + spread + 3.5 * (2 / n) ** 0.5
    assert (covariance - covariance.diag().diag()).abs().max() < 0.02 + 4.5 / n**0.5


# --- D and the score ---


@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_has_its_own_level(shape):
    # as many samples as channels: a level that were taken for a channel's would raise no error
    pipe, prior = make_pipeline(shape), make_prior(shape)
    sigmas = torch.tensor(np.geomspace(0.05, 20, shape[0] if shape[0] > 1 else 3), dtype=torch.float32)
    x = torch.randn(len(sigmas), *shape, generator=seeded())
    expected = prior.denoised(x.flatten(1).double(), sigmas.double()[:, None]).float()
    torch.testing.assert_close(pipe.denoise(x, sigmas).flatten(1), expected, rtol=1e-3, atol=1e-3)
    score = pipe.score(x, sigmas).flatten(1)
    for i, sigma in enumerate(sigmas.tolist()):  # of N(mean, covariance + sigma²)
        system = prior.covariance + sigma**2 * torch.eye(len(prior.mean))
        exact = -torch.linalg.solve(system, x[i].flatten().double() - prior.mean).float()
        torch.testing.assert_close(score[i], exact, rtol=0, atol=2e-3 * exact.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 9), (1, 2, 3, 2)])
def test_a_denoiser_for_others_is_in_the_users_units(shape):
    pipe, prior = make_pipeline(shape), make_prior(shape)
    x = to_user(torch.randn(3, *shape, dtype=torch.float64, generator=seeded()), shape)
    sigmas = torch.tensor([0.5, 6.0, 40.0])  # kelvin
    expected = prior.denoised(standardized(x, shape), sigmas.double()[:, None] / 24)
    found = NCSNDenoiser(pipe)(x.float(), sigmas)
    torch.testing.assert_close(standardized(found, shape), expected, rtol=0, atol=1e-3)


def test_a_denoiser_for_others_needs_one_scale():
    with pytest.raises(ValueError, match="One noise level for all channels needs one `data_std`"):
        NCSNDenoiser(make_pipeline((2, 7)))


# --- Samples ---


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_have_the_mean_and_covariance_in_the_users_units(shape):
    samples = make_pipeline(shape)(4000, generator=seeded()).images
    assert isinstance(samples, np.ndarray) and samples.dtype == np.float32 and samples.shape == (4000, *shape)
    check_gaussian(standardized(samples, shape), make_prior(shape))


@pytest.mark.parametrize("shape", [(1, 9), (2, 2, 2, 3)])
def test_output_types_of_fields(shape):
    array, tensor, latent = (
        make_pipeline(shape)(3, 5, generator=seeded(), output_type=output_type).images
        for output_type in ("np", "pt", "latent")
    )
    np.testing.assert_array_equal(array, tensor.numpy())
    torch.testing.assert_close(standardized(tensor, shape), latent.flatten(1).double(), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="'pil' is for images in"):
        make_pipeline(shape)(output_type="pil")


def test_a_range_of_ones_own_clips_and_no_range_does_not():
    shape, prior = (1, 9), Gaussian(torch.zeros(9), 0.25 * torch.eye(9))
    unet = FieldUNet(prior, shape, SIGMAS)
    units = {"data_mean": 50.0, "data_std": 20.0}
    free = quiet_pipeline(unet, value_range=None, **units)(500, generator=seeded()).images
    assert free.std() == pytest.approx(20, rel=0.05) and free.min() < 0 and free.max() > 100
    # a chain that is given a range begins at its middle, which here is the mean
    clipped = quiet_pipeline(unet, value_range=(0, 100), **units)(500, generator=seeded()).images
    np.testing.assert_allclose(clipped, free.clip(0, 100), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 9), (3, 7), (5, 2, 2), (2, 2, 2, 3)])
def test_interpolation_mixes_the_two_samples_on_the_circle(shape):
    # For a Gaussian about the mean the chain is linear in its noise.
    prior = make_prior(shape)
    pipe = make_pipeline(shape, prior=Gaussian(torch.zeros(len(prior.mean)), prior.covariance))
    row = pipe.interpolate([seeded(1), seeded(2)], num_images=shape[0] + 1, num_inference_steps=20).images
    ends = [pipe(num_inference_steps=20, generator=seeded(seed)).images for seed in (1, 2)]
    angles = torch.linspace(0, math.pi / 2, shape[0] + 1, dtype=torch.float64)[:, None]
    first, last = (standardized(end, shape) for end in ends)
    expected = angles.cos() * first + angles.sin() * last
    torch.testing.assert_close(standardized(row, shape), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 9), (2, 7), (5, 2, 2), (2, 2, 2, 3)])
def test_from_data_in_the_users_units(shape):
    # The probability flow of N(0, s²): x0 s/√(s² + sigma²), and the variance sigma² s²/(s² + sigma²).
    d = math.prod(shape)
    prior = Gaussian(torch.zeros(d), 0.25 * torch.eye(d))
    scheduler = diffusers.DDIMScheduler.from_config(AnnealedLangevinScheduler().config)
    pipe, shown = make_pipeline(shape, scheduler=scheduler, prior=prior), []
    given = to_user(torch.full((1, d), 0.8), shape)
    samples = pipe(
        2000,
        200,
        image=given.numpy(),
        strength=0.4,
        generator=seeded(),
        callback_on_step_end=lambda pipe, i, t, tensors: shown.append(tensors["sigma"].item()),
        callback_on_step_end_tensor_inputs=["sigma"],
    ).images
    shrink = 0.5 / math.sqrt(0.25 + shown[0] ** 2)
    z = standardized(samples, shape)
    # 3.5 standard errors of each coordinate's mean, and 1 % that 120 steps leave
    assert (z.mean(0) - 0.8 * shrink).abs().max() < 0.01 + 3.5 * shown[0] * shrink / 2000**0.5
    assert z.var(0).mean().item() == pytest.approx((shown[0] * shrink) ** 2, rel=0.06)


# --- Given what is known ---


@pytest.mark.parametrize("shape", SHAPES)
def test_nan_is_what_is_unknown(shape):
    prior, d = make_prior(shape), math.prod(shape)
    drawn = torch.arange(d) % 3 != 0
    z = draw_truth(prior)
    data = to_user(z, shape).float()
    data.flatten(1)[:, drawn] = math.nan
    z = standardized(data, shape)[0]
    pipe = make_pipeline(shape, NCSNInpaintPipeline)
    samples = pipe(data.numpy(), batch_size=4000, num_inference_steps=30, generator=seeded()).images
    known = standardized(samples, shape)[:, ~drawn]
    torch.testing.assert_close(known, z[~drawn].expand(4000, -1), rtol=0, atol=1e-5)  # float32's of 101,325 Pa
    check_gaussian(standardized(samples, shape)[:, drawn], prior.conditional(drawn, z), 0.03, 0.06)


def test_a_mask_of_each_channel_and_nan_add_up():
    shape = (2, 7)
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNInpaintPipeline)
    data = to_user(draw_truth(prior), shape).float()
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[0, 2:5] = True
    holes = data.clone()
    holes[:, 1, 3:6] = math.nan
    drawn = mask.clone()
    drawn[1, 3:6] = True
    arguments = {"num_inference_steps": 5, "output_type": "latent"}
    expected = pipe(data, drawn, generator=seeded(), **arguments).images
    assert torch.equal(pipe(holes, mask, generator=seeded(), **arguments).images, expected)
    assert torch.equal(pipe(holes[0].numpy(), mask.numpy(), generator=seeded(), **arguments).images, expected)
    changed = (expected != pipe.units.to_network(data))[0]
    assert torch.equal(changed, drawn)


def noise_of(kind, shape):
    """The standard deviation of the noise of x[..., ::2], in the users' units: as given, and of every number."""
    measured = torch.zeros(shape)[..., ::2].shape
    stds = per_channel(STDS, shape).expand(measured)
    if kind == "one per channel":
        fractions = torch.linspace(0.1, 0.6, shape[0], dtype=torch.float64)
        given = (fractions * torch.tensor(STDS[: shape[0]], dtype=torch.float64)).tolist()
        return given, per_channel(given, shape).expand(measured)
    # every number its own, one in five with three times the noise
    fractions = 0.2 * (1 + 2 * (torch.arange(math.prod(measured)) % 5 == 0)).reshape(measured)
    return (stds * fractions).numpy(), stds * fractions


@pytest.mark.parametrize("kind", ["one per channel", "one per number"])
@pytest.mark.parametrize("shape", SHAPES)
def test_posteriors_have_the_mean_and_covariance_in_the_users_units(shape, kind):
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNPosteriorPipeline)
    given, noise_std = noise_of(kind, shape)
    x = to_user(draw_truth(prior), shape)
    measurement = x[..., ::2] + noise_std * torch.randn(noise_std.shape, dtype=torch.float64, generator=seeded(1))
    samples = pipe(measurement.numpy(), lambda x: x[..., ::2], given, 4000, 40, generator=seeded()).images
    rows = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)[..., ::2].flatten(1).T
    scale = (2 * per_channel(STDS, shape)).expand(noise_std.shape)
    y = ((measurement[0] - per_channel(MEANS, shape)) / scale).flatten()
    expected = posterior(prior, rows, y, (noise_std / scale).flatten())
    check_gaussian(standardized(samples, shape), expected, 0.03)


@pytest.mark.parametrize("noise_std", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 9), (1, 3, 4), (1, 2, 3, 2)])
def test_posteriors_of_sums_in_kelvin(shape, noise_std):
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNPosteriorPipeline)
    matrix = torch.randn(4, math.prod(shape), dtype=torch.float64, generator=seeded(2)) / 3
    x = to_user(draw_truth(prior), shape).flatten()
    y = matrix @ x + noise_std * torch.randn(4, dtype=torch.float64, generator=seeded(1))
    samples = pipe(y[None], matrix, noise_std, 4000, 40, generator=seeded()).images
    in_z = (y - matrix @ torch.full_like(x, 280.0)) / 24
    check_gaussian(standardized(samples, shape), posterior(prior, matrix, in_z, noise_std / 24 + 1e-7), 0.03)
    if noise_std == 0:
        found = torch.as_tensor(samples).double().flatten(1) @ matrix.T
        torch.testing.assert_close(found, y.expand(4000, -1), rtol=0, atol=1e-3)  # kelvin, of hundreds


@pytest.mark.parametrize("mixed", [False, True])
def test_kelvin_beside_volts_without_noise(mixed):
    # Volts are 1e-7 of the kelvins, and are kept as exactly.
    shape = (2, 7)
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNPosteriorPipeline)
    matrix = torch.zeros(6, 14, dtype=torch.float64)
    matrix[:3, :7] = torch.randn(3, 7, dtype=torch.float64, generator=seeded(2))
    matrix[3:, 7:] = torch.randn(3, 7, dtype=torch.float64, generator=seeded(3))
    if not mixed:
        matrix = torch.eye(14, dtype=torch.float64)[[0, 3, 4, 8, 9, 12]]
    scale = (2 * per_channel(STDS, shape)).expand(shape).flatten()
    offset = per_channel(MEANS, shape).expand(shape).flatten()
    y = matrix @ to_user(draw_truth(prior), shape).flatten()
    samples = pipe(y[None], matrix, 0.0, 4000, 40, generator=seeded()).images
    rows = matrix * scale / (matrix * scale).norm(dim=1, keepdim=True)
    in_z = (y - matrix @ offset) / (matrix * scale).norm(dim=1)
    check_gaussian(standardized(samples, shape), posterior(prior, rows, in_z, 1e-7), 0.03)
    found = standardized(samples, shape) @ rows.T
    torch.testing.assert_close(found, in_z.expand(4000, -1), rtol=0, atol=1e-4)


def test_a_sure_channel_does_not_hide_an_unsure_one():
    # noise of 1e-4 and of 0.5 deviations
    shape = (2, 7)
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNPosteriorPipeline)
    fractions = torch.tensor([[1e-4], [0.5]], dtype=torch.float64)
    noise_std = (fractions * per_channel(STDS, shape)).flatten()
    y = to_user(draw_truth(prior), shape) + noise_std[:, None] * torch.randn(
        shape, dtype=torch.float64, generator=seeded(1)
    )
    samples = pipe(y, lambda x: x, noise_std, 4000, 40, generator=seeded()).images
    z = standardized(samples, shape)
    stds = (fractions / 2).expand(shape).flatten()
    expected = posterior(prior, torch.eye(14, dtype=torch.float64), standardized(y, shape)[0], stds)
    # of the unsure channel, whose values the sure one tells, too
    unsure = Gaussian(expected.mean[7:], expected.covariance[7:, 7:])
    check_gaussian(z[:, 7:], unsure, 0.03)
    assert (z[:, :7] - expected.mean[:7]).abs().max() < 6 * 5e-5 + 1e-4


def test_complex_measurements_with_noise_of_each_frequency():
    shape = (1, 9)
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNPosteriorPipeline)
    frequencies = torch.fft.rfft(torch.eye(9, dtype=torch.float64), norm="ortho").T[:3]  # (3, 9)
    noise_std = torch.tensor([[1.0, 2.0, 6.0]])  # kelvin
    y = to_user(draw_truth(prior), shape).flatten().to(frequencies.dtype) @ frequencies.T
    samples = pipe(
        y.reshape(1, 1, 3), lambda x: torch.fft.rfft(x, norm="ortho")[..., :3], noise_std, 4000, 40, generator=seeded()
    ).images
    matrix = torch.cat([frequencies.real, frequencies.imag[1:]])  # the first has no imaginary part
    in_z = (torch.cat([y.real, y.imag[1:]]) - matrix.sum(1) * 280) / 24
    expected = posterior(prior, matrix, in_z, torch.tensor([1.0, 2.0, 6.0, 2.0, 6.0], dtype=torch.float64) / 24)
    check_gaussian(standardized(samples, shape), expected, 0.03)


# --- Denoisers for other samplers ---


def given_all(prior, x, sigma, rows, y, noise_std):
    """E[z | z + sigma noise = x, rows z + noise = y] by the textbook's formula, for each x."""
    d = len(prior.mean)
    matrix = torch.cat([torch.eye(d, dtype=torch.float64), rows])
    stds = torch.cat([torch.full((d,), sigma, dtype=torch.float64), torch.full((len(y),), noise_std).double()])
    return torch.stack([posterior(prior, matrix, torch.cat([one, y]), stds).mean for one in x.double()])


@pytest.mark.parametrize("shape", [(1, 9), (2, 2, 2, 3)])
@pytest.mark.parametrize("noise_std", [0.0, 0.2])
def test_the_denoiser_of_measured_data(shape, noise_std):
    # asked about one x again and again, its multiplier settles
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNPosteriorPipeline)
    rows = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)[..., ::2].flatten(1).T
    y = rows @ draw_truth(prior)
    measurement = to_user(rows.T @ y, shape)[..., ::2].float()
    noise = (2 * noise_std * torch.tensor(STDS[: shape[0]])).tolist() if noise_std else 0.0
    denoiser = pipe.condition(measurement, lambda x: x[..., ::2], noise, batch_size=3)
    x = torch.randn(3, *shape, generator=seeded(4))
    for _ in range(60):
        found = denoiser(x, 0.5)
    expected = given_all(prior, x.flatten(1), 0.5, rows, y, max(noise_std, 1e-6))
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 9), (2, 2, 2, 3)])
def test_the_denoiser_of_known_values(shape):
    prior, pipe = make_prior(shape), make_pipeline(shape, NCSNInpaintPipeline)
    drawn = torch.arange(math.prod(shape)) % 3 != 0
    truth = draw_truth(prior)
    data = to_user(truth, shape).float()
    data.flatten(1)[:, drawn] = math.nan
    denoiser, x = pipe.condition(data, batch_size=3), torch.randn(3, *shape, generator=seeded(4))
    for _ in range(200):
        found = denoiser(x, 0.5)
    rows = torch.eye(len(truth), dtype=torch.float64)[~drawn]
    expected = given_all(prior, x.flatten(1), 0.5, rows, truth[~drawn], 1e-6)
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=0, atol=2e-3)


def test_a_conditional_denoiser_in_the_users_units():
    shape = (1, 9)
    pipe = make_pipeline(shape, NCSNPosteriorPipeline)
    measurement = torch.linspace(270, 290, 5)[None, None]
    x = 280 + 24 * torch.randn(1, *shape, generator=seeded(4))
    first, second = (pipe.condition(measurement, lambda x: x[..., ::2], 2.0) for _ in range(2))
    found = NCSNDenoiser(pipe, denoiser=first)(x, 12.0)  # kelvin, half a unit of the network's
    torch.testing.assert_close((found - 280) / 24, second((x - 280) / 24, 0.5), rtol=0, atol=1e-4)


# --- What is refused, and what is warned about ---


@pytest.mark.parametrize(
    ("noise_std", "message"),
    [
        ([0.1, 0.2, 0.3], "`noise_std` must be one number, one for each channel of the measurement, or of its shape"),
        (
            np.zeros(2),
            r"`noise_std` must hold finite numbers above 0, not 0 to 0\. The number 0 keeps all that is meas",
        ),
        ([1.0, math.nan], "`noise_std` must hold finite numbers above 0"),
        (torch.ones(2) * 1j, "`noise_std` must be a finite number of at least 0, or an array of numbers above 0"),
        (-torch.ones(()), r"`noise_std` must be a finite number of at least 0, not -1\.0"),
        ("much", "`noise_std` must be a finite number of at least 0, or an array of numbers above 0, not 'much'"),
    ],
)
def test_bad_noise(noise_std, message):
    pipe = make_pipeline((2, 7), NCSNPosteriorPipeline)
    with pytest.raises(ValueError, match=message):
        pipe(torch.zeros(1, 2, 7), lambda x: x, noise_std)


def test_noise_of_each_number_of_a_flat_measurement():
    pipe = make_pipeline((1, 9), NCSNPosteriorPipeline)
    with pytest.raises(ValueError, match="`noise_std` must be one number"):
        pipe(torch.zeros(1), lambda x: x.sum((1, 2)), [1.0, 2.0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(1, 7, 2), "`image` must be 2 × 7 .channels and 1 sizes. for this network, not 7 × 2"),
        (torch.zeros(7), r"`image` must be 2 × 7 .* not "),
        (torch.full((2, 7), math.inf), "`image` must hold finite numbers"),
        (torch.full((2, 7), math.nan), "`image` must hold finite numbers"),
        (torch.zeros(2, 7) * 1j, "`image` must be an array or a tensor of shape .n, 2, 7., of real numbers"),
        ("field.npy", "`image` must be an array or a tensor of shape .n, 2, 7., not str"),
    ],
)
def test_bad_data(data, message):
    pipe = make_pipeline((2, 7))
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(image=data)


def test_data_in_another_unit_are_warned_about(monkeypatch):
    said = []
    monkeypatch.setattr("ncsn_diffusers.inputs.logger.warning", said.append)
    pipe, inpaint = make_pipeline((1, 9)), make_pipeline((1, 9), NCSNInpaintPipeline)
    celsius = torch.linspace(-10, 25, 9)[None, None]
    pipe(image=celsius, num_inference_steps=2)
    inpaint(celsius, torch.ones(9), num_inference_steps=2)
    assert len(said) == 2
    assert all("`image` holds -10 to 25, but the network's training data have mean [280.0]" in s for s in said)
    pipe(image=celsius + 273.15, num_inference_steps=2)
    assert len(said) == 2


def make_climate(cls=NCSNPipeline):
    """A Gaussian network with a map of means, from 230 K to 330 K, in units of departures of 2 K from it."""
    climate = torch.linspace(230, 330, 24).reshape(1, 4, 6)
    departures = torch.randn(2000, 1, 4, 6, generator=seeded())
    scheduler = AnnealedLangevinScheduler()
    unet = GaussianResidualModel.fit((climate - 280) / 4 + 0.5 * departures, scheduler, rank=23)
    return climate, quiet_pipeline(unet, scheduler, cls, data_mean=280.0, data_std=2.0, value_range=None)


def test_chains_begin_at_the_map_that_the_network_has_in_it():
    climate, pipe = make_climate()
    samples = pipe(2000, num_inference_steps=10, generator=seeded(), output_type="pt").images
    assert (samples.mean(0) - climate).abs().max() < 0.3  # kelvin; the standard error is 0.05
    assert samples.std(0).mean() == pytest.approx(2, rel=0.2)


def test_data_of_a_map_are_judged_by_it(monkeypatch):
    said = []
    monkeypatch.setattr("ncsn_diffusers.inputs.logger.warning", said.append)
    monkeypatch.setattr("ncsn_diffusers.pipeline_ncsn_posterior.logger.warning", said.append)
    climate, posterior = make_climate(NCSNPosteriorPipeline)
    inpaint = make_climate(NCSNInpaintPipeline)[1]
    inpaint(climate + 3, torch.ones(4, 6), num_inference_steps=2)
    posterior(climate[None, ..., ::2] + 3, lambda x: x[..., ::2], 0.1, num_inference_steps=2)
    assert not said
    inpaint(climate.flip(-1, -2), torch.ones(4, 6), num_inference_steps=2)  # within the range of all values
    posterior(climate.flip(-1, -2)[None, ..., ::2], lambda x: x[..., ::2], 0.1, num_inference_steps=2)
    assert len(said) == 2


@pytest.mark.parametrize("offset", [0.0, -273.15])
def test_a_measurement_in_another_unit_is_warned_about(offset, monkeypatch):
    said = []
    monkeypatch.setattr("ncsn_diffusers.pipeline_ncsn_posterior.logger.warning", said.append)
    pipe = make_pipeline((1, 9), NCSNPosteriorPipeline)
    kelvins = torch.linspace(263, 298, 9)[None, None]
    pipe((kelvins + offset)[..., ::2], lambda x: x[..., ::2], 0.5, num_inference_steps=2)
    assert len(said) == (offset != 0)
    assert all("`measurement` is one that no data within the training data's range would give" in s for s in said)
