"""How good a pipeline's images are: `ncsn-diffusers evaluate --help`."""

from collections.abc import Sequence

from ..evaluation import EvaluateConfig, evaluate
from .cli import run

EXAMPLE = "ncsn-diffusers evaluate my-ncsn --dataset_name ylecun/mnist --held_out_split test"


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(EvaluateConfig, evaluate, EXAMPLE, arguments, name)


if __name__ == "__main__":
    main()
