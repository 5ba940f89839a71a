"""The pipelines of the package diffusers-ncsn 0.1.0."""

import json
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from ..hub.loading import NCSNPipeline
from ..networks_ncsn import LevelUNet2DModel
from .checkpoints import Given, fill, first, make_pipeline, make_scheduler


def convert_diffusers_ncsn(folder: Path, given: Given) -> NCSNPipeline:
    source = str(folder)
    index = _read_config(folder / "model_index.json")
    classes = {part: tuple(index.get(part) or ())[-1:] for part in ("unet", "scheduler")}
    if classes != {"unet": ("UNet2DModelForNCSN",), "scheduler": ("AnnealedLangevinDynamicsScheduler",)}:
        raise OSError(
            f"{source!r} is no pipeline of diffusers-ncsn. A pipeline of this package or of diffusers needs no "
            "conversion: NCSNPipeline.from_pretrained loads it."
        )
    given.refuse(
        ("sample_size", "sigma_min", "sigma_max", "num_train_timesteps", "act_fn"),
        "the configs in the folder have it already.",
    )
    unet = {key: value for key, value in _read_config(folder / "unet" / "config.json").items() if key[0] != "_"}
    sampler = _read_config(folder / "scheduler" / "scheduler_config.json")
    keys = ("sigma_min", "sigma_max", "num_train_timesteps")
    for key in keys:  # with newer versions of diffusers the network's config has no number of levels
        if sampler.get(key) is None or unet.pop(key, None) not in (None, sampler[key]):
            raise OSError(f"{source!r}: its scheduler must have `{key}`, and its unet must have the same.")
    smallest, largest, num = (sampler[key] for key in keys)
    if unet.get("time_embedding_type", "positional") != "positional":
        raise OSError(
            f"{source!r}: its `time_embedding_type` must be 'positional', not {unet['time_embedding_type']!r}."
        )
    sigmas = [largest, *np.geomspace(largest, smallest, num).tolist()[1:-1], smallest]
    size, channels = unet.pop("sample_size"), unet.pop("in_channels", 3)
    if unet.pop("out_channels", 3) != channels:
        raise OSError(f"{source!r}: its network returns another number of channels than the {channels} of the image.")
    network = LevelUNet2DModel(sigmas, size, channels, unet)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise OSError(f"{source!r}: unet/{weights.name} is missing.")
    state = load_file(weights)
    trained = state.pop("sigmas", None)
    if trained is not None and (len(trained) != num or not np.allclose(trained, sigmas, rtol=1e-4, atol=0)):
        raise OSError(f"{source!r}: the noise levels in unet/{weights.name} are not those of the scheduler's config.")
    fill(network, state, lambda name: name.removeprefix("model."), source)
    # its sampler is the text of the 2019 paper: half the step of the originals' code
    scheduler = make_scheduler(
        sigmas,
        step_lr=first(given.step_lr, sampler["sampling_eps"] / 2),
        num_langevin_steps=first(given.num_langevin_steps, sampler["num_annealed_steps"]),
        denoise_final=first(given.denoise_final, False),
        knows_levels_only=True,
    )
    return make_pipeline(network, scheduler, first(given.data_min, 0))


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise OSError(f"{str(path)!r} must be a JSON object.")
    return config
