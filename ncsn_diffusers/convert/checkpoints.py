"""What all conversions share: reading a file of torch's, filling a network from it, and the ladder and the sampler."""

import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from safetensors.torch import load_file

from ..hub.loading import NCSNPipeline
from ..hub.weights import read_header
from ..ladder import Ladder
from ..networks_ncsn import ACTIVATIONS
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..units import image_units

logger = logging.get_logger(__name__)

State = dict[str, torch.Tensor]
SIGMA_MIN = 0.01  # in all publications


@dataclass
class Given:
    """The user's settings; None stands for those that were not given."""

    sample_size: int | None
    data_min: float | None
    sigma_min: float | None
    sigma_max: float | None
    num_train_timesteps: int | None
    num_langevin_steps: int | None
    step_lr: float | None
    denoise_final: bool | None
    act_fn: str | None

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name not in ("data_min", "denoise_final", "act_fn") and value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be above 0, not {value!r}.")
        if self.data_min not in (None, 0, -1):
            raise ValueError(f"`data_min` must be -1 or 0, black in the data, not {self.data_min!r}.")
        if self.act_fn not in (None, *ACTIVATIONS):
            raise ValueError(f"`act_fn` must be one of {', '.join(ACTIVATIONS)}, not {self.act_fn!r}.")

    def refuse(self, names: Iterable[str], reason: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}`={getattr(self, name)!r}: {reason}")


@dataclass
class Published:
    """A network of a paper, known by its noise levels, and how the paper draws from it."""

    name: str
    sigma_max: float
    num_levels: int
    sample_size: int
    num_langevin_steps: int
    step_lr: float
    denoise_final: bool = True


# The file


def read(source: str) -> Any:
    """
    What a file of torch's or of safetensors holds.

    Raises:
        OSError: it is neither, or is damaged, or holds what might run code.
    """
    path = Path(source)
    if not path.is_file():
        raise OSError(f"{source!r} is neither a file nor a folder.")
    kind = _find_kind(path)
    if kind is not None:
        raise OSError(f"{source!r} is {kind}.")
    number = _count_tensors(path)
    if number > _MOST_TENSORS:
        raise OSError(
            f"{source!r} holds {number:,} tensors, of {_MOST_TENSORS:,} at most: no network that can be converted has "
            "so many."
        )
    try:
        if _is_safetensors(path):
            read_header(path)
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({name[1]})" if name else ""
        raise OSError(
            f"{source!r} is damaged, or holds more than tensors, numbers and names{what}, which might run code: save "
            "its tensors alone, as [model.state_dict()], where you trust the file."
        ) from error
    except Exception as error:  # torch raises all kinds where a file is cut off
        raise OSError(f"{source!r} is damaged, or no checkpoint of torch ({type(error).__name__}).") from error


_MOST_TENSORS = 20_000  # the largest NCSN++ has about 6,000 with its average and its optimizer's state
# How files begin that are often taken for a checkpoint, and what they are.
_BEGINNINGS = (
    (rb"version https://git-lfs", "a pointer of Git LFS, and not the file itself, which `git lfs pull` fetches"),
    (rb"\s*<", "a web page, and not the file that it links to: download that"),
    (rb"\x89HDF", "a file of HDF5, such as Keras writes, and no checkpoint of PyTorch"),
    (rb"\x93NUMPY", "an array of NumPy, and no checkpoint of PyTorch"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "a packed archive: unpack it, and give the file in it"),
    (
        rb"[\x81-\x8f\xde\xdf]",
        "no checkpoint of PyTorch, but MessagePack, as the JAX version of score_sde writes: convert the checkpoint of "
        "its PyTorch version",
    ),
)


def _find_kind(path: Path) -> str | None:
    """What a file is that torch cannot have written; None if it may have."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file: download it again"
    if _is_safetensors(path):
        return None
    for beginning, kind in _BEGINNINGS:
        if re.match(beginning, start, re.DOTALL):
            return kind
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "a file of text, and no checkpoint of PyTorch"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.partition("/")[2] for name in archive.namelist()[:1000]]
        except zipfile.BadZipFile:
            return "cut off, for the end of it is missing: download it again"
        if "constants.pkl" in names:
            return "a TorchScript program, which would have to be run: save the network's state_dict() instead"
        if "data.pkl" not in names:
            return "a ZIP archive that torch has not written: unpack it, and give the file in it"
    return None


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _count_tensors(path: Path) -> int:
    """The number of tensors in a file of torch's, at once: its reader takes 0.1 ms for each."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:2] == b"PK":  # the end of the archive says how many files it holds, to 65,535
            end = content.rfind(b"PK\5\6")
            return int.from_bytes(content[end + 10 : end + 12], "little") if end >= 0 else 0
        # before torch 1.6: the names of the storages, which come before their content
        return len(set(re.findall(rb"X[\x01-\x16]\0\0\0(\d+)[qr]", content[:100_000_000])))


def describe(value: Any) -> str:
    if isinstance(value, dict):
        keys = list(value)
        return f"a dictionary of {', '.join(map(repr, keys[:5]))}{' …' * (len(keys) > 5)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {', '.join(type(part).__name__ for part in value[:6])}"
    return f"a {type(value).__name__}"


def wrap(parts: Any, source: str) -> dict | Sequence:
    """
    A checkpoint as the originals save it: `{"model": …}` of score_sde, or `[model, …]` of the others. A state dict
    alone, or as `{"state_dict": …}`, is put into the one that its names are of.

    Raises:
        OSError: it is a checkpoint of another kind.
    """
    if isinstance(parts, dict) and isinstance(parts.get("state_dict"), dict):
        others = [f"`{name}`" for name in parts if name != "state_dict"]
        if others:
            logger.warning(f"{source}: of its parts, `state_dict` is used. Not used: {', '.join(others)}.")
        parts = parts["state_dict"]
    if isinstance(parts, dict) and isinstance(parts.get("model"), dict):
        return parts
    if isinstance(parts, (list, tuple)) and parts and isinstance(parts[0], dict):
        return parts
    if isinstance(parts, dict):
        if any("shadow_params" in part for part in (parts, parts.get("ema")) if isinstance(part, dict)):
            raise OSError(
                f"{source!r} holds a moving average alone, a list of tensors without names: save it as {{'model': "
                "network.state_dict(), 'ema': the average}, with the network that it is of."
            )
        # what wraps the network, such as Lightning's module, has put its name before theirs
        for known, wrapped in (("all_modules.0.W", lambda s: {"model": s}), ("begin_conv.weight", lambda s: [s])):
            for name in parts:
                if isinstance(name, str) and (name == known or name.endswith(f".{known}")):
                    prefix = name.removesuffix(known)
                    return wrapped({key.removeprefix(prefix): part for key, part in parts.items()})
    raise OSError(
        f"{source!r} holds {describe(parts)}, and no checkpoint of a kind that can be converted: "
        "[model, optimizer] (NCSN), [model, optimizer, epoch, step, average] (NCSNv2), {'model', 'ema', …} "
        "(score_sde), or the state dict of such a network."
    )


def get_state(part: Any, what: str, source: str) -> State:
    """The tensors of a state dict, without the prefix of DataParallel."""
    if not isinstance(part, dict) or not part or not all(isinstance(t, torch.Tensor) for t in part.values()):
        raise OSError(f"{source!r}: {what} must be a dictionary of tensors, and is {describe(part)}.")
    return {name.removeprefix("module."): tensor for name, tensor in part.items()}


def list_names(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(f"`{name}`" for name in names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def count_tensors(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(count_tensors, value)) if isinstance(value, (list, tuple)) else int(torch.is_tensor(value))


def fill(network: torch.nn.Module, state: State, find_name: Callable[[str], str], source: str) -> None:
    """Copy `state`, whose name of the network's tensor is `find_name(name)`; nothing may be left over."""
    expected = network.state_dict()
    mapping = {name: find_name(name) for name in expected}
    missing = [theirs for theirs in mapping.values() if theirs not in state]
    unknown = sorted(state.keys() - set(mapping.values()))
    if missing or unknown:
        lacks = f"lacks {list_names(missing)}" if missing else ""
        has = f"has {list_names(unknown)}, which the network does not" if unknown else ""
        raise OSError(f"{source!r} {' and '.join(filter(None, (lacks, has)))}: it is a variant that is not known.")
    converted = {}
    for ours, theirs in mapping.items():
        tensor = state[theirs]
        if re.search(r"NIN_\d+\.W$", theirs):
            tensor = tensor.T  # a layer that multiplies from the other side
        if tensor.shape != expected[ours].shape:
            raise OSError(
                f"{source!r}: `{theirs}` has shape {list(tensor.shape)}, and {list(expected[ours].shape)} is needed."
            )
        if not tensor.isfinite().all():
            raise OSError(f"{source!r}: `{theirs}` holds NaN or infinity.")
        converted[ours] = tensor.float().contiguous()
    network.load_state_dict(converted)
    network.eval()


# The sampler


def find_ladder(
    ladder: torch.Tensor | None, given: Given, source: str, published: Sequence[Published] = ()
) -> list[float]:
    """
    The noise levels, falling: those of the file, or else geometric ones, as they are given. What is not given is that
    of the publication, if there is one only.
    """
    if ladder is not None:
        given.refuse(("sigma_min", "sigma_max", "num_train_timesteps"), "the file has the noise levels.")
        sigmas = ladder.double().tolist()
        if len(sigmas) < 2 or min(sigmas) <= 0 or any(a <= b for a, b in pairwise(sigmas)):
            raise OSError(f"{source!r}: `sigmas` must be at least two positive numbers that fall.")
        if not np.allclose(sigmas, np.geomspace(sigmas[0], sigmas[-1], len(sigmas)), rtol=1e-4, atol=0):
            return sigmas
        largest, smallest, num = (float(f"{sigmas[0]:.6g}"), float(f"{sigmas[-1]:.6g}"), len(sigmas))  # not float32's
    else:
        largest, smallest, num = given.sigma_max, given.sigma_min, given.num_train_timesteps
        if len(published) == 1:
            largest, num = first(largest, published[0].sigma_max), first(num, published[0].num_levels)
        smallest = first(smallest, SIGMA_MIN)
        if largest is None or num is None:
            raise ValueError(
                "`sigma_max` and `num_train_timesteps` must be given, `sigma_begin` and `num_classes` or `num_scales` "
                "in the original's config: the file does not hold the noise levels."
                + " Published are" * bool(published)
                + "; ".join(f" {p.sigma_max:g} and {p.num_levels} ({p.name})" for p in published)
            )
        if smallest >= largest or num < 2:
            raise ValueError(
                f"`sigma_min`={smallest}, `sigma_max`={largest} and `num_train_timesteps`={num}: a ladder has at least "
                "2 levels, and `sigma_max` is the largest."
            )
        if None in (given.sigma_min, given.sigma_max):
            logger.warning(
                f"{source} does not hold its noise levels: {num} of them are assumed, from {largest:g} to {smallest:g}."
            )
    return [largest, *np.geomspace(largest, smallest, num).tolist()[1:-1], smallest]


def find_publication(sigmas: Sequence[float], published: Sequence[Published]) -> Published | None:
    """The network that has these noise levels."""
    for one in published:
        ends = math.isclose(one.sigma_max, sigmas[0], rel_tol=1e-3), math.isclose(SIGMA_MIN, sigmas[-1], rel_tol=1e-3)
        if one.num_levels == len(sigmas) and all(ends):
            return one
    return None


def make_scheduler(
    sigmas: Sequence[float],
    *,
    step_lr: float | None = None,
    num_langevin_steps: int = 1,
    is_consistent: bool = False,
    knows_levels_only: bool = False,
    **settings,
) -> AnnealedLangevinScheduler:
    """
    The original's sampler, or this package's own if there is no `step_lr`.

    Args:
        sigmas (`Sequence[float]`): the noise levels, falling.
        step_lr (`float`, *optional*): the step size of the last level, in the network's units squared.
        num_langevin_steps (`int`): steps a level.
        is_consistent (`bool`): consistent annealed sampling, instead of the papers' rule.
        knows_levels_only (`bool`): Whether any number of levels is to be laid over the trained ones, not in between.
        settings: further ones of the scheduler.
    """
    if np.allclose(sigmas, np.geomspace(sigmas[0], sigmas[-1], len(sigmas)), rtol=1e-6, atol=0):
        ladder = {"num_train_timesteps": len(sigmas), "sigma_min": sigmas[-1], "sigma_max": sigmas[0]}
    else:
        ladder = {"trained_betas": Ladder(np.array(sigmas[::-1])).betas.tolist()}
    settings |= {"conditioning": "sigma", "prediction_type": "score", **ladder}
    if step_lr is not None:
        step_size = float(f"{step_lr / sigmas[-1] ** 2:.6g}")
        if step_size > 1:
            raise ValueError(f"`step_lr`={step_lr:g} must be at most the last sigma squared, {sigmas[-1] ** 2:g}.")
        settings |= {"step_size": step_size, "num_langevin_steps": num_langevin_steps}
        settings |= {"solver_order": 1} if is_consistent else {"noise_rule": "euler_maruyama"}
    if knows_levels_only or (is_consistent and step_lr is not None):
        settings["rho"] = None
    return AnnealedLangevinScheduler(**settings)


def make_pipeline(network: ModelMixin, scheduler: AnnealedLangevinScheduler, data_min: float) -> NCSNPipeline:
    """A pipeline that takes all levels of the ladder where the original's step size was chosen for them."""
    if scheduler.config.step_size is None:
        return NCSNPipeline(network, scheduler, **image_units(data_min))
    return NCSNPipeline(network, scheduler, **image_units(data_min), num_inference_steps=len(scheduler))


def first(value: Any, otherwise: Any) -> Any:
    """The value, or `otherwise` if it is None."""
    return otherwise if value is None else value
