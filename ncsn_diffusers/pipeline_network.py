"""
What a pipeline knows of its network: the shape, units and classes of what it draws, and its denoiser for any class,
guidance or product of classes (denoiser.py).

`denoise` and `score` hand the network to other code. What they take and return, and noise levels, are in the network's
units (units.py).
"""

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import MAX_LEVELS, check_count, check_number
from .denoiser import Denoiser, Guided, Product, per_sample, unwrap
from .inputs import ClassLabels, read_labels, read_shares
from .units import Units

# Raise it with each change after which older versions of this file would draw other samples from a saved pipeline.
SAVED_FORMAT = 2

_PUBLISHING = (
    "This pipeline's code comes from a repository, and cannot publish it. Install the package, `pip install "
    "ncsn_diffusers`, load the pipeline by its class, `from ncsn_diffusers import NCSNPipeline` and "
    "`NCSNPipeline.from_pretrained(...)`, and call `push_to_hub` of that."
)


class NetworkPipeline(DiffusionPipeline):
    """A network, a scheduler, and what they mean; see [`NCSNPipeline`], which draws with them."""

    model_cpu_offload_seq = "unet"
    _parts = None  # of a product of several networks

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        data_mean: float | Sequence[float] = 0.5,
        data_std: float | Sequence[float] = 0.25,
        value_range: Sequence[float] | None = (0.0, 1.0),
        data_unit: str | None = None,
        num_inference_steps: int = 50,
        null_class: int | None = -1,
        class_shares: Sequence[float] | None = None,
    ):
        super().__init__()
        check_count("num_inference_steps", num_inference_steps, at_most=MAX_LEVELS)
        for component in (unet, scheduler):
            check_not_of_diffusers_ncsn(type(component).__name__, "This pipeline")
        if null_class not in (None, -1):
            raise ValueError(f"`null_class` must be -1, the last class embedding, or None, not {null_class!r}.")
        self.units = Units(data_mean, data_std, value_range, data_unit)
        self.register_modules(unet=_without_wrapper(unet), scheduler=scheduler)
        self.units.check_channels(self.sample_shape[0])
        self.register_to_config(
            data_mean=self.units.data_mean,
            data_std=self.units.data_std,
            value_range=None if value_range is None else list(self.units.value_range),
            data_unit=data_unit,
            num_inference_steps=int(num_inference_steps),
            null_class=null_class,
            class_shares=read_shares(class_shares, self._network.config.get("num_class_embeds"), null_class),
            _saved_format=SAVED_FORMAT,
        )
        # The image is the latent: nothing is scaled down, and no number of channels marks a VAE's latents.
        channels = self.sample_shape[0]
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=1,
            vae_latent_channels=0,
            do_resize=False,
            do_normalize=False,
            do_convert_grayscale=channels == 1,
            do_convert_rgb=channels == 3,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As [`~DiffusionPipeline.save_pretrained`].

        Raises:
            ImportError: `push_to_hub=True`; see [`push_to_hub`]. Nothing has been written then.
        """
        if push_to_hub:
            raise ImportError(_PUBLISHING)
        self._check_one_network()
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size, **kwargs)

    def _check_one_network(self) -> None:
        if self._parts is not None:
            raise ValueError("A product of several networks does not save: save each of its pipelines.")

    def push_to_hub(self, *args, **kwargs):
        """
        The package's own `NCSNPipeline` uploads, because this file's code and its card have to go with it.

        Raises:
            ImportError: always, with what to install.
        """
        raise ImportError(_PUBLISHING)

    @property
    def components(self) -> dict:
        """
        As [`~DiffusionPipeline.components`], for `NCSNInpaintPipeline(**pipe.components)` and the like. Settings that
        are not the defaults, such as the units of the data, are among them.
        """
        components = super().components
        for name, parameter in inspect.signature(NetworkPipeline.__init__).parameters.items():
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            if name not in components and name in self.config and self.config[name] != default:
                components[name] = self.config[name]
        return components

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """`(channels, *sizes)` of what the network draws: `(channels, height, width)` of images."""
        config = self._network.config
        size = config.sample_size
        return (config.in_channels, size, size) if isinstance(size, int) else (config.in_channels, *size)

    @property
    def draws_images(self) -> bool:
        """Whether samples are images in [0, 1] of 1, 3 or 4 channels, which "pil" can show."""
        shape = self.sample_shape
        return self.units.is_image and len(shape) == 3 and shape[0] in (1, 3, 4)

    @property
    def num_classes(self) -> int | None:
        """The number of classes that the network can be asked for; `None` for a network without a class embedding."""
        num_embeddings = self._network.config.get("num_class_embeds")
        return None if num_embeddings is None else num_embeddings - (self.config.null_class is not None)

    @classmethod
    def product(cls, *parts: tuple) -> "NetworkPipeline":
        """
        A pipeline that draws from ∏ p_i(x)^w_i of several networks: `NCSNPipeline.product((digits, 1), (letters, 1))`.

        Args:
            parts (tuples): Each a pipeline and its weight, or a pipeline, `class_labels` as of [`make_denoiser`], and
                the weight. All draw samples of one shape in one unit. The scheduler, and what a call gives by default,
                are those of the first.

        Returns:
            `NCSNPipeline`: It is called as any other, without `class_labels`; it is not saved.

        Raises:
            ValueError: the shapes or units differ, or the weights do not sum to more than 0.
        """
        parts = [part if len(part) == 3 else (part[0], None, part[1]) for part in parts]
        first = parts[0][0]
        for pipe, _, _ in parts:
            if pipe.sample_shape != first.sample_shape or pipe.units != first.units:
                raise ValueError(
                    f"The networks of a product draw samples of one shape in one unit, not samples of "
                    f"{first.sample_shape} in {first.units} and samples of {pipe.sample_shape} in {pipe.units}."
                )
        whole = cls(**first.components)
        whole._parts = parts
        whole.make_denoiser()
        return whole

    # The network as a part for others: gradients flow through these

    def make_denoiser(
        self,
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_max_sigma: float | None = None,
        batch_size: int = 1,
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """
        The denoiser that a call with these arguments samples from, in the network's units: `denoiser(x, sigma)`.

        Args:
            class_labels (`int`, `list[int]`, `dict` or `torch.Tensor`, *optional*):
                As in [`__call__`], but a class-conditional network is told no label when they are not given.
            guidance_scale, guidance_max_sigma: As in [`__call__`].
            batch_size (`int`, defaults to 1): The number of samples that the denoiser is to be given.

        Returns:
            [`Denoiser`], [`Guided`] or [`Product`].

        Raises:
            ValueError: the labels do not fit the network, or a number is out of its range.
        """
        self._check_guidance(class_labels, guidance_scale, guidance_max_sigma)
        if self._parts is not None:
            return Product([(p.make_denoiser(c, batch_size=batch_size), weight) for p, c, weight in self._parts])
        batch_size, class_labels = self._check_batch(batch_size, class_labels)
        network = Denoiser.of(self.unet, self.scheduler)

        def told(label: int | torch.Tensor | None) -> Denoiser:
            """The network, told a class or each sample's class."""
            if self.num_classes is None:
                return network
            label = self.num_classes if label is None else label
            return network.given(torch.as_tensor(label, device=self._execution_device).expand(batch_size))

        if isinstance(class_labels, dict):
            parts = [(told(label), weight) for label, weight in class_labels.items()]
            return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else Product(parts)
        if class_labels is None or self.config.null_class is None:
            return told(class_labels)
        return Guided(told(class_labels), told(None), float(guidance_scale), guidance_max_sigma or math.inf)

    def denoise(
        self, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: ClassLabels | None = None
    ) -> torch.Tensor:
        """
        The denoised estimate D(x, sigma) = E[x0 | x0 + sigma z = x], from one network evaluation. Below the smallest
        trained level, which is the least that the network knows of, the score is taken to be what it is there.

        Args:
            x (`torch.Tensor` of shape `(batch_size, in_channels, ...)`): In the network's units.
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                The noise level of all samples or of each, in the network's units, from 0 to the largest trained level.
            class_labels (`int`, `list[int]`, `dict` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As in [`make_denoiser`].

        Returns:
            `torch.Tensor` of the shape of `x`, in float32, in the network's units.

        Raises:
            ValueError: a shape does not fit the network, or a level lies outside the trained range.
        """
        if tuple(x.shape[1:]) != self.sample_shape:
            expected = ("batch_size", *self.sample_shape)
            raise ValueError(f"`x` must have the shape ({', '.join(map(str, expected))}), not {tuple(x.shape)}.")
        levels = torch.as_tensor(sigma).detach().to("cpu", torch.float64)
        if levels.ndim > 1 or (levels.ndim == 1 and len(levels) not in (1, len(x))):
            raise ValueError(
                f"`sigma` must be a number or one for each of the {len(x)} samples, not of shape {tuple(levels.shape)}."
            )
        denoiser = self.make_denoiser(class_labels, batch_size=len(x))
        largest = Denoiser.of(self.unet, self.scheduler).ladder.largest
        if not ((levels >= 0) & (levels <= 1.001 * largest)).all():
            raise ValueError(
                f"`sigma` must be from 0 to {largest:g}, the largest level that the network was trained on, not "
                f"{levels.tolist()}."
            )
        if levels.ndim == 0 or len(levels) == 1:
            return denoiser(x.float(), levels.item())
        return denoiser(x.float(), levels.float().to(x.device))

    def score(
        self, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: ClassLabels | None = None
    ) -> torch.Tensor:
        """
        The score, the gradient of log p_sigma(x) with respect to x: (D(x, sigma) - x)/sigma² (Tweedie's formula).

        Args:
            x, class_labels: As in [`denoise`].
            sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
                The noise level of all samples or of each, in the network's units, within the trained range.

        Returns:
            `torch.Tensor` of the shape of `x`, in float32, in 1/(the network's units).

        Raises:
            ValueError: as [`denoise`], or a level lies below the trained range.
        """
        smallest = Denoiser.of(self.unet, self.scheduler).ladder.smallest
        sigma = torch.as_tensor(sigma, dtype=torch.float32)
        if not (sigma >= 0.999 * smallest).all():
            raise ValueError(
                f"`sigma` must be at least {smallest:g}, the smallest level that the network was trained on, not "
                f"{sigma.tolist()}."
            )
        # x as the network sees it: what is rounded off would count as noise
        difference = self.denoise(x, sigma, class_labels) - x.float()
        return difference / per_sample(sigma.to(x.device), x) ** 2

    # Checks that calls share

    def _check_guidance(self, class_labels, guidance_scale: float, guidance_max_sigma: float | None) -> None:
        """Whether the network can be guided so, and knows what it is to be told."""
        check_number("guidance_scale", guidance_scale, at_least=0, below=math.inf)
        if guidance_max_sigma is not None:
            check_number("guidance_max_sigma", guidance_max_sigma, above=0)
        guides = guidance_scale != 1
        if self._parts is not None:
            if class_labels is not None or guides:
                raise ValueError(
                    "A product of several networks takes its classes and weights in `NCSNPipeline.product`."
                )
        elif guides and isinstance(class_labels, Mapping):
            raise ValueError(
                f"`guidance_scale`={guidance_scale} is itself a product of classes, {{c: w, None: 1 - w}}: give "
                "`class_labels` all weights and leave it out."
            )
        elif guides and class_labels is None:
            raise ValueError(f"`guidance_scale`={guidance_scale} guides towards a class: it needs `class_labels`.")
        elif guides and self.config.null_class is None:
            raise ValueError(
                f"`guidance_scale`={guidance_scale} guides away from 'no label', which this network does not know."
            )
        elif class_labels is None and self.config.null_class is None and self.num_classes is not None:
            raise ValueError(
                f"`class_labels` are needed: this network knows {self.num_classes} classes and has no embedding for "
                "'no label'."
            )

    def _check_batch(
        self, batch_size: int | None, class_labels, name: str = "batch_size", **data: torch.Tensor | None
    ) -> tuple[int, torch.Tensor | dict | None]:
        """The number of samples, which the user knows as `name`, and the labels, of shape `()` or `(batch_size,)`."""
        counts = {}
        if class_labels is not None:
            class_labels = read_labels(class_labels, self.num_classes, self.config.null_class is not None)
            if isinstance(class_labels, torch.Tensor) and class_labels.ndim:
                counts["class_labels"] = len(class_labels)
        counts |= {key: len(given) for key, given in data.items() if given is not None and len(given) > 1}
        if batch_size is None:
            batch_size = max(counts.values(), default=1)
        check_count(name, batch_size)
        for key, count in counts.items():
            if count != batch_size:
                raise ValueError(
                    f"`{key}` has {count} entries, but {name}={batch_size}: give one for each sample, or a "
                    "single one for all."
                )
        return batch_size, class_labels

    @property
    def _network(self) -> torch.nn.Module:
        """The network out of the wrappers of torch.compile and DistributedDataParallel, with its config and dtype."""
        return unwrap(self.unet)


def _without_wrapper(unet: torch.nn.Module) -> torch.nn.Module:
    """The network itself, or compiled, from DistributedDataParallel and the like, which hide its config."""
    network = unet
    while not hasattr(network, "config") and isinstance(network, torch.nn.Module):
        network = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"`unet` must be a UNet2DModel, alone or wrapped, not {type(unet).__name__}.")
    return network


def check_not_of_diffusers_ncsn(class_name: str, name: str) -> None:
    """
    Raises:
        ValueError: `class_name` is that of a component of the package diffusers-ncsn.
    """
    if class_name in ("UNet2DModelForNCSN", "AnnealedLangevinDynamicsScheduler"):
        raise ValueError(
            f"{name!r} is of the package diffusers-ncsn, whose pipeline has the same name, NCSNPipeline: its "
            f"{class_name} is another network or sampler and does not fit this package. Use it with that package: "
            "`pip install diffusers-ncsn`, then `from ncsn import NCSNPipeline`."
        )
