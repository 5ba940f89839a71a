"""
The configs that `AnnealedLangevinScheduler` writes and reads, its own and those of diffusers' schedulers, and the
schedulers that sample a network of this package.

A config means what the class that wrote it means. The rules are in the docstring of
[`AnnealedLangevinScheduler.from_config`].
"""

import inspect
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import DummyObject

from .checks import MAX_LEVELS, check_choice, check_count, check_number, short
from .ladder import SIGMA_LIMITS, Ladder, check_betas, check_end, train_sigmas

PREDICTION_TYPES = ("v_prediction", "epsilon", "sample", "score")
BETA_SCHEDULES = ("geometric", "linear", "scaled_linear", "squaredcos_cap_v2")

# These sample a network of this package from `scheduler.config` as it is.
COMPATIBLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
# All with the network's time, scaling and kind of step, whose noise `generator` reaches.
SCHEDULERS = tuple(sorted((*COMPATIBLE, "DDIMParallelScheduler", "DDPMParallelScheduler", "LMSDiscreteScheduler")))
# Their configs describe a network that AnnealedLangevinScheduler can sample: DDPM's time and scaling, or NCSN++'s.
READABLE = (
    *SCHEDULERS,
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
)
# These take no network that returns the denoised sample itself.
_NO_SAMPLE_PREDICTION = (
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)

# What describes the network rather than the sampler: it must survive every swap of schedulers, also where the other
# class takes it for its own default and would leave it out.
NETWORK_KEYS = (
    "num_train_timesteps",
    "sigma_min",
    "sigma_max",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
    "conditioning",
)
# Known to this class alone, so that another class may drop them silently where they hold their default.
SAMPLER_KEYS = ("num_langevin_steps", "step_size", "noise_rule", "denoise_final", "rho")
# What is chosen for one noise rule and does not fit the other.
RULE_KEYS = ("step_size", "num_langevin_steps", "denoise_final")

# Keys that tell a config of this class from others where it does not name its class.
OWN_KEYS = ("conditioning", "num_langevin_steps", "step_size", "noise_rule", "denoise_final")
# Keys that describe the levels as betas. In a config without a class they are DDPM's language.
BETA_KEYS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
# Spelled alike by stock classes, with another meaning: the order of another solver, and the range of their Karras
# levels rather than that of the trained ones. While another class uses the config, ours are kept under `KEPT`.
SPELLED_ALIKE = ("sigma_min", "sigma_max", "solver_order")
KEPT = "_annealed_langevin"


def export_config(config: dict[str, Any], ladder: Ladder, cls: type) -> dict[str, Any]:
    """
    What `cls.__init__` puts into its config beside or in the place of its arguments: what the ladder is, in JSON's
    types, so that the config equals its own reload, and what other classes would lose. [`translate_config`] takes it
    out again.
    """
    betas = config["trained_betas"]
    if betas is not None:
        betas = np.asarray(betas, dtype=np.float64).tolist()
    elif config["beta_schedule"] == "geometric":
        betas = ladder.betas.tolist()
    ends = {"sigma_min": ladder.smallest, "sigma_max": ladder.largest}
    # Another class leaves out what is listed as a default, which must not happen to what it shares with this one.
    defaults = sorted(set(config.get("_use_default_values", ())).intersection(SAMPLER_KEYS))
    return {
        **ends,
        "num_train_timesteps": len(ladder),
        "trained_betas": betas,
        "_class_name": cls.__name__,  # as a saved config says: swaps then drop this class's keys silently
        "_use_default_values": defaults,
        KEPT: {**ends, "solver_order": config["solver_order"]},
    }


def translate_config(config: dict[str, Any], cls: type, noise_rule: str | None = None) -> dict[str, Any]:
    """
    A config of any readable class as `cls.__init__` needs it, under `noise_rule` if that is given in the place of the
    config's own; the rules are those of `from_config`.
    """
    config = dict(config)
    kept, listed = config.pop(KEPT, None), config.pop("_use_default_values", [])
    if not isinstance(listed, (list, tuple)):
        raise ValueError(f"`_use_default_values` must be a list of keys, not {short(listed)}.")

    own = _defaults(cls)
    writer = _find_writer(config, cls)
    if writer is None:
        not_listed = NETWORK_KEYS
    else:
        not_listed = own  # what this class lists as a default and drops would get its own
        _complete(config, writer, kept, own)
    listed = [key for key in listed if key not in not_listed]
    if listed:
        config["_use_default_values"] = listed

    wish = {key: config.get(key) for key in ("prediction_type", "timestep_type")}
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "`rescale_betas_zero_snr`=True puts the last noise level at infinity, where Langevin dynamics cannot "
            "start; a config with `rescale_betas_zero_snr`=False is needed."
        )
    if config.get("use_flow_sigmas") or wish["prediction_type"] == "flow_prediction":
        key = "use_flow_sigmas" if config.get("use_flow_sigmas") else "prediction_type"
        raise ValueError(
            f"`{key}`={config[key]!r} is flow matching, whose time and scaling are others: this class samples networks "
            f"with a prediction_type of {', '.join(map(repr, PREDICTION_TYPES))} and use_flow_sigmas=False."
        )
    if wish == {"prediction_type": "v_prediction", "timestep_type": "continuous"}:
        raise ValueError(
            "`timestep_type`='continuous' with prediction_type='v_prediction' gives the network EDM's time, "
            "log(sigma)/4; a config with timestep_type='discrete' is needed."
        )

    _drop_exported(config, own, is_own=writer is None)
    if noise_rule not in (None, config.get("noise_rule", own["noise_rule"])):
        config = {key: value for key, value in config.items() if key not in RULE_KEYS}
    return config


def _find_writer(config: dict[str, Any], cls: type) -> type | None:
    """The stock class whose meaning the config has; `None` for this class."""
    name = config.get("_class_name")
    if name in [base.__name__ for base in cls.__mro__]:
        return None
    fits = f"What fits are configs of {cls.__name__}, {', '.join(sorted(READABLE))}"
    if name is not None and not isinstance(name, str):
        raise ValueError(f"`_class_name` must be the name of a class, not {short(name)}. {fits}.")
    if name in READABLE and hasattr(diffusers, name):
        return getattr(diffusers, name)
    has_own_keys = any(key in config for key in OWN_KEYS) or config.get("beta_schedule") == "geometric"
    if has_own_keys and (name is None or not hasattr(diffusers, name)):  # where named, a subclass of this one
        return None

    # A scheduler that was just made has not written its class, but all of its keys.
    written = {key for key in config if not key.startswith("_")}
    if name is None and written == {"num_train_timesteps", "trained_betas"}:
        name = "IPNDMScheduler"
    if name is not None:
        raise ValueError(
            f"A config of {name} cannot be read: its time, its scaling or its steps are others than this class's, or "
            f"it is not known. {fits}. If its betas and its prediction_type mean what DDPMScheduler's do, write "
            "that as its `_class_name`."
        )
    keys = {key for key in written if config[key] is not None}
    if keys <= _defaults(cls).keys() and not keys.intersection(BETA_KEYS):
        return None
    names = ["DDPMScheduler", *(name for name in READABLE if name != "DDPMScheduler")]
    classes = [getattr(diffusers, name) for name in names if hasattr(diffusers, name)]
    known = {c: _defaults(c).keys() for c in classes if not isinstance(c, DummyObject)}
    unknown = keys - set().union(*known.values()) - _defaults(cls).keys()
    if unknown:
        raise ValueError(
            f"The config names no class, and no class that can be read knows {', '.join(sorted(unknown))}. {fits}: "
            "add the `_class_name`."
        )
    return max(known, key=lambda c: (known[c] <= written, len(known[c] & keys)))


def _complete(config: dict[str, Any], writer: type, kept: Any, own: dict[str, Any]) -> None:
    """Fill in what `writer` means by the keys that are missing, and bring back what it cannot have meant."""
    ve = writer.__name__ == "ScoreSdeVeScheduler"
    if isinstance(writer, DummyObject):
        needed = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
        missing = [key for key in needed if key not in config]
        if missing:
            raise ValueError(
                f"The config of {writer.__name__} lacks {', '.join(missing)}, and the defaults of that class can be "
                f"read only where {' and '.join(writer._backends)} are installed. Install them or add the keys."
            )
        defaults = {}
    else:
        defaults = _defaults(writer)
    if ve:  # runs NCSN++ networks, whose levels are this class's
        defaults = {**defaults, "conditioning": "sigma", "prediction_type": "score"}
        config.pop("trained_betas", None)
    else:
        for key in SPELLED_ALIKE if isinstance(kept, dict) else ("solver_order",):
            config.pop(key, None)
        # a class without the key, as RePaintScheduler, knows no other
        defaults = {"prediction_type": "epsilon", **defaults}
    for key in own:
        if key in defaults and (ve or key not in SPELLED_ALIKE):
            config.setdefault(key, defaults[key])
    if not ve and isinstance(kept, dict):
        config.update({key: kept[key] for key in SPELLED_ALIKE if key in kept})


def _drop_exported(config: dict[str, Any], own: dict[str, Any], is_own: bool) -> None:
    """
    Drop what `__init__` wrote into the config and can work out again, for the ladder that is then asked for: the betas
    of a geometric ladder, and the ends of any other.
    """
    full = {**own, **config}
    betas = full["trained_betas"]
    if full["beta_schedule"] == "geometric" and (betas is None or are_exported(betas, full)):
        config.pop("trained_betas", None)
        return
    ends = {name: config.pop(name) for name in ("sigma_min", "sigma_max") if name in config}
    if is_own and ends:  # has anybody changed one without the other?
        check_choice("beta_schedule", full["beta_schedule"], BETA_SCHEDULES)
        check_count("num_train_timesteps", full["num_train_timesteps"], at_least=2, at_most=MAX_LEVELS)
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
        ladder = {name: full[name] for name in names}
        sigmas = train_sigmas(sigma_min=own["sigma_min"], sigma_max=own["sigma_max"], **ladder)
        if "num_train_timesteps" in config and len(sigmas) != config["num_train_timesteps"]:
            raise ValueError(
                f"`num_train_timesteps`={config['num_train_timesteps']} contradicts the {len(sigmas)} `trained_betas`. "
                "Leave one of them out."
            )
        for name, value in ends.items():
            check_number(name, value, *SIGMA_LIMITS)
            check_end(name, value, sigmas[0 if name == "sigma_min" else -1])


def _defaults(cls: type) -> dict[str, Any]:
    """What `__init__` takes, and the defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def are_exported(betas: list[float], config: dict[str, Any]) -> bool:
    """Whether the betas are those of the geometric ladder that the rest of the config describes."""
    try:
        check_count("num_train_timesteps", config.get("num_train_timesteps"), at_least=2, at_most=MAX_LEVELS)
        ladder = train_sigmas(
            config["num_train_timesteps"], config.get("sigma_min"), config.get("sigma_max"), "geometric", 0, 0, None
        )
        betas = check_betas(betas)
    except ValueError:
        return False
    return len(betas) == len(ladder) and np.allclose(betas, Ladder(ladder).betas, rtol=1e-6, atol=0)


def readable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's settings for people: without private keys, and without betas that follow from the others."""
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    betas = config.get("trained_betas")
    if betas is None or are_exported(betas, config):
        config.pop("trained_betas", None)
    return config


def check_scheduler(scheduler: SchedulerMixin | type[SchedulerMixin]) -> None:
    """
    Raises:
        ValueError: the scheduler, or all schedulers of the class, would sample a network of this package wrongly.
    """
    scheduler_class = scheduler if isinstance(scheduler, type) else type(scheduler)
    name = scheduler_class.__name__
    fitting = (
        f"AnnealedLangevinScheduler and {', '.join(SCHEDULERS)} fit, made by `from_config(pipe.scheduler.config)`."
    )
    known = {"AnnealedLangevinScheduler", *SCHEDULERS}
    # Those of diffusers, and classes that bear their names: copies of its files go about.
    of_diffusers = [
        cls.__name__
        for cls in scheduler_class.__mro__
        if cls.__name__.endswith("Scheduler")
        and (cls.__module__.startswith("diffusers.") or hasattr(diffusers.schedulers, cls.__name__))
    ]
    if of_diffusers and known.isdisjoint(cls.__name__ for cls in scheduler_class.__mro__):
        raise ValueError(
            f"{name} does not fit: its time, its scaling or its steps are not those of the network, or `generator` "
            f"does not reach its noise. {fitting}"
        )
    if isinstance(scheduler, type):
        return
    if not hasattr(scheduler, "betas"):
        raise ValueError(f"{name} has no `betas`, which the network's noise levels are read from. {fitting}")
    settings = scheduler.config
    continuous = settings.get("timestep_type") == "continuous" and settings.get("prediction_type") == "v_prediction"
    for key, misfit in (
        ("use_flow_sigmas", bool(settings.get("use_flow_sigmas"))),
        ("prediction_type", settings.get("prediction_type") == "flow_prediction"),
        ("timestep_type", continuous),
    ):
        if misfit:
            raise ValueError(
                f"{name} with {key}={settings[key]!r} does not fit: its time or scaling is not the network's. Leave "
                f"`{key}` at its default."
            )
    if is_langevin(scheduler):
        return
    if str(settings.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"{name} with variance_type={settings['variance_type']!r} does not fit: what a network predicts besides, "
            'such as a variance, is left out here. Set `variance_type="fixed_small"`.'
        )
    if settings.get("conditioning") == "sigma":
        raise ValueError(
            f"This network is conditioned on sigma, but {name} would give it timesteps: use "
            "AnnealedLangevinScheduler.from_config(pipe.scheduler.config)."
        )
    prediction_type = settings.get("prediction_type")
    if prediction_type == "score" or (prediction_type == "sample" and name in _NO_SAMPLE_PREDICTION):
        raise ValueError(
            f"{name} cannot take a step with prediction_type={prediction_type!r}: use AnnealedLangevinScheduler"
            f"{'' if prediction_type == 'score' else ', DDIMScheduler or DPMSolverMultistepScheduler'}."
        )


def is_langevin(scheduler: SchedulerMixin) -> bool:
    """Whether it is an `AnnealedLangevinScheduler`, of this package or of a repository's copy of it."""
    return any(cls.__name__ == "AnnealedLangevinScheduler" for cls in type(scheduler).__mro__)
