"""Training a noise conditional score network."""

from .config import TrainingConfig
from .network import make_unet
from .trainer import Trainer, train

__all__ = ["Trainer", "TrainingConfig", "make_unet", "train"]
