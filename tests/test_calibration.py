"""Calibration of posterior samples: against exact posteriors, and against samplers that are wrong in a known way."""

import importlib
import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from matplotlib.figure import Figure
from networks import Gaussian, GaussianUNet, quiet_pipeline, train_sigmas
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, sampling
from ncsn_diffusers.evaluation.calibration import (
    OPERATORS,
    Calibration,
    calibrate,
    calibrate_exact,
    coverage,
    crps,
    make_operator,
    misfit,
    nominal_coverage,
    psnr,
    rank_histogram,
    ratio_and_error,
    simulate_exact,
    variance_ratio,
)
from ncsn_diffusers.evaluation.report import plot_reliability


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simulate(n, k, spread=1.0, bias=0.0):
    """Truths and samples from N(m, 0.2² I), a mean m for each of n images; the samples with another spread and mean."""
    means = normal(n, 1, 2, 5, 5)
    truths = means[:, 0] + 0.2 * normal(n, 2, 5, 5, seed=1)
    return means + bias + 0.2 * spread * normal(n, k, 2, 5, 5, seed=2), truths


# --- Coverage ---


@pytest.mark.parametrize("k", [2, 3, 8])
def test_coverage_of_the_right_distribution_is_nominal(k):
    samples, truths = simulate(400, k)
    for trim in range(k // 2):
        actual, error = coverage(samples, truths, trim, tolerance=1e-6)
        # 20,000 independent pixels
        nominal = nominal_coverage(k, trim)
        assert error == pytest.approx(math.sqrt(nominal * (1 - nominal) / 20_000), rel=0.15)
        assert abs(actual - nominal) < 3.5 * error


def test_nominal_coverage():
    assert nominal_coverage(8) == pytest.approx(7 / 9)
    assert [nominal_coverage(8, trim) for trim in range(4)] == pytest.approx([7 / 9, 5 / 9, 3 / 9, 1 / 9])
    assert nominal_coverage(2) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("num_samples", "trim"), [(1, 0), (8, 4), (8, -1), (3, 1)])
def test_intervals_of_fewer_than_two_samples_are_refused(num_samples, trim):
    with pytest.raises(ValueError, match=f"`trim`={trim} of each end must leave at least 2 of `num_samples`"):
        nominal_coverage(num_samples, trim)
    with pytest.raises(ValueError, match=r"`trim`|k of at least 2"):
        coverage(torch.zeros(3, num_samples, 1, 2, 2), torch.zeros(3, 1, 2, 2), trim)


def test_coverage_sees_samples_that_are_too_sure_too_wide_and_biased():
    exact = nominal_coverage(8)
    # for deviations 1 and s the truth is inside with the probability E[Phi(s max) - Phi(s min)], by quadrature
    x = normal(200_000, 8, seed=5)
    for spread in (0.5, 2.0):
        expected = (torch.special.ndtr(spread * x.amax(1)) - torch.special.ndtr(spread * x.amin(1))).mean().item()
        assert coverage(*simulate(400, 8, spread), tolerance=1e-6)[0] == pytest.approx(expected, abs=0.01)
        assert (expected < exact - 0.1) if spread < 1 else (expected > exact + 0.1)
    assert coverage(*simulate(400, 8, bias=0.4))[0] < exact - 0.2


def test_pixels_that_do_not_vary_do_not_count_and_those_that_vary_are_judged_as_before():
    samples, truths = simulate(200, 8)
    before = coverage(samples, truths, tolerance=0.05)
    # black background, with noise below the tolerance
    edge = torch.zeros(200, 8, 2, 5, 3, dtype=torch.float64)
    samples = torch.cat([samples, edge + 0.005 * normal(*edge.shape, seed=3).abs()], -1)
    truths = torch.cat([truths, edge[:, 0]], -1)
    assert coverage(samples, truths, tolerance=0.05) == pytest.approx(before)
    # what a sampler is sure of and wrong about counts against it
    wrong = truths.clone()
    wrong[..., 5:] = 0.5
    actual = coverage(samples, wrong, tolerance=0.05)[0]
    assert actual == pytest.approx(before[0] * 25 / 40)
    assert math.isnan(coverage(torch.zeros(3, 8, 1, 2, 2), torch.zeros(3, 1, 2, 2))[0])


def test_coverage_is_nominal_where_values_come_in_steps():
    # the posterior of a pixel is black or white or one of 3 grays: most values are tied
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(300, 5, generator=generator).square()
    grays = torch.tensor([0, 0.3, 0.5, 0.7, 1])
    values = grays[torch.multinomial(shares, 9 * 50, replacement=True, generator=generator)].reshape(300, 9, 2, 5, 5)
    # samples reach the steps up to noise below the tolerance, and are clamped; truths lie on them
    samples = (values[:, 1:] + 0.005 * normal(300, 8, 2, 5, 5)).clamp(0, 1)
    for trim in range(4):
        actual, error = coverage(samples, values[:, 0].double(), trim, tolerance=0.05)
        assert 0 < error < 0.01
        assert abs(actual - nominal_coverage(8, trim)) < 3.5 * error


def test_ties_are_shared_out_evenly():
    truths = torch.full((1, 1, 1, 1), 0.5)
    # one below, two equal, one above: ranks 1, 2, 3 of 0..4, all inside; without the outer two only 2 is
    samples = torch.tensor([0.0, 0.5, 0.5, 1.0]).reshape(1, 4, 1, 1, 1)
    assert coverage(samples, truths)[0] == 1
    assert coverage(samples, truths, trim=1)[0] == pytest.approx(1 / 3)
    # three equal, one above: ranks 0, 1, 2, 3
    samples = torch.tensor([0.5, 0.5, 0.5, 1.0]).reshape(1, 4, 1, 1, 1)
    assert coverage(samples, truths)[0] == pytest.approx(3 / 4)
    assert coverage(samples, truths, trim=1)[0] == pytest.approx(1 / 4)
    # below all of them
    samples = torch.tensor([0.6, 0.7, 0.8, 1.0]).reshape(1, 4, 1, 1, 1)
    assert coverage(samples, truths)[0] == 0


# --- Variance over squared error ---


@pytest.mark.parametrize("k", [2, 8])
def test_variance_ratio_is_one_for_the_right_distribution(k):
    ratio, error = variance_ratio(*simulate(400, k))
    assert error < 0.03
    assert abs(ratio - 1) < 3.5 * error


def test_variance_ratio_sees_samples_that_are_too_sure():
    # variances s², errors 1 + s²/k
    for spread in (0.5, 2.0):
        expected = (1 + 1 / 8) * spread**2 / (1 + spread**2 / 8)
        assert variance_ratio(*simulate(400, 8, spread))[0] == pytest.approx(expected, rel=0.05)


# --- Misfit ---


def test_misfit_of_the_truth_and_of_the_exact_posterior_is_one():
    # x ~ N(0, 1) and y = 2 x + 0.5 n, pixel by pixel: x given y is N(4/17 · 2 y, 1/17)
    x = normal(500, 1, 4, 4)
    y = 2 * x + 0.5 * normal(500, 1, 4, 4, seed=1)
    samples = (8 / 17 * y)[:, None] + 17**-0.5 * normal(500, 3, 1, 4, 4, seed=2)
    values = misfit(samples, y, lambda x: 2 * x, 0.5)
    assert values.shape == (500, 3)
    assert values.mean().item() == pytest.approx(1, abs=0.03)
    assert misfit(x[:, None], y, lambda x: 2 * x, 0.5).mean().item() == pytest.approx(1, abs=0.05)
    # of noise overfitted, 0
    assert misfit(y[:, None] / 2, y, lambda x: 2 * x, 0.5).max() < 1e-20


def test_misfit_of_complex_measurements_counts_both_parts():
    x = torch.zeros(2, 1, 1, 2, 2)
    y = torch.full((2, 1, 2, 2), complex(3, 4))
    assert misfit(x, y, lambda x: x.to(torch.complex64), 1.0).tolist() == [[12.5], [12.5]]


def test_misfit_refuses_what_does_not_fit():
    x, y = torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"`noise_std` must be above 0, not 0"):
        misfit(x, y, lambda x: x, 0)
    with pytest.raises(ValueError, match=r"must have the shape \(n, 1, 2, 2\), as `operator` returns it, not \(2, 1"):
        misfit(x, y, lambda x: x[..., ::2, ::2], 0.1)
    with pytest.raises(ValueError, match=r"for the same n images, not of shape \(2, 3, 1, 4, 4\) and \(1, 1, 4, 4\)"):
        misfit(x, y[:1], lambda x: x, 0.1)


# --- PSNR, ratios ---


def test_psnr():
    truths = torch.zeros(2, 1, 4, 4)
    samples = torch.stack([torch.full((3, 1, 4, 4), 0.1), torch.full((3, 1, 4, 4), 0.01)])
    torch.testing.assert_close(psnr(samples, truths[:, None]), torch.tensor([[20.0] * 3, [40.0] * 3]).double())
    assert psnr(truths, truths).tolist() == [math.inf] * 2
    for images in (torch.zeros(2, 2, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 2, 2)):
        with pytest.raises(ValueError, match="`truths` must have the axes of `images`"):
            psnr(images, truths)


def test_the_error_of_a_ratio():
    b = 1 + normal(100_000).abs()
    a = 0.7 * b + 0.1 * normal(100_000, seed=1)
    ratios = [ratio_and_error(*parts) for parts in zip(a.split(50), b.split(50), strict=True)]
    values, errors = torch.tensor(ratios).T
    assert values.mean().item() == pytest.approx(0.7, abs=1e-3)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.05)
    assert math.isnan(ratio_and_error(a[:1], b[:1])[1])


@pytest.mark.parametrize("function", [coverage, crps, rank_histogram, variance_ratio])
def test_bad_samples_are_refused(function):
    good = torch.zeros(3, 4, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    for samples, truths in (
        (good[0][:, :1], good[1]),
        (good[0][0], good[1]),
        (good[0], good[1][:2]),
        (good[0][:0], good[1][:0]),
    ):
        with pytest.raises(ValueError, match=r"`samples` must have the shape \(n, k, channels, \.\.\.\)"):
            function(samples, truths)
    with pytest.raises(ValueError, match="`samples` has values that are not finite"):
        function(good[0] * math.nan, good[1])
    with pytest.raises(ValueError, match="`truths` has values that are not finite"):
        function(good[0], good[1] + math.inf)


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="`tolerance` must be at least 0"):
        coverage(torch.zeros(3, 4, 1, 2, 2), torch.zeros(3, 1, 2, 2), tolerance=tolerance)


# --- Operators ---


@pytest.mark.parametrize("channels", [1, 3])
def test_operators(channels):
    shape = (channels, 8, 12)
    x = normal(2, *shape).float()
    found = {name: make_operator(name, shape)(x) for name in OPERATORS}
    # 30 % of the pixels, the same in all channels and images
    kept = found["missing-pixels"]
    assert kept.shape == (2, channels, 29)
    places = (x[0, 0].flatten()[:, None] == kept[0, 0]).float().argmax(0)
    assert torch.equal(kept, x.flatten(2)[..., places]) and len(set(places.tolist())) == 29
    torch.testing.assert_close(found["pixelated"][1, -1, 1, 2], x[1, -1, 4:, 8:].mean())
    # a pixel becomes a Gaussian of its deviation, and what is reflected stays in the image
    dot = torch.zeros(1, channels, 21, 21)
    dot[0, -1, 10, 10] = 1
    blurred = make_operator("blurred", dot.shape[1:])(dot)
    assert blurred[0, :-1].abs().sum() == 0
    assert blurred.sum().item() == pytest.approx(1)
    offsets = torch.arange(21.0) - 10
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2)) * (offsets.abs() <= 4)
    torch.testing.assert_close(blurred[0, -1].sum(0), weights / weights.sum())
    flat = make_operator("blurred", shape)(torch.ones(1, *shape))
    torch.testing.assert_close(flat, torch.ones(1, *shape))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blur", (1, 8, 8), "There is no operator 'blur'; there are missing-pixels, stations, pixelated, blurred"),
        ("pixelated", (1, 8, 10), "`pixelated` needs height and width in multiples of 4, not 8 × 10 pixels"),
        ("blurred", (1, 8, 4), "`blurred` needs more than 4 pixels each way, not 8 × 4"),
        ("missing-pixels", (1, 1, 1), "`missing-pixels` leaves nothing of 1 × 1 points"),
    ],
)
def test_operators_that_do_not_fit_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        make_operator(name, shape)


# --- The floor ---


def test_simulation_is_of_the_exact_posterior():
    images = 0.3 * normal(40, 1, 2, 3) + normal(1, 1, 2, 3, seed=1) + 0.5 * normal(40, 1, 1, 1, seed=2)
    matrix = normal(3, 6, seed=3)
    mean, covariance = images.flatten(1).mean(0), images.flatten(1).T.cov()
    simulations = simulate_exact(images, lambda x: x.flatten(1) @ matrix.float().T, 0.2, 4000, 3)
    samples, truths, y = (tensor.double() for tensor in next(simulations))
    samples, truths = samples.flatten(2), truths.flatten(1)
    assert not torch.equal(next(simulations)[1].double().flatten(1), truths)
    # truths have the mean and the covariance, and y the noise
    torch.testing.assert_close(truths.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(truths.T.cov(), covariance, atol=0.03, rtol=0)
    noise = y - truths @ matrix.T
    torch.testing.assert_close(noise.T.cov(), 0.04 * torch.eye(3).double(), atol=0.004, rtol=0)
    # the textbook's conditional Gaussian
    gain = covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T + 0.04 * torch.eye(3).double())
    given_mean, given_covariance = mean + (y - mean @ matrix.T) @ gain.T, covariance - gain @ matrix @ covariance
    root = torch.linalg.inv(torch.linalg.cholesky(given_covariance))
    for draws in (samples[:, 0], samples[:, 2], truths):
        w = (draws - given_mean) @ root.T
        assert w.mean(0).abs().max() < 3.5 / 4000**0.5
        assert (w.T.cov() - torch.eye(6)).abs().max() < 4.5 * (2 / 4000) ** 0.5
    # independent of each other given y
    w = (samples - given_mean[:, None]) @ root.T
    assert (w[:, 0].T @ w[:, 1] / 4000).abs().max() < 4.5 / 4000**0.5


def test_the_floor_is_right_and_its_scatter_is_that_of_one_simulation():
    images = (0.5 + 0.125 * normal(60, 1, 8, 8) + 0.125 * normal(60, 1, 1, 1, seed=1)).float()
    operator = make_operator("pixelated", (1, 8, 8))
    exact = calibrate_exact(images, operator, 0.05, 12, 6)
    found, reliability = {metric.key: metric for metric in exact.metrics}, exact.reliability
    assert exact.ranks == pytest.approx([1 / 7] * 7, abs=0.02)
    assert list(found) == ["misfit", "largest_misfit", "coverage", "spread_over_error"]
    for key, right in (("misfit", 1), ("coverage", 5 / 7), ("spread_over_error", 1)):
        assert 0 < found[key].standard_error < 0.3
        assert abs(found[key].value - right) < 3.5 * found[key].standard_error / 20**0.5
    assert [interval["nominal"] for interval in reliability] == pytest.approx([5 / 7, 3 / 7, 1 / 7])
    for interval in reliability:
        assert abs(interval["actual"] - interval["nominal"]) < 3.5 * interval["standard_error"] / 20**0.5
    # one more simulation, and its own standard errors over the images
    samples, truths, y = next(simulate_exact(images, operator, 0.05, 12, 6, seed=1))
    for metric in calibrate(samples, truths, y, operator, 0.05).metrics:
        if metric.key in ("misfit", "coverage", "spread_over_error"):
            assert metric.standard_error == pytest.approx(found[metric.key].standard_error, rel=0.8)


# --- The report of a whole evaluation, on a pipeline whose posterior is known ---


@pytest.fixture(scope="module")
def gaussian_images(tmp_path_factory):
    """A Gaussian of 8 × 8 pixels of deviation 0.25 in [-1, 1], and a folder with 400 images drawn from it."""
    axis = torch.arange(8.0)
    covariance = 0.25**2 * torch.exp(
        -torch.cdist(torch.cartesian_prod(axis, axis), torch.cartesian_prod(axis, axis)) / 3
    )
    gaussian = Gaussian(torch.linspace(-0.2, 0.2, 64), covariance)
    folder = tmp_path_factory.mktemp("images")
    x = gaussian.mean + normal(400, 64) @ torch.linalg.cholesky(gaussian.covariance).T
    for i, image in enumerate(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).reshape(400, 8, 8)):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return gaussian, folder


@pytest.fixture
def report(monkeypatch, tmp_path, gaussian_images):
    """The entry of metrics.json, of any scheduler."""
    pytest.importorskip("torch_fidelity")
    evaluate = importlib.import_module("ncsn_diffusers.evaluation.evaluate")
    gaussian, images = gaussian_images

    def run(scheduler, **arguments):
        unet = GaussianUNet(gaussian, 8, 8, train_sigmas(AnnealedLangevinScheduler()).tolist())
        monkeypatch.setattr(sampling, "load_pipeline", lambda *_: quiet_pipeline(unet, scheduler))
        monkeypatch.setattr(evaluate, "InceptionFeatures", lambda _: lambda images: images[:, 0, 0, :2].double())
        config = evaluate.EvaluateConfig(
            "pipeline",
            output_dir=str(tmp_path),
            train_data_dir=str(images),
            features="inception",
            loss_images=0,
            num_inference_steps=10,
            **({"num_images": 100, "posterior_images": 60, "batch_size": 240} | arguments),
        )
        return evaluate.evaluate(config)["posterior"]

    return run


def test_the_report_on_an_analytic_pipeline_is_right(report):
    found = report(AnnealedLangevinScheduler(), posterior=tuple(OPERATORS), posterior_noise_std=0.2)
    assert (found["images"], found["samples"], found["evaluations"]) == (60, 8, 50)
    assert list(found["operators"]) == list(OPERATORS)
    for operator in found["operators"].values():
        # in 50 evaluations the scheduler leaves up to 4 % too much variance; with less noise it loses some
        for key, right, bias in (("misfit", 1, 0.04), ("coverage", 7 / 9, 0.01), ("spread_over_error", 1, 0.02)):
            error = operator["exact"][f"{key}_standard_error"]
            assert abs(operator[key] - right) < bias + 3.5 * error, key
            assert abs(operator["exact"][key] - right) < 3.5 * error / 20**0.5, key
            assert operator[f"{key}_standard_error"] == pytest.approx(error, rel=0.7)
        for interval in operator["reliability"]:
            assert abs(interval["actual"] - interval["nominal"]) < 0.01 + 3.5 * interval["standard_error"]


def test_the_report_sees_a_sampler_that_is_too_sure(report):
    # Euler ancestral loses a quarter of the variance in 25 steps
    scheduler = EulerAncestralDiscreteScheduler.from_config(AnnealedLangevinScheduler().config)
    found = report(scheduler, posterior=("pixelated",))["operators"]["pixelated"]
    exact = found["exact"]
    assert 0.6**0.5 < found["spread_over_error"] < 0.9**0.5
    assert found["spread_over_error"] < 1 - 5 * exact["spread_over_error_standard_error"]
    assert found["coverage"] < 7 / 9 - 5 * exact["coverage_standard_error"]


def test_the_reliability_plot_shows_what_is_above_right(tmp_path, monkeypatch):
    def curve(*excess, error):
        rights = (0.75, 0.25)
        return Calibration(
            [],
            [{"nominal": r, "actual": r + e, "standard_error": error} for r, e in zip(rights, excess, strict=True)],
            [],
        )

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    operators = {
        "blurred": (curve(0.03, 0.01, error=0.02), curve(-0.002, 0.001, error=0.004)),
        "pixelated": (curve(0.03, 0.01, error=0.02), curve(-0.002, 0.001, error=0.004)),
    }
    plot_reliability(operators, tmp_path / "reliability.png")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(operators)
    (first, *bars), (second, *_) = (container.lines for container in axes.containers)
    for line in (first, second):
        assert line.get_ydata() == pytest.approx([0.03, 0.01])
        assert line.get_xdata() == pytest.approx([0.75, 0.25], abs=0.01)
    assert min(abs(first.get_xdata() - second.get_xdata())) > 0.005  # equal values do not hide one another
    assert first.get_marker() != second.get_marker()
    (ends,) = bars[1]
    assert ends.get_segments()[0][:, 1] == pytest.approx([0.01, 0.05])
    band = axes.collections[0].get_paths()[0].vertices
    assert {(0.75, 0.006), (0.75, -0.01), (0.25, 0.009), (0.25, -0.007)} <= {(x, round(y, 6)) for x, y in band}
