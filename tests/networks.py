"""
Networks that several test files share.

The analytic ones are perfect for data whose score is known in closed form: they are the oracle of the samplers' tests.
The small ones are real UNets with random weights, for what does not depend on the weights. `quiet_pipeline` puts any of
them into a pipeline.
"""

import numpy as np
import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline

# Distributions


class GaussianMixture:
    """
    A mixture of isotropic Gaussians: weights (K,), means (K, d), deviations (K,). With noise sigma it is the mixture
    with the variances deviation² + sigma².
    """

    def __init__(self, weights, means, deviations):
        self.weights, self.means, self.deviations = (
            torch.as_tensor(a, dtype=torch.float64) for a in (weights, means, deviations)
        )

    def responsibilities(self, x, sigma):
        """Posterior of the component, (n, K), for x of shape (n, d) at noise sigma, () or (n,)."""
        variances = self.deviations**2 + torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1) ** 2
        distances = (x[:, None] - self.means).square().sum(-1)
        logits = self.weights.log() - distances / (2 * variances) - 0.5 * x.shape[1] * variances.log()
        return logits.softmax(-1)

    def denoised(self, x, sigma):
        """E[x0 | x], (n, d)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        gain = (self.deviations**2 / (self.deviations**2 + sigma**2))[..., None]
        posterior_means = self.means + gain * (x[:, None] - self.means)
        return (self.responsibilities(x, sigma)[..., None] * posterior_means).sum(1)

    def sample(self, n, generator):
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + self.deviations[component, None] * noise

    def shares(self, x):
        """Fractions of the samples x (n, d) that belong to each component."""
        nearest = self.responsibilities(x.double(), 0.0).argmax(-1)
        return np.bincount(nearest.numpy(), minlength=len(self.weights)) / len(x)


# Components that overlap while there is noise and are apart in the data.
MIXTURE = GaussianMixture(
    weights=[0.6, 0.3, 0.1],
    means=[[0.5, 0.5, 0.5, 0.5, -0.5, -0.5, 0.5, 0.5], [-0.5] * 8, [0.5, -0.5, 0.5, -0.5, 0.5, 0.5, -0.5, -0.5]],
    deviations=[0.15, 0.15, 0.15],
)


class Gaussian:
    """The Gaussian with mean (d,) and covariance (d, d). With noise sigma the covariance gains sigma² I."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = (torch.as_tensor(a, dtype=torch.float64) for a in (mean, covariance))
        self.variances, self.eigenvectors = torch.linalg.eigh(self.covariance)

    def denoised(self, x, sigma):
        """E[x0 | x], (n, d), for x (n, d) and sigma () or (n, 1)."""
        gain = self.variances / (self.variances + torch.as_tensor(sigma, dtype=torch.float64) ** 2)
        return self.mean + ((x - self.mean) @ self.eigenvectors * gain) @ self.eigenvectors.T

    def conditional(self, drawn, values):
        """The Gaussian of the coordinates where `drawn` (d,) is True, given the `values` (d,) of the others."""
        known = ~drawn
        regression = torch.linalg.solve(self.covariance[known][:, known], self.covariance[known][:, drawn]).T
        return Gaussian(
            self.mean[drawn] + regression @ (values[known] - self.mean[known]),
            self.covariance[drawn][:, drawn] - regression @ self.covariance[known][:, drawn],
        )


# Analytic networks


def train_sigmas(scheduler):
    """The trained ladder of an `AnnealedLangevinScheduler`, rising."""
    return scheduler.ladder.sigma_at(torch.arange(len(scheduler), dtype=torch.float32))


def to_model_output(denoised, x, sigma, prediction_type):
    """What a network of this prediction type returns, from the definitions: x = x0 + sigma z."""
    noise = (x - denoised) / sigma
    return {
        "sample": denoised,
        "epsilon": noise,
        "score": -noise / sigma,
        "v_prediction": (noise - sigma * denoised) / (1 + sigma**2) ** 0.5,
    }[prediction_type]


class AnalyticUNet(ModelMixin, ConfigMixin):
    """
    The perfect network for `MIXTURE`, whose 8 dimensions are images of `channels` × 2 × ..., with the interface of
    [`UNet2DModel`]. It takes its ladder from sigmas written out plainly, not from a scheduler.
    """

    @register_to_config
    def __init__(self, sigmas, prediction_type="v_prediction", conditioning="timestep", in_channels=1):
        super().__init__()
        self.sample_size = None
        self.register_to_config(sample_size=(2, 4 // in_channels))
        self.register_buffer("log_sigmas", torch.tensor(sigmas, dtype=torch.float64).log(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(1))  # gives the module a dtype and a device
        self.evaluations = 0

    def denoised(self, x, sigma, class_labels):
        return MIXTURE.denoised(x, sigma)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert isinstance(timestep, torch.Tensor), "UNet2DModel would cut a Python float down to an integer"
        self.evaluations += 1
        x, t = sample.flatten(1).double(), timestep.double().reshape(-1, 1)
        if self.config.conditioning == "sigma":
            sigma = t
        else:
            # by lists, which work inside torch.func.vjp, too
            log_sigmas = self.log_sigmas.tolist()
            sigma = torch.from_numpy(np.exp(np.interp(t.tolist(), np.arange(len(log_sigmas)), log_sigmas)))
            x = x * (1 + sigma**2).sqrt()  # the network sees x/√(1 + sigma²)
        output = to_model_output(self.denoised(x, sigma, class_labels), x, sigma, self.config.prediction_type)
        output = output.reshape(sample.shape).to(sample.dtype)
        return type("Output", (), {"sample": output}) if return_dict else (output,)


class GaussianUNet(AnalyticUNet):
    """The perfect network for one `Gaussian`, whose coordinates are images of 1 × height × width."""

    def __init__(self, gaussian, height, width, sigmas, **arguments):
        super().__init__(sigmas, **arguments)
        self.gaussian = gaussian
        self.register_to_config(sample_size=(height, width))

    def denoised(self, x, sigma, class_labels):
        return self.gaussian.denoised(x, sigma)


class FieldUNet(GaussianUNet):
    """The perfect network for one `Gaussian`, whose coordinates are the numbers of fields of `(channels, *sizes)`."""

    def __init__(self, gaussian, shape, sigmas, **arguments):
        super().__init__(gaussian, 1, 1, sigmas, **arguments)
        self.register_to_config(in_channels=shape[0], sample_size=tuple(shape[1:]))


class WithVariance(nn.Module):
    """A network that predicts a variance, too: as many channels again, of numbers that must reach nothing."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config, self.dtype, self.device = network, network.config, network.dtype, network.device

    def forward(self, *args, return_dict=True, **kwargs):
        output = self.network(*args, return_dict=False, **kwargs)[0]
        return (torch.cat([output, torch.full_like(output, 1e3)], 1),)


class ClassUNet(AnalyticUNet):
    """
    The perfect class-conditional network for the Gaussians N(means[k], deviation² I), k < K, where the label K, "no
    label", stands for N(0, deviation² I). The guided score at w is then that of N(w means[k], deviation² I), exactly.
    """

    def __init__(self, means, deviation, sigmas, **arguments):
        super().__init__(sigmas, **arguments)
        means = torch.as_tensor(means, dtype=torch.float64)
        self.means, self.deviation = torch.cat([means, torch.zeros(1, means.shape[1])]), deviation
        self.register_to_config(num_class_embeds=len(self.means))

    def denoised(self, x, sigma, class_labels):
        gain = self.deviation**2 / (self.deviation**2 + sigma**2)
        return self.means[class_labels] + gain * (x - self.means[class_labels])


# Small networks


def small_unet(**arguments):
    """A UNet2DModel of one channel and 8 × 8 pixels with random weights, always the same ones."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=arguments.pop("sample_size", 8),
        in_channels=arguments.pop("channels", 1),
        out_channels=arguments.pop("out_channels", 1),
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        **arguments,
    ).eval()


def conditional_unet():
    """A small network for classes 0, 1 and 2, whose embeddings differ by a lot."""
    unet = small_unet(num_class_embeds=4)
    nn.init.normal_(unet.class_embedding.weight, std=5.0, generator=torch.Generator().manual_seed(0))
    return unet


class AnyClassUNet(UNet2DModel):
    """A network that takes "no label" where it is given none, as by the pipelines of diffusers, if it has classes."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        if class_labels is None and self.config.num_class_embeds is not None:
            class_labels = torch.full((len(sample),), self.config.num_class_embeds - 1, device=sample.device)
        return super().forward(sample, timestep, class_labels, return_dict)


# Pipelines


def quiet_pipeline(unet, scheduler=None, cls=NCSNPipeline, **arguments):
    """A pipeline without a progress bar, with the default scheduler unless another is given."""
    pipe = cls(unet, scheduler or AnnealedLangevinScheduler(), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Halving(PipelineCallback):
    """A callback in diffusers' form: it halves the sample once, after the given share of the steps."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            callback_kwargs["latents"] = callback_kwargs["latents"] / 2
        return callback_kwargs
