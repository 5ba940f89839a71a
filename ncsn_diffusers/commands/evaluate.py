"""How good a pipeline's images are: `ncsn-diffusers evaluate --help`."""

from ..evaluation import EvaluateConfig, evaluate
from .cli import run


def main() -> None:
    run(EvaluateConfig, evaluate)


if __name__ == "__main__":
    main()
