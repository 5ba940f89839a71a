"""The weights of saved pipelines: whether they are all there, fit the config, are finite and undamaged."""

import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .configs import (
    NETWORKS,
    OBJECT,
    check_values,
    incomplete,
    part_folder,
    read_config,
    read_json,
    unusable,
)

WEIGHTS = "diffusion_pytorch_model"
_LONGEST_HEADER = 4_000_000  # bytes: of 30,000 tensors; a network has a few hundred
_SHARD = re.compile(r"-\d+-of-\d+")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def weight_names(suffix: str, variant: str | None) -> list[str]:
    """Patterns of the files that hold the weights: one, or several and an index, as older and newer versions save."""
    if variant is None:
        return [f"{WEIGHTS}.{suffix}", f"{WEIGHTS}-*-of-*.{suffix}", f"{WEIGHTS}.{suffix}.index.json"]
    shards = [f"{WEIGHTS}.{variant}-*-of-*.{suffix}", f"{WEIGHTS}-*-of-*.{variant}.{suffix}"]
    return [f"{WEIGHTS}.{variant}.{suffix}", *shards, f"{WEIGHTS}.{suffix}.index.{variant}.json"]


def check_complete(folder: str, source: str, given: Collection[str], only_safetensors: bool) -> None:
    """The configs have been read: what may be missing are the weights."""
    patterns = ["*.safetensors"] if only_safetensors else ["*.safetensors", "*.bin"]
    if "unet" not in given and not any(any(part_folder(folder, "unet").glob(pattern)) for pattern in patterns):
        raise OSError(incomplete(source, ["unet/*.safetensors"]))


def read_header(path: Path) -> dict:
    """
    The header of a file of safetensors: for each tensor its `"shape"`, and the texts under `"__metadata__"`.

    Raises:
        ValueError: the file is damaged, or its header is longer than that of any network.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header takes {length:,} bytes, of {_LONGEST_HEADER:,} at most")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
            raise ValueError(f"it is damaged or not of safetensors ({type(error).__name__})") from error
    try:
        with safe_open(path, framework="pt"):  # compares the tensors' places with the file's length
            return header
    except SafetensorError as error:
        raise ValueError(f"it is damaged or not of safetensors ({error})") from error


def write_metadata(path: Path, **texts: str) -> None:
    """Add texts to the metadata of a file of safetensors. The file is written anew, for its header grows."""
    header = read_header(path)
    header["__metadata__"] = {**header.get("__metadata__", {}), **texts}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    aside = path.with_name(f".{path.name}")
    with open(path, "rb") as old, open(aside, "wb") as new:
        new.write(len(content).to_bytes(8, "little") + content)
        old.seek(8 + int.from_bytes(old.read(8), "little"))
        shutil.copyfileobj(old, new, 1 << 20)
    aside.replace(path)


def check_weights(folder: str, source: str, only_safetensors: bool) -> None:
    """
    Compare the network that the config describes with the names and shapes of the tensors in the files.

    diffusers would leave at random, or empty, what a file lacks.
    """
    config, name = read_config(folder, source, "unet")
    network_class = NETWORKS[config.get("_class_name", "UNet2DModel")]
    known = inspect.signature(network_class.__init__).parameters
    try:
        with torch.device("meta"):
            network = network_class(**{key: value for key, value in config.items() if key in known})
    except Exception as error:
        reason = f"diffusers cannot make a network of it ({type(error).__name__}: {error})"
        raise OSError(unusable(name, source, reason)) from error
    expected = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    part = part_folder(folder, "unet")
    for path in sorted(part.glob(f"{WEIGHTS}*")):
        if not path.is_file():
            raise OSError(unusable(path.relative_to(folder).as_posix(), source, "it is no file"))
    found: dict[str, set[str]] = {}
    suffixes = ["safetensors"]
    if not only_safetensors and not any(part.glob(f"{WEIGHTS}*.safetensors")):
        suffixes.append("bin")
    for path in (path for suffix in suffixes for path in sorted(part.glob(f"{WEIGHTS}*.{suffix}"))):
        file = path.relative_to(folder).as_posix()
        shapes = _read_shapes(path, file, source)
        if not _SHARD.search(path.name):
            shapes = {_translate(key, expected): shape for key, shape in shapes.items()}
        for key, shape in shapes.items():
            if shape != expected.get(key, shape):
                reason = f"`{key}` has shape {shape}, and {name} describes one of {expected[key]}"
                raise OSError(unusable(file, source, reason))
        found.setdefault(_SHARD.sub("", file), set()).update(shapes)
    for path in sorted(part.glob(f"{WEIGHTS}*.index*.json")):
        _check_shard_index(path, path.relative_to(folder).as_posix(), source, expected)
    for file, names in found.items():
        missing = sorted(expected.keys() - names)
        if missing:
            raise OSError(unusable(file, source, f"it lacks {len(missing)} tensors of the network: `{missing[0]}` …"))


def _read_shapes(path: Path, file: str, source: str) -> dict[str, list[int]]:
    try:
        if path.suffix == ".safetensors":
            return {key: value["shape"] for key, value in read_header(path).items() if key != "__metadata__"}
        state = torch.load(path, map_location="meta", weights_only=True)
        return {key: list(tensor.shape) for key, tensor in state.items()}
    except ValueError as error:
        raise OSError(unusable(file, source, str(error))) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = f"it is damaged, or holds more than a network's tensors ({type(error).__name__})"
        raise OSError(unusable(file, source, reason)) from error


def _translate(key: str, expected: Collection[str]) -> str:
    """Our name of a tensor of an attention block in the public checkpoints of 2022, which diffusers translates, too."""
    for old, new in _OLD_ATTENTION.items():
        if f".{old}." in key and (renamed := key.replace(f".{old}.", f".{new}.")) in expected:
            return renamed
    return key


def _check_shard_index(path: Path, file: str, source: str, expected: Collection[str]) -> None:
    index = read_json(path, file, source)
    check_values(index, {"metadata": OBJECT, "weight_map": OBJECT}, file, source)
    for key in ("metadata", "weight_map"):
        if key not in index:
            raise OSError(unusable(file, source, f"it has no `{key}`"))
    for key, shard in index["weight_map"].items():
        if not isinstance(shard, str) or not shard.startswith(WEIGHTS) or "/" in shard or "\\" in shard:
            reason = f"`weight_map` must name a file of weights for `{key[:80]}`, not {str(shard)[:80]!r}"
            raise OSError(unusable(file, source, reason))
    for shard in sorted(set(index["weight_map"].values())):
        if not (path.parent / shard).is_file():
            raise OSError(unusable(file, source, f"`weight_map` names {shard}, which is missing"))
    missing = sorted(set(expected) - index["weight_map"].keys())
    if missing:
        reason = f"`weight_map` lacks {len(missing)} tensors of the network: `{missing[0]}` …"
        raise OSError(unusable(file, source, reason))
    shards = {shard for shard in index["weight_map"].values() if shard.endswith(".safetensors")}
    held = {shard: read_header(path.parent / shard) for shard in shards}
    for key, shard in index["weight_map"].items():
        if key not in held.get(shard, (key,)):
            raise OSError(unusable(file, source, f"`weight_map` says that `{key}` is in {shard}, which lacks it"))


def find_not_finite(path: Path) -> str | None:
    """The name of a tensor with NaN or infinity in a file of safetensors, if there is one."""
    with safe_open(path, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_tensor(key)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return key
    return None


def check_finite(network: torch.nn.Module, folder: str, source: str, may_be_offloaded: bool = False) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_meta and not may_be_offloaded:
            raise OSError(f"The weights of {source!r} cannot be used: diffusers has found no `{name}` in the files.")
        if tensor.is_meta or not tensor.is_floating_point() or tensor.isfinite().all():
            continue
        for path in sorted(part_folder(folder, "unet").glob(f"{WEIGHTS}*.safetensors")):
            key = find_not_finite(path)
            if key is not None:
                file = path.relative_to(folder).as_posix()
                raise OSError(unusable(file, source, f"`{key}` holds NaN or infinity, and would draw nothing else"))
        raise OSError(
            f"The weights of {source!r} cannot be used: `{name}` holds NaN or infinity in {tensor.dtype}. Where the "
            "file does not, load it in another `torch_dtype`, such as torch.float32."
        )


def check_content(folder: str | os.PathLike, repo_id: str) -> None:
    """The Hub's cache names a file after its hash: SHA-256, or git's for small files."""
    for path in sorted(Path(folder).rglob("*")):
        if not path.is_symlink() or not path.is_file():
            continue  # a file system without links: the name is lost
        blob = path.resolve()
        if len(blob.name) == 64:
            digest = hashlib.sha256()
        elif len(blob.name) == 40:
            digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
        else:
            continue
        with open(blob, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != blob.name:
            raise OSError(
                f"{path.name} of {repo_id!r} is damaged: its hash is not the one that the Hub has on record. Delete "
                f"{blob} and load again."
            )
