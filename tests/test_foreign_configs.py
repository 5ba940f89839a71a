"""Configs that other classes wrote, judged by what is drawn: shipped digits, wrapped as a DDPM checkpoint of 2022."""

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from networks import AnyClassUNet

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, pretrained
from ncsn_diffusers.evaluation import extract_features, load_digit_classifier


class EpsilonNetwork(AnyClassUNet):
    """A v-prediction network that returns epsilon = alpha v + sigma_t x_t instead, as DDPM's networks do."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        v = super().forward(sample, timestep, class_labels, return_dict=False)[0]
        sigma = AnnealedLangevinScheduler().t_to_sigma(timestep)
        epsilon = (v + sigma * sample) / (1 + sigma**2) ** 0.5
        return UNet2DOutput(epsilon) if return_dict else (epsilon,)


@pytest.mark.slow
def test_a_ddpm_checkpoint_of_2022_draws_as_under_its_own_scheduler():
    pipe = NCSNPipeline.from_pretrained(pretrained("mnist"))
    network = EpsilonNetwork.from_config(pipe.unet.config).eval()
    network.load_state_dict(pipe.unet.state_dict())
    config = {  # as published then: no prediction_type, which means epsilon
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.4.0",
        "beta_schedule": "linear",
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": pipe.scheduler.config.trained_betas,
        "variance_type": "fixed_small",
    }
    ours = NCSNPipeline(network, AnnealedLangevinScheduler.from_config(config))
    stock = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler.from_config(config))
    classifier = load_digit_classifier()

    def sureness(images):
        images = torch.as_tensor(images)
        images = images if images.shape[1] == 1 else images.permute(0, 3, 1, 2)
        return extract_features(images, classifier).softmax(1).max(1).values.mean().item()

    figures = {}
    for name, drawer, steps in (("annealed Langevin", ours, 50), ("stock DDPM", stock, 50)):
        drawer.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = dict(batch_size=100, num_inference_steps=steps, generator=generator, output_type="np")
        figures[name] = sureness(drawer(**arguments).images)
        print(f"{name}, {steps} evaluations, 100 digits: classifier {figures[name]:.1%} sure on average")
    assert figures["annealed Langevin"] > figures["stock DDPM"] - 0.03  # about two standard errors
    assert figures["annealed Langevin"] > 0.8
