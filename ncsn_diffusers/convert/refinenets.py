"""The RefineNets of 2019 and 2020, and those of adversarial score matching."""

from collections.abc import Sequence

from diffusers.utils import logging

from ..hub.loading import NCSNPipeline
from ..networks_ncsn import RefineNet2DModel
from .checkpoints import (
    Given,
    Published,
    State,
    count_tensors,
    fill,
    find_ladder,
    find_publication,
    first,
    get_state,
    list_names,
    make_pipeline,
    make_scheduler,
)

logger = logging.get_logger(__name__)

NCSNV2 = [
    Published("NCSNv2, CIFAR-10", 50.0, 232, 32, 5, 6.2e-6),
    Published("NCSNv2, CelebA", 90.0, 500, 64, 5, 3.3e-6),
    Published("NCSNv2, LSUN church_outdoor", 140.0, 788, 96, 4, 4.9e-6),
    Published("NCSNv2, LSUN bedroom or tower", 190.0, 1086, 128, 3, 1.8e-6),
    Published("NCSNv2, FFHQ", 348.0, 2311, 256, 3, 0.9e-6),
]
ADVERSARIAL = [
    Published("adversarial score matching, CIFAR-10", 50.0, 232, 32, 1, 5.6e-6),
    Published("adversarial score matching, LSUN church_outdoor", 140.0, 788, 64, 1, 2.8e-6),
    Published("adversarial score matching, Stacked MNIST", 50.0, 200, 28, 1, 5e-6),
]
# The originals' numbers in the order of use; the deepest network alone has a 31.
_STAGES = ("1", "2", "3", "31", "4", "5")
_REFINE_BLOCKS = ("1", "2", "31", "3", "4", "5")
_ENDS = {"conv_in": "begin_conv", "conv_out": "end_conv", "norm_out": "normalizer"}


def convert_refinenet(parts: Sequence, source: str, given: Given) -> NCSNPipeline:
    state, used, unused = _read_parts(parts, source)
    ladder = state.pop("sigmas", None)
    in_channels, num_rows = state["begin_conv.weight"].shape[1], None
    if "normalizer.embed.weight" in state:
        num_rows, columns = state["normalizer.embed.weight"].shape
        if columns != 3 * state["begin_conv.weight"].shape[0]:
            raise OSError(f"{source!r}: its normalization is not InstanceNorm++, the only one that can be converted.")
    published = _published(num_rows, in_channels, ladder is not None)
    sigmas = find_ladder(ladder, given, source, published)
    if num_rows not in (None, len(sigmas)):
        raise ValueError(f"`num_train_timesteps`={len(sigmas)}: the network has embeddings for {num_rows} levels.")
    settings = _settings(sigmas, given, find_publication(sigmas, published), source)

    stages = [n for n in _STAGES if f"res{n}.1.conv1.weight" in state]
    dilations = [1]
    for n in stages[1:]:
        # A stage that keeps its size doubles the dilation of the one before it; the shapes do not tell.
        keeps_size = f"res{n}.0.shortcut.weight" in state
        dilations.append(2 * dilations[-1] if keeps_size else 1)
    data_min = first(given.data_min, 0)
    network = RefineNet2DModel(
        sample_size=settings.pop("sample_size"),
        in_channels=in_channels,
        center_input_sample=data_min == 0,
        block_out_channels=[state[f"res{n}.1.conv1.weight"].shape[0] for n in stages],
        dilations=dilations,
        sigmas=None if num_rows is None else sigmas,
        act_fn=first(given.act_fn, "elu"),
    )
    fill(network, state, lambda name: _refinenet_name(name, stages, dilations), source)
    assumed = [f"data in [{data_min}, 1] (`data_min`)"] if given.data_min is None else []
    assumed += ["nonlinearity='elu' (`act_fn`)"] if given.act_fn is None else []
    assumed.append("dilations that double from stage to stage")
    logger.warning(
        f"{source}: the pipeline has {used}. Not used: {', '.join(unused) or 'nothing'}. The file does not hold these "
        f"settings, which are assumed as published: {', '.join(assumed)}."
    )
    scheduler = make_scheduler(
        sigmas, **settings, is_consistent=published is ADVERSARIAL, knows_levels_only=num_rows is not None
    )
    return make_pipeline(network, scheduler, data_min)


def _read_parts(parts: Sequence, source: str) -> tuple[State, str, list[str]]:
    """The weights, or their moving average; which of the two they are; and the parts of the file that are not used."""
    state = get_state(parts[0], "its first part, the model,", source)
    used, unused = "the weights", []
    if len(parts) > 1:
        unused.append(f"the optimizer's state ({count_tensors(parts[1])} tensors)")
    for i, part in enumerate(parts[1:4], 2):
        # the optimizer's state and the counts, which belong here, have other names than the network
        if isinstance(part, dict) and {str(name).removeprefix("module.") for name in part} & state.keys():
            unused.append(
                f"part {i}, which looks like weights, too, or their average: the average is expected as part 5, so "
                "save [model, optimizer, epoch, step, average] where it is one"
            )
    if len(parts) > 4 and parts[4] is not None:
        average = get_state(parts[4], "its fifth part, the moving average,", source)
        differ = (average.keys() ^ state.keys()) - {"sigmas"}
        if differ:
            raise OSError(f"{source!r}: the moving average and the weights differ in {list_names(sorted(differ))}.")
        used = "the weights' moving average"
        unused.append(f"the weights themselves ({len(average)} tensors)")
        state |= average
    if len(parts) > 5:
        unused.append(f"what follows the moving average ({count_tensors(parts[5:])} tensors)")
    if "begin_conv.weight" not in state or "res1.1.conv1.weight" not in state:
        raise OSError(
            f"{source!r} holds no RefineNet of the NCSN papers but {list_names(state)}: other networks, such as the "
            "U-Nets of adversarial score matching, cannot be converted."
        )
    return state, used, unused


def _published(num_rows: int | None, in_channels: int, has_ladder: bool) -> list[Published]:
    """The publications that a file may be of: only NCSNv2's hold the ladder."""
    if num_rows is None:
        return NCSNV2 if has_ladder else ADVERSARIAL
    return [Published("NCSN (2019)", 1.0, num_rows, 28 if in_channels == 1 else 32, 100, 2e-5, denoise_final=False)]


def _settings(sigmas: list[float], given: Given, found: Published | None, source: str) -> dict:
    """Size of the images and the sampler's settings, as they are given or else as they were published."""
    if found is None:
        if given.sample_size is None:
            raise ValueError(
                "`sample_size` must be given, the height and width of the images: the file does not say, and its "
                f"{len(sigmas)} noise levels from {sigmas[0]:g} to {sigmas[-1]:g} match no published configuration."
            )
        if given.step_lr is None:
            given.refuse(("num_langevin_steps", "denoise_final"), "the original's sampler needs `step_lr`, too.")
            logger.warning(f"{source} matches no published configuration: the sampler is this package's own.")
            return {"sample_size": given.sample_size}
    names = ("sample_size", "num_langevin_steps", "step_lr", "denoise_final")
    settings = {name: first(getattr(given, name), getattr(found, name, None)) for name in names}
    guessed = [f"{name}={settings[name]}" for name in names if getattr(given, name) is None and found is not None]
    if guessed:
        logger.warning(
            f"{source}: its {len(sigmas)} noise levels from {sigmas[0]:g} to {sigmas[-1]:g} match {found.name}, "
            f"whose settings are used: {', '.join(guessed)}."
        )
    settings["num_langevin_steps"] = first(settings["num_langevin_steps"], 1)
    settings["denoise_final"] = first(settings["denoise_final"], True)
    return settings


def _refinenet_name(name: str, stages: Sequence[str], dilations: Sequence[int]) -> str:
    """The originals' name of a tensor of [`RefineNet2DModel`]."""
    name = name.replace("embedding", "embed.weight")
    part, *path = name.split(".")
    if part in _ENDS:
        return ".".join([_ENDS[part], *path])
    if part == "stages":
        stage, block, layer, *rest = path
        pools = layer in ("conv2", "shortcut") and block == "0" and stage != "0" and dilations[int(stage)] == 1
        layer = layer.replace("norm", "normalize") + ".conv" * pools
        return ".".join([f"res{stages[int(stage)]}", block, layer, *rest])
    numbers = [n for n in _REFINE_BLOCKS if n in stages]
    block, layer, *rest = path
    prefix = f"refine{numbers[int(block)]}"
    if layer in ("inputs", "output"):
        which = f"adapt_convs.{rest.pop(0)}" if layer == "inputs" else "output_convs"
        kind, unit, conv, *rest = rest
        return ".".join([prefix, which, f"{int(unit) + 1}_{int(conv) + 1}_{kind[:-1]}", *rest])
    which, kind = layer.split("_")
    return ".".join([prefix, {"fuse": "msf", "pool": "crp"}[which], kind, *rest])
