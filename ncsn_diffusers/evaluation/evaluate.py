"""
How good a pipeline's pictures are: `python scripts/evaluate.py PIPELINE`, or with `accelerate launch` on several
devices.

Whatever takes long (samples, features, likelihoods) is computed in batches that the processes share, and each batch is
kept in the output folder: a run that was cut short goes on where it ended, and a second one with more pictures, or with
other figures, draws only what is missing. The batches are the same whatever the number of processes, and so is every
figure.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel

from ..data import ImageReader, encode_labels, find_columns, load_training_data, open_images
from ..images import to_model_range, to_uint8
from ..likelihood import bits_per_dim, loss_per_level
from ..pipeline_ncsn import NCSNPipeline
from ..scheduling_annealed_langevin import AnnealedLangevinScheduler
from ..settings import SamplingConfig, describe_scheduler
from .features import InceptionFeatures, extract_features, load_digit_classifier
from .kept_batches import KeptBatches, fingerprint
from .metrics import (
    class_entropy,
    class_shares,
    frechet_distance,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
    require_torch_fidelity,
)
from .report import make_grid, make_report, plot_classes, plot_losses, update_model_card

_FEATURE_BATCH = 100  # pictures
_NUM_BLOCKS = 10  # of the kernel distance
_NUM_LEVELS = 12  # of the loss
_NUM_SHOWN, _NUM_NEIGHBOURS = 10, 6  # in the pictures of the report


@dataclass
class EvaluateConfig(SamplingConfig):
    """
    Judge a trained pipeline by its pictures, and its network by real ones.

    Writes metrics.json and report.md, and keeps the samples and their features, so that a run which was cut short goes
    on where it ended. With no data set named, the pictures are compared with the embedded digits.
    """

    num_images: int = 5000
    """Number of samples."""

    batch_size: int = 100
    """Samples that are drawn at a time on each device."""

    output_dir: str = "evaluation"
    """Folder for the report, the figures and what is kept to go on; all processes must see it."""

    overwrite_output_dir: bool = False
    """Draw anew where `output_dir` holds samples that were drawn with other settings."""

    dataset_name: str | None = None
    """Name of a data set on the Hub, or a folder that `datasets.load_dataset` reads."""

    dataset_config_name: str | None = None
    """Configuration of that data set."""

    train_data_dir: str | None = None
    """Folder of pictures, of parquet files or of WebDataset archives."""

    reference_split: str = "train"
    """Split, or slice of one, that the samples are compared with: the training pictures."""

    held_out_split: str | None = None
    """Split whose distance from the reference is the floor; by default `num_images` of the reference, at most half."""

    max_reference_images: int | None = None
    """Compare with so many pictures of the reference, drawn at random; all by default."""

    image_column: str | None = None
    """Column of pictures; the first one by default."""

    label_column: str | None = None
    """Column of labels; the first column of class labels by default."""

    resolution: int | None = None
    """Side of the square that real pictures are resized and cropped to; their own size by default."""

    channels: int | None = None
    """1 (gray), 3 (colour) or 4 (colour and transparency); gray where all pictures are, and colour, by default."""

    features: Literal["digits", "inception"] = "digits"
    """What the pictures are compared by: a classifier of 28×28 digits, or the Inception network of the FID."""

    loss_images: int = 500
    """Held-out pictures that the network's loss at each noise level is averaged over; 0 for none."""

    bits_per_dim: int = 0
    """Held-out pictures whose likelihood is estimated, each at 4 evaluations and backward passes a step; 0 for none."""

    likelihood_steps: int = 25
    """Steps of the likelihood's integral."""

    update_model_card: bool = False
    """Put the figures into the metadata of the README.md in the pipeline's folder."""

    def __post_init__(self):
        self.check_least(max_reference_images=1, resolution=1, likelihood_steps=1)
        for name in ("loss_images", "bits_per_dim"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ValueError(f"`{name}` must be 0 or at least 2, for a standard error, not {getattr(self, name)}.")
        if self.channels not in (None, 1, 3, 4):
            raise ValueError(f"`channels` must be 1, 3 or 4, not {self.channels}.")
        super().__post_init__()
        if self.update_model_card and not (Path(self.pipeline) / "README.md").is_file():
            raise ValueError(f"`update_model_card` needs a model card, {Path(self.pipeline) / 'README.md'}.")
        require_torch_fidelity()


# Pictures and features


@dataclass
class RealPictures:
    """uint8 pictures `(n, channels, height, width)` in random order; the reference's classes `(n,)` where known."""

    reference: torch.Tensor
    held_out: torch.Tensor
    labels: torch.Tensor | None
    class_names: list[str]


def load_real_pictures(config: EvaluateConfig, accelerator: Accelerator, shape: tuple[int, int, int]) -> RealPictures:
    """
    The reference, and the held-out pictures.

    Raises:
        ValueError: they are not of the shape that the network draws, or cannot be read.
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
            feature = dataset.features[label_column]
            names = feature.names if isinstance(feature, ClassLabel) else [str(k) for k in range(num_classes)]
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num]
        reader = ImageReader(image_column, label_column, config.resolution, config.channels, num_classes=num_classes)
        found = open_images(dataset.select(order.tolist()), reader, accelerator.device, max_cache_gb=math.inf)
        if found.shape != shape:
            raise ValueError(
                f"{split!r} has pictures of shape {found.shape}, and the network draws {shape} (channels, height, "
                "width): `resolution` and `channels` make them agree."
            )
        if names and (found.labels == num_classes).any():
            accelerator.print(f"{split!r} has images without a label: no classes are counted.")
            names = []
        return found.images.cpu(), found.labels.cpu() if names else None, names

    images, labels, names = load(config.reference_split, config.max_reference_images, config.seed)
    if config.held_out_split is not None:
        # another order: in the same one, two splits sorted alike would be paired, and seem nearer than they are
        held_out = load(config.held_out_split, config.num_images, config.seed + 1)[0]
        return RealPictures(images, held_out, labels, names)
    num = min(config.num_images, len(images) // 2)
    return RealPictures(images[num:], images[:num], None if labels is None else labels[num:], names)


@dataclass
class Features:
    """`describe` uint8 pictures: `"features"` of shape `(n, d)` and, by a classifier, `"labels"` of shape `(n,)`."""

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


def check_numbers(config: EvaluateConfig, real: RealPictures, features: Features) -> None:
    """Refuse too few pictures before any is drawn."""
    try:
        dim = features.describe(real.reference[:1])["features"].shape[1]
    except ValueError as error:
        raise ValueError(f"`features`={config.features!r} do not fit the pictures: {error}") from error
    least = max(dim + 1, 2 * _NUM_BLOCKS)
    numbers = {
        "`num_images`": config.num_images,
        "`reference_split`": len(real.reference),
        "`held_out_split`" if config.held_out_split else "the held-out part of `reference_split`": len(real.held_out),
    }
    for name, number in numbers.items():
        if number < least:
            raise ValueError(
                f"{name}: {number} pictures are too few for {dim} features, whose covariance needs at least {least}."
            )


def draw(pipe: NCSNPipeline, config: EvaluateConfig, indices: range) -> dict[str, torch.Tensor]:
    """uint8 samples, and how often each went through the network."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        images = config.draw(pipe, indices, output_type="pt")
    finally:
        hook.remove()
    return {"images": to_uint8(images).cpu(), "evaluations": torch.full((len(indices),), sum(rows) // len(indices))}


# Figures


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean of `(n,)` and its standard error."""
    values = values.double()
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def compare(reference: torch.Tensor, features: torch.Tensor) -> dict[str, float]:
    """The figures of pictures' features `(n, d)` beside those of the reference `(m, d)`."""
    kernel, kernel_error = kernel_distance(reference, features, _NUM_BLOCKS)
    precision, recall = precision_recall(reference[: len(features)], features[: len(reference)])
    return {
        "number": len(features),
        "frechet_distance": frechet_distance(reference, features),
        "kernel_distance": kernel,
        "kernel_distance_standard_error": kernel_error,
        "precision": precision,
        "recall": recall,
        "median_distance_to_nearest_reference": nearest_neighbours(features, reference)[0].median().item(),
    }


class Evaluation:
    """One run; [`main`] makes one."""

    def __init__(self, config: EvaluateConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator, pipe = config.open()
        self.folder.mkdir(parents=True, exist_ok=True)
        pipe.unet.requires_grad_(False)
        self.pipe, self.weights = pipe, fingerprint(*pipe.unet.state_dict().values())
        self.features = load_features(config.features, self.accelerator)
        self.real = load_real_pictures(config, self.accelerator, pipe.image_shape)
        check_numbers(config, self.real, self.features)
        self.kept = KeptBatches(self.accelerator, self.folder)
        names = ("num_inference_steps", "sigmas", "num_langevin_steps", "class_labels", "guidance_scale", "seed")
        self.sampling = describe_scheduler(pipe.scheduler)
        self.sampling |= {name: getattr(config, name) for name in (*names, "dtype", "batch_size")}

    def run(self) -> None:
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
        network = self.judge_network()
        if self.accelerator.is_main_process:
            metrics = self.judge_pictures(described) | network
            self.save(metrics, samples["images"], described)
        self.accelerator.end_training()

    def describe(self, name: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Features`]."""
        return self.kept.compute(
            f"features-{self.config.features}-{name}",
            {"features": self.features.name, "images": fingerprint(images)},
            len(images),
            _FEATURE_BATCH,
            lambda rows: self.features.describe(images[rows.start : rows.stop]),
        )

    def judge_network(self) -> dict[str, Any]:
        """Its loss at each noise level, and the likelihood, of held-out pictures."""
        config, pipe, held_out = self.config, self.pipe, self.real.held_out
        device = self.accelerator.device
        ladder = AnnealedLangevinScheduler.from_config(pipe.scheduler.config)
        sigmas = np.geomspace(ladder.config.sigma_max, ladder.config.sigma_min, _NUM_LEVELS).tolist()
        data_min = pipe.config.data_min
        unet = pipe.unet.float()  # a likelihood needs more digits than half precision has

        def batch(rows: range):
            """uint8 pictures, their generators, and the class that means none."""
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
        figures = {}
        if number := min(config.loss_images, len(held_out)):
            table = self.kept.compute("losses", {**depends_on, "sigmas": sigmas}, number, config.batch_size, losses)
            levels = [(sigma, *mean_and_error(column)) for sigma, column in zip(sigmas, table["losses"].T, strict=True)]
            keys = ("sigma", "loss", "standard_error")
            figures["loss_images"] = number
            figures["loss_per_level"] = [dict(zip(keys, level, strict=True)) for level in levels]
        if number := min(config.bits_per_dim, len(held_out)):
            depends_on |= {"likelihood_steps": config.likelihood_steps}
            values = self.kept.compute("bits-per-dim", depends_on, number, config.batch_size, bits)["bits"]
            mean, error = mean_and_error(values)
            figures["bits_per_dim"] = {"mean": mean, "standard_error": error}
            figures["bits_per_dim"] |= {"number": number, "steps": config.likelihood_steps}
        return figures

    def judge_pictures(self, described: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
        """What metrics.json says, but for the network."""
        config, real = self.config, self.real
        source = config.dataset_name or config.train_data_dir
        if source and Path(source).is_dir():
            source = Path(source).resolve().name  # where the data lie here is of no interest in a published card
        reference = described["reference"]["features"]
        metrics = {
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
            "samples": compare(reference, described["samples"]["features"]),
            "floor": compare(reference, described["held-out"]["features"]),
            "versions": {name: version(name) for name in ("ncsn_diffusers", "diffusers", "torch", "torch-fidelity")},
        }
        classifier = "labels" in described["samples"]
        if classifier or real.labels is not None:
            names = [str(digit) for digit in range(10)] if classifier else real.class_names
            metrics["classes_by"] = "the classifier" if classifier else "the nearest picture of the reference"
            metrics["class_shares"] = {}
            for key, name in (("samples", "samples"), ("floor", "held-out")):
                labels = described[name].get("labels")
                if labels is None:
                    labels = real.labels[nearest_neighbours(described[name]["features"], reference)[1][:, 0]]
                shares = class_shares(labels, len(names)).tolist()
                metrics["class_shares"][name] = dict(zip(names, shares, strict=True))
                metrics[key]["class_entropy"] = class_entropy(labels)
        return metrics

    def save(self, metrics: dict[str, Any], samples: torch.Tensor, described: dict[str, dict[str, torch.Tensor]]):
        config, real, folder = self.config, self.real, self.folder
        make_grid([list(row) for row in samples[:100].split(20)]).save(folder / "samples.png")

        # held-out pictures of the training split may have been trained on, too
        names = ["reference"] if config.held_out_split else ["reference", "held-out"]
        training = torch.cat([real.reference] if config.held_out_split else [real.reference, real.held_out])
        among = torch.cat([described[name]["features"] for name in names])
        nearest = nearest_neighbours(described["samples"]["features"][:_NUM_SHOWN], among, _NUM_NEIGHBOURS)[1]
        rows = [[image, *training[found]] for image, found in zip(samples[:_NUM_SHOWN], nearest, strict=True)]
        make_grid(rows).save(folder / "neighbours.png")

        if "class_shares" in metrics:
            plot_classes(metrics["class_shares"], folder / "classes.png")
        if "loss_per_level" in metrics:
            plot_losses(metrics["loss_per_level"], folder / "losses.png")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "report.md").write_text(make_report(metrics))
        if config.update_model_card:
            update_model_card(Path(config.pipeline) / "README.md", metrics, config.features == "inception")
        print(f"Fréchet distance {metrics['samples']['frechet_distance']:.4g}; see {folder.resolve() / 'report.md'}.")


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate as `config` says; [`EvaluateConfig`] says what is written where."""
    Evaluation(config).run()
