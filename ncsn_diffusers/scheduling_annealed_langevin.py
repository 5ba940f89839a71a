"""Annealed Langevin dynamics (Song & Ermon 2019, arXiv:1907.05600) as a diffusers scheduler.

Symbols
-------
`sigma` is the standard deviation of the noise, in the network's units (images in [-1, 1]); `x` the noisy sample,
x = x0 + sigma z with z ~ N(0, I); `score` the gradient of log p_sigma(x) with respect to x; `denoised` is
D(x, sigma) = x + sigma² score (Tweedie's formula); `r` the relative step size, alpha/sigma² in the papers' letters.

The table
---------
Every Langevin step is one affine map,

    x' = kappa x + (1 - kappa) D + c z,                                                        (1)

so the sampler is a table with the columns sigma, kappa and c, one row for each step:

    rule                                         kappa                      c
    "euler_maruyama", the paper's algorithm 1    1 - r                      sigma √(2r)
    "consistent"                                 1 - r                      sigma √(1 - kappa²)
    "consistent", last step of a level           min(1 - r, sigma'/sigma)   √(sigma'² - kappa² sigma²)
    final denoising                              0                          0

A consistent step leaves exactly the noise level that the next step expects, whatever r is, where Euler–Maruyama leaves
more than that. sigma' is the level that follows. (The name is from consistent annealed sampling, Jolicoeur-Martineau
et al. 2020, arXiv:2009.05475, the case of one step a level.)

Second order
------------
(1) holds D still while the noise falls from sigma to sigma'. In lambda = -log sigma, over a step of length
h = log(sigma/sigma'), it is the exact solution of

    dx = b (D - x) dlambda + sigma √(2 (b - 1)) dw        with the rate b = -log(kappa)/h:                   (2)

b = 1 is the noiseless ODE, b = 2 the reverse SDE of DDPM. If D goes on changing as it did over the step before, of
length h_, at whose beginning it was D_, the step gains about ½ (1 - kappa) (h/h_) (D - D_). Part of D - D_ is the
response to that step's noise. This is no error: it stands for the response to the present step's noise, which (1)
leaves out as well, and for Gaussian data the mean and the variance are right to second order. With few steps the
result is still too wide. A factor q corrects this, without another network evaluation:

    x' = kappa x + (1 - kappa) D + ½ (1 - kappa) q (h/h_) (D - D_) + c z                                     (3)
    q = min(1, 1 - b h/(2 (b + 1)) + b h²/(b + 6))

The factor is derived, not fitted to a network. Let the data be Gaussian with variance s², g = s²/(s² + sigma²), so that
D = g x, and all steps be equal. Expanding (3) with q = 1 - u h, the variance of x' differs from s² + sigma'² by

    b² s² (1 - g) (3 g/2 - b (1 - g) - u) h³ + O(h⁴),

and the terms in h and h² vanish. An error made at sigma reaches the end multiplied by g^b, since a small error of the
variance decays with the rate 2 b (1 - g) and dlog(g)/dlambda = 2 (1 - g). Their sum over a ladder that leads from g = 0
to g = 1, with dlambda = dg/(2 g (1 - g)), vanishes for

    ∫₀¹ g^(b-1) (3 g/2 - b (1 - g) - u) dg = 1/(2 (b + 1)) - u/b = 0,        that is u = b/(2 (b + 1)),

*for every s*: all directions of the data are right at once. The term in h² is the same condition at finite h,
found from the exact recursion. On a geometric ladder from 50 to 0.01 the variance is then right within 0.6 % with 20
evaluations and within 0.2 % from 35 on, for every s from 0.3 to 3. kappa = sigma'/sigma (b = 1) is the multistep ODE
solver DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095) but for q.

The difference from three estimates, ½ (3 D - 4 D_ + D__) in the place of D - D_, meets that condition with q = 1. It is
left out: from 35 evaluations on the variance's error is half as large or less, but with 10 it is larger, the images
of the package's network were no better with 10 or 20, and it takes one buffer more.

h/h_ is held at 1.2, for D - D_ is too noisy to be carried further; the DDPM schedules take such steps near sigma = 0.
With several steps a level, (3) is the step that changes the level, and D_ is from the step that changed it before.

Levels and rate
---------------
For a budget of N evaluations the consistent rule lays N levels between the largest and the smallest trained one at
equal steps of sigma^(1/rho), rho = 7 (Karras et al. 2022, arXiv:2206.00364, equation 5): an error made at a large sigma
is one of the image's content, at a small sigma one of its grain. Beyond either end of them there is room for steps
that are not taken, so that the others are shorter: two where N is at most 10, one where it is at least 20. At the
largest levels, which hide everything, D is the data's mean, so the chain may start below them. The last steps would
remove noise that is hardly visible; the final denoising takes their place. From 50 to 0.01, N = 6 is 15 to
0.19, N = 10 is 22 to 0.089, N = 20 is 39 to 0.021, N = 50 is 45 to 0.014. A direction in which the data have the
deviation s loses about (sigma_L/s)² of its variance at the end; few steps cannot have that and the content, too.

The rate is b = 2 for up to 10 levels. The chain starts around 0, not around the data's mean, and ends with
(s/sigma_1)^b of the difference, which b = 1 leaves visible. Fresh noise corrects network errors, but more of it needs
more steps: the error of (3) grows like b² h². More levels are therefore shared between the two: b = 2 √(N/10), with
which the steps' error still falls like 1/N. (A network trained for an hour on a CPU gains
much, a well trained one little.) First order keeps b = 2: it has no accuracy to spare.

How the papers' step sizes relate
---------------------------------
The 2019 paper writes x += (alpha/2) score + √alpha z with alpha = epsilon sigma²/sigma_L². The authors' code and the
2020 paper (arXiv:2006.09011) write x += alpha score + √(2 alpha) z with alpha = step_lr sigma²/sigma_L². With
score = (D - x)/sigma² the second form is (1) with r = step_lr/sigma_L²; hence

    r = step_lr/sigma_L² = epsilon/(2 sigma_L²).

For epsilon = 2e-5 and sigma_L = 0.01 the paper's text means r = 0.1, its code r = 0.2. NCSNv2's CIFAR-10 setting,
step_lr = 6.2e-6, is r = 0.062. On data scaled from [0, 1] to [-1, 1] every sigma doubles and r stays.
"""

import json
import math
import os
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from .checks import MAX_LEVELS, check_choice, check_count, check_flag, check_levels, check_number, check_steps, short
from .denoiser import denoised_coefficients
from .foreign_configs import (
    BETA_SCHEDULES,
    COMPATIBLE,
    PREDICTION_TYPES,
    export_config,
    readable_config,
    translate_config,
)
from .ladder import SIGMA_LIMITS, TIMESTEP_SPACINGS, Ladder, train_sigmas

logger = logging.get_logger(__name__)

CONDITIONINGS = ("timestep", "sigma")
NOISE_RULES = ("consistent", "euler_maruyama")

# Sane limits, checked before anything is built.
RHO_LIMITS = (0.1, 1e4)

# The most that h/h_ may be in (3).
MAX_STEP_RATIO = 1.2


def langevin_rate(num_levels: int, solver_order: int) -> float:
    """The rate b of (2) when `step_size` is not given: 2, and 2 √(N/10) at second order for N > 10 levels."""
    return 2.0 * math.sqrt(max(1.0, num_levels / 10)) if solver_order == 2 else 2.0


@dataclass
class AnnealedLangevinSchedulerOutput(BaseOutput):
    """
    What [`AnnealedLangevinScheduler.step`] returns.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The sample after the step, x' of equation (1).
        pred_original_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The denoised estimate D(x, sigma) that the step used.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class AnnealedLangevinScheduler(SchedulerMixin, ConfigMixin):
    """
    Annealed Langevin dynamics over a ladder of noise levels.

    The network's level index counts up from the *smallest* sigma, as diffusers counts timesteps, and the variance
    preserving alphas_cumprod is 1/(1 + sigma²): that is what lets the stock schedulers run the same network from
    `scheduler.config`, in which a geometric ladder is written out as `trained_betas`.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Number L of noise levels that the network was trained on, at least 2.
        sigma_min (`float`, defaults to 0.01):
            Smallest noise level, in the network's units. Used by `beta_schedule="geometric"`.
        sigma_max (`float`, defaults to 50.0):
            Largest noise level, in the network's units. Used by `beta_schedule="geometric"`.
        beta_schedule (`str`, defaults to `"geometric"`):
            `"geometric"`: sigmas in geometric progression. `"linear"`, `"scaled_linear"` and `"squaredcos_cap_v2"` are
            the DDPM schedules of diffusers with sigma² = (1 - alphas_cumprod)/alphas_cumprod.
        beta_start (`float`, defaults to 0.0001):
            First beta of `"linear"` and `"scaled_linear"`.
        beta_end (`float`, defaults to 0.02):
            Last beta of `"linear"` and `"scaled_linear"`.
        trained_betas (`list[float]` or `np.ndarray`, *optional*):
            The betas themselves, each in (0, 1); they take the place of the schedule and their number that of
            `num_train_timesteps`.
        prediction_type (`str`, defaults to `"v_prediction"`):
            What the network returns: `"v_prediction"` (z - sigma x0)/√(1 + sigma²) (Salimans & Ho 2022), `"epsilon"`
            z, `"sample"` x0, `"score"` -z/sigma.
        conditioning (`str`, defaults to `"timestep"`):
            `"timestep"`: the network is given the (possibly fractional) level index and x/√(1 + sigma²). `"sigma"`:
            it is given sigma itself and x, as NCSN++ networks are; `timesteps` are then the sigmas. (The nearest term
            in diffusers is `timestep_type`, of `EulerDiscreteScheduler`.)
        num_langevin_steps (`int`, defaults to 1):
            Number T of steps a level.
        step_size (`float`, *optional*):
            Relative step size r = step_lr/sigma_L², in (0, 1]. Chosen for the ladder and T when not given: for
            `"consistent"`, so that a level contracts by (sigma'/sigma)^b, b = 2 for up to 10 levels and more for more;
            for `"euler_maruyama"` by technique 4 of NCSNv2.
        noise_rule (`str`, defaults to `"consistent"`):
            `"consistent"` or `"euler_maruyama"`, see the module's docstring. (The nearest term in diffusers is
            `algorithm_type`, of `DPMSolverMultistepScheduler`.)
        solver_order (`int`, defaults to 2):
            2 takes the consistent rule's steps between levels by (3), 1 by (1), as `"euler_maruyama"` always does.
        denoise_final (`bool`, defaults to `True`):
            End on the denoised estimate: the consistent rule's last step lands on it, Euler–Maruyama takes one more
            evaluation (as NCSNv2 does). `False` ends at the noise level sigma_L (as the 2019 paper does). (In diffusers
            these are `final_sigmas_type="zero"` and `"sigma_min"`, of `DPMSolverMultistepScheduler`.)
        clip_sample (`bool`, defaults to `False`):
            Clip the denoised estimate to `[-clip_sample_range, clip_sample_range]`.
        clip_sample_range (`float`, defaults to 1.0):
            See `clip_sample`; in the network's units.
        timestep_spacing (`str`, defaults to `"linspace"`):
            How `num_inference_steps` levels are laid over the trained ones under `"euler_maruyama"` or without `rho`:
            `"linspace"`, `"leading"` or `"trailing"`, Table 2 of Lin et al. 2023, arXiv:2305.08891. Levels between
            trained ones are used as they are, unrounded.
        rho (`float`, *optional*, defaults to 7.0):
            The consistent rule's levels are equally spaced in sigma^(1/rho), see the module's docstring; from 0.1 to
            10,000. `None` leaves them to `timestep_spacing`.

    A ladder has at most 100,000 levels, each sigma from 1e-10 to 1e10, and a chain at most 1,000,000 steps.

    Raises:
        ValueError: an argument is of the wrong type or out of range, or `sigma_min` or `sigma_max` contradicts the
            given betas.
    """

    _compatibles = list(COMPATIBLE)
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        beta_schedule: str = "geometric",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: str = "v_prediction",
        conditioning: str = "timestep",
        num_langevin_steps: int = 1,
        step_size: float | None = None,
        noise_rule: str = "consistent",
        solver_order: int = 2,
        denoise_final: bool = True,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        rho: float | None = 7.0,
    ):
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("conditioning", conditioning, CONDITIONINGS)
        check_choice("noise_rule", noise_rule, NOISE_RULES)
        check_choice("solver_order", solver_order, (1, 2))
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        check_flag("denoise_final", denoise_final)
        check_flag("clip_sample", clip_sample)
        check_count("num_train_timesteps", num_train_timesteps, at_least=2, at_most=MAX_LEVELS)
        check_steps(num_langevin_steps)
        check_number("clip_sample_range", clip_sample_range, above=0, at_most=SIGMA_LIMITS[1])
        if step_size is not None:
            check_number("step_size", step_size, above=0, at_most=1)
        if rho is not None:
            check_number("rho", rho, *RHO_LIMITS)

        sigmas = train_sigmas(
            num_train_timesteps, sigma_min, sigma_max, beta_schedule, beta_start, beta_end, trained_betas
        )
        self.ladder = Ladder(sigmas)
        self.betas = torch.from_numpy(self.ladder.betas).float()
        self.alphas_cumprod = torch.from_numpy(1 / (1 + sigmas**2)).float()
        self.register_to_config(**export_config(self.config, self.ladder, type(self)))

        self.set_timesteps(sigmas=sigmas[::-1])
        self.num_inference_steps = None  # until the user chooses

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs=False, **kwargs):
        """
        As [`~ConfigMixin.from_config`], for this class's own configs, those of the stock schedulers for DDPM networks
        and `ScoreSdeVeScheduler`'s.

        A config means what the class that wrote it means:

        - A key that is missing has the default of the class that the config names: without `prediction_type`, a
          config of `DDPMScheduler` means `"epsilon"`.
        - A key that both classes spell alike and that means something else there (`solver_order`, and the Karras
          range `sigma_min`, `sigma_max` of `EulerDiscreteScheduler`) is left out. Where the config came from this
          class, its own value returns.
        - A config that names no class is this class's if it has a key that only this class knows
          (`conditioning`, `num_langevin_steps`, `step_size`, `noise_rule`, `denoise_final`,
          `beta_schedule="geometric"`), or if it has no key that this class does not know, and no betas. Any other is
          read as the config of the stock class all of whose keys it has, as a scheduler that was just made writes
          them, or else of that which knows most of its keys, `DDPMScheduler` in doubt.
        - A class whose time or scaling is another (EDM, flow matching, consistency models, IPNDM, ...) is refused, as
          are stock configs that ask for the like.

        A `noise_rule` among `kwargs` that is not the config's begins with its own defaults of `step_size`,
        `num_langevin_steps` and `denoise_final`, where `kwargs` do not give them: the config's were chosen for the
        other rule.

        A ladder given by `sigma_min`, `sigma_max` or `num_train_timesteps` among `kwargs` replaces the one that this
        class exported as `trained_betas`; a `trained_betas` that a user gave stays.

        Raises:
            ValueError: the config is of a class that cannot be read, asks for betas rescaled to zero terminal SNR
                (where sigma would be infinite), for flow matching or for EDM's time, contradicts itself, or holds a
                value that `__init__` refuses.
        """
        if config is not None and not isinstance(config, (dict, str, os.PathLike)):
            raise ValueError(f"A scheduler's config must be a dictionary, not {short(config)}.")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # Here and not in `from_config`, which a config passes by when it is given as a path.
        return super().extract_init_dict(translate_config(config_dict, cls, kwargs.get("noise_rule")), **kwargs)

    def __repr__(self) -> str:
        """The config, without the betas that follow from `sigma_min` and `sigma_max`; a user's are counted."""
        config = readable_config(json.loads(self.to_json_string()))
        betas = config.get("trained_betas")
        if betas is not None and len(betas) > 8:
            config["trained_betas"] = f"{len(betas)} betas from {min(betas):g} to {max(betas):g}"
        return f"{type(self).__name__} {json.dumps(config, indent=2)}\n"

    # Noise levels

    def t_to_sigma(self, timesteps: float | torch.Tensor) -> torch.Tensor:
        """
        The noise levels at timesteps: [`Ladder.sigma_at`], or the identity for `conditioning="sigma"`.

        Args:
            timesteps (`float` or `torch.Tensor` of any shape): what the network is given.

        Returns:
            `torch.Tensor`: sigmas, of the same shape, on the same device, in the network's units.
        """
        timesteps = _floating(timesteps)
        return timesteps if self.config.conditioning == "sigma" else self.ladder.sigma_at(timesteps)

    def sigma_to_t(self, sigmas: float | torch.Tensor) -> torch.Tensor:
        """
        The (fractional) timesteps of noise levels, the inverse of [`t_to_sigma`].

        Args:
            sigmas (`float` or `torch.Tensor` of any shape):
                Noise levels above 0, in the network's units; those outside the ladder are given its ends' timesteps.

        Returns:
            `torch.Tensor`: timesteps, of the same shape, on the same device.
        """
        sigmas = _floating(sigmas)
        return sigmas if self.config.conditioning == "sigma" else self.ladder.index_of(sigmas)

    # Before the chain

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | torch.Tensor | None = None,
        timesteps: list[float] | np.ndarray | torch.Tensor | None = None,
        num_langevin_steps: int | None = None,
    ) -> None:
        """
        Choose the levels and write the table. Exactly one of the first, third and fourth argument is given.

        The chain has L·T rows, and so many network evaluations; Euler–Maruyama with `denoise_final` one more.

        Args:
            num_inference_steps (`int`, *optional*):
                Number L of levels, from 1 up, laid over the trained ladder by `rho`, or by `timestep_spacing`.
            device (`str` or `torch.device`, *optional*): where `timesteps` are to be.
            sigmas (`list[float]`, *optional*):
                The levels themselves, falling, from 1e10 to 1e-10, in the network's units. A 0 at the end stands for
                the final denoising; so `scheduler.sigmas` can be given, in which each level is repeated T times.
            timesteps (`list[float]`, *optional*):
                The levels as timesteps, falling, from num_train_timesteps - 1 to 0; fractions are allowed, and T
                repetitions of each, as in `scheduler.timesteps`.
            num_langevin_steps (`int`, *optional*): Number T of steps a level; the config's when not given.

        Raises:
            ValueError: no levels are given, or twice, or they do not fall, or they are outside their range, or there
                are more than 100,000 levels or 1,000,000 steps, or a final 0 contradicts `denoise_final=False`.
        """
        given = [a is not None for a in (num_inference_steps, sigmas, timesteps)]
        if sum(given) != 1:
            raise ValueError(
                "Give exactly one of `num_inference_steps`, `sigmas` and `timesteps`, not num_inference_steps="
                f"{short(num_inference_steps)}, sigmas={short(sigmas)}, timesteps={short(timesteps)}."
            )
        if num_langevin_steps is None:
            num_langevin_steps = self.config.num_langevin_steps
        check_steps(num_langevin_steps)
        denoise, paper = self.config.denoise_final, self.config.noise_rule == "euler_maruyama"

        if sigmas is not None:
            # the last level is listed once more for the paper's final denoising, or as the end's own noise level
            levels = check_levels(
                "sigmas", sigmas, *SIGMA_LIMITS, num_langevin_steps, extra=paper or not denoise, denoise=denoise
            )
        elif timesteps is None:
            check_count("num_inference_steps", num_inference_steps, at_most=MAX_LEVELS)
            if self.config.rho is None or paper:
                levels = self.ladder.spaced_levels(num_inference_steps, self.config.timestep_spacing)
            else:
                levels = self._budget_levels(num_inference_steps)
        else:
            limits = SIGMA_LIMITS if self.config.conditioning == "sigma" else (0, len(self) - 1)
            timesteps = check_levels("timesteps", timesteps, *limits, num_langevin_steps, extra=paper and denoise)
            levels = self.t_to_sigma(timesteps).numpy()
        check_steps(num_langevin_steps, len(levels))

        rows = self._make_table(levels.tolist(), num_langevin_steps)
        row_sigmas = torch.tensor([row.sigma for row in rows], dtype=torch.float64)
        final_sigma = 0.0 if denoise else levels[-1]

        self.table = rows
        self.num_inference_steps = len(levels)
        self.timesteps = self.sigma_to_t(row_sigmas).to(device=device, dtype=torch.float32)
        self.sigmas = torch.cat([row_sigmas, torch.tensor([final_sigma])]).float()
        # √(sigma_1² + data variance), with the variance 1 that images in [-1, 1] can have at most: the network's
        # input, x/√(1 + sigma_1²), then starts as unit noise.
        self.init_noise_sigma = math.sqrt(levels[0] ** 2 + 1)
        self._begin_index = None
        self._restart(None)

    def _budget_levels(self, num: int) -> np.ndarray:
        """Falling levels, equally spaced in sigma^(1/rho), of shape `(num,)`."""
        largest, smallest = self.ladder.sigmas[[-1, 0]] ** (1 / self.config.rho)
        above = min(2.0, max(1.0, 3 - num / 10))  # steps left out
        below = above if self.config.denoise_final else 0  # else the last level is where the chain ends
        way = (above + np.arange(num)) / (above + num - 1 + below)  # from the largest, 0, to the smallest, 1
        return ((1 - way) * largest + way * smallest) ** self.config.rho

    def _make_table(self, levels: list[float], num_steps: int) -> list["Row"]:
        """The rows of the module docstring's table for `num_steps` steps at each of the falling `levels`."""
        denoise, paper = self.config.denoise_final, self.config.noise_rule == "euler_maruyama"
        ratios = [above / below for above, below in pairwise(levels)]  # sigma/sigma' of each level but the last
        ratios.append(ratios[-1] if ratios else math.e)  # the last level follows the one before it; a lone one: h = 1
        if self.config.step_size is not None:
            step_sizes = [self.config.step_size] * len(levels)
        elif paper:
            mean_ratio = (levels[0] / levels[-1]) ** (1 / max(len(levels) - 1, 1))
            step_sizes = [technique_4(mean_ratio, num_steps)] * len(levels)
        else:
            rate = langevin_rate(len(levels), self.config.solver_order)
            step_sizes = [1 - ratio ** (-rate / num_steps) for ratio in ratios]

        rows = []
        for i, (sigma, r) in enumerate(zip(levels, step_sizes, strict=True)):
            if paper:
                rows += [Row(sigma, kappa=1 - r, c=sigma * math.sqrt(2 * r))] * num_steps
                continue
            rows += [Row(sigma, kappa=1 - r, c=sigma * math.sqrt(1 - (1 - r) ** 2))] * (num_steps - 1)

            last_level = i == len(levels) - 1
            next_sigma = levels[i + 1] if not last_level else (0.0 if denoise else sigma)
            kappa = min(1 - r, next_sigma / sigma)
            c = sigma * math.sqrt((next_sigma / sigma) ** 2 - kappa**2)
            extrapolation = 0.0
            if self.config.solver_order == 2 and i > 0 and not last_level:
                h, h_ = math.log(ratios[i]), math.log(ratios[i - 1])
                b = -math.log(kappa) / h if kappa > 0 else math.inf
                q = min(1 - h / (2 * (1 + 1 / b)) + h**2 / (1 + 6 / b), 1)
                extrapolation = (1 - kappa) / 2 * q * min(h / h_, MAX_STEP_RATIO)  # (3)
            rows.append(Row(sigma, kappa, c, extrapolation, changes_level=not last_level))
        if paper and denoise:
            rows.append(Row(levels[-1], kappa=0.0, c=0.0))
        return rows

    def reorder(self, indices: torch.Tensor) -> None:
        """
        Take the samples in another order, or some of them several times, in the middle of a chain.

        Args:
            indices (`torch.Tensor` of shape `(batch_size,)`): Which sample goes on in each place.
        """
        if self._previous_denoised is not None:
            self._previous_denoised = self._previous_denoised[indices]

    @property
    def step_index(self) -> int | None:
        """The row that the next [`step`] takes; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The row that the chain begins with, as [`set_begin_index`] set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Begin the chain at row `begin_index`: a pipeline that says so spares the search for the first timestep (a
        host–device synchronization), and one that starts from a noised image skips the levels above it.

        Raises:
            ValueError: there is no such row.
        """
        check_count("begin_index", begin_index, at_least=0, at_most=len(self.table) - 1)
        self._begin_index = int(begin_index)
        self._restart(None)

    def _restart(self, step_index: int | None) -> None:
        self._step_index = step_index
        self._previous_denoised = None

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        The network's input: x/√(1 + sigma²), or x itself for `conditioning="sigma"`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): x, in the network's units.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): one, or one for each sample.

        Returns:
            `torch.Tensor`: of the shape and dtype of `sample`.
        """
        if self.config.conditioning == "sigma":
            return sample
        return sample * (1 + self._sigma_like(timestep, sample) ** 2).rsqrt().to(sample.dtype)

    # The chain

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> AnnealedLangevinSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One Langevin step, equation (1) or (3).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                What the network returned for `sample`.
            timestep (`float` or `torch.Tensor` of one element):
                Read at the chain's first step only, to find the row, and not at all after [`set_begin_index`]; from
                then on the rows follow one another.
            sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): x, in the network's units.
            generator (`torch.Generator` or a list with one for each sample, *optional*): the noise's randomness.
            variance_noise (`torch.Tensor` of the shape of `sample`, *optional*):
                The noise z itself, standard normal, instead of one drawn here.
            return_dict (`bool`, defaults to `True`): or a plain tuple.

        Returns:
            [`AnnealedLangevinSchedulerOutput`] or `tuple`: x' and the denoised estimate D.

        Raises:
            ValueError: the chain has ended, `timestep` is not in it, or the shapes differ.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)}, but `sample` has {tuple(sample.shape)}: they "
                "must be the same (a network that also predicts a variance is not supported)."
            )
        if self._step_index is None:
            self._restart(self._find_row(timestep) if self._begin_index is None else self._begin_index)
        elif self._step_index >= len(self.table):
            raise ValueError(f"The chain of {len(self.table)} steps has ended; call `set_timesteps` for a new one.")
        row = self.table[self._step_index]
        self._step_index += 1

        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        denoised = self._to_denoised(model_output.to(x.dtype), x, row.sigma)
        if self.config.clip_sample:
            denoised = denoised.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)

        prev_sample = torch.lerp(x, denoised, 1 - row.kappa)  # (1)
        if row.extrapolation and self._previous_denoised is not None:
            prev_sample.add_(denoised - self._previous_denoised, alpha=row.extrapolation)  # (3)
        if row.c:
            if variance_noise is None:
                variance_noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            prev_sample.add_(variance_noise, alpha=row.c)
        if row.changes_level and self.config.solver_order == 2:
            # a network that returns D itself may write the next one into the same buffer, as a CUDA graph does
            self._previous_denoised = denoised.clone() if denoised is model_output else denoised

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return AnnealedLangevinSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _find_row(self, timestep: float | torch.Tensor) -> int:
        timestep = float(timestep)
        timesteps = self.timesteps.numpy(force=True)
        row = int(np.abs(timesteps - timestep).argmin())  # the first of a level's T rows
        if not math.isclose(timesteps[row], timestep, rel_tol=1e-4, abs_tol=1e-4):
            raise ValueError(
                f"`timestep`={timestep:g} is not in this chain, whose nearest is {timesteps[row]:g}. Take the "
                "timesteps from `scheduler.timesteps`, or say where to begin with `set_begin_index`."
            )
        last = row + int(np.count_nonzero(timesteps == timesteps[row])) - 1
        if 0 < row < last:
            logger.warning(
                f"`timestep`={timestep:g} stands for the rows {row} to {last} of this chain, which begins with row "
                f"{row}. Say where to begin with `set_begin_index`."
            )
        return row

    # The network's output

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """
        Convert the network's output to the denoised estimate D(x, sigma), for any `prediction_type`; never clipped.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, ...)`): what the network returned for `sample`.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): one, or one for each sample.
            sample (`torch.Tensor` of shape `(batch_size, ...)`): x, in the network's units.

        Returns:
            `torch.Tensor` of shape `(batch_size, ...)`: D, in the network's units.
        """
        return self._to_denoised(model_output, sample, self._sigma_like(timestep, sample))

    def _to_denoised(self, model_output: torch.Tensor, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        a, b = denoised_coefficients(self.config.prediction_type, sigma)
        return a * x + b * model_output

    # For training

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The perturbation x = x0 + sigma z.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, ...)`): x0, in the network's units.
            noise (`torch.Tensor`, broadcastable to it): z, standard normal.
            timesteps (`torch.Tensor` of shape `()` or `(batch_size,)`): one, or one for each sample.

        Returns:
            `torch.Tensor` of shape `(batch_size, ...)`: x, in the network's units.
        """
        sigma = self._sigma_like(timesteps, original_samples).to(original_samples.dtype)
        return original_samples + sigma * noise.to(original_samples.device)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The target of `prediction_type="v_prediction"`: (z - sigma x0)/√(1 + sigma²), Salimans & Ho 2022,
        arXiv:2202.00512, in our letters.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`): x0, in the network's units.
            noise (`torch.Tensor` of shape `(batch_size, ...)`): z, standard normal.
            timesteps (`torch.Tensor` of shape `()` or `(batch_size,)`): one, or one for each sample.
        """
        sigma = self._sigma_like(timesteps, sample)
        return ((noise - sigma * sample) * (1 + sigma**2).rsqrt()).to(sample.dtype)

    def _sigma_like(self, timesteps: float | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """sigma of shape (batch_size, 1, …, 1), or () for one timestep, on the sample's device."""
        sigma = self.t_to_sigma(timesteps)
        if sigma.ndim == 0:
            return sigma if sigma.device.type == "cpu" else sigma.to(sample.device)
        return sigma.to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))

    def __len__(self) -> int:
        return self.config.num_train_timesteps


@dataclass(frozen=True)
class Row:
    """
    One step: x' = kappa x + (1 - kappa) D + extrapolation (D - D_) + c z at noise level sigma, equation (3).

    `AnnealedLangevinScheduler.table` is the list of a chain's rows.
    """

    sigma: float
    kappa: float
    c: float
    extrapolation: float = 0.0
    changes_level: bool = False


def technique_4(ratio: float, num_steps: int) -> float:
    """
    NCSNv2's technique 4: the step size r at which T Langevin steps best carry noise of `ratio` times the level's
    deviation over to the level's own, the data being a point (proposition 3 and equation 9 of arXiv:2006.09011, with
    r = epsilon/sigma_L²). Their CIFAR-10 ladder, 232 levels from 50 to 0.01 and T = 5, gives 0.062.
    """
    r = np.geomspace(1e-4, 1, 100_001)
    stationary = 2 / (2 - r)
    variance = (1 - r) ** (2 * num_steps) * (ratio**2 - stationary) + stationary
    return float(r[np.abs(variance - 1).argmin()])


def _floating(values: float | torch.Tensor) -> torch.Tensor:
    values = torch.as_tensor(values)
    return values.to(torch.promote_types(values.dtype, torch.float32))
