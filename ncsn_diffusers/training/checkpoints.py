"""
Folders checkpoint-STEP that are complete whenever they exist: each is written aside and renamed when it is whole, with
a manifest of its files, by which one that was cut short on its way (a copy, a broken disk) is known and passed over.
A lock keeps a second run off the folder.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ASIDE = "incomplete-"
_MANIFEST = "manifest.json"
_LOCK = ".lock"


def lock(output_dir: Path) -> IO:
    """
    Keep other processes' runs off a folder until the returned file is closed, or its process dies.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    file = (output_dir / _LOCK).open("a")
    if fcntl is None:
        warnings.warn(f"{output_dir} cannot be locked on this system: start no second run on it.", stacklevel=2)
        return file
    try:
        # Unlike flock's, this lock is not shared by forked data loaders, which outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(f"Another run is using {output_dir}: wait for it, or name another folder.") from error
    except OSError as error:
        warnings.warn(f"{output_dir} cannot be locked ({error}): start no second run on it.", stacklevel=2)
    return file


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the most steps in a folder, or `None`."""
    complete = [path for path in _checkpoints(Path(output_dir)) if is_complete(path)]
    return complete[-1] if complete else None


def is_complete(checkpoint: Path) -> bool:
    """Whether all files that the manifest lists are there, in their full size."""
    try:
        files = read_manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_manifest(checkpoint: Path) -> dict:
    """What [`complete`] was given, and `"files"`, the size of each file in bytes."""
    return json.loads((checkpoint / _MANIFEST).read_text())


def aside(output_dir: Path, step: int) -> Path:
    """Where to write the checkpoint of a step before it is complete."""
    return output_dir / f"{_ASIDE}checkpoint-{step}"


def complete(output_dir: Path, step: int, manifest: dict, total_limit: int) -> None:
    """Turn what has been written [`aside`] into checkpoint-STEP, then delete the oldest beyond `total_limit`."""
    folder, target = aside(output_dir, step), output_dir / f"checkpoint-{step}"
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the content
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    good = [path for path in _checkpoints(output_dir) if is_complete(path)]
    for old in good[:-total_limit]:
        shutil.rmtree(old)


def replace_files(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then move its files over those of `output_dir`, which a failure leaves alone."""
    folder = output_dir / f"{_ASIDE}files"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write(folder)
        for path in sorted(folder.rglob("*"), key=lambda path: -len(path.parts)):  # what names the others comes last
            if path.is_file():
                target = output_dir / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_incomplete(output_dir: Path) -> None:
    """Delete what a process that was killed has left aside."""
    for path in output_dir.glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_all(output_dir: Path) -> None:
    """Delete every checkpoint of a folder."""
    for path in _checkpoints(output_dir):
        shutil.rmtree(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Complete or not, by rising number of steps."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]))
