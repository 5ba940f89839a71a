"""Checks of numbers that schedulers and pipelines share: each names the argument, the value and what is accepted."""

import math
import reprlib
from itertools import groupby
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

MAX_LEVELS = 100_000
MAX_STEPS = 1_000_000


def short(value: Any) -> str:
    return reprlib.repr(value)


def check_choice(name, value, choices):
    if not isinstance(value, type(choices[0])) or isinstance(value, bool) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, not {short(value)}.")


def check_flag(name, value):
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False, not {short(value)}.")


def check_count(name, value, at_least=1, at_most=math.inf):
    if isinstance(value, bool) or not isinstance(value, Integral) or not at_least <= value <= at_most:
        limits = f"of at least {at_least}" if math.isinf(at_most) else f"from {at_least} to {at_most}"
        raise ValueError(f"`{name}` must be an int {limits}, not {short(value)}.")


def check_number(name, value, at_least=-math.inf, at_most=math.inf, above=-math.inf, below=math.inf):
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and at_least <= value <= at_most and above < value < below):
        limits = [(at_least, "of at least"), (above, "above"), (at_most, "at most"), (below, "below")]
        stated = " and ".join(f"{word} {limit:g}" for limit, word in limits if math.isfinite(limit))
        raise ValueError(f"`{name}` must be a finite number {stated}, not {short(value)}.")


def check_steps(num_langevin_steps, num_levels=1):
    check_count("num_langevin_steps", num_langevin_steps, at_most=MAX_STEPS)
    if num_levels * num_langevin_steps > MAX_STEPS:
        raise ValueError(
            f"`num_langevin_steps`={num_langevin_steps} at each of {num_levels} levels makes "
            f"{num_levels * num_langevin_steps} steps; a chain has at most {MAX_STEPS}."
        )


def check_levels(name, values, low, high, num_steps, extra, denoise=None) -> np.ndarray:
    """
    The distinct levels, falling, float64, from what may be a whole chain's table: each `num_steps` times, the last
    once more if `extra`, and a 0 at the end where `denoise` says what the chain does there (`None`: no 0 is meant).
    """
    if isinstance(values, torch.Tensor):
        values = values.numpy(force=True)
    try:
        given = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):  # ragged, or no numbers
        raise ValueError(f"`{name}` must be a list of numbers, not {short(values)}.") from None
    if given.ndim != 1 or not len(given):
        raise ValueError(f"`{name}` must be a list of at least one number, not an array of shape {given.shape}.")
    if len(given) > MAX_STEPS:
        raise ValueError(f"`{name}` has {len(given)} values; a chain has at most {MAX_STEPS} steps.")

    if denoise is not None and given[-1] == 0 and len(given) > 1:
        if not denoise:
            raise ValueError(
                f"`{name}` ends in 0, the final denoising, but `denoise_final` is False: leave the 0 out, or make the "
                "scheduler with `denoise_final=True`."
            )
        given = given[:-1]
    runs = [(level, len(list(run))) for level, run in groupby(given.tolist())]
    levels, counts = np.array([level for level, _ in runs]), [count for _, count in runs]
    if len(levels) > MAX_LEVELS:
        raise ValueError(f"`{name}` must be at most {MAX_LEVELS} levels, not {len(levels)}.")
    if not np.all(np.diff(levels.astype(np.float32)) < 0):  # what is shown, and given to the network
        raise ValueError(f"`{name}` must fall from each value to the next, not {short(given.tolist())}.")
    whole = [set(counts), {*counts[:-1], counts[-1] - 1}] if extra else [set(counts)]
    if not any(count in ({1}, {num_steps}) for count in whole):
        raise ValueError(
            f"`{name}` must fall from each value to the next, or hold each num_langevin_steps={num_steps} times, not "
            f"{short(given.tolist())}."
        )
    if not np.all((levels >= low) & (levels <= high)):
        hint = "" if denoise is None else "; a 0 stands for the final denoising, at the end only"
        raise ValueError(f"`{name}` must be from {low:g} to {high:g}, not {short(given.tolist())}{hint}.")
    return levels
