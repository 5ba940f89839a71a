"""Files that are whole or not there: written beside their place, flushed to the disk, and renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch and safetensors report it


@contextmanager
def replacing(path: Path, way_out: str = "") -> Iterator[Path]:
    """
    A path to write to, whose file takes the place of `path` at the end of the block. The block should only write:
    whatever it raises of the kinds that a full disk causes is reported as a failure to write.

    Args:
        path (`Path`): in a folder that exists.
        way_out (`str`, *optional*): a sentence for the error's end, on how to go on.

    Raises:
        OSError: the file cannot be written; the message names it, and what was there before is untouched.
    """
    aside = path.with_name(f".incomplete-{path.name}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except CANNOT_WRITE as failure:
        reason = (failure.strerror if isinstance(failure, OSError) else None) or str(failure)
        if f"os error {errno.ENOSPC}" in reason:  # safetensors' words
            reason = os.strerror(errno.ENOSPC)
        raise OSError(f"{path} could not be written: {reason}. {way_out}".rstrip()) from failure
    finally:
        aside.unlink(missing_ok=True)
