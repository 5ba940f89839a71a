"""Networks for signals, images and volumes, and one that begins as the exact denoiser of a Gaussian.

A [`UNetNDModel`] is diffusers' U-Net in one to three dimensions. A [`GaussianResidualModel`] adds such a network's
correction to the denoiser of the data's mean and covariance. This file stands alone, so that it can be uploaded beside
the weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional


@dataclass
class UNetNDOutput(BaseOutput):
    """
    What the networks of this file return.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, channels, *sides)`): What the scheduler's `prediction_type` says.
    """

    sample: torch.Tensor


class UNetNDModel(ModelMixin, ConfigMixin):
    """
    A U-Net for signals, images and volumes, called as a [`UNet2DModel`] is, whose design and names of parameters it
    has: in two dimensions it loads the weights of a UNet2DModel of "DownBlock2D", "AttnDownBlock2D" and their
    counterparts with `resnet_time_scale_shift="scale_shift"`, and returns the same. What is new:

    * one, two or three dimensions;
    * sides of any length, without padding: a level of n points is followed by one of ⌈n/2⌉, which goes back to n by
      nearest neighbors;
    * a timestep that is a Python float keeps its fraction.

    Args:
        sample_size (`tuple[int, ...]` of 1 to 3):
            The sides of what is drawn: `(length,)`, `(height, width)` or `(depth, height, width)`. Their number is that
            of the convolutions' dimensions. The network itself takes any sizes.
        in_channels (`int`, defaults to 1): Channels of the input.
        out_channels (`int`, *optional*): Channels of the output; `in_channels` when not given.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 64)`):
            Channels of each level, which each but the last halves the sides.
        layers_per_block (`int`, defaults to 1): Residual layers of each level on the way down; one more on the way up.
        attention_levels (`tuple[bool, ...]`, *optional*):
            Which levels have self-attention after each residual layer; the last alone when not given.
        attention_head_dim (`int`, defaults to 8): Channels of each head of attention.
        norm_num_groups (`int`, defaults to 8): Groups of each group normalization.
        norm_eps (`float`, defaults to 1e-5): Added to the variances in them.
        dropout (`float`, defaults to 0.0): Of each residual layer.
        time_embedding_type (`str`, defaults to `"positional"`):
            `"positional"`: sines and cosines of the timestep; `"fourier"`: of log sigma at random frequencies, for a
            network that is given sigma. The output is then divided by sigma, as [`UNet2DModel`] does it.
        num_class_embeds (`int`, *optional*):
            Entries of the class embedding: the number of classes + 1 in this package, the last meaning "no label".
        add_attention (`bool`, defaults to `True`): Whether the middle of the network has self-attention.

    Raises:
        ValueError:
            `sample_size` is not 1 to 3 positive ints, `attention_levels` and `block_out_channels` differ in length,
            channels are no multiples of `norm_num_groups` or, where there is attention, of `attention_head_dim`, or
            `time_embedding_type` is unknown.
    """

    _no_split_modules = ["_ResidualLayer", "_SelfAttention"]

    @register_to_config
    def __init__(
        self,
        sample_size: Sequence[int],
        in_channels: int = 1,
        out_channels: int | None = None,
        block_out_channels: Sequence[int] = (32, 64, 64),
        layers_per_block: int = 1,
        attention_levels: Sequence[bool] | None = None,
        attention_head_dim: int = 8,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        time_embedding_type: str = "positional",
        num_class_embeds: int | None = None,
        add_attention: bool = True,
    ):
        super().__init__()
        sides = [sample_size] if isinstance(sample_size, int) else list(sample_size)
        if isinstance(sample_size, int) or not 1 <= len(sides) <= 3 or any(side < 1 for side in sides):
            raise ValueError(f"`sample_size` must be a tuple of 1 to 3 positive ints, not {sample_size!r}.")
        channels, num_levels, num_dims = list(block_out_channels), len(block_out_channels), len(sides)
        has_attention = [False] * (num_levels - 1) + [True] if attention_levels is None else list(attention_levels)
        if len(has_attention) != num_levels:
            raise ValueError(
                "`attention_levels` and `block_out_channels` must have one entry for each level, not "
                f"{attention_levels} and {block_out_channels}."
            )
        attended = [c for c, attends in zip(channels, has_attention, strict=True) if attends]
        attended += channels[-1:] if add_attention else []
        for name, divisor, all_channels in (
            ("norm_num_groups", norm_num_groups, channels),
            ("attention_head_dim", attention_head_dim, attended),
        ):
            if any(c % divisor for c in all_channels):
                raise ValueError(f"`block_out_channels` must be multiples of `{name}`={divisor}, not {all_channels}.")
        if time_embedding_type not in ("positional", "fourier"):
            raise ValueError(f"`time_embedding_type` must be 'positional' or 'fourier', not {time_embedding_type!r}.")
        width = 4 * channels[0]  # of the embeddings of time and class

        def residual(in_channels, out_channels):
            return _ResidualLayer(num_dims, in_channels, out_channels, width, norm_num_groups, norm_eps, dropout)

        def attentions(level, number):
            if not has_attention[level]:
                return []
            return [
                _SelfAttention(channels[level], attention_head_dim, norm_num_groups, norm_eps) for _ in range(number)
            ]

        self.conv_in = _CONVOLUTIONS[num_dims](in_channels, channels[0], 3, padding=1)
        is_fourier = time_embedding_type == "fourier"
        self.time_proj = (
            GaussianFourierProjection(channels[0], scale=16)
            if is_fourier
            else Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        )
        self.time_embedding = TimestepEmbedding(channels[0] * (2 if is_fourier else 1), width)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, width)
        self.down_blocks = nn.ModuleList()
        for i in range(num_levels):
            inputs = [channels[max(i - 1, 0)]] + [channels[i]] * (layers_per_block - 1)
            sampler = _Resample(num_dims, channels[i], stride=2) if i + 1 < num_levels else None
            resnets = [residual(c, channels[i]) for c in inputs]
            self.down_blocks.append(_Level(resnets, attentions(i, len(inputs)), downsampler=sampler))
        # without a norm, as UNet2DModel has it beside "scale_shift"
        middle = [_SelfAttention(channels[-1], attention_head_dim, None, norm_eps)] if add_attention else []
        self.mid_block = _Level([residual(channels[-1], channels[-1]) for _ in range(2)], middle)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(num_levels)):
            inputs = [channels[min(i + 1, num_levels - 1)]] + [channels[i]] * layers_per_block
            skipped = [channels[i]] * layers_per_block + [channels[max(i - 1, 0)]]
            resnets = [residual(a + b, channels[i]) for a, b in zip(inputs, skipped, strict=True)]
            sampler = _Resample(num_dims, channels[i], stride=1) if i > 0 else None
            self.up_blocks.append(_Level(resnets, attentions(i, len(inputs)), upsampler=sampler))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], norm_eps)
        self.conv_out = _CONVOLUTIONS[num_dims](channels[0], out_channels or in_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetNDOutput | tuple:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, *sides)`):
                The noisy sample as the scheduler's `scale_model_input` returns it, in the network's units.
            timestep (`torch.Tensor` of shape `()`, `(1,)` or `(batch_size,)`, or `float`):
                The (fractional) index of the noise level, 0 the smallest, or sigma, as the scheduler's `conditioning`
                says.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): For a network with a class embedding.
            return_dict (`bool`, defaults to `True`): A [`UNetNDOutput`], or a plain tuple.

        Returns:
            [`UNetNDOutput`] or `tuple`: what the scheduler's `prediction_type` says, of shape
            `(batch_size, out_channels, *sides)`.

        Raises:
            ValueError: the sample has another number of dimensions, or class labels are missing or not asked for.
        """
        if sample.ndim != len(self.config.sample_size) + 2:
            raise ValueError(
                f"`sample` must have {len(self.config.sample_size) + 2} dimensions, batch, channels and "
                f"{len(self.config.sample_size)} sides, not the shape {tuple(sample.shape)}."
            )
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError("`class_labels` must be given for a network with a class embedding, and for no other.")
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(t).to(self.conv_in.weight.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)

        x = self.conv_in(sample)
        skipped = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block(i, x, embedding)
                skipped.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skipped.append(x)
        x = self.mid_block.resnets[1](self.mid_block(0, x, embedding), embedding)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block(i, torch.cat([x, skipped.pop()], dim=1), embedding)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x, skipped[-1].shape[2:])
        x = self.conv_out(functional.silu(self.conv_norm_out(x)))
        if self.config.time_embedding_type == "fourier":
            x = x / t.reshape(-1, *[1] * (x.ndim - 1))
        return UNetNDOutput(sample=x) if return_dict else (x,)


class GaussianResidualModel(ModelMixin, ConfigMixin):
    r"""
    The exact denoiser of a Gaussian, plus a network's correction, for data that are nearly Gaussian and few.

    Let the data be N(m, S) and x = x0 + sigma z. Then D(x, sigma) = m + S (S + sigma²)⁻¹ (x - m), whose v-prediction is

        v = sigma (1 + sigma²)^-½ [(1 - S) (S + sigma²)⁻¹ (x - m) - m],                                             (1)

    with S = U diag(lambda) Uᵀ + rho (1 - U Uᵀ): a few eigenvectors with their variances, and the variance rho in every
    other direction. The network is a [`UNetNDModel`]. It is given (x - m)/√(1 + sigma²) and begins by returning 0, so
    that training starts where linear methods (optimal interpolation, kriging, the Wiener filter) end, and the network
    is needed only where the data are not Gaussian. `unet=None` is the Gaussian alone.

    [`fit`] makes one from data. Mean and covariance are saved with the weights, and are not trained.
    `AnnealedLangevinScheduler` with its geometric levels, `conditioning="timestep"` and
    `prediction_type="v_prediction"` fits, with the levels that are given here.

    Args:
        sample_size (`tuple[int, ...]` of 1 to 3): The sides of the data, as in [`UNetNDModel`].
        in_channels (`int`, defaults to 1): Channels of the data.
        rank (`int`, defaults to 64): The number of eigenvectors, at most the number of values of a sample.
        num_train_timesteps (`int`, defaults to 1000), sigma_min (`float`, defaults to 0.01), sigma_max (`float`,
        defaults to 50.0):
            The scheduler's: the timestep t stands for log sigma = log sigma_min + t/(num_train_timesteps - 1)
            log(sigma_max/sigma_min).
        unet (`dict`, *optional*): Further arguments of [`UNetNDModel`].

    Raises:
        ValueError: `rank` or the levels are out of range, or as [`UNetNDModel`].
    """

    @register_to_config
    def __init__(
        self,
        sample_size: Sequence[int],
        in_channels: int = 1,
        rank: int = 64,
        num_train_timesteps: int = 1000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        unet: dict | None = None,
    ):
        super().__init__()
        size = in_channels * math.prod(sample_size)
        if not 0 <= rank <= size:
            raise ValueError(f"`rank` must be from 0 to {size}, the number of values of a sample, not {rank}.")
        if num_train_timesteps < 2 or not 0 < sigma_min < sigma_max:
            raise ValueError(
                "`num_train_timesteps` must be at least 2, and 0 < `sigma_min` < `sigma_max`, not "
                f"{num_train_timesteps}, {sigma_min} and {sigma_max}."
            )
        self.register_buffer("mean", torch.zeros(in_channels, *sample_size))
        self.register_buffer("eigenvectors", torch.zeros(rank, size))
        self.register_buffer("eigenvalues", torch.ones(rank))
        self.register_buffer("remainder", torch.ones(()))
        self.model = None
        if unet is not None:
            self.model = UNetNDModel(sample_size, in_channels, **unet)
            nn.init.zeros_(self.model.conv_out.weight)
            nn.init.zeros_(self.model.conv_out.bias)

    @classmethod
    def fit(
        cls,
        data: torch.Tensor,
        scheduler,
        rank: int = 64,
        correlation_length: float | None = None,
        num_global_modes: int = 0,
        unet: dict | None = None,
    ) -> "GaussianResidualModel":
        """
        A model whose Gaussian is that of `data`, and whose network is new.

        Args:
            data (`torch.Tensor` of shape `(n, channels, *sides)`): The training data, in the network's units.
            scheduler ([`AnnealedLangevinScheduler`]): Whose levels the model is told of.
            rank (`int`, defaults to 64): The number of eigenvectors.
            correlation_length (`float`, *optional*):
                In grid points. The covariance of two points at the distance d is multiplied by
                exp(-½ (d/correlation_length)²): what few data say of far-apart points is mostly chance (localization in
                data assimilation, Houtekamer & Mitchell 2001, Monthly Weather Review 129, 123).
            num_global_modes (`int`, defaults to 0):
                The covariance of so many leading eigenvectors is left as it is, and only the rest localized: the
                largest patterns, such as a trend of the whole map, are known well (scale-dependent localization,
                Buehner & Shlyaeva 2015, Tellus A 67, 28027).
            unet (`dict`, *optional*): Further arguments of [`UNetNDModel`]; none for the Gaussian alone.

        Raises:
            ValueError:
                The data are not finite or fewer than two, `rank` is more than they have eigenvectors, a sample has too
                many values for `correlation_length`, `num_global_modes` is given without it, or the scheduler's
                meaning is not that of equation (1).
        """
        config = scheduler.config
        meaning = {"conditioning": "timestep", "prediction_type": "v_prediction", "beta_schedule": "geometric"}
        for name, wanted in meaning.items():
            if config[name] != wanted:
                raise ValueError(f"`scheduler`: its `{name}` must be {wanted!r}, not {config[name]!r}.")
        if len(data) < 2 or not data.isfinite().all():
            raise ValueError(f"`data` must be finite and at least 2 samples, and are {len(data)}.")
        x = data.flatten(1).double()
        most = x.shape[1] if correlation_length else min(x.shape[1], len(x) - 1)
        if num_global_modes and not correlation_length:
            raise ValueError(f"`num_global_modes`={num_global_modes} needs `correlation_length`.")
        if correlation_length and x.shape[1] > _LARGEST_COVARIANCE:
            raise ValueError(
                f"`correlation_length` needs the whole covariance, of at most {_LARGEST_COVARIANCE:,} values, and a "
                f"sample has {x.shape[1]:,}."
            )
        if not 0 < rank <= most:
            raise ValueError(f"`rank` must be from 1 to {most} for data of shape {tuple(data.shape)}, not {rank}.")
        mean = x.mean(0)
        x = (x - mean) / (len(x) - 1) ** 0.5
        if correlation_length:
            values, vectors = torch.linalg.eigh(localized_covariance(data, correlation_length, num_global_modes))
            values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank].T
        else:
            _, values, vectors = torch.linalg.svd(x, full_matrices=False)
            values, vectors = values[:rank] ** 2, vectors[:rank]
        rest = x.shape[1] - rank
        remainder = (x.square().sum() - values.sum()) / rest if rest else values[-1]
        model = cls(
            tuple(data.shape[2:]),
            data.shape[1],
            rank,
            **{key: config[key] for key in ("num_train_timesteps", "sigma_min", "sigma_max")},
            unet=unet,
        )
        model.mean.copy_(mean.reshape(model.mean.shape))
        model.eigenvectors.copy_(vectors)
        model.eigenvalues.copy_(values.clamp(min=0))
        model.remainder.copy_(remainder.clamp(min=0))
        return model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetNDOutput | tuple:
        """As [`UNetNDModel.forward`]. The output is the v-prediction; class labels are the network's."""
        if class_labels is not None and self.model is None:
            raise ValueError("`class_labels` are for a class-conditional network, and this model has no network.")
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        config = self.config
        log_sigma = math.log(config.sigma_min) + t.float() / (config.num_train_timesteps - 1) * math.log(
            config.sigma_max / config.sigma_min
        )
        sigma = log_sigma.exp().reshape(-1, *[1] * (sample.ndim - 1))
        scale = (1 + sigma**2).sqrt()
        with torch.autocast(sample.device.type, enabled=False):  # eigenvectors must stay orthogonal
            mean, y = self.mean.float(), sample.float() - self.mean.float() / scale  # (x - m)/scale
            variance = sigma.flatten(1) ** 2

            def gain(s):  # (1 - S)/(S + sigma²) in a direction of the variance s
                return (1 - s) / (s + variance)

            vectors, flat = self.eigenvectors.float(), y.flatten(1)
            rest = gain(self.remainder.float())
            components = (flat @ vectors.T) * (gain(self.eigenvalues.float()) - rest)
            filtered = (rest * flat + components @ vectors).reshape(y.shape)
            v = sigma * (filtered - mean / scale)  # (1)
        v = v.to(sample.dtype)
        if self.model is not None:
            v = v + self.model(y.to(sample.dtype), t, class_labels, return_dict=False)[0]
        return UNetNDOutput(sample=v) if return_dict else (v,)


_LARGEST_COVARIANCE = 8192  # values of a sample, whose eigenvectors take minutes and 2 GB


def localized_covariance(
    data: torch.Tensor, correlation_length: float | None, num_global_modes: int = 0
) -> torch.Tensor:
    """
    The covariance of data, less what they say of far-apart points; see [`GaussianResidualModel.fit`].

    Args:
        data (`torch.Tensor` of shape `(n, channels, *sides)`): The data.
        correlation_length (`float`, *optional*): In grid points; `None` is the covariance itself.
        num_global_modes (`int`, defaults to 0): Leading eigenvectors that are left as they are.

    Returns:
        `torch.Tensor` of shape `(size, size)`, `size` being the number of values of a sample: in float64.
    """
    x = data.flatten(1).double()
    x = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    covariance = x.T @ x
    if correlation_length is None:
        return covariance
    points = torch.cartesian_prod(*(torch.arange(side, dtype=x.dtype) for side in data.shape[2:]))
    points = points.reshape(-1, data.ndim - 2)
    taper = torch.exp(-0.5 * (torch.cdist(points, points) / correlation_length) ** 2)
    if not num_global_modes:
        return covariance * taper.repeat(data.shape[1], data.shape[1])
    _, values, vectors = torch.linalg.svd(x, full_matrices=False)
    leading = values[:num_global_modes, None] * vectors[:num_global_modes]
    leading = leading.T @ leading
    return leading + (covariance - leading) * taper.repeat(data.shape[1], data.shape[1])


_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _ResidualLayer(nn.Module):
    """Two convolutions beside a shortcut; the embedding scales and shifts what the second normalization returns."""

    def __init__(
        self, num_dims: int, in_channels: int, out_channels: int, width: int, groups: int, eps: float, dropout: float
    ):
        super().__init__()
        conv = _CONVOLUTIONS[num_dims]
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels, eps), nn.GroupNorm(groups, out_channels, eps)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.time_emb_proj, self.dropout = nn.Linear(width, 2 * out_channels), nn.Dropout(dropout)
        self.conv_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time_emb_proj(functional.silu(embedding))[(...,) + (None,) * (x.ndim - 2)].chunk(2, dim=1)
        h = self.norm2(self.conv1(functional.silu(self.norm1(x)))) * (1 + scale) + shift
        h = self.conv2(self.dropout(functional.silu(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _SelfAttention(nn.Module):
    """Every point attends to every point. `groups=None` leaves the normalization out."""

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float):
        super().__init__()
        self.heads = channels // head_dim
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class _Resample(nn.Module):
    """A convolution that halves the sides (rounded up), or one after enlarging them to `size` by nearest neighbors."""

    def __init__(self, num_dims: int, channels: int, stride: int):
        super().__init__()
        self.conv = _CONVOLUTIONS[num_dims](channels, channels, 3, stride, padding=1)

    def forward(self, x: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        return self.conv(x if size is None else functional.interpolate(x, size=size, mode="nearest"))


class _Level(nn.Module):
    """The layers of one level of a U-Net, under the names that they have in [`UNet2DModel`]."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        downsampler: nn.Module | None = None,
        upsampler: nn.Module | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, i: int, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        x = self.resnets[i](x, embedding)
        return x if self.attentions is None else self.attentions[i](x)
