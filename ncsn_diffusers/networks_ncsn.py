"""Networks that are given sigma and return the score: those of the two NCSN papers, and U-Nets told of a level's index.

Song & Ermon 2019 (arXiv:1907.05600, appendix A.1) tell the network the noise level by an embedding in each
normalization; Song & Ermon 2020 (arXiv:2006.09011, technique 3 and appendix B.1) divide what an unconditional network
returns by sigma instead. The rest is the same: a stack of residual stages, most of them dilated rather than smaller
(Yu & Koltun 2016, arXiv:1511.07122), and a RefineNet (Lin et al. 2017, arXiv:1611.06612) that fuses the stages from the
last to the first.

    published as      block_out_channels                dilations             millions of parameters
    NCSN, NCSNv2      128, 256, 256, 256                1, 1, 2, 4            30.1, 29.7
    NCSNv2Deeper      128, 256, 256, 512, 512           1, 1, 1, 2, 4         83.4
    NCSNv2Deepest     128, 256, 256, 256, 512, 512      1, 1, 1, 1, 2, 4      94.1

Instance normalization takes away each channel's mean, and with it the color of large areas. "InstanceNorm++" gives it
back: with mu_k and s_k the mean and deviation of channel k over the image, m and v those of mu over the channels,

    z_k = gamma_k ((x_k - mu_k)/s_k + alpha_k (mu_k - m)/v) + beta_k.                                            (1)

A [`LevelUNet2DModel`] is a U-Net that was trained with the index of the level, as those of the package diffusers-ncsn
are; a [`SkipUNet2DModel`] is a small NCSN++ (Song et al. 2021, arXiv:2011.13456). This file stands alone, so that it
can be uploaded beside the weights.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn import functional

Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "elu": functional.elu,
    "relu": functional.relu,
    "leaky_relu": partial(functional.leaky_relu, negative_slope=0.2),
    "silu": functional.silu,
}


class RefineNet2DModel(ModelMixin, ConfigMixin):
    """
    The network of NCSN or NCSNv2, called as a [`UNet2DModel`] is. It is given sigma and the unscaled noisy sample, and
    returns the score: `AnnealedLangevinScheduler(conditioning="sigma", prediction_type="score")` fits.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 32):
            Height and width of the images to draw. The network itself takes any size.
        in_channels (`int`, defaults to 3): Channels of the image and of the score.
        center_input_sample (`bool`, defaults to `False`): Take data in [0, 1], and compute with 2x - 1.
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 256, 256, 256)`): Channels of each stage.
        dilations (`tuple[int, ...]`, defaults to `(1, 1, 2, 4)`):
            Dilation of each stage's convolutions. A stage after the first with dilation 1 halves the image; one with a
            larger dilation keeps its size.
        sigmas (`list[float]`, *optional*):
            The noise levels with an embedding each, falling, in the network's units: the network of 2019. Between two
            levels the embeddings are interpolated in log sigma, beyond them the end's is taken; the network was not
            trained there. `None` is the network of 2020, which takes any sigma.
        act_fn (`str`, defaults to `"elu"`):
            The activation: "elu", as published, "relu", "leaky_relu" (of slope 0.2) or "silu".

    Raises:
        ValueError: `act_fn` is none of these, `block_out_channels` and `dilations` differ in length or are not
            positive, or `sigmas` do not fall.
    """

    _no_split_modules = ["ResidualBlock", "RefineBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        center_input_sample: bool = False,
        block_out_channels: Sequence[int] = (128, 256, 256, 256),
        dilations: Sequence[int] = (1, 1, 2, 4),
        sigmas: Sequence[float] | None = None,
        act_fn: str = "elu",
    ):
        super().__init__()
        if act_fn not in ACTIVATIONS:
            raise ValueError(f"`act_fn` must be one of {', '.join(ACTIVATIONS)}, not {act_fn!r}.")
        if len(block_out_channels) != len(dilations) or min(*block_out_channels, *dilations) < 1:
            raise ValueError(
                "`block_out_channels` and `dilations` must be as many positive ints, one for each stage, not "
                f"{block_out_channels} and {dilations}."
            )
        self._ladder = None if sigmas is None else _Ladder(sigmas)
        self._act = act = ACTIVATIONS[act_fn]
        num_levels = None if sigmas is None else len(sigmas)
        channels = list(block_out_channels)

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, dilation in enumerate(dilations):
            first = ResidualBlock(channels[max(i - 1, 0)], channels[i], dilation, num_levels, act, is_transition=i > 0)
            self.stages.append(
                nn.ModuleList([first, ResidualBlock(channels[i], channels[i], dilation, num_levels, act)])
            )
        self.refine_blocks = nn.ModuleList()  # from the last stage to the first
        for i in reversed(range(len(channels))):
            is_first, is_last = i == len(channels) - 1, i == 0
            self.refine_blocks.append(
                RefineBlock(
                    channels[i], channels[max(i - 1, 0)], 1 if is_first else 2, 3 if is_last else 1, num_levels, act
                )
            )
        self.norm_out = InstanceNorm2dPlus(channels[0], num_levels)
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): x, in the network's units.
            timestep (`torch.Tensor` of shape `()` or `(batch_size,)`, or `float`): sigma, in the same units.
            class_labels (`None`): there for the interface's sake; the network knows no classes.
            return_dict (`bool`, defaults to `True`): A [`UNet2DOutput`], or a plain tuple.

        Returns:
            [`UNet2DOutput`] or `tuple`: the score, in 1 / the network's units.

        Raises:
            ValueError: class labels are given.
        """
        if class_labels is not None:
            raise ValueError("`class_labels` are for a class-conditional network, and a RefineNet2DModel is none.")
        sigma = _per_image(timestep, sample)
        level = None if self._ladder is None else self._ladder.find(sigma)

        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        outputs = []
        for stage in self.stages:
            for block in stage:
                x = block(x, level)
            outputs.append(x)
        x = self.refine_blocks[0](outputs[-1:], level)
        for block, output in zip(self.refine_blocks[1:], reversed(outputs[:-1]), strict=True):
            x = block([output, x], level)
        x = self.conv_out(self._act(self.norm_out(x, level)))
        if level is None:
            x = x / sigma.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample=x) if return_dict else (x,)


class LevelUNet2DModel(ModelMixin, ConfigMixin):
    """
    A [`UNet2DModel`] that was trained to return the score, given the unscaled noisy sample and the index of its noise
    level, 0 the largest. This class is given sigma instead, and finds the (fractional) index.

    Args:
        sigmas (`list[float]`):
            The trained noise levels, falling, in the network's units. Between two of them the index is interpolated in
            log sigma, beyond them the end's is taken; the network was not trained there.
        sample_size (`int` or `tuple[int, int]`, defaults to 32): Height and width of the images.
        in_channels (`int`, defaults to 3): Channels of the image and of the score.
        unet (`dict`, *optional*): Further arguments of [`UNet2DModel`].

    Raises:
        ValueError: `sigmas` are not at least two positive numbers that fall.
    """

    @register_to_config
    def __init__(
        self,
        sigmas: Sequence[float],
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        unet: dict | None = None,
    ):
        super().__init__()
        self._ladder = _Ladder(sigmas)
        self.model = UNet2DModel(
            sample_size=sample_size, in_channels=in_channels, out_channels=in_channels, **(unet or {})
        )

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """As [`RefineNet2DModel.forward`]; class labels are the [`UNet2DModel`]'s."""
        level = self._ladder.find(_per_image(timestep, sample))
        x = self.model(sample, level, class_labels, return_dict=False)[0]
        return UNet2DOutput(sample=x) if return_dict else (x,)


class SkipUNet2DModel(UNet2DModel):
    """
    The NCSN++ of score_sde at any width: a [`UNet2DModel`] whose group normalizations all have a quarter of their
    channels as groups, 32 at most. diffusers' skip blocks have 32 in their attention, and more than a quarter of them
    where they attend on the way up, so that theirs is the same network from 128 channels on only.
    """

    @wraps(UNet2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = min(module.num_channels // 4, 32)


def _per_image(sigma: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(sigma, dtype=torch.float32, device=sample.device).expand(len(sample))


class _Ladder:
    """Falling noise levels, to be looked up on any device. (A module's buffers would be rounded in half precision.)"""

    def __init__(self, sigmas: Sequence[float]):
        if len(sigmas) < 2 or sigmas[-1] <= 0 or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"`sigmas` must be at least two positive numbers that fall, not {sigmas}.")
        self.sigmas, self.copies = list(sigmas), {}

    def find(self, sigma: torch.Tensor) -> torch.Tensor:
        """The (fractional) index of each sigma, interpolated in log sigma; beyond the ends, that of the end."""
        if sigma.device not in self.copies:
            self.copies[sigma.device] = torch.tensor(self.sigmas, dtype=torch.float32, device=sigma.device)
        sigmas = self.copies[sigma.device]
        inside = sigma.clamp(sigmas[-1], sigmas[0])
        upper = torch.searchsorted(-sigmas, -inside).clamp(1, len(sigmas) - 1)
        above, below = sigmas[upper - 1], sigmas[upper]
        return upper - 1 + (above / inside).log() / (above / below).log()


class InstanceNorm2dPlus(nn.Module):
    """
    Equation (1), with gamma, alpha and beta from an embedding of `num_levels` noise levels if that is given.

    Shapes: x `(batch_size, num_channels, height, width)`, level `(batch_size,)`, fractional.
    """

    def __init__(self, num_channels: int, num_levels: int | None = None):
        super().__init__()
        self.num_levels = num_levels
        if num_levels is None:
            self.gamma = nn.Parameter(torch.empty(num_channels).normal_(1, 0.02))
            self.alpha = nn.Parameter(torch.empty(num_channels).normal_(1, 0.02))
            self.beta = nn.Parameter(torch.zeros(num_channels))
        else:
            rows = torch.zeros(num_levels, 3 * num_channels)  # gamma, alpha, beta
            rows[:, : 2 * num_channels].normal_(1, 0.02)
            self.embedding = nn.Parameter(rows)

    def forward(self, x: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        if self.num_levels is None:
            gamma, alpha, beta = self.gamma, self.alpha, self.beta
        else:
            lower = level.long().clamp(max=self.num_levels - 2)
            weight = (level - lower)[:, None].to(self.embedding.dtype)
            gamma, alpha, beta = torch.lerp(self.embedding[lower], self.embedding[lower + 1], weight).chunk(3, dim=1)
        means = x.mean((2, 3))
        means = (means - means.mean(1, keepdim=True)) / (means.var(1, keepdim=True) + 1e-5).sqrt()
        offset = gamma * alpha * means + beta
        return gamma[..., None, None] * functional.instance_norm(x) + offset[..., None, None]


class ResidualBlock(nn.Module):
    """
    Two convolutions, each after a normalization and an activation, beside a shortcut. A transition between stages
    halves the image by its mean over 2 × 2 pixels if its dilation is 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilation: int,
        num_levels: int | None,
        act: Activation,
        is_transition: bool = False,
    ):
        super().__init__()
        self.act = act
        self.halves = is_transition and dilation == 1
        spread = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        self.norm1 = InstanceNorm2dPlus(in_channels, num_levels)
        self.conv1 = nn.Conv2d(in_channels, in_channels, **spread)
        self.norm2 = InstanceNorm2dPlus(in_channels, num_levels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, **spread)
        self.shortcut = None
        if is_transition:
            self.shortcut = nn.Conv2d(in_channels, out_channels, **(spread if dilation > 1 else {"kernel_size": 1}))

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        h = self.conv1(self.act(self.norm1(x, level)))
        h = self.conv2(self.act(self.norm2(h, level)))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return functional.avg_pool2d(h, 2) if self.halves else h


class ConvUnits(nn.Module):
    """
    Residual units of two convolutions each, after an activation; in the conditional network after a normalization, too.
    """

    def __init__(self, channels: int, num_units: int, num_levels: int | None, act: Activation):
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
            for _ in range(num_units)
        )
        self.norms = nn.ModuleList(_make_norms(channels, 2, num_levels) for _ in range(num_units))

    def forward(self, x: torch.Tensor, level: torch.Tensor | None) -> torch.Tensor:
        for convs, norms in zip(self.convs, self.norms, strict=True):
            h = x
            for conv, norm in zip(convs, norms, strict=True):
                h = conv(self.act(norm(h, level)))
            x = x + h
        return x


class RefineBlock(nn.Module):
    """
    A block of RefineNet: it adapts its one or two inputs, fuses them at the first one's size, pools them in a chain,
    whose results are added up, and adapts the sum. The conditional network pools by the mean, the other by the maximum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_inputs: int,
        num_output_units: int,
        num_levels: int | None,
        act: Activation,
    ):
        super().__init__()
        self.act = act
        self.is_conditional = num_levels is not None
        self.inputs = nn.ModuleList(ConvUnits(in_channels, 2, num_levels, act) for _ in range(num_inputs))
        num_fused = num_inputs if num_inputs > 1 else 0
        self.fuse_norms = _make_norms(in_channels, num_fused, num_levels)
        self.fuse_convs = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 3, padding=1) for _ in range(num_fused))
        self.pool_norms = _make_norms(out_channels, 2, num_levels)
        self.pool_convs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.output = ConvUnits(out_channels, num_output_units, num_levels, act)

    def forward(self, inputs: Sequence[torch.Tensor], level: torch.Tensor | None) -> torch.Tensor:
        size = inputs[0].shape[2:]
        adapted = [units(x, level) for units, x in zip(self.inputs, inputs, strict=True)]
        x = adapted[0]
        if self.fuse_convs:
            fused = [
                conv(norm(h, level)) for conv, norm, h in zip(self.fuse_convs, self.fuse_norms, adapted, strict=True)
            ]
            x = sum(functional.interpolate(h, size, mode="bilinear", align_corners=True) for h in fused)
        path = x = self.act(x)
        for conv, norm in zip(self.pool_convs, self.pool_norms, strict=True):
            path = norm(path, level)
            pool = functional.avg_pool2d if self.is_conditional else functional.max_pool2d
            path = conv(pool(path, 5, stride=1, padding=2))
            x = x + path
        return self.output(x, level)


class _NoNorm(nn.Module):
    """Where the conditional network has a normalization and the other has none."""

    def forward(self, x: torch.Tensor, level: None) -> torch.Tensor:
        return x


def _make_norms(channels: int, count: int, num_levels: int | None) -> nn.ModuleList:
    return nn.ModuleList(
        _NoNorm() if num_levels is None else InstanceNorm2dPlus(channels, num_levels) for _ in range(count)
    )
