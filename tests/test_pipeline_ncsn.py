import importlib
import math
import pkgutil

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    ScoreSdeVeScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from networks import (
    MIXTURE,
    AnalyticUNet,
    ClassUNet,
    Gaussian,
    GaussianUNet,
    Halving,
    conditional_unet,
    quiet_pipeline,
    small_unet,
    train_sigmas,
)

from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    NCSNInpaintPipeline,
    NCSNPipeline,
    NCSNPosteriorPipeline,
    pretrained,
)
from ncsn_diffusers.evaluation import extract_features, load_digit_classifier
from ncsn_diffusers.foreign_configs import SCHEDULERS, check_scheduler
from ncsn_diffusers.units import image_units


def analytic_pipeline(scheduler=None, **arguments):
    """A pipeline around the perfect network for `MIXTURE`, and quiet."""
    scheduler = scheduler or AnnealedLangevinScheduler()
    unet = AnalyticUNet(
        train_sigmas(scheduler).tolist(), scheduler.config.prediction_type, scheduler.config.conditioning, **arguments
    )
    return quiet_pipeline(unet, scheduler)


def small_pipeline(**arguments):
    return quiet_pipeline(small_unet(**arguments))


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


# Each of them draws one Gaussian below; a mixture asks more of the early steps.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "DPMSolverMultistepScheduler" else pytest.mark.slow)
        for name in AnnealedLangevinScheduler._compatibles
    ],
)
def test_stock_schedulers_by_from_config_alone(name):
    pipe = analytic_pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    samples = pipe(batch_size=5000, num_inference_steps=100, generator=generator, output_type="latent").images
    check_mixture(samples)


def schedulers_of_diffusers():
    """All scheduler classes of the installed version, whether diffusers exports them or not."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        try:
            module = importlib.import_module(module.name)
        except ImportError:  # an extra that is not installed
            continue
        for name, cls in vars(module).items():
            if isinstance(cls, type) and issubclass(cls, SchedulerMixin) and cls is not SchedulerMixin:
                found[name] = cls
    return found


@pytest.mark.parametrize("name", sorted(schedulers_of_diffusers()))
def test_each_scheduler_of_diffusers_samples_rightly_or_is_refused(name):
    scheduler_class = schedulers_of_diffusers()[name]
    config = AnnealedLangevinScheduler().config
    if name not in SCHEDULERS:
        with pytest.raises(ValueError, match=f"{name} does not fit.* AnnealedLangevinScheduler and DDIM"):
            check_scheduler(scheduler_class)
        with pytest.raises(ValueError, match="Mine does not fit"):
            check_scheduler(type("Mine", (scheduler_class,), {}))
        return
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    gaussian = Gaussian(torch.full((8,), 0.3), 0.25 * torch.eye(8))
    unet = GaussianUNet(gaussian, 2, 4, train_sigmas(AnnealedLangevinScheduler()).tolist())
    pipe = quiet_pipeline(unet, scheduler_class.from_config(config))
    images = pipe(2000, 200, generator=torch.Generator().manual_seed(0), output_type="latent").images
    # 16,000 numbers: standard errors 0.004 and 0.6 %; the ladder ends with 1 % of the mean left to ODE solvers
    assert images.mean().item() == pytest.approx(0.3, abs=0.015)
    assert images.std().item() == pytest.approx(0.5, rel=0.035)


MISFITS = [
    "RePaintScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "EDMEulerScheduler",
]


@pytest.mark.parametrize("name", [*MISFITS, "CMStochasticIterativeScheduler", "SCMScheduler"])
def test_misfits_are_refused_by_every_call(name):
    scheduler_class = schedulers_of_diffusers().get(name)
    if scheduler_class is None:
        pytest.skip(f"this version of diffusers has no {name}")
    image, generators = torch.rand(1, 1, 8, 8), [torch.Generator(), torch.Generator()]
    for scheduler in (scheduler_class(), type("Mine", (scheduler_class,), {})()):
        pipe = small_pipeline()
        pipe.unet.forward = None
        inpaint = NCSNInpaintPipeline(pipe.unet, pipe.scheduler)
        pipe.scheduler = inpaint.scheduler = scheduler
        for call in (pipe, lambda p=pipe: p(image=image), lambda p=pipe: p.interpolate(generators)):
            with pytest.raises(ValueError, match=f"{type(scheduler).__name__} does not fit"):
                call()
        with pytest.raises(ValueError, match=f"{type(scheduler).__name__} does not fit"):
            inpaint(image, torch.ones(8, 8))


@pytest.mark.parametrize(
    ("scheduler_class", "settings", "message"),
    [
        (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}, "with use_flow_sigmas=True does not fit"),
        (DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction' does"),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}, "with timestep_type='continuous' does not fit"),
        (DDIMScheduler, {"prediction_type": "score"}, "DDIMScheduler cannot take a step with prediction_type='score'"),
        (DDPMScheduler, {"variance_type": "learned_range"}, "with variance_type='learned_range' does not fit"),
        (KDPM2DiscreteScheduler, {"prediction_type": "sample"}, "KDPM2DiscreteScheduler cannot take a step with"),
    ],
)
def test_settings_of_another_time_or_scaling_are_refused(scheduler_class, settings, message):
    pipe = small_pipeline()
    pipe.unet.forward = None
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    with pytest.raises(ValueError, match=message):
        pipe()


def test_a_scheduler_of_ones_own_fits_with_betas():
    class Mine(DDIMScheduler):
        pass

    check_scheduler(Mine())
    with pytest.raises(ValueError, match="Own has no `betas`"):
        check_scheduler(type("Own", (SchedulerMixin,), {})())


ODE_BY_ONE_STEP = ("DEIS", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPC")


@pytest.mark.parametrize("num_inference_steps", [1, 2, 3])
@pytest.mark.parametrize("name", AnnealedLangevinScheduler._compatibles)
def test_few_levels_work_or_end_in_a_sentence(name, num_inference_steps, monkeypatch):
    said = []
    monkeypatch.setattr("ncsn_diffusers.pipeline_ncsn.logger.warning", said.append)
    gaussian = Gaussian(torch.full((8,), 0.3), 0.25 * torch.eye(8))
    unet = GaussianUNet(gaussian, 2, 4, train_sigmas(AnnealedLangevinScheduler()).tolist())
    pipe = quiet_pipeline(unet, getattr(diffusers, name).from_config(AnnealedLangevinScheduler().config))

    def draw():
        generator = torch.Generator().manual_seed(0)
        return pipe(500, num_inference_steps, generator=generator, output_type="latent").images

    if name == "PNDMScheduler":
        with pytest.raises(ValueError, match=r"is too few for PNDMScheduler, .* take at least 4, or DDIMScheduler"):
            draw()
        return
    if num_inference_steps == 1 and not name.startswith(ODE_BY_ONE_STEP):
        with pytest.raises(ValueError, match=r"would begin at sigma=0\.01 and return noise: take more"):
            draw()
        return
    if (name, num_inference_steps) == ("KDPM2AncestralDiscreteScheduler", 2):
        with pytest.raises(FloatingPointError, match="KDPM2AncestralDiscreteScheduler is not finite after step 0 of 3"):
            draw()
        return
    try:
        images = draw()
    except FloatingPointError as error:
        # sigma_up rounds to just above the next sigma on some CPUs, and diffusers takes the root of their difference
        assert (name, num_inference_steps) == ("EulerAncestralDiscreteScheduler", 2)
        assert "EulerAncestralDiscreteScheduler is not finite after step 0 of 2" in str(error)
        return
    assert said or images.mean().item() == pytest.approx(0.3, abs=0.1)
    assert said or images.std() < 1.0
    assert all(f"The sample of {name} reaches" in message for message in said)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 3])
def test_pndm_without_its_first_steps_takes_few_levels(num_inference_steps):
    pipe = gaussian_pipeline(
        PNDMScheduler.from_config(AnnealedLangevinScheduler().config, skip_prk_steps=True, timestep_spacing="trailing")
    )
    images = pipe(500, num_inference_steps, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert images.std() < 1.0


def test_one_level_from_the_top_is_the_mean():
    pipe = gaussian_pipeline(
        DDIMScheduler.from_config(AnnealedLangevinScheduler().config, timestep_spacing="trailing"), deviation=0.5
    )
    assert pipe(500, 1, output_type="latent").images.std() < 0.05


# --- Samples that are not finite ---


class BrokenAt(torch.nn.Module):
    """The network whose output is not finite from evaluation `number` on, for the last image of the batch alone."""

    def __init__(self, unet, number):
        super().__init__()
        self.unet, self.number, self.evaluations = unet, number, 0

    def forward(self, *args, **kwargs):
        output = self.unet(*args, **kwargs)[0]
        if self.evaluations >= self.number:
            output[-1, 0, 0, 0] = math.inf
        self.evaluations += 1
        return (output,)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("unet", "_modules") else getattr(super().__getattr__("unet"), name)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("scheduler_class", [AnnealedLangevinScheduler, DDIMScheduler])
def test_a_sample_that_is_not_finite_is_an_error(scheduler_class, output_type):
    pipe = small_pipeline()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    name = f"The sample of {scheduler_class.__name__} is not finite after step 3 of 6 .* at sigma="
    unet = pipe.unet
    pipe.unet = BrokenAt(unet, 3)
    with pytest.raises(FloatingPointError, match=name):
        pipe(3, 6, output_type=output_type)
    if scheduler_class is DDIMScheduler:
        pipe.unet = BrokenAt(unet, 3)
        with pytest.raises(FloatingPointError, match=name):
            pipe.interpolate([torch.Generator(), torch.Generator()], 3, 6, output_type=output_type)
    inpaint = NCSNInpaintPipeline(unet, pipe.scheduler)
    inpaint.set_progress_bar_config(disable=True)
    inpaint.unet = BrokenAt(unet, 3)
    with pytest.raises(FloatingPointError, match=name):
        inpaint(torch.rand(1, 1, 8, 8), torch.ones(8, 8), 3, 6, num_resamplings=0, output_type=output_type)


def test_an_estimate_that_is_not_finite_is_an_error_where_a_callback_stops():
    pipe = small_pipeline()
    pipe.unet = BrokenAt(pipe.unet, 2)

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    with pytest.raises(FloatingPointError, match="not finite after step 2 of 6"):
        pipe(2, 6, callback_on_step_end=callback)


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
    images = stock(batch_size=5000, num_inference_steps=100, generator=generator, output_type="np").images
    images = torch.from_numpy(images)  # "pt" gives an array as well before diffusers 0.33
    # in [0, 1], where the mixture's tails beyond [-1, 1] are cut off
    np.testing.assert_allclose(MIXTURE.shares(images.flatten(1) * 2 - 1), MIXTURE.weights, atol=0.02)


# --- Reproducibility ---


def test_a_list_of_generators_makes_images_independent_of_their_batch():
    pipe = small_pipeline()

    def draw(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(batch_size=len(seeds), num_inference_steps=5, generator=generators, output_type="pt").images

    torch.testing.assert_close(draw([3, 1, 4])[2], draw([4])[0], rtol=0, atol=1e-5)
    assert not torch.equal(*draw([1, 2]))


@pytest.mark.parametrize("half", [False, True])
def test_same_images_after_save_and_load(tmp_path, half):
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


# --- Classes and guidance ---


MEANS = torch.tensor([[0.5] * 4 + [-0.5] * 4, [0.2] * 8])
DEVIATION = 0.3


def class_pipeline(scheduler_class=AnnealedLangevinScheduler, prediction_type="v_prediction", **arguments):
    scheduler = AnnealedLangevinScheduler(prediction_type=prediction_type)
    unet = ClassUNet(MEANS, DEVIATION, train_sigmas(scheduler).tolist(), prediction_type=prediction_type)
    return quiet_pipeline(unet, scheduler_class.from_config(scheduler.config), **arguments)


def conditional_pipeline():
    return quiet_pipeline(conditional_unet())


@pytest.mark.parametrize(
    ("channels", "sample_size", "shape"), [(1, 8, (1, 8, 8)), (3, (4, 8), (3, 4, 8)), (4, [8, 4], (4, 8, 4))]
)
def test_sample_shape_is_that_of_the_images(channels, sample_size, shape):
    pipe = small_pipeline(channels=channels, out_channels=channels, sample_size=sample_size)
    assert pipe.sample_shape == shape
    assert pipe(batch_size=2, num_inference_steps=1, output_type="pt").images.shape == (2, *shape)


def test_a_denoiser_without_labels_is_told_no_label():
    pipe = conditional_pipeline()
    assert pipe.make_denoiser(batch_size=2).labels.tolist() == [3, 3]
    assert pipe.make_denoiser({None: 1}, batch_size=2).labels.tolist() == [3, 3]
    guided = pipe.make_denoiser(1, 2.0, batch_size=3)
    assert (guided.conditional.labels.tolist(), guided.unconditional.labels.tolist()) == ([1, 1, 1], [3, 3, 3])
    assert pipe.make_denoiser([2, 0], batch_size=2).conditional.labels.tolist() == [2, 0]
    assert small_pipeline().make_denoiser().labels is None


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("scheduler_class", [AnnealedLangevinScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_guided_samples_follow_the_guided_gaussian(scheduler_class, guidance_scale):
    # 2,500 samples of each class in 8 dimensions: standard errors 0.006 of a mean, 0.5 % of the deviation
    images = class_pipeline(scheduler_class)(
        class_labels=[0, 1] * 2500,
        guidance_scale=guidance_scale,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images.flatten(1)
    for k in (0, 1):
        samples = images[k::2]
        torch.testing.assert_close(samples.mean(0), guidance_scale * MEANS[k], rtol=0, atol=0.03)
        spread = (samples - samples.mean(0)).square().mean().sqrt().item()
        assert spread == pytest.approx(DEVIATION, rel=0.04)


def test_no_label_is_a_value_of_its_own():
    pipe = class_pipeline()
    generator = torch.Generator().manual_seed(0)
    images = pipe(5000, class_labels={None: 1}, generator=generator, output_type="latent").images.flatten(1)
    torch.testing.assert_close(images.mean(0), torch.zeros(8), rtol=0, atol=0.02)
    assert images.std().item() == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize(("class_shares", "expected"), [(None, 0.5), ([3, 1], 0.75), ([0.0, 2.0], 0.0)])
def test_without_labels_each_samples_class_is_drawn_first(class_shares, expected):
    # p(x) = Σ p(c) p(x|c), whatever the network makes of "no label", which here is a third Gaussian
    pipe = class_pipeline(class_shares=class_shares)
    images = pipe(4000, generator=torch.Generator().manual_seed(0), output_type="latent").images.flatten(1)
    distances = torch.cdist(images, MEANS)
    members = distances.argmin(1)
    # the means are 5 deviations apart: 0.6 % of the samples are nearer to the other class's
    assert (members == 0).float().mean().item() == pytest.approx(expected, abs=0.03)
    for k in (0, 1):
        if (members == k).sum() > 500:
            torch.testing.assert_close(images[members == k].mean(0), MEANS[k], rtol=0, atol=0.05)


def test_a_drawn_class_belongs_to_its_generator():
    # so that image i stays image i: alone, in a batch, and when others are drawn beside it
    pipe = conditional_pipeline()
    seen, forward = [], pipe.unet.forward

    def recording_forward(sample, timestep, class_labels, return_dict=True):
        seen.append(class_labels.tolist())
        return forward(sample, timestep, class_labels, return_dict)

    pipe.unet.forward = recording_forward

    def draw(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(len(seeds), 3, generator=generators, output_type="latent").images

    together, labels = draw(*range(6)), seen[-1]
    assert set(labels) == {0, 1, 2}
    for i in (0, 3, 5):
        torch.testing.assert_close(draw(i)[0], together[i], rtol=0, atol=1e-4)
        assert seen[-1] == [labels[i]]
    generator = torch.Generator().manual_seed(4)
    expected = torch.multinomial(torch.ones(3), 5, replacement=True, generator=torch.Generator().manual_seed(4))
    pipe(5, 3, generator=generator)
    assert seen[-1] == expected.tolist()


def test_from_an_image_and_between_two_the_network_is_told_no_label():
    pipe, seen = conditional_pipeline(), []
    forward = pipe.unet.forward

    def recording_forward(sample, timestep, class_labels, return_dict=True):
        seen.append(set(class_labels.tolist()))
        return forward(sample, timestep, class_labels, return_dict)

    pipe.unet.forward = recording_forward
    pipe(4, 3, image=torch.rand(1, 1, 8, 8))
    pipe.interpolate([torch.Generator(), torch.Generator()], 3, 2)
    pipe.denoise(torch.zeros(2, 1, 8, 8), 1.0)
    assert seen and all(labels == {3} for labels in seen)


@pytest.mark.slow
def test_the_shipped_digits_are_as_legible_without_labels_as_with():
    pipe = NCSNPipeline.from_pretrained(pretrained("mnist"))
    pipe.set_progress_bar_config(disable=True)
    classifier = load_digit_classifier()

    def sureness(**arguments):
        generator = torch.Generator().manual_seed(0)
        images = pipe(100, 25, generator=generator, output_type="pt", **arguments).images
        return extract_features(images, classifier).softmax(1).max(1).values

    drawn, told = sureness(), sureness(class_labels=[i % 10 for i in range(100)])
    assert abs((drawn < 0.8).float().mean() - (told < 0.8).float().mean()) < 0.1  # three standard errors at 5 %
    assert (drawn < 0.8).float().mean() < 0.12


@pytest.mark.parametrize(
    ("class_shares", "null_class"),
    [([1, 1], -1), ([1, 1, 1], None), ([1, -1, 1], -1), ([0, 0, 0], -1), ([math.inf] * 3, -1)],
)
def test_bad_class_shares(class_shares, null_class):
    with pytest.raises(ValueError, match=f"`class_shares` must be {3 if null_class else 4} numbers of at least 0"):
        quiet_pipeline(conditional_unet(), class_shares=class_shares, null_class=null_class)


def test_class_shares_of_an_unconditional_network():
    with pytest.raises(ValueError, match="`class_shares` must be 0 numbers"):
        quiet_pipeline(small_unet(), class_shares=[1.0])


# A network of another project, whose embeddings are all classes: the last is a class, and there is no "no label".


def foreign_pipeline(cls=NCSNPipeline):
    return quiet_pipeline(conditional_unet(), cls=cls, null_class=None)


def test_without_a_no_label_row_all_embeddings_are_classes(tmp_path):
    pipe = foreign_pipeline()
    assert pipe.num_classes == 4
    seen, forward = [], pipe.unet.forward

    def recording_forward(sample, timestep, class_labels, return_dict=True):
        seen.append(class_labels.tolist())
        return forward(sample, timestep, class_labels, return_dict)

    pipe.unet.forward = recording_forward
    pipe(class_labels=[3, 0], num_inference_steps=2)
    assert seen == [[3, 0]] * 2
    pipe(200, 1, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(seen[-1], minlength=4)
    assert len(counts) == 4 and counts.min() > 30  # 50 each; a deviation is 6
    pipe.unet.forward = forward
    pipe.save_pretrained(tmp_path)
    assert NCSNPipeline.from_pretrained(tmp_path).num_classes == 4


def test_without_a_no_label_row_what_needs_one_is_refused():
    pipe = foreign_pipeline()
    pipe.unet.forward = None
    needs = "`class_labels` are needed: this network knows 4 classes and has no embedding for 'no label'"
    image, generators = torch.rand(1, 1, 8, 8), [torch.Generator(), torch.Generator()]
    for call in (
        lambda: pipe(image=image),
        lambda: pipe.interpolate(generators),
        lambda: pipe.denoise(image, 1.0),
        lambda: pipe.score(image, 1.0),
        lambda: foreign_pipeline(NCSNInpaintPipeline)(image, torch.ones(8, 8)),
        lambda: foreign_pipeline(NCSNPosteriorPipeline)(image, lambda x: x, 0.1),
    ):
        with pytest.raises(ValueError, match=needs):
            call()
    with pytest.raises(ValueError, match="guides away from 'no label', which this network does not know"):
        pipe(class_labels=1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="a dictionary of ints from 0 to 3 and their weights, not "):
        pipe(class_labels={None: 1})


@pytest.mark.parametrize("null_class", [0, 3, "last", True])
def test_bad_null_class(null_class):
    with pytest.raises(ValueError, match="`null_class` must be -1, the last class embedding, or None"):
        quiet_pipeline(conditional_unet(), null_class=null_class)


def test_guidance_means_the_same_for_every_prediction_type():
    # it moves the output, of which the denoised estimate is an affine function
    images = [
        class_pipeline(prediction_type=prediction_type)(
            class_labels=[0, 1], guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images
        for prediction_type in ("v_prediction", "epsilon", "sample", "score")
    ]
    for other in images[1:]:
        torch.testing.assert_close(other, images[0], rtol=0, atol=5e-3)


@pytest.mark.parametrize("scheduler_class", [AnnealedLangevinScheduler, DDIMScheduler])
def test_guidance_scale_1_is_the_conditional_model(scheduler_class):
    pipe = conditional_pipeline()
    pipe.scheduler = scheduler = scheduler_class.from_config(pipe.scheduler.config)
    images = pipe(
        class_labels=[2, 0], num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images

    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipe.unet(scheduler.scale_model_input(x, t), t, class_labels=torch.tensor([2, 0])).sample
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-4)  # by way of D, which rounds differently


def test_guidance_takes_one_batched_evaluation_a_step(monkeypatch):
    pipe = conditional_pipeline()
    calls = []
    forward = pipe.unet.forward

    def recording_forward(sample, timestep, class_labels, return_dict=True):
        calls.append((len(sample), class_labels.tolist()))
        return forward(sample, timestep, class_labels, return_dict)

    monkeypatch.setattr(pipe.unet, "forward", recording_forward)
    pipe(class_labels=[2, 0], num_inference_steps=3)
    assert calls == [(2, [2, 0])] * 3
    calls.clear()
    pipe(class_labels=[2, 0], guidance_scale=2.0, num_inference_steps=3)
    assert calls == [(4, [3, 3, 2, 0])] * 3
    calls.clear()
    pipe(batch_size=2, num_inference_steps=3, class_labels={None: 1})
    assert calls == [(2, [3, 3])] * 3


@pytest.mark.parametrize("labels", [[1, 1], (1, 1), torch.tensor([1, 1]), np.array([1, 1]), 1, torch.tensor(1)])
def test_ways_to_give_labels(labels):
    def draw(pipe, **arguments):
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=3, generator=generator, output_type="pt", **arguments).images

    pipe = conditional_pipeline()
    expected = draw(pipe, class_labels=[1, 1])
    assert torch.equal(draw(pipe, class_labels=labels, batch_size=2), expected)
    assert not torch.equal(draw(pipe, class_labels=2, batch_size=2), expected)
    assert len(draw(pipe, class_labels=[0, 1, 2])) == 3  # the batch's size follows
    assert len(draw(pipe, class_labels=0)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0, 3]}, r"ints from 0 to 2, .* not \[0, 3\]"),
        ({"class_labels": -1}, r"`class_labels` must be an int or a list of ints from 0 to 2"),
        ({"class_labels": [0.0, 1.0]}, r"`class_labels` must be an int or a list of ints"),
        ({"class_labels": [True]}, r"`class_labels` must be an int or a list of ints"),
        ({"class_labels": [[0, 1]]}, r"of shape \(batch_size,\), not \[\[0, 1\]\]"),
        ({"class_labels": []}, r"`class_labels` must be an int or a list of ints"),
        ({"class_labels": "seven"}, r"`class_labels` must be an int or a list of ints from 0 to 2, .* not 'seven'"),
        ({"class_labels": [0, 1], "batch_size": 3}, r"`class_labels` has 2 entries, but batch_size=3"),
        (
            {"image": torch.rand(1, 1, 8, 8), "guidance_scale": 2.0},
            "`guidance_scale`=2.0 guides towards a class: it nee",
        ),
        (
            {"class_labels": {3: 1}},
            "a dictionary of ints from 0 to 2, or None for no label, and their weights, not {3:",
        ),
        ({"class_labels": {}}, "`class_labels` with weights must be a dictionary of ints from 0 to 2, or None"),
        ({"class_labels": {True: 1}}, "`class_labels` with weights must be a dictionary of ints from 0 to 2, or None"),
        ({"class_labels": {0: 1, 1: -1}}, "weights of a product must be finite, and their sum above 0"),
        ({"class_labels": {0: 2, 1: -1}, "guidance_scale": 2.0}, "`guidance_scale`=2.0 is itself a product of classes"),
        ({"class_labels": 0, "guidance_scale": -1.0}, r"`guidance_scale` must be a finite number of at least 0"),
        ({"class_labels": 0, "guidance_scale": "2"}, r"`guidance_scale` must be a finite number of at least 0"),
    ],
)
def test_bad_labels_are_refused_before_the_first_evaluation(arguments, message):
    pipe = conditional_pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_labels_for_an_unconditional_network():
    with pytest.raises(ValueError, match="`class_labels` are for a class-conditional network, and this one is uncondi"):
        small_pipeline()(class_labels=3)


# --- From an image ---


def gaussian_pipeline(scheduler=None, deviation=0.5, size=(2, 4), **arguments):
    """The perfect network for independent pixels N(0, deviation²)."""
    scheduler = scheduler or AnnealedLangevinScheduler(**arguments)
    pixels = size[0] * size[1]
    gaussian = Gaussian(torch.zeros(pixels), deviation**2 * torch.eye(pixels))
    return quiet_pipeline(GaussianUNet(gaussian, *size, train_sigmas(AnnealedLangevinScheduler()).tolist()), scheduler)


def moments_from_an_image(pipe, strength, steps):
    """Mean over the image's own value, and variance, of 1,000 images drawn from one of eight equal pixels."""
    image = torch.full((1, 2, 4), 0.9)  # 0.8 in units of the data
    generator = torch.Generator().manual_seed(0)
    samples = pipe(
        1000, steps, image=image[None], strength=strength, generator=generator, output_type="latent"
    ).images.double()
    return samples.mean().item() / 0.8, samples.var().item()


@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("strength", [0.3, 0.5])
def test_ode_from_an_image(scheduler_class, strength):
    # The probability flow of Gaussian data is linear, x0 = x s/√(s² + sigma²): from x ~ N(x0, sigma²) the mean is
    # x0 s/√(s² + sigma²) and the variance sigma² s²/(s² + sigma²). 8,000 pixels: 1.6 % of the variance at one error.
    pipe = gaussian_pipeline(scheduler_class.from_config(AnnealedLangevinScheduler().config))
    sigmas = []
    pipe(
        1,
        200,
        image=torch.zeros(1, 1, 2, 4),
        strength=strength,
        callback_on_step_end=lambda pipe, i, t, tensors: sigmas.append(tensors["sigma"].item()),
        callback_on_step_end_tensor_inputs=["sigma"],
    )
    shrink = 0.5 / math.sqrt(0.25 + sigmas[0] ** 2)
    mean, variance = moments_from_an_image(pipe, strength, 200)
    assert mean == pytest.approx(shrink, abs=0.04)
    assert variance == pytest.approx((sigmas[0] * shrink) ** 2, rel=0.06)
    assert sigmas[0] == pytest.approx(0.01 * 5000**strength, rel=0.05)


@pytest.mark.parametrize("num_langevin_steps", [1, 2])
def test_langevin_from_an_image_follows_its_recursion(num_langevin_steps):
    pipe = gaussian_pipeline(solver_order=1, num_langevin_steps=num_langevin_steps)
    pipe.scheduler.set_timesteps(40)
    rows = pipe.scheduler.table[-20 * num_langevin_steps :]
    mean, variance = 1.0, rows[0].sigma ** 2
    for row in rows:
        factor = row.kappa + (1 - row.kappa) * 0.25 / (0.25 + row.sigma**2)
        mean, variance = factor * mean, factor**2 * variance + row.c**2
    observed = moments_from_an_image(pipe, 0.5, 40)
    assert observed[0] == pytest.approx(mean, abs=0.03)
    assert observed[1] == pytest.approx(variance, rel=0.05)


def test_images_of_the_data_stay_images_of_the_data():
    # 40,000 pixels: the variance's standard error is 0.7 %; what lies beyond [-1, 1] would be 0.2 ‰ of them
    pipe = gaussian_pipeline(deviation=0.25)
    generator = torch.Generator().manual_seed(1)
    images = (0.25 * torch.randn(5000, 1, 2, 4, generator=generator)).clamp(-1, 1) / 2 + 0.5
    for strength in (0.3, 0.6, 1.0):
        samples = pipe(
            num_inference_steps=150, image=images, strength=strength, generator=generator, output_type="latent"
        ).images
        assert samples.mean().item() == pytest.approx(0, abs=0.01)
        assert samples.var().item() == pytest.approx(0.0625, rel=0.03)


def test_ways_to_give_an_image():
    pipe = small_pipeline(channels=3, out_channels=3, sample_size=(8, 12))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    images = [PIL.Image.fromarray(p) for p in pixels]

    def draw(image, **arguments):
        generator = torch.Generator().manual_seed(0)
        return pipe(image=image, num_inference_steps=5, generator=generator, output_type="pt", **arguments).images

    expected = draw(tensor / 255)
    assert len(expected) == 2
    for image in (images, pixels, tensor, list(pixels), list(tensor), pixels / np.float32(255)):
        torch.testing.assert_close(draw(image), expected, rtol=0, atol=1e-5)
    for image in (images[0], images[:1], pixels[0], tensor[0]):  # one for the whole batch
        torch.testing.assert_close(draw(image, batch_size=2)[0], expected[0], rtol=0, atol=1e-5)


def test_grayscale_images():
    pipe = small_pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)

    def draw(image):
        generator = torch.Generator().manual_seed(0)
        return pipe(image=image, num_inference_steps=5, generator=generator, output_type="pt").images

    expected = draw(torch.from_numpy(pixels)[None, None] / 255)
    pil = PIL.Image.fromarray(pixels)
    for image in (pil, pil.convert("RGB"), pixels, pixels[..., None], torch.from_numpy(pixels)[None]):
        torch.testing.assert_close(draw(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "strength", "evaluations"),
    [
        (AnnealedLangevinScheduler(), 0.58, 29),
        (AnnealedLangevinScheduler(num_langevin_steps=3), 0.2, 30),
        (AnnealedLangevinScheduler(), 0.001, 1),
        (DDIMScheduler(), 0.8, 40),
        (HeunDiscreteScheduler(), 0.5, 49),  # two evaluations a step but for the last
        (DPMSolverMultistepScheduler(), 1, 50),
    ],
)
def test_strength_is_the_share_of_the_steps(scheduler, strength, evaluations):
    pipe = analytic_pipeline()
    pipe.scheduler = type(scheduler).from_config({**pipe.scheduler.config, "num_langevin_steps": 1})
    langevin = isinstance(scheduler, AnnealedLangevinScheduler)
    steps = {"num_langevin_steps": scheduler.config.num_langevin_steps} if langevin else {}
    pipe(image=torch.zeros(1, 1, 2, 4), strength=strength, **steps)
    assert pipe.unet.evaluations == evaluations


def test_latents_are_the_noise_of_the_image():
    pipe = small_pipeline()
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    expected = pipe(num_inference_steps=5, image=image, generator=generator, output_type="pt").images
    noise = torch.randn(1, 1, 8, 8, generator=generator.manual_seed(0))
    images = pipe(num_inference_steps=5, image=image, latents=noise, generator=generator, output_type="pt").images
    assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.rand(1, 1, 8, 9)}, "`image` must be 1 × 8 × 8 .* not 1 × 8 × 9: resize it first"),
        ({"image": torch.rand(1, 3, 8, 8)}, "`image` must be 1 × 8 × 8 .* not 3 × 8 × 8"),
        ({"image": PIL.Image.new("L", (28, 28))}, "`image` must be 1 × 8 × 8 .* not 1 × 28 × 28"),
        ({"image": [PIL.Image.new("L", (8, 8)), PIL.Image.new("L", (9, 9))]}, "all of one size"),
        ({"image": "digit.png"}, "`image` must be an image, an array or a tensor, or a list of such"),
        ({"image": []}, "`image` must be an image, an array or a tensor, or a list of such"),
        ({"image": torch.full((1, 1, 8, 8), 255.0)}, "`image` must hold numbers from 0 to 1, or be an 8-bit image"),
        ({"image": torch.full((1, 1, 8, 8), math.nan)}, "`image` must hold finite numbers"),
        ({"image": torch.rand(2, 1, 8, 8), "batch_size": 3}, "`image` has 2 entries, but batch_size=3"),
        (
            {"image": torch.full((1, 1, 8, 8), 255)},
            "`image` must hold numbers from 0 to 1, or be an 8-bit image, not 255",
        ),
        ({"image": torch.rand(1, 1, 8, 8), "strength": 0}, "`strength` must be a finite number above 0 and at most 1"),
        (
            {"image": torch.rand(1, 1, 8, 8), "strength": 1.5},
            "`strength` must be a finite number above 0 and at most 1",
        ),
    ],
)
def test_bad_images_are_refused_before_the_first_evaluation(arguments, message):
    pipe = small_pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize("stray", [-1e-7, 1 + 1e-7, -5e-4, 1.0005])
def test_values_just_outside_the_range_are_of_rounding(stray):
    # and no sign of another range
    pipe, image = small_pipeline(), torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    image[0, 0, 0, 0] = stray

    def draw(image):
        generator = torch.Generator().manual_seed(0)
        return pipe(image=image, num_inference_steps=4, strength=0.5, generator=generator, output_type="pt").images

    assert torch.equal(draw(image), draw(image.clamp(0, 1)))


@pytest.mark.parametrize("low", [-1.0, -0.002])
def test_images_of_another_range_are_refused(low):
    pipe = small_pipeline()
    with pytest.raises(
        ValueError, match=rf"`image` must hold numbers from 0 to 1, or be an 8-bit image, not {low:g} to"
    ):
        pipe(image=torch.linspace(low, 1, 64).reshape(1, 1, 8, 8))


def test_pndm_cannot_begin_in_the_middle():
    pipe = small_pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"`image` needs a scheduler that can begin in the middle .* PNDMScheduler"):
        pipe(image=torch.rand(1, 1, 8, 8))


# --- Interpolation ---


INTERPOLATING = {
    "default": (AnnealedLangevinScheduler, {}),
    "two steps a level": (AnnealedLangevinScheduler, {"num_langevin_steps": 2}),
    "noise in every other step": (AnnealedLangevinScheduler, {"num_langevin_steps": 2, "step_size": 0.01}),
    "Euler-Maruyama": (AnnealedLangevinScheduler, {"noise_rule": "euler_maruyama"}),
    "DDIM": (DDIMScheduler, {}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "SDE-DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}


def interpolating_scheduler(name):
    scheduler_class, settings = INTERPOLATING[name]
    return scheduler_class.from_config(AnnealedLangevinScheduler().config, **settings)


@pytest.mark.parametrize("name", INTERPOLATING)
def test_interpolation_ends_on_the_two_samples(name):
    pipe = quiet_pipeline(small_unet(), interpolating_scheduler(name))

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    row = pipe.interpolate(generators(), num_images=5, num_inference_steps=8, output_type="latent").images
    ends = [pipe(num_inference_steps=8, generator=g, output_type="latent").images[0] for g in generators()]
    scale = ends[0].abs().max().item()
    torch.testing.assert_close(row[0], ends[0], rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(row[-1], ends[1], rtol=0, atol=1e-5 * scale)
    again = pipe.interpolate(generators(), num_images=5, num_inference_steps=8, output_type="latent").images
    assert torch.equal(row, again)


@pytest.mark.parametrize("name", INTERPOLATING)
def test_interpolation_mixes_all_noise_on_the_circle(name):
    # For a Gaussian about 0 the chain is linear in its noise: image i is cos(θ) first + sin(θ) last, exactly, and has
    # the variance of the data.
    pipe = gaussian_pipeline(interpolating_scheduler(name), size=(20, 20))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    row = pipe.interpolate(generators, num_images=5, num_inference_steps=30, output_type="latent").images
    angles = torch.linspace(0, math.pi / 2, 5).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(row, angles.cos() * row[0] + angles.sin() * row[-1], rtol=0, atol=1e-3)
    # 400 pixels: 7 % at one error
    torch.testing.assert_close(row.var(dim=(1, 2, 3)), row[0].var().expand(5), rtol=0.2, atol=0)


def test_interpolation_of_a_class():
    pipe = class_pipeline()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    row = pipe.interpolate(generators, num_images=6, class_labels=0, guidance_scale=2.0, output_type="latent").images
    assert (row.flatten(1) - 2 * MEANS[0]).abs().max() < 5 * DEVIATION


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generators": [torch.Generator()]}, "`generators` must be two different `torch.Generator`s"),
        ({"generators": torch.Generator()}, "`generators` must be two different `torch.Generator`s"),
        ({"generators": [torch.Generator()] * 2}, "`generators` must be two different `torch.Generator`s"),
        ({"generators": [1, 2]}, "`generators` must be two different `torch.Generator`s"),
        ({"num_images": 1}, "`num_images` must be an int of at least 2, not 1"),
        ({"num_images": None}, "`num_images` must be an int of at least 2, not None"),
        ({"class_labels": 1}, "`class_labels` are for a class-conditional network"),
    ],
)
def test_bad_interpolation_is_refused_before_the_first_evaluation(arguments, message):
    pipe = small_pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe.interpolate(**{"generators": [torch.Generator(), torch.Generator()], **arguments})


def test_interpolation_counts_labels_by_its_own_argument():
    with pytest.raises(ValueError, match="`class_labels` has 2 entries, but num_images=3"):
        conditional_pipeline().interpolate([torch.Generator(), torch.Generator()], 3, class_labels=[0, 1])


def test_noise_that_cannot_be_mixed():
    pipe = small_pipeline()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerAncestralDiscreteScheduler draws noise in its steps that cannot be mix"):
        pipe.interpolate([torch.Generator(), torch.Generator()])


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
    # clamped, never rescaled to the image's own range
    torch.testing.assert_close(outputs["pt"], (outputs["latent"] / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in outputs["pil"]] == [(width, height)] * 2
    assert all(isinstance(image, PIL.Image.Image) for image in outputs["pil"])
    assert outputs["pil"][0].mode == {1: "L", 3: "RGB"}[channels]
    np.testing.assert_allclose(np.array(outputs["pil"][0]).squeeze(), outputs["np"][0].squeeze() * 255, atol=0.51)


def pipelines_of_both_data_ranges(cls=NCSNPipeline):
    """Perfect networks for the same images, in [-1, 1] and in [0, 1], where all sigmas are halved."""
    pipes = []
    for black, mean, scale in ((-1.0, 0.2, 1.0), (0.0, 0.6, 0.5)):
        scheduler = AnnealedLangevinScheduler(
            sigma_min=0.01 * scale, sigma_max=200.0 * scale, conditioning="sigma", prediction_type="score"
        )
        gaussian = Gaussian(torch.full((8,), mean), (0.5 * scale) ** 2 * torch.eye(8))
        network = {"prediction_type": "score", "conditioning": "sigma"}
        unet = GaussianUNet(gaussian, 2, 4, train_sigmas(scheduler).tolist(), **network)
        pipes.append(quiet_pipeline(unet, scheduler, cls, **image_units(black)))
    return pipes


@pytest.mark.parametrize("arguments", [{}, {"strength": 0.6}, {"output_type": "np"}, {"output_type": "pil"}])
def test_data_range_changes_nothing_but_the_units(arguments):
    # The chain starts around 0, which is gray in one range and black in the other: what is left of the difference is
    # 0.5 (s/sigma_max)² = 3e-6 of the range.
    if "strength" in arguments:
        arguments = {**arguments, "image": torch.rand(200, 1, 2, 4, generator=torch.Generator().manual_seed(1))}
    arguments = {"batch_size": 200, "output_type": "pt", **arguments}
    wide, unit = (
        pipe(generator=torch.Generator().manual_seed(0), **arguments).images for pipe in pipelines_of_both_data_ranges()
    )
    wide, unit = (np.stack([np.asarray(image, dtype=np.float64) for image in images]) for images in (wide, unit))
    np.testing.assert_allclose(wide, unit, rtol=0, atol=1 if arguments["output_type"] == "pil" else 1e-4)
    assert (unit.min(), unit.max()) == ((0, 255) if arguments["output_type"] == "pil" else (0, 1))  # clipped


def test_inpainting_in_both_data_ranges():
    image = torch.rand(50, 1, 2, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, False, True, False], [False, True, False, True]])[None, None]
    wide, unit = (
        pipe(image, mask, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipe in pipelines_of_both_data_ranges(NCSNInpaintPipeline)
    )
    torch.testing.assert_close(wide, unit, rtol=0, atol=1e-4)
    assert torch.equal(unit[~mask.expand_as(unit)], image[~mask.expand_as(image)])


def test_latents_are_in_units_of_the_data_in_both_ranges():
    wide, unit = (
        pipe(batch_size=200, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for pipe in pipelines_of_both_data_ranges()
    )
    torch.testing.assert_close((wide + 1) / 2, unit, rtol=0, atol=1e-4)
    assert unit.min() < 0 and unit.max() > 1


def test_units_are_saved(tmp_path):
    units = {"data_mean": [280.0, 1e-6], "data_std": [12.0, 3e-6], "value_range": None, "data_unit": "K, V"}
    pipe = quiet_pipeline(small_unet(channels=2, out_channels=2), **units)
    pipe.save_pretrained(tmp_path)
    again = NCSNPipeline.from_pretrained(tmp_path)
    assert {name: again.config[name] for name in units} == units
    assert again.units == pipe.units
    assert NCSNPipeline.from_pretrained(tmp_path, data_std=[6.0, 3e-6]).units.data_std == [6.0, 3e-6]
    assert NCSNInpaintPipeline(**pipe.components).units == pipe.units


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"data_std": 0}, "`data_std` must be finite numbers above 0, one for all channels or one for each, not 0"),
        ({"data_std": [1.0, -1.0]}, "`data_std` must be finite numbers above 0"),
        ({"data_std": math.nan}, "`data_std` must be finite numbers above 0"),
        ({"data_mean": math.inf}, "`data_mean` must be finite numbers, one for all channels or one for each, not inf"),
        ({"data_mean": []}, "`data_mean` must be finite numbers"),
        ({"data_mean": [1.0, 2.0, 3.0]}, "`data_mean` must be one number, or one for each of the network's 2 channels"),
        ({"data_std": [1.0]}, "`data_std` must be one number, or one for each of the network's 2 channels, not 1"),
        ({"value_range": (1.0, 1.0)}, "`value_range` must be two rising numbers, not"),
    ],
)
def test_bad_units(units, message):
    with pytest.raises(ValueError, match=message):
        quiet_pipeline(small_unet(channels=2, out_channels=2), **units)


def test_images_below_black_are_refused():
    with pytest.raises(ValueError, match="`image` must hold numbers from 0 to 1"):
        pipelines_of_both_data_ranges()[1](image=torch.full((1, 1, 2, 4), -0.5))


def test_other_channel_counts_are_arrays_with_channels_first():
    pipe = small_pipeline(channels=2, out_channels=2)
    array, default, tensor, latent = (
        pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type=output_type).images
        for output_type in ("np", None, "pt", "latent")
    )
    assert tensor.shape == (1, 2, 8, 8)
    torch.testing.assert_close(tensor, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_array_equal(array, tensor.numpy())
    np.testing.assert_array_equal(default, array)
    with pytest.raises(ValueError, match=r"'pil' is for images in .* of 1, 3 or 4 channels, .* draws 2 × 8"):
        pipe(num_inference_steps=2, output_type="pil")


def test_tuple_output():
    pipe = small_pipeline()

    def draw(**arguments):
        return pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt", **arguments)

    images = draw(return_dict=False)
    assert isinstance(images, tuple) and len(images) == 1
    assert torch.equal(images[0], draw().images)


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
    assert seen == [(i, t, (1, 1, 8, 8)) for i, t in enumerate(pipe.scheduler.timesteps.tolist())]
    assert len(seen) == 5
    assert torch.equal(images, torch.full_like(images, 0.5))
    pipe(num_inference_steps=2, callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=[])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize(
    "scheduler_class",
    [AnnealedLangevinScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_callback_sees_sigma_and_the_denoised_estimate(scheduler_class, prediction_type):
    pipe = analytic_pipeline(AnnealedLangevinScheduler(prediction_type=prediction_type))
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    ladder = np.geomspace(0.01, 50, 1000)
    before = {}  # what the network was given, in units of the data
    forward = pipe.unet.forward

    def recording_forward(sample, timestep, **arguments):
        before["sigma"] = math.exp(np.interp(timestep.item(), np.arange(1000), np.log(ladder)))
        before["x"] = sample.flatten(1).double() * math.sqrt(1 + before["sigma"] ** 2)
        return forward(sample, timestep, **arguments)

    pipe.unet.forward = recording_forward
    seen = []

    def callback(pipe, step, timestep, tensors):
        assert set(tensors) == {"sigma", "denoised"}
        assert tensors["sigma"].item() == pytest.approx(before["sigma"], rel=1e-4)
        denoised = MIXTURE.denoised(before["x"], before["sigma"]).float()
        torch.testing.assert_close(tensors["denoised"].flatten(1), denoised, rtol=0, atol=2e-3)
        seen.append(step)

    names = ["sigma", "denoised"]
    pipe(2, 6, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == list(range(len(pipe.scheduler.timesteps)))


@pytest.mark.parametrize("arguments", [{}, {"conditioning": "sigma", "prediction_type": "score"}])
def test_denoised_is_the_schedulers_own(arguments):
    pipe = analytic_pipeline(AnnealedLangevinScheduler(**arguments))
    step, estimates, sigmas = pipe.scheduler.step, [], []

    def recording_step(*args, **kwargs):
        estimates.append(step(*args, **kwargs)[1])
        return args[2], estimates[-1]

    def callback(pipe, i, t, tensors):
        torch.testing.assert_close(tensors["denoised"], estimates[-1], rtol=1e-4, atol=1e-4)
        sigmas.append(tensors["sigma"].item())

    pipe.scheduler.step = recording_step
    pipe(2, 6, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["sigma", "denoised"])
    np.testing.assert_allclose(sigmas, pipe.scheduler.sigmas[:-1], rtol=1e-4)


class Recording(PipelineCallback):
    """A callback in diffusers' form, which keeps what it was given, and the shape of the network's batch."""

    tensor_inputs = ["denoised", "sigma"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen = [*getattr(self, "seen", []), (step_index, sorted(callback_kwargs))]
        return callback_kwargs


def test_callback_classes_of_diffusers_name_their_tensors():
    pipe = small_pipeline()
    recording = Recording()
    pipe(num_inference_steps=2, callback_on_step_end=recording)
    assert recording.seen == [(0, ["denoised", "sigma"]), (1, ["denoised", "sigma"])]

    several = MultiPipelineCallbacks([Recording(), Halving(cutoff_step_ratio=0.5)])
    row = [torch.Generator(), torch.Generator()]
    for draw in (pipe, lambda **arguments: pipe.interpolate(row, 2, **arguments)):
        halved = []
        for callback in (several, None, lambda p, i, t, x: {"latents": x["latents"] / 2} if i == 2 else None):
            for k, generator in enumerate(row):
                generator.manual_seed(k)
            arguments = {"generator": torch.Generator().manual_seed(0)} if draw is pipe else {}
            halved.append(
                draw(num_inference_steps=4, callback_on_step_end=callback, output_type="latent", **arguments).images
            )
        assert torch.equal(halved[0], halved[2])
        assert not torch.equal(halved[0], halved[1])
    assert several.callbacks[0].seen[0] == (0, ["denoised", "latents", "sigma"])
    with pytest.raises(ValueError, match=r"not \['prompt_embeds'\]. \(To change the guidance, a callback sets"):
        pipe(callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4))


def test_no_tensor_inputs_are_the_default_ones():
    seen = []
    small_pipeline()(
        num_inference_steps=1,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(set(tensors)),
        callback_on_step_end_tensor_inputs=None,
    )
    assert seen == [{"latents"}]


@pytest.mark.parametrize("scale", [0.0, 0, 1.0, 1])
@pytest.mark.parametrize("scheduler_class", [AnnealedLangevinScheduler, DDIMScheduler])
def test_dynamic_guidance(scheduler_class, scale):
    # diffusers' example: no guidance after 40 % of the steps, and half of the evaluations
    pipe = conditional_pipeline()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    forward, batches, scales = pipe.unet.forward, [], []

    def recording_forward(sample, timestep, class_labels, return_dict=True):
        batches.append(class_labels.tolist())
        return forward(sample, timestep, class_labels, return_dict)

    pipe.unet.forward = recording_forward

    def callback(pipe, step_index, timestep, callback_kwargs):
        scales.append((pipe.guidance_scale, pipe.do_classifier_free_guidance))
        if step_index == int(pipe.num_timesteps * 0.4):
            pipe._guidance_scale = scale
        return callback_kwargs

    def draw(callback, guidance_scale):
        generator = torch.Generator().manual_seed(0)
        arguments = {"class_labels": [2, 0], "num_inference_steps": 5, "output_type": "latent", "generator": generator}
        return pipe(guidance_scale=guidance_scale, callback_on_step_end=callback, **arguments).images

    images = draw(callback, 3.0)
    assert batches == [[3, 3, 2, 0]] * 3 + [[2, 0]] * 2
    assert scales == [(3.0, True)] * 3 + [(1.0, False)] * 2
    assert pipe.num_timesteps == 5

    # the same by hand: each step at the guidance that it is to have
    pipe.scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator) * pipe.scheduler.init_noise_sigma
    for i, t in enumerate(pipe.scheduler.timesteps):
        model_input = pipe.scheduler.scale_model_input(x, t)
        with torch.no_grad():
            conditional, other = (forward(model_input, t, torch.tensor(y)).sample for y in ([2, 0], [3, 3]))
        output = other + (3.0 if i <= 2 else 1.0) * (conditional - other)
        x = pipe.scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(images, x, rtol=1e-3, atol=1e-3)
    draw(None, 1.0)
    assert pipe.guidance_scale == 1.0


def test_a_callback_may_turn_guidance_on_and_up():
    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 2.5 if i == 0 else pipe._guidance_scale

    pipe = class_pipeline()
    arguments = {"class_labels": [0, 1] * 1000, "output_type": "latent", "callback_on_step_end": callback}
    images = pipe(generator=torch.Generator().manual_seed(0), **arguments).images.flatten(1)
    # all but the first of 50 levels, which hide the means
    torch.testing.assert_close(images[::2].mean(0), 2.5 * MEANS[0], rtol=0, atol=0.04)


def test_guidance_0_as_an_argument_stays_the_unconditional_model():
    pipe, seen = class_pipeline(), []
    images = pipe(
        class_labels=[0] * 1000,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(pipe.guidance_scale),
    ).images
    assert set(seen) == {0.0}
    assert images.mean().item() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda pipe, i, t, x: {"latents": x["latents"].chunk(2)[-1]}, r"shape \(2, 1, 8, 8\), not \(1, 1, 8, 8\)"),
        (lambda pipe, i, t, x: {"latents": None}, r"must return 'latents' of shape \(2, 1, 8, 8\), not NoneType"),
        (lambda pipe, i, t, x: x["latents"], "must return a dict or None, not Tensor"),
        (
            lambda pipe, i, t, x: {"x": 1},
            "may replace 'latents' alone, but returned another 'x'",
        ),
        (lambda pipe, i, t, x: setattr(pipe, "_guidance_scale", -1.0), "`guidance_scale` must be a finite number of"),
        (lambda pipe, i, t, x: setattr(pipe, "_guidance_scale", math.nan), "`guidance_scale` must be a finite number"),
        (lambda pipe, i, t, x: setattr(pipe, "_guidance_scale", 3.0), "`guidance_scale`=3.0 guides towards a class"),
        ("not a function", "`callback_on_step_end` must be callable, not 'not a function'"),
    ],
)
def test_what_a_callback_may_not_do(callback, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline()(2, 3, callback_on_step_end=callback)


def test_guidance_off_is_no_error_without_classes():
    def callback(pipe, i, t, tensors):
        pipe._guidance_scale = 0.0

    pipe = small_pipeline()
    images = [
        pipe(1, 3, generator=torch.Generator().manual_seed(0), output_type="latent", callback_on_step_end=c).images
        for c in (None, callback)
    ]
    assert torch.equal(*images)


# --- Wrapped networks ---


class Wrapper(torch.nn.Module):
    """What DistributedDataParallel and DataParallel show: the forward, and the network as `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.device = next(module.parameters()).device

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled(unet):
    return torch.compile(unet, backend="eager")


@pytest.mark.parametrize("wrap", [Wrapper, pytest.param(compiled, marks=pytest.mark.slow)])
def test_wrapped_networks_draw_the_same(wrap):
    def draw_all(pipe, inpaint):
        def generator():
            return torch.Generator().manual_seed(0)

        arguments = {"num_inference_steps": 2, "output_type": "pt", "class_labels": 1, "guidance_scale": 2.0}
        image = torch.full((1, 1, 8, 8), 0.25)
        row = [generator(), torch.Generator().manual_seed(1)]
        return [
            pipe(generator=generator(), **arguments).images,
            pipe(image=image, generator=generator(), **arguments).images,
            pipe.interpolate(row, 2, **arguments).images,
            inpaint(image, torch.eye(8), generator=generator(), **arguments).images,
        ]

    pipe = conditional_pipeline()
    pipe.unet.to(torch.bfloat16)
    inpaint = NCSNInpaintPipeline(pipe.unet, pipe.scheduler)
    inpaint.set_progress_bar_config(disable=True)
    expected = draw_all(pipe, inpaint)
    pipe.unet = inpaint.unet = wrap(pipe.unet)
    for images, other in zip(draw_all(pipe, inpaint), expected, strict=True):
        torch.testing.assert_close(images, other, rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match="from 0 to 2"):
        pipe(class_labels=3)


@pytest.mark.parametrize("scheduler_class", [AnnealedLangevinScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_callback_stops_early_with_the_denoised_estimate(scheduler_class):
    pipe = analytic_pipeline()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    seen = {}

    def callback(pipe, step, timestep, tensors):
        seen[step] = tensors["denoised"]
        pipe._interrupt = step == 3

    arguments = {"num_inference_steps": 10, "output_type": "latent", "callback_on_step_end_tensor_inputs": ["denoised"]}
    images = pipe(callback_on_step_end=callback, **arguments).images
    assert pipe.interrupt
    assert list(seen) == [0, 1, 2, 3]
    assert pipe.unet.evaluations == 4
    assert torch.equal(images, seen[3])
    pipe(num_inference_steps=10)  # and the next call runs to its end
    assert not pipe.interrupt
    assert pipe.unet.evaluations == 14


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_loop_never_waits_for_the_gpu():
    pipe = conditional_pipeline().to("cuda")

    def callback(pipe, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < 8 else "default")

    pipe(
        class_labels=[0, 1],
        guidance_scale=2.0,
        num_inference_steps=10,
        generator=torch.Generator("cuda").manual_seed(0),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "sigma", "denoised"],
    )


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
        (
            {"callback_on_step_end_tensor_inputs": ["x"]},
            r"must be among \['latents', 'sigma', 'denoised'\], not \['x'\]",
        ),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be an int from 1 to 100000, not 0"),
        ({"num_langevin_steps": 0}, r"`num_langevin_steps` must be an int from 1 to 1000000, not 0"),
        ({"sigmas": [1, 2]}, r"`sigmas` must fall from each value to the next, not \[1.0, 2.0\]"),
    ],
)
def test_bad_input_is_refused_before_the_first_evaluation(arguments, message):
    pipe = small_pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_levels_of_ones_own():
    pipe, levels, shown = small_pipeline(), [20.0, 3.3, 0.5], []
    pipe(
        sigmas=levels,
        callback_on_step_end=lambda pipe, i, t, tensors: shown.append(tensors["sigma"].item()),
        callback_on_step_end_tensor_inputs=["sigma"],
    )
    assert shown == pytest.approx(levels, rel=1e-3)
    pipe(np.int64(1), sigmas=np.array(levels), image=torch.zeros(1, 1, 8, 8), strength=0.7)
    assert len(pipe.scheduler.timesteps) == 3


def test_the_budgets_levels_given_as_sigmas_draw_the_same():
    pipe = small_pipeline()
    images = pipe(num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="latent").images
    sigmas = pipe.scheduler.sigmas[:-1]
    again = pipe(sigmas=sigmas, generator=torch.Generator().manual_seed(0), output_type="latent").images
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_a_last_level_of_0_is_the_final_denoising(as_type):
    pipe = small_pipeline()
    images = [
        pipe(sigmas=as_type(sigmas), generator=torch.Generator().manual_seed(0), output_type="latent").images
        for sigmas in ([20.0, 3.3, 0.5], [20.0, 3.3, 0.5, 0.0])
    ]
    assert torch.equal(*images)


def test_stock_schedulers_refuse_what_only_langevin_knows():
    pipe = small_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="`num_langevin_steps`=2 is for AnnealedLangevinScheduler; DDIMScheduler"):
        pipe(num_langevin_steps=2)
    with pytest.raises(ValueError, match=r"`sigmas`=\[2, 1\] is for AnnealedLangevinScheduler; DDIMScheduler"):
        pipe(sigmas=[2, 1])
    pipe.scheduler = DDIMScheduler.from_config(AnnealedLangevinScheduler(conditioning="sigma").config)
    with pytest.raises(ValueError, match="conditioned on sigma, but DDIMScheduler would give it timesteps"):
        pipe()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler does not fit"):
        pipe()
