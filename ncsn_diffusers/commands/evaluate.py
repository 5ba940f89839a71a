"""How good a pipeline's images are: `ncsn-diffusers evaluate --help`."""

from collections.abc import Sequence

from ..evaluation.config import EvaluateConfig
from .cli import run

EXAMPLE = "ncsn-diffusers evaluate my-ncsn --dataset_name ylecun/mnist --held_out_split test"


def evaluate(config: EvaluateConfig) -> None:
    """See [`ncsn_diffusers.evaluation.evaluate`]."""
    from ..evaluation import evaluate  # it imports torch and diffusers, which takes seconds

    evaluate(config)


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(EvaluateConfig, evaluate, EXAMPLE, arguments, name, resumes=True)


if __name__ == "__main__":
    main()
