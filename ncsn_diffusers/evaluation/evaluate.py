"""
How good a pipeline's images are, as a library call, `evaluate(EvaluateConfig(...))`, and as `ncsn-diffusers evaluate`.

Samples, features and likelihoods take long. They are computed in batches that the processes share, and each batch is
kept in the output folder: a run that was cut short goes on where it stopped, and one with more images or other metrics
computes only what is missing. The batches do not depend on the number of processes, so neither does any metric.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel

from ..data import ImageReader, encode_labels, find_class_names, find_columns, load_training_data, open_images
from ..dataset_settings import DatasetSettings
from ..images import to_model_range, to_uint8
from ..likelihood import bits_per_dim, loss_per_level
from ..pipeline_ncsn import NCSNPipeline
from ..pipeline_ncsn_posterior import NCSNPosteriorPipeline
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..settings import NOISE_SEED, SamplingConfig, describe_scheduler, make_generators
from .calibration import OPERATORS, calibrate, calibrate_exact, make_operator
from .features import InceptionFeatures, extract_features, load_digit_classifier
from .kept_batches import KeptBatches, fingerprint
from .metrics import (
    NUM_BLOCKS,
    Metric,
    class_shares,
    compare,
    mean_and_error,
    nearest_neighbours,
    require_torch_fidelity,
    to_dict,
)
from .report import make_image, make_report, plot_classes, plot_losses, plot_reliability, update_model_card

_FEATURE_BATCH = 100  # images
_NUM_LEVELS = 12  # of the loss
_NUM_SHOWN, _NUM_NEIGHBOURS = 10, 6  # in the report
_MAX_GAUSSIAN = 500  # images that the floor's Gaussian has its mean and covariance from


@dataclass
class OutputSettings:
    """Output"""

    output_dir: str = "evaluation"
    """Folder for the report, the plots and the kept batches; every process must see it."""

    overwrite_output_dir: bool = False
    """Replace samples in `output_dir` that were drawn with other settings."""

    update_model_card: bool = False
    """Write the metrics into the metadata of the README.md in the pipeline's folder."""


@dataclass
class ReferenceSettings:
    """Reference images"""

    reference_split: str = "train"
    """Split, or slice of one, that the samples are compared with: the training images."""

    held_out_split: str | None = None
    """Split whose distance from the reference is the floor; by default `num_images` of the reference, at most half."""

    max_reference_images: int | None = None
    """Use this many images of the reference, drawn at random; all by default."""


@dataclass
class MetricSettings:
    """Metrics"""

    features: Literal["digits", "inception"] = "digits"
    """Features to compare images by: a classifier of 28×28 digits, or the FID's Inception network."""

    loss_images: int = 500
    """Held-out images that the network's loss at each noise level is averaged over; 0 for none."""

    bits_per_dim: int = 0
    """Held-out images whose likelihood is estimated, with 4 evaluations and backward passes per step; 0 for none."""

    likelihood_steps: int = 25
    """Integration steps of the likelihood."""


@dataclass
class PosteriorSettings:
    """Images given a measurement"""

    posterior: tuple[Literal["missing-pixels", "pixelated", "blurred"], ...] = ()
    """Measurements of held-out images, given which images are drawn and judged; none by default."""

    posterior_images: int = 16
    """Held-out images that are measured."""

    posterior_samples: int = 8
    """Samples for each measurement."""

    posterior_noise_std: float = 0.05
    """Standard deviation of the measurements' noise, in units of the data."""

    posterior_steps: int = 25
    """Noise levels of these samples, each of which takes two network evaluations."""


# Fields come in the reverse order of the bases: `pipeline`, of SamplingConfig, is the first.
@dataclass
class EvaluateConfig(
    PosteriorSettings, MetricSettings, ReferenceSettings, DatasetSettings, OutputSettings, SamplingConfig
):
    """
    Evaluate a trained pipeline: its samples against real images, and its network on held-out ones.

    Writes metrics.json and report.md, and keeps the samples and their features, so that a run that was cut short goes
    on where it stopped. With no data set named, samples are compared with the embedded digits.
    """

    num_images: int = 5000
    """Number of samples."""

    batch_size: int = 100
    """Samples per batch on each device."""

    def __post_init__(self):
        self.check_least(max_reference_images=1, resolution=1, likelihood_steps=1)
        self.check_least(posterior_images=2, posterior_samples=2, posterior_steps=1)
        for name in self.posterior:
            if name not in OPERATORS or self.posterior.count(name) > 1:
                raise ValueError(f"`posterior` must be different ones of {', '.join(OPERATORS)}, not {self.posterior}.")
        if not 0 < self.posterior_noise_std < math.inf:
            raise ValueError(f"`posterior_noise_std` must be above 0, not {self.posterior_noise_std}.")
        for name in ("loss_images", "bits_per_dim"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ValueError(f"`{name}` must be 0 or at least 2, for a standard error, not {getattr(self, name)}.")
        if self.channels not in (None, 1, 3, 4):
            raise ValueError(f"`channels` must be 1, 3 or 4, not {self.channels}.")
        super().__post_init__()
        if self.update_model_card and not (Path(self.pipeline) / "README.md").is_file():
            raise ValueError(f"`update_model_card` needs a model card, {Path(self.pipeline) / 'README.md'}.")
        require_torch_fidelity()


# Images and features


@dataclass
class RealImages:
    """uint8 images `(n, channels, height, width)` in random order; the reference's classes `(n,)` where known."""

    reference: torch.Tensor
    held_out: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]


def load_real_images(config: EvaluateConfig, accelerator: Accelerator, shape: tuple[int, int, int]) -> RealImages:
    """
    The reference, and the held-out images.

    Raises:
        ValueError: they do not have the shape that the network draws, or cannot be read.
    """

    def load(split: str, num: int | None, seed: int):
        with accelerator.main_process_first():  # one prepares the data set's cache, the others read it
            dataset = load_training_data(config.dataset_name, config.dataset_config_name, config.train_data_dir, split)
        dataset, image_column, label_column = find_columns(dataset, config.image_column, config.label_column)
        names, num_classes = [], None
        if config.label_column is None and not isinstance(dataset.features.get(label_column), ClassLabel):
            label_column = None  # numbers under such a name may be anything
        if label_column is not None:
            with accelerator.main_process_first():
                dataset, num_classes = encode_labels(dataset, label_column)
            names = find_class_names(dataset, label_column) or [str(k) for k in range(num_classes)]
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num]
        reader = ImageReader(image_column, label_column, config.resolution, config.channels, num_classes=num_classes)
        found = open_images(dataset.select(order.tolist()), reader, accelerator.device, max_cache_gb=math.inf)
        if found.shape != shape:
            raise ValueError(
                f"{split!r} has images of shape {found.shape}, and the network draws {shape} (channels, height, "
                "width): `resolution` and `channels` make them agree."
            )
        if names and (found.labels == num_classes).any():
            accelerator.print(f"{split!r} has images without a label: no classes are counted.")
            names = []
        return found.images.cpu(), found.labels.cpu() if names else None, names

    images, labels, names = load(config.reference_split, config.max_reference_images, config.seed)
    if config.held_out_split is not None:
        # another order: two splits sorted alike would be paired in the same one, and seem nearer than they are
        held_out = load(config.held_out_split, config.num_images, config.seed + 1)[0]
        return RealImages(images, held_out, labels, names)
    num = min(config.num_images, len(images) // 2)
    return RealImages(images[num:], images[:num], None if labels is None else labels[num:], names)


@dataclass
class Features:
    """`describe` uint8 images: `"features"` of shape `(n, d)` and, by a classifier, `"labels"` of shape `(n,)`."""

    name: str
    describe: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def load_features(name: str, accelerator: Accelerator) -> Features:
    device = accelerator.device
    if name == "inception":
        with accelerator.main_process_first():  # one downloads the weights, the others read them
            extractor = InceptionFeatures(device)
        return Features(
            "2,048 of the Inception network of the FID, by torch-fidelity",
            lambda images: {"features": extract_features(images, extractor, _FEATURE_BATCH)},
        )
    classifier = load_digit_classifier().to(device)

    def describe(images):
        features = extract_features(images, lambda batch: classifier.features(batch.to(device)), _FEATURE_BATCH)
        return {"features": features, "labels": classifier.head(features.float().to(device)).argmax(1).cpu()}

    return Features("64 of the digit classifier of ncsn_diffusers", describe)


def check_numbers(config: EvaluateConfig, real: RealImages, features: Features) -> None:
    """Refuse too few images before any is drawn."""
    try:
        dim = features.describe(real.reference[:1])["features"].shape[1]
    except ValueError as error:
        raise ValueError(f"`features`={config.features!r} do not fit the images: {error}") from error
    least = max(dim + 1, 2 * NUM_BLOCKS)
    numbers = {
        "`num_images`": config.num_images,
        "`reference_split`": len(real.reference),
        "`held_out_split`" if config.held_out_split else "the held-out part of `reference_split`": len(real.held_out),
    }
    for name, number in numbers.items():
        if number < least:
            raise ValueError(
                f"{name}: {number} images are too few for {dim} features, whose covariance needs at least {least}."
            )


@contextmanager
def count_evaluations(pipe: NCSNPipeline, num: int) -> Iterator[Callable[[], torch.Tensor]]:
    """How often each of `num` images has gone through the network, for each of them."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        yield lambda: torch.full((num,), sum(rows) // num)
    finally:
        hook.remove()


def draw(pipe: NCSNPipeline, config: EvaluateConfig, indices: range) -> dict[str, torch.Tensor]:
    """uint8 samples, and how often each went through the network."""
    with count_evaluations(pipe, len(indices)) as evaluations:
        images = config.draw(pipe, indices, output_type="pt")
    return {"images": to_uint8(images).cpu(), "evaluations": evaluations()}


def measure(config: EvaluateConfig, images: torch.Tensor, operator: Callable) -> torch.Tensor:
    """Measurements `(n, ...)` of images in units of the data. The noise of image i is the same whatever n."""
    measured = operator(images)
    shape, seed = measured.shape[1:], config.seed + NOISE_SEED
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(images))]
    return measured + config.posterior_noise_std * torch.stack(noise)


def draw_posterior(
    pipe: NCSNPosteriorPipeline, config: EvaluateConfig, operator: Callable, measurements: torch.Tensor, indices: range
) -> dict[str, torch.Tensor]:
    """
    Samples in [0, 1], in float32, because a misfit sees the rounding to 8 bits, and how often each went through the
    network. Sample i is of measurement i // `posterior_samples`.
    """
    with count_evaluations(pipe, len(indices)) as evaluations:
        images = pipe(
            measurements[[i // config.posterior_samples for i in indices]],
            operator,
            config.posterior_noise_std,
            num_inference_steps=config.posterior_steps,
            num_langevin_steps=config.num_langevin_steps,
            generator=make_generators(config.seed, indices),
            output_type="pt",
        ).images
    return {"images": images.float().cpu(), "evaluations": evaluations()}


class Evaluation:
    """One run of [`evaluate`]."""

    def __init__(self, config: EvaluateConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator, pipe = config.open()
        self.folder.mkdir(parents=True, exist_ok=True)
        pipe.unet.requires_grad_(False)
        self.pipe, self.weights = pipe, fingerprint(*pipe.unet.state_dict().values())
        self.features = load_features(config.features, self.accelerator)
        self.real = load_real_images(config, self.accelerator, pipe.sample_shape)
        check_numbers(config, self.real, self.features)
        self.operators = {name: make_operator(name, pipe.sample_shape) for name in config.posterior}
        self.kept = KeptBatches(self.accelerator, self.folder)
        names = ("num_inference_steps", "sigmas", "num_langevin_steps", "class_labels", "guidance_scale", "seed")
        self.sampling = describe_scheduler(pipe.scheduler)
        self.sampling |= {name: getattr(config, name) for name in (*names, "dtype", "batch_size")}

    def run(self) -> dict[str, Any] | None:
        config, real = self.config, self.real
        samples = self.kept.compute(
            "samples",
            {"pipeline": self.weights, **self.sampling},
            config.num_images,
            config.batch_size,
            lambda indices: draw(self.pipe, config, indices),
            may_replace=config.overwrite_output_dir,
        )
        self.sampling |= {"num_images": config.num_images, "evaluations": samples["evaluations"].max().item()}
        sets = {"samples": samples["images"], "reference": real.reference, "held-out": real.held_out}
        described = {name: self.describe(name, images) for name, images in sets.items()}
        posterior, calibrated = self.evaluate_posterior()
        network, bits = self.evaluate_network()
        record = None
        if self.accelerator.is_main_process:
            images, compared = self.evaluate_images(described)
            # through JSON, so that what is returned is what the file holds
            record = json.loads(json.dumps(self.describe_run() | images | network | posterior))
            self.save(record, compared, bits, calibrated)
            self.save_samples(samples["images"], described)
            distance = record["samples"]["frechet_distance"]
            print(f"Fréchet distance {distance:.4g}; see {self.folder.resolve() / 'report.md'}.")
        self.accelerator.end_training()
        return record

    def describe(self, name: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Features`]."""
        return self.kept.compute(
            f"features-{self.config.features}-{name}",
            {"features": self.features.name, "images": fingerprint(images)},
            len(images),
            _FEATURE_BATCH,
            lambda rows: self.features.describe(images[rows.start : rows.stop]),
        )

    def evaluate_posterior(self) -> tuple[dict[str, Any], dict[str, list[Metric]]]:
        """
        Whether samples given a measurement of held-out images are spread as they should be.

        Returns:
            `tuple`: their entry of metrics.json, and for each operator a list of [`Metric`] of the samples, followed by
            one of exact samples. Both are empty where no operator is named; other processes than the main one judge
            nothing.
        """
        if not self.operators:
            return {}, {}
        config, data_min = self.config, self.pipe.config.data_min
        pipe = NCSNPosteriorPipeline(self.pipe.unet, self.pipe.scheduler, data_min=data_min)
        pipe.set_progress_bar_config(leave=False, disable=not self.accelerator.is_main_process)
        held_out = self.real.held_out[: config.posterior_images]
        images = to_model_range(held_out, data_min)
        reference = to_model_range(self.real.reference[:_MAX_GAUSSIAN], data_min)
        num, k, noise_std = len(images), config.posterior_samples, config.posterior_noise_std
        settings = {"samples": k, "noise_std": noise_std, "steps": config.posterior_steps}
        depends_on = {
            "pipeline": self.weights,
            "images": fingerprint(self.real.held_out),
            **settings,
            **describe_scheduler(pipe.scheduler),
            **{name: getattr(config, name) for name in ("num_langevin_steps", "seed", "dtype", "batch_size")},
        }
        operators, calibrated = {}, {}
        for name, operator in self.operators.items():
            y = measure(config, images, operator)
            function = partial(draw_posterior, pipe, config, operator, y)
            table = self.kept.compute(f"posterior-{name}", depends_on, num * k, config.batch_size, function)
            settings["evaluations"] = table["evaluations"].max().item()
            if self.accelerator.is_main_process:
                samples = table["images"].unflatten(0, (num, k))
                metrics, reliability = calibrate(samples, held_out / 255, y, operator, noise_std, data_min)
                floor, floor_reliability = calibrate_exact(reference, operator, noise_std, num, k, data_min)
                operators[name] = to_dict(metrics) | {"reliability": reliability}
                operators[name]["exact"] = to_dict(floor) | {"reliability": floor_reliability}
                calibrated[name], calibrated[f"{name}, exact"] = metrics, floor
        return {"posterior": {"images": num, **settings, "operators": operators}}, calibrated

    def evaluate_network(self) -> tuple[dict[str, Any], Metric | None]:
        """
        The network's loss at each noise level and the likelihood, of held-out images.

        Returns:
            `tuple`: their entries of metrics.json, and the bits per dimension where they are asked for.
        """
        config, pipe, held_out = self.config, self.pipe, self.real.held_out
        device = self.accelerator.device
        ladder = AnnealedLangevinScheduler.from_config(pipe.scheduler.config)
        sigmas = np.geomspace(ladder.config.sigma_max, ladder.config.sigma_min, _NUM_LEVELS).tolist()
        data_min = pipe.config.data_min
        unet = pipe.unet.float()  # a likelihood needs more digits than half precision has

        def batch(rows: range):
            """uint8 images, their generators, and the class that means none."""
            images = held_out[rows.start : rows.stop].to(device)
            generators = [torch.Generator().manual_seed(config.seed + i) for i in rows]
            return images, generators, pipe.embedding_indices(None, len(images), device)

        def losses(rows: range):
            images, generators, labels = batch(rows)
            noise = torch.stack([torch.randn(images.shape[1:], generator=g) for g in generators]).to(device)
            x0 = to_model_range(images, data_min)
            return {"losses": loss_per_level(unet, ladder, x0, noise, sigmas, labels).T.cpu()}

        def bits(rows: range):
            images, generators, labels = batch(rows)
            steps = {"num_steps": config.likelihood_steps, "class_labels": labels, "data_min": data_min}
            return {"bits": bits_per_dim(unet, ladder, images, generators, **steps)}

        depends_on = {
            "pipeline": self.weights,
            "ladder": dict(ladder.config),
            "images": fingerprint(held_out),
            "seed": config.seed,
            "batch_size": config.batch_size,
        }
        entries, bits_metric = {}, None
        if number := min(config.loss_images, len(held_out)):
            table = self.kept.compute("losses", {**depends_on, "sigmas": sigmas}, number, config.batch_size, losses)
            levels = [(sigma, *mean_and_error(column)) for sigma, column in zip(sigmas, table["losses"].T, strict=True)]
            keys = ("sigma", "loss", "standard_error")
            entries["loss_images"] = number
            entries["loss_per_level"] = [dict(zip(keys, level, strict=True)) for level in levels]
        if number := min(config.bits_per_dim, len(held_out)):
            depends_on |= {"likelihood_steps": config.likelihood_steps}
            values = self.kept.compute("bits-per-dim", depends_on, number, config.batch_size, bits)["bits"]
            mean, error = mean_and_error(values)
            bits_metric = Metric(
                "bits_per_dim",
                "bits per dimension",
                mean,
                "{:.3f}",
                standard_error=error,
                card_type="bits-per-dim",
                card_title="Bits per dimension",
            )
            entries["bits_per_dim"] = {"mean": mean, "standard_error": error}
            entries["bits_per_dim"] |= {"number": number, "steps": config.likelihood_steps}
        return entries, bits_metric

    def evaluate_images(self, described: dict[str, dict[str, torch.Tensor]]) -> tuple[dict[str, Any], dict[str, list]]:
        """
        The samples and the held-out images, compared with the reference.

        Returns:
            `tuple`: their entries of metrics.json, and for each of the two sets a list of [`Metric`].
        """
        real, reference = self.real, described["reference"]["features"]
        has_classifier = "labels" in described["samples"]
        entries, compared = {}, {}
        if has_classifier or real.labels is not None:
            names = [str(digit) for digit in range(10)] if has_classifier else real.class_names
            entries["classes_by"] = "the classifier" if has_classifier else "the nearest image of the reference"
            entries["class_shares"] = {}
        for name in ("samples", "held-out"):
            features, labels = described[name]["features"], described[name].get("labels")
            if labels is None and real.labels is not None:
                labels = real.labels[nearest_neighbours(features, reference)[1][:, 0]]
            if labels is not None:
                shares = class_shares(labels, len(names)).tolist()
                entries["class_shares"][name] = dict(zip(names, shares, strict=True))
            compared[name] = compare(reference, features, labels, self.config.features == "inception")
        if has_classifier and self.config.class_labels is not None:
            asked, given = self.config.class_labels, described["samples"]["labels"].tolist()
            as_asked = [label == asked[i % len(asked)] for i, label in enumerate(given)]
            entries["named_as_asked"] = sum(as_asked) / len(as_asked)
        for key, name in (("samples", "samples"), ("floor", "held-out")):
            entries[key] = to_dict(compared[name])
        return entries, compared

    def describe_run(self) -> dict[str, Any]:
        """What the metrics depend on."""
        config, real = self.config, self.real
        source = config.dataset_name or config.train_data_dir
        if source and Path(source).is_dir():
            source = Path(source).resolve().name  # a published card must not show where the data lie on this machine
        return {
            "pipeline": config.pipeline,
            "sampling": self.sampling,
            "data": {
                "id": source or "ylecun/mnist",
                "name": source or "MNIST (the embedded 10,000 digits)",
                "reference_split": config.reference_split,
                "num_reference": len(real.reference),
                "held_out_split": config.held_out_split,
                "num_held_out": len(real.held_out),
            },
            "features": self.features.name,
            "versions": {name: version(name) for name in ("ncsn_diffusers", "diffusers", "torch", "torch-fidelity")},
        }

    def save(
        self,
        record: dict[str, Any],
        compared: dict[str, list[Metric]],
        bits: Metric | None,
        calibrated: dict[str, list[Metric]],
    ) -> None:
        """metrics.json, report.md, its plots, and the model card where it is asked for."""
        if "class_shares" in record:
            plot_classes(record["class_shares"], self.folder / "classes.png")
        if "loss_per_level" in record:
            plot_losses(record["loss_per_level"], self.folder / "losses.png")
        if "posterior" in record:
            plot_reliability(record["posterior"]["operators"], self.folder / "reliability.png")
        (self.folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        report = make_report(record, compared["samples"], compared["held-out"], bits, calibrated)
        (self.folder / "report.md").write_text(report)
        if self.config.update_model_card:
            update_model_card(Path(self.config.pipeline) / "README.md", record, compared["samples"], bits, calibrated)

    def save_samples(self, samples: torch.Tensor, described: dict[str, dict[str, torch.Tensor]]) -> None:
        """The report's images: samples, and beside some of them their nearest training images."""
        real = self.real
        make_image(list(samples[:100].split(20))).save(self.folder / "samples.png")

        # held-out images of the training split may have been trained on, too
        names = ["reference"] if self.config.held_out_split else ["reference", "held-out"]
        training = torch.cat([real.reference] if self.config.held_out_split else [real.reference, real.held_out])
        among = torch.cat([described[name]["features"] for name in names])
        nearest = nearest_neighbours(described["samples"]["features"][:_NUM_SHOWN], among, _NUM_NEIGHBOURS)[1]
        rows = [
            torch.cat([image[None], training[found]])
            for image, found in zip(samples[:_NUM_SHOWN], nearest, strict=True)
        ]
        make_image(rows).save(self.folder / "neighbours.png")


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """
    Draw samples with a trained pipeline and measure how far they are from real images.

    Writes metrics.json, report.md, its plots and kept batches into `config.output_dir`, and draws only what is not
    there yet. Under `accelerate launch` the processes share the work, and each of them makes this call.

    Args:
        config ([`EvaluateConfig`]): what to evaluate, and how.

    Returns:
        `dict` or `None`: what metrics.json holds, on the main process; `None` on the others. `"samples"` and `"floor"`
        hold the distances of the samples and of held-out real images from the reference.

    Raises:
        ValueError: images, features and pipeline do not fit together, there are too few images, or `output_dir` holds
            samples that were drawn with other settings.
        OSError: weights or data cannot be read.
        FloatingPointError: a sample is not finite.
    """
    return Evaluation(config).run()
