"""
D(x, sigma) in one room: a network and what it means, and what is built of denoisers.

A *denoiser* is anything that is called as `denoiser(x, sigma)` and returns D(x, sigma) = E[x0 | x0 + sigma z = x], for
x of shape `(n, channels, ...)` in the network's units. It says all that a sampler needs: score = (D - x)/sigma²
(Tweedie's formula). Whoever wraps a denoiser is one, so one loop serves them all: [`Guided`] and [`Product`] here, what
known pixels and measurements say in the modules of the pipelines.

The network
-----------
A network is given the noisy sample as x/√(1 + sigma²) and the (fractional) index of the level, or, with
`conditioning="sigma"`, x and sigma themselves. What it returns is affine in D,

    D = a x + b output,                                                                                          (1)

    prediction_type     the network returns               a               b
    "v_prediction"      (z - sigma x0)/√(1 + sigma²)      1/(1 + sigma²)  -sigma/√(1 + sigma²)
    "epsilon"           z                                 1               -sigma
    "score"             -z/sigma                          1               sigma²
    "sample"            x0                                0               1

Products
--------
The target is ∏ p_i(x)^w_i with W = Σ w_i > 0: "and" and "not" for several classes, a temperature for one, guidance.
At the noise level sigma a network gives the score of p_i with noise of sigma. A weight of W makes the noise's own
Gaussian narrower by √W as well, so that the product of the noisy densities has the level tau = sigma/√W. A chain at
the level tau therefore has the networks told √W tau, and

    D(x, tau) = x + tau² Σ w_i score_i(x, √W tau) = Σ (w_i/W) D_i(x, √W tau).                                    (2)

Scores that are summed at the chain's own level are wrong for W ≠ 1, without a word.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .ladder import Ladder

Sigma = float | torch.Tensor


def denoised_coefficients(prediction_type: str, sigma: Sigma) -> tuple[Sigma, Sigma]:
    """a and b of equation (1) at the level `sigma`, a number or a tensor."""
    if prediction_type == "v_prediction":
        square = 1 + sigma**2
        return 1 / square, -sigma / square**0.5
    if prediction_type == "epsilon":
        return 1.0, -sigma
    if prediction_type == "score":
        return 1.0, sigma**2
    return 0.0, 1.0


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself out of the wrappers of torch.compile and DistributedDataParallel, with its config."""
    while (inner := getattr(network, "_orig_mod", getattr(network, "module", None))) is not None:
        network = inner
    return network


def per_sample(values: Sigma, x: torch.Tensor) -> Sigma:
    """One number for each sample, in a shape that multiplies `x`; a single number as it is."""
    if not isinstance(values, torch.Tensor) or not values.ndim:
        return values
    return values.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser:
    """
    A network and what it means.

    Args:
        network (`torch.nn.Module`): Called as a [`UNet2DModel`] is, for any number of dimensions.
        ladder ([`Ladder`]): The noise levels that it was trained on.
        prediction_type (`str`, defaults to `"v_prediction"`): What it returns, see the module's docstring.
        conditioning (`str`, defaults to `"timestep"`): What it is given, `"timestep"` or `"sigma"`.
        labels (`torch.Tensor` of shape `(n,)`, *optional*): Rows of the class embedding, for a network that has one.
    """

    def __init__(
        self,
        network: nn.Module,
        ladder: Ladder,
        prediction_type: str = "v_prediction",
        conditioning: str = "timestep",
        labels: torch.Tensor | None = None,
    ):
        self.network, self.ladder, self.labels = network, ladder, labels
        self.prediction_type, self.by_sigma = prediction_type, conditioning == "sigma"
        inner = unwrap(network)
        # asked once: diffusers' `dtype` walks through all modules
        self.dtype = getattr(inner, "dtype", None) or next((p.dtype for p in inner.parameters()), torch.float32)

    @classmethod
    def of(cls, network: nn.Module, scheduler, labels: torch.Tensor | None = None) -> "Denoiser":
        """The denoiser of a network whose levels and meaning stand in a scheduler's config, of whichever class."""
        config = scheduler.config
        ladder = getattr(scheduler, "ladder", None) or Ladder.from_betas(scheduler.betas)
        return cls(network, ladder, config["prediction_type"], config.get("conditioning", "timestep"), labels)

    def given(self, labels: torch.Tensor | None) -> "Denoiser":
        """The same network, told other classes."""
        other = copy.copy(self)
        other.labels = labels
        return other

    def __call__(self, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """
        D(x, sigma), by one evaluation of the network. Below the smallest trained level, which is the least that the
        network knows of, the score is taken to be what it is there. Above the largest the network is told of that one.

        Args:
            x (`torch.Tensor` of shape `(n, channels, ...)`): float32, in the network's units.
            sigma (`float` or `torch.Tensor` of shape `()` or `(n,)`): The noise level, of all samples or of each.

        Returns:
            `torch.Tensor` of the shape of `x`. What a network predicts besides, such as a variance, is left out.
        """
        if isinstance(sigma, torch.Tensor):
            level = sigma.clamp(self.ladder.smallest, self.ladder.largest)
            timestep = level if self.by_sigma else self.ladder.index_of(level)
            timestep = timestep.float()
            share = per_sample((sigma / level).clamp(max=1) ** 2, x)
            level = per_sample(level, x)
        else:
            level = min(max(sigma, self.ladder.smallest), self.ladder.largest)
            timestep = level if self.by_sigma else self.ladder.index_of(level)
            # `full` launches a kernel; `tensor` would copy, and wait for it
            timestep = torch.full((), timestep, dtype=torch.float32, device=x.device)
            share = min(1.0, sigma / level) ** 2
        model_input = x if self.by_sigma else x / (1 + level**2) ** 0.5
        labels = {} if self.labels is None else {"class_labels": self.labels}
        output = self.network(model_input.to(self.dtype), timestep, return_dict=False, **labels)[0]
        a, b = denoised_coefficients(self.prediction_type, level)
        denoised = a * x + b * output[:, : x.shape[1]].to(x.dtype)  # (1)
        if isinstance(share, float) and share == 1:
            return denoised
        return torch.lerp(x, denoised, share)  # x + sigma² score

    def to_output(self, denoised: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """What the network would have had to return for D to be `denoised`, for a scheduler that is given outputs."""
        a, b = denoised_coefficients(self.prediction_type, sigma)
        return (denoised - a * x) / b


def evaluate_together(denoisers: Sequence[Callable], x: torch.Tensor, sigma: Sigma) -> list[torch.Tensor]:
    """The estimates of several denoisers at one level. Those of one network take one evaluation of a larger batch."""
    groups: dict[int, list[int]] = {}
    for i, denoiser in enumerate(denoisers):
        groups.setdefault(id(denoiser.network) if isinstance(denoiser, Denoiser) else id(denoiser), []).append(i)
    estimates: list = [None] * len(denoisers)
    for members in groups.values():
        first, num = denoisers[members[0]], len(members)
        if num == 1 or not isinstance(first, Denoiser):
            together = [first(x, sigma)] * num
        else:
            labels = None
            if first.labels is not None:
                labels = torch.cat([denoisers[i].labels.expand(len(x)) for i in members])
            if isinstance(sigma, torch.Tensor) and sigma.ndim:
                sigma = sigma.expand(len(x)).repeat(num)
            together = first.given(labels)(x.repeat(num, *[1] * (x.ndim - 1)), sigma).chunk(num)
        for i, estimate in zip(members, together, strict=True):
            estimates[i] = estimate
    return estimates


class Guided:
    """
    Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): D = D_u + scale (D_c - D_u), of the class and of no
    class. It is a product with the weights `scale` and `1 - scale`, whose sum is 1.

    Args:
        conditional (denoiser): D_c.
        unconditional (denoiser): D_u.
        scale (`float`): 1 is the conditional denoiser alone, which then takes one evaluation.
        max_sigma (`float`, *optional*):
            Guide at this level and below only (Kynkäänniemi et al. 2024, arXiv:2404.07724), in the network's units.
    """

    def __init__(self, conditional: Callable, unconditional: Callable, scale: float, max_sigma: float = math.inf):
        self.conditional, self.unconditional = conditional, unconditional
        self.scale, self.max_sigma = scale, max_sigma

    def __call__(self, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """D(x, sigma), of the shape of `x`; arguments as of [`Denoiser.__call__`], but one level for all samples."""
        if self.scale == 1 or float(sigma) > self.max_sigma:
            return self.conditional(x, sigma)
        unconditional, conditional = evaluate_together((self.unconditional, self.conditional), x, sigma)
        return torch.lerp(unconditional, conditional, float(self.scale))


class Product:
    """
    The denoiser of ∏ p_i(x)^w_i, equation (2).

    Args:
        parts (sequence of pairs): Denoisers of data of one shape and one range, each with its weight w_i.

    Raises:
        ValueError: there is no part, a weight is not finite, or the weights' sum W is not above 0.
    """

    def __init__(self, parts: Sequence[tuple[Callable, float]]):
        self.denoisers = [denoiser for denoiser, _ in parts]
        weights = [float(weight) for _, weight in parts]
        self.total = sum(weights)
        if not all(map(math.isfinite, weights)) or not self.total > 1e-6:
            raise ValueError(
                f"The weights of a product must be finite, and their sum above 0, not {weights}: p^w with w ≤ 0 is no "
                "density."
            )
        self.shares = [weight / self.total for weight in weights]

    def network_sigma(self, sigma: Sigma) -> Sigma:
        """What the networks are told at the chain's level `sigma`: √W sigma."""
        return self.total**0.5 * sigma

    def estimates(self, x: torch.Tensor, sigma: Sigma) -> list[torch.Tensor]:
        """D_i(x, √W sigma) of each part."""
        return evaluate_together(self.denoisers, x, self.network_sigma(sigma))

    def combine(self, estimates: Sequence[torch.Tensor]) -> torch.Tensor:
        """Σ (w_i/W) D_i."""
        return sum(share * estimate for share, estimate in zip(self.shares, estimates, strict=True))

    def __call__(self, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """D(x, sigma), of the shape of `x`; arguments as of [`Denoiser.__call__`]."""
        return self.combine(self.estimates(x, sigma))  # (2)


class NCSNDenoiser(nn.Module):
    """
    A pipeline's network as a module in the units of its data, [0, 1] for images: what deepinv's samplers and those of
    k-diffusion take as their denoiser. Gradients flow through it.

    ```python
    denoiser = NCSNDenoiser(NCSNPipeline.from_pretrained(folder))
    deepinv.sampling.DDRM(denoiser)(y, physics)
    ```

    Args:
        pipe ([`NCSNPipeline`]): Any of this package's pipelines.
        class_labels (`int`, `list[int]`, `dict` or `torch.Tensor`, *optional*): As in [`NCSNPipeline.make_denoiser`].
        denoiser (denoiser, *optional*):
            In the place of the network's own, such as [`NCSNPosteriorPipeline.condition`] gives it.

    Raises:
        ValueError: the pipeline's channels have different standard deviations, so that one sigma in their units means
            another level for each.
    """

    def __init__(self, pipe, class_labels=None, denoiser: Callable | None = None):
        super().__init__()
        stds = pipe.units.data_std
        if isinstance(stds, list) and len(set(stds)) > 1:
            raise ValueError(
                f"One noise level for all channels needs one `data_std`, and this pipeline has {stds}: scale the "
                "channels to one standard deviation, or use `pipe.make_denoiser`, which is in the network's units."
            )
        self.scale = 2 * (stds[0] if isinstance(stds, list) else stds)
        self.unet = pipe.unet  # moves with the module
        self.pipe, self.class_labels, self.denoiser = pipe, class_labels, denoiser

    def forward(self, x: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(n, channels, ...)`): Noisy data, in the units of the pipeline's data.
            sigma (`float` or `torch.Tensor` of 1 or `n` elements): The noise level, in the same units.

        Returns:
            `torch.Tensor` of the shape of `x`: the denoised data, unclipped.

        Raises:
            ValueError: as [`NCSNPipeline.denoise`].
        """
        if isinstance(sigma, torch.Tensor) and sigma.ndim:
            sigma = sigma.flatten()
        units, sigma = self.pipe.units, sigma / self.scale
        z = units.to_network(x)
        if self.denoiser is None:
            denoised = self.pipe.denoise(z, sigma, self.class_labels)
        else:
            denoised = self.denoiser(z, float(sigma))
        return units.to_data(denoised, clip=False)
