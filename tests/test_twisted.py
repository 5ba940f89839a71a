"""Posteriors of mixtures whose modes are far apart: the modes' shares are known in closed form."""

import math

import pytest
import torch
from networks import quiet_pipeline
from test_compositions import PartsUNet

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPosteriorPipeline


class IsotropicMixture:
    def __init__(self, weights, means, deviation):
        self.weights, self.means, self.deviation = torch.tensor(weights).double(), means, deviation

    def denoised(self, x, sigma):
        variance, difference = self.deviation**2 + sigma**2, x[:, None] - self.means
        shares = (self.weights.log() - 0.5 * difference.square().sum(-1) / variance).softmax(1)
        return x - sigma**2 * (shares[..., None] * difference).sum(1) / variance

    def posterior_shares(self, matrix, y, noise_std):
        covariance = noise_std**2 * torch.eye(len(matrix)).double() + self.deviation**2 * matrix @ matrix.T
        misfit = y - self.means @ matrix.T
        return (self.weights.log() - 0.5 * (misfit @ torch.linalg.inv(covariance) * misfit).sum(1)).softmax(0)


def make_problem(d, k, deviation, noise_std, size, shape):
    generator = torch.Generator().manual_seed(d + k)
    means = torch.randn(3, d, generator=generator, dtype=torch.float64) * (0.6 if d == 8 else 0.5)
    mixture = IsotropicMixture([0.6, 0.3, 0.1], means, deviation)
    matrix = size * torch.randn(k, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    y = (0.34 * means[1] + 0.33 * means[0] + 0.33 * means[2]) @ matrix.T
    unet = PartsUNet([mixture], 1, shape)
    pipe = quiet_pipeline(unet, AnnealedLangevinScheduler(prediction_type="sample"), NCSNPosteriorPipeline)
    return pipe, mixture, matrix, y, noise_std


def share_error(problem, num_levels, **arguments):
    pipe, mixture, matrix, y, noise_std = problem
    arguments = {"units": "data", "class_labels": {None: 1}, "output_type": "latent", **arguments}
    generator = torch.Generator().manual_seed(0)
    x = pipe(y[None].float(), matrix.float(), noise_std, 4096, num_levels, generator=generator, **arguments).images
    nearest = torch.cdist(x.flatten(1).double(), mixture.means).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(x)
    return (shares - mixture.posterior_shares(matrix, y, noise_std)).abs().max().item()


@pytest.mark.parametrize(
    ("problem", "group", "without", "tolerance"),
    [
        ((8, 2, 0.15, 0.3, 1.0, (2, 4)), 64, 0.04, 0.03),
        ((64, 4, 0.2, 0.5, 2.0, (8, 8)), 64, 0.2, 0.03),
        ((64, 16, 0.2, 1.0, 2.0, (8, 8)), 512, 0.1, 0.06),  # 700 ancestors: a standard error of 0.02
        # the rest of the table in docs/inverse_problems.md
        pytest.param((8, 2, 0.15, 0.3, 1.0, (2, 4)), 512, 0.04, 0.03, marks=pytest.mark.slow),
        pytest.param((64, 4, 0.2, 0.5, 2.0, (8, 8)), 512, 0.2, 0.03, marks=pytest.mark.slow),
        pytest.param((64, 16, 0.2, 1.0, 2.0, (8, 8)), 64, 0.1, 0.1, marks=pytest.mark.slow),
    ],
)
def test_shares_of_far_modes(problem, group, without, tolerance):
    d, k = problem[:2]
    problem = make_problem(*problem)
    plain, resampled = share_error(problem, 50), share_error(problem, 50, resample=group)
    num_ancestors = problem[0].resampling_report.num_ancestors
    print(f"{d} dimensions, {k} numbers, groups of {group}: {plain:.3f} -> {resampled:.3f}, {num_ancestors} ancestors")
    assert plain > without
    assert resampled <= tolerance
    assert num_ancestors > 400


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise_std": 0.0}, "weights by the measurement's noise"),
        ({"measurement": torch.randn(4, 2)}, "samples of one measurement"),
        ({"num_langevin_steps": 2}, "one Langevin step at each level"),
        ({"generator": [torch.Generator() for _ in range(4)]}, "give one `generator` for all"),
    ],
)
def test_what_makes_no_sense_is_refused(changed, message):
    pipe, _, matrix, y, noise_std = make_problem(8, 2, 0.15, 0.3, 1.0, (2, 4))
    arguments = {"measurement": y[None].float(), "operator": matrix.float(), "noise_std": noise_std, "batch_size": 4}
    arguments |= {"num_inference_steps": 3, "units": "data", "resample": True, "class_labels": {None: 1}, **changed}
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
