"""The statistics against closed forms, and the digit classifier against the embedded digits."""

import dataclasses
import math
import shlex
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from datasets import load_dataset
from forked import run_forked

from ncsn_diffusers.commands.cli import parse
from ncsn_diffusers.data import EMBEDDED_DIGITS, decode_images
from ncsn_diffusers.evaluation import (
    CLASSIFIERS,
    EvaluateConfig,
    InceptionFeatures,
    RandomFeatures,
    class_entropy,
    class_shares,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_digit_classifier,
    nearest_neighbors,
    precision_recall,
    require_torch_fidelity,
    to_uint8,
)
from ncsn_diffusers.evaluation.branches import log_class_ratio
from ncsn_diffusers.evaluation.config import evaluation_command
from ncsn_diffusers.evaluation.metrics import Metric, compare, mean_and_error
from ncsn_diffusers.evaluation.record import DataRecord, EvaluationRecord, SamplingRecord
from ncsn_diffusers.evaluation.report import explain_below_floor, make_verdict
from ncsn_diffusers.images import to_model_range

feature_extractor_inceptionv3 = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

ROOT = Path(__file__).parent.parent


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standardized(count, dim, seed=0):
    """Features whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x = normal(count, dim, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T).reshape(dim, dim))).T


# --- Fréchet distance ---


def test_frechet_distance_of_aligned_gaussians():
    # closed form where the covariances commute: |mu_a - mu_b|² + Σ (s_a - s_b)²
    a = standardized(50, 3) * torch.tensor([1.0, 2.0, 0.5])
    b = standardized(80, 3, seed=1) * torch.tensor([3.0, 2.0, 0.125]) + torch.tensor([0.0, 1.0, -2.0])
    assert frechet_distance(a, b) == pytest.approx(5 + 4 + 0.375**2, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(5 + 4 + 0.375**2, abs=1e-9)


def test_frechet_distance_of_rotated_gaussians():
    # in two dimensions tr (C_a C_b)^½ = √(tr C_a C_b + 2 √det C_a C_b), for covariances that do not commute
    matrix_a = torch.tensor([[1.0, 0.0], [0.7, 0.3]], dtype=torch.float64)
    matrix_b = torch.tensor([[0.5, 0.0], [-0.4, 2.0]], dtype=torch.float64)
    cov_a, cov_b = matrix_a @ matrix_a.T, matrix_b @ matrix_b.T
    product = cov_a @ cov_b
    trace = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (cov_a.trace() + cov_b.trace()).item() - 2 * trace
    distance = frechet_distance(standardized(40, 2) @ matrix_a.T, standardized(30, 2, seed=1) @ matrix_b.T)
    assert distance == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_one_feature():
    a, b = 2.0 * standardized(40, 1), 0.5 * standardized(30, 1, seed=1) + 3
    assert frechet_distance(a, b) == pytest.approx(9 + 1.5**2, abs=1e-9)


def test_frechet_distance_of_equal_sets_is_zero():
    features = normal(100, 8).float()
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


# --- Kernel distance ---


def test_kernel_distance_against_its_definition():
    a, b = normal(40, 5), normal(60, 5, seed=1) + 0.5
    generator, blocks = torch.Generator().manual_seed(0), []
    dealt_a, dealt_b = (f[torch.randperm(len(f), generator=generator)] for f in (a, b))
    for i in range(4):  # 10 images of each set a block, dealt in turn
        x, y = dealt_a[i::4][:10], dealt_b[i::4][:10]
        k_xx, k_yy, k_xy = ((u @ v.T / 5 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.diag().sum()) / 90 for k in (k_xx, k_yy))
        blocks.append(within - 2 * k_xy.mean())
    blocks = torch.stack(blocks)
    mean, error = kernel_distance(a, b, num_blocks=4)
    assert mean == pytest.approx(blocks.mean().item(), rel=1e-9)
    assert error == pytest.approx(blocks.std().item() / 2, rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_is_right():
    # 60 pairs of sets from one Gaussian: the distance over its standard error is Student's t with 9 degrees of freedom,
    # of variance 9/7
    ratios = []
    for seed in range(60):
        mean, error = kernel_distance(normal(200, 3, seed=2 * seed), normal(200, 3, seed=2 * seed + 1))
        ratios.append(mean / error)
    ratios = torch.tensor(ratios)
    assert abs(ratios.mean()) < 4 * math.sqrt(9 / 7 / 60)
    assert 0.7 < ratios.std() < 1.7


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_kernel_distance_of_classes_in_an_order(order):
    # ten classes far apart, as many as there are blocks: dealt in turn, each block would hold one
    classes = torch.arange(500) // 50 if order == "sorted" else torch.arange(500) % 10
    means = 3 * normal(10, 3)
    a, b = means[classes] + normal(500, 3, seed=1), means[classes.flip(0).roll(7)] + normal(500, 3, seed=2)
    mean, error = kernel_distance(a, b)
    assert abs(mean) < 4 * error


# --- Precision and recall ---


def test_precision_and_recall_of_points_on_a_line():
    # with k = 1 the real manifold is [-1, 2] and [9, 11], the generated one [-0.6, 1.4] and [4, 26]
    real = torch.tensor([[0.0], [1.0], [10.0], [10.9]])
    fake = torch.tensor([[0.1], [0.7], [15.0], [10.0 + 5.5]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == 0.5  # 0.1 and 0.7, not 15 and 15.5
    assert recall == 0.5  # 0 and 1, not 10 and 10.9


def test_precision_and_recall_against_their_definition():
    real, fake = normal(60, 2), normal(50, 2, seed=1) * 0.5 + 0.5
    radius_real = torch.stack([(x - real).norm(dim=1).sort()[0][3] for x in real])
    radius_fake = torch.stack([(x - fake).norm(dim=1).sort()[0][3] for x in fake])
    precision = sum(bool(((x - real).norm(dim=1) <= radius_real).any()) for x in fake) / 50
    recall = sum(bool(((x - fake).norm(dim=1) <= radius_fake).any()) for x in real) / 60
    assert precision_recall(real, fake) == pytest.approx((precision, recall))
    assert precision > recall + 0.2


# --- Class entropy ---


def test_class_entropy():
    assert class_entropy(torch.arange(10).repeat(7)) == pytest.approx(math.log(10))
    assert class_entropy(torch.full((5,), 3)) == 0
    assert class_entropy(torch.tensor([0, 0, 0, 4])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 4]), 6) * 0.1
    assert class_entropy(logits) == class_entropy(torch.tensor([0, 0, 0, 4]))


def test_class_shares():
    assert class_shares(torch.tensor([0, 2, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]


# --- Neighbors ---


def test_nearest_neighbors_against_their_definition():
    features, among = normal(25, 3), normal(40, 3, seed=1)
    among[7] = features[3]
    distances, indices = nearest_neighbors(features, among, k=2, batch_size=10)
    expected = (features[:, None] - among).norm(dim=2).sort(dim=1)
    assert torch.equal(indices, expected.indices[:, :2])
    torch.testing.assert_close(distances, expected.values[:, :2], rtol=0, atol=1e-6)
    assert indices[3, 0] == 7


# --- Wrong inputs ---


@pytest.mark.parametrize(
    ("function", "a", "b", "message"),
    [
        (frechet_distance, torch.zeros(8, 8), torch.zeros(20, 8), "`features_a` has 8 images for 8 features"),
        (frechet_distance, torch.zeros(20, 8), torch.zeros(7, 8), "`features_b` has 7 images for 8 features"),
        (frechet_distance, torch.zeros(20, 8), torch.zeros(20, 9), "`features_a` has 8 features and `features_b` 9"),
        (kernel_distance, torch.zeros(20, 8), torch.zeros(20, 9), "`features_a` has 8 features and `features_b` 9"),
        (precision_recall, torch.zeros(20, 8), torch.zeros(20, 9), "`real` has 8 features and `fake` 9"),
        (frechet_distance, torch.zeros(20), torch.zeros(20, 8), r"`features_a` must be of shape .*, not \(20,\)"),
        (precision_recall, torch.zeros(20, 8), torch.zeros(0, 8), r"`fake` must be of shape .*, not \(0, 8\)"),
        (frechet_distance, torch.zeros(20, 8), torch.full((20, 8), math.nan), "`features_b` .* not finite"),
        (nearest_neighbors, torch.zeros(20, 8), torch.zeros(20, 9), "`features` has 8 features and `among` 9"),
        (nearest_neighbors, torch.zeros(20, 8), torch.zeros(0, 8), r"`among` must be of shape .*, not \(0, 8\)"),
        (kernel_distance, torch.zeros(19, 8), torch.zeros(30, 8), "`num_blocks`=10 blocks of 19 and 30 images"),
        (precision_recall, torch.zeros(3, 8), torch.zeros(30, 8), "`k`=3 must be at least 1 and below .* 3 and 30"),
    ],
)
def test_wrong_features(function, a, b, message):
    with pytest.raises(ValueError, match=message):
        function(a, b)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4), r"integers of shape \(n,\) or logits .* not torch.float32 of shape \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.long), "not torch.int64"),
        (torch.zeros(0, dtype=torch.long), r"shape \(0,\)"),
        (torch.full((4, 2), math.nan), "not finite"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        class_entropy(labels)


def test_wrong_class_shares():
    for labels in (torch.tensor([0, 3]), torch.tensor([-1]), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"`labels` must be from 0 to 2, of shape \(n,\)"):
            class_shares(labels, 3)
    with pytest.raises(ValueError, match="`k`=5 must be at least 1 and at most the number of images in `among`, 4"):
        nearest_neighbors(torch.zeros(20, 8), torch.zeros(4, 8), k=5)


def test_wrong_images():
    with pytest.raises(ValueError, match=r"`images` must be of shape .*, not \(0, 1, 8, 8\)"):
        extract_features(torch.zeros(0, 1, 8, 8), torch.nn.Flatten())
    with pytest.raises(ValueError, match=r"`extractor` returned shape \(2, 1, 8, 8\) for 2 images"):
        extract_features(torch.zeros(2, 1, 8, 8), lambda images: images)
    with pytest.raises(ValueError, match=r"shape \(n, 1, 28, 28\), not \(2, 3, 32, 32\)"):
        extract_features(torch.zeros(2, 3, 32, 32), load_digit_classifier().features)


@pytest.mark.parametrize("function", [require_torch_fidelity, lambda: frechet_distance(normal(20, 2), normal(20, 2))])
def test_statistics_without_their_library(monkeypatch, function):
    function()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"`pip install torch-fidelity`\), and a torchvision .*torch_fidelity"):
        function()


# --- Features ---


def test_features_are_those_of_the_quantized_images_in_order():
    images = torch.rand(7, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    features = extract_features(images, lambda batch: batch.flatten(1), batch_size=3)
    assert features.dtype == torch.float64
    assert torch.equal(features, to_uint8(images).flatten(1).double())


@pytest.fixture(scope="module")
def digits():
    dataset = load_dataset("parquet", data_files=str(EMBEDDED_DIGITS), split="train").select(range(4000))
    return decode_images(dataset), torch.tensor(dataset["label"][:])


@pytest.fixture(scope="module")
def classifier():
    return load_digit_classifier()


def test_classifier_knows_the_digits(classifier, digits):
    images, labels = digits
    assert all(path.stat().st_size < 1_000_000 for path in CLASSIFIERS.values())
    logits = extract_features(images, classifier)
    assert (logits.argmax(1) == labels).double().mean() > 0.995
    assert class_entropy(logits) == pytest.approx(class_entropy(labels), abs=0.002)
    assert torch.allclose(classifier(to_model_range(images[:8])), classifier(images[:8]))


def test_distances_of_digits(classifier, digits):
    images, labels = digits
    features = extract_features(images, classifier.features)
    assert features.var(0).mean() == pytest.approx(1, abs=0.2)  # they are in units of their own deviation

    halves = features[:2000], features[2000:]
    floor = frechet_distance(*halves)
    mean, error = kernel_distance(*halves)
    precision, recall = precision_recall(*halves)
    assert floor < 1
    assert abs(mean) < 4 * error
    assert min(precision, recall) > 0.8

    noisy = images[2000:] / 255 + 0.05 * normal(2000, 1, 28, 28)
    noisy = extract_features(noisy.clamp(0, 1), classifier.features)
    assert frechet_distance(halves[0], noisy) > 3 * floor
    mean, error = kernel_distance(halves[0], noisy)
    assert mean > 4 * error

    without_ones = features[2000:][labels[2000:] != 1]
    assert frechet_distance(halves[0], without_ones) > 3 * floor
    assert precision_recall(halves[0], without_ones)[1] < recall - 0.05


def test_inception_without_its_weights(monkeypatch, tmp_path):
    def refuse(*arguments, **named):
        raise URLError("no network")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=rf"no network.* Put the file https://.*\.pth into {tmp_path}/checkpoints"):
        InceptionFeatures()


def test_inception_is_given_three_channels(monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            return (images.float().mean((2, 3)),)

    monkeypatch.setattr(feature_extractor_inceptionv3, "FeatureExtractorInceptionV3", lambda *arguments: Network())
    extractor, gray = InceptionFeatures(), torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    assert extract_features(gray, extractor).tolist() == [[1.5] * 3, [5.5] * 3]
    assert extract_features(gray.expand(2, 3, 2, 2), extractor).tolist() == [[1.5] * 3, [5.5] * 3]
    with pytest.raises(ValueError, match="`images` must have 1 or 3 channels, not 4"):
        extractor(gray.expand(2, 4, 2, 2))


# --- The script ---


def test_train_digit_classifier(tmp_path):
    dataset = load_dataset("parquet", data_files=str(EMBEDDED_DIGITS), split="train")
    (tmp_path / "digits").mkdir()
    dataset.select(range(2000)).to_parquet(tmp_path / "digits" / "train.parquet")
    dataset.select(range(2000, 2500)).to_parquet(tmp_path / "digits" / "test.parquet")
    # training must not need the statistics' library
    (tmp_path / "torch_fidelity.py").write_text("raise ImportError")
    arguments = ["--dataset_name", "digits", "--num_epochs", "2", "--batch_size", "50"]
    arguments += ["--output_path", "weights.safetensors"]
    script = ROOT / "scripts/train_digit_classifier.py"
    result = run_forked(script, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "80/80" in result.stderr

    images, labels = decode_images(dataset.select(range(2000, 2500))), torch.tensor(dataset["label"][2000:2500])
    accuracy = (load_digit_classifier(tmp_path / "weights.safetensors")(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.7  # chance is 0.1
    assert f"test accuracy {accuracy:.2%}" in result.stdout


# --- What is reported ---


def test_compared_metrics_are_the_statistics():
    reference, features = normal(60, 3), normal(40, 3, seed=1) + 0.5
    metrics = {metric.key: metric for metric in compare(reference, features, torch.tensor([0, 1] * 20))}
    kernel, kernel_error = kernel_distance(reference, features)
    precision, recall = precision_recall(reference[:40], features)  # as many of both
    assert {key: metric.value for key, metric in metrics.items()} == {
        "number": 40,
        "frechet_distance": frechet_distance(reference, features),
        "kernel_distance": kernel,
        "precision": precision,
        "recall": recall,
        "class_entropy": pytest.approx(math.log(2)),
        "median_distance_to_nearest_reference": nearest_neighbors(features, reference)[0].median().item(),
    }
    assert metrics["kernel_distance"].standard_error == kernel_error
    assert [metric.card_type for metric in compare(reference, features) if metric.card_type] == [
        "frechet-distance",
        "kernel-distance",
        "improved-precision",
        "improved-recall",
    ]
    inception = compare(reference, features, is_inception=True)
    assert [(m.card_type, m.card_title) for m in inception if m.card_type][:2] == [("fid", "FID"), ("kid", "KID")]


def test_a_metric_in_a_file_and_for_people():
    metric = Metric("kernel_distance", "kernel distance", 0.123456, "{:.4g}", standard_error=0.0456)
    assert metric.to_dict() == {"kernel_distance": 0.123456, "kernel_distance_standard_error": 0.0456}
    assert str(metric) == "0.1235 ± 0.046"
    metric = Metric("number", "images", 1234, "{:,}")
    assert metric.to_dict() == {"number": 1234}
    assert str(metric) == "1,234"


def test_mean_and_its_standard_error():
    assert mean_and_error(torch.tensor([1.0, 3.0, 5.0, 7.0])) == pytest.approx((4, math.sqrt(20 / 3) / 2))


# --- Random features ---


@pytest.mark.parametrize(("channels", "size"), [(1, 5), (3, 16), (4, 9), (3, 64)])
def test_random_features_of_any_images_are_always_the_same(channels, size):
    images = torch.randint(0, 256, (4, channels, size, size + 3), dtype=torch.uint8)
    before = torch.random.get_rng_state()
    features = RandomFeatures(channels, size)(images)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert features.shape == (4, 128)
    assert torch.equal(features, RandomFeatures(channels, size)(images))
    assert torch.allclose(features[:1], RandomFeatures(channels, size)(images[:1]))
    with pytest.raises(ValueError, match=f"`images` must have {channels} channels, not 2"):
        RandomFeatures(channels, size)(images[:, [0, 0]])


def test_random_features_tell_damaged_images_from_real_ones():
    # squares of two colors and places: what goes with what is all that is wrong with the torn ones
    def make(num, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 40, (num, 3, 16, 16), generator=generator, dtype=torch.uint8)
        colors = torch.randint(0, 200, (num, 3, 1, 1), generator=generator, dtype=torch.uint8)
        images[:, :, 3:13, 3:13] += colors
        return images

    reference, held_out = make(600, 0), make(300, 1)
    torn = torch.cat([held_out[..., :8], held_out.roll(1, 0)[..., 8:]], -1)
    blurred = torch.nn.functional.avg_pool2d(held_out.float(), 3, 1, 1).to(torch.uint8)
    features = RandomFeatures(3, 16)
    center, scale = features(reference).mean(0), features(reference).var(0).mean().sqrt()
    real, *sets = (
        ((features(images) - center) / scale).double()
        for images in (reference, held_out, torn, blurred, 255 - held_out)
    )
    floor, *distances = (frechet_distance(real, found) for found in sets)
    assert min(distances) > 3 * floor


# --- The two branches of a class-conditional network ---


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_log_class_ratio_of_two_gaussians(share):
    # classes N(-1, s²) and N(1, s²) in each of 2 dimensions, of which the first has the share
    s, means = 0.7, torch.tensor([-1.0, 1.0])
    weights = torch.tensor([share, 1 - share])

    def denoise(x, sigma, labels):
        given = [mean + s**2 / (s**2 + sigma**2) * (x - mean) for mean in means]
        if labels is not None:
            return torch.where(labels[:, None] == 0, given[0], given[1])
        log = (
            torch.stack([-(x - mean).square().sum(1) / (2 * (s**2 + sigma**2)) for mean in means])
            + weights.log()[:, None]
        )
        posterior = log.softmax(0)
        return posterior[0][:, None] * given[0] + posterior[1][:, None] * given[1]

    x = torch.tensor([[0.5, 0.1], [-1.0, -2.0], [0.0, 0.0], [2.0, 1.0]]).repeat(500, 1)
    labels = torch.tensor([1, 0, 0, 1]).repeat(500)
    sigmas = torch.logspace(-2, 2, 60, dtype=torch.float64).tolist()
    noise = torch.randn(60, *x.shape, generator=torch.Generator().manual_seed(0))
    ratios = log_class_ratio(denoise, x, labels, sigmas, noise).reshape(500, 4)
    log = torch.stack([-(x[:4] - mean).square().sum(1) / (2 * s**2) for mean in means], 1)
    right = log[torch.arange(4), labels[:4]] - (log.exp() * weights).sum(1).log()
    assert torch.allclose(ratios.mean(0), right.double(), atol=0.05)
    with pytest.raises(ValueError, match="`sigmas` must be at least two rising numbers above 0"):
        log_class_ratio(denoise, x, labels, sigmas[::-1], noise)
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        log_class_ratio(denoise, x, labels, sigmas, noise[0])


# --- The report's first sentence ---


def make_record(samples, floor, num=1000, num_held_out=1000):
    def metrics(frechet, kernel, error, precision, nearest):
        return [
            Metric("frechet_distance", "", frechet),
            Metric("kernel_distance", "", kernel, standard_error=error),
            Metric("precision", "", precision),
            Metric("recall", "", 0.9),
            Metric("median_distance_to_nearest_reference", "", nearest),
        ]

    sampling = SamplingRecord("S", {}, 50, None, None, None, 1.0, 0, "float32", 100, num, 50)
    data = DataRecord("d", "d", "train", 5000, "test", num_held_out)
    return EvaluationRecord("p", "today", "command", "f", {}, sampling, data, metrics(*samples), metrics(*floor))


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        (
            (1.2, 0.5, 0.1, 0.9, 4.0),
            "1,000 samples differ from real images (Fréchet distance 1.2, floor 0.6, 2 times)",
        ),
        (
            (0.8, 0.01, 0.1, 0.9, 4.0),
            "No difference between 1,000 samples and held-out real images was found in these ",
        ),
        (
            (0.9, 0.01, 0.1, 0.6, 4.0),
            "1,000 samples differ from real images (Fréchet distance 0.9, floor 0.6, 1.5 times)",
        ),
        (
            (0.3, -0.5, 0.1, 0.9, 4.0),
            "1,000 samples are nearer to the reference than held-out real images are (Fréchet ",
        ),
        (
            (1.8, 0.01, 0.1, 0.9, 4.0),
            "1,000 samples differ from real images (Fréchet distance 1.8, floor 0.6, 3 times)",
        ),
    ],
)
def test_the_verdict(samples, verdict):
    record = make_record(samples, (0.6, 0.0, 0.02, 0.9, 4.0))
    assert make_verdict(record).startswith(f"**{verdict}")


def test_distances_below_their_floor_are_explained():
    floor = (0.6, 0.0, 0.02, 0.9, 4.0)
    assert explain_below_floor(make_record((0.7, 0.1, 0.1, 0.9, 3.9), floor)) == []
    text = " ".join(explain_below_floor(make_record((0.5, 0.1, 0.1, 0.9, 2.0), floor, num_held_out=500)))
    assert "The Fréchet distance of the samples lies below the floor." in text
    assert "few images (500 held-out images beside 1,000 samples)" in text
    assert "The samples are 50% nearer to their nearest reference images than held-out images are" in text
    text = " ".join(explain_below_floor(make_record((0.5, -0.1, 0.1, 0.9, 4.0), floor)))
    assert "The Fréchet distance and the kernel distance of the samples lie below" in text and "few images" not in text


def test_the_command_repeats_the_evaluation_without_the_users_folders(tmp_path):
    config = EvaluateConfig(
        str(tmp_path), num_images=100, sigmas=(3.0, 0.5), posterior=("blurred",), train_data_dir="/data/my images"
    )
    words = shlex.split(evaluation_command(config))
    assert words[:3] == ["ncsn-diffusers", "evaluate", tmp_path.name]
    assert parse(EvaluateConfig, words[2:], "name", "example") == vars(
        dataclasses.replace(config, pipeline=tmp_path.name, train_data_dir="my images")
    )
