"""The NCSN++ of score_sde, as diffusers' UNet2DModel, or a SkipUNet2DModel where its groups are others."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging

from ..hub.loading import NCSNPipeline
from ..networks_ncsn import SkipUNet2DModel
from ..units import image_units
from .checkpoints import (
    Given,
    State,
    count_tensors,
    describe,
    fill,
    find_ladder,
    first,
    get_state,
    list_names,
    make_scheduler,
)

logger = logging.get_logger(__name__)


def convert_ncsnpp(parts: dict, source: str, given: Given) -> NCSNPipeline:
    state = get_state(parts["model"], "its model", source)
    unused = [
        f"`{name}` ({count_tensors(part)} tensors)"
        for name, part in parts.items()
        if name not in ("model", "ema") and count_tensors(part)
    ]
    used = "the weights"
    if parts.get("ema") is not None:
        used = "the weights' moving average"
        count = _use_average(state, parts["ema"], source)
        unused.append(f"the weights themselves ({count} tensors)")
    ladder = state.pop("sigmas", None)
    if not any(name.startswith("all_modules.") for name in state):
        raise OSError(f"{source!r} holds another network of score_sde than NCSN++: {list_names(state)}.")
    config, layout = _ncsnpp_layout(state, source)
    given.refuse(
        ("num_langevin_steps", "step_lr", "denoise_final"),
        "score_sde has another sampler, whose steps are not Langevin's alone; it is not converted.",
    )
    given.refuse(("act_fn",), "diffusers' network has the activation swish throughout.")
    size = first(given.sample_size, config["sample_size"])
    assumed = [] if given.sample_size is not None else [f"attention at 16×16 (and so images of {size}×{size})"]
    data_min = first(given.data_min, 0)
    sigmas = find_ladder(ladder, given, source)
    network = _make_network({**config, "center_input_sample": data_min == 0, "sample_size": size}, source)
    fill(network, state, lambda name: _ncsnpp_name(name, layout), source)
    scheduler = make_scheduler(sigmas)
    logger.warning(
        f"{source}: the pipeline has {used}, and this package's own sampler. Not used: "
        f"{', '.join(unused) or 'nothing'}. The file does not say how the network was trained; these settings of the "
        f"paper's configs are assumed: {', '.join([*assumed, *_ASSUMED])}. If the original's config has other ones, "
        "the pipeline is wrong, and no option can mend it."
    )
    return NCSNPipeline(network, scheduler, **image_units(data_min))


def _make_network(config: dict, source: str) -> UNet2DModel:
    """diffusers' own class where its normalizations have the originals' groups, and else ours."""
    channels = config["block_out_channels"]
    for count in channels:
        if count % 32:
            raise OSError(
                f"{source!r} is an NCSN++ that diffusers' UNet2DModel cannot be: a level has {count} channels, and its "
                "blocks need multiples of 32."
            )
    network = SkipUNet2DModel(**config)
    stock = UNet2DModel(**config)
    norms = [[m.num_groups for m in n.modules() if isinstance(m, torch.nn.GroupNorm)] for n in (network, stock)]
    return stock if norms[0] == norms[1] else network


def _use_average(state: State, ema: Any, source: str) -> int:
    """Put the averages, a list in the order of the parameters, in the place of the weights; their number."""
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(averages, list) or not all(isinstance(tensor, torch.Tensor) for tensor in averages):
        raise OSError(f"{source!r}: its `ema` must hold `shadow_params`, a list of tensors, and is {describe(ema)}.")
    # neither buffers nor the fixed frequencies of the embedding are averaged
    names = [name for name in state if name != "sigmas" and not re.fullmatch(r"all_modules\.\d+\.W", name)]
    if [state[name].shape for name in names] != [tensor.shape for tensor in averages]:
        raise OSError(
            f"{source!r}: the {len(averages)} `shadow_params` of its `ema` do not have the shapes of the {len(names)} "
            "parameters of its `model`."
        )
    state.update(zip(names, averages, strict=True))
    return len(names)


# Settings of the originals' config that leave no trace in the weights, and that UNet2DModel cannot have otherwise.
_ASSUMED = (
    "sde='vesde'",
    "continuous=True",
    "scale_by_sigma=True",
    "skip_rescale=True",
    "nonlinearity='swish'",
    "fir=True with fir_kernel=[1, 3, 3, 1]",
    "progressive_combine='sum'",
)
_RESNET = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time_emb_proj": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "conv_shortcut": "Conv_2",
}
_ATTENTION = {"group_norm": "GroupNorm_0", "to_q": "NIN_0", "to_k": "NIN_1", "to_v": "NIN_2", "to_out.0": "NIN_3"}


def _ncsnpp_name(name: str, layout: Sequence[tuple[str, str]]) -> str:
    """The original's name of a tensor of the [`UNet2DModel`]."""
    i, prefix, kind = next((i, p, kind) for i, (p, kind) in enumerate(layout) if name.startswith(f"{p}."))
    *layer, last = name.removeprefix(f"{prefix}.").split(".")
    if kind == "fourier":
        return f"all_modules.{i}.W"
    if kind == "combine":
        layer = ["Conv_0"]
    elif kind != "other":
        layer = [{"resnet": _RESNET, "attention": _ATTENTION}[kind][".".join(layer)]]
        if layer[0].startswith("NIN"):
            last = {"weight": "W", "bias": "b"}[last]
    return ".".join([f"all_modules.{i}", *layer, last])


def _ncsnpp_kind(names: Collection[str]) -> str:
    """What a module is, from the names of its tensors; "other" is a layer, whose tensors are a weight and a bias."""
    for name, kind in (("W", "fourier"), ("NIN_0.W", "attention"), ("GroupNorm_0.weight", "resnet")):
        if name in names:
            return kind
    return "combine" if "Conv_0.weight" in names else "other"


def _ncsnpp_layout(state: State, source: str) -> tuple[dict, list[tuple[str, str]]]:
    """
    The config of the [`UNet2DModel`] that an NCSN++ is, and for each of its modules our name and its kind.

    The originals number their modules in the order of use. Their kinds tell how many levels and layers there are; the
    list of ours that follows from that must then be theirs.
    """

    def refusal(reason: str) -> OSError:
        return OSError(f"{source!r} is an NCSN++ that diffusers' UNet2DModel cannot be: {reason}.")

    modules: dict[int, State] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", name)
        if match is None:
            raise OSError(f"{source!r} has `{name}`, which no NCSN++ has.")
        modules.setdefault(int(match[1]), {})[match[2]] = tensor
    kinds = {i: _ncsnpp_kind(modules[i]) for i in sorted(modules)}
    if any(name.startswith("Conv2d_0") for module in modules.values() for name in module):
        raise refusal(
            "its pyramids are of residuals (progressive_input='residual'), as in those for CIFAR-10, and UNet2DModel "
            "has only those of sums ('input_skip', 'output_skip')"
        )
    if kinds.get(0) != "fourier":
        raise refusal("it does not begin with Fourier features of sigma (embedding_type='fourier')")

    # Each level but the last ends in a smaller resnet, to which the input's pyramid is added. The first resnet is 4.
    combines = [i for i, kind in kinds.items() if kind == "combine"]
    starts = [4, *(i + 1 for i in combines)]
    attends = [kinds.get(start + 1) == "attention" for start in starts]
    num_layers = sum(kinds.get(i) == "resnet" for i in range(4, combines[0] - 1)) if combines else 0
    layout = [("time_proj", "fourier"), ("time_embedding.linear_1", "other"), ("time_embedding.linear_2", "other")]
    layout.append(("conv_in", "other"))
    for level, attention in enumerate(attends):
        for layer in range(num_layers):
            layout.append((f"down_blocks.{level}.resnets.{layer}", "resnet"))
            layout += [(f"down_blocks.{level}.attentions.{layer}", "attention")] * attention
        if level < len(starts) - 1:
            layout += [(f"down_blocks.{level}.resnet_down", "resnet"), (f"down_blocks.{level}.skip_conv", "combine")]
    layout += [(f"mid_block.{name}", kind) for name, kind in (("resnets.0", "resnet"), ("attentions.0", "attention"))]
    layout.append(("mid_block.resnets.1", "resnet"))
    for number, attention in enumerate(reversed(attends)):
        block, is_last = f"up_blocks.{number}", number == len(starts) - 1
        layout += [(f"{block}.resnets.{layer}", "resnet") for layer in range(num_layers + 1)]
        layout += [(f"{block}.attentions.0", "attention")] * attention
        if is_last:
            layout += [("conv_norm_out", "other"), ("conv_out", "other")]
        else:
            layout += [
                (f"{block}.skip_norm", "other"),
                (f"{block}.skip_conv", "other"),
                (f"{block}.resnet_up", "resnet"),
            ]
    if num_layers == 0 or [kind for _, kind in layout] != list(kinds.values()):
        raise refusal("its blocks are others, or in another order, than resblock_type='biggan' with 'input_skip' has")

    width = modules[3]["weight"].shape[0]
    channels = [modules[start]["Conv_0.weight"].shape[0] for start in starts]
    attention_level = attends.index(True) if any(attends) else len(starts) - 1
    config = {
        "sample_size": 16 * 2**attention_level,
        "in_channels": modules[3]["weight"].shape[1],
        "out_channels": modules[3]["weight"].shape[1],
        "time_embedding_type": "fourier",
        "block_out_channels": channels,
        "layers_per_block": num_layers,
        "down_block_types": ["AttnSkipDownBlock2D" if attention else "SkipDownBlock2D" for attention in attends],
        "up_block_types": ["AttnSkipUpBlock2D" if attention else "SkipUpBlock2D" for attention in attends[::-1]],
        "mid_block_scale_factor": math.sqrt(2),
        "norm_eps": 1e-6,
        "norm_num_groups": None,  # a quarter of the channels, 32 at most
        "attention_head_dim": None,
    }
    if width != channels[0]:
        raise refusal(f"its first convolution has {width} channels, and its first level {channels[0]}")
    return config, layout
