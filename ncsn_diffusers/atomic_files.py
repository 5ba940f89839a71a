"""
Files that are there as a whole or not at all, whatever ends the process or the machine.

A file is written under another name beside its own, brought to the disk (fsync) and renamed. Then the folder is brought
to the disk, too, since the new name is an entry of the folder. What a killed process leaves behind has a name that
begins with `INCOMPLETE`: the next write of the same file replaces it, and [`remove_incomplete`] deletes it.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

INCOMPLETE = "incomplete-"
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch and safetensors report it


@contextmanager
def replacing(path: str | Path, way_out: str | None = None) -> Iterator[Path]:
    """
    A path beside `path`, with the same suffix, to write the new content of `path` to. It takes the name `path` when the
    block ends. If the block raises, `path` stays as it was. A path has one writer at a time.

    Args:
        path (`str` or `Path`): The file.
        way_out (`str`, *optional*):
            A sentence on how to go on, for the end of the error. With it, all that a full disk makes torch and
            safetensors raise is an `OSError` as well.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    path = Path(path)
    aside = path.with_name(INCOMPLETE + path.name)
    try:
        yield aside
        sync(aside)
        rename(aside, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            aside.unlink(missing_ok=True)
        if way_out is not None and isinstance(error, CANNOT_WRITE):
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            if f"os error {errno.ENOSPC}" in reason:  # safetensors' words
                reason = os.strerror(errno.ENOSPC)
            raise OSError(f"{path} could not be written: {reason}. {way_out}") from error
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(aside), aside):
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Replace the content of a file; see [`replacing`]."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace the content of a file; see [`replacing`]."""
    with replacing(path) as aside:
        aside.write_bytes(content)


def sync(path: str | Path) -> None:
    """Bring what has been written to a file, or the names in a folder, to the disk."""
    if os.name == "nt" and os.path.isdir(path):  # Windows opens no folders
        return
    # Windows brings only files to the disk that are open for writing
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_all(folder: str | Path) -> None:
    """Bring a folder and all that is in it to the disk."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(parent, name))
        sync(parent)


def rename(source: str | Path, target: str | Path) -> None:
    """Rename a file or folder, over a file of that name if there is one. The new name survives a loss of power."""
    os.replace(source, target)
    sync(Path(target).parent)


def remove_incomplete(folder: str | Path) -> None:
    """Delete what a killed process has left half written or half deleted in a folder."""
    for path in Path(folder).glob(f"{INCOMPLETE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
