import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from analytic import MIXTURE, AnalyticUNet, train_sigmas
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline


def analytic_pipeline(scheduler=None, **arguments):
    """A pipeline around the perfect network for `MIXTURE`, and quiet."""
    scheduler = scheduler or AnnealedLangevinScheduler()
    unet = AnalyticUNet(
        train_sigmas(scheduler).tolist(), scheduler.config.prediction_type, scheduler.config.conditioning, **arguments
    )
    pipe = NCSNPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_unet(**arguments):
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


def small_pipeline(**arguments):
    pipe = NCSNPipeline(small_unet(**arguments), AnnealedLangevinScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_mixture(samples, share_tolerance=0.02, deviation_tolerance=0.1):
    """Shares, means and deviations of the mixture's components; 5,000 samples have a standard error of 0.007."""
    samples = torch.as_tensor(samples).flatten(1).double()
    np.testing.assert_allclose(MIXTURE.shares(samples), MIXTURE.weights, atol=share_tolerance)
    component = MIXTURE.responsibilities(samples, 0.0).argmax(-1)
    for k in range(3):
        members = samples[component == k]
        np.testing.assert_allclose(members.mean(0), MIXTURE.means[k], atol=0.03)
        spread = (members - MIXTURE.means[k]).square().mean().sqrt().item()
        assert spread == pytest.approx(MIXTURE.deviations[k].item(), rel=deviation_tolerance)


# --- The oracle: the perfect network under every scheduler ---


def test_default_call_draws_the_mixture():
    pipe = analytic_pipeline()
    samples = pipe(batch_size=5000, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert pipe.unet.evaluations <= 100
    check_mixture(samples)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "score"])
@pytest.mark.parametrize("conditioning", ["timestep", "sigma"])
def test_every_convention_draws_the_same(prediction_type, conditioning):
    expected = None
    for arguments in ({}, {"prediction_type": prediction_type, "conditioning": conditioning}):
        pipe = analytic_pipeline(AnnealedLangevinScheduler(**arguments))
        images = pipe(batch_size=100, generator=torch.Generator().manual_seed(0), output_type="pt").images
        expected = images if expected is None else expected
    torch.testing.assert_close(images, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", AnnealedLangevinScheduler._compatibles)
def test_stock_schedulers_by_from_config_alone(name):
    pipe = analytic_pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    samples = pipe(batch_size=5000, num_inference_steps=100, generator=generator, output_type="latent").images
    check_mixture(samples)


def test_ddpm_checkpoint_under_langevin():
    ddpm = DDPMScheduler()
    scheduler = AnnealedLangevinScheduler.from_config(ddpm.config)
    sigmas = ((1 - ddpm.alphas_cumprod) / ddpm.alphas_cumprod).sqrt().tolist()  # DDPM's own ladder
    pipe = NCSNPipeline(AnalyticUNet(sigmas, "epsilon"), scheduler)
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(batch_size=5000, generator=torch.Generator().manual_seed(0), output_type="latent").images
    # the linear schedule leaves a long last step, from sigma 0.05 to 0.01, that widens the components
    check_mixture(samples, deviation_tolerance=0.15)


def test_ncsnpp_convention_from_a_score_sde_ve_config():
    scheduler = AnnealedLangevinScheduler.from_config(ScoreSdeVeScheduler(sigma_max=50.0).config)
    pipe = analytic_pipeline(scheduler)
    samples = pipe(batch_size=5000, generator=torch.Generator().manual_seed(0), output_type="latent").images
    check_mixture(samples)


@pytest.mark.parametrize("cls", [DDIMPipeline, DDPMPipeline])
def test_stock_pipelines_run_an_ncsn(cls):
    pipe = analytic_pipeline()
    scheduler = DDPMScheduler if cls is DDPMPipeline else DDIMScheduler
    stock = cls(pipe.unet, scheduler.from_config(pipe.scheduler.config))
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = stock(batch_size=5000, num_inference_steps=100, generator=generator, output_type="pt").images
    # in [0, 1], where the mixture's tails beyond [-1, 1] are cut off
    np.testing.assert_allclose(MIXTURE.shares(images.flatten(1) * 2 - 1), MIXTURE.weights, atol=0.02)


# --- Reproducibility ---


def test_a_list_of_generators_makes_pictures_independent_of_their_batch():
    pipe = small_pipeline()

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(batch_size=len(seeds), num_inference_steps=5, generator=generators, output_type="pt").images

    torch.testing.assert_close(draw([3, 1, 4])[2], draw([4])[0], rtol=0, atol=1e-5)
    assert not torch.equal(*draw([1, 2]))


@pytest.mark.parametrize("half", [False, True])
def test_same_pictures_after_save_and_load(tmp_path, half):
    pipe = small_pipeline()
    pipe.scheduler = AnnealedLangevinScheduler(sigma_max=20.0, num_langevin_steps=2, noise_rule="euler_maruyama")
    pipe = pipe.to(torch.float16 if half else torch.float32)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    reloaded = NCSNPipeline.from_pretrained(tmp_path, torch_dtype=pipe.unet.dtype)
    assert type(reloaded.scheduler) is AnnealedLangevinScheduler
    assert reloaded.unet.dtype == pipe.unet.dtype
    images = [
        p(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, reloaded)
    ]
    assert images[0].dtype == torch.float32
    assert torch.equal(*images)


def test_swapped_scheduler_is_saved_with_the_pipeline(tmp_path):
    pipe = small_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    reloaded = NCSNPipeline.from_pretrained(tmp_path)
    assert type(reloaded.scheduler) is DDIMScheduler
    back = AnnealedLangevinScheduler.from_config(reloaded.scheduler.config)
    assert back.config.trained_betas == AnnealedLangevinScheduler().config.trained_betas


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_generator_draws_the_same_on_a_gpu():
    images = [
        small_pipeline().to(device)(
            batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np"
        )[0]
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(images[0], images[1], atol=1e-2)


# --- The call's arguments ---


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sample_size", [8, (8, 12)])
def test_output_types(channels, sample_size):
    pipe = small_pipeline(channels=channels, out_channels=channels, sample_size=sample_size)
    height, width = (8, 8) if sample_size == 8 else sample_size
    outputs = {
        output_type: pipe(
            batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type=output_type
        ).images
        for output_type in ("pil", "np", "pt", "latent")
    }
    assert outputs["latent"].shape == outputs["pt"].shape == (2, channels, height, width)
    # clamped, never rescaled to the picture's own range
    torch.testing.assert_close(outputs["pt"], (outputs["latent"] / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in outputs["pil"]] == [(width, height)] * 2
    assert all(isinstance(image, PIL.Image.Image) for image in outputs["pil"])
    assert outputs["pil"][0].mode == {1: "L", 3: "RGB"}[channels]
    np.testing.assert_allclose(np.array(outputs["pil"][0]).squeeze(), outputs["np"][0].squeeze() * 255, atol=0.51)


def test_other_channel_counts():
    pipe = small_pipeline(channels=2, out_channels=2)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 2)
    with pytest.raises(ValueError, match="'pil' needs 1, 3 or 4 channels, and the network has 2"):
        pipe(num_inference_steps=2)


def test_tuple_output():
    images = small_pipeline()(num_inference_steps=2, return_dict=False)
    assert isinstance(images, tuple)
    assert len(images[0]) == 1


def test_latents_are_standard_noise_to_start_from():
    pipe = small_pipeline()
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    expected = pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="pt").images
    torch.randn(noise.shape, generator=generator.manual_seed(0))  # the noise that `latents` stand in for
    images = pipe(batch_size=2, num_inference_steps=3, generator=generator, latents=noise, output_type="pt").images
    assert torch.equal(images, expected)


@pytest.mark.parametrize("steps", [{"num_inference_steps": 7}, {"num_inference_steps": 4, "num_langevin_steps": 3}])
def test_evaluations_are_levels_times_langevin_steps(steps):
    pipe = analytic_pipeline()
    pipe(**steps, output_type="np")
    assert pipe.unet.evaluations == steps["num_inference_steps"] * steps.get("num_langevin_steps", 1)


def test_callback_reads_and_replaces_the_sample():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep.item(), tuple(tensors["latents"].shape)))
        return {"latents": torch.full_like(tensors["latents"], 0.5)} if step == 4 else None

    pipe = small_pipeline()
    images = pipe(num_inference_steps=5, output_type="latent", callback_on_step_end=callback).images
    assert seen == [(i, pytest.approx(999 * (1 - i / 4)), (1, 1, 8, 8)) for i in range(5)]
    assert torch.equal(images, torch.full_like(images, 0.5))
    pipe(num_inference_steps=2, callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=[])


def test_progress_bar_shows_each_step_unless_disabled(capsys):
    pipe = small_pipeline()
    pipe(num_inference_steps=3)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="Sampling")
    pipe(num_inference_steps=3)
    error = capsys.readouterr().err
    assert "Sampling" in error
    assert "3/3" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` must be an int of at least 1, not 0"),
        ({"batch_size": 2.0}, r"`batch_size` must be an int of at least 1, not 2.0"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, r"`generator` is a list of 1, but batch_size=2"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"`latents` must have shape \(1, 1, 8, 8\), not \(1, 3, 8, 8\)"),
        ({"output_type": "jpeg"}, r"`output_type` must be one of 'pil', 'np', 'pt', 'latent', not 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, r"must be among \['latents', 'sigma', 'denoised'\], not \['x'\]"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an int of at least 1, not 0"),
        ({"num_langevin_steps": 0}, r"`num_langevin_steps` must be an int of at least 1, not 0"),
    ],
)
def test_bad_input_is_refused_before_the_first_evaluation(arguments, message):
    pipe = small_pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_stock_schedulers_refuse_what_only_langevin_knows():
    pipe = small_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`num_langevin_steps`=2 is for AnnealedLangevinScheduler; DDIMScheduler"):
        pipe(num_langevin_steps=2)
    pipe.scheduler = DDIMScheduler.from_config(AnnealedLangevinScheduler(conditioning="sigma").config)
    with pytest.raises(ValueError, match="conditioned on sigma, but DDIMScheduler would give it timesteps"):
        pipe()
