"""
A scheduler's chain as the loop sees it: whatever the scheduler's sample is, the denoiser is given x = x0 + sigma z.

The sample of `AnnealedLangevinScheduler` ([`Chain`]) is x. That of a scheduler of diffusers ([`StockChain`]) is x or
x/√(1 + sigma²); `scale_model_input` makes x/√(1 + sigma²) of either.
"""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import MAX_LEVELS, check_count
from .denoiser import Denoiser
from .foreign_configs import is_langevin

# These draw noise in their steps that cannot be given to them.
_OWN_NOISE = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "SASolverScheduler",
)


def make_chain(scheduler: SchedulerMixin, *args, **kwargs) -> "Chain":
    """The [`Chain`] or [`StockChain`] of a scheduler."""
    return (Chain if is_langevin(scheduler) else StockChain)(scheduler, *args, **kwargs)


class Chain:
    """
    The steps of an `AnnealedLangevinScheduler`.

    Args:
        scheduler ([`AnnealedLangevinScheduler`]): It is set to the chain.
        network ([`Denoiser`]): Whose outputs the scheduler is given.
        device (`torch.device`): Where the samples are.
        settings (`dict`): Of `scheduler.set_timesteps`.
        total (`float`, defaults to 1.0): The sum of a product's weights. The chain's levels are divided by its root.
        strength (`float`, defaults to 1.0): The share of the steps that is taken, the last ones.

    Attributes:
        timesteps: Of each step, of shape `()`, on `device`.
        sigmas: The noise level of each step.
        first_sigma: The level that the whole chain begins at.

    Raises:
        ValueError: the scheduler does not take these settings.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        network: Denoiser,
        device: torch.device,
        settings: dict[str, Any],
        total: float = 1.0,
        strength: float = 1.0,
    ):
        self.scheduler, self.network = scheduler, network
        self._arguments = (network, device, settings, total, strength)
        levels = self._set_timesteps(device, settings, total)
        order = scheduler.order  # a scheduler of order 2 takes its timesteps in pairs, which stay together
        num_steps = math.ceil(len(levels) / order)
        self.begin = order * (num_steps - max(1, round(num_steps * strength)))
        self.timesteps = scheduler.timesteps[self.begin :].unbind()
        self.first_sigma, self.sigmas = levels[0], levels[self.begin :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)  # spares the schedulers a search on the device, too
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def _set_timesteps(self, device, settings: dict[str, Any], total: float) -> list[float]:
        """The noise level of each step of the whole chain, which the scheduler is set to."""
        self.scheduler.set_timesteps(device=device, **settings)
        if abs(total - 1) > 1e-6:
            levels = self.scheduler.sigmas[:-1] / total**0.5  # those at which the networks are told their own ladder
            settings = {key: value for key, value in settings.items() if key == "num_langevin_steps"}
            self.scheduler.set_timesteps(sigmas=levels, device=device, **settings)
        return self.scheduler.sigmas[:-1].tolist()

    def start(self, noise: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        """The first sample of a chain from standard normal `noise`, around the `middle` of the data."""
        return middle + noise * self.scheduler.init_noise_sigma  # sigma_1 may not be much larger than the middle

    def start_from(self, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The first sample of a chain from noised `data`."""
        return self.scheduler.add_noise(data, noise, self.timesteps[0][None])

    def to_x(self, sample: torch.Tensor, i: int) -> torch.Tensor:
        """x = x0 + sigma z before step i."""
        return sample

    def settle(self, denoiser: Callable, sample: torch.Tensor, i: int) -> torch.Tensor:
        """The sample before step i, exchanged by a denoiser that does so."""
        return denoiser.settle(sample, self.sigmas[i])

    def step(
        self,
        denoised: torch.Tensor,
        x: torch.Tensor,
        i: int,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The sample after step i.

        Args:
            denoised (`torch.Tensor` of shape `(n, channels, ...)`): D(x, sigma) or what takes its place.
            x, sample (`torch.Tensor` of the same shape): As [`to_x`] has them.
            generator (`torch.Generator` or a list of them, *optional*): The randomness of the noise.
            noise (`torch.Tensor` of the same shape, *optional*): Standard normal, instead of one drawn here.
        """
        extra = {"generator": generator} if self._takes_generator else {}
        if noise is not None:
            extra["variance_noise"] = noise
        output = self.network.to_output(denoised, x, self.sigmas[i])
        return self.scheduler.step(output, self.timesteps[i], sample, return_dict=False, **extra)[0]

    def draws_noise(self) -> list[bool]:
        """
        Whether each step draws noise.

        Raises:
            ValueError: the scheduler draws noise that cannot be given to [`step`].
        """
        return [row.c > 0 for row in self.scheduler.table[self.begin :]]

    def without_memory(self) -> "Chain":
        """The same levels by steps that remember no other step, for samples that are exchanged between two steps."""
        # of first order, whose rate is another, it remembers nothing
        return Chain(type(self.scheduler).from_config(self.scheduler.config, solver_order=1), *self._arguments)


class StockChain(Chain):
    """The steps of a scheduler of diffusers; arguments as of [`Chain`]."""

    def __init__(self, scheduler, network, device, settings, total=1.0, strength=1.0):
        super().__init__(scheduler, network, device, settings, total, strength)
        if strength == 1:
            _check_first_level(scheduler, network, self.first_sigma, settings["num_inference_steps"])

    def _set_timesteps(self, device, settings: dict[str, Any], total: float) -> list[float]:
        _check_settings(self.scheduler, settings, total)
        self.scheduler.set_timesteps(device=device, **settings)
        return [self.network.ladder.sigma_at(t) for t in self.scheduler.timesteps.tolist()]

    def start(self, noise: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        return noise * self.scheduler.init_noise_sigma  # which scales the data

    def to_x(self, sample: torch.Tensor, i: int) -> torch.Tensor:
        return (1 + self.sigmas[i] ** 2) ** 0.5 * self.scheduler.scale_model_input(sample, self.timesteps[i])

    def settle(self, denoiser: Callable, sample: torch.Tensor, i: int) -> torch.Tensor:
        if i % self.scheduler.order:  # steps of a pair stay together
            return sample
        unit = float(self.to_x(torch.ones((), dtype=sample.dtype), i))
        return denoiser.settle(unit * sample, self.sigmas[i]) / unit

    def draws_noise(self) -> list[bool]:
        name = type(self.scheduler).__name__
        stochastic = str(self.scheduler.config.get("algorithm_type")).startswith("sde")
        takes_noise = "variance_noise" in inspect.signature(self.scheduler.step).parameters
        if name in _OWN_NOISE or (stochastic and not takes_noise):
            raise ValueError(
                f"{name} draws noise in its steps that cannot be mixed: interpolate with AnnealedLangevinScheduler or "
                "a deterministic scheduler, such as DDIMScheduler."
            )
        return [stochastic] * len(self.timesteps)

    def without_memory(self) -> "StockChain":
        chain = copy.copy(self)
        chain.scheduler = _Restarting(self.scheduler, self.begin)
        return chain


class _Restarting:
    """
    A scheduler of diffusers that begins anew at each step, from the row `begin` of its chain on. Steps of one
    evaluation each begin anew together where the scheduler takes them in pairs.
    """

    def __init__(self, scheduler: SchedulerMixin, begin: int):
        self._scheduler, self._begin, self._row, self._current = scheduler, begin, begin, None

    def __getattr__(self, name: str):
        return getattr(self._scheduler, name)

    def _scheduler_of_this_row(self):
        if self._current is None:
            self._current = copy.deepcopy(self._scheduler)
            if hasattr(self._current, "set_begin_index"):
                self._current.set_begin_index(self._row)
        return self._current

    def scale_model_input(self, sample, timestep):
        return self._scheduler_of_this_row().scale_model_input(sample, timestep)

    def step(self, *args, **kwargs):
        result = self._scheduler_of_this_row().step(*args, **kwargs)
        self._row += 1
        if (self._row - self._begin) % self._scheduler.order == 0:
            self._current = None
        return result


# Checks


def check_begins_anywhere(scheduler: SchedulerMixin, name: str) -> None:
    """
    Raises:
        ValueError: the argument `name` needs a chain that begins in its middle, and this one cannot.
    """
    if isinstance(scheduler, PNDMScheduler):
        raise ValueError(
            f"`{name}` needs a scheduler that can begin in the middle of its chain; PNDMScheduler, whose first "
            "steps differ from the others, cannot: take DDIMScheduler, for example."
        )


def _check_settings(scheduler: SchedulerMixin, settings: dict[str, Any], total: float) -> None:
    """Whether a scheduler of diffusers takes what a call asks of its chain."""
    name = type(scheduler).__name__
    for key in settings.keys() - {"num_inference_steps"}:
        raise ValueError(
            f"`{key}`={settings[key]} is for AnnealedLangevinScheduler; {name} takes one step at each of its own "
            "levels."
        )
    num_inference_steps = settings["num_inference_steps"]
    check_count("num_inference_steps", num_inference_steps, at_most=MAX_LEVELS)
    if abs(total - 1) > 1e-6:
        raise ValueError(
            f"`class_labels` with weights whose sum is {total:g} need AnnealedLangevinScheduler, since {name} "
            "cannot have its levels divided by the root of that sum. A sum of 1 works with every scheduler."
        )
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps and num_inference_steps < 4:
        raise ValueError(
            f"`num_inference_steps`={num_inference_steps} is too few for {name}, whose first, Runge-Kutta "
            "steps need 4 levels: take at least 4, or DDIMScheduler, or "
            f"{name}.from_config(pipe.scheduler.config, skip_prk_steps=True)."
        )


def _check_first_level(scheduler: SchedulerMixin, network: Denoiser, sigma: float, num_inference_steps: int) -> None:
    """With one level, diffusers' spacings "linspace" and "leading" begin at the smallest, on noise alone."""
    if sigma < 0.5 * min(1.0, network.ladder.largest):
        raise ValueError(
            f"`num_inference_steps`={num_inference_steps} is too few for {type(scheduler).__name__}, which "
            f"would begin at sigma={sigma:.2g} and return noise: take more, or set timestep_spacing='trailing'."
        )
