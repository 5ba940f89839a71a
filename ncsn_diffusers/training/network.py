"""The network that is trained."""

import math
from collections.abc import Sequence

import torch
from diffusers import UNet2DModel

from ..networks_ncsn import RefineNet2DModel
from ..networks_nd import UNetNDModel
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .config import TrainingConfig

_FEW_TOKENS = 64
_MOST_TOKENS = 576  # 24 × 24 points that attend to each other; more take most of a step


def channels_of(config: TrainingConfig, *size: int) -> tuple[int, ...]:
    """
    `block_out_channels`, or, where a unet has none, 32 64 64 and as many further levels of 64 as leave at most 576
    points on the last one: a level more for images of 128 × 128, two for 256 × 256.
    """
    if config.block_out_channels is not None:
        return config.block_out_channels
    channels = (32, 64, 64)
    while count_tokens(channels, *size) > _MOST_TOKENS:
        channels += (64,)
    return channels


def has_attention(config: TrainingConfig, *size: int) -> bool:
    """
    `add_attention`, or, where a unet has none, whether the last level has more than 64 points. The convolutions on so
    few see all of them, and training is faster without attention; docs/training.md has what was measured.
    """
    if config.add_attention is not None:
        return config.add_attention
    return count_tokens(channels_of(config, *size), *size) > _FEW_TOKENS


def check_size(config: TrainingConfig, *size: int) -> None:
    """
    Whether the network that `config` names takes data of these sides, such as height and width.

    Raises:
        ValueError: there are not 1 to 3 sides, or they cannot be halved as often as `block_out_channels` requires.
    """
    channels, sides = channels_of(config, *size), "×".join(map(str, size))
    num_levels = len(channels)
    if config.architecture != "unet":
        if len(size) != 2:
            raise ValueError(
                f"`architecture`={config.architecture!r} is for images, and these data have {len(size)} dimension(s), "
                f"{sides}: 'unet' takes 1 to 3."
            )
        least = 2 ** (num_levels - 2)
        if min(size) < least:
            raise ValueError(
                f"`resolution`: images of {sides} are halved {num_levels - 3} times by `block_out_channels`="
                f"{channels}, and 2 pixels must be left; both sides must be at least {least}."
            )
        return
    if not 1 <= len(size) <= 3:
        raise ValueError(f"The data must have 1 to 3 dimensions beside their channels, not {len(size)}, {sides}.")
    least = 2 ** (num_levels - 2) + 1 if num_levels > 1 else 1
    if max(size) < least:
        raise ValueError(
            f"Data of {sides} are a single point before they are halved {num_levels - 1} times, as "
            f"`block_out_channels`={channels} requires: the longest side must be at least {least}."
        )


def network_class(config: TrainingConfig, *size: int) -> type[UNet2DModel | UNetNDModel | RefineNet2DModel]:
    """
    The class that `config.architecture` means for data of these sides. A unet is a [`UNet2DModel`] for images whose
    sides can be halved as often as `block_out_channels` requires, and a [`UNetNDModel`] for all else.
    """
    if config.architecture != "unet":
        return RefineNet2DModel
    divisor = 2 ** (len(channels_of(config, *size)) - 1)
    return UNet2DModel if len(size) == 2 and not any(side % divisor for side in size) else UNetNDModel


def count_tokens(block_out_channels: Sequence[int], *size: int) -> int:
    """The points of the last level of a network with these channels, between which [`make_unet`] puts attention."""
    return math.prod(-(-side // 2 ** (len(block_out_channels) - 1)) for side in size)


def describe_choice(config: TrainingConfig, *size: int) -> str:
    """A sentence that says which network is trained, and why where that is not the usual one."""
    chosen, sides = network_class(config, *size).__name__, " × ".join(map(str, size))
    channels, what = channels_of(config, *size), {1: "signals", 2: "images", 3: "volumes"}[len(size)]
    sentence = f"The network is a {chosen} for {what} of {sides}"
    if chosen == "UNetNDModel" and len(size) == 2:
        sentence += f": a UNet2DModel needs sides that are multiples of {2 ** (len(channels) - 1)}"
    if config.block_out_channels is None and len(channels) > 3:
        sentence += f". For this size it has --block_out_channels {' '.join(map(str, channels))}"
    return f"{sentence}."


def make_network(
    config: TrainingConfig, scheduler: AnnealedLangevinScheduler, shape: Sequence[int], num_classes: int | None = None
) -> UNet2DModel | UNetNDModel | RefineNet2DModel:
    """
    The network that `config.architecture` names: that of [`make_unet`], or a [`RefineNet2DModel`]. As in the papers'
    networks, its last two stages have the dilations 2 and 4, and those between them and the first halve the image.

    Args:
        config ([`TrainingConfig`]): the settings of the network.
        scheduler ([`AnnealedLangevinScheduler`]): whose noise levels the network of 2019 has embeddings for.
        shape (`tuple[int, ...]`), num_classes (`int`, *optional*): see [`make_unet`].

    Raises:
        ValueError: the sides do not fit; see [`check_size`].
    """
    if config.architecture == "unet":
        return make_unet(config, shape, num_classes)
    channels, *size = shape
    check_size(config, *size)
    levels = torch.arange(len(scheduler), dtype=torch.float64).flip(0)
    return RefineNet2DModel(
        sample_size=size[0] if size[0] == size[1] else tuple(size),
        in_channels=channels,
        block_out_channels=config.block_out_channels,
        dilations=(1,) * (len(config.block_out_channels) - 2) + (2, 4),
        sigmas=scheduler.ladder.sigma_at(levels).tolist() if config.architecture == "ncsn" else None,
    )


def make_unet(
    config: TrainingConfig, shape: Sequence[int], num_classes: int | None = None
) -> UNet2DModel | UNetNDModel:
    """
    A U-Net for data of this shape; [`network_class`] says of which class. If [`has_attention`], it has self-attention
    after each residual layer of its last level and in its middle.

    Args:
        config ([`TrainingConfig`]): `block_out_channels`, `layers_per_block`, `add_attention`, `conditioning`.
        shape (`tuple[int, ...]`):
            Of one sample: `(channels, length)`, `(channels, height, width)` or `(channels, depth, height, width)`. The
            network returns as many channels.
        num_classes (`int`, *optional*): with it, the class embedding has `num_classes + 1` entries; the last one stands
            for no label.

    Raises:
        ValueError: the sides do not fit; see [`check_size`].
    """
    channels, *size = shape
    check_size(config, *size)
    block_out_channels = channels_of(config, *size)
    num_levels, attends = len(block_out_channels), has_attention(config, *size)
    settings = {
        "in_channels": channels,
        "out_channels": channels,
        "time_embedding_type": "fourier" if config.conditioning == "sigma" else "positional",
        "layers_per_block": config.layers_per_block,
        "block_out_channels": block_out_channels,
        # A group of one channel would cancel all that the embeddings of level and class add to it.
        "norm_num_groups": math.gcd(32, math.gcd(*block_out_channels) // 4),
        "attention_head_dim": math.gcd(64, block_out_channels[-1]),  # diffusers' default, heads of 8, is slow
        "add_attention": attends,
        "num_class_embeds": None if num_classes is None else num_classes + 1,
    }
    if network_class(config, *size) is UNetNDModel:
        levels = None if attends else (False,) * num_levels
        return UNetNDModel(tuple(size), attention_levels=levels, **settings)
    last = "Attn" if attends else ""
    return UNet2DModel(
        sample_size=size[0] if size[0] == size[1] else tuple(size),
        down_block_types=("DownBlock2D",) * (num_levels - 1) + (f"{last}DownBlock2D",),
        up_block_types=(f"{last}UpBlock2D",) + ("UpBlock2D",) * (num_levels - 1),
        resnet_time_scale_shift="scale_shift",  # after the norm, where nothing cancels the embeddings
        **settings,
    )
