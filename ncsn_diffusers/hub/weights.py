"""The weights of saved pipelines: whether they are all there, fit the config, are finite and undamaged."""

import hashlib
import inspect
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .configs import NETWORKS, incomplete, part_folder, read_config, unusable

WEIGHTS = "diffusion_pytorch_model"


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


def check_weights(folder: str, source: str, own: bool) -> None:
    """
    Compare the network that the config describes with the names and shapes of the tensors in the files.

    diffusers would leave at random what a file lacks, with a warning. The names of the oldest public checkpoints,
    which it translates, are not ours to judge.
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
    found: dict[str, set[str]] = {}
    for path in sorted(part_folder(folder, "unet").glob(f"{WEIGHTS}*.safetensors")):
        file = path.relative_to(folder).as_posix()
        names = found.setdefault(re.sub(r"-\d+-of-\d+", "", file), set())
        try:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (not a dict)
                    names.add(key)
                    shape = list(weights.get_slice(key).get_shape())
                    if shape != expected.get(key, shape):
                        reason = f"`{key}` has shape {shape}, and {name} describes one of {expected[key]}"
                        raise OSError(unusable(file, source, reason))
        except SafetensorError as error:
            raise OSError(unusable(file, source, f"it is damaged or not of safetensors ({error})")) from error
    for file, names in found.items():
        missing = sorted(expected.keys() - names)
        if own and missing:
            raise OSError(unusable(file, source, f"it lacks {len(missing)} tensors of the network: `{missing[0]}` …"))


def find_not_finite(path: Path) -> str | None:
    """The name of a tensor with NaN or infinity in a file of safetensors, if there is one."""
    with safe_open(path, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_tensor(key)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return key
    return None


def check_finite(network: torch.nn.Module, folder: str, source: str) -> None:
    for name, tensor in network.state_dict().items():
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
