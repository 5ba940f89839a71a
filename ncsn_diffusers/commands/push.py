"""Publish a saved pipeline: `python scripts/push_to_hub.py FOLDER REPO_ID`, after `hf auth login`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ..hub import push_to_hub
from .cli import run


@dataclass
class PushConfig:
    """
    Publish a pipeline on the Hub, with a model card and the code that loads it where ncsn_diffusers is not installed.

    The access token is the one that `hf auth login` or the variable HF_TOKEN holds. Whatever can be wrong is found
    before the upload begins.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the pipeline, as training or `save_pretrained` has left it."""

    repo_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO_ID")]
    """Name on the Hub: USER/NAME, ORGANISATION/NAME, or NAME among your own."""

    private: bool = False
    """Make the repository private."""

    revision: str | None = None
    """Branch to upload to, made if there is none of that name; main by default."""

    tag: str | None = None
    """New tag for what is uploaded, such as v1."""

    variants: tuple[str, ...] = ()
    """Weights beside the usual ones: fp16 (half precision), ema (the averages of a training run)."""

    license: str | None = None
    """Licence of the weights, for the card: apache-2.0, mit, cc-by-sa-4.0 and so on."""

    dataset: str | None = None
    """Name on the Hub of the data set, for the card; that of the training's settings by default."""

    commit_message: str | None = None
    """Summary of the commit."""


def push(config: PushConfig) -> None:
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
    )
    print(f"Uploaded {config.folder}: {info.commit_url}")


def main() -> None:
    run(PushConfig, push)


if __name__ == "__main__":
    main()
