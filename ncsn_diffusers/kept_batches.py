"""Tensors that take long to compute, kept batch by batch on disk."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .atomic_files import replacing
from .sampling import make_batches

GO_ON = "Make room and start the same command again: it goes on where it stopped."


class KeptBatches:
    """
    Tensors that the processes compute in batches, each batch kept as a file.

    What the tensors depend on is kept beside them; when that changes, they are computed again, or refused.

    Args:
        accelerator (`Accelerator`): the processes.
        folder (`Path`): where the files go; every process must see it.
    """

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.accelerator, self.folder = accelerator, folder

    def compute(
        self,
        name: str,
        depends_on: dict[str, Any],
        num: int,
        batch_size: int,
        function: Callable[[range], dict[str, torch.Tensor]],
        may_replace: bool = True,
        title: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        The tensors of `function(range)`, one row for each number in the range, for all ranges of `range(num)`. The
        progress bar has the title, or else the name.

        Raises:
            ValueError: what they depend on has changed, and `may_replace` is `False`.
            OSError: a batch cannot be written. Those before it are kept.
        """
        accelerator, folder = self.accelerator, self.folder / name
        settings = folder / "settings.json"
        depends_on = json.loads(json.dumps(depends_on))
        before = json.loads(settings.read_text()) if settings.exists() else None
        if before not in (None, depends_on) and not may_replace:
            changed = [key for key in depends_on if before.get(key) != depends_on[key]]
            raise ValueError(
                f"The folder {str(self.folder)!r} holds {name} that were made with another "
                f"{', '.join(f'`{key}`' for key in changed)}: use another folder, or replace them with "
                "`overwrite_output_dir`."
            )
        batches = make_batches(num, batch_size)
        accelerator.wait_for_everyone()  # all have looked before the first one writes
        if accelerator.is_main_process and before != depends_on:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with replacing(settings, GO_ON) as aside:
                aside.write_text(json.dumps(depends_on, indent=2) + "\n")
        accelerator.wait_for_everyone()
        missing = [batch for batch in batches if not _is_whole(self._path(folder, batch))]
        accelerator.wait_for_everyone()

        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with tqdm(
            total=sum(map(len, mine)),
            desc=title or name,
            unit="image",
            disable=not (mine and accelerator.is_main_process),
        ) as bar:
            for batch in mine:
                tensors = {key: tensor.contiguous() for key, tensor in function(batch).items()}
                with replacing(self._path(folder, batch), GO_ON) as aside:
                    save_file(tensors, aside)
                bar.update(len(batch))
        accelerator.wait_for_everyone()
        parts = [load_file(self._path(folder, batch)) for batch in batches]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def remove(self, name: str) -> None:
        """Remove the files of [`compute`], on the main process."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @staticmethod
    def _path(folder: Path, batch: range) -> Path:
        return folder / f"{batch.start:08d}-{batch.stop:08d}.safetensors"


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def fingerprint(*tensors: torch.Tensor) -> str:
    """A hash that identifies tensors by shape, dtype and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
