"""The network that is trained."""

import math

from diffusers import UNet2DModel

from .config import NetworkSettings


def make_unet(
    config: NetworkSettings, channels: int, height: int, width: int, num_classes: int | None = None
) -> UNet2DModel:
    """
    A [`UNet2DModel`] for images of this shape, with attention on its last level.

    Args:
        config ([`TrainingConfig`] or `NetworkSettings`): `block_out_channels`, `layers_per_block`, `conditioning`.
        channels (`int`): of the images, and of what the network returns.
        height (`int`): of the images, in pixels.
        width (`int`): of the images, in pixels.
        num_classes (`int`, *optional*): with it, the class embedding has `num_classes + 1` entries; the last one stands
            for no label.

    Raises:
        ValueError: a side cannot be halved as often as `block_out_channels` requires.
    """
    num_levels = len(config.block_out_channels)
    divisor = 2 ** (num_levels - 1)
    if height % divisor or width % divisor:
        raise ValueError(
            f"`resolution`: images of {height}×{width} cannot be halved {num_levels - 1} times, as "
            f"`block_out_channels`={config.block_out_channels} requires; both sides must be multiples of {divisor}."
        )
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
