"""What all conversions share: reading a file of torch's, filling a network from it, and the ladder and the sampler."""

import math
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import logging

from ..hub.loading import NCSNPipeline
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..units import image_units

logger = logging.get_logger(__name__)

State = dict[str, torch.Tensor]
SIGMA_MIN = 0.01  # in all publications


@dataclass
class Given:
    """What the user says, None where nothing."""

    sample_size: int | None
    data_min: float | None
    sigma_min: float | None
    sigma_max: float | None
    num_train_timesteps: int | None
    num_langevin_steps: int | None
    step_lr: float | None
    denoise_final: bool | None

    def __post_init__(self):
        for name, value in asdict(self).items():
            if name not in ("data_min", "denoise_final") and value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be above 0, not {value!r}.")
        if self.data_min not in (None, 0, -1):
            raise ValueError(f"`data_min` must be -1 or 0, black in the data, not {self.data_min!r}.")

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
    if not Path(source).is_file():
        raise OSError(f"{source!r} is neither a file nor a folder.")
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise OSError(
            f"{source!r} cannot be read: it is damaged, no checkpoint of torch, or holds more than tensors, numbers "
            f"and names, which might run code ({type(error).__name__}: {reason})."
        ) from error


def describe(value: Any) -> str:
    if isinstance(value, dict):
        keys = list(value)
        return f"a dictionary of {', '.join(map(repr, keys[:5]))}{' …' * (len(keys) > 5)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {', '.join(type(part).__name__ for part in value[:6])}"
    return f"a {type(value).__name__}"


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
                f"{source} does not hold its noise levels: {num} are taken, from {largest:g} to {smallest:g}."
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
        step_lr (`float`, *optional*): the step size of the last level, in units of the data squared.
        num_langevin_steps (`int`): steps a level.
        is_consistent (`bool`): consistent annealed sampling, instead of the papers' rule.
        knows_levels_only (`bool`): Whether any number of levels is to be laid over the trained ones, not in between.
        settings: further ones of the scheduler.
    """
    if np.allclose(sigmas, np.geomspace(sigmas[0], sigmas[-1], len(sigmas)), rtol=1e-6, atol=0):
        ladder = {"num_train_timesteps": len(sigmas), "sigma_min": sigmas[-1], "sigma_max": sigmas[0]}
    else:
        squares = np.square(sigmas[::-1])
        ladder = {"trained_betas": (np.diff(squares, prepend=0.0) / (1 + squares)).tolist()}
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
    """The value, unless it is None."""
    return otherwise if value is None else value
