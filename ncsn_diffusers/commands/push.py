"""Publish a saved pipeline: `ncsn-diffusers push FOLDER REPO_ID`, after `hf auth login`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from .cli import run

EXAMPLE = "ncsn-diffusers push my-ncsn user/my-ncsn --variants fp16"


@dataclass
class PushConfig:
    """
    Publish a pipeline on the Hub, with a model card and the code that loads it where ncsn_diffusers is not installed.

    The access token comes from `hf auth login` or the variable HF_TOKEN. Everything is checked before the upload
    begins.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the pipeline, from training or `save_pretrained`."""

    repo_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]
    """Name on the Hub: USER/NAME, ORGANISATION/NAME, or NAME for one of your own."""

    private: bool = False
    """Make the repository private."""

    revision: str | None = None
    """Branch to upload to, created if missing; main by default."""

    tag: str | None = None
    """New tag for this upload, such as v1."""

    variants: tuple[str, ...] = ()
    """Weights to upload besides the main ones: fp16 (half precision), ema (the averages of a training run)."""

    license: str | None = None
    """License of the weights, for the card, such as apache-2.0, mit or cc-by-sa-4.0."""

    dataset: str | None = None
    """The data set's name on the Hub, for the card; by default the one in the training settings."""

    commit_message: str | None = None
    """Summary of the commit."""

    space: bool = False
    """Also publish the page of `ncsn-diffusers demo` as a Gradio Space of the same name."""


def push(config: PushConfig) -> None:
    from ..hub import push_to_hub  # it imports torch and diffusers, which takes seconds

    info = push_to_hub(
        config.folder,
        config.repo_id,
        private=config.private or None,
        revision=config.revision,
        tag=config.tag,
        variants=config.variants,
        license=config.license,
        dataset=config.dataset,
        commit_message=config.commit_message,
        space=config.space,
    )
    print(f"Uploaded {config.folder}: {info.commit_url}")
    if config.space:
        print(f"The page: {info.repo_url.endpoint}/spaces/{info.repo_url.repo_id}")


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(PushConfig, push, EXAMPLE, arguments, name)


if __name__ == "__main__":
    main()
