"""
The configs of saved pipelines: read, checked, and translated into what `NCSNPipeline` loads.

A folder or a repository is a stranger's: its configs are checked before its weights are downloaded and before anything
is built, and no module that it names is imported. What is wrong is an OSError that names the file, the key and the
value.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection
from numbers import Real
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..foreign_configs import SCHEDULERS
from ..ladder import Ladder
from ..networks_ncsn import ACTIVATIONS, LevelUNet2DModel, RefineNet2DModel, SkipUNet2DModel
from ..networks_nd import GaussianResidualModel, UNetNDModel
from ..pipeline_network import SAVED_FORMAT, check_not_of_diffusers_ncsn
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..units import image_units

OWN_PIPELINES = ("NCSNPipeline", "NCSNInpaintPipeline", "NCSNPosteriorPipeline", "UploadedNCSNPipeline")
# Foreign pipelines that an NCSNPipeline can take over, each with the value of black in its data; white is 1.
FOREIGN_PIPELINES = {"ScoreSdeVePipeline": 0.0, "DDPMPipeline": -1.0, "DDIMPipeline": -1.0, "PNDMPipeline": -1.0}

INDEX = "model_index.json"
CONFIGS = {"unet": "config.json", "scheduler": "scheduler_config.json"}
SAVING = ".saving-"  # how the names of folders begin that a save writes to

OWN_SCHEDULER = AnnealedLangevinScheduler.__name__
OWN_NETWORKS = {
    cls.__name__: cls
    for cls in (GaussianResidualModel, LevelUNet2DModel, RefineNet2DModel, SkipUNet2DModel, UNetNDModel)
}
NETWORKS = {"UNet2DModel": UNet2DModel, **OWN_NETWORKS}
_LARGEST_CONFIG = 10_000_000  # bytes; a ladder of 100,000 betas takes 2.5 million


def read_configs(
    folder: str | os.PathLike, source: str, given: Collection[str] = ()
) -> tuple[dict, SchedulerMixin | None]:
    """
    Read and check the configs of a saved pipeline; nothing of the size of a network is built.

    Args:
        folder (`str`): where the files are.
        source (`str`): what messages call the pipeline: the folder, or the repository's id.
        given (`Collection[str]`): the components that are not to come from the folder, `"unet"` or `"scheduler"`.

    Returns:
        The index as it was saved, and the scheduler: the pipeline's own, or an `AnnealedLangevinScheduler` in the place
        of a foreign pipeline's; None where it is given.

    Raises:
        OSError: a file is missing, cannot be read or holds what cannot be used.
        ValueError: the pipeline is of another kind, or was saved by a newer version of this package.
    """
    if not Path(folder, INDEX).is_file():
        raise OSError(explain_missing_index(folder, source))
    index = read_json(Path(folder, INDEX), INDEX, source)
    _check_index(index, source, given)
    unet = None
    if "unet" not in given:
        unet, name = read_config(folder, source, "unet")
        _check_unet_config(unet, name, source, index["unet"][1])
    if "scheduler" in given:
        return index, None
    scheduler = _read_scheduler(*read_config(folder, source, "scheduler"), source, index)
    if unet is not None and index["unet"][1] == "GaussianResidualModel":
        _check_levels(unet, name, source, scheduler)
    return index, scheduler


def explain_missing_index(folder: str | os.PathLike, source: str) -> str:
    """Why a folder is no pipeline, and the way on."""
    folder = Path(folder)
    text = f"{source!r} holds no pipeline: {INDEX} is missing."
    if any(folder.glob(f"{SAVING}*")):
        return (
            f"{text} A save into it was cut off while the new files took the places of the old ones: save the pipeline "
            "once more."
        )
    go_on = "`ncsn-diffusers train` with the run's settings and --resume_from_checkpoint latest goes on with it"
    checkpoints = [path.name for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if re.fullmatch(r"checkpoint-\d+", folder.resolve().name):
        run = folder.resolve().parent
        if (run / INDEX).is_file():
            return f"{text} It is a checkpoint of a training run, whose pipeline is in {str(run)!r}: load that."
        return f"{text} It is a checkpoint of a training run, which saves its pipeline when it ends: {go_on}."
    if checkpoints:
        last = max(checkpoints, key=lambda name: int(name.split("-")[1]))
        return (
            f"{text} It holds a training run that has not ended, up to {last}, and that saves its pipeline when it "
            f"does: {go_on}."
        )
    return text


def read_config(folder: str | os.PathLike, source: str, part: str) -> tuple[dict, str]:
    """A component's config, and the name of its file."""
    path = part_folder(folder, part) / CONFIGS[part]
    name = path.relative_to(folder).as_posix()
    if not path.is_file():
        raise OSError(incomplete(source, [f"{part}/{CONFIGS[part]}"]))
    return read_json(path, name, source), name


def part_folder(folder: str | os.PathLike, part: str) -> Path:
    # in the oldest repositories all files lie in one folder
    return Path(folder, part) if Path(folder, part).is_dir() else Path(folder)


def read_json(path: Path, name: str, source: str) -> dict:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise OSError(unusable(name, source, f"it has {path.stat().st_size:,} bytes, of {_LARGEST_CONFIG:,} at most"))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise OSError(unusable(name, source, f"it is not JSON in UTF-8 ({error})")) from error
    if not isinstance(value, dict):
        raise OSError(unusable(name, source, f"it must be a JSON object, not {_show(value)}"))
    return value


def unusable(name: str, source: str, reason: str) -> str:
    return f"{name} of {source!r} cannot be used: {reason}."


def _show(value) -> str:
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def check_values(config: dict, rules: dict, name: str, source: str) -> None:
    for key, (fits, accepted) in rules.items():
        if key in config and not fits(config[key]):
            raise OSError(unusable(name, source, f"`{key}` must be {accepted}, not {_show(config[key])}"))


Rule = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low:,} to {high:,}"


def _number(low: float = -1e6, high: float = 1e6) -> Rule:
    def fits(value):
        return isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a number from {low:g} to {high:g}"


def _list_of(rule: Rule, least: int, most: int) -> Rule:
    count = str(least) if least == most else f"{least} to {most}"
    return (
        lambda value: isinstance(value, list) and least <= len(value) <= most and all(map(rule[0], value)),
        f"a list of {count}, each {rule[1]}",
    )


def _either(first: Rule, second: Rule) -> Rule:
    return lambda value: first[0](value) or second[0](value), f"{first[1]}, or {second[1]}"


def _one_of(*values) -> Rule:
    accepted = " or ".join(map(json.dumps, values))
    return lambda value: any(type(value) is type(v) and value == v for v in values), accepted


_NULL = _one_of(None)
_BOOL: Rule = (lambda value: isinstance(value, bool), "true or false")
TEXT: Rule = (lambda value: isinstance(value, str), "a string")
OBJECT: Rule = (lambda value: isinstance(value, dict), "a JSON object")
_CLASS = _list_of(TEXT, 2, 2)

_ANY = _number(-1e30, 1e30)  # in whatever units

_INDEX_RULES = {
    "_class_name": _either(TEXT, _CLASS),
    "_saved_format": _whole(1, 10**6),
    "data_min": (lambda value: not isinstance(value, bool) and value in (-1, 0), "-1 or 0"),
    "num_inference_steps": _whole(1, 100_000),
    "data_mean": _either(_ANY, _list_of(_ANY, 1, 1024)),
    "data_std": _either(_ANY, _list_of(_ANY, 1, 1024)),
    "value_range": _either(_NULL, _list_of(_ANY, 2, 2)),
    "data_unit": _either(_NULL, TEXT),
    "null_class": _one_of(None, -1),
    "class_shares": _either(_NULL, _list_of(_number(0), 1, 1_000_000)),
}
PIPELINE_SETTINGS = (
    "data_mean",
    "data_std",
    "value_range",
    "data_unit",
    "num_inference_steps",
    "null_class",
    "class_shares",
)
# Limits far above what anyone trains: they are there so that a config cannot fill the memory or hang.
_UNET_RULES = {
    "sample_size": _either(_whole(1, 4096), _list_of(_whole(1, 4096), 2, 2)),
    "in_channels": _whole(1, 1024),
    "out_channels": _whole(1, 1024),
    "center_input_sample": _BOOL,
    "time_embedding_type": _one_of("positional", "fourier", "learned"),
    "time_embedding_dim": _either(_NULL, _whole(1, 65_536)),
    "freq_shift": _number(),
    "flip_sin_to_cos": _BOOL,
    "down_block_types": _list_of(TEXT, 1, 16),
    "mid_block_type": _either(_NULL, TEXT),
    "up_block_types": _list_of(TEXT, 1, 16),
    "block_out_channels": _list_of(_whole(1, 16_384), 1, 16),
    "layers_per_block": _whole(1, 32),
    "mid_block_scale_factor": _number(),
    "downsample_padding": _whole(0, 16),
    "downsample_type": TEXT,
    "upsample_type": TEXT,
    "dropout": _number(0, 1),
    "act_fn": TEXT,
    "attention_head_dim": _either(_NULL, _whole(1, 16_384)),
    "norm_num_groups": _either(_NULL, _whole(1, 16_384)),
    "attn_norm_num_groups": _either(_NULL, _whole(1, 16_384)),
    "norm_eps": _number(0, 1),
    "resnet_time_scale_shift": TEXT,
    "add_attention": _BOOL,
    "class_embed_type": _either(_NULL, TEXT),
    "num_class_embeds": _either(_NULL, _whole(1, 1_000_000)),
    "num_train_timesteps": _either(_NULL, _whole(1, 1_000_000)),
}
_LARGEST_IMAGE = 4 * 4096**2
_UNET_ND_RULES = {
    **_UNET_RULES,
    "sample_size": _list_of(_whole(1, 1 << 24), 1, 3),
    "out_channels": _either(_NULL, _UNET_RULES["out_channels"]),
    "attention_levels": _either(_NULL, _list_of(_BOOL, 1, 16)),
    "attention_head_dim": _whole(1, 16_384),
    "norm_num_groups": _whole(1, 16_384),
    "time_embedding_type": _one_of("positional", "fourier"),
}
_SIGMAS = _list_of(_number(1e-10, 1e10), 2, 100_000)
_NETWORK_RULES = {
    "UNet2DModel": _UNET_RULES,
    "SkipUNet2DModel": _UNET_RULES,
    "RefineNet2DModel": {
        **{key: _UNET_RULES[key] for key in ("sample_size", "in_channels")},
        **{key: _UNET_RULES[key] for key in ("center_input_sample", "block_out_channels")},
        "dilations": _list_of(_whole(1, 64), 1, 16),
        "sigmas": _either(_NULL, _SIGMAS),
        "act_fn": _one_of(*ACTIVATIONS),
    },
    "LevelUNet2DModel": {
        **{key: _UNET_RULES[key] for key in ("sample_size", "in_channels")},
        "sigmas": _SIGMAS,
        "unet": _either(_NULL, OBJECT),
    },
    "UNetNDModel": _UNET_ND_RULES,
    "GaussianResidualModel": {
        **{key: _UNET_ND_RULES[key] for key in ("sample_size", "in_channels")},
        "rank": _whole(0, 65_536),
        "num_train_timesteps": _whole(2, 100_000),
        "sigma_min": _number(1e-10, 1e10),
        "sigma_max": _number(1e-10, 1e10),
        "unet": _either(_NULL, OBJECT),
    },
}


def pipeline_class_name(index: dict) -> str:
    """The class that a model_index.json names."""
    name = index["_class_name"]
    return name[-1] if isinstance(name, list) else name  # with the module of its code, in a repository


def _check_index(index: dict, source: str, given: Collection[str]) -> None:
    if "_class_name" not in index:
        raise OSError(unusable(INDEX, source, "it has no `_class_name`, the pipeline's class"))
    check_values(index, _INDEX_RULES, INDEX, source)
    name = pipeline_class_name(index)
    if name not in (*OWN_PIPELINES, *FOREIGN_PIPELINES):
        raise ValueError(
            f"The pipeline is a {_show(name)[1:-1]}, which an NCSNPipeline cannot take over; it can be an NCSNPipeline "
            f"or one of {', '.join(FOREIGN_PIPELINES)}. DiffusionPipeline.from_pretrained loads any."
        )
    if index.get("_saved_format", 1) > SAVED_FORMAT:
        raise ValueError(
            f"The pipeline was saved by a newer version of ncsn_diffusers, in format {index['_saved_format']}; this "
            f"version reads formats up to {SAVED_FORMAT}. Update the package, or run the repository's "
            "own code by DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
        )
    for part in CONFIGS:
        if part in given:
            continue
        if part not in index:
            raise OSError(unusable(INDEX, source, f"it has no `{part}`"))
        check_values({part: index[part]}, {part: _CLASS}, INDEX, source)
        check_not_of_diffusers_ncsn(index[part][1], source)
    # ours come from this package, wherever the index says that their code is
    if "unet" not in given and index["unet"] != ["diffusers", "UNet2DModel"] and index["unet"][1] not in OWN_NETWORKS:
        raise OSError(
            unusable(
                INDEX,
                source,
                f'`unet` must be ["diffusers", "UNet2DModel"], or a {" or ".join(OWN_NETWORKS)} of this package, not '
                f"{_show(index['unet'])}: a network of another class is not loaded from here, but may be given as "
                "`unet=`",
            )
        )
    if "scheduler" in given or index["scheduler"][1] == OWN_SCHEDULER:
        return
    fitting = [*SCHEDULERS] + ["ScoreSdeVeScheduler"] * (name in FOREIGN_PIPELINES)
    if index["scheduler"][0] != "diffusers" or index["scheduler"][1] not in fitting:
        raise OSError(
            unusable(
                INDEX,
                source,
                f"`scheduler` must be {OWN_SCHEDULER} or one of diffusers' {', '.join(fitting)}, not "
                f"{_show(index['scheduler'])}, which has another time or scaling: give a fitting one as `scheduler=`",
            )
        )


def _check_unet_config(config: dict, name: str, source: str, expected: str) -> None:
    check_not_of_diffusers_ncsn(config.get("_class_name"), source)
    class_name = config.get("_class_name", expected)
    if class_name != expected:
        raise OSError(unusable(name, source, f'`_class_name` must be "{expected}", not {_show(class_name)}'))
    if config.get("sample_size") is None:
        accepted = _NETWORK_RULES[class_name]["sample_size"][1]
        raise OSError(unusable(name, source, f"`sample_size` must be {accepted}, not None"))
    check_values(config, _NETWORK_RULES[class_name], name, source)
    if class_name in ("LevelUNet2DModel", "GaussianResidualModel"):
        rules = _UNET_RULES if class_name == "LevelUNet2DModel" else _UNET_ND_RULES
        check_values(config.get("unet") or {}, rules, name, source)
    size, channels = config["sample_size"], [config.get(key, 3) for key in ("in_channels", "out_channels")]
    if class_name in ("UNetNDModel", "GaussianResidualModel"):
        channels = [config.get("in_channels", 1), config.get("out_channels") or config.get("in_channels", 1)]
    numbers = channels[0] * math.prod((size, size) if isinstance(size, int) else size)
    if numbers > _LARGEST_IMAGE:
        reason = f"`sample_size`={size} and `in_channels`={channels[0]}: an image of {numbers:,} numbers, of "
        raise OSError(unusable(name, source, f"{reason}{_LARGEST_IMAGE:,} at most"))
    if issubclass(NETWORKS[class_name], UNet2DModel | UNetNDModel) and channels[0] != channels[1]:
        raise OSError(
            unusable(name, source, f"`out_channels` must equal `in_channels`={channels[0]}, not {channels[1]}")
        )


def _check_levels(config: dict, name: str, source: str, scheduler: SchedulerMixin) -> None:
    """A network that knows the levels and the meaning of its output by itself must have the scheduler's."""
    meaning = [scheduler.config.get("conditioning", "timestep"), scheduler.config.get("prediction_type")]
    if meaning != ["timestep", "v_prediction"]:
        reason = f"it needs conditioning='timestep' and prediction_type='v_prediction', not the scheduler's {meaning}"
        raise OSError(unusable(name, source, reason))
    defaults = {"num_train_timesteps": 1000, "sigma_min": 0.01, "sigma_max": 50.0}
    number, low, high = (config.get(key, default) for key, default in defaults.items())
    sigmas = Ladder.from_betas(scheduler.betas).sigmas  # whatever the class
    if len(sigmas) != number or not np.allclose(sigmas, np.geomspace(low, high, number), rtol=0.02):
        reason = (
            f"its {number} levels from {low:g} to {high:g} are not the scheduler's, {len(sigmas)} from "
            f"{sigmas[0]:.3g} to {sigmas[-1]:.3g}"
        )
        raise OSError(unusable(name, source, reason))


def _read_scheduler(config: dict, name: str, source: str, index: dict) -> SchedulerMixin:
    check_not_of_diffusers_ncsn(config.get("_class_name"), source)
    class_name = index["scheduler"][1]
    config = {"_class_name": class_name, **config}
    try:
        # whatever the class: it knows what fits a noise conditional score network, and how large a ladder may be
        scheduler = AnnealedLangevinScheduler.from_config(config)
        if class_name != OWN_SCHEDULER and pipeline_class_name(index) in OWN_PIPELINES:
            scheduler = getattr(diffusers, class_name).from_config(config)
    except Exception as error:  # diffusers' own checks raise all kinds
        raise OSError(unusable(name, source, f"{error or type(error).__name__}".rstrip("."))) from error
    return scheduler


def translate_index(index: dict, class_name: str) -> dict:
    """
    A model_index.json as it would be if `class_name`, our scheduler and our networks were diffusers' own, where the
    package makes them known: code that is in the repository is not asked for.
    """
    keys = ("_diffusers_version", "_saved_format", "_name_or_path", *PIPELINE_SETTINGS, *CONFIGS)
    data_min = index.get("data_min")
    found, index = pipeline_class_name(index), {key: index[key] for key in keys if key in index}
    index["_class_name"] = class_name
    for network in OWN_NETWORKS:
        if network in index.get("unet", ()):
            index["unet"] = ["diffusers", network]
    if found in FOREIGN_PIPELINES:
        data_min = FOREIGN_PIPELINES[found]
        index["null_class"] = None
        index["scheduler"] = ["diffusers", OWN_SCHEDULER]
    elif OWN_SCHEDULER in index.get("scheduler", ()):
        index["scheduler"] = ["diffusers", OWN_SCHEDULER]
    if data_min is not None:  # of black for the network, whose white is 1
        index |= image_units(data_min)
    return index


def incomplete(source: str, missing: list[str]) -> str:
    return (
        f"{source!r} is incomplete: {', '.join(missing)} is missing. Save or upload the pipeline once more, or ask its "
        "author to, or choose another `revision`."
    )
