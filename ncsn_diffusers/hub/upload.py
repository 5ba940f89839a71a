"""
Publishing a pipeline on the Hub, with a model card and with the code that loads it where this package is not installed.

What is uploaded is chosen file by file: the pipeline's configs, its weights as safetensors, the scheduler's and the
pipeline's module, the card and its pictures. Checkpoints, logs and whatever else lies in a folder stay there. One
commit takes it all, so that a connection that is cut leaves the repository as it was.
"""

import json
import math
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .loading import (
    OWN_PIPELINES,
    NCSNPipeline,
    explain_missing_index,
    find_not_finite,
    pipeline_class_name,
    read_configs,
)

VARIANTS = ("fp16", "ema")

_PACKAGE = Path(__file__).parents[1]
_WEIGHTS = "diffusion_pytorch_model"
_EXAMPLE_DATASET = "ylecun/mnist"  # of which the package embeds a part, to train on by default
_ATTEMPTS = 5
_FIRST_WAIT = 2.0  # seconds before the second attempt; each further wait is twice as long
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SECRET = re.compile(r"hf_(oauth_|jwt_)?[A-Za-z0-9]{16,}")
# Settings that say where a run kept its files and how it was watched, and not what came out
_UNTOLD = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "checkpointing_steps", "logger")

logger = logging.get_logger(__name__)


def push_to_hub(
    pipeline: NCSNPipeline | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    variants: Sequence[str] = (),
    license: str | None = None,
    dataset: str | None = None,
    training_dir: str | Path | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Upload a pipeline as one commit. Whatever can be wrong with the arguments, the folder or the token is found before
    anything is created or uploaded; an upload that is cut off is tried again.

    Args:
        pipeline ([`NCSNPipeline`], `str` or `Path`): the pipeline, or the folder that it was saved in.
        repo_id (`str`): `"user/name"`, `"organisation/name"`, or `"name"` among one's own.
        private (`bool`, *optional*):
            Whether a new repository is private; the account's default when not given. True refuses a public one.
        revision (`str`, *optional*): the branch, made from `main` if there is none of that name; `main` by default.
        tag (`str`, *optional*): a new tag for the commit, such as `"v1"`.
        token (`str`, *optional*): the one that `hf auth login` or HF_TOKEN left by default.
        variants (`Sequence[str]`):
            Weights beside the usual ones: `"fp16"`, in half precision; `"ema"`, those of a training run that has
            averaged them, under that name too. Variants that are in the folder are uploaded in any case.
        license (`str`, *optional*): of the weights, an identifier of the Hub such as `"apache-2.0"`, for the card.
        dataset (`str`, *optional*):
            Name on the Hub of the data set, for the card; that of the training's settings by default.
        training_dir (`str` or `Path`, *optional*):
            The folder that [`~training.train`] wrote to, whose samples, settings and log the card shows; that of the
            pipeline, if `pipeline` is one. A README.md there is uploaded instead of a new card.
        commit_message (`str`, *optional*): the commit's summary.

    Returns:
        `CommitInfo`: of the new commit, or of the last one where nothing has changed.

    Raises:
        ValueError: an argument or a file cannot be uploaded as it is, or the tag exists already.
        FileNotFoundError: the folder holds no complete pipeline.
        PermissionError: the token is missing, invalid, or may not write there.
        OSError: the Hub could not be reached, or failed, several times.
    """
    api = HfApi(token=token)
    repo_id = _check_access(api, repo_id, private, tag)
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(pipeline, str | Path):
            folder = Path(pipeline)
            training_dir = training_dir or folder
        else:
            folder = Path(scratch) / "pipeline"
            pipeline.save_pretrained(folder)
        files = collect_files(folder, repo_id, variants, license, dataset, training_dir)
        return _upload(api, files, repo_id, private, revision, tag, commit_message)


class BackgroundPush:
    """
    Uploads during a training run, which neither waits for them nor fails with them: what goes wrong is warned of.

    One upload runs at a time. What is pushed meanwhile waits, and gives way to what is pushed after it.

    ```python
    uploads = BackgroundPush("user/name", training_dir)  # wrong names and tokens are found here
    uploads.push(pipeline, "Step 500")
    uploads.push(pipeline, "End of training")
    uploads.finish()
    ```

    Args:
        repo_id (`str`): as of [`push_to_hub`].
        training_dir (`str` or `Path`): as of [`push_to_hub`].
        private (`bool`, *optional*), token (`str`, *optional*): as of [`push_to_hub`].
        license (`str`, *optional*), dataset (`str`, *optional*): as of [`push_to_hub`].

    Raises:
        ValueError, PermissionError, OSError: as [`push_to_hub`].
    """

    def __init__(
        self,
        repo_id: str,
        training_dir: str | Path,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        dataset: str | None = None,
    ):
        self._api = HfApi(token=token)
        self.repo_id = _check_access(self._api, repo_id, private)
        self._private = private
        _create_repository(self._api, self.repo_id, private, None)
        self._card = {"license": license, "dataset": dataset, "training_dir": Path(training_dir)}
        self._lock = threading.Lock()
        self._waiting: tuple[Future, Any, dict, str] | None = None
        self._thread: threading.Thread | None = None
        self._last: Future | None = None

    def push(self, pipeline: NCSNPipeline, commit_message: str) -> Future:
        """
        Save the pipeline as it is now, and upload it when its turn comes.

        Returns:
            `Future`: of the `CommitInfo`, or of None where the upload has failed or given way to a later one.
        """
        future, scratch = Future(), None
        try:
            scratch = tempfile.TemporaryDirectory()
            folder = Path(scratch.name)
            pipeline.save_pretrained(folder)
            files = collect_files(folder, self.repo_id, **self._card)
            # the training folder's pictures may change while they wait
            files = {name: _read(file) if name.endswith(".png") else file for name, file in files.items()}
        except Exception as error:  # a full disk, for example
            if scratch is not None:
                scratch.cleanup()
            self._warn(error)
            future.set_result(None)
            return future
        with self._lock:
            self._last = future
            if self._waiting is not None:
                self._waiting[0].set_result(None)
                self._waiting[1].cleanup()
            self._waiting = (future, scratch, files, commit_message)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="push_to_hub")
                self._thread.start()
        return future

    def finish(self) -> CommitInfo | None:
        """Wait for the last upload; its commit, or None where it has failed."""
        return None if self._last is None else self._last.result()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                (future, scratch, files, message), self._waiting = self._waiting, None
            result = None
            try:
                result = _upload(self._api, files, self.repo_id, self._private, None, None, message)
            except Exception as error:
                self._warn(error)
            finally:
                scratch.cleanup()
                future.set_result(result)

    def _warn(self, error: Exception) -> None:
        logger.warning(
            f"The upload to {self.repo_id} has failed: {_without_secrets(str(error), self._api)} The training goes on, "
            "and `python scripts/push_to_hub.py` uploads its folder afterwards."
        )


# What is uploaded


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
        OSError: a config holds what cannot be used.
    """
    folder, training_dir = Path(folder), None if training_dir is None else Path(training_dir)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(explain_missing_index(folder, str(folder)))
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no complete pipeline: {name} is missing.")
    index, _ = read_configs(folder, str(folder))
    kind = pipeline_class_name(index)
    if kind not in OWN_PIPELINES:
        raise ValueError(
            f"{str(folder)!r} holds a {kind}: load it by NCSNPipeline.from_pretrained, save that, and upload it."
        )
    weights = sorted((folder / "unet").glob(f"{_WEIGHTS}*.safetensors"))
    if not any(re.fullmatch(rf"{_WEIGHTS}(-\d+-of-\d+)?\.safetensors", path.name) for path in weights):
        pickles = sorted(path.name for path in (folder / "unet").iterdir() if path.suffix in (".bin", ".pt", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{str(folder)!r} holds its weights as {', '.join(pickles)}, a pickle, which may run code on whoever "
                "loads it. Load the pipeline, save it again, which leaves safetensors, and upload that."
            )
        raise FileNotFoundError(f"{str(folder)!r} holds no complete pipeline: unet/{_WEIGHTS}.safetensors is missing.")
    for path in weights:
        not_finite = find_not_finite(path)
        if not_finite is not None:
            raise ValueError(
                f"unet/{path.name} of {str(folder)!r} is not to be published: `{not_finite}` holds NaN or infinity."
            )

    files: dict[str, bytes | Path] = {f"unet/{path.name}": path for path in weights}
    for path in sorted((folder / "unet").glob(f"{_WEIGHTS}*.index*.json")):
        files[f"unet/{path.name}"] = path
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        files[name] = _to_json({k: v for k, v in _read_json(folder / name).items() if k != "_name_or_path"})

    settings = _read_json(training_dir / "training_config.json") if training_dir is not None else {}
    files |= _make_variants(folder, variants, settings)

    index.pop("_name_or_path", None)  # a path of this machine
    index["_class_name"] = ["pipeline_ncsn", "NCSNPipeline"]
    files["pipeline_ncsn.py"] = _PACKAGE / "pipeline_ncsn.py"
    if index["scheduler"][1] == AnnealedLangevinScheduler.__name__:
        index["scheduler"] = ["scheduling_annealed_langevin", AnnealedLangevinScheduler.__name__]
        files["scheduler/scheduling_annealed_langevin.py"] = _PACKAGE / "scheduling_annealed_langevin.py"
    files["model_index.json"] = _to_json(index)

    if training_dir is not None:
        for name in ("samples", "loss"):
            pictures = [*training_dir.glob(f"{name}.png"), *training_dir.glob(f"{name}-*.png")]
            if pictures:
                files[f"{name}.png"] = max(pictures, key=lambda path: path.stat().st_mtime)
    own_card = (training_dir or folder) / "README.md"
    if own_card.is_file():
        files["README.md"] = own_card
    else:
        card = make_model_card(folder, repo_id, license, dataset, training_dir, tuple(files), _variants(files))
        files["README.md"] = str(card).encode()
    _check_secrets(files)
    return files


def _make_variants(folder: Path, variants: Sequence[str], settings: dict) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {}
    for variant in variants:
        present = sorted((folder / "unet").glob(f"{_WEIGHTS}.{variant}*.safetensors"))
        if present:
            continue
        if variant == "ema" and settings.get("use_ema"):
            # the run has saved its averages as the weights, which the Hub stores once under both names
            for path in (folder / "unet").glob(f"{_WEIGHTS}*"):
                middle = path.name.removeprefix(_WEIGHTS)
                if re.fullmatch(r"(-\d+-of-\d+)?\.safetensors", middle):
                    files[f"unet/{_WEIGHTS}.ema{middle}"] = path
        elif variant == "fp16":
            with tempfile.TemporaryDirectory() as scratch:
                unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True).half()
                unet.save_pretrained(scratch, variant="fp16")
                for path in Path(scratch).glob(f"{_WEIGHTS}*"):
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
    found = (re.match(rf"unet/{_WEIGHTS}\.([^.-]+)(-\d+-of-\d+)?\.safetensors", name) for name in files)
    return sorted({match[1] for match in found if match})


def _check_secrets(files: dict[str, bytes | Path]) -> None:
    token = get_token()
    for name, content in files.items():
        if name.endswith((".json", ".md", ".py")):
            text = _read(content).decode(errors="replace")
            if _SECRET.search(text) or (token and token in text):
                raise ValueError(f"{name} holds an access token, which must not be published: take it out.")


def _without_secrets(text: str, api: HfApi) -> str:
    for token in (api.token, get_token()):
        if isinstance(token, str) and token:
            text = text.replace(token, "…")
    return _SECRET.sub("…", text)


# The card


def make_model_card(
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    dataset: str | None = None,
    training_dir: str | Path | None = None,
    pictures: Sequence[str] = ("samples.png", "loss.png"),
    variants: Sequence[str] = (),
) -> ModelCard:
    """
    The model card of a saved pipeline.

    Args:
        folder (`str` or `Path`): where the pipeline is.
        repo_id (`str`), license (`str`, *optional*), dataset (`str`, *optional*): as of [`push_to_hub`].
        training_dir (`str` or `Path`, *optional*): as of [`push_to_hub`].
        pictures (`Sequence[str]`): which of samples.png and loss.png are there.
        variants (`Sequence[str]`): of the weights, to be named.

    Raises:
        ValueError: `dataset` is not such a name.
    """
    folder = Path(folder)
    unet = _read_json(folder / "unet" / "config.json")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    run = Path(training_dir) if training_dir is not None else None
    settings = _read_json(run / "training_config.json") if run is not None else {}
    log = _read_log(run / "log.jsonl") if run is not None else []
    if dataset is not None and not _ON_THE_HUB.fullmatch(dataset):
        raise ValueError(
            f"`dataset`={dataset!r} must be the name of a data set on the Hub, such as {_EXAMPLE_DATASET!r}."
        )
    embedded = dataset is None and bool(settings) and _name_of_data(settings) is None
    dataset = dataset or _dataset(settings)
    conditional = bool(unet.get("num_class_embeds"))
    on_the_hub = dataset is not None and _ON_THE_HUB.fullmatch(dataset) is not None
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        datasets=[dataset] if on_the_hub else None,
        tags=["ncsn", "score-matching", "langevin-dynamics", "diffusion", *["class-conditional"] * conditional],
    )
    size = unet["sample_size"]
    size = f"{size} × {size}" if isinstance(size, int) else " × ".join(map(str, size))
    colour = {1: "gray", 3: "colour", 4: "colour and transparency"}.get(unet["in_channels"], "many-channelled")
    name = repo_id.split("/")[-1]
    parts = [
        f"# {name}",
        "A noise conditional score network ([Song & Ermon 2019](https://arxiv.org/abs/1907.05600)) that draws "
        f"{colour} pictures of {size} pixels{', of a class or of any' if conditional else ''}, for "
        "[diffusers](https://huggingface.co/docs/diffusers).",
    ]
    if "samples.png" in pictures:
        parts.append("![Samples](samples.png)\n\n*Drawn by the network, not selected.*")
    parts += [_usage_section(repo_id, scheduler, conditional, variants), _levels_section(folder, scheduler)]
    if settings or log:
        link = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if on_the_hub else dataset
        link = f"{link}, its first 10,000 training pictures" if embedded else link
        parts.append(_training_section(settings, log, link))
        if "loss.png" in pictures:
            parts.append("![Loss curve](loss.png)")
    licence = f"The weights are under the licence `{license}`." if license else "No licence has been named."
    if dataset == _EXAMPLE_DATASET:
        licence += (
            " The MNIST digits, by Yann LeCun and Corinna Cortes, are under "
            "[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/)."
        )
    parts += [f"## Licence\n\n{licence}", _CITATION]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _usage_section(repo_id: str, scheduler: dict, conditional: bool, variants: Sequence[str]) -> str:
    label = ", class_labels=0" if conditional else ""
    text = f"""## Use

With ncsn_diffusers installed:

```python
from ncsn_diffusers import NCSNPipeline

pipe = NCSNPipeline.from_pretrained("{repo_id}")
pipe(batch_size=16{label}).images[0].save("sample.png")
```

Without it, the sampler's code comes from this repository:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
```"""
    if variants:
        text += "\n\nOther weights: " + ", ".join(f'`variant="{variant}"`' for variant in variants) + "."
    if scheduler.get("conditioning") == "sigma":
        return text + "\n\nThe network is conditioned on sigma itself: it runs under annealed Langevin dynamics only."
    return f"""{text}

Any scheduler of diffusers samples it, DDIM for example:

```python
from diffusers import DDIMScheduler

pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe(batch_size=16, num_inference_steps=20)
```"""


def _levels_section(folder: Path, scheduler: dict) -> str:
    index = _read_json(folder / "model_index.json")
    low = f"{index.get('data_min', -1):g}"
    rows = [
        ("levels", scheduler.get("num_train_timesteps")),
        ("sigma, smallest", scheduler.get("sigma_min")),
        ("sigma, largest", scheduler.get("sigma_max")),
        ("spacing", scheduler.get("beta_schedule")),
        ("the network is given", scheduler.get("conditioning")),
        ("the network returns", scheduler.get("prediction_type")),
        ("sampler", scheduler.get("_class_name")),
    ]
    return f"## Noise levels\n\nSigma is in units of the data, pictures in [{low}, 1].\n\n" + _table(rows)


def _training_section(settings: dict, log: list[dict], data: str | None) -> str:
    losses = [record for record in log if "loss" in record]
    validation = [record["validation_loss"] for record in log if "validation_loss" in record]
    speeds = sorted(r["images_per_second"] for r in losses if math.isfinite(r.get("images_per_second", math.inf)))
    rows = [
        ("data", data),
        ("steps", losses[-1]["step"] if losses else None),
        ("epochs", f"{losses[-1]['epoch']:.3g}" if losses and "epoch" in losses[-1] else None),
        ("pictures a step and process", _product(settings, "train_batch_size", "gradient_accumulation_steps")),
        ("learning rate", settings.get("learning_rate")),
        ("seed", settings.get("seed")),
        ("weights", {True: "moving average", False: "of the last step"}.get(settings.get("use_ema"))),
        ("loss at the end", f"{losses[-1]['loss']:.4g}" if losses else None),
        ("validation loss", f"{validation[-1]:.4g}" if validation else None),
        ("pictures a second, median", f"{speeds[len(speeds) // 2]:.3g}" if speeds else None),
    ]
    text = "## Training\n\n" + _table(rows)
    if settings:
        text += f"\n\n```bash\n{training_command(settings)}\n```"
    return text


def training_command(settings: dict) -> str:
    """
    The command that trains with these settings, as far as they differ from the defaults. Folders are cut down to
    their names, and what concerns the Hub is left out.
    """
    from ..training import TrainingConfig  # which uses this module, to upload

    defaults = json.loads(json.dumps(vars(TrainingConfig())))
    words = ["accelerate launch scripts/train_ncsn.py"]
    for name, value in settings.items():
        if name in _UNTOLD or "hub" in name or "token" in name or name not in defaults or value == defaults[name]:
            continue
        flag = f"--{name}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no_{name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([flag, *(_quote(_local_name(v)) for v in values)]))
    return " \\\n    ".join(words)


def _quote(value) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./@:+-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _local_name(value):
    local = isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if local else value


def _name_of_data(settings: dict) -> str | None:
    return settings.get("dataset_name") or settings.get("train_data_dir")


def _dataset(settings: dict) -> str | None:
    """What the run has learned from: a data set of the Hub, or the name of a folder."""
    if not settings:
        return None
    name = _name_of_data(settings)
    if name is None:
        return _EXAMPLE_DATASET
    return Path(name).name if settings.get("dataset_name") is None or Path(name).exists() else _local_name(name)


def _product(settings: dict, *names: str) -> int | None:
    values = [settings.get(name) for name in names]
    return None if None in values else math.prod(values)


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


_CITATION = """## Citation

```bibtex
@inproceedings{song2019generative,
  title={Generative Modeling by Estimating Gradients of the Data Distribution},
  author={Song, Yang and Ermon, Stefano},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}

@inproceedings{song2020improved,
  title={Improved Techniques for Training Score-Based Generative Models},
  author={Song, Yang and Ermon, Stefano},
  booktitle={Advances in Neural Information Processing Systems},
  year={2020}
}
```"""


# Files


def _read(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _to_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


# The Hub


def _check_access(api: HfApi, repo_id: str, private: bool | None, tag: str | None = None) -> str:
    """The full name of the repository, if the token may write there and nothing stands against it."""
    validate_repo_id(repo_id)  # raises a ValueError that says what is accepted
    user = _retry(api.whoami)
    if "/" not in repo_id:
        repo_id = f"{user['name']}/{repo_id}"
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if owner not in owners:
        raise PermissionError(f"`repo_id`={repo_id!r}: the token is of {', '.join(owners)}, and not of {owner}.")
    if _retry(lambda: api.repo_exists(repo_id)):
        if private and not _retry(lambda: api.repo_info(repo_id)).private:
            raise ValueError(
                f"`private`: {repo_id} exists and is public. Change that in its settings, or choose another name."
            )
        if tag is not None and tag in (ref.name for ref in _retry(lambda: api.list_repo_refs(repo_id)).tags):
            raise ValueError(f"`tag`={tag!r} exists already in {repo_id}: choose another one.")
    return repo_id


def _create_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> None:
    _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision not in (None, "main"):
        _retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


def _upload(
    api: HfApi,
    files: dict[str, bytes | Path],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    tag: str | None,
    commit_message: str | None,
) -> CommitInfo:
    # ModelCard.validate, which calls this one, asks huggingface.co wherever HF_ENDPOINT leads, before version 2
    _retry(lambda: api._validate_yaml(_read(files["README.md"]).decode()))
    _create_repository(api, repo_id, private, revision)

    def commit() -> CommitInfo:
        # Anew for each attempt. A commit whose answer was lost is found to have changed nothing, and not made twice.
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message or "Upload NCSNPipeline", revision=revision
        )

    info = _retry(commit)
    if tag is not None:
        _retry(lambda: api.create_tag(repo_id, tag=tag, revision=info.oid))
    return info


def _retry(function: Callable[[], Any]) -> Any:
    """
    What the function returns. It is called again, after a while, where the Hub or the way there has failed.

    Raises:
        OSError: it has failed each time.
        PermissionError: the token is missing, invalid, or not enough.
        Exception: what the function raises for a reason that will not pass.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return function()
        except Exception as error:
            status = _status(error)
            if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
                raise PermissionError(
                    "The Hub does not let you do that: log in by `hf auth login`, or give a `token` that may write, "
                    "from https://huggingface.co/settings/tokens."
                ) from None
            passing = status in (408, 429) or (status or 0) >= 500 or (status is None and _is_of_the_network(error))
            if not passing:
                raise
            if attempt == _ATTEMPTS - 1:
                raise OSError(f"The Hub has failed {_ATTEMPTS} times, the last time with: {error}") from error
            wait = _FIRST_WAIT * 2**attempt
            logger.warning(f"The Hub has failed ({type(error).__name__}); trying again in {wait:g} seconds.")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _causes(error: BaseException):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error goes back to."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code
    return None


def _is_of_the_network(error: BaseException) -> bool:
    # by the module, since the client's versions use different libraries for HTTP
    modules = {type(cause).__module__.split(".")[0] for cause in _causes(error)}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl", "socket"}) or any(
        isinstance(cause, ConnectionError | TimeoutError) for cause in _causes(error)
    )
