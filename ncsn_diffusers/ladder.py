"""
The ladder of noise levels that a network was trained on: its levels, the betas that other classes write for them, and
the way between a noise level and its index.

The index counts up from the *smallest* sigma, as diffusers counts timesteps. Between two levels it is linear in log
sigma. A level and its betas are related by

    1 + sigma_t² = Π_(s ≤ t) 1/(1 - beta_s),        alphas_cumprod_t = 1/(1 + sigma_t²).
"""

import math
from numbers import Real

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from .checks import MAX_LEVELS, check_number, short

# With sigma in this range, sigma² is a normal number in float32.
SIGMA_LIMITS = (1e-10, 1e10)

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")


class Ladder:
    """
    The trained noise levels.

    Args:
        sigmas (`np.ndarray` of shape `(num_levels,)`): The levels, rising, in float64, in the network's units.

    Attributes:
        smallest, largest (`float`): The first and the last level.
    """

    def __init__(self, sigmas: np.ndarray):
        self.sigmas = sigmas
        self.smallest, self.largest = float(sigmas[0]), float(sigmas[-1])
        self._log_sigmas = {}

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> "Ladder":
        """The ladder of any diffusers scheduler, from its `betas` of shape `(num_levels,)`."""
        # by a list: inside torch.func.vjp, which deepinv uses, tensors cannot be read by numpy
        return cls(betas_to_sigmas(np.array(betas.tolist())))

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def betas(self) -> np.ndarray:
        """beta_t = 1 - alphas_cumprod_t/alphas_cumprod_(t-1), without cancellation."""
        squares = self.sigmas**2
        return np.diff(squares, prepend=0.0) / (1 + squares)

    def sigma_at(self, index: float | torch.Tensor) -> float | torch.Tensor:
        """
        The noise levels at (fractional) indices, interpolated in log sigma.

        Args:
            index (`float` or `torch.Tensor` of any shape, floating): Those outside the ladder mean its ends.

        Returns:
            `float` or `torch.Tensor`: sigmas, of the same shape, dtype and device. A float is computed in float64.
        """
        if not isinstance(index, torch.Tensor):
            return math.exp(np.interp(index, np.arange(len(self)), np.log(self.sigmas)))
        log_sigmas = self._logs(index)
        index = index.clamp(0, len(self) - 1)
        lower = index.floor().clamp(max=len(self) - 2)
        below, above = _look_up(log_sigmas, lower.long()), _look_up(log_sigmas, lower.long() + 1)
        return torch.lerp(below, above, index - lower).exp()

    def index_of(self, sigma: float | torch.Tensor) -> float | torch.Tensor:
        """
        The (fractional) indices of noise levels, the inverse of [`sigma_at`].

        Args:
            sigma (`float` or `torch.Tensor` of any shape, floating):
                Above 0. Levels outside the ladder are given the index of its end.

        Returns:
            `float` or `torch.Tensor`: indices, of the same shape, dtype and device. A float is computed in float64.
        """
        if not isinstance(sigma, torch.Tensor):
            return float(np.interp(math.log(sigma), np.log(self.sigmas), np.arange(len(self))))
        log_sigmas = self._logs(sigma)
        values = sigma.log().clamp(log_sigmas[0], log_sigmas[-1])
        upper = torch.searchsorted(log_sigmas, values).clamp(1, len(self) - 1)
        below, above = _look_up(log_sigmas, upper - 1), _look_up(log_sigmas, upper)
        return upper - 1 + (values - below) / (above - below)

    def spaced_levels(self, num: int, timestep_spacing: str) -> np.ndarray:
        """
        Levels at equal distances of their (fractional) indices, as Table 2 of Lin et al. 2023, arXiv:2305.08891, has it
        for timesteps, without rounding.

        Args:
            num (`int`): Their number.
            timestep_spacing (`str`): `"linspace"`, `"leading"` or `"trailing"`.

        Returns:
            `np.ndarray` of shape `(num,)`: falling, in float64.

        Raises:
            ValueError: there are more than trained ones, with `"trailing"`.
        """
        num_train = len(self)
        if timestep_spacing == "linspace":
            indices = np.linspace(num_train - 1, 0, num)
        elif timestep_spacing == "leading":
            indices = np.arange(num)[::-1] * num_train / num
        else:
            if num > num_train:
                raise ValueError(
                    f"`num_inference_steps`={num} with timestep_spacing='trailing' must be at most num_train_timesteps="
                    f"{num_train}; timestep_spacing='linspace' takes any number."
                )
            indices = num_train - 1 - np.arange(num) * num_train / num
        return self.sigma_at(torch.from_numpy(indices)).numpy()

    def _logs(self, like: torch.Tensor) -> torch.Tensor:
        """log sigma, copied once for each device."""
        key = (like.device, like.dtype)
        if key not in self._log_sigmas:
            self._log_sigmas[key] = torch.from_numpy(np.log(self.sigmas)).to(like.dtype).to(like.device)
        return self._log_sigmas[key]


def _look_up(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """
    `values[index]`, which for an index without dimensions would wait for the device. `take` has no kernel for Apple's
    GPUs.
    """
    return values.index_select(0, index.flatten()).reshape(index.shape)


def betas_to_sigmas(betas: np.ndarray) -> np.ndarray:
    """The levels of the given betas, rising, in float64."""
    with np.errstate(over="ignore"):
        return np.sqrt(np.expm1(-np.cumsum(np.log1p(-betas))))


def train_sigmas(num_train_timesteps, sigma_min, sigma_max, beta_schedule, beta_start, beta_end, trained_betas):
    """The trained ladder, rising, float64, of shape `(num_train_timesteps,)`."""
    check_number("sigma_min", sigma_min, *SIGMA_LIMITS)
    check_number("sigma_max", sigma_max, *SIGMA_LIMITS)
    if beta_schedule == "geometric" and trained_betas is None:
        if sigma_min >= sigma_max:
            raise ValueError(f"`sigma_min`={sigma_min} must be below `sigma_max`={sigma_max}.")
        ladder = f"`sigma_min`={sigma_min} and `sigma_max`={sigma_max}"
        sigmas = np.geomspace(sigma_min, sigma_max, num_train_timesteps)
    else:
        if trained_betas is not None:
            ladder, betas = "`trained_betas`", check_betas(trained_betas)
        else:
            ladder = f"`beta_schedule`={beta_schedule!r}"
            betas = _schedule_betas(num_train_timesteps, beta_schedule, beta_start, beta_end)
        sigmas = betas_to_sigmas(betas)
        for name, value, default, actual in (
            ("sigma_min", sigma_min, 0.01, sigmas[0]),
            ("sigma_max", sigma_max, 50.0, sigmas[-1]),
        ):
            if value != default:
                check_end(name, value, actual)

    low, high = SIGMA_LIMITS
    # between neighbors that are equal in float32 no level could be interpolated
    rise = all(np.all(np.diff(a.astype(np.float32)) > 0) for a in (sigmas, np.log(sigmas)))
    if not (rise and low <= sigmas[0] and sigmas[-1] <= high):
        raise ValueError(
            f"{ladder}: the {len(sigmas)} noise levels go from {sigmas[0]:g} to {sigmas[-1]:g}; they must lie between "
            f"{low:g} and {high:g}, and they and their logarithms must rise from each to the next in float32."
        )
    return sigmas


def check_betas(trained_betas) -> np.ndarray:
    """`trained_betas` in float64, of shape `(num_train_timesteps,)`."""
    needed = f"from 2 to {MAX_LEVELS} numbers in a row, each above 0 and below 1"
    if isinstance(trained_betas, torch.Tensor):
        trained_betas = trained_betas.numpy(force=True)
    if not isinstance(trained_betas, (list, tuple, np.ndarray)) or not 2 <= len(trained_betas) <= MAX_LEVELS:
        count = f"{len(trained_betas)} of them" if isinstance(trained_betas, (list, tuple, np.ndarray)) else "it"
        raise ValueError(f"`trained_betas` must be {needed}, not {count}: {short(trained_betas)}.")
    if not all(isinstance(beta, Real) and not isinstance(beta, (bool, np.bool_)) for beta in trained_betas):
        raise ValueError(f"`trained_betas` must be {needed}, not {short(trained_betas)}.")
    betas = np.asarray(trained_betas, dtype=np.float64)
    if not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"`trained_betas`, from {betas.min():g} to {betas.max():g}, must be {needed}.")
    return betas


def _schedule_betas(num_train_timesteps, beta_schedule, beta_start, beta_end) -> np.ndarray:
    """The betas of diffusers' schedule, in float64, of shape `(num_train_timesteps,)`."""
    if beta_schedule == "squaredcos_cap_v2":
        return betas_for_alpha_bar(num_train_timesteps).double().numpy()
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        check_number(name, value, above=0, below=1)
    power = 0.5 if beta_schedule == "scaled_linear" else 1
    return np.linspace(beta_start**power, beta_end**power, num_train_timesteps) ** (1 / power)


def check_end(name, value, actual):
    if not math.isclose(value, actual, rel_tol=1e-4):
        raise ValueError(
            f"`{name}`={value} contradicts the ladder that the betas define, whose {name} is {actual:.6g}. Leave "
            "it out, or leave out `trained_betas` if beta_schedule='geometric' is to define the ladder, or choose the "
            "levels to sample with `set_timesteps(sigmas=...)`."
        )
