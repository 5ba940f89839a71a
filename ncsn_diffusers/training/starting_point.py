"""
The pipeline that a run begins with (`pretrained_model_name_or_path`): its network and what that network means.

A run that resumes takes both from its checkpoint, so the pipeline may be gone by then.
"""

import json
from dataclasses import asdict, dataclass, replace

from diffusers import ModelMixin

from ..hub.configs import NETWORKS
from ..hub.loading import NCSNPipeline
from ..networks_ncsn import RefineNet2DModel
from ..pretrained import find_pipeline
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..units import Units
from .config import GIVEN_BY_PIPELINE, TrainingConfig

_NAME = "`pretrained_model_name_or_path`"


@dataclass(frozen=True)
class StartingPoint:
    """A network, the scheduler with its noise levels, the data's units, and the number of levels to draw by."""

    name: str
    network: ModelMixin
    scheduler: AnnealedLangevinScheduler
    num_inference_steps: int
    units: Units

    def to_dict(self) -> dict:
        """All but the weights, as JSON can hold it."""
        return {
            "class": type(self.network).__name__,
            "network": _public(self.network),
            "scheduler": json.loads(self.scheduler.to_json_string()),
            "num_inference_steps": self.num_inference_steps,
            "units": asdict(self.units),
        }

    @classmethod
    def from_dict(cls, name: str, record: dict) -> "StartingPoint":
        """What [`StartingPoint.to_dict`] has returned, with random weights."""
        network = NETWORKS[record["class"]].from_config(record["network"])
        scheduler = AnnealedLangevinScheduler.from_config(record["scheduler"])
        return cls(name, network, scheduler, record["num_inference_steps"], Units(**record["units"]))


def find_starting_point(config: TrainingConfig, manifest: dict | None) -> StartingPoint | None:
    """
    What the run begins with, if not with random weights.

    Args:
        config ([`TrainingConfig`]): the run's settings.
        manifest (`dict`, *optional*): of the checkpoint to resume from, which decides then.

    Raises:
        ValueError: the pipeline cannot be loaded, or is none that can be trained, or the checkpoint is of a run that
            began with another.
    """
    name = config.pretrained_model_name_or_path
    if manifest is not None:
        before = manifest["config"]["pretrained_model_name_or_path"]
        if before != name:
            began = "random weights" if before is None else f"those of {before!r}"
            raise ValueError(f"{_NAME}={name!r}: the run to resume began with {began}, and goes on with them alone.")
        return None if name is None else StartingPoint.from_dict(name, manifest["starting_point"])
    if name is None:
        return None
    try:
        pipe = NCSNPipeline.from_pretrained(find_pipeline(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{_NAME}={name!r} cannot be loaded: {error}") from error
    network = pipe.unet.float().train().requires_grad_(True)  # float16 rounds small updates away
    if network.config.in_channels != network.config.get("out_channels", network.config.in_channels):
        raise ValueError(
            f"{_NAME}={name!r}: its network takes {network.config.in_channels} channels and returns "
            f"{network.config.out_channels}; it must return as many."
        )
    scheduler = AnnealedLangevinScheduler.from_config(pipe.scheduler.config)
    return StartingPoint(name, network, scheduler, pipe.config.num_inference_steps, pipe.units)


def fill_settings(config: TrainingConfig, start: StartingPoint) -> TrainingConfig:
    """
    The settings with those of the pipeline where they say nothing.

    Raises:
        ValueError: a setting differs from the pipeline's.
    """
    network, scheduler = start.network.config, start.scheduler.config
    is_refinenet = isinstance(start.network, RefineNet2DModel)
    architecture = "unet"
    if is_refinenet:
        architecture = "ncsnv2" if network.sigmas is None else "ncsn"
    given = {
        "architecture": architecture,
        "block_out_channels": tuple(network.block_out_channels),
        "layers_per_block": None if is_refinenet else network.layers_per_block,
        "add_attention": None if is_refinenet else any(hasattr(module, "to_q") for module in start.network.modules()),
        **{name: scheduler[name] for name in GIVEN_BY_PIPELINE if name in scheduler},
    }
    for name, value in given.items():
        asked = getattr(config, name)
        if asked is not None and (tuple(asked) if isinstance(value, tuple) else asked) != value:
            raise ValueError(f"`{name}`={asked!r} does not fit {_NAME}={start.name!r}, which has {value!r}.")
    _check_shape(start, config.channels, None if config.resolution is None else (config.resolution,) * 2)
    if config.class_conditional != (network.get("num_class_embeds") is not None):
        knows = "knows no classes" if config.class_conditional else "is given the class of each image"
        raise ValueError(
            f"`class_conditional`={config.class_conditional} does not fit {_NAME}={start.name!r}: its network {knows}."
        )
    return replace(config, **given)


def check_images(start: StartingPoint, shape: tuple[int, ...], num_classes: int | None) -> None:
    """
    Whether the network takes images of this shape, of channels and sides, and so many classes.

    Raises:
        ValueError: it does not.
    """
    _check_shape(start, shape[0], shape[1:])
    if num_classes is not None and num_classes + 1 != start.network.config.num_class_embeds:
        raise ValueError(
            f"`label_column`: the images are of {num_classes} classes, and the network of {_NAME}={start.name!r} knows "
            f"{start.network.config.num_class_embeds - 1}."
        )


def _check_shape(start: StartingPoint, channels: int | None, size: tuple[int, ...] | None) -> None:
    network = start.network.config
    if channels not in (None, network.in_channels):
        raise ValueError(
            f"`channels`: the images have {channels}, and the network of {_NAME}={start.name!r} takes "
            f"{network.in_channels}; --channels {network.in_channels} makes them fit."
        )
    if size is None or network.sample_size is None:
        return
    expected = network.sample_size
    expected = (expected,) * len(size) if isinstance(expected, int) else tuple(expected)
    if tuple(size) != expected:
        found, takes = ("×".join(map(str, sides)) for sides in (size, expected))
        hint = f"; --resolution {expected[0]} makes them fit" if len(set(expected)) == 1 else ""
        raise ValueError(
            f"`resolution`: the images have {found} pixels, and the network of {_NAME}={start.name!r} takes "
            f"{takes}{hint}."
        )


def _public(network: ModelMixin) -> dict:
    return {name: value for name, value in json.loads(network.to_json_string()).items() if not name.startswith("_")}
