"""Train a noise conditional score network: `ncsn-diffusers train --help`."""

from collections.abc import Sequence

from ..training.config import TrainingConfig
from .cli import run

EXAMPLE = "accelerate launch -m ncsn_diffusers.commands.train --train_data_dir my_images --resolution 32"


def train(config: TrainingConfig) -> None:
    """See [`ncsn_diffusers.training.train`]."""
    from ..training import train  # it imports torch and diffusers, which takes seconds

    train(config)


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(TrainingConfig, train, EXAMPLE, arguments, name)


if __name__ == "__main__":
    main()
