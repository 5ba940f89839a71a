"""A pipeline's network as a denoiser of images in [0, 1], as other packages take them."""

from collections.abc import Sequence

import torch
from torch import nn

from .pipeline_ncsn import NCSNPipeline


class NCSNDenoiser(nn.Module):
    """
    E[x0 | x0 + sigma z] for images x0 in [0, 1], by the network of a pipeline: what deepinv's samplers and those of
    k-diffusion take as their denoiser. Gradients flow through it. Where black is -1 in the network's data, the same
    noise is twice as large there.

    ```python
    denoiser = NCSNDenoiser(NCSNPipeline.from_pretrained(folder))
    deepinv.sampling.DDRM(denoiser)(y, physics)
    ```

    Args:
        pipe ([`NCSNPipeline`]): Any of this package's pipelines.
        class_labels (`int`, `list[int]` or `torch.Tensor`, *optional*): As in [`NCSNPipeline.denoise`].
    """

    def __init__(self, pipe: NCSNPipeline, class_labels: int | Sequence[int] | torch.Tensor | None = None):
        super().__init__()
        self.unet = pipe.unet  # moves with the module
        self.pipe, self.class_labels = pipe, class_labels

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Noisy images, in units of [0, 1].
            sigma (`float` or `torch.Tensor` of 1 or `batch_size` elements): The noise level, in the same units.

        Returns:
            `torch.Tensor` of the shape of `x`: the denoised images, unclipped.

        Raises:
            ValueError: as [`NCSNPipeline.denoise`].
        """
        black = self.pipe.config.data_min
        if isinstance(sigma, torch.Tensor) and sigma.ndim:
            sigma = sigma.flatten()
        return (self.pipe.denoise(black + (1 - black) * x, (1 - black) * sigma, self.class_labels) - black) / (
            1 - black
        )
