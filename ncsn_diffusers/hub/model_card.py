"""The model card of a saved pipeline: how to use it, its noise levels, and the training run as its folder tells it."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import ModelCard, ModelCardData

from ..foreign_configs import SCHEDULERS
from ..units import Units
from .configs import CONFIGS, INDEX, TEXT, check_values, read_json, translate_index, unusable

logger = logging.get_logger(__name__)

_EXAMPLE_DATASET = "ylecun/mnist"  # of which the package embeds a part, to train on by default
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def make_model_card(
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    dataset: str | None = None,
    training_dir: str | Path | None = None,
    images: Sequence[str] = ("samples.png", "loss.png"),
    variants: Sequence[str] = (),
) -> ModelCard:
    """
    The model card of a saved pipeline.

    Args:
        folder (`str` or `Path`): where the pipeline is.
        repo_id (`str`), license (`str`, *optional*), dataset (`str`, *optional*): as of [`push_to_hub`].
        training_dir (`str` or `Path`, *optional*): as of [`push_to_hub`].
        images (`Sequence[str]`): which of samples.png and loss.png are there.
        variants (`Sequence[str]`): of the weights, to be named.

    Raises:
        ValueError: `dataset` is not such a name.
        OSError: a config, or the training run's settings or log, cannot be read.
    """
    folder = Path(folder)
    index = read_json(folder / INDEX, INDEX, str(folder))
    unet, scheduler = (read_json(folder / part / name, f"{part}/{name}", str(folder)) for part, name in CONFIGS.items())
    settings, log = read_training_config(training_dir), _read_log(training_dir)
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
    color = {1: "gray", 3: "color", 4: "color and transparency"}.get(unet["in_channels"], "many-channel")
    name = repo_id.split("/")[-1]
    parts = [
        f"# {name}",
        "A noise conditional score network ([Song & Ermon 2019](https://arxiv.org/abs/1907.05600)) that draws "
        f"{color} images of {size} pixels{', of the class that is asked for or of all' if conditional else ''}, for "
        "[diffusers](https://huggingface.co/docs/diffusers).",
    ]
    if "samples.png" in images:
        parts.append("![Samples](samples.png)\n\n*Drawn by the network, not selected.*")
    parts += [_usage_section(repo_id, scheduler, conditional, variants), _levels_section(index, scheduler)]
    if settings or log:
        link = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if on_the_hub else dataset
        link = f"{link}, its first 10,000 training images" if embedded else link
        parts.append(_training_section(settings, log, link))
        if "loss.png" in images:
            parts.append("![Loss curve](loss.png)")
    terms = f"The weights are under the license `{license}`." if license else "No license has been named."
    if dataset == _EXAMPLE_DATASET:
        terms += (
            " The MNIST digits, by Yann LeCun and Corinna Cortes, are under "
            "[CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/)."
        )
    parts += [f"## License\n\n{terms}", _CITATION]
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

These schedulers of diffusers sample it as well: {", ".join(SCHEDULERS)}. Others have another time or
scaling of the noise, and are refused. DDIM for example:

```python
from diffusers import DDIMScheduler

pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe(batch_size=16, num_inference_steps=20)
```"""


def _levels_section(index: dict, scheduler: dict) -> str:
    rows = [
        ("levels", scheduler.get("num_train_timesteps")),
        ("sigma, smallest", scheduler.get("sigma_min")),
        ("sigma, largest", scheduler.get("sigma_max")),
        ("spacing", scheduler.get("beta_schedule")),
        ("the network is given", scheduler.get("conditioning")),
        ("the network returns", scheduler.get("prediction_type")),
        ("sampler", scheduler.get("_class_name")),
    ]
    return f"## Noise levels\n\n{_describe_units(index)}\n\n" + _table(rows)


def _describe_units(index: dict) -> str:
    """What the network makes of the data, in whose terms sigma is."""
    index = translate_index(index, "NCSNPipeline")
    units = Units(index.get("data_mean", 0.5), index.get("data_std", 0.25), index.get("value_range", (0.0, 1.0)))
    if units.is_image:
        black = units.to_network(torch.zeros(1, 1)).item()
        return f"Sigma is in the network's units, in which images are in [{black:g}, 1]."

    def several(values: float | list[float]) -> str:
        return ", ".join(f"{value:.6g}" for value in (values if isinstance(values, list) else [values]))

    unit = f" {index['data_unit']}" if index.get("data_unit") else ""
    limits = "" if units.value_range is None else ", from {:g} to {:g}".format(*units.value_range)
    return (
        f"The data have mean {several(units.data_mean)}{unit} and standard deviation {several(units.data_std)}{unit}"
        f"{limits}. Sigma is in the network's units, (data - mean)/(2 standard deviations)."
    )


def _training_section(settings: dict, log: list[dict], data: str | None) -> str:
    losses = [record for record in log if "loss" in record]
    validation = [record["validation_loss"] for record in log if "validation_loss" in record]
    speeds = sorted(r["images_per_second"] for r in losses if math.isfinite(r.get("images_per_second", math.inf)))
    rows = [
        ("architecture", settings.get("architecture")),
        ("data", data),
        ("steps", losses[-1]["step"] if losses else None),
        ("epochs", f"{losses[-1]['epoch']:.3g}" if losses and "epoch" in losses[-1] else None),
        ("images per step and process", _product(settings, "train_batch_size", "gradient_accumulation_steps")),
        ("learning rate", settings.get("learning_rate")),
        ("seed", settings.get("seed")),
        ("weights", {True: "moving average", False: "of the last step"}.get(settings.get("use_ema"))),
        ("loss at the end", f"{losses[-1]['loss']:.4g}" if losses else None),
        ("validation loss", f"{validation[-1]:.4g}" if validation else None),
        ("images per second, median", f"{speeds[len(speeds) // 2]:.3g}" if speeds else None),
    ]
    text = "## Training\n\n" + _table(rows)
    if "command" in settings:
        text += f"\n\n```bash\n{settings['command']}\n```"
    return text


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


# The training run's files


def read_training_config(training_dir: str | Path | None) -> dict:
    """
    What a run has recorded in training_config.json: its settings and, from newer versions of this package, `command`,
    the command line that started it. Empty where there is no such folder or file.

    Raises:
        OSError: the file is no such record.
    """
    path = Path(training_dir or "", "training_config.json")
    if training_dir is None or not path.is_file():
        return {}
    settings = read_json(path, path.name, str(training_dir))
    check_values(settings, {"command": TEXT}, path.name, str(training_dir))
    return settings


def _read_log(training_dir: str | Path | None) -> list[dict]:
    path = Path(training_dir or "", "log.jsonl")
    if training_dir is None or not path.is_file():
        return []
    records, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                reason = f"line {number} is not JSON ({error})"
                raise OSError(unusable(path.name, str(training_dir), reason)) from error
            logger.warning(f"The last line of {path} is incomplete, and is left out of the card.")
            break
        if not isinstance(record, dict):
            raise OSError(unusable(path.name, str(training_dir), f"line {number} must be a JSON object"))
        records.append(record)
    return records
