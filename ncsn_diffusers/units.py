"""
The affine map between the user's data and the network's numbers, for each channel.

Three ranges meet in a pipeline: the user's (kelvin, counts, [0, 1] for images), the network's, and the chain's. The
network sees

    z = (data - data_mean)/(2 data_std),

so that its data have mean 0 and standard deviation ½ in every channel, which is what the default noise levels fit.
Images are the special case of mean ½ and standard deviation ¼: [0, 1] becomes [-1, 1]. Noise levels are in the
network's units, where all channels are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def image_units(black: float) -> dict[str, float]:
    """`data_mean` and `data_std` of images in [0, 1] that a network sees in [`black`, 1], -1 or 0 as a rule."""
    scale = 1 / (1 - black)
    return {"data_mean": 0.0 - black * scale, "data_std": scale / 2}


@dataclass(frozen=True)
class Units:
    """
    The units of a pipeline's data. Everything but the network itself is in them.

    Args:
        data_mean (`float` or sequence of floats, defaults to 0.5): For all channels, or for each.
        data_std (`float` or sequence of floats, defaults to 0.25): Standard deviation, for all channels or for each.
        value_range (pair of floats, *optional*):
            The least and the largest value that data can have, (0, 1) for images. Results are clipped to it. Without
            one they are not clipped.
        name (`str`, *optional*): What the numbers are, for labels and warnings, such as "K".

    Raises:
        ValueError: a mean is not finite, a standard deviation is not above 0, or the range does not rise.
    """

    data_mean: float | Sequence[float] = 0.5
    data_std: float | Sequence[float] = 0.25
    value_range: Sequence[float] | None = (0.0, 1.0)
    name: str | None = None

    def __post_init__(self):
        for name in ("data_mean", "data_std"):
            given = getattr(self, name)
            values = torch.as_tensor(given, dtype=torch.float64)
            right = values.isfinite() if name == "data_mean" else values.isfinite() & (values > 0)
            if values.ndim > 1 or not values.numel() or not right.all():
                wanted = "finite numbers" if name == "data_mean" else "finite numbers above 0"
                raise ValueError(f"`{name}` must be {wanted}, one for all channels or one for each, not {given!r}.")
            object.__setattr__(self, name, values.tolist())
        if self.value_range is not None:
            low, high = self.value_range
            if not low < high:
                raise ValueError(f"`value_range` must be two rising numbers, not {self.value_range!r}.")
            object.__setattr__(self, "value_range", (float(low), float(high)))

    def check_channels(self, num: int) -> None:
        """
        Raises:
            ValueError: a mean or standard deviation for each channel is given, but not for `num` channels.
        """
        for name in ("data_mean", "data_std"):
            values = getattr(self, name)
            if isinstance(values, list) and len(values) != num:
                raise ValueError(
                    f"`{name}` must be one number, or one for each of the network's {num} channels, not {len(values)}."
                )

    @property
    def is_image(self) -> bool:
        """Whether the data are images in [0, 1]."""
        return self.value_range == (0.0, 1.0)

    def mean(self, like: torch.Tensor) -> torch.Tensor:
        """`data_mean`, of a shape that broadcasts with `like` of shape `(n, channels, ...)`, and of its dtype."""
        return self._broadcast(self.data_mean, like)

    def scale(self, like: torch.Tensor) -> torch.Tensor:
        """Units of the data in one unit of the network's: `2 * data_std`, as [`mean`]."""
        return 2 * self._broadcast(self.data_std, like)

    def to_network(self, data: torch.Tensor) -> torch.Tensor:
        """
        Args:
            data (`torch.Tensor` of shape `(n, channels, ...)`, floating): In the units of the data.

        Returns:
            `torch.Tensor`: of the same shape and dtype, in the network's units.
        """
        return (data - self.mean(data)) / self.scale(data)

    def to_data(self, x: torch.Tensor, clip: bool = True) -> torch.Tensor:
        """The inverse of [`to_network`], clipped to `value_range` where there is one, unless `clip` is `False`."""
        data = self.mean(x) + self.scale(x) * x
        return data.clamp(*self.value_range) if clip and self.value_range is not None else data

    @staticmethod
    def _broadcast(values: float | list[float], like: torch.Tensor) -> torch.Tensor:
        values = torch.tensor(values, dtype=torch.float64).to(like.dtype).to(like.device)  # Apple GPUs have no float64
        return values.reshape(-1, *[1] * (like.ndim - 2)) if values.ndim else values
