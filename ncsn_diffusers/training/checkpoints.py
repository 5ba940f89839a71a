"""
Checkpoints of a training run: folders checkpoint-STEP, complete whenever they exist.

Each is written under another name ([`begin`]) and renamed once all its files are on disk ([`commit`]), and is renamed
again before it is deleted. Its manifest lists the files and their sizes, so that one damaged later (a copy cut short, a
broken disk) is recognized and passed over. A lock keeps a second run out of the folder.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import IO

from ..atomic_files import INCOMPLETE, remove_incomplete, rename, sync_all

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_MANIFEST = "manifest.json"
_LOCK = ".lock"


def lock(output_dir: Path) -> IO:
    """
    Keep the runs of other processes out of a folder until the returned file is closed or this process ends.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    file = (output_dir / _LOCK).open("a")
    if fcntl is None:
        warnings.warn(f"{output_dir} cannot be locked on this system: start no second run on it.", stacklevel=2)
        return file
    try:
        # Unlike flock's, this lock is not inherited by forked data loaders, which outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(f"Another run is using {output_dir}: wait for it, or name another folder.") from error
    except OSError as error:
        warnings.warn(f"{output_dir} cannot be locked ({error}): start no second run on it.", stacklevel=2)
    return file


def check_unlocked(output_dir: Path) -> None:
    """
    Writes nothing, unlike [`lock`].

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if (output_dir / _LOCK).exists():
        lock(output_dir).close()


def latest(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in a folder, or `None`."""
    complete = [path for path in find_all(Path(output_dir)) if is_complete(path)]
    return complete[-1] if complete else None


def find(wanted: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, complete or not; for `"latest"` the one of [`latest`]."""
    if wanted == "latest":
        return latest(output_dir)
    return None if wanted is None else Path(wanted)


def is_complete(checkpoint: Path) -> bool:
    """Whether all files that the manifest lists exist at their full size."""
    try:
        files = read_manifest(checkpoint)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def read_manifest(checkpoint: Path) -> dict:
    """What [`commit`] was given, and `"files"`, the size of each file in bytes."""
    return json.loads((checkpoint / _MANIFEST).read_text())


def begin(output_dir: Path, step: int) -> Path:
    """Make the folder that the checkpoint of a step is written to until [`commit`] gives it its name."""
    folder = output_dir / f"{INCOMPLETE}checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)  # each process of a run begins
    return folder


def commit(folder: Path, manifest: dict, total_limit: int) -> Path:
    """
    Give a checkpoint whose files are all written its final name, and delete those that it makes superfluous: the oldest
    beyond `total_limit`, and all with more steps. The run resumed from before the latter, and [`latest`] must not lead
    back to them. What a killed process has left half written or half deleted goes, too.

    Args:
        folder (`Path`): what [`begin`] has returned.
        manifest (`dict`): what to keep beside the files, for [`read_manifest`].
        total_limit (`int`): number of complete checkpoints to keep.

    Returns:
        `Path`: the folder checkpoint-STEP. It replaces one of the same name.
    """
    output_dir, target = folder.parent, folder.with_name(folder.name.removeprefix(INCOMPLETE))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=2) + "\n")
    sync_all(folder)  # the name must not reach the disk before the content
    later = [path for path in find_all(output_dir) if _step(path) >= _step(target)]
    for path in reversed(later):  # before the new one has its name, so that none outlives a kill beside it
        _begin_deletion(path)
    rename(folder, target)
    kept = [path for path in find_all(output_dir) if is_complete(path)][-total_limit:]
    for path in find_all(output_dir):
        if _step(path) < _step(kept[0]):
            _begin_deletion(path)
    remove_incomplete(output_dir)
    return target


def _begin_deletion(checkpoint: Path) -> None:
    """Take its name from a checkpoint: whatever interrupts the deletion, a later one ends it."""
    aside = checkpoint.with_name(f"{INCOMPLETE}deleted-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def remove_all(output_dir: Path) -> None:
    """Delete all checkpoints of a folder, and what a killed process had begun to write or to delete."""
    for path in reversed(find_all(output_dir)):
        _begin_deletion(path)
    remove_incomplete(output_dir)


def find_all(output_dir: Path) -> list[Path]:
    """The checkpoints of a folder, complete or not, in the order of their steps."""
    paths = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(paths, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
