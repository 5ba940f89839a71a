"""How far generated images are from real ones: features, statistics, and a whole evaluation with its report."""

from .config import EvaluateConfig
from .evaluate import evaluate
from .features import (
    CLASSIFIERS,
    DigitClassifier,
    InceptionFeatures,
    RandomFeatures,
    extract_features,
    find_classifier,
    load_digit_classifier,
    share_found,
    to_uint8,
)
from .metrics import (
    class_entropy,
    class_shares,
    frechet_distance,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
    require_torch_fidelity,
)

__all__ = [
    "CLASSIFIERS",
    "DigitClassifier",
    "EvaluateConfig",
    "InceptionFeatures",
    "RandomFeatures",
    "class_entropy",
    "class_shares",
    "evaluate",
    "extract_features",
    "find_classifier",
    "frechet_distance",
    "kernel_distance",
    "load_digit_classifier",
    "nearest_neighbors",
    "precision_recall",
    "require_torch_fidelity",
    "share_found",
    "to_uint8",
]
