"""Metrics of fields against closed forms, in one, two and three dimensions, far from the units of images."""

import math

import pytest
import torch

from ncsn_diffusers.evaluation.calibration import calibrate_values, coverage, crps, rank_histogram, spread_over_error
from ncsn_diffusers.evaluation.fields import (
    compare_fields,
    marginal_distances,
    nearest_fields,
    power_spectrum,
    spectrum_ratio,
    standardize,
    wasserstein_distance,
)

pytest.importorskip("torch_fidelity")

SHAPES = [(24,), (9, 12), (6, 5, 8)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Marginals ---


def test_wasserstein_distance_of_few_numbers():
    assert wasserstein_distance(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 5.0])) == 3.5
    assert wasserstein_distance(torch.tensor([0.0, 2.0]), torch.tensor([1.0])) == 1
    assert wasserstein_distance(torch.tensor([4.0, 1.0, 3.0]), torch.tensor([3.0, 4.0, 1.0])) == 0


@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.5), (0.3, 0.6)])
def test_wasserstein_distance_of_gaussians(shift, scale):
    # ∫ |F⁻¹(u) - G⁻¹(u)| du = E |shift + (scale - 1) z|, a folded normal's mean
    a = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    width = abs(scale - 1)
    folded = shift
    if width:
        folded = width * math.sqrt(2 / math.pi) * math.exp(-((shift / width) ** 2) / 2)
        folded += shift * math.erf(shift / width / math.sqrt(2))
    assert wasserstein_distance(a, shift + scale * a[::2]) == pytest.approx(folded, rel=1e-3)


def test_marginal_distances_are_in_units_of_the_data_for_each_channel():
    reference, fields = 280 + 5 * normal(400, 2, 8, 6), 280 + 5 * normal(300, 2, 8, 6, seed=1)
    fields[:, 1] += 2
    distances, errors = marginal_distances(reference.float(), fields.float())
    assert distances[0] < 0.2 and distances[1] == pytest.approx(2, abs=0.2)
    # the error of a shift is that of a mean
    assert errors[1] == pytest.approx(5 / math.sqrt(300 * 48), rel=0.4)
    volts, _ = marginal_distances(1e-6 * reference, 1e-6 * fields)
    assert volts[1] == pytest.approx(2e-6, rel=0.1)


# --- Spectrum ---


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wave_has_its_power_at_its_wavenumber(shape):
    cycles, longest = 2, max(range(len(shape)), key=lambda i: shape[i])
    phase = 2 * math.pi * cycles * torch.arange(shape[longest], dtype=torch.float64) / shape[longest]
    wave = 3 * phase.cos().reshape([-1 if i == longest else 1 for i in range(len(shape))]).expand(shape)
    wavenumbers, power = power_spectrum(280 + wave[None, None].repeat(2, 1, *[1] * len(shape)))
    assert power[0, 0].argmax() == cycles - 1
    assert wavenumbers[cycles - 1] == pytest.approx(cycles / shape[longest])
    others = power[0, 0].clone()
    others[cycles - 1] = 0
    assert others.max() < 1e-18


@pytest.mark.parametrize("shape", SHAPES)
def test_white_noise_has_its_variance_at_every_wavenumber(shape):
    _, power = power_spectrum(7 * normal(2000, 1, *shape))
    assert torch.allclose(power.mean((0, 1)), torch.tensor(49.0, dtype=torch.float64), rtol=0.1)


def test_the_spectrum_of_autoregressive_signals():
    # x_t = a x_{t-1} + e_t has the power 1/|1 - a exp(-2 pi i f)|²; drawn periodic, so that this is exact
    length, a = 64, 0.8
    f = torch.fft.fftfreq(length, dtype=torch.float64)
    exact = 1 / (1 - 2 * a * torch.cos(2 * math.pi * f) + a * a)
    signals = torch.fft.ifft(torch.fft.fft(normal(4000, 1, length)) * exact.sqrt()).real
    wavenumbers, power = power_spectrum(signals)
    assert torch.allclose(wavenumbers, torch.arange(1, 33).double() / 64)
    right = exact[: length // 2 + 1].clone()
    right[-1] = exact[length // 2]
    assert torch.allclose(power.mean((0, 1)), right[1:], rtol=0.08)
    # and its variance is theirs: 1/(1 - a²), less the constant's
    assert exact.mean().item() == pytest.approx(1 / (1 - a * a), rel=1e-5)


def test_the_ratio_of_spectra_and_its_error():
    reference, fields = normal(500, 2, 32), normal(400, 2, 32, seed=1)
    fields[:, 1] *= 2
    wavenumbers, ratio, error = spectrum_ratio(reference, fields)
    assert ratio.shape == error.shape == (2, len(wavenumbers)) == (2, 16)
    z = (ratio - torch.tensor([[1.0], [4.0]])) / error
    assert z.abs().max() < 4 and 0.5 < z.std() < 1.5
    # power of two numbers has a relative deviation of 1, of one number (at ½) √2
    assert error[0, 3] == pytest.approx(math.sqrt(1 / 500 + 1 / 400), rel=0.15)


# --- All at once ---


@pytest.mark.parametrize("shape", SHAPES)
def test_the_floor_is_at_zero_and_faults_are_above_it(shape):
    def smooth(num, seed):
        x = torch.fft.fftn(normal(num, 2, *shape, seed=seed), dim=tuple(range(2, 2 + len(shape))))
        frequencies = torch.meshgrid(*(torch.fft.fftfreq(n, dtype=torch.float64) for n in shape), indexing="ij")
        x = x / (0.1 + torch.stack(frequencies).square().sum(0).sqrt())
        return (280 + torch.fft.ifftn(x, dim=tuple(range(2, 2 + len(shape)))).real).float()

    reference, held_out = smooth(300, 0), smooth(200, 1)
    found = {}
    for name, fields in {
        "held out": held_out,
        "warmer": held_out + 1,
        "permuted": held_out.flatten(2)[..., torch.randperm(math.prod(shape))].reshape(held_out.shape),
    }.items():
        found[name] = {metric.key: metric for metric in compare_fields(reference, fields, unit="K").metrics}
    floor = found["held out"]
    assert abs(floor["kernel_distance"].value) < 4 * floor["kernel_distance"].standard_error
    warmer = found["warmer"]["wasserstein_0"]
    assert warmer.value == pytest.approx(1, abs=4 * warmer.standard_error)
    assert floor["wasserstein_0"].title == "Wasserstein-1 distance of the values of channel 0 (K)"
    # the same values in other places: only the spectrum and the kernel see it
    assert found["permuted"]["wasserstein_0"].value == pytest.approx(floor["wasserstein_0"].value, abs=1e-6)
    assert found["permuted"]["spectrum_error"].value > 5 * floor["spectrum_error"].value


def test_standardized_values_have_mean_0_and_variance_1_in_any_units():
    reference = torch.tensor([300.0, 1e-6])[:, None, None] + torch.tensor([10.0, 1e-8])[:, None, None] * normal(
        500, 2, 40, 30
    )
    values = standardize(reference, reference)
    assert values.shape == (500, 2 * 8 * 8) or values.shape[1] <= 128
    assert values.mean(0).abs().max() < 1e-9
    assert values.square().mean().item() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"`reference` has the same values everywhere in the channels \[1\]"):
        standardize(torch.stack([reference[:, 0], torch.ones(500, 40, 30)], 1), reference)


def test_nearest_fields_finds_copies():
    training = 280 + normal(200, 1, 30)
    samples = torch.cat([training[[7, 3]] + 1e-3, 280 + normal(5, 1, 30, seed=2)])
    distances, indices = nearest_fields(samples, training)
    assert indices[:2, 0].tolist() == [7, 3]
    assert distances[:2].max() < 2e-3 < 0.3 < distances[2:].min()


@pytest.mark.parametrize(
    ("reference", "fields", "message"),
    [
        (torch.zeros(5, 1, 8), torch.zeros(5, 1, 9), "all sets alike"),
        (torch.zeros(5, 8), torch.zeros(5, 8), "with one to three more axes"),
        (torch.zeros(1, 1, 8), torch.zeros(5, 1, 8), "n of at least 2"),
        (torch.zeros(5, 1, 8).long(), torch.zeros(5, 1, 8), "must be floating"),
        (torch.full((5, 1, 8), math.nan), torch.zeros(5, 1, 8), "`reference` has values that are not finite"),
    ],
)
def test_what_is_refused(reference, fields, message):
    with pytest.raises(ValueError, match=message):
        marginal_distances(reference, fields)


# --- Calibration in the data's units ---


def test_crps_of_gaussian_samples():
    # of N(m, s²) at y: s (z (2 Phi(z) - 1) + 2 phi(z) - 1/√pi), z = (y - m)/s
    m, s, y = 285.0, 2.0, torch.tensor([285.0, 288.0, 279.0], dtype=torch.float64)
    z = (y - m) / s
    phi = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    right = s * (z * (2 * torch.special.ndtr(z) - 1) + 2 * phi - 1 / math.sqrt(math.pi))
    samples = m + s * normal(3, 20_000, 1, 4)
    assert torch.allclose(crps(samples, y[:, None, None].expand(3, 1, 4)), right, rtol=0.02)


def test_crps_of_few_samples_is_not_biased():
    # E of the fair score does not depend on k: s/√pi for samples of the right distribution
    truths, samples = normal(4000, 1, 5), normal(4000, 3, 1, 5, seed=1)
    values = crps(samples, truths)
    assert values.mean().item() == pytest.approx(1 / math.sqrt(math.pi), abs=4 * values.std().item() / 4000**0.5)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (290.0, 0.3), (1e-6, 1e-9)])
def test_right_samples_are_called_right_in_any_units(offset, scale):
    truths, samples = normal(400, 2, 6, 5), normal(400, 7, 2, 6, 5, seed=1)
    truths, samples = offset + scale * truths, offset + scale * samples
    shares, errors = rank_histogram(samples, truths)
    assert shares.sum().item() == pytest.approx(1)
    assert ((shares - 1 / 8) / errors).abs().max() < 4
    share, error = coverage(samples, truths)
    assert abs(share - 6 / 8) < 4 * error
    assert share == pytest.approx(shares[1:-1].sum().item())
    ratio, error = spread_over_error(samples, truths)
    assert abs(ratio - 1) < 4 * error
    found = calibrate_values(samples, truths, unit="K")
    assert [metric.title for metric in found.metrics] == [
        "CRPS (K)",
        "coverage (right: 0.750)",
        "spread over error (right: 1)",
    ]
    assert found.metrics[0].value == pytest.approx(scale / math.sqrt(math.pi), rel=0.05)


def test_samples_too_wide_too_narrow_and_aside():
    truths, samples = normal(400, 1, 30), normal(400, 7, 1, 30, seed=1)
    assert spread_over_error(2 * samples, truths)[0] == pytest.approx(
        math.sqrt((1 + 1 / 7) * 4 / (1 + 4 / 7)), rel=0.02
    )
    wide, narrow, aside = (rank_histogram(x, truths)[0] for x in (2 * samples, samples / 2, samples + 1))
    assert wide[3:5].min() > 0.16 and wide[[0, 7]].max() < 0.07
    assert narrow[[0, 7]].min() > 0.2 and narrow[3:5].max() < 0.1
    assert aside[0] > 0.3 and aside[7] < 0.05
