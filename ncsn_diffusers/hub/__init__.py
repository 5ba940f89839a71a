"""The Hub: loading pipelines from it and publishing them on it."""

from .files import VARIANTS, collect_files
from .model_card import make_model_card
from .saving import save_as_new
from .upload import BackgroundPush, push_to_hub

__all__ = ["VARIANTS", "BackgroundPush", "collect_files", "make_model_card", "push_to_hub", "save_as_new"]
