"""Training a noise conditional score network."""

from .config import TrainingConfig
from .trainer import Trainer, make_unet, train

__all__ = ["Trainer", "TrainingConfig", "make_unet", "train"]
