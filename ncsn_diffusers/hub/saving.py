"""
Replacing a saved pipeline as a whole: whoever loads it meanwhile, or after a save that was cut off, gets the old
pipeline, the new one, or an error, and never a mixture of both.

The new files are written to a folder aside. Then the old index leaves, without which a folder is no pipeline; the new
files take the places of the old ones; and the new index comes last. A reader whose index is another at the end than at
the beginning reads again.

The weights' files also hold a hash of what gives them their meaning, the network's config, the noise levels and the
data's units. It finds the mixtures that others make: a copy that was cut off, or one pipeline copied over another.
"""

import contextlib
import filecmp
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging

from .configs import CONFIGS, INDEX, SAVING, part_folder, read_config, read_json, unusable
from .weights import WEIGHTS, read_header, weight_names, write_metadata

_PATIENCE = 10.0  # seconds that a reader waits for a pipeline that is being replaced
_LEFT_BEHIND = 86_400.0  # seconds after which what another machine has begun counts as given up
# What the network has been trained with. All other settings of a scheduler may be edited by hand.
_LEVELS = (
    *("num_train_timesteps", "sigma_min", "sigma_max", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("conditioning", "prediction_type"),
)

_UNITS = ("data_min", "data_mean", "data_std", "value_range", "null_class")
_STAMP = "ncsn_diffusers_configs"  # in the metadata of the weights

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def make_aside(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, deleted at the end. Those that killed processes have left behind are deleted first."""
    for path in parent.iterdir():
        if path.name.startswith(prefix) and not _is_in_use(path, prefix):
            shutil.rmtree(path, ignore_errors=True)
    folder = parent / f"{prefix}{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_in_use(path: Path, prefix: str) -> bool:
    node, _, rest = path.name.removeprefix(prefix).rpartition("-")[0].rpartition("-")
    try:
        if node == platform.node() and os.name == "posix":  # elsewhere signal 0 is none
            os.kill(int(rest), 0)
        return time.time() - path.stat().st_mtime < _LEFT_BEHIND
    except PermissionError:  # a process of another user
        return True
    except (OSError, ValueError):
        return False


def save_as_new(pipeline: DiffusionPipeline, folder: Path) -> None:
    """
    Save a pipeline in a folder that is not there yet, or is empty, and comes into being with all of its files.

    Raises:
        OSError: the folder cannot be written, or holds files.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with make_aside(folder.parent, f".{folder.name}{SAVING}") as aside:
        pipeline.save_pretrained(aside / "new")
        if folder.exists():
            folder.rmdir()
        (aside / "new").rename(folder)
        _sync(folder.parent)


def replace_pipeline(folder: Path, write: Callable[[Path], None]) -> None:
    """
    Let `write` fill a new folder with a pipeline, then put its files in the place of those of `folder`, as one.

    Weights of before that are of another network, such as an fp16 variant of the pipeline that is replaced, would load
    as if they were of this one: they are deleted, with a warning.

    Raises:
        OSError: the disk is full, for example. The folder is as it was then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with make_aside(folder, SAVING) as aside:
        new = aside / "new"
        write(new)
        stamp = find_stamp(new, str(new))
        for path in sorted((new / "unet").glob(f"{WEIGHTS}*.safetensors")):
            write_metadata(path, **{_STAMP: stamp})
        files = sorted(path for path in new.rglob("*") if path.is_file())
        for path in files:
            _sync(path)  # the name must not reach the disk before the content
        stale = _find_stale(folder, new, stamp)
        if stale:
            names = ", ".join(path.relative_to(folder).as_posix() for path in stale)
            logger.warning(f"{names} of {str(folder)!r} are of the pipeline that this one replaces, and are removed.")
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / INDEX, aside / INDEX)
        _sync(folder)
        for path in stale:
            path.unlink(missing_ok=True)
        for path in files:
            if path != new / INDEX:
                target = folder / path.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        for part in CONFIGS:
            _sync(folder / part)
        os.replace(new / INDEX, folder / INDEX)
        _sync(folder)


def _sync(path: Path) -> None:
    """Have the disk itself hold what was written, where the system can say so of a folder."""
    with contextlib.suppress(PermissionError):  # of a folder on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _find_stale(folder: Path, new: Path, stamp: str) -> list[Path]:
    """The files of weights in `folder` that are not to stay beside those of `new`."""
    written = {path.name: path for path in (new / "unet").glob(f"{WEIGHTS}*")}
    variants = {_variant(name) for name in written}
    old = sorted((folder / "unet").glob(f"{WEIGHTS}*"))
    others = [path for path in old if path.name not in written]

    def is_same(path: Path) -> bool:
        return path.name in written and filecmp.cmp(path, written[path.name], shallow=False)

    if "" in variants and others and not all(is_same(path) for path in old if _variant(path.name) == ""):
        return others  # the variants are of the network that was there
    return [path for path in others if _variant(path.name) in variants or _read_stamp(path) not in (None, stamp)]


def _variant(name: str) -> str:
    """What tells the variants of the weights apart, in a name of theirs, such as ".fp16"."""
    return re.sub(r"-\d+-of-\d+|\.(safetensors|bin|index|json)", "", name.removeprefix(WEIGHTS))


def find_stamp(folder: Path, source: str) -> str:
    """The hash of what the weights of a saved pipeline have been trained with."""
    index = read_json(folder / INDEX, INDEX, source)
    unet, scheduler = (read_config(folder, source, part)[0] for part in CONFIGS)
    values = [
        {key: index[key] for key in _UNITS if key in index},
        {key: value for key, value in unet.items() if key[0] != "_" and key != "sample_size"},
        {key: scheduler[key] for key in _LEVELS if key in scheduler},
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_stamp(folder: str | Path, source: str, variant: str | None = None) -> None:
    """
    Compare the weights of a pipeline that this package has saved with its configs. Others have no hash.

    Raises:
        OSError: they are of two pipelines, or damaged.
    """
    stamp = None
    for pattern in weight_names("safetensors", variant):
        for path in part_folder(folder, "unet").glob(pattern):
            file = path.relative_to(folder).as_posix()
            try:
                found = _read_stamp(path)
            except ValueError as error:
                raise OSError(unusable(file, source, str(error))) from error
            stamp = stamp or (found and find_stamp(Path(folder), source))
            if found not in (None, stamp):
                reason = (
                    "it was saved with another network's config, other noise levels or another range of the data than "
                    "lie beside it, by a save or a copy that was cut off: save or copy the whole pipeline once more. "
                    "To change them on purpose, give `unet` and `scheduler` to from_pretrained, and save the pipeline"
                )
                raise OSError(unusable(file, source, reason))


def _read_stamp(path: Path) -> str | None:
    return None if path.suffix != ".safetensors" else read_header(path).get("__metadata__", {}).get(_STAMP)


def read_whole(folder: str, read: Callable[[], Any]) -> Any:
    """
    What `read` returns or raises, of a pipeline that no save has replaced meanwhile; it is called again if one has.

    Raises:
        OSError: the pipeline is replaced again and again.
    """
    begun = time.monotonic()
    while time.monotonic() - begun < _PATIENCE:
        before, error, result = _state(folder), None, None
        try:
            result = read()
        except Exception as raised:  # files that are missing or do not fit, in all the ways in which they can
            error = raised
        if before == _state(folder) and (before is not None or not _is_being_saved(folder)):
            if error is not None:
                raise error
            return result
        time.sleep(0.01)
    raise OSError(f"{folder!r} is being replaced by another pipeline all the time: load it once the saving has ended.")


def _state(folder: str) -> tuple | None:
    """What changes whenever a pipeline is saved; None without one."""
    try:
        state = os.stat(Path(folder, INDEX))
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


def _is_being_saved(folder: str) -> bool:
    return any(_is_in_use(path, SAVING) for path in Path(folder).glob(f"{SAVING}*"))
