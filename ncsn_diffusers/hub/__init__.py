"""The Hub: loading pipelines from it and publishing them on it."""

from .upload import BackgroundPush, collect_files, make_model_card, push_to_hub, training_command

__all__ = ["BackgroundPush", "collect_files", "make_model_card", "push_to_hub", "training_command"]
