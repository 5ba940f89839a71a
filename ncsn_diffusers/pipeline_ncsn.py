"""
Samples from a noise conditional score network: drawn from noise, of a class, from another sample, or between two.

Arguments become a denoiser (denoiser.py), and one loop serves them all: the denoiser is asked, the scheduler steps. The
calls differ in where the loop begins (noise, or noised data: SDEdit, Meng et al. 2021, arXiv:2108.01073), in the
denoiser (a class, classifier-free guidance, a product of classes), and in where the noise comes from (mixed from two
sources: interpolation, Song & Ermon 2020, arXiv:2006.09011).

Everything that goes in or comes out is in the units of the data (units.py), [0, 1] for images. Noise levels, latents
and what `denoise` and `score` take and return are in the network's units.
"""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_choice, check_count, check_number
from .denoiser import Denoiser, Guided, Product
from .foreign_configs import check_scheduler
from .inputs import ClassLabels, read_data
from .pipeline_network import NetworkPipeline
from .resampling import Particles, ResamplingReport, Weighted, make_weighted
from .scheduler_chains import Chain, check_begins_anywhere, make_chain

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

logger = logging.get_logger(__name__)


class UploadedNCSNPipeline(NetworkPipeline):
    """
    Draws samples with a noise conditional score network and any scheduler: `AnnealedLangevinScheduler`, or a stock one
    made by `from_config(pipe.scheduler.config)`. Samples are images, signals, fields or volumes.

    A class-conditional network of this package has `num_class_embeds` = number of classes + 1: the last embedding means
    "no label".

    `NCSNPipeline` adds loading and publishing to `UploadedNCSNPipeline`, which repositories on the Hub carry, so that
    their pipelines draw where the package is not installed.

    Args:
        unet ([`UNet2DModel`] or another network called like it):
            The network, conditioned on the noise level as the scheduler's config says.
        scheduler ([`SchedulerMixin`]): The sampler.
        data_mean (`float` or `list[float]`, defaults to 0.5):
            The mean of the data in their own units, of all channels or of each; see [`Units`].
        data_std (`float` or `list[float]`, defaults to 0.25):
            The standard deviation of the data. The network sees (data - data_mean)/(2 data_std); ½ and ¼ are images in
            [0, 1], of which it sees [-1, 1].
        value_range (`list` of two floats, *optional*, defaults to `(0.0, 1.0)`):
            What the data can be, to which results are clipped: (0, 1) for images. `None` for data without bounds.
        data_unit (`str`, *optional*): The name of the data's unit, such as "K".
        num_inference_steps (`int`, defaults to 50):
            The number of noise levels of a call that does not give it. A step size that was chosen for a whole ladder,
            as the papers' were, needs all of its levels.
        null_class (`int`, *optional*, defaults to -1):
            The class embedding that means "no label": -1, the last. `None` for a network that has none.
        class_shares (`list[float]`, *optional*):
            The share of each class in the training data, from which a call without `class_labels` draws its classes;
            equal shares when not given.

    Raises:
        ValueError: an argument is out of its range, or a component is no network or of the package diffusers-ncsn.
    """

    _callback_tensor_inputs = ["latents", "sigma", "denoised"]
    resampling_report: ResamplingReport | None = None  # of the last call with `resample`
    # A sample whose numbers are so large, in the network's units, is noise that the steps have left.
    largest_sample = 10.0
    # Of the running call, or of the last one
    _interrupt, _guided, _guidance_scale, _num_timesteps = False, None, 1.0, None

    @property
    def interrupt(self) -> bool:
        """Whether the running call is to stop after its present step; a callback sets `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int | None:
        """The number of steps of the running call, or of the last one; `None` before the first."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """
        The running call's guidance. A callback that sets `pipe._guidance_scale` changes it from the next step on: 1
        is the class-conditional model, without doubling the batch, and so is 0, by which diffusers' own callbacks
        turn guidance off.
        """
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step evaluates the network with and without the class."""
        return self._guidance_scale != 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_max_sigma: float | None = None,
        resample: bool | int = False,
        reward: Callable[[torch.Tensor], torch.Tensor] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[["UploadedNCSNPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw `batch_size` samples.

        Args:
            batch_size (`int`, *optional*):
                The number of samples; that of `class_labels` or `image`, or else 1, when not given.
            num_inference_steps (`int`, *optional*):
                The number of noise levels, each of which takes one network evaluation for each Langevin step; the
                pipeline's own when not given, which is 50 unless it was made with another.
            num_langevin_steps (`int`, *optional*):
                Langevin steps a level, for `AnnealedLangevinScheduler`; its config's when not given.
            sigmas (`list[float]`, *optional*):
                The noise levels themselves, falling, in the network's units, in the place of `num_inference_steps`;
                for `AnnealedLangevinScheduler`. A last level of 0, as in `scheduler.sigmas`, is the final denoising.
            class_labels (`int`, `list[int]`, `dict` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                For a class-conditional network: one class for all samples, or one for each, from 0. A dictionary of
                classes and weights is a product: `{3: 1, 8: 1, None: -1}` draws from p(x|3) p(x|8)/p(x), `{7: 2}` from
                p(x|7)², and `{None: 1}` from the network's "no label". When not given, each sample's class is drawn
                first, from `class_shares`, by its generator; with `image` the network is told no label.
            guidance_scale (`float`, defaults to 1.0):
                Classifier-free guidance, see [`Guided`]. 1 is the class-conditional model itself, without doubling.
            guidance_max_sigma (`float`, *optional*): Guide at this noise level and below only.
            resample (`bool` or `int`, defaults to `False`):
                Weight the samples along the chain and resample them, so that the shares of a product's modes, and of a
                guided class's, come out right (resampling.py). An int is the size of the groups that are resampled
                together; 64 are enough. `pipe.resampling_report` then says what was done. It is exact for consistent
                scores in low dimension; on images the network's branches hardly ever belong together, and a warning
                says when few samples are left.
            reward (function, *optional*):
                r, from data `(n, channels, ...)` in their units to `(n,)`: with `resample`, the target is
                p(x) exp(r(x)). No gradient is needed.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Data to start from, of the network's size, in the units of the data. Images are taken in the formats of
                [`VaeImageProcessor`]: floating arrays `(batch_size, height, width, channels)` and tensors `(batch_size,
                channels, height, width)` in [0, 1], or 8-bit ones. Other data are arrays or tensors `(batch_size,
                channels, ...)`. One serves the whole batch.
            strength (`float`, defaults to 0.8):
                With `image`, the share of the steps that is taken, above 0 and up to 1: the image is noised to the
                level where they begin.
            generator (`torch.Generator` or a list of them, *optional*):
                The randomness. With one generator for each sample, a sample does not depend on the batch it is
                drawn in. A CPU generator gives the same noise on every device.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, ...)`, *optional*):
                Standard normal noise to start from, or for `image` to be noised with.
            output_type (`str`, *optional*):
                `"pil"`, the default for images: images; `"pt"`: a tensor of shape `(batch_size, channels, ...)`, and
                `"np"`, the default for other data: an array of that shape, or `(batch_size, height, width, channels)`
                for images, both float32 in the units of the data; `"latent"`: a tensor in the network's units.
            return_dict (`bool`, defaults to `True`): An [`ImagePipelineOutput`], or a plain tuple.
            callback_on_step_end (`Callable`, [`PipelineCallback`] or [`MultiPipelineCallbacks`], *optional*):
                Called as `callback(pipe, step, timestep, tensors)` after each step; the "latents" that it returns, of
                the same shape, replace the sample. When it sets `pipe._interrupt = True`, the call ends after that
                step with the denoised estimate instead of the noisy sample. When it sets `pipe._guidance_scale`, the
                guidance changes from the next step on: 1, or 0 as in diffusers' own callbacks, turns it off.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `("latents",)`):
                The names of the tensors that the callback is given: "latents", the sample after the step, as the
                scheduler scales it; "denoised", the estimate that the step was computed from; "sigma", the noise level
                that it was made at, of shape `()`; all in the network's units. A [`PipelineCallback`] names its own.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the samples, as `images`.

        Raises:
            ValueError:
                An argument does not fit the network or the scheduler, or the scheduler does not fit the network;
                nothing has been computed then. Or a callback returned or set what it may not.
            FloatingPointError: the sample holds numbers that are not finite; the message names scheduler and step.
        """
        if image is not None:
            check_number("strength", strength, above=0, at_most=1)
            check_begins_anywhere(self.scheduler, "image")
            image = self._read_data("image", image)
        batch_size, class_labels = self._check_batch(batch_size, class_labels, image=image)
        self._check_call(batch_size, generator, latents, output_type)
        if class_labels is None and image is None:
            class_labels = self._draw_classes(batch_size, generator)
        denoiser = self._prepare_denoiser(class_labels, batch_size, guidance_scale, guidance_max_sigma)
        self._check_weights(denoiser, resample, reward, image)
        weighted = None if resample is False else self._weigh(denoiser, batch_size, generator, resample, reward)
        strength = 1.0 if image is None else strength
        chain = self._make_chain(denoiser, num_inference_steps, num_langevin_steps, sigmas, strength)
        samples = self._sample(
            weighted or denoiser,
            chain,
            self._prepare_latents(batch_size, chain, image, latents, generator),
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        if weighted is not None:
            samples = weighted.finish(samples)
            self._report(weighted.particles)
        return self._finish(samples, output_type, return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        generators: Sequence[torch.Generator],
        num_images: int = 8,
        num_inference_steps: int | None = None,
        num_langevin_steps: int | None = None,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_max_sigma: float | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[["UploadedNCSNPipeline", int, torch.Tensor, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """
        Draw a row of samples that leads smoothly from one to another.

        Sample i takes all its noise, that of the start and that of each step, as cos(θ_i) z + sin(θ_i) z' from the
        noises z and z' of the two ends, with θ_i evenly spaced from 0 to π/2 (Song & Ermon 2020, arXiv:2006.09011):
        it is standard normal for every θ, so each sample is a fair one. A deterministic scheduler has noise at
        the start alone, and the row is then the spherical interpolation of it.

        Args:
            generators (two `torch.Generator`):
                The randomness of the two ends: the row begins with what a call with `batch_size=1` and the same
                `class_labels` draws from the first, and ends with what it draws from the second.
            num_images (`int`, defaults to 8): The number of samples, the two ends included, at least 2.
            class_labels (`int`, `list[int]`, `dict` or `torch.Tensor`, *optional*):
                As in [`__call__`], but a class-conditional network is told no label when they are not given.
            num_inference_steps, num_langevin_steps, guidance_scale, guidance_max_sigma, output_type, return_dict,
            callback_on_step_end, callback_on_step_end_tensor_inputs:
                As in [`__call__`].

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the samples, in order.

        Raises:
            ValueError: as [`__call__`], or the scheduler draws noise in its steps and does not let it be given
                (`variance_noise`); nothing has been computed then.
            FloatingPointError: as [`__call__`].
        """
        given = list(generators) if isinstance(generators, Sequence) else [generators]
        if len({id(g) for g in given if isinstance(g, torch.Generator)}) != 2 or len(given) != 2:
            raise ValueError(
                f"`generators` must be two different `torch.Generator`s, one for each end, not {generators!r}."
            )
        check_count("num_images", num_images, at_least=2)
        _, class_labels = self._check_batch(num_images, class_labels, name="num_images")
        self._check_call(num_images, None, None, output_type)
        denoiser = self._prepare_denoiser(class_labels, num_images, guidance_scale, guidance_max_sigma)
        chain = self._make_chain(denoiser, num_inference_steps, num_langevin_steps)
        draws_noise = chain.draws_noise()

        device = self._execution_device
        angles = torch.linspace(0, math.pi / 2, num_images, dtype=torch.float64)
        angles = angles.reshape(-1, *[1] * len(self.sample_shape))
        cos, sin = angles.cos().to(device, torch.float32), angles.sin().to(device, torch.float32)

        def mixed_noise():
            first, second = (
                randn_tensor((1, *self.sample_shape), generator=g, device=device, dtype=torch.float32)
                for g in generators
            )
            return cos * first + sin * second

        samples = self._sample(
            denoiser,
            chain,
            chain.start(mixed_noise(), self._middle),
            None,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            variance_noise=(lambda i: mixed_noise() if draws_noise[i] else None) if any(draws_noise) else None,
        )
        return self._finish(samples, output_type, return_dict)

    # Before the loop

    def _prepare_denoiser(self, class_labels, batch_size, guidance_scale, guidance_max_sigma) -> Callable:
        """[`make_denoiser`] for the running call, whose callbacks may change the guidance."""
        denoiser = self.make_denoiser(class_labels, guidance_scale, guidance_max_sigma, batch_size)
        self._guided = denoiser if isinstance(denoiser, Guided) else None
        self._guidance_scale = float(guidance_scale)
        return denoiser

    def _weigh(self, denoiser, batch_size, generator, resample, reward) -> Weighted:
        """The denoiser of a call that resamples."""

        def reward_of(denoised: torch.Tensor) -> torch.Tensor:
            value = reward(self.units.to_data(denoised, clip=False))
            if not isinstance(value, torch.Tensor) or value.shape != (batch_size,):
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"`reward` must return a tensor of shape ({batch_size},), not {found}.")
            return value.to(denoised)

        reward_of = None if reward is None else reward_of
        return make_weighted(
            denoiser, batch_size, self._execution_device, self.scheduler, generator, resample, reward_of
        )

    def _report(self, particles: Particles) -> None:
        self.resampling_report = report = particles.report()
        if report.num_ancestors < report.num_samples / 2:
            logger.warning(
                f"`resample` has left {report.num_ancestors} distinct ancestors of {report.num_samples} samples; log "
                f"weights spread by up to {report.spread:.2g}. The network's scores hardly belong together, or the "
                "target is far from the chain's: take more samples, or do without."
            )

    def _draw_classes(self, batch_size: int, generator) -> torch.Tensor | None:
        """A class for each sample: p(x) = Σ p(c) p(x|c), whatever the network makes of "no label"."""
        if self.num_classes is None or self._parts is not None:
            return None
        shares = torch.tensor(self.config.class_shares or [1.0] * self.num_classes, dtype=torch.float32)
        generators = generator if isinstance(generator, list) else [generator]
        counts = [1] * batch_size if isinstance(generator, list) else [batch_size]
        labels = []
        for one, count in zip(generators, counts, strict=True):
            here = shares if one is None else shares.to(one.device)
            labels.append(torch.multinomial(here, count, replacement=True, generator=one).to(self._execution_device))
        return torch.cat(labels)

    def _make_chain(
        self,
        denoiser: Callable,
        num_inference_steps: int | None,
        num_langevin_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float = 1.0,
    ) -> Chain:
        """The chain that a call with these arguments steps through."""
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        settings = {"num_inference_steps": num_inference_steps} if sigmas is None else {"sigmas": sigmas}
        if num_langevin_steps is not None:
            settings["num_langevin_steps"] = num_langevin_steps
        total = denoiser.total if isinstance(denoiser, Product) else 1.0
        network = Denoiser.of(self.unet, self.scheduler)
        return make_chain(self.scheduler, network, self._execution_device, settings, total, strength)

    def _prepare_latents(self, batch_size, chain, image, latents, generator) -> torch.Tensor:
        """The sample that `chain` begins with: noise, or the noised `image`."""
        shape, device = (batch_size, *self.sample_shape), self._execution_device
        # It stays in float32, whatever the network's dtype: at sigma = 50 half precision loses the image.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        if image is None:
            return chain.start(latents, self._middle)
        return chain.start_from(image.to(device).expand(shape), latents)

    # The loop and what surrounds it

    def _sample(
        self,
        denoiser: Callable[[torch.Tensor, float], torch.Tensor],
        chain: Chain,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback: Callable | None = None,
        callback_tensors: Sequence[str] | None = ("latents",),
        variance_noise: Callable[[int], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """
        The loop: the sample after the last step, or the denoised estimate where it was interrupted.

        A denoiser with a method `settle(x, sigma)` may exchange the sample before each step. `variance_noise(i)` is the
        noise of step i.
        """
        names = self._check_callback(callback, callback_tensors)
        settles = hasattr(denoiser, "settle")
        level_tensors = torch.tensor(chain.sigmas, device=sample.device, dtype=sample.dtype)
        totals = torch.zeros_like(level_tensors)  # not finite from where the sample is not

        self._interrupt, self._num_timesteps = False, len(chain.timesteps)
        for i, t in enumerate(self.progress_bar(chain.timesteps)):
            if settles:
                sample = chain.settle(denoiser, sample, i)
            x = chain.to_x(sample, i)
            denoised = denoiser(x, chain.sigmas[i])
            noise = None if variance_noise is None else variance_noise(i)
            sample = chain.step(denoised, x, i, sample, generator, noise)
            if callback is not None:
                tensors = {"latents": sample, "sigma": level_tensors[i], "denoised": denoised}
                sample = self._call_back(callback, i, t, {name: tensors[name] for name in names}, sample)
            totals[i] = sample.sum()
            if self._interrupt:
                sample = denoised
                break
        self._check_sample(sample, totals[: i + 1], chain.sigmas)
        return sample

    def _call_back(self, callback, i, t, tensors, sample) -> torch.Tensor:
        """The sample after the callback, which may have changed it and the guidance."""
        guidance_scale, given = self._guidance_scale, dict(tensors)
        returned = callback(self, i, t, tensors)
        if self._guidance_scale != guidance_scale:
            self._guidance_scale = self._guidance_scale or 1.0  # 0 is how diffusers' own callbacks turn guidance off
            check_number("guidance_scale", self._guidance_scale, at_least=0, below=math.inf)
            if self._guided is None and self._guidance_scale != 1:
                raise ValueError(
                    f"`guidance_scale`={self._guidance_scale} guides towards a class: the call needs `class_labels`."
                )
            if self._guided is not None:
                self._guided.scale = float(self._guidance_scale)
        if returned is None:
            return sample
        if not isinstance(returned, dict):
            raise ValueError(f"`callback_on_step_end` must return a dict or None, not {type(returned).__name__}.")
        for name, value in returned.items():
            if name != "latents" and value is not given.get(name):
                raise ValueError(f"`callback_on_step_end` may replace 'latents' alone, but returned another {name!r}.")
        replaced = returned.get("latents", sample)
        if not isinstance(replaced, torch.Tensor) or replaced.shape != sample.shape:
            found = tuple(replaced.shape) if isinstance(replaced, torch.Tensor) else type(replaced).__name__
            raise ValueError(
                f"`callback_on_step_end` must return 'latents' of shape {tuple(sample.shape)}, not {found}: the batch "
                "is not doubled for guidance here, and there is nothing to halve."
            )
        return replaced.to(sample)

    def _check_sample(self, sample: torch.Tensor, totals: torch.Tensor, sigmas: list[float]) -> None:
        """The one look at the numbers, after the loop: inside it, it would keep the device waiting."""
        name = type(self.scheduler).__name__
        largest = sample.abs().max().item()  # NaN where anything is
        if not math.isfinite(largest):
            bad = (~totals.isfinite()).nonzero().flatten().tolist()
            step = bad[0] if bad else len(totals) - 1
            raise FloatingPointError(
                f"The sample of {name} is not finite after step {step} of {self.num_timesteps} (from 0 on), at sigma="
                f"{sigmas[step]:.3g}. Take more steps or another scheduler; where all of them do so, the "
                f"network's output overflows in {str(self._network.dtype).removeprefix('torch.')}, or its weights are "
                "not finite."
            )
        if largest > self.largest_sample * (1 + sigmas[len(totals) - 1]):
            logger.warning(
                f"The sample of {name} reaches {largest:.3g} in the network's units, where data are around -1 to 1: "
                f"{self.num_timesteps} steps have left noise in it. Take more, or another scheduler."
            )

    def _finish(self, samples: torch.Tensor, output_type: str | None, return_dict: bool) -> ImagePipelineOutput | tuple:
        """The samples as the user asked for them."""
        self.maybe_free_model_hooks()
        output_type = output_type or ("pil" if self.draws_images else "np")
        if output_type != "latent":
            samples = self.units.to_data(samples)
            if self.draws_images:
                samples = self.image_processor.postprocess(samples, output_type, [False] * len(samples))
            elif output_type == "np":
                samples = samples.numpy(force=True)
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)

    @property
    def _center(self) -> torch.Tensor:
        """What the data lie around, in the network's units: 0, or the mean map of a [`GaussianResidualModel`]."""
        mean = getattr(self._network, "mean", None)
        is_map = isinstance(mean, torch.Tensor) and tuple(mean.shape) == self.sample_shape
        return mean.float() if is_map else torch.zeros((), device=self._execution_device, dtype=torch.float32)

    @property
    def _middle(self) -> torch.Tensor:
        """The middle of what data can be, in the network's units; what they lie around where there are no bounds."""
        if self.units.value_range is None:
            return self._center
        middle = torch.tensor(sum(self.units.value_range) / 2, device=self._execution_device, dtype=torch.float32)
        return self.units.to_network(middle.expand(1, *self.sample_shape))

    # What is given, in the network's units and checked: a ValueError for what cannot work

    def _read_data(self, name: str, data, missing: bool = False) -> torch.Tensor:
        """See [`read_data`]."""
        processor = self.image_processor if self.draws_images else None
        return read_data(name, data, self.sample_shape, self.units, processor, missing, self._center.cpu())

    def _check_call(self, batch_size, generator, latents, output_type) -> None:
        """What every call shares."""
        shape = (batch_size, *self.sample_shape)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but batch_size={batch_size}: give one generator for each "
                "sample, or a single one."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, not {tuple(latents.shape)}.")
        if output_type is not None:
            check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "pil" and not self.draws_images:
            raise ValueError(
                "`output_type`='pil' is for images in [0, 1] of 1, 3 or 4 channels, and this network draws "
                f"{' × '.join(map(str, self.sample_shape))}; 'np', 'pt' and 'latent' take any data."
            )
        check_scheduler(self.scheduler)

    def _check_weights(self, denoiser, resample, reward, image) -> None:
        if resample is not False:
            if image is not None:
                raise ValueError("`resample` weights chains from noise; a chain from an `image` has another target.")
            return
        if reward is not None:
            raise ValueError("`reward` acts by resampling alone: give `resample=True`, or the size of its groups.")
        if isinstance(denoiser, Product) and any(
            share < 0 and part.labels is not None and part.labels[0] != self.num_classes
            for part, share in zip(denoiser.denoisers, denoiser.shares, strict=True)
        ):
            logger.warning(
                "A class with a negative weight, without `resample`: the shares of the modes come out wrong, by up "
                "to 0.48 in an example of two dimensions that is exact otherwise."
            )

    def _check_callback(self, callback: Callable | None, names: Sequence[str] | None) -> Sequence[str]:
        """The tensors that a callback is given; diffusers' callback classes name them themselves."""
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        names = ("latents",) if names is None else names
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` must be callable, not {callback!r}.")
        unknown = set(names) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, not "
                f"{sorted(unknown)}. (To change the guidance, a callback sets `pipe._guidance_scale`, and needs none.)"
            )
        return names
