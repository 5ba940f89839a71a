"""
How far generated pictures are from real ones: statistics of features, and the features of digits.

Everything here compares two sets of features, arrays of shape (number of pictures, d). Where they come from is open: an
extractor is any callable from uint8 pictures `(n, channels, height, width)` to features `(n, d)`, be it
`load_digit_classifier().features`, or `InceptionFeatures()` for figures that compare with the literature.
[`extract_features`] runs one over a whole set, and quantises to 8 bits first, real and generated pictures alike:
a distance must not see which of the two was once stored in a file.

The statistics are computed by torch-fidelity (`pip install torch-fidelity`). All of them depend on the
features and on the number of pictures, most of all the Fréchet distance, whose bias falls like one over that number:
report both beside every figure, with the same figure for held-out real pictures, its floor.
"""

import importlib

import torch
from tqdm.auto import tqdm


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
            the covariances are singular and the distance says more about the number of pictures than about them.
    """
    features_a, features_b = _check_features(features_a=features_a, features_b=features_b)
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"`{name}` has {len(features)} pictures for {features.shape[1]} features: a covariance needs more "
                "pictures than features."
            )
    fid = _torch_fidelity("metric_fid")
    statistics = [fid.fid_features_to_statistics(features) for features in (features_a, features_b)]
    return fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]


def kernel_distance(features_a: torch.Tensor, features_b: torch.Tensor, num_blocks: int = 10) -> tuple[float, float]:
    """
    The squared maximum mean discrepancy with the kernel (x·y/d + 1)³, unbiased (Bińkowski et al. 2018,
    arXiv:1801.01401), the KID when the features are Inception's. Unlike the Fréchet distance its mean does not depend
    on the number of pictures.

    Both sets are dealt, in the order given, into `num_blocks` blocks with no picture in common, so that the blocks'
    distances are independent and their scatter gives the standard error. (Subsets that overlap, the usual way, have a
    scatter but no standard error.) The order must therefore be random: shuffle sets that are sorted.

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
            f"`num_blocks`={num_blocks} blocks of {len(features_a)} and {len(features_b)} pictures: at least 2 blocks "
            "of at least 2 pictures are needed."
        )
    kid = _torch_fidelity("metric_kid")
    distances = []
    for i in tqdm(range(num_blocks), desc="Kernel distance", unit="block", leave=False):
        blocks = (features[i::num_blocks][:block_size] for features in (features_a, features_b))
        metric = kid.kid_features_to_metric(*blocks, kid_subsets=1, kid_subset_size=block_size, verbose=False)
        distances.append(metric[kid.KEY_METRIC_KID_MEAN])
    distances = torch.tensor(distances, dtype=torch.float64)
    return distances.mean().item(), (distances.std() / num_blocks**0.5).item()


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """
    Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991): a picture lies in a set's manifold if
    it is no farther from some picture of the set than that picture's own k-th neighbour.

    Args:
        real (`torch.Tensor` of shape `(n, d)`): features of real pictures, n > k.
        fake (`torch.Tensor` of shape `(m, d)`): features of generated pictures, m > k.
        k (`int`, defaults to 3): which neighbour.

    Returns:
        `tuple[float, float]`: precision, the share of generated pictures within the real ones' manifold, and recall,
        the share of real pictures within the generated ones'. Both depend on n and m: take them equal.

    Raises:
        ValueError: the features are not two such arrays, are not finite, or are too few for `k`.
    """
    real, fake = _check_features(real=real, fake=fake)
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"`k`={k} must be at least 1 and below the number of pictures, {len(real)} and {len(fake)}.")
    prc = _torch_fidelity("metric_prc")
    # in batches of rows: the whole table of distances of 50,000 pictures would take 20 GB
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


def nearest_neighbours(
    features: torch.Tensor, among: torch.Tensor, k: int = 1, batch_size: int = 1000
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest of a set to each picture, by the distance of their features: a network that has learnt its training
    pictures by heart draws pictures that are nearer to them than unseen real ones are.

    Args:
        features (`torch.Tensor` of shape `(n, d)`): features of the pictures.
        among (`torch.Tensor` of shape `(m, d)`): features of the set, m >= k.
        k (`int`, defaults to 1): how many neighbours.
        batch_size (`int`, defaults to 1000): how many pictures are compared with the set at a time.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: distances and indices into the set, each of shape `(n, k)`, nearest first.

    Raises:
        ValueError: the features are not two such arrays, are not finite, or are too few for `k`.
    """
    features, among = _check_features(features=features, among=among)
    if not 1 <= k <= len(among):
        raise ValueError(f"`k`={k} must be at least 1 and at most the number of pictures in `among`, {len(among)}.")
    batches = tqdm(features.split(batch_size), desc="Neighbours", unit="batch", leave=False)
    found = [torch.cdist(batch, among).topk(k, largest=False) for batch in batches]
    return torch.cat([distances for distances, _ in found]), torch.cat([indices for _, indices in found])


def _check_features(**named: torch.Tensor) -> list[torch.Tensor]:
    """The two sets, float64 on the CPU."""
    for name, features in named.items():
        if features.ndim != 2 or not len(features):
            raise ValueError(f"`{name}` must be of shape (number of pictures, d), not {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError(f"`{name}` has features that are not finite.")
    (name_a, a), (name_b, b) = named.items()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`{name_a}` has {a.shape[1]} features and `{name_b}` {b.shape[1]}: they must be the same.")
    return [features.double().cpu() for features in named.values()]


def require_torch_fidelity() -> None:
    """
    Make sure that the statistics can be computed, before images are drawn for them.

    Raises:
        ImportError: torch-fidelity, or the torchvision it needs, is missing or cannot be imported.
    """
    for module in ("feature_extractor_inceptionv3", "metric_fid", "metric_kid", "metric_prc"):
        _torch_fidelity(module)


def _torch_fidelity(module: str):
    # Only here: it takes torchvision along and seconds to import, and training needs neither.
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError as error:
        raise ImportError(
            "The statistics need torch-fidelity (`pip install torch-fidelity`), and a torchvision that matches torch "
            f"({error})."
        ) from error
