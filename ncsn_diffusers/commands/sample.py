"""Draw images: `ncsn-diffusers sample PIPELINE`, or with `accelerate launch -m` on several devices."""

from collections.abc import Sequence

from ..settings import SampleConfig
from .cli import run

EXAMPLE = "ncsn-diffusers sample my-ncsn --num_images 16 --num_inference_steps 20"


def sample(config: SampleConfig) -> None:
    """Draw the images and save what the config asks for."""
    from ..sample_images import sample_images  # it imports torch and diffusers, which takes seconds

    sample_images(config)


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(SampleConfig, sample, EXAMPLE, arguments, name, resumes=True)


if __name__ == "__main__":
    main()
