"""
How far generated images are from real ones: statistics of their features, and how each is reported.

Every statistic compares two sets of features, arrays of shape `(n, d)` for n images. Any callable from uint8 images
`(n, channels, height, width)` to features `(n, d)` is an extractor: `load_digit_classifier().features`, or
`InceptionFeatures()` for values that compare with the literature. [`extract_features`] runs one over a whole set. It
quantizes real and generated images to 8 bits first: a distance must not depend on which of them came from a file.

torch-fidelity (`pip install torch-fidelity`) computes the statistics. All depend on the features and on the number of
images, most of all the Fréchet distance, whose bias falls as one over that number. Report both with every value, and
its floor: the same statistic for held-out real images.
"""

import importlib
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from tqdm.auto import tqdm

NUM_BLOCKS = 10  # of the kernel distance


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """
    The squared Fréchet distance of two Gaussians with the features' means and covariances (Heusel et al. 2017,
    arXiv:1706.08500, equation 6), the FID when the features are Inception's:

        |mu_a - mu_b|² + tr(C_a + C_b - 2 (C_a C_b)^½)

    Args:
        features_a (`torch.Tensor` of shape `(n, d)`): features of one set, n > d.
        features_b (`torch.Tensor` of shape `(m, d)`): features of the other set, m > d.

    Returns:
        `float`: the distance, 0 for equal sets, in squared units of the features.

    Raises:
        ValueError: the features are not two such arrays, are not finite, or are no more than their dimensions, where
            the covariances are singular and the distance says more about the number of images than about them.
    """
    features_a, features_b = _check_features(features_a=features_a, features_b=features_b)
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"`{name}` has {len(features)} images for {features.shape[1]} features: a covariance needs more "
                "images than features."
            )
    fid = import_torch_fidelity("metric_fid")
    statistics = [fid.fid_features_to_statistics(features) for features in (features_a, features_b)]
    for values in statistics:
        values["sigma"] = np.atleast_2d(values["sigma"])  # of a single feature it is a number
    return fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]


def kernel_distance(
    features_a: torch.Tensor, features_b: torch.Tensor, num_blocks: int = NUM_BLOCKS
) -> tuple[float, float]:
    """
    The squared maximum mean discrepancy with the kernel (x·y/d + 1)³, unbiased (Bińkowski et al. 2018,
    arXiv:1801.01401), the KID when the features are Inception's. Unlike the Fréchet distance its mean does not depend
    on the number of images.

    Both sets are dealt at random, always in the same way, into `num_blocks` blocks with no image in common, so that the
    blocks' distances are independent and their scatter gives the standard error. (Subsets that overlap, the usual way,
    have a scatter but no standard error.)

    Args:
        features_a (`torch.Tensor` of shape `(n, d)`): features of one set.
        features_b (`torch.Tensor` of shape `(m, d)`): features of the other set.
        num_blocks (`int`, defaults to 10): number of blocks, at least 2 and at most half of n and of m.

    Returns:
        `tuple[float, float]`: the mean over the blocks, which scatters about 0 for equal distributions, and its
        standard error.

    Raises:
        ValueError: the features are not two such arrays, are not finite, or are too few for the blocks.
    """
    features_a, features_b = _check_features(features_a=features_a, features_b=features_b)
    block_size = min(len(features_a), len(features_b)) // max(num_blocks, 1)
    if num_blocks < 2 or block_size < 2:
        raise ValueError(
            f"`num_blocks`={num_blocks} blocks of {len(features_a)} and {len(features_b)} images: at least 2 blocks "
            "of at least 2 images are needed."
        )
    kid = import_torch_fidelity("metric_kid")
    # at random, because images often come in an order: sorted, or with the classes in turn
    generator, distances = torch.Generator().manual_seed(0), []
    features_a, features_b = (f[torch.randperm(len(f), generator=generator)] for f in (features_a, features_b))
    for i in tqdm(range(num_blocks), desc="Kernel distance", unit="block", leave=False):
        blocks = (features[i::num_blocks][:block_size] for features in (features_a, features_b))
        metric = kid.kid_features_to_metric(*blocks, kid_subsets=1, kid_subset_size=block_size, verbose=False)
        distances.append(metric[kid.KEY_METRIC_KID_MEAN])
    distances = torch.tensor(distances, dtype=torch.float64)
    return distances.mean().item(), (distances.std() / num_blocks**0.5).item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991): an image lies in a set's manifold if
    it is no farther from some image of the set than that image's own k-th neighbor.

    Args:
        real (`torch.Tensor` of shape `(n, d)`): features of real images, n > k.
        fake (`torch.Tensor` of shape `(m, d)`): features of generated images, m > k.
        k (`int`, defaults to 3): which neighbor.

    Returns:
        `tuple[float, float]`: precision, the share of generated images within the real ones' manifold, and recall,
        the share of real images within the generated ones'. Both depend on n and m: take them equal.

    Raises:
        ValueError: the features are not two such arrays, are not finite, or are too few for `k`.
    """
    real, fake = _check_features(real=real, fake=fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"`k`={k} must be at least 1 and below the number of images, {len(real)} and {len(fake)}.")
    prc = import_torch_fidelity("metric_prc")
    # in batches of rows: the whole table of distances of 50,000 images would take 20 GB
    metric = prc.prc_features_to_metric(
        fake, real, prc_neighborhood=k, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return metric[prc.KEY_METRIC_PRECISION], metric[prc.KEY_METRIC_RECALL]


def class_entropy(labels: torch.Tensor) -> float:
    """
    The entropy -Σ p log p of the shares p of the classes in a set: log 10 = 2.303 for ten equal shares, 0 for one
    class alone.

    Args:
        labels (`torch.Tensor` of shape `(n,)` or `(n, num_classes)`): integer classes, or floating logits, of which
            the largest names the class.

    Returns:
        `float`: the entropy in nats.

    Raises:
        ValueError: `labels` has another shape, is empty or is not finite.
    """
    is_logits = labels.ndim == 2 and labels.is_floating_point()
    if not labels.numel() or not (is_logits or (labels.ndim == 1 and not labels.is_floating_point())):
        raise ValueError(
            f"`labels` must be integers of shape (n,) or logits of shape (n, num_classes), not {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    if not labels.isfinite().all():
        raise ValueError("`labels` has logits that are not finite.")
    counts = (labels.argmax(1) if is_logits else labels).unique(return_counts=True)[1]
    return torch.special.entr(counts.double() / len(labels)).sum().item()


def class_shares(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    The share of each class in a set.

    Args:
        labels (`torch.Tensor` of shape `(n,)`): integer classes from 0.
        num_classes (`int`): their number.

    Returns:
        `torch.Tensor` of shape `(num_classes,)`: float64, with the sum 1.

    Raises:
        ValueError: there are no labels, or some are below 0 or not below `num_classes`.
    """
    if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"`labels` must be from 0 to {num_classes - 1}, of shape (n,), not {labels}.")
    return labels.bincount(minlength=num_classes).double() / len(labels)


def nearest_neighbors(
    features: torch.Tensor, among: torch.Tensor, k: int = 1, batch_size: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest neighbors of each image in a set, by the distance of their features. A network that has memorized its
    training images draws images that are nearer to them than unseen real ones are.

    Args:
        features (`torch.Tensor` of shape `(n, d)`): features of the images.
        among (`torch.Tensor` of shape `(m, d)`): features of the set, m >= k.
        k (`int`, defaults to 1): how many neighbors.
        batch_size (`int`, defaults to 1000): how many images are compared with the set at a time.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances and indices into the set, each of shape `(n, k)`, nearest first.

    Raises:
        ValueError: the features are not two such arrays, are not finite, or are too few for `k`.
    """
    features, among = _check_features(features=features, among=among)
    if not 1 <= k <= len(among):
        raise ValueError(f"`k`={k} must be at least 1 and at most the number of images in `among`, {len(among)}.")
    batches = tqdm(features.split(batch_size), desc="Neighbors", unit="batch", leave=False)
    found = [torch.cdist(batch, among).topk(k, largest=False) for batch in batches]
    return torch.cat([distances for distances, _ in found]), torch.cat([indices for _, indices in found])


def _check_features(**named: torch.Tensor) -> list[torch.Tensor]:
    """The two sets, float64 on the CPU."""
    for name, features in named.items():
        if features.ndim != 2 or not len(features):
            raise ValueError(f"`{name}` must be of shape (number of images, d), not {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError(f"`{name}` has features that are not finite.")
    (name_a, a), (name_b, b) = named.items()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`{name_a}` has {a.shape[1]} features and `{name_b}` {b.shape[1]}: they must be the same.")
    return [features.double().cpu() for features in named.values()]


def require_torch_fidelity() -> None:
    """
    Check that the statistics can be computed, before images are drawn for them.

    Raises:
        ImportError: torch-fidelity, or the torchvision it needs, is missing or cannot be imported.
    """
    for module in ("feature_extractor_inceptionv3", "metric_fid", "metric_kid", "metric_prc"):
        import_torch_fidelity(module)


def import_torch_fidelity(module: str) -> ModuleType:
    """
    The module `torch_fidelity.{module}`, imported on first use: it needs torchvision and seconds to import, and
    training needs neither.

    Raises:
        ImportError: see [`require_torch_fidelity`].
    """
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError as error:
        raise ImportError(
            "The statistics need torch-fidelity (`pip install torch-fidelity`), and a torchvision that matches torch "
            f"({error})."
        ) from error


# What is reported of a set


@dataclass(frozen=True)
class Metric:
    """
    A number of an evaluation, described once for all who read it: metrics.json, report.md and the model card.

    Args:
        key (`str`): its key in metrics.json.
        title (`str`): its row in report.md.
        value (`float`): the number itself.
        form (`str`): the format of the number in report.md.
        standard_error (`float`, *optional*): of the value; in metrics.json under `{key}_standard_error`.
        card_type, card_title (`str`, *optional*):
            Its type and its name in the metadata of a model card; not there when not given.
    """

    key: str
    title: str
    value: float
    form: str = "{:.4g}"
    standard_error: float | None = None
    card_type: str | None = None
    card_title: str | None = None

    def __str__(self) -> str:
        text = self.form.format(self.value)
        return text if self.standard_error is None else f"{text} ± {self.standard_error:.2g}"

    def to_dict(self) -> dict[str, float]:
        error = {} if self.standard_error is None else {f"{self.key}_standard_error": self.standard_error}
        return {self.key: self.value, **error}


def to_dict(metrics: list[Metric]) -> dict[str, float]:
    """Metrics of one set as metrics.json has them."""
    return {key: value for metric in metrics for key, value in metric.to_dict().items()}


def compare(
    reference: torch.Tensor, features: torch.Tensor, labels: torch.Tensor | None = None, is_inception: bool = False
) -> list[Metric]:
    """
    The metrics of a set of images, in the order of the report.

    Args:
        reference (`torch.Tensor` of shape `(m, d)`): features of the reference.
        features (`torch.Tensor` of shape `(n, d)`): features of the images.
        labels (`torch.Tensor` of shape `(n,)`, *optional*): the images' classes, for their entropy.
        is_inception (`bool`, defaults to `False`): whether the distances are the FID and the KID.
    """
    kernel, kernel_error = kernel_distance(reference, features)
    precision, recall = precision_recall(reference[: len(features)], features[: len(reference)])
    nearest = nearest_neighbors(features, reference)[0].median().item()
    frechet_in_card, kernel_in_card = (
        (("fid", "FID"), ("kid", "KID"))
        if is_inception
        else (("frechet-distance", "Fréchet distance"), ("kernel-distance", "Kernel distance"))
    )
    metrics = [
        Metric("number", "images", len(features), "{:,}"),
        Metric(
            "frechet_distance",
            "Fréchet distance",
            frechet_distance(reference, features),
            card_type=frechet_in_card[0],
            card_title=frechet_in_card[1],
        ),
        Metric(
            "kernel_distance",
            "kernel distance ± standard error",
            kernel,
            standard_error=kernel_error,
            card_type=kernel_in_card[0],
            card_title=kernel_in_card[1],
        ),
        Metric("precision", "precision", precision, "{:.3f}", card_type="improved-precision", card_title="Precision"),
        Metric("recall", "recall", recall, "{:.3f}", card_type="improved-recall", card_title="Recall"),
    ]
    if labels is not None:
        metrics.append(Metric("class_entropy", "entropy of the classes (nats)", class_entropy(labels), "{:.4f}"))
    title = "median distance to the nearest reference image"
    return [*metrics, Metric("median_distance_to_nearest_reference", title, nearest)]


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of `(n,)` and its standard error."""
    values = values.double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values))
