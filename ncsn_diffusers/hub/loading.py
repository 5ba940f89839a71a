"""
Loading pipelines, this package's own and those of others that it can take over, from folders and from the Hub.

A folder or a repository is a stranger's: its configs are read and checked before its weights are downloaded and before
anything is built, no module that it names is imported, and none of its code is run. What is wrong is an OSError that
names the file, the key and the value.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
import reprlib
from collections.abc import Callable, Collection
from numbers import Real
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from .. import pipeline_ncsn
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler

OWN_PIPELINES = ("NCSNPipeline", "NCSNInpaintPipeline", "NCSNPosteriorPipeline")
# The least value of a pixel, black, in the data of foreign pipelines that an NCSNPipeline can take over; white is 1.
FOREIGN_PIPELINES = {"ScoreSdeVePipeline": 0.0, "DDPMPipeline": -1.0, "DDIMPipeline": -1.0, "PNDMPipeline": -1.0}

_INDEX = "model_index.json"
_CONFIGS = {"unet": "config.json", "scheduler": "scheduler_config.json"}
_WEIGHTS = "diffusion_pytorch_model"
_OWN_SCHEDULER = AnnealedLangevinScheduler.__name__
_LARGEST_CONFIG = 10_000_000  # bytes; a ladder of 100,000 betas takes 2.5 million

logger = logging.get_logger(__name__)


class NCSNPipeline(pipeline_ncsn.NCSNPipeline):
    __doc__ = pipeline_ncsn.NCSNPipeline.__doc__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "NCSNPipeline":
        """
        As [`~DiffusionPipeline.from_pretrained`], from a folder or a repository on the Hub. No code of the repository
        is run: the package's own takes its place.

        DDPM, DDIM, PNDM and ScoreSdeVe pipelines load as well: `AnnealedLangevinScheduler` takes over their noise
        levels, and `data_min` is that of their data.

        The weights of an NCSN are safetensors. Of other repositories, safetensors are preferred; one that has only a
        pickle is read as diffusers does, by torch's loader for plain tensors, unless `use_safetensors=True`.

        Raises:
            OSError: there is no such repository or revision, a file is missing, damaged or holds what cannot be used
                (the message names file, key and value), a weight is not finite, or the Hub is out of reach and the
                cache does not hold the repository.
            ValueError: the pipeline is of another kind, or was saved by a newer version of this package.
        """
        source = str(pretrained_model_name_or_path)
        folder = source if os.path.isdir(source) else str(cls.download(source, **kwargs))
        given = kwargs.keys() & _CONFIGS.keys()
        index, scheduler = read_configs(folder, source, given)
        foreign = pipeline_class_name(index) if pipeline_class_name(index) in FOREIGN_PIPELINES else None
        if foreign is None:
            kwargs["use_safetensors"] = True
        _check_complete(folder, source, given, only_safetensors=kwargs.get("use_safetensors") is True)
        if "unet" not in given:
            _check_weights(folder, source, own=foreign is None)
        if scheduler is not None:
            kwargs["scheduler"] = scheduler
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=source)
        if "unet" not in given:
            _check_finite(pipe.unet, folder, source)
        if foreign is not None:
            taken_over = "" if scheduler is None else f"its {index['scheduler'][1]} has become an "
            logger.warning(
                f"{source} is a {foreign}: {taken_over}{type(pipe.scheduler).__name__}, and its data are taken to be "
                f"in [{pipe.config.data_min:g}, 1]."
            )
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """
        As [`~DiffusionPipeline.download`]: the folder of the cache that holds the repository's pipeline. The configs
        come first, and nothing else does where they cannot be used; then the weights, as safetensors or else, of a
        foreign pipeline, as a pickle. Files whose content differs from what the Hub says of them are refused.

        Raises:
            OSError, ValueError: as [`from_pretrained`].
        """
        options = ("cache_dir", "revision", "token", "local_files_only", "force_download", "proxies")
        options = {name: kwargs[name] for name in options if kwargs.get(name) is not None}

        def fetch(names: list[str]) -> str:
            try:
                folder = snapshot_download(pretrained_model_name, allow_patterns=names, **options)
            except (OSError, HfHubHTTPError, HFValidationError) as error:
                raise OSError(_explain(error, pretrained_model_name, kwargs.get("revision") or "main")) from error
            _check_content(folder, pretrained_model_name)
            return folder

        given = kwargs.keys() & _CONFIGS.keys()
        configs = [_INDEX, *_CONFIGS.values(), *(f"{part}/{file}" for part, file in _CONFIGS.items())]
        folder = fetch(configs)
        index, _ = read_configs(folder, pretrained_model_name, given)
        if "unet" in given:
            return folder
        pickles = pipeline_class_name(index) in FOREIGN_PIPELINES and kwargs.get("use_safetensors") is not True
        variant = kwargs.get("variant")
        for suffix in ["safetensors", "bin"] if pickles else ["safetensors"]:
            names = _weight_names(suffix, variant)
            folder = fetch([*configs, *names, *(f"unet/{name}" for name in names)])
            if any(any(_part_folder(folder, "unet").glob(name)) for name in names):
                return folder
        if variant is not None:
            raise ValueError(f"`variant`={variant!r}: {pretrained_model_name!r} has no such weights.")
        raise OSError(_incomplete(pretrained_model_name, ["unet/*.safetensors"]))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, *args, **kwargs) -> dict:
        # diffusers reads model_index.json through this method. Versions differ in what else they hand to it.
        return _translate_index(super()._dict_from_json_file(json_file, *args, **kwargs), cls.__name__)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        *args,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As [`~DiffusionPipeline.save_pretrained`]. With `push_to_hub=True` the folder is uploaded as well, under its
        name or as `repo_id` says; `private`, `token` and `commit_message` are as of [`push_to_hub`].

        Raises:
            ValueError: `safe_serialization=False`; nothing has been written then.
        """
        if not safe_serialization:
            raise ValueError(
                "`safe_serialization=False` writes the weights as a pickle, which may run code on whoever loads it, "
                "and which from_pretrained refuses. Leave it out: they are then saved as safetensors."
            )
        options = {name: kwargs.pop(name) for name in ("private", "token", "commit_message") if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
        super().save_pretrained(save_directory, True, *args, **kwargs)
        if push_to_hub:
            self._hub().push_to_hub(save_directory, repo_id, **options)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Upload the pipeline with a model card and the code that loads it where this package is not installed; the
        arguments are those of `ncsn_diffusers.hub.push_to_hub`.
        """
        return self._hub().push_to_hub(self, repo_id, **kwargs)

    @staticmethod
    def _hub():
        return importlib.import_module(".upload", __package__)  # which uses this module


# The configs


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
    if not Path(folder, _INDEX).is_file():
        raise OSError(explain_missing_index(folder, source))
    index = _read_json(Path(folder, _INDEX), _INDEX, source)
    _check_index(index, source, given)
    if "unet" not in given:
        _check_unet_config(*_read_config(folder, source, "unet"), source)
    if "scheduler" in given:
        return index, None
    return index, _read_scheduler(*_read_config(folder, source, "scheduler"), source, index)


def explain_missing_index(folder: str | os.PathLike, source: str) -> str:
    """Why a folder is no pipeline, and the way on."""
    folder = Path(folder)
    text = f"{source!r} holds no pipeline: {_INDEX} is missing."
    go_on = "scripts/train_ncsn.py with the run's settings and --resume_from_checkpoint latest goes on with it"
    checkpoints = [path.name for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if re.fullmatch(r"checkpoint-\d+", folder.resolve().name):
        run = folder.resolve().parent
        if (run / _INDEX).is_file():
            return f"{text} It is a checkpoint of a training run, whose pipeline is in {str(run)!r}: load that."
        return f"{text} It is a checkpoint of a training run, which saves its pipeline when it ends: {go_on}."
    if checkpoints:
        last = max(checkpoints, key=lambda name: int(name.split("-")[1]))
        return (
            f"{text} It holds a training run that has not ended, up to {last}, and that saves its pipeline when it "
            f"does: {go_on}."
        )
    return text


def _read_config(folder: str | os.PathLike, source: str, part: str) -> tuple[dict, str]:
    """A component's config, and the name of its file."""
    path = _part_folder(folder, part) / _CONFIGS[part]
    name = path.relative_to(folder).as_posix()
    if not path.is_file():
        raise OSError(_incomplete(source, [f"{part}/{_CONFIGS[part]}"]))
    return _read_json(path, name, source), name


def _part_folder(folder: str | os.PathLike, part: str) -> Path:
    # in the oldest repositories all files lie in one folder
    return Path(folder, part) if Path(folder, part).is_dir() else Path(folder)


def _read_json(path: Path, name: str, source: str) -> dict:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise OSError(_unusable(name, source, f"it has {path.stat().st_size:,} bytes, of {_LARGEST_CONFIG:,} at most"))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise OSError(_unusable(name, source, f"it is not JSON in UTF-8 ({error})")) from error
    if not isinstance(value, dict):
        raise OSError(_unusable(name, source, f"it must be a JSON object, not {_show(value)}"))
    return value


def _unusable(name: str, source: str, reason: str) -> str:
    return f"{name} of {source!r} cannot be used: {reason}."


def _show(value) -> str:
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _check_values(config: dict, rules: dict, name: str, source: str) -> None:
    for key, (fits, accepted) in rules.items():
        if key in config and not fits(config[key]):
            raise OSError(_unusable(name, source, f"`{key}` must be {accepted}, not {_show(config[key])}"))


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
_TEXT: Rule = (lambda value: isinstance(value, str), "a string")
_CLASS = _list_of(_TEXT, 2, 2)

_INDEX_RULES = {
    "_class_name": _either(_TEXT, _CLASS),
    "_saved_format": _whole(1, 10**6),
    "data_min": (lambda value: not isinstance(value, bool) and value in (-1, 0), "-1 or 0"),
}
# Limits far above what anyone trains: they are there so that a config cannot fill the memory or hang.
_UNET_RULES = {
    "sample_size": _either(_whole(1, 65_536), _list_of(_whole(1, 65_536), 2, 2)),
    "in_channels": _whole(1, 1024),
    "out_channels": _whole(1, 1024),
    "center_input_sample": _BOOL,
    "time_embedding_type": _one_of("positional", "fourier", "learned"),
    "time_embedding_dim": _either(_NULL, _whole(1, 65_536)),
    "freq_shift": _number(),
    "flip_sin_to_cos": _BOOL,
    "down_block_types": _list_of(_TEXT, 1, 16),
    "mid_block_type": _either(_NULL, _TEXT),
    "up_block_types": _list_of(_TEXT, 1, 16),
    "block_out_channels": _list_of(_whole(1, 16_384), 1, 16),
    "layers_per_block": _whole(1, 32),
    "mid_block_scale_factor": _number(),
    "downsample_padding": _whole(0, 16),
    "downsample_type": _TEXT,
    "upsample_type": _TEXT,
    "dropout": _number(0, 1),
    "act_fn": _TEXT,
    "attention_head_dim": _either(_NULL, _whole(1, 16_384)),
    "norm_num_groups": _whole(1, 16_384),
    "attn_norm_num_groups": _either(_NULL, _whole(1, 16_384)),
    "norm_eps": _number(0, 1),
    "resnet_time_scale_shift": _TEXT,
    "add_attention": _BOOL,
    "class_embed_type": _either(_NULL, _TEXT),
    "num_class_embeds": _either(_NULL, _whole(1, 1_000_000)),
    "num_train_timesteps": _either(_NULL, _whole(1, 1_000_000)),
}


def pipeline_class_name(index: dict) -> str:
    """The class that a model_index.json names."""
    name = index["_class_name"]
    return name[-1] if isinstance(name, list) else name  # with the module of its code, in a repository


def _check_index(index: dict, source: str, given: Collection[str]) -> None:
    if "_class_name" not in index:
        raise OSError(_unusable(_INDEX, source, "it has no `_class_name`, the pipeline's class"))
    _check_values(index, _INDEX_RULES, _INDEX, source)
    name = pipeline_class_name(index)
    if name not in (*OWN_PIPELINES, *FOREIGN_PIPELINES):
        raise ValueError(
            f"The pipeline is a {_show(name)[1:-1]}, which an NCSNPipeline cannot take over; it can be an NCSNPipeline "
            f"or one of {', '.join(FOREIGN_PIPELINES)}. DiffusionPipeline.from_pretrained loads any."
        )
    if index.get("_saved_format", 1) > pipeline_ncsn.SAVED_FORMAT:
        raise ValueError(
            f"The pipeline was saved by a newer version of ncsn_diffusers, in format {index['_saved_format']}; this "
            f"version reads formats up to {pipeline_ncsn.SAVED_FORMAT}. Update the package, or run the repository's "
            "own code by DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
        )
    for part in _CONFIGS:
        if part in given:
            continue
        if part not in index:
            raise OSError(_unusable(_INDEX, source, f"it has no `{part}`"))
        _check_values({part: index[part]}, {part: _CLASS}, _INDEX, source)
        pipeline_ncsn.check_not_of_diffusers_ncsn(index[part][1], source)
    if "unet" not in given and index["unet"] != ["diffusers", "UNet2DModel"]:
        raise OSError(
            _unusable(
                _INDEX,
                source,
                f'`unet` must be ["diffusers", "UNet2DModel"], not {_show(index["unet"])}: a network of another class '
                "is not loaded from here, but may be given as `unet=`",
            )
        )
    if "scheduler" in given or index["scheduler"][1] == _OWN_SCHEDULER:
        return
    fitting = [*pipeline_ncsn.SCHEDULERS] + ["ScoreSdeVeScheduler"] * (name in FOREIGN_PIPELINES)
    if index["scheduler"][0] != "diffusers" or index["scheduler"][1] not in fitting:
        raise OSError(
            _unusable(
                _INDEX,
                source,
                f"`scheduler` must be {_OWN_SCHEDULER} or one of diffusers' {', '.join(fitting)}, not "
                f"{_show(index['scheduler'])}, which has another time or scaling: give a fitting one as `scheduler=`",
            )
        )


def _check_unet_config(config: dict, name: str, source: str) -> None:
    pipeline_ncsn.check_not_of_diffusers_ncsn(config.get("_class_name"), source)
    class_name = config.get("_class_name", "UNet2DModel")
    if class_name != "UNet2DModel":
        raise OSError(_unusable(name, source, f'`_class_name` must be "UNet2DModel", not {_show(class_name)}'))
    if config.get("sample_size") is None:
        raise OSError(_unusable(name, source, f"`sample_size` must be {_UNET_RULES['sample_size'][1]}, not None"))
    _check_values(config, _UNET_RULES, name, source)
    channels = [config.get(key, 3) for key in ("in_channels", "out_channels")]
    if channels[0] != channels[1]:
        raise OSError(
            _unusable(name, source, f"`out_channels` must equal `in_channels`={channels[0]}, not {channels[1]}")
        )


def _read_scheduler(config: dict, name: str, source: str, index: dict) -> SchedulerMixin:
    pipeline_ncsn.check_not_of_diffusers_ncsn(config.get("_class_name"), source)
    class_name = index["scheduler"][1]
    config = {"_class_name": class_name, **config}
    try:
        # whatever the class: it knows what fits a noise conditional score network, and how large a ladder may be
        scheduler = AnnealedLangevinScheduler.from_config(config)
        if class_name != _OWN_SCHEDULER and pipeline_class_name(index) in OWN_PIPELINES:
            scheduler = getattr(diffusers, class_name).from_config(config)
    except Exception as error:  # diffusers' own checks raise all kinds
        raise OSError(_unusable(name, source, f"{error or type(error).__name__}".rstrip("."))) from error
    return scheduler


def _translate_index(index: dict, class_name: str) -> dict:
    """
    A model_index.json as it would be if `class_name` and `AnnealedLangevinScheduler` were diffusers' own, where the
    package makes them known: code that is in the repository is not asked for.
    """
    keys = ("_diffusers_version", "_saved_format", "_name_or_path", "data_min", *_CONFIGS)
    found, index = pipeline_class_name(index), {key: index[key] for key in keys if key in index}
    index["_class_name"] = class_name
    if found in FOREIGN_PIPELINES:
        index["data_min"] = FOREIGN_PIPELINES[found]
        index["scheduler"] = ["diffusers", _OWN_SCHEDULER]
    elif _OWN_SCHEDULER in index.get("scheduler", ()):
        index["scheduler"] = ["diffusers", _OWN_SCHEDULER]
    return index


# The files and the weights


def _incomplete(source: str, missing: list[str]) -> str:
    return (
        f"{source!r} is incomplete: {', '.join(missing)} is missing. Save or upload the pipeline once more, or ask its "
        "author to, or choose another `revision`."
    )


def _weight_names(suffix: str, variant: str | None) -> list[str]:
    """Patterns of the files that hold the weights: one, or several and an index, as older and newer versions save."""
    if variant is None:
        return [f"{_WEIGHTS}.{suffix}", f"{_WEIGHTS}-*-of-*.{suffix}", f"{_WEIGHTS}.{suffix}.index.json"]
    shards = [f"{_WEIGHTS}.{variant}-*-of-*.{suffix}", f"{_WEIGHTS}-*-of-*.{variant}.{suffix}"]
    return [f"{_WEIGHTS}.{variant}.{suffix}", *shards, f"{_WEIGHTS}.{suffix}.index.{variant}.json"]


def _check_complete(folder: str, source: str, given: Collection[str], only_safetensors: bool) -> None:
    """The configs have been read: what may be missing are the weights."""
    patterns = ["*.safetensors"] if only_safetensors else ["*.safetensors", "*.bin"]
    if "unet" not in given and not any(any(_part_folder(folder, "unet").glob(pattern)) for pattern in patterns):
        raise OSError(_incomplete(source, ["unet/*.safetensors"]))


def _check_weights(folder: str, source: str, own: bool) -> None:
    """
    Compare the network that the config describes with the names and shapes of the tensors in the files.

    diffusers would leave at random what a file lacks, with a warning. The names of the oldest public checkpoints,
    which it translates, are not ours to judge.
    """
    config, name = _read_config(folder, source, "unet")
    known = inspect.signature(UNet2DModel.__init__).parameters
    try:
        with torch.device("meta"):
            network = UNet2DModel(**{key: value for key, value in config.items() if key in known})
    except Exception as error:
        reason = f"diffusers cannot make a network of it ({type(error).__name__}: {error})"
        raise OSError(_unusable(name, source, reason)) from error
    expected = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    found: dict[str, set[str]] = {}
    for path in sorted(_part_folder(folder, "unet").glob(f"{_WEIGHTS}*.safetensors")):
        file = path.relative_to(folder).as_posix()
        names = found.setdefault(re.sub(r"-\d+-of-\d+", "", file), set())
        try:
            with safe_open(path, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (not a dict)
                    names.add(key)
                    shape = list(weights.get_slice(key).get_shape())
                    if shape != expected.get(key, shape):
                        reason = f"`{key}` has shape {shape}, and {name} describes one of {expected[key]}"
                        raise OSError(_unusable(file, source, reason))
        except SafetensorError as error:
            raise OSError(_unusable(file, source, f"it is damaged or not of safetensors ({error})")) from error
    for file, names in found.items():
        missing = sorted(expected.keys() - names)
        if own and missing:
            raise OSError(_unusable(file, source, f"it lacks {len(missing)} tensors of the network: `{missing[0]}` …"))


def find_not_finite(path: Path) -> str | None:
    """The name of a tensor with NaN or infinity in a file of safetensors, if there is one."""
    with safe_open(path, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 (not a dict)
            tensor = weights.get_tensor(key)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return key
    return None


def _check_finite(network: torch.nn.Module, folder: str, source: str) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point() or tensor.isfinite().all():
            continue
        for path in sorted(_part_folder(folder, "unet").glob(f"{_WEIGHTS}*.safetensors")):
            key = find_not_finite(path)
            if key is not None:
                file = path.relative_to(folder).as_posix()
                raise OSError(_unusable(file, source, f"`{key}` holds NaN or infinity, and would draw nothing else"))
        raise OSError(
            f"The weights of {source!r} cannot be used: `{name}` holds NaN or infinity in {tensor.dtype}. Where the "
            "file does not, load it in another `torch_dtype`, such as torch.float32."
        )


def _check_content(folder: str | os.PathLike, repo_id: str) -> None:
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


def _explain(error: BaseException, repo_id: str, revision: str) -> str:
    """What is wrong with a repository and what to do, from whatever the Hub's client has raised."""
    causes = [error]
    for cause in causes:
        causes += [c for c in (cause.__cause__, cause.__context__) if c is not None and c not in causes]

    def found(*kinds):
        return any(isinstance(cause, kinds) for cause in causes)

    if found(RepositoryNotFoundError, HFValidationError):
        return (
            f"{repo_id!r} is neither a folder here nor a repository on the Hub that can be read: check the name; if it "
            "is private, log in by `hf auth login` or give a `token` that may read it."
        )
    if found(RevisionNotFoundError):
        return f"{repo_id!r} has no revision {revision!r}: `revision` must be a branch, a tag or a commit of it."
    if found(LocalEntryNotFoundError, OfflineModeIsEnabled, FileNotFoundError):
        return (
            f"{repo_id!r} at revision {revision!r} is not in the cache, or not all of it, and the Hub is out of reach "
            "or not to be asked: load it once with a connection and without `local_files_only`."
        )
    if found(EntryNotFoundError):
        return (
            f"{repo_id!r} is incomplete, or holds no pipeline, at revision {revision!r}: {error}. Choose another "
            "`revision`, or ask its author to upload it once more."
        )
    return f"{repo_id!r} could not be loaded from the Hub: {error}"
