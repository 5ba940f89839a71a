"""A page in the browser to try a pipeline: `ncsn-diffusers demo PIPELINE`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from .cli import run

EXAMPLE = "ncsn-diffusers demo my-ncsn --open_browser"


@dataclass
class DemoConfig:
    """
    Try a pipeline in the browser: draw, inpaint, restore, compare schedulers; of signals, maps and volumes: draw,
    measure, compare. Needs gradio, the extra `demo`.

    The page is for this computer alone unless `host` says otherwise. Nothing that is uploaded to it is kept.
    """

    pipeline: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="PIPELINE")] = None
    """Folder of the pipeline, or its id on the Hub; the digits that come with the package by default."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 shows the page to the whole network."""

    port: int | None = None
    """Port to listen at; the first free one from 7860 on by default."""

    open_browser: bool = False
    """Open the page in this computer's browser."""

    max_evaluations: int = 200
    """Most network evaluations of a chain; a pipeline whose own chain is longer may take that."""

    max_images: int = 16
    """Most images, or other samples, drawn at a time."""

    num_parallel: int = 1
    """Runs at a time; further ones wait in a queue."""


def demo(config: DemoConfig) -> None:
    from ..demo import launch  # it imports torch and diffusers, which takes seconds

    launch(**asdict(config))


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(DemoConfig, demo, EXAMPLE, arguments, name)


if __name__ == "__main__":
    main()
