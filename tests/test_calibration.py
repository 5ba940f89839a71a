"""Calibration of posterior samples: against exact posteriors, and against samplers that are wrong in a known way."""

import math

import pytest
import torch

from ncsn_diffusers.evaluation.calibration import (
    coverage,
    misfit,
    nominal_coverage,
    psnr,
    ratio_and_error,
    variance_ratio,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(n, k, spread=1.0, bias=0.0):
    """Truths and samples from N(m, 0.2² I), a mean m for each of n images; the samples with another spread and mean."""
    means = normal(n, 1, 2, 5, 5)
    truths = means[:, 0] + 0.2 * normal(n, 2, 5, 5, seed=1)
    return means + bias + 0.2 * spread * normal(n, k, 2, 5, 5, seed=2), truths


# --- Coverage ---


@pytest.mark.parametrize("k", [2, 3, 8])
def test_coverage_of_the_right_distribution_is_nominal(k):
    samples, truths = draw(400, k)
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
        assert coverage(*draw(400, 8, spread), tolerance=1e-6)[0] == pytest.approx(expected, abs=0.01)
        assert (expected < exact - 0.1) if spread < 1 else (expected > exact + 0.1)
    assert coverage(*draw(400, 8, bias=0.4))[0] < exact - 0.2


def test_pixels_that_do_not_vary_do_not_count_and_those_that_vary_are_judged_as_before():
    samples, truths = draw(200, 8)
    before = coverage(samples, truths)
    # black background, with noise below the tolerance
    edge = torch.zeros(200, 8, 2, 5, 3, dtype=torch.float64)
    samples = torch.cat([samples, edge + 0.002 * normal(*edge.shape, seed=3).abs()], -1)
    truths = torch.cat([truths, edge[:, 0]], -1)
    assert coverage(samples, truths) == pytest.approx(before)
    # what a sampler is sure of and wrong about counts against it
    wrong = truths.clone()
    wrong[..., 5:] = 0.5
    actual = coverage(samples, wrong)[0]
    assert actual == pytest.approx(before[0] * 25 / 40)
    assert math.isnan(coverage(torch.zeros(3, 8, 1, 2, 2), torch.zeros(3, 1, 2, 2))[0])


def test_coverage_is_nominal_where_values_come_in_steps():
    # the posterior of a pixel is black or white or one of 3 grays: most values are tied
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(300, 5, generator=generator).square()
    grays = torch.tensor([0, 0.3, 0.5, 0.7, 1])
    values = grays[torch.multinomial(shares, 9 * 50, replacement=True, generator=generator)].reshape(300, 9, 2, 5, 5)
    # samples reach the steps up to noise below the tolerance, and are clamped; truths lie on them
    samples = (values[:, 1:] + 0.002 * normal(300, 8, 2, 5, 5)).clamp(0, 1)
    for trim in range(4):
        actual, error = coverage(samples, values[:, 0].double(), trim)
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
    ratio, error = variance_ratio(*draw(400, k))
    assert error < 0.03
    assert abs(ratio - 1) < 3.5 * error


def test_variance_ratio_sees_samples_that_are_too_sure():
    # variances s², errors 1 + s²/k
    for spread in (0.5, 2.0):
        expected = (1 + 1 / 8) * spread**2 / (1 + spread**2 / 8)
        assert variance_ratio(*draw(400, 8, spread))[0] == pytest.approx(expected, rel=0.05)


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


def test_the_error_of_a_ratio():
    b = 1 + normal(100_000).abs()
    a = 0.7 * b + 0.1 * normal(100_000, seed=1)
    ratios = [ratio_and_error(*parts) for parts in zip(a.split(50), b.split(50), strict=True)]
    values, errors = torch.tensor(ratios).T
    assert values.mean().item() == pytest.approx(0.7, abs=1e-3)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.05)
    assert math.isnan(ratio_and_error(a[:1], b[:1])[1])


@pytest.mark.parametrize("function", [coverage, variance_ratio])
def test_bad_samples_are_refused(function):
    good = torch.zeros(3, 4, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    for samples, truths in (
        (good[0][:, :1], good[1]),
        (good[0][0], good[1]),
        (good[0], good[1][:2]),
        (good[0][:0], good[1][:0]),
    ):
        with pytest.raises(ValueError, match=r"`samples` must have the shape \(n, k, channels, height, width\)"):
            function(samples, truths)
    with pytest.raises(ValueError, match="`samples` has values that are not finite"):
        function(good[0] * math.nan, good[1])
    with pytest.raises(ValueError, match="`truths` has values that are not finite"):
        function(good[0], good[1] + math.inf)


@pytest.mark.parametrize("tolerance", [0, -1, math.nan, math.inf])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(ValueError, match="`tolerance` must be above 0"):
        coverage(torch.zeros(3, 4, 1, 2, 2), torch.zeros(3, 1, 2, 2), tolerance=tolerance)
