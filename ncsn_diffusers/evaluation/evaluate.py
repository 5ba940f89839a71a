"""
How good a pipeline's images are, as a library call, `evaluate(EvaluateConfig(...))`, and as `ncsn-diffusers evaluate`.

Samples, features and likelihoods take long. They are computed in batches that the processes share, and each batch is
kept in the output folder: a run that was cut short goes on where it stopped, and one with more images or other metrics
computes only what is missing. The batches do not depend on the number of processes, so neither does any metric.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel

from ..data import ImageReader, encode_labels, find_class_names, find_columns, load_training_data, open_images
from ..images import to_uint8
from ..kept_batches import fingerprint
from ..likelihood import bits_per_dim
from ..pretrained import pretrained
from ..sampling import NOISE_SEED, Sampler, make_generators
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from .branches import log_class_ratio
from .calibration import calibrate, calibrate_exact, make_operator
from .config import EvaluateConfig, FeaturesName, without_parents
from .features import (
    CLASSIFIERS,
    InceptionFeatures,
    RandomFeatures,
    extract_features,
    find_classifier,
    load_digit_classifier,
    share_found,
)
from .field_evaluation import FieldEvaluation
from .metrics import (
    NUM_BLOCKS,
    Metric,
    class_shares,
    compare,
    mean_and_error,
    nearest_neighbors,
    require_torch_fidelity,
)
from .record import (
    BranchRecord,
    ClassRecord,
    DataRecord,
    EvaluationRecord,
    LikelihoodRecord,
    PosteriorRecord,
)
from .report import (
    make_image,
    make_report,
    make_verdict,
    plot_classes,
    update_model_card,
)
from .run import RealSource, Run, count_evaluations, find_source, measure, sample_posterior

_FEATURE_BATCH = 100  # images
_BRANCH_LEVELS = 40  # of the integral over noise levels
_NUM_SHOWN, _NUM_NEIGHBOURS = 10, 6  # in the report
_MAX_GAUSSIAN = 500  # images that the floor's Gaussian has its mean and covariance from
_NOISE_STD = 0.025  # of measurements of images in [0, 1]
_DIGITS = (1, 28, 28)


# Images and features


@dataclass
class RealImages:
    """uint8 images `(n, channels, height, width)` in random order; the reference's classes `(n,)` where known."""

    reference: torch.Tensor
    held_out: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]


def find_real_source(config: EvaluateConfig, pipeline: str, shape: tuple[int, int, int]) -> RealSource:
    """
    As [`find_source`], or else the embedded digits.

    Raises:
        ValueError: there is none that fits images of this shape, or the recorded folder is not there.
    """
    found = find_source(config, pipeline)
    if found.name is None and not found.is_recorded and shape != _DIGITS and config.resolution is None:
        channels, height, width = shape
        raise ValueError(
            f"The pipeline draws images of {height}×{width} pixels and {channels} channels, and its folder does not "
            "record what it was trained on: name images like these with `train_data_dir` or `dataset_name`. Features "
            f"that fit: {', '.join(fitting_features(shape))}."
        )
    return found


def fitting_features(shape: tuple[int, int, int]) -> list[str]:
    """The names of the features that take images of this shape."""
    names = list(CLASSIFIERS) if shape == _DIGITS else []
    return [*names, "random", *(["inception"] if shape[0] in (1, 3) else [])]


def load_real_images(
    config: EvaluateConfig,
    source: RealSource,
    accelerator: Accelerator,
    shape: tuple[int, int, int],
    num_classes: int | None,
) -> RealImages:
    """
    The reference, with its labels, and the held-out images. A class of the network may be without an image.

    Raises:
        ValueError: they do not have the shape that the network draws, or cannot be read.
    """
    settings = source.settings

    def load(split: str, num: int | None, seed: int, is_labeled: bool = True):
        with accelerator.main_process_first():  # one prepares the data set's cache, the others read it
            dataset = load_training_data(
                settings.dataset_name, settings.dataset_config_name, settings.train_data_dir, split
            )
        dataset, image_column, label_column = find_columns(dataset, settings.image_column, settings.label_column)
        names, num_labels = [], None
        if settings.label_column is None and not isinstance(dataset.features.get(label_column), ClassLabel):
            label_column = None  # numbers under such a name may be anything
        if not is_labeled:
            label_column = None
        if label_column is not None:
            with accelerator.main_process_first():
                dataset, num_labels = encode_labels(dataset, label_column, num_classes=num_classes)
            names = find_class_names(dataset, label_column) or [str(k) for k in range(num_labels)]
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num]
        reader = ImageReader(image_column, label_column, settings.resolution, settings.channels, num_classes=num_labels)
        found = open_images(dataset.select(order.tolist()), reader, accelerator.device, max_cache_gb=math.inf)
        if found.shape != shape:
            raise ValueError(
                f"{split!r} has images of shape {found.shape}, and the network draws {shape} (channels, height, "
                "width): `resolution` and `channels` make them agree."
            )
        if names and (found.labels == num_labels).any():
            accelerator.print(f"{split!r} has images without a label: no classes are counted.")
            names = []
        return found.images.cpu(), found.labels.cpu() if names else None, names

    images, labels, names = load(source.reference_split, config.max_reference_images, config.seed)
    if source.held_out_split is not None:
        # another order: two splits sorted alike would be paired in the same one, and seem nearer than they are
        held_out = load(source.held_out_split, config.num_images, config.seed + 1, is_labeled=False)[0]
        return RealImages(images, held_out, labels, names)
    num = min(config.num_images, len(images) // 2)
    return RealImages(images[num:], images[:num], None if labels is None else labels[num:], names)


@dataclass
class Features:
    """
    `describe` uint8 images: `"features"` of shape `(n, d)` and, by a classifier, `"labels"` of shape `(n,)`. Those that
    are not `scaled` yet are brought to mean 0 and mean variance 1 over the reference.
    """

    key: str
    name: str
    describe: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    scaled: bool = True


def load_features(name: str | None, accelerator: Accelerator, real: RealImages, is_embedded: bool) -> Features:
    """
    The features of that name, or of the classifier in that file. By default those of a shipped classifier where it
    knows the images: the embedded digits, or gray ones of 28×28 pixels whose labels it finds.

    Raises:
        ValueError: these features are not for such images, or the file holds no such classifier.
    """
    shape, device = tuple(real.reference.shape[1:]), accelerator.device
    fitting = fitting_features(shape)
    if name is not None and name not in fitting and (name in get_args(FeaturesName) or shape != _DIGITS):
        raise ValueError(
            f"`features`={name!r} do not fit images of shape {shape} (channels, height, width), but "
            f"{', '.join(fitting)} do."
        )
    if name is None and is_embedded:
        name = "digits"
    elif name is None:
        is_known = shape == _DIGITS and real.labels is not None
        name = (find_classifier(real.reference, real.labels) if is_known else None) or "random"
    if name == "random":
        network = RandomFeatures(shape[0], min(shape[1:])).to(device)
        return Features(
            name,
            "128 of random convolutions, of mean variance 1 over the reference",
            lambda images: {"features": extract_features(images, lambda x: network(x.to(device)), _FEATURE_BATCH)},
            scaled=False,
        )
    if name == "inception":
        with accelerator.main_process_first():  # one downloads the weights, the others read them
            extractor = InceptionFeatures(device)
        return Features(
            name,
            "2,048 of the Inception network of the FID, by torch-fidelity",
            lambda images: {"features": extract_features(images, extractor, _FEATURE_BATCH)},
        )
    classifier = load_digit_classifier(CLASSIFIERS.get(name, name))
    if real.labels is not None and (found := share_found(classifier, real.reference, real.labels)) < 0.5:
        raise ValueError(
            f"`features`={name!r} name only {found:.0%} of the reference's images as their labels do, so this "
            "classifier is not for such images; `random` features are."
        )
    classifier.to(device)

    def describe(images):
        features = extract_features(images, lambda batch: classifier.features(batch.to(device)), _FEATURE_BATCH)
        return {"features": features, "labels": classifier.head(features.float().to(device)).argmax(1).cpu()}

    if name in CLASSIFIERS:
        return Features(name, f"64 of the classifier of {name} of ncsn_diffusers", describe)
    key = f"classifier-{fingerprint(*classifier.state_dict().values())[:12]}"
    return Features(key, f"64 of the classifier {Path(name).name}", describe)


def check_numbers(config: EvaluateConfig, source: RealSource, real: RealImages, features: Features) -> None:
    """Refuse too few images before any is drawn."""
    dim = features.describe(real.reference[:1])["features"].shape[1]
    least = max(dim + 1, 2 * NUM_BLOCKS)
    numbers = {
        "`num_images`": config.num_images,
        "`reference_split`": len(real.reference),
        "`held_out_split`" if source.held_out_split else "the held-out part of `reference_split`": len(real.held_out),
    }
    for name, number in numbers.items():
        if number < least:
            raise ValueError(
                f"{name}: {number} images are too few for {dim} features, whose covariance needs at least {least}."
            )


def sample_images(sampler: Sampler, indices: range) -> dict[str, torch.Tensor]:
    """uint8 samples, and how often each went through the network."""
    with count_evaluations(sampler.pipe, len(indices)) as evaluations:
        images = sampler.sample(indices, output_type="pt")
    return {"images": to_uint8(images).cpu(), "evaluations": evaluations()}


def noise_std_of(config: EvaluateConfig) -> float:
    return _NOISE_STD if config.posterior_noise_std is None else config.posterior_noise_std


class Evaluation(Run):
    """One run of [`evaluate`] on images."""

    def __init__(self, config: EvaluateConfig, sampler: Sampler):
        super().__init__(config, sampler)
        shape = self.pipe.sample_shape
        self.source = find_real_source(config, self.sampler.name, shape)
        self.say_source(self.source, "the embedded digits")
        self.real = load_real_images(config, self.source, self.accelerator, shape, self.pipe.num_classes)
        self.features = load_features(config.features, self.accelerator, self.real, self.source.name is None)
        if config.features is None:
            self.accelerator.print(f"Features: {self.features.name}; others: {', '.join(fitting_features(shape))}.")
        check_numbers(config, self.source, self.real, self.features)
        self.operators = {name: make_operator(name, shape) for name in config.posterior}
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def held_out(self) -> torch.Tensor:
        return self.real.held_out

    def to_network(self, data: torch.Tensor) -> torch.Tensor:
        return self.pipe.units.to_network(data / 255)

    def run(self) -> dict[str, Any] | None:
        config, real = self.config, self.real
        if not (self.folder / "samples").exists():
            self.suggest_bfloat16()
        samples = self.kept.compute(
            "samples",
            {"pipeline": self.weights, **self.sampler.describe()},
            config.num_images,
            config.batch_size,
            partial(sample_images, self.sampler),
            may_replace=config.overwrite_output_dir,
        )
        sets = {"samples": samples["images"], "reference": real.reference, "held-out": real.held_out}
        described = self.describe_sets(sets)
        parts = {
            "posterior": self.evaluate_posterior(),
            "branches": self.evaluate_branches(),  # before the network is cast to float32
            "losses": self.evaluate_losses(),
            "likelihood": self.evaluate_likelihood(),
        }
        found = None
        if self.accelerator.is_main_process:
            record = self.describe_run(samples["evaluations"].max().item(), described, parts)
            found = json.loads(json.dumps(record.to_dict()))  # so that what is returned is what the file holds
            self.save(record)
            self.save_samples(samples["images"], described)
            print(f"{make_verdict(record).strip('*')} See {self.folder.resolve() / 'report.md'}.")
        self.accelerator.end_training()
        return found

    def describe_sets(self, sets: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """See [`Features`]."""
        described = {
            name: self.kept.compute(
                f"features-{self.features.key}-{name}",
                {"features": self.features.name, "images": fingerprint(images)},
                len(images),
                _FEATURE_BATCH,
                lambda rows, images=images: self.features.describe(images[rows.start : rows.stop]),
            )
            for name, images in sets.items()
        }
        if not self.features.scaled:
            reference = described["reference"]["features"]
            mean, scale = reference.mean(0), reference.var(0).mean().sqrt().clamp(min=1e-12)
            for found in described.values():
                found["features"] = (found["features"] - mean) / scale
        return described

    def evaluate_posterior(self) -> PosteriorRecord | None:
        """
        Whether samples given a measurement of held-out images are spread as they should be. Other processes than the
        main one judge nothing.
        """
        if not self.operators:
            return None
        config = self.config
        held_out = self.real.held_out[: config.posterior_images]
        images, reference = held_out / 255, self.real.reference[:_MAX_GAUSSIAN] / 255
        num, k, noise_std = len(images), config.posterior_samples, noise_std_of(config)
        record = PosteriorRecord(num, k, noise_std, config.posterior_steps)
        pipe, depends_on = self.prepare_posterior(record)
        for name, operator in self.operators.items():
            y = measure(config, images, operator, noise_std)
            function = partial(sample_posterior, pipe, config, operator, y, noise_std)
            table = self.kept.compute(f"posterior-{name}", depends_on, num * k, config.batch_size, function)
            record.evaluations = table["evaluations"].max().item()
            if self.accelerator.is_main_process:
                samples = table["samples"].unflatten(0, (num, k))
                record.operators[name] = (
                    calibrate(samples, images, y, operator, noise_std),
                    calibrate_exact(reference, operator, noise_std, num, k),
                )
        return record

    def evaluate_branches(self) -> BranchRecord | None:
        """Whether the outputs with and without a class of a class-conditional network belong together."""
        config, pipe, device = self.config, self.pipe, self.accelerator.device
        if pipe.num_classes is None or not config.branch_images:
            return None
        ladder = AnnealedLangevinScheduler.from_config(pipe.scheduler.config).config
        sigmas = np.geomspace(ladder.sigma_min, ladder.sigma_max, _BRANCH_LEVELS).tolist()

        def compute_ratios(rows: range) -> dict[str, torch.Tensor]:
            labels = torch.tensor([i % pipe.num_classes for i in rows])
            images = pipe(
                class_labels=labels.tolist(),
                num_inference_steps=self.sampler.num_inference_steps,
                generator=make_generators(config.seed, rows),
                output_type="pt",
            ).images
            x = pipe.units.to_network(to_uint8(images) / 255)
            generators = make_generators(config.seed + NOISE_SEED, rows)
            noise = torch.stack([torch.randn(_BRANCH_LEVELS, *x.shape[1:], generator=g) for g in generators], 1)
            ratios = log_class_ratio(pipe.denoise, x, labels.to(device), sigmas, noise.to(device))
            return {"log_ratios": ratios}

        depends_on = {"pipeline": self.weights, **self.sampler.describe(), "sigmas_of_integral": sigmas}
        table = self.kept.compute("branches", depends_on, config.branch_images, config.batch_size, compute_ratios)
        mean, error = mean_and_error(table["log_ratios"])
        metric = Metric("mean_log_class_ratio", "mean of log p(c|x)/p(c)", mean, "{:.2f}", standard_error=error)
        return BranchRecord(metric, config.branch_images, math.log(pipe.num_classes))

    def evaluate_likelihood(self) -> LikelihoodRecord | None:
        """Bits per dimension of held-out images."""
        return self.measure_likelihood(
            "bits-per-dim",
            bits_per_dim,
            key="bits_per_dim",
            title="bits per dimension",
            form="{:.3f}",
            card_type="bits-per-dim",
            card_title="Bits per dimension",
        )

    def find_classes(self, described: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The classes of the samples and of the held-out images, by the classifier or the nearest reference image."""
        classes = {}
        for name in ("samples", "held-out"):
            labels = described[name].get("labels")
            if labels is None and self.real.labels is not None:
                nearest = nearest_neighbors(described[name]["features"], described["reference"]["features"])[1][:, 0]
                labels = self.real.labels[nearest]
            if labels is not None:
                classes[name] = labels
        return classes

    def count_classes(self, classes: dict[str, torch.Tensor], by_classifier: bool) -> ClassRecord | None:
        """The shares of the classes, and how many samples are of the class that was asked for."""
        if not classes:
            return None
        names = self.real.class_names
        if by_classifier and (len(names) != 10 or self.features.key == "digits"):
            names = [str(k) for k in range(10)]  # of a classifier that knows ten classes
        record = ClassRecord("the classifier" if by_classifier else "the nearest image of the reference")
        for name, labels in classes.items():
            record.class_shares[name] = dict(zip(names, class_shares(labels, len(names)).tolist(), strict=True))
        if by_classifier and self.sampler.class_labels is not None:
            asked, given = self.sampler.class_labels, classes["samples"].tolist()
            as_asked = [label == asked[i % len(asked)] for i, label in enumerate(given)]
            record.named_as_asked = sum(as_asked) / len(as_asked)
        return record

    def describe_run(
        self, evaluations: int, described: dict[str, dict[str, torch.Tensor]], parts: dict[str, Any]
    ) -> EvaluationRecord:
        """The record of the run: what the metrics depend on, those of the images, and the other parts."""
        real, source = self.real, self.source
        reference, classes = described["reference"]["features"], self.find_classes(described)
        samples, floor = (
            compare(reference, described[name]["features"], classes.get(name), self.features.key == "inception")
            for name in ("samples", "held-out")
        )
        is_own = self.sampler.name == pretrained("mnist")
        return EvaluationRecord(
            pipeline="mnist, which comes with ncsn_diffusers" if is_own else without_parents(self.sampler.name),
            features=self.features.name,
            data=DataRecord(
                id=source.name or "ylecun/mnist",
                name=source.name or "MNIST (the embedded 10,000 digits)",
                reference_split=source.reference_split,
                num_reference=len(real.reference),
                held_out_split=source.held_out_split,
                num_held_out=len(real.held_out),
            ),
            samples=samples,
            floor=floor,
            classes=self.count_classes(classes, "labels" in described["samples"]),
            **self.describe(evaluations),
            **parts,
        )

    def save(self, record: EvaluationRecord) -> None:
        """metrics.json, report.md, its plots, and the model card where it is asked for."""
        if record.classes is not None:
            self.write("classes.png", partial(plot_classes, record.classes.class_shares))
        self.save_record(record, make_report(record))
        if self.config.update_model_card:
            update_model_card(Path(self.sampler.name) / "README.md", record)

    def save_samples(self, samples: torch.Tensor, described: dict[str, dict[str, torch.Tensor]]) -> None:
        """The report's images: samples, and beside some of them their nearest training images."""
        real = self.real
        # held-out images of the training split may have been trained on, too
        is_own_split = self.source.held_out_split is not None
        names = ["reference"] if is_own_split else ["reference", "held-out"]
        training = torch.cat([real.reference] if is_own_split else [real.reference, real.held_out])
        among = torch.cat([described[name]["features"] for name in names])
        nearest = nearest_neighbors(described["samples"]["features"][:_NUM_SHOWN], among, _NUM_NEIGHBOURS)[1]
        rows = [
            torch.cat([image[None], training[found]])
            for image, found in zip(samples[:_NUM_SHOWN], nearest, strict=True)
        ]
        for name, shown in (("samples.png", list(samples[:100].split(20))), ("neighbors.png", rows)):
            self.write(name, make_image(shown).save)


def evaluate(config: EvaluateConfig) -> dict[str, Any] | None:
    """
    Draw samples with a trained pipeline and measure how far they are from real images, or other real data.

    Writes metrics.json, report.md, its plots and kept batches into `config.output_dir`, and draws only what is not
    there yet. Under `accelerate launch` the processes share the work, and each of them makes this call.

    Args:
        config ([`EvaluateConfig`]): what to evaluate, and how.

    Returns:
        `dict` or `None`: what metrics.json holds, on the main process; `None` on the others. `"samples"` and `"floor"`
        hold the distances of the samples and of held-out real images from the reference.

    Raises:
        ImportError: torch-fidelity is not installed.
        ValueError: images, features and pipeline do not fit together, there are too few images, or `output_dir` holds
            samples that were drawn with other settings.
        OSError: weights or data cannot be read, or a file cannot be written.
        FloatingPointError: a sample is not finite.
    """
    require_torch_fidelity()
    sampler = Sampler(config)
    kind = Evaluation if sampler.pipe.draws_images else FieldEvaluation
    return kind(config, sampler).run()
