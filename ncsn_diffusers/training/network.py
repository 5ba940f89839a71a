"""The network that is trained."""

import math

import torch
from diffusers import UNet2DModel

from ..networks_ncsn import RefineNet2DModel
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .config import TrainingConfig


def check_size(config: TrainingConfig, height: int, width: int) -> None:
    """
    Whether the network that `config` names takes images of this height and width, in pixels.

    Raises:
        ValueError: a side cannot be halved as often as `block_out_channels` requires.
    """
    num_levels = len(config.block_out_channels)
    if config.architecture != "unet":
        least = 2 ** (num_levels - 2)
        if min(height, width) < least:
            raise ValueError(
                f"`resolution`: images of {height}×{width} are halved {num_levels - 3} times by `block_out_channels`="
                f"{config.block_out_channels}, and 2 pixels must be left; both sides must be at least {least}."
            )
        return
    divisor = 2 ** (num_levels - 1)
    if height % divisor or width % divisor:
        raise ValueError(
            f"`resolution`: images of {height}×{width} cannot be halved {num_levels - 1} times, as "
            f"`block_out_channels`={config.block_out_channels} requires; both sides must be multiples of {divisor}."
        )


def make_network(
    config: TrainingConfig,
    scheduler: AnnealedLangevinScheduler,
    channels: int,
    height: int,
    width: int,
    num_classes: int | None = None,
) -> UNet2DModel | RefineNet2DModel:
    """
    The network that `config.architecture` names: that of [`make_unet`], or a [`RefineNet2DModel`]. As in the papers'
    networks, its last two stages have the dilations 2 and 4, and those between them and the first halve the image.

    Args:
        config ([`TrainingConfig`]): the settings of the network.
        scheduler ([`AnnealedLangevinScheduler`]): whose noise levels the network of 2019 has embeddings for.
        channels (`int`), height (`int`), width (`int`), num_classes (`int`, *optional*): see [`make_unet`].

    Raises:
        ValueError: a side cannot be halved as often as `block_out_channels` requires.
    """
    if config.architecture == "unet":
        return make_unet(config, channels, height, width, num_classes)
    check_size(config, height, width)
    levels = torch.arange(len(scheduler), dtype=torch.float64).flip(0)
    return RefineNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        block_out_channels=config.block_out_channels,
        dilations=(1,) * (len(config.block_out_channels) - 2) + (2, 4),
        sigmas=scheduler.ladder.sigma_at(levels).tolist() if config.architecture == "ncsn" else None,
    )


def make_unet(
    config: TrainingConfig, channels: int, height: int, width: int, num_classes: int | None = None
) -> UNet2DModel:
    """
    A [`UNet2DModel`] for images of this shape, with attention on its last level.

    Args:
        config ([`TrainingConfig`]): `block_out_channels`, `layers_per_block`, `conditioning`.
        channels (`int`): of the images, and of what the network returns.
        height (`int`): of the images, in pixels.
        width (`int`): of the images, in pixels.
        num_classes (`int`, *optional*): with it, the class embedding has `num_classes + 1` entries; the last one stands
            for no label.

    Raises:
        ValueError: a side cannot be halved as often as `block_out_channels` requires.
    """
    check_size(config, height, width)
    num_levels = len(config.block_out_channels)
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        time_embedding_type="fourier" if config.conditioning == "sigma" else "positional",
        layers_per_block=config.layers_per_block,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D",) * (num_levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (num_levels - 1),
        # A group of one channel would cancel all that the embeddings of level and class add to it.
        norm_num_groups=math.gcd(32, math.gcd(*config.block_out_channels) // 4),
        attention_head_dim=math.gcd(64, config.block_out_channels[-1]),  # diffusers' default, heads of 8, is slow
        resnet_time_scale_shift="scale_shift",  # after the norm, where nothing cancels the embeddings
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
