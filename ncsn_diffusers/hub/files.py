"""
What of a saved pipeline is uploaded, chosen file by file: its configs, its weights as safetensors, the modules of the
scheduler and the pipeline, the card and its images. Checkpoints, logs and whatever else lies in a folder stay there.
"""

import inspect
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import HfApi, get_token

from ..pipeline_ncsn import UploadedNCSNPipeline
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .configs import (
    CONFIGS,
    INDEX,
    NETWORKS,
    OWN_NETWORKS,
    OWN_PIPELINES,
    explain_missing_index,
    pipeline_class_name,
    read_configs,
    read_json,
)
from .model_card import make_model_card, read_training_config
from .modules import collect_module
from .saving import check_stamp
from .weights import WEIGHTS, find_not_finite, weight_names

VARIANTS = ("fp16", "ema")
# The modules of the classes that diffusers does not have. Those of the networks have no siblings: diffusers would not
# download them.
MODULES = {
    cls.__name__: Path(inspect.getfile(cls))
    for cls in (UploadedNCSNPipeline, AnnealedLangevinScheduler, *OWN_NETWORKS.values())
}

_SECRET = re.compile(r"hf_(oauth_|jwt_)?[A-Za-z0-9]{16,}")


def collect_files(
    folder: str | Path,
    repo_id: str,
    variants: Sequence[str] = (),
    license: str | None = None,
    dataset: str | None = None,
    training_dir: str | Path | None = None,
) -> dict[str, bytes | Path]:
    """
    The files of a repository, by their paths in it: contents, or where they are.

    Args: as of [`push_to_hub`], of a saved pipeline.

    Raises:
        ValueError: a variant cannot be made, the weights are pickles or not finite, or a file holds an access token.
        FileNotFoundError: the folder holds no complete pipeline.
        OSError: a config or the weights hold what cannot be used.
    """
    folder, training_dir = Path(folder), None if training_dir is None else Path(training_dir)
    index, weights = check_folder(folder)
    for path in weights:
        not_finite = find_not_finite(path)
        if not_finite is not None:
            raise ValueError(
                f"unet/{path.name} of {str(folder)!r} is not to be published: `{not_finite}` holds NaN or infinity."
            )

    files: dict[str, bytes | Path] = {f"unet/{path.name}": path for path in weights}
    for path in sorted((folder / "unet").glob(f"{WEIGHTS}*.index*.json")):
        files[f"unet/{path.name}"] = path
    for name in (f"{part}/{name}" for part, name in CONFIGS.items()):
        config = read_json(folder / name, name, str(folder))
        files[name] = _to_json({key: value for key, value in config.items() if key != "_name_or_path"})

    uses_ema = bool(read_training_config(training_dir).get("use_ema"))
    files |= _make_variants(folder, NETWORKS[index["unet"][1]], variants, uses_ema)

    index.pop("_name_or_path", None)  # a path of this machine
    name, modules = collect_module(MODULES[UploadedNCSNPipeline.__name__])
    index["_class_name"] = [name, UploadedNCSNPipeline.__name__]
    files |= modules
    for part in CONFIGS:
        class_name = index[part][1]
        if class_name in MODULES:
            name, modules = collect_module(MODULES[class_name])
            index[part] = [name, class_name]
            files |= {f"{part}/{file}": content for file, content in modules.items()}
    files[INDEX] = _to_json(index)

    if training_dir is not None:
        for name in ("samples", "loss"):
            images = [*training_dir.glob(f"{name}.png"), *training_dir.glob(f"{name}-*.png")]
            if images:
                files[f"{name}.png"] = max(images, key=lambda path: path.stat().st_mtime)
    own_card = (training_dir or folder) / "README.md"
    if own_card.is_file():
        files["README.md"] = own_card
    else:
        card = make_model_card(folder, repo_id, license, dataset, training_dir, tuple(files), _variants(files))
        files["README.md"] = str(card).encode()
    _check_secrets(files)
    return files


def check_folder(folder: Path) -> tuple[dict, list[Path]]:
    """
    Find out whether a folder holds a pipeline that can be published, before the Hub is asked for anything.

    Returns:
        `dict`: its index.
        `list[Path]`: the files of its weights.

    Raises:
        As [`collect_files`].
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(explain_missing_index(folder, str(folder)))
    configs = [f"{part}/{name}" for part, name in CONFIGS.items()]
    for name in configs:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no complete pipeline: {name} is missing.")
    index, _ = read_configs(folder, str(folder))
    kind = pipeline_class_name(index)
    if kind not in OWN_PIPELINES:
        raise ValueError(
            f"{str(folder)!r} holds a {kind}: load it by NCSNPipeline.from_pretrained, save that, and upload it."
        )
    weights = sorted((folder / "unet").glob(f"{WEIGHTS}*.safetensors"))
    if not any(re.fullmatch(rf"{WEIGHTS}(-\d+-of-\d+)?\.safetensors", path.name) for path in weights):
        pickles = sorted(path.name for path in (folder / "unet").iterdir() if path.suffix in (".bin", ".pt", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{str(folder)!r} holds its weights as {', '.join(pickles)}, a pickle, which may run code on whoever "
                "loads it. Load the pipeline, save it again, which leaves safetensors, and upload that."
            )
        raise FileNotFoundError(f"{str(folder)!r} holds no complete pipeline: unet/{WEIGHTS}.safetensors is missing.")
    check_stamp(folder, str(folder))
    return index, weights


def _make_variants(
    folder: Path, network_class: type[ModelMixin], variants: Sequence[str], uses_ema: bool
) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {}
    for variant in variants:
        if any(any((folder / "unet").glob(name)) for name in weight_names("safetensors", variant)):
            continue  # it is there
        if variant == "ema" and uses_ema:
            # the run has saved its averages as the weights, which the Hub stores once under both names
            for path in (folder / "unet").glob(f"{WEIGHTS}*"):
                middle = path.name.removeprefix(WEIGHTS)
                if re.fullmatch(r"(-\d+-of-\d+)?\.safetensors", middle):
                    files[f"unet/{WEIGHTS}.ema{middle}"] = path
        elif variant == "fp16":
            with tempfile.TemporaryDirectory() as scratch:
                unet = network_class.from_pretrained(folder / "unet", use_safetensors=True).half()
                unet.save_pretrained(scratch, variant="fp16")
                for path in Path(scratch).glob(f"{WEIGHTS}*"):
                    files[f"unet/{path.name}"] = path.read_bytes()
        elif variant == "ema":
            raise ValueError(
                "`variants`: there is no 'ema', for the folder has neither such weights nor the training_config.json "
                "of a run that has averaged them (`use_ema`)."
            )
        else:
            raise ValueError(
                f"`variants` must be among {', '.join(VARIANTS)}, or in the folder already, not {variant!r}."
            )
    return files


def _variants(files: dict) -> list[str]:
    found = (re.match(rf"unet/{WEIGHTS}\.([^.-]+)(-\d+-of-\d+)?\.safetensors", name) for name in files)
    return sorted({match[1] for match in found if match})


def _check_secrets(files: dict[str, bytes | Path]) -> None:
    token = get_token()
    for name, content in files.items():
        if name.endswith((".json", ".md", ".py")):
            text = read_content(content).decode(errors="replace")
            if _SECRET.search(text) or (token and token in text):
                raise ValueError(f"{name} holds an access token, which must not be published: take it out.")


def without_secrets(text: str, api: HfApi) -> str:
    for token in (api.token, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "…")
    return _SECRET.sub("…", text)


def read_content(content: bytes | Path) -> bytes:
    """The content of one of the files of [`collect_files`]."""
    return content if isinstance(content, bytes) else content.read_bytes()


def _to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
