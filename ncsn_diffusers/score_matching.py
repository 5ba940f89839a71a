"""
Denoising score matching (Vincent 2011; Song & Ermon 2019, equations 2, 5 and 6) of a denoiser.

Draw a level sigma, perturb the data x0 to x = x0 + sigma z with z ~ N(0, I), and compare the network's score with that
of the perturbation, -z/sigma. With the weight lambda(sigma) = sigma² the loss is

    ½ E ‖sigma score(x, sigma) + z‖²,

and since score = (D - x)/sigma² with the denoised estimate D, sigma score + z = (D - x0)/sigma for every
`prediction_type`. Nothing here draws random numbers: the caller passes them in.
"""

import math
from collections.abc import Callable

import torch

from .denoiser import per_sample
from .ladder import Ladder

DISTRIBUTIONS = ("lognormal", "uniform")
WEIGHTINGS = ("sigma_squared", "edm")


def draw_sigmas(
    ladder: Ladder, uniform: torch.Tensor, distribution: str = "lognormal", log_sigma_mean=-0.8, log_sigma_std=1.4
) -> torch.Tensor:
    """
    Noise levels to train on, by inverting their cumulative distribution function.

    Args:
        ladder ([`Ladder`]): whose range the levels are in.
        uniform (`torch.Tensor` of shape `(batch_size,)`): uniform draws from [0, 1). See [`stratified`].
        distribution (`str`, defaults to `"lognormal"`):
            `"lognormal"`: log sigma is normal (EDM: Karras et al. 2022, arXiv:2206.00364), within the ladder;
            `"uniform"`: each trained level is as likely as any other (the 2019 paper).
        log_sigma_mean (`float`, defaults to -0.8): mean of log sigma for `"lognormal"`, sigma in the network's units.
        log_sigma_std (`float`, defaults to 1.4): standard deviation of log sigma for `"lognormal"`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: sigmas.

    Raises:
        ValueError: the distribution is not one of the two.
    """
    if distribution == "uniform":
        return ladder.sigma_at((uniform * len(ladder)).floor())
    if distribution == "lognormal":
        sigmas = torch.exp(log_sigma_mean + log_sigma_std * normal_quantile(uniform))
        return sigmas.clamp(ladder.smallest, ladder.largest)
    raise ValueError(f"`distribution` must be one of {DISTRIBUTIONS}, not {distribution!r}.")


def normal_quantile(uniform: torch.Tensor) -> torch.Tensor:
    """
    The inverse of the standard normal distribution function, by operations that Apple GPUs support
    (`torch.special.ndtri` has no kernel there). The tails are those of Wichura 1988, algorithm AS 241, PPND7.

    Args:
        uniform (`torch.Tensor`): probabilities in [0, 1]; below 1e-11 of either end they count as 1e-11.

    Returns:
        `torch.Tensor` of the same shape: for float32 accurate to 1e-6, relative where the value is above 1.
    """
    # 2u - 1 is exact enough for erfinv in the middle only: it rounds away most digits of a small u.
    middle = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-0.85, 0.85))
    tail = torch.minimum(uniform, 1 - uniform)
    r = tail.clamp(min=1e-11).log().neg().sqrt() - 1.6
    far = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
    far = far / ((0.12021132975 * r + 0.73700164250) * r + 1)
    return torch.where(tail < 0.075, torch.where(uniform < 0.5, -far, far), middle)


def stratified(uniform: torch.Tensor) -> torch.Tensor:
    """
    Spread uniform draws evenly over a batch, one in each of `batch_size` equal intervals. Each is still uniform, and
    the loss averaged over the batch varies less (Kingma et al. 2021, arXiv:2107.00630, appendix I.1).

    Args:
        uniform (`torch.Tensor` of shape `(batch_size,)`): independent uniform draws from [0, 1).

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: rising draws from [0, 1).
    """
    return (torch.arange(len(uniform), device=uniform.device) + uniform) / len(uniform)


def score_matching_loss(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    data: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    weighting: str = "sigma_squared",
) -> torch.Tensor:
    """
    ½ ‖sigma score(x, sigma) + z‖² of each sample, divided by its number of dimensions: ½ for a network that returns
    the score 0.

    Args:
        denoiser ([`Denoiser`] or any other): the network, in training or not.
        data (`torch.Tensor` of shape `(batch_size, ...)`): x0, in the network's units.
        noise (`torch.Tensor` of shape `(batch_size, ...)`): z, standard normal.
        sigmas (`torch.Tensor` of shape `(batch_size,)`): the noise level of each sample.
        weighting (`str`, defaults to `"sigma_squared"`):
            `"sigma_squared"`: lambda(sigma) = sigma², as the 2019 paper has it; `"edm"`: 1 + sigma² times as much,
            which weighs the error of a v-prediction equally at every level (Karras et al. 2022, arXiv:2206.00364,
            table 1, with a data variance of 1).

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: the losses.

    Raises:
        ValueError: the weighting is not one of the two.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {WEIGHTINGS}, not {weighting!r}.")
    sigma = per_sample(sigmas, data)
    denoised = denoiser(data + sigma * noise, sigmas)
    losses = 0.5 * ((denoised - data) / sigma).square().flatten(1).mean(1)
    return losses * (1 + sigmas**2) if weighting == "edm" else losses
