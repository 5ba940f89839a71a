"""
Denoising score matching (Vincent 2011; Song & Ermon 2019, equations 2, 5 and 6) through the scheduler's conversions.

Draw a level sigma, perturb the data x0 to x = x0 + sigma z with z ~ N(0, I), and compare the network's score with that
of the perturbation, -z/sigma. With the weight lambda(sigma) = sigma² the loss is

    ½ E ‖sigma score(x, sigma) + z‖²,

and since score = (D - x)/sigma² with the denoised estimate D, sigma score + z = (D - x0)/sigma for every
`prediction_type`. Nothing here draws random numbers: the caller passes them in.
"""

import math

import torch

DISTRIBUTIONS = ("lognormal", "uniform")
WEIGHTINGS = ("sigma_squared", "edm")


def draw_timesteps(
    scheduler, uniform: torch.Tensor, distribution: str = "lognormal", log_sigma_mean=-0.8, log_sigma_std=1.4
) -> torch.Tensor:
    """
    Levels to train on, by inverting their cumulative distribution function.

    Args:
        scheduler ([`AnnealedLangevinScheduler`]): whose ladder the levels are on.
        uniform (`torch.Tensor` of shape `(batch_size,)`): uniform draws from [0, 1). See [`stratified`].
        distribution (`str`, defaults to `"lognormal"`):
            `"lognormal"`: log sigma is normal (EDM: Karras et al. 2022, arXiv:2206.00364), within the ladder;
            `"uniform"`: each level is as likely as any other (the 2019 paper).
        log_sigma_mean (`float`, defaults to -0.8): mean of log sigma for `"lognormal"`, sigma in units of the data.
        log_sigma_std (`float`, defaults to 1.4): standard deviation of log sigma for `"lognormal"`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: timesteps, whole numbers for `"uniform"`.

    Raises:
        ValueError: the distribution is not one of the two.
    """
    if distribution == "uniform":
        return scheduler.sigma_to_t(scheduler.index_to_sigma((uniform * len(scheduler)).floor()))
    if distribution == "lognormal":
        sigmas = torch.exp(log_sigma_mean + log_sigma_std * normal_quantile(uniform))
        return scheduler.sigma_to_t(sigmas.clamp(scheduler.config.sigma_min, scheduler.config.sigma_max))
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


def denoise(
    model, scheduler, x: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The denoised estimate D(x, sigma) of a network, whatever its prediction type and conditioning.

    Args:
        model (`torch.nn.Module`): the network, called as a [`UNet2DModel`] is.
        scheduler ([`AnnealedLangevinScheduler`]): ladder, conditioning and prediction type.
        x (`torch.Tensor` of shape `(batch_size, ...)`): in units of the data.
        timesteps (`torch.Tensor` of shape `(batch_size,)`): the level of each image.
        class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): for a network that takes them.

    Returns:
        `torch.Tensor` of shape `(batch_size, ...)`: D, in units of the data, float32.
    """
    labels = {} if class_labels is None else {"class_labels": class_labels}
    output = model(scheduler.scale_model_input(x, timesteps), timesteps, **labels, return_dict=False)[0]
    return scheduler.predict_original_sample(output.float(), timesteps, x)


def score_matching_loss(
    model,
    scheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    weighting: str = "sigma_squared",
) -> torch.Tensor:
    """
    ½ ‖sigma score(x, sigma) + z‖² of each image, divided by its number of dimensions: ½ for a network that returns
    the score 0.

    Args:
        model, scheduler, timesteps, class_labels: see [`denoise`].
        images (`torch.Tensor` of shape `(batch_size, ...)`): x0, in units of the data.
        noise (`torch.Tensor` of shape `(batch_size, ...)`): z, standard normal.
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
    denoised = denoise(model, scheduler, scheduler.add_noise(images, noise, timesteps), timesteps, class_labels)
    sigma = scheduler.t_to_sigma(timesteps).reshape(-1, *[1] * (images.ndim - 1))
    losses = 0.5 * ((denoised - images) / sigma).square().flatten(1).mean(1)
    return losses * (1 + sigma.flatten() ** 2) if weighting == "edm" else losses
