"""
Whether a class-conditional network's outputs with a class and without one belong together, without labels.

The scores of p(x|c) and p(x) differ by the gradient of log p(c|x), a probability. So for an image x drawn of class c,
log p(c|x)/p(c) = log p(x|c)/p(x) is at most -log p(c), and its mean is at most the entropy of the classes: log K for K
equally frequent ones. A network whose two outputs were trained unequally well breaks this bound, and guidance and
compositions, which rely on the difference, go wrong.

Both densities follow from the errors of their denoisers at all noise levels (Guo, Shamai & Verdú 2005; Kong et al.
2023, arXiv:2302.03792, equation 9). With the same noise for both, what they have in common cancels:

    log p(x|c)/p(x) = ∫ E_z [|x - D(x + sigma z)|² - |x - D(x + sigma z, c)|²]/sigma² d log sigma.
"""

from collections.abc import Callable, Sequence

import torch


@torch.no_grad()
def log_class_ratio(
    denoise: Callable[[torch.Tensor, float, torch.Tensor | None], torch.Tensor],
    x: torch.Tensor,
    class_labels: torch.Tensor,
    sigmas: Sequence[float],
    noise: torch.Tensor,
) -> torch.Tensor:
    """
    log p(c|x)/p(c) of each sample, by the trapezoidal rule in log sigma.

    Args:
        denoise (function): D of noisy samples, the noise level, and their classes or `None`, such as `pipe.denoise`.
        x (`torch.Tensor` of shape `(n, ...)`): samples, in the units of `denoise`.
        class_labels (`torch.Tensor` of shape `(n,)`): their classes.
        sigmas (`Sequence[float]` of length L): rising noise levels, over which the data go from plain to invisible.
        noise (`torch.Tensor` of shape `(L, n, ...)`): z, standard normal, another one at each level.

    Returns:
        `torch.Tensor` of shape `(n,)`: float64, in nats.

    Raises:
        ValueError: the noise is not of that shape, or the levels do not rise.
    """
    if noise.shape != (len(sigmas), *x.shape):
        raise ValueError(f"`noise` must have the shape {(len(sigmas), *x.shape)}, not {tuple(noise.shape)}.")
    levels = torch.tensor(sigmas, dtype=torch.float64)
    if len(levels) < 2 or not (levels.diff() > 0).all() or levels[0] <= 0:
        raise ValueError(f"`sigmas` must be at least two rising numbers above 0, not {list(sigmas)}.")
    gains = []
    for sigma, z in zip(sigmas, noise, strict=True):
        noisy = x + sigma * z
        errors = [
            (x - denoise(noisy, sigma, labels)).double().square().flatten(1).sum(1) for labels in (None, class_labels)
        ]
        gains.append(((errors[0] - errors[1]) / sigma**2).cpu())
    return torch.trapezoid(torch.stack(gains), levels.log(), dim=0)
