"""
Products of densities against exact targets: shares of modes, distances and deviations in two dimensions, by quadrature;
Gaussians in many dimensions in closed form.
"""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from networks import GaussianMixture, quiet_pipeline

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline
from ncsn_diffusers.denoiser import Product


class Mixture:
    """A Gaussian mixture with diagonal covariances: weights (K,), means (K, d), deviations (K, d)."""

    def __init__(self, weights, means, deviations):
        self.weights, self.means = torch.tensor(weights).double(), torch.tensor(means).double()
        self.weights = self.weights / self.weights.sum()
        self.deviations = torch.as_tensor(deviations).double().expand(self.means.shape)

    def only(self, *components):
        indices = list(components)
        return Mixture(self.weights[indices].tolist(), self.means[indices].tolist(), self.deviations[indices])

    def logits(self, x, sigma=0.0):
        variances = self.deviations**2 + sigma**2
        squares = (x[:, None] - self.means) ** 2 / variances
        return self.weights.log() - 0.5 * (squares + variances.log() + math.log(2 * math.pi)).sum(-1)

    def denoised(self, x, sigma):
        gain = self.deviations**2 / (self.deviations**2 + sigma**2)
        means = self.means + gain * (x[:, None] - self.means)
        return (self.logits(x, sigma).softmax(1)[..., None] * means).sum(1)


class Target:
    """∏ p_i^w_i exp(r) in two dimensions, on a grid. `parts` are pairs of a mixture and a weight."""

    def __init__(self, parts, centers, reward=None, limit=5.0, resolution=601):
        self.parts, self.centers, self.reward = parts, torch.tensor(centers).double(), reward
        axis = torch.linspace(-limit, limit, resolution).double()
        self.grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        log_p = sum(weight * part.logits(self.grid).logsumexp(1) for part, weight in parts)
        if reward is not None:
            log_p = log_p + reward(self.grid)
        self.p = log_p.softmax(0)
        mean = (self.p[:, None] * self.grid).sum(0)
        self.deviation = ((self.p[:, None] * (self.grid - mean) ** 2).sum() / 2).sqrt()
        self.shares, self.deviations = self.modes(self.grid, self.p)

    def modes(self, x, weights):
        """The share of each mode, and the deviation within it."""
        nearest = torch.cdist(x, self.centers).argmin(1)
        shares, deviations = [], []
        for k in range(len(self.centers)):
            inside = weights * (nearest == k)
            mean = (inside[:, None] * x).sum(0) / inside.sum()
            shares.append(inside.sum())
            deviations.append(((inside[:, None] * (x - mean) ** 2).sum() / inside.sum() / 2).sqrt())
        return torch.stack(shares), torch.stack(deviations)

    def judge(self, x):
        """The largest error of a share, the worst ratio of deviations, the sliced Wasserstein distance."""
        x = x.double()
        shares, deviations = self.modes(x, torch.full((len(x),), 1 / len(x)).double())
        ratios = (deviations / self.deviations)[self.shares > 0.05]
        distance, quantiles = 0.0, (torch.arange(1000).double() + 0.5) / 1000
        for angle in range(8):
            direction = torch.tensor([math.cos(angle * math.pi / 8), math.sin(angle * math.pi / 8)]).double()
            values, order = (self.grid @ direction).sort()
            exact = values[torch.searchsorted(self.p[order].cumsum(0), quantiles).clamp(max=len(values) - 1)]
            found = (x @ direction).sort().values[(quantiles * len(x)).long()]
            distance += (exact - found).abs().mean() / 8 / self.deviation
        worst = ratios[ratios.log().abs().argmax()]
        return (shares - self.shares).abs().max().item(), worst.item(), distance.item()


class PartsUNet(ModelMixin, ConfigMixin):
    """The perfect network whose class k is part k of a target, and whose last class is "no label"."""

    @register_to_config
    def __init__(self, parts, in_channels=1, sample_size=(1, 2)):
        super().__init__()
        self.register_to_config(num_class_embeds=len(parts))
        self.parts, self.weight = parts, torch.nn.Parameter(torch.zeros(1))
        self.ladder, self.batches = AnnealedLangevinScheduler().ladder, []

    def forward(self, sample, timestep, class_labels, return_dict=True):
        sigma = float(self.ladder.sigma_at(timestep.double()))
        self.batches.append(len(sample))
        x = sample.flatten(1).double() * math.sqrt(1 + sigma**2)
        estimates = torch.zeros_like(x)
        for k, part in enumerate(self.parts):
            chosen = class_labels == k
            if chosen.any():
                estimates[chosen] = part.denoised(x[chosen], sigma)
        return (estimates.reshape(sample.shape).float(),)


def pipeline_of(parts, scheduler_class=AnnealedLangevinScheduler):
    scheduler = scheduler_class.from_config(AnnealedLangevinScheduler(prediction_type="sample").config)
    return quiet_pipeline(PartsUNet(parts), scheduler)


def draw(pipe, n, num_levels, **arguments):
    generator = torch.Generator().manual_seed(1)
    images = pipe(n, num_levels, generator=generator, output_type="latent", **arguments).images
    return images.flatten(1)


ONE = Mixture([0.4, 0.35, 0.25], [[-1, -0.4], [0, 0.7], [1.1, -0.2]], [[0.25, 0.5], [0.5, 0.25], [0.25, 0.6]])
TWO = Mixture([0.3, 0.4, 0.3], [[-0.8, 0.3], [0.2, -0.4], [0.9, 0.6]], [[0.5, 0.3], [0.3, 0.4], [0.4, 0.25]])
BASE = Mixture([0.5, 0.3, 0.2], [[-1, -0.5], [0.9, -0.6], [0.1, 1.0]], [[0.15, 0.15], [0.3, 0.3], [0.2, 0.2]])
SIX = Mixture(
    [0.2, 0.15, 0.25, 0.15, 0.15, 0.1],
    [[-1, 0], [-0.3, 0.7], [0.2, 0.1], [0.9, 0.7], [0.3, -0.8], [1.1, -0.4]],
    [[0.3, 0.3], [0.25, 0.35], [0.3, 0.25], [0.3, 0.3], [0.35, 0.2], [0.2, 0.3]],
)
FOUR = Mixture(
    [0.35, 0.15, 0.1, 0.4],
    [[-0.7, -0.7], [-0.6, 0.6], [0.7, -0.5], [0.6, 0.8]],
    [[0.4, 0.3], [0.35, 0.4], [0.4, 0.4], [0.3, 0.4]],
)
EQUAL = Mixture(SIX.weights.tolist(), SIX.means.tolist(), 0.3)
CLASSES = SIX.only(0, 2, 4)

# parts in the order of the network's classes, "no label" last, and the centers of the modes
TARGETS = {
    "product": Target([(ONE, 1), (TWO, 1)], [[-0.85, 0.1], [0.0, 0.6], [0.15, -0.2], [1.0, 0.4]]),
    "sharper": Target([(BASE, 2)], BASE.means.tolist()),
    "flatter": Target([(BASE, 0.5)], BASE.means.tolist()),
    "guidance": Target([(CLASSES, 3), (SIX, -2)], CLASSES.means.tolist()),
    "and": Target([(FOUR.only(2, 3), 1), (FOUR.only(1, 3), 1), (FOUR, -1)], [[0.6, 0.8], [-0.2, 0.4], [0.5, -0.2]]),
    "not": Target([(EQUAL, 2), (EQUAL.only(2, 0), -1)], EQUAL.means[[1, 3, 4, 5]].tolist()),
}


def weights_of(target):
    labels = [*range(len(target.parts) - 1), None]
    return {label: weight for label, (_, weight) in zip(labels, target.parts, strict=True)}


@pytest.mark.parametrize("name", TARGETS)
def test_resampled_products_are_exact(name):
    # 2,048 samples in groups of 64, 100 evaluations: the shares' standard error is about 0.015 with the groups' own
    target = TARGETS[name]
    pipe = pipeline_of([part for part, _ in target.parts])
    weights = weights_of(target)
    num_levels = 100 if abs(sum(weights.values()) - 1) < 1e-6 else 50
    x = draw(pipe, 2048, num_levels, class_labels=weights, resample=64)
    share, ratio, distance = target.judge(x)
    assert share < 0.05 and abs(ratio - 1) < 0.1 and distance < 0.08
    report = pipe.resampling_report
    assert report.num_samples == 2048 and 600 < report.num_ancestors < 2048 and report.num_levels > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_resampled_products_are_exact_in_8000_samples(name):
    target = TARGETS[name]
    pipe = pipeline_of([part for part, _ in target.parts])
    weights = weights_of(target)
    num_levels = 100 if abs(sum(weights.values()) - 1) < 1e-6 else 50
    share, ratio, distance = target.judge(draw(pipe, 8000, num_levels, class_labels=weights, resample=64))
    print(f"{name}: share {share:.3f}, deviation {ratio:.3f}, sliced W1 {distance:.3f}")
    assert share <= 0.025 and abs(ratio - 1) <= 0.05 and distance <= 0.04


def test_without_weights_the_shares_are_wrong_and_it_is_said(caplog):
    import diffusers

    diffusers.logging.enable_propagation()
    target = TARGETS["not"]
    pipe = pipeline_of([part for part, _ in target.parts])
    weights = {0: 2, None: -1}
    share, _, _ = target.judge(draw(pipe, 1000, 50, class_labels=weights))
    assert share > 0.3  # 0.46 in the documentation's table
    assert "negative weight" not in caplog.text  # of "no label", as guidance has it
    other = pipeline_of([EQUAL.only(2, 0), EQUAL])
    draw(other, 4, 3, class_labels={0: -1, None: 2})
    assert "A class with a negative weight, without `resample`" in caplog.text
    diffusers.logging.disable_propagation()


@pytest.mark.parametrize("name", ["sharper", "flatter", "product"])
def test_the_level_is_the_products_own(name):
    # Gaussian parts: the product's denoiser at its own level is exact, with W far from 1
    weight = {"sharper": 2.0, "flatter": 0.5, "product": 2.0}[name]
    part = Mixture([1.0], [[0.3, -0.2]], [[0.4, 0.6]])
    pipe = pipeline_of([part, part])
    weights = {0: weight / 2, None: weight / 2} if name == "product" else {None: weight}
    denoiser = pipe.make_denoiser(weights, batch_size=5)
    x = torch.randn(5, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    narrower = Mixture([1.0], part.means.tolist(), part.deviations / math.sqrt(weight))
    for tau in (0.1, 0.7, 3.0):
        expected = narrower.denoised(x.flatten(1).double(), tau).reshape(x.shape).float()
        torch.testing.assert_close(denoiser(x, tau), expected, rtol=1e-4, atol=1e-4)
    samples = draw(pipe, 4000, 100, class_labels=weights).double()
    error = 4 / math.sqrt(4000)
    assert ((samples.mean(0) - part.means[0]).abs() < error * narrower.deviations[0]).all()
    torch.testing.assert_close(samples.std(0), narrower.deviations[0], rtol=0.05, atol=0)


def test_guidance_is_a_product():
    target = TARGETS["guidance"]
    pipe = pipeline_of([part for part, _ in target.parts])
    by_scale = draw(pipe, 16, 10, class_labels=[0] * 16, guidance_scale=3.0)
    by_weights = draw(pipe, 16, 10, class_labels={0: 3.0, None: -2.0})
    torch.testing.assert_close(by_scale, by_weights, rtol=1e-4, atol=1e-4)
    share, _, _ = target.judge(draw(pipe, 2048, 100, class_labels=[0] * 2048, guidance_scale=3.0, resample=64))
    assert share < 0.05


def test_parts_of_one_network_take_one_evaluation():
    pipe = pipeline_of([ONE, TWO, BASE])
    draw(pipe, 4, 10, class_labels={0: 1, 1: 1, None: -1})
    assert pipe.unet.batches == [12] * 10


def test_guidance_below_a_level():
    pipe = pipeline_of([CLASSES, SIX])
    pipe(4, 20, class_labels=[0] * 4, guidance_scale=3.0, guidance_max_sigma=1.5, output_type="latent")
    levels = pipe.scheduler.sigmas[:-1].tolist()
    assert pipe.unet.batches == [8 if sigma <= 1.5 else 4 for sigma in levels]


@pytest.mark.parametrize("name", ["ring", "tilt"])
def test_rewards(name):
    reward = {
        "ring": lambda x: -6 * ((x**2).sum(-1) - 1) ** 2,
        "tilt": lambda x: 2.0 * x[..., 0],
    }[name]
    centers = {"ring": [[-0.8, -0.5], [0.8, -0.6], [0.1, 0.95]], "tilt": BASE.means.tolist()}[name]
    target = Target([(BASE, 1)], centers, reward)
    pipe = pipeline_of([BASE])  # whose only embedding is "no label"
    x = draw(
        pipe, 2048, 50, class_labels={None: 1}, resample=64, reward=lambda images: reward(2 * images.flatten(1) - 1)
    )
    share, _, distance = target.judge(x)
    assert share < 0.05 and distance < 0.1


def test_gaussians_in_64_dimensions():
    # guidance 3 towards a class that is narrower in 8 directions: the target is Gaussian
    generator = torch.Generator().manual_seed(0)
    d, k, weight = 64, 8, 3.0
    covariance = torch.diag(torch.linspace(0.3, 1.0, d).double() ** 2)
    a = torch.linalg.qr(torch.randn(d, k, generator=generator).double())[0]
    y = torch.randn(k, generator=generator).double()
    precision = torch.linalg.inv(covariance) + 3 * a @ a.T
    class_covariance = torch.linalg.inv(precision)
    class_mean = class_covariance @ (3 * a @ y)
    target_covariance = torch.linalg.inv(weight * precision + (1 - weight) * torch.linalg.inv(covariance))
    target_mean = target_covariance @ (weight * precision @ class_mean)

    class Full:
        def __init__(self, mean, covariance):
            self.mean = mean
            self.values, self.vectors = torch.linalg.eigh(covariance)

        def denoised(self, x, sigma):
            gain = self.values / (self.values + sigma**2)
            return self.mean + ((x - self.mean) @ self.vectors * gain) @ self.vectors.T

    unet = PartsUNet([Full(class_mean, class_covariance), Full(torch.zeros(d).double(), covariance)], 1, (8, 8))
    pipe = quiet_pipeline(unet, AnnealedLangevinScheduler(prediction_type="sample"))
    x = draw(pipe, 2048, 50, class_labels=[0] * 2048, guidance_scale=weight, resample=256).double()
    whiten = torch.linalg.inv(torch.linalg.cholesky(a.T @ target_covariance @ a))
    z = (x - target_mean) @ a @ whiten.T
    assert z.mean(0).square().mean().sqrt() < 0.08
    assert z.var(0).mean() == pytest.approx(1, abs=0.06)


def test_several_networks():
    first, second = pipeline_of([ONE]), pipeline_of([TWO])
    pipe = NCSNPipeline.product((first, {None: 1}, 1.0), (second, {None: 1}, 1.0))
    pipe.set_progress_bar_config(disable=True)
    together = pipeline_of([ONE, TWO])
    torch.testing.assert_close(
        draw(pipe, 8, 10), draw(together, 8, 10, class_labels={0: 1, None: 1}), rtol=1e-4, atol=1e-4
    )
    share, _, _ = TARGETS["product"].judge(draw(pipe, 2048, 50, resample=64))
    assert share < 0.05
    with pytest.raises(ValueError, match="does not save"):
        pipe.save_pretrained("anywhere")
    with pytest.raises(ValueError, match=r"samples of \(1, 8, 8\)"):
        unet = PartsUNet([GaussianMixture([1.0], [[0.0] * 64], [1.0])], 1, (8, 8))
        NCSNPipeline.product((first, 1.0), (NCSNPipeline(unet, AnnealedLangevinScheduler()), 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": {0: 1, None: -1}}, r"sum above 0, not \[1.0, -1.0\]"),
        ({"class_labels": {0: math.nan}}, "a weight of `class_labels`"),
        ({"class_labels": {3: 1}}, "must be a dictionary of ints from 0 to 1"),
        ({"class_labels": {}}, "must be a dictionary"),
        ({"class_labels": {0: 1}, "guidance_scale": 2.0}, "is itself a product of classes"),
        ({"reward": lambda x: x}, "acts by resampling alone"),
        ({"resample": True, "reward": lambda x: x}, r"must return a tensor of shape \(4,\), not \(4, 1, 1, 2\)"),
        ({"resample": 1}, "`resample` must be an int of at least 2"),
        (
            {"resample": True, "generator": [torch.Generator() for _ in range(4)]},
            "give one `generator` for all, not one for each",
        ),
        ({"resample": True, "image": torch.zeros(1, 1, 1, 2)}, "a chain from an `image` has another target"),
        (
            {"resample": True, "class_labels": 0, "guidance_scale": 2.0, "guidance_max_sigma": 1.0},
            "makes it another above that level",
        ),
        ({"guidance_max_sigma": -1.0, "class_labels": 0}, "`guidance_max_sigma` must be a finite number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    pipe = pipeline_of([ONE, TWO, BASE])
    with pytest.raises(ValueError, match=message):
        pipe(4, 3, **arguments)
    assert "reward" in arguments or not pipe.unet.batches


def test_other_schedulers_take_products_whose_weights_sum_to_1():
    pipe = pipeline_of([ONE, TWO, BASE], DDIMScheduler)
    draw(pipe, 4, 10, class_labels={0: 1, 1: 1, None: -1})
    with pytest.raises(ValueError, match="weights whose sum is 2 need AnnealedLangevinScheduler"):
        draw(pipe, 4, 10, class_labels={0: 1, 1: 1})
    with pytest.raises(ValueError, match="`resample` needs AnnealedLangevinScheduler, not DDIMScheduler"):
        draw(pipe, 4, 10, class_labels={0: 1, 1: 1, None: -1}, resample=True)


def test_a_product_is_a_denoiser_of_any_denoisers():
    def part(mean):
        return lambda x, sigma: mean + (x - mean) / (1 + sigma**2)

    x = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0))
    product = Product([(part(1.0), 1.0), (part(-1.0), 3.0)])
    # N(1, 1)¹ N(-1, 1)³ is N(-½, ¼)
    expected = -0.5 + (x + 0.5) * 0.25 / (0.25 + 0.3**2)
    torch.testing.assert_close(product(x, 0.3), expected)


class Summed:
    """What is often done: the scores summed at one level, x + Σ w_i (D_i - x)."""

    def __init__(self, parts):
        self.parts = parts

    def denoised(self, x, sigma):
        return x + sum(weight * (part.denoised(x, sigma) - x) for part, weight in self.parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_table_of_the_documentation(name):
    # 8,000 samples and 50 evaluations each, but 100 with weights where W is not 1
    target = TARGETS[name]
    weights = weights_of(target)
    rows = {}
    for scheduler in (DDIMScheduler, DDPMScheduler):
        pipe = pipeline_of([Summed(target.parts)], scheduler)
        rows[f"{scheduler.__name__}, summed scores"] = draw(pipe, 8000, 50, class_labels={None: 1})
    pipe = pipeline_of([part for part, _ in target.parts])
    rows["at the right level"] = draw(pipe, 8000, 50, class_labels=weights)
    rows["with weights"] = draw(pipe, 8000, 50, class_labels=weights, resample=64)
    shares = {row: target.judge(x)[0] for row, x in rows.items()}
    print(f"{name}: {', '.join(f'{row} {share:.3f}' for row, share in shares.items())}")
    assert shares["with weights"] < 0.04
    assert all(shares["with weights"] < share for share in shares.values() if share > 0.04)
