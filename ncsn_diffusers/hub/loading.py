"""
The public pipeline: loading from folders and from the Hub, this package's own pipelines and those of others that it can
take over; saving, and publishing.

None of a repository's code is run: the package's own takes its place.
"""

import os
from pathlib import Path

import torch
from diffusers.utils import logging
from huggingface_hub import CommitInfo, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import pipeline_ncsn
from . import upload
from .configs import (
    CONFIGS,
    FOREIGN_PIPELINES,
    INDEX,
    NETWORKS,
    incomplete,
    part_folder,
    pipeline_class_name,
    read_configs,
    translate_index,
)
from .saving import check_stamp, read_whole, replace_pipeline
from .weights import check_complete, check_content, check_finite, check_weights, weight_names

logger = logging.get_logger(__name__)


class NCSNPipeline(pipeline_ncsn.UploadedNCSNPipeline):
    __doc__ = pipeline_ncsn.UploadedNCSNPipeline.__doc__

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "NCSNPipeline":
        """
        As [`~DiffusionPipeline.from_pretrained`], from a folder or a repository on the Hub. No code of the repository
        is run: the package's own takes its place.

        DDPM, DDIM, PNDM and ScoreSdeVe pipelines load as well: `AnnealedLangevinScheduler` takes over their noise
        levels, and the units are those of their images.

        The weights of an NCSN are safetensors. Of other repositories, safetensors are preferred; one that has only a
        pickle is read as diffusers does, by torch's loader for plain tensors, unless `use_safetensors=True`.

        Raises:
            OSError: there is no such repository or revision, a file is missing, damaged or holds what cannot be used
                (the message names file, key and value), a weight is not finite, or the Hub is out of reach and the
                cache does not hold the repository.
            ValueError: the pipeline is of another kind, or was saved by a newer version of this package.
        """
        source = str(pretrained_model_name_or_path)
        if os.path.isdir(source):
            return read_whole(source, lambda: cls._load(source, source, **kwargs))
        return cls._load(str(cls.download(source, **kwargs)), source, **kwargs)

    @classmethod
    def _load(cls, folder: str, source: str, **kwargs) -> "NCSNPipeline":
        given = kwargs.keys() & CONFIGS.keys()
        index, scheduler = read_configs(folder, source, given)
        foreign = pipeline_class_name(index) if pipeline_class_name(index) in FOREIGN_PIPELINES else None
        if foreign is None:
            kwargs["use_safetensors"] = True
        check_complete(folder, source, given, only_safetensors=kwargs.get("use_safetensors") is True)
        if "unet" not in given:
            check_weights(folder, source, only_safetensors=kwargs.get("use_safetensors") is True)
        if not given:
            check_stamp(folder, source, kwargs.get("variant"))
        if scheduler is not None:
            kwargs["scheduler"] = scheduler
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.register_to_config(_name_or_path=source)
        if "unet" not in given:
            check_finite(pipe.unet, folder, source, may_be_offloaded=kwargs.get("device_map") is not None)
        if foreign is not None:
            low = pipe.units.to_network(torch.zeros(1, 1)).item()
            taken_over = "" if scheduler is None else f"its {index['scheduler'][1]} has become an "
            logger.warning(
                f"{source} is a {foreign}: {taken_over}{type(pipe.scheduler).__name__}, and its data are taken to be "
                f"images, which the network sees in [{low:g}, 1]."
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
            check_content(folder, pretrained_model_name)
            return folder

        given = kwargs.keys() & CONFIGS.keys()
        configs = [INDEX, *CONFIGS.values(), *(f"{part}/{file}" for part, file in CONFIGS.items())]
        folder = fetch(configs)
        index, _ = read_configs(folder, pretrained_model_name, given)
        if "unet" in given:
            return folder
        pickles = pipeline_class_name(index) in FOREIGN_PIPELINES and kwargs.get("use_safetensors") is not True
        variant = kwargs.get("variant")
        for suffix in ["safetensors", "bin"] if pickles else ["safetensors"]:
            names = weight_names(suffix, variant)
            folder = fetch([*configs, *names, *(f"unet/{name}" for name in names)])
            if any(any(part_folder(folder, "unet").glob(name)) for name in names):
                return folder
        if variant is not None:
            raise ValueError(f"`variant`={variant!r}: {pretrained_model_name!r} has no such weights.")
        raise OSError(incomplete(pretrained_model_name, ["unet/*.safetensors"]))

    @classmethod
    def _get_signature_types(cls) -> dict:
        # diffusers' word on which networks fit; on the Hub the uploaded file knows UNet2DModel alone
        return {**super()._get_signature_types(), "unet": tuple(NETWORKS.values())}

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, *args, **kwargs) -> dict:
        # diffusers reads model_index.json through this method. Versions differ in what else they hand to it.
        return translate_index(super()._dict_from_json_file(json_file, *args, **kwargs), cls.__name__)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As [`~DiffusionPipeline.save_pretrained`]. With `push_to_hub=True` the folder is uploaded as well, under its
        name or as `repo_id` says; `private`, `token` and `commit_message` are as of [`push_to_hub`].

        A pipeline that is in the folder is replaced as a whole: whoever loads it meanwhile, or after a save that was
        cut off, gets the old one, the new one, or an error.

        Raises:
            ValueError: `safe_serialization=False`; nothing has been written then.
            OSError: the folder cannot be written; what was in it is as before.
        """
        if not safe_serialization:
            raise ValueError(
                "`safe_serialization=False` writes the weights as a pickle, which may run code on whoever loads it, "
                "and which from_pretrained refuses. Leave it out: they are then saved as safetensors."
            )
        options = {name: kwargs.pop(name) for name in ("private", "token", "commit_message") if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
        save = super().save_pretrained
        options_of_save = {"variant": variant, "max_shard_size": max_shard_size, **kwargs}
        replace_pipeline(Path(save_directory), lambda folder: save(folder, **options_of_save))
        if push_to_hub:
            upload.push_to_hub(save_directory, repo_id, **options)

    def push_to_hub(self, repo_id: str, **kwargs) -> CommitInfo:
        """
        Upload the pipeline with a model card and the code that loads it where this package is not installed; the
        arguments are those of `ncsn_diffusers.hub.push_to_hub`.
        """
        return upload.push_to_hub(self, repo_id, **kwargs)


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
