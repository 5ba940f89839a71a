"""Train a noise conditional score network: `ncsn-diffusers train --help`."""

from ..training import TrainingConfig, train
from .cli import run


def main() -> None:
    run(TrainingConfig, train)


if __name__ == "__main__":
    main()
