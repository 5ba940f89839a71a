"""A whole evaluation: what it writes and returns, how it goes on, and what it refuses."""

import errno
import importlib
import itertools
import json
import math
import os
import shutil
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as Picture
from diffusers import DDIMScheduler
from forked import run_two_forked
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from networks import small_unet
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, NCSNPosteriorPipeline, precision
from ncsn_diffusers.commands.evaluate import main
from ncsn_diffusers.data import decode_images, load_training_data
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.evaluation import (
    RandomFeatures,
    class_shares,
    extract_features,
    frechet_distance,
    kernel_distance,
    load_digit_classifier,
    nearest_neighbors,
    precision_recall,
    to_uint8,
)
from ncsn_diffusers.evaluation.branches import log_class_ratio
from ncsn_diffusers.evaluation.calibration import OPERATORS, calibrate, make_operator
from ncsn_diffusers.evaluation.config import OperatorName
from ncsn_diffusers.images import to_model_range
from ncsn_diffusers.likelihood import bits_per_dim, loss_per_level
from ncsn_diffusers.sampling import NOISE_SEED, Sampler
from ncsn_diffusers.units import image_units

pytest.importorskip("torch_fidelity")

MODULE = ("-m", "ncsn_diffusers.commands.evaluate")

evaluate = importlib.import_module("ncsn_diffusers.evaluation.evaluate")

# 66 samples: the least for 64 features; the last batch is smaller
ARGUMENTS = {"num_images": 66, "batch_size": 20, "num_inference_steps": 2, "max_reference_images": 200}
ARGUMENTS |= {"loss_images": 30, "bits_per_dim": 4, "likelihood_steps": 2}
ARGUMENTS |= {"posterior": ("missing-pixels", "pixelated"), "posterior_images": 9, "posterior_samples": 3}
ARGUMENTS |= {"posterior_steps": 2, "posterior_noise_std": 0.2}


def run(pipeline, output_dir, **arguments):
    return evaluate.evaluate(evaluate.EvaluateConfig(str(pipeline), output_dir=str(output_dir), **arguments))


def flags(arguments):
    lists = {name: value if isinstance(value, tuple) else (value,) for name, value in arguments.items()}
    return [part for name, values in lists.items() for part in (f"--{name}", *map(str, values))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are launched have: the number of threads changes roundings."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    NCSNPipeline(small_unet(sample_size=28), AnnealedLangevinScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, pipeline):
    """The output folder of a whole run, in one process."""
    folder = tmp_path_factory.mktemp("evaluation")
    assert without_run(run(pipeline, folder, **ARGUMENTS)) == read(folder)
    return folder


def without_run(metrics):
    """What does not depend on when and by which command it was computed."""
    return {key: value for key, value in metrics.items() if key not in ("date", "command")}


def read(folder):
    return without_run(json.loads((folder / "metrics.json").read_text()))


# --- What it writes ---


def test_the_share_that_is_named_as_asked(tmp_path):
    unet = small_unet(sample_size=28, num_class_embeds=11)
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    arguments = ARGUMENTS | {"bits_per_dim": 0, "loss_images": 0}
    pipe = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    images = pipe(class_labels=[8] * 5, num_inference_steps=2, generator=generators, output_type="pt").images
    name = load_digit_classifier()(to_uint8(images)).argmax(1)[0].item()  # noise: of one class or two
    asked = (name, (name + 1) % 10, (name + 2) % 10)
    metrics = run(tmp_path / "pipeline", tmp_path / "out", class_labels=asked, **arguments)
    assert metrics["class_shares"]["samples"][str(name)] == 1
    assert metrics["named_as_asked"] == 22 / 66
    assert "It names 33.3% of the samples as the class that was asked for." in (tmp_path / "out/report.md").read_text()


def test_metrics_are_the_librarys(pipeline, evaluation):
    metrics = read(evaluation)
    pipe = NCSNPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    samples = []
    for start in range(0, 66, 20):
        generators = [torch.Generator().manual_seed(i) for i in range(start, min(start + 20, 66))]
        samples.append(to_uint8(pipe(len(generators), 2, generator=generators, output_type="pt").images))
    samples = torch.cat(samples)
    rows = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:200]
    real = decode_images(load_training_data().select(rows.tolist()))
    held_out, reference = real[:66], real[66:]

    classifier = load_digit_classifier()
    features = {
        name: extract_features(images, classifier.features)
        for name, images in (("samples", samples), ("floor", held_out), ("reference", reference))
    }
    for name, images in (("samples", samples), ("floor", held_out)):
        values, described = metrics[name], features[name]
        assert values["number"] == 66
        distance = frechet_distance(features["reference"], described)
        assert values["frechet_distance"] == pytest.approx(distance, rel=1e-4)
        kernel = kernel_distance(features["reference"], described)
        given = [values["kernel_distance"], values["kernel_distance_standard_error"]]
        assert given == pytest.approx(list(kernel), rel=1e-4, abs=1e-4)
        precision = precision_recall(features["reference"][:66], described)
        assert [values["precision"], values["recall"]] == pytest.approx(list(precision), abs=0.02)
        nearest = nearest_neighbors(described, features["reference"])[0].median().item()
        assert values["median_distance_to_nearest_reference"] == pytest.approx(nearest, rel=1e-4)
        shares = class_shares(classifier(images).argmax(1), 10).tolist()
        key = {"samples": "samples", "floor": "held-out"}[name]
        assert list(metrics["class_shares"][key].values()) == pytest.approx(shares)
    assert "named_as_asked" not in metrics
    # the floor is near zero, and the untrained network far above it
    floor = metrics["floor"]
    assert abs(floor["kernel_distance"]) < 4 * floor["kernel_distance_standard_error"]
    assert metrics["samples"]["frechet_distance"] > 10 * floor["frechet_distance"]

    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    bits = bits_per_dim(Denoiser.of(pipe.unet, pipe.scheduler), held_out[:4], generators, pipe.units, num_steps=2)
    given = metrics["bits_per_dim"]
    assert (given["number"], given["steps"]) == (4, 2)
    assert given["mean"] == pytest.approx(bits.mean().item(), rel=1e-5)
    assert given["standard_error"] == pytest.approx(bits.std().item() / 2, rel=1e-3)
    noise = [torch.randn((1, 28, 28), generator=torch.Generator().manual_seed(i)) for i in range(30)]
    levels = metrics["loss_per_level"]
    sigmas = [level["sigma"] for level in levels]
    assert (max(sigmas), min(sigmas)) == (50, pytest.approx(0.01))
    x0 = 2 * (held_out[:30] / 255) - 1
    losses = loss_per_level(Denoiser.of(pipe.unet, pipe.scheduler), x0, torch.stack(noise), sigmas)
    assert [level["loss"] for level in levels] == pytest.approx(losses.mean(1).tolist(), rel=1e-4)


def test_calibration_is_the_librarys(pipeline, evaluation):
    metrics, calibration = read(evaluation), read(evaluation)["posterior"]
    assert {key: calibration[key] for key in ("images", "samples", "noise_std", "steps", "evaluations")} == {
        "images": 9,
        "samples": 3,
        "noise_std": 0.2,
        "steps": 2,
        "evaluations": 4,
    }
    assert list(calibration["operators"]) == list(ARGUMENTS["posterior"])
    pipe = NCSNPosteriorPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    rows = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:9]
    truths = decode_images(load_training_data().select(rows.tolist())) / 255
    for name, found in calibration["operators"].items():
        operator = make_operator(name, (1, 28, 28))
        y = operator(truths)
        seeds = range(NOISE_SEED, NOISE_SEED + 9)
        y = y + 0.2 * torch.stack([torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(i)) for i in seeds])
        samples = [
            pipe(
                y[[i // 3 for i in rows]],
                operator,
                0.2,
                num_inference_steps=2,
                generator=[torch.Generator().manual_seed(i) for i in rows],
                output_type="pt",
            ).images
            for rows in (range(20), range(20, 27))
        ]
        samples = torch.cat(samples).unflatten(0, (9, 3))
        right = calibrate(samples, truths, y, operator, 0.2)
        for value in right.metrics:
            assert found[value.key] == pytest.approx(value.value, rel=1e-3)
        assert found["ranks"] == pytest.approx(right.ranks, abs=1e-3)
        assert found["reliability"][0]["nominal"] == 0.5
        assert found["reliability"][0]["actual"] == pytest.approx(right.reliability[0]["actual"], abs=1e-3)
        # an untrained network's samples are far off, and exact ones are not
        exact = found["exact"]
        assert found["spread_over_error"] < 0.95 or found["misfit"] > 1.5
        assert abs(exact["coverage"] - 0.5) < 3 * exact["coverage_standard_error"]
        assert abs(exact["misfit"] - 1) < 3 * exact["misfit_standard_error"]
    assert "posterior" not in metrics["sampling"]


def test_dtype_is_that_of_the_samples_and_not_of_the_likelihood(tmp_path, pipeline, evaluation):
    metrics = run(pipeline, tmp_path, **{**ARGUMENTS, "dtype": "bfloat16"})
    assert metrics["sampling"]["dtype"] == "bfloat16"
    before = read(evaluation)
    assert metrics["samples"] != before["samples"]
    # the weights are rounded to three digits, the sums over 784 pixels are not
    assert metrics["bits_per_dim"]["mean"] == pytest.approx(before["bits_per_dim"]["mean"], rel=1e-2)
    for level, other in zip(metrics["loss_per_level"], before["loss_per_level"], strict=True):
        assert level["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_dtype_does_not_depend_on_the_machine(pipeline, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    sampler = Sampler(evaluate.EvaluateConfig(str(pipeline)))
    assert sampler.pipe.unet.dtype == torch.float32
    assert sampler.dtype == "float32"


def test_the_report_states_what_the_metrics_depend_on(pipeline, evaluation):
    metrics = json.loads((evaluation / "metrics.json").read_text())
    report = (evaluation / "report.md").read_text()
    samples, floor, bits = metrics["samples"], metrics["floor"], metrics["bits_per_dim"]

    def row(title, text):
        return f"| {title} | {text(samples)} | {text(floor)} |"

    assert report.startswith(f"# {pipeline.name}\n\n**66 samples differ from real images (Fréchet distance ")
    assert f"{metrics['date']}, `{metrics['command']}`" in report
    assert metrics["pipeline"] == pipeline.name
    for fact in (
        "66 samples, 2 network evaluations each: AnnealedLangevinScheduler, num_inference_steps=2, seed 0, float32",
        "Reference: 134 images of `train` of MNIST (the embedded 10,000 digits); held out: 66 others of the same",
        "Features: 64 of the classifier of digits of ncsn_diffusers",
        "| images | 66 | 66 |",
        row("Fréchet distance", "{0[frechet_distance]:.4g}".format),
        row(
            "kernel distance ± standard error",
            "{0[kernel_distance]:.4g} ± {0[kernel_distance_standard_error]:.2g}".format,
        ),
        row("precision", "{0[precision]:.3f}".format),
        row("recall", "{0[recall]:.3f}".format),
        row("entropy of the classes (nats)", "{0[class_entropy]:.4f}".format),
        row("median distance to the nearest reference image", "{0[median_distance_to_nearest_reference]:.4g}".format),
        f"Likelihood: {bits['mean']:.3f} ± {bits['standard_error']:.2g} bits per dimension, an upper bound, of 4 held",
        *("| {sigma:.4g} | {loss:.4g} | {standard_error:.2g} |".format(**level) for level in metrics["loss_per_level"]),
    ):
        assert fact in report
    calibration = metrics["posterior"]
    psnr = "{0[psnr]:.2f} ± {0[psnr_standard_error]:.2g} | {0[psnr_of_mean]:.2f} ± {0[psnr_of_mean_standard_error]:.2g}"
    rest = (
        "{0[misfit]:.2f} ± {0[misfit_standard_error]:.2g} | {0[largest_misfit]:.2f}{1} | {2} | "
        "{0[coverage]:.3f} ± {0[coverage_standard_error]:.2g} | "
        "{0[spread_over_error]:.2f} ± {0[spread_over_error_standard_error]:.2g}"
    )
    for name, found in calibration["operators"].items():
        score = f"{found['crps']:.4g} ± {found['crps_standard_error']:.2g}"
        assert f"| {name} | {psnr.format(found)} | {rest.format(found, '', score)} |" in report
        spread = f" ± {found['exact']['largest_misfit_standard_error']:.2g}"
        assert f"| {name}, exact |  |  | {rest.format(found['exact'], spread, '')} |" in report
    for fact in (
        "9 held-out images, 3 samples each given A x + noise of standard deviation 0.2 in units of the data, 4 network",
        "| operator | PSNR of a sample | PSNR of the mean of 3 | misfit (right: 1) | largest misfit | CRPS | coverage "
        "(right: 0.500) | spread over error (right: 1) |",
    ):
        assert fact in report
    assert metrics["sampling"]["scheduler_config"]["sigma_max"] == 50
    assert "trained_betas" not in metrics["sampling"]["scheduler_config"]  # they follow from it
    for name in ("samples", "neighbors", "classes", "losses", "reliability"):
        assert f"({name}.png)" in report
        with Image.open(evaluation / f"{name}.png") as image:
            image.verify()


def test_the_number_of_processes_changes_nothing(tmp_path, pipeline, evaluation):
    result = run_two_forked(*MODULE, pipeline, "--output_dir", tmp_path, *flags(ARGUMENTS))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Fréchet distance") == 1
    assert result.stdout.count("66 samples differ from real images (Fréchet distance ") == 1
    assert "samples:" in result.stderr  # the progress bar
    assert read(tmp_path) == read(evaluation)
    assert (tmp_path / "neighbors.png").read_bytes() == (evaluation / "neighbors.png").read_bytes()


# --- How it goes on ---


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path, pipeline, evaluation):
    drawn, sample_images = [], evaluate.sample_images

    def interrupted(sampler, indices):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(indices)
        return sample_images(sampler, indices)

    monkeypatch.setattr(evaluate, "sample_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, tmp_path, **ARGUMENTS)
    # the disk cut a batch short
    damaged = tmp_path / "samples" / "00000000-00000020.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])

    def counted(sampler, indices):
        drawn.append(indices)
        return sample_images(sampler, indices)

    monkeypatch.setattr(evaluate, "sample_images", counted)
    assert without_run(run(pipeline, tmp_path, **ARGUMENTS)) == read(evaluation)
    assert drawn == [range(20), range(20, 40), range(20), range(40, 60), range(60, 66)]

    # the same again draws nothing, more images only those that are missing
    measured, sample_posterior = [], evaluate.sample_posterior

    def counted_posterior(*arguments):
        measured.append(arguments[-1])
        return sample_posterior(*arguments)

    monkeypatch.setattr(evaluate, "sample_posterior", counted_posterior)
    drawn.clear()
    run(pipeline, tmp_path, **ARGUMENTS)
    assert measured == []
    metrics = run(pipeline, tmp_path, **{**ARGUMENTS, "posterior_images": 15})
    assert measured == [range(20, 40), range(40, 45)] * 2  # 3 samples each, of two operators
    assert metrics["posterior"]["images"] == 15
    run(pipeline, tmp_path, **{**ARGUMENTS, "num_images": 80})
    assert drawn == [range(60, 80)]

    # other settings are refused, and nothing is lost
    other = {**ARGUMENTS, "num_inference_steps": 1, "seed": 1, "posterior_noise_std": 0.1}
    with pytest.raises(ValueError, match=r"holds samples that were made with another `seed`, `num_inference_steps`"):
        run(pipeline, tmp_path, **other)
    assert len(list((tmp_path / "samples").glob("*.safetensors"))) == 5
    drawn.clear()
    measured.clear()
    metrics = run(pipeline, tmp_path, overwrite_output_dir=True, **other)
    assert len(drawn) == 4
    assert measured == [range(20), range(20, 27)] * 2
    assert metrics["sampling"]["evaluations"] == 1
    assert metrics["samples"] != read(evaluation)["samples"]


# --- Any data, features and scheduler ---


@pytest.fixture(scope="module")
def colored(tmp_path_factory):
    """A class-conditional pipeline of 3 × 8 × 8 images in [0, 1], and 120 such images: 40 are blue and 80 red."""
    folder = tmp_path_factory.mktemp("colored")
    unet = small_unet(channels=3, out_channels=3, num_class_embeds=3)
    NCSNPipeline(unet, AnnealedLangevinScheduler(), **image_units(0)).save_pretrained(folder / "pipeline")
    random = np.random.default_rng(0)
    for name, channel, number in (("blue", 2, 40), ("red", 0, 80)):
        for split in ("train", "test"):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 100, (8, 8, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i}.png")
    return folder


class Means:
    """In place of Inception: the mean of each channel."""

    def __init__(self, device):
        self.device = device

    def __call__(self, images):
        return images.to(self.device).double().mean((2, 3)) / 10


def test_other_images_features_and_schedulers(monkeypatch, tmp_path, colored):
    monkeypatch.setattr(evaluate, "InceptionFeatures", Means)
    card = ModelCard.from_template(ModelCardData(license="mit"), template_str="---\n{{ card_data }}\n---\n\n# Mine")
    data = {"task_type": "unconditional-image-generation", "dataset_type": "other", "dataset_name": "other"}
    card.data.eval_results = [EvalResult(**data, metric_type="fid", metric_value=3.0)]
    card.data.model_name = "mine"
    card_path = colored / "pipeline" / "README.md"
    card.save(card_path)
    arguments = {"train_data_dir": str(colored / "data"), "held_out_split": "test", "features": "inception"}
    arguments |= {"num_images": 40, "scheduler": "DDIMScheduler"}
    arguments |= {"class_labels": (0, 1), "guidance_scale": 2.0, "num_inference_steps": 3, "loss_images": 4}
    arguments |= {"posterior": ("blurred",), "posterior_images": 2, "posterior_samples": 2, "posterior_steps": 2}
    metrics = run(colored / "pipeline", tmp_path, update_model_card=True, **arguments)

    assert metrics["sampling"]["scheduler"] == "DDIMScheduler"
    assert metrics["sampling"]["evaluations"] == 6  # guidance asks the network twice
    assert "bits_per_dim" not in metrics
    assert metrics["data"]["num_reference"] == 120
    assert abs(metrics["floor"]["kernel_distance"]) < 4 * metrics["floor"]["kernel_distance_standard_error"]
    # the classes of the nearest reference images: the held-out ones' are right
    assert metrics["classes_by"] == "the nearest image of the reference"
    shares = metrics["class_shares"]["held-out"]
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))[:40]
    assert shares == {"blue": (order < 40).sum().item() / 40, "red": (order >= 40).sum().item() / 40}
    # the network is evaluated without a class, in its own units, which are [0, 1] here
    pipe = NCSNPipeline.from_pretrained(colored / "pipeline")
    dataset = load_training_data(train_data_dir=arguments["train_data_dir"], split="test")
    images = decode_images(dataset.select(order[:4].tolist())) / 255
    noise = torch.stack([torch.randn((3, 8, 8), generator=torch.Generator().manual_seed(i)) for i in range(4)])
    no_label, levels = torch.full((4,), 2), metrics["loss_per_level"]
    denoiser = Denoiser.of(pipe.unet, pipe.scheduler, no_label)
    losses = loss_per_level(denoiser, images, noise, [level["sigma"] for level in levels])
    assert [level["loss"] for level in levels] == pytest.approx(losses.mean(1).tolist(), rel=1e-4)
    # the samples are those of the pipeline with that scheduler
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    images = pipe(
        class_labels=[0, 1] * 20, guidance_scale=2.0, num_inference_steps=3, generator=generators, output_type="pt"
    ).images
    kept = load_file(tmp_path / "samples" / "00000000-00000040.safetensors")["images"]
    assert torch.equal(kept, to_uint8(images))

    # the card holds the metrics, once, beside what was there
    metrics = run(colored / "pipeline", tmp_path, update_model_card=True, **arguments)
    card = ModelCard.load(card_path)
    results = {(result.dataset_name, result.metric_type): result for result in card.data.eval_results}
    assert len(results) == len(card.data.eval_results) == 7
    assert card.data.license == "mit" and card.text.strip() == "# Mine"
    assert results["other", "fid"].metric_value == 3.0
    for kind, key, title in (
        ("fid", "frechet_distance", "FID"),
        ("kid", "kernel_distance", "KID"),
        ("improved-precision", "precision", "Precision"),
        ("improved-recall", "recall", "Recall"),
    ):
        written = results["data", kind]
        assert written.metric_value == round(metrics["samples"][key], 4)
        assert written.metric_name.startswith(f"{title} (40 samples, 6 evaluations each, features: 2,048 of the Incep")
    for kind, key, title in (
        ("posterior-coverage", "coverage", "Coverage of the posterior's intervals"),
        ("posterior-spread-over-error", "spread_over_error", "Posterior spread over error"),
    ):
        written = results["data", kind]
        assert written.metric_value == round(metrics["posterior"]["operators"]["blurred"][key], 4)
        assert written.metric_name == f"{title} (blurred, 2 images, 2 samples each)"

    # a full disk leaves the card as it was
    def full_disk(card, path):
        path.write_text("---\nlicense")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    content = card_path.read_text(encoding="utf-8")
    monkeypatch.setattr(ModelCard, "save", full_disk)
    with pytest.raises(OSError, match=r"README\.md could not be written: No space left on device\. Make room and"):
        run(colored / "pipeline", tmp_path, update_model_card=True, **arguments)
    assert card_path.read_text(encoding="utf-8") == content
    assert not (colored / "pipeline" / "incomplete-README.md").exists()


# --- What it refuses ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "`num_images` must be at least 1, not 0"),
        ({"likelihood_steps": 0}, "`likelihood_steps` must be at least 1, not 0"),
        ({"bits_per_dim": 1}, "`bits_per_dim` must be 0 or at least 2, for a standard error, not 1"),
        (
            {"posterior": ("blur",)},
            r"`posterior` must be different ones of missing-pixels, stations, pixelated, blurred, not \('bl",
        ),
        ({"posterior": ("blurred", "blurred")}, "`posterior` must be different ones of"),
        ({"posterior_images": 1}, "`posterior_images` must be at least 2, not 1"),
        ({"posterior_samples": 1}, "`posterior_samples` must be at least 2, not 1"),
        ({"posterior_steps": 0}, "`posterior_steps` must be at least 1, not 0"),
        ({"posterior_noise_std": 0.0}, r"`posterior_noise_std` must be above 0, not 0\.0"),
        ({"posterior_noise_std": float("nan")}, "`posterior_noise_std` must be above 0, not nan"),
        ({"channels": 2}, "`channels` must be 1, 3 or 4, not 2"),
        ({"class_labels": ()}, "`class_labels` needs at least one class"),
        ({"scheduler_config": ("x",)}, "must be name=value pairs"),
        (
            {"features": "dino"},
            "`features` must be digits, fashion, random, inception or the file of a classifier, not 'dino'",
        ),
        ({"branch_images": 1}, "`branch_images` must be 0 or at least 2, for a standard error, not 1"),
        ({"update_model_card": True}, r"`update_model_card` needs a model card, nowhere.README\.md"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate.EvaluateConfig("nowhere", **arguments)


def test_the_statistics_library_is_asked_for_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="`pip install torch-fidelity`"):
        evaluate.evaluate(evaluate.EvaluateConfig("nowhere"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_images": 64},
            "`num_images`: 64 images are too few for 64 features, whose covariance needs at least 65",
        ),
        ({"max_reference_images": 100}, "`reference_split`: 50 images are too few"),
        ({"max_reference_images": 200, "held_out_split": "train[:50]"}, "`held_out_split`: 50 images are too few"),
        ({"train_data_dir": "data"}, r"'train' has images of shape \(3, 8, 8\), and the network draws \(1, 28, 28\)"),
        ({"reference_split": "nowhere"}, "nowhere"),
        ({"class_labels": (1,), "max_reference_images": 200, "num_images": 66}, "`class_labels` are for a class-cond"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(tmp_path, pipeline, colored, arguments, message):
    if "train_data_dir" in arguments:
        arguments = {"train_data_dir": str(colored / "data")}
    with pytest.raises(ValueError, match=message):
        run(pipeline, tmp_path, **arguments)
    assert not list(tmp_path.glob("samples/*.safetensors"))


def test_the_runs_own_data_and_features_that_fit_are_the_default(tmp_path, colored, capsys):
    folder = tmp_path / "pipeline"
    shutil.copytree(colored / "pipeline", folder)
    quick = {"num_images": 129, "num_inference_steps": 2, "loss_images": 0, "branch_images": 0}
    # nothing says what it was trained on
    message = (
        r"^The pipeline draws images of 8×8 pixels and 3 channels, and its folder does not record what it was trained "
        r"on: name images like these with `train_data_dir` or `dataset_name`\. Features that fit: random, inception\.$"
    )
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", **quick)
    # a folder that has been moved
    recorded = {"train_data_dir": "elsewhere", "train_split": "train", "validation_split": None, "output_dir": "x"}
    (folder / "training_config.json").write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match="trained on 'elsewhere', which is not a folder here: name it with `train_da"):
        run(folder, tmp_path / "out", **quick)
    recorded |= {"train_data_dir": str(colored / "all"), "validation_split": "test"}
    for split in ("train", "test"):  # enough for 128 features
        for source in (colored / "data" / split).iterdir():
            for i, path in enumerate(source.iterdir()):
                for flipped in (False, True):
                    target = colored / "all" / split / source.name / f"{i}-{flipped}.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    image = Image.open(path)
                    (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image).save(target)
    (folder / "training_config.json").write_text(json.dumps(recorded))
    capsys.readouterr()
    metrics = run(folder, tmp_path / "out", **quick)
    said = capsys.readouterr().out
    assert "Compared with what the pipeline was trained on: 'train' of all." in said
    assert "Features: 128 of random convolutions, of mean variance 1 over the reference; others: random, incep" in said
    data = metrics["data"]
    assert (data["name"], data["reference_split"], data["held_out_split"]) == ("all", "train", "test")
    assert (data["num_reference"], data["num_held_out"]) == (240, 129)
    # right values: those of the library, and far from an untrained network's noise
    dataset = load_training_data(train_data_dir=recorded["train_data_dir"], split="train")
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    features = RandomFeatures(3, 8)(decode_images(dataset.select(order.tolist()))).double()
    samples = load_file(tmp_path / "out" / "samples" / "00000000-00000100.safetensors")["images"]
    rest = load_file(tmp_path / "out" / "samples" / "00000100-00000129.safetensors")["images"]
    described = RandomFeatures(3, 8)(torch.cat([samples, rest])).double()
    mean, scale = features.mean(0), features.var(0).mean().sqrt()
    distance = frechet_distance((features - mean) / scale, (described - mean) / scale)
    assert metrics["samples"]["frechet_distance"] == pytest.approx(distance, rel=1e-3)
    assert metrics["samples"]["frechet_distance"] > 10 * metrics["floor"]["frechet_distance"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "**129 samples differ from real images" in report
    # settings on the command line come before what was recorded
    config = evaluate.EvaluateConfig(reference_split="test", resolution=8)
    source = evaluate.find_real_source(config, str(folder), (3, 8, 8))
    assert (source.reference_split, source.held_out_split, source.settings.resolution) == ("test", None, 8)


def test_what_bfloat16_would_save_is_said_before_a_long_run(tmp_path, pipeline, monkeypatch, capsys):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    times = itertools.cycle(range(0, 10**6, 30))  # seconds: each evaluation takes 30 s
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    config = evaluate.EvaluateConfig(str(pipeline), num_images=600, output_dir=str(tmp_path))
    evaluation = evaluate.Evaluation(config, Sampler(config))
    capsys.readouterr()
    evaluation.suggest_bfloat16()
    assert capsys.readouterr().out == ""  # nothing would be saved
    steps = iter([0, 30, 30, 60, 60, 90, 0, 15, 15, 30, 30, 45])
    monkeypatch.setattr("time.perf_counter", lambda: next(steps))
    evaluation.suggest_bfloat16()
    # 50 steps of 6 batches
    text = "The network's evaluations will take about 150 minutes; --dtype bfloat16 would save about 75 of them"
    assert text in capsys.readouterr().out
    assert evaluation.pipe.unet.dtype == torch.float32


def test_a_full_disk_keeps_the_batches_and_says_how_to_go_on(tmp_path, pipeline, monkeypatch):
    kept = importlib.import_module("ncsn_diffusers.kept_batches")
    save_file, number = kept.save_file, []

    def fail_third(tensors, path):
        number.append(path)
        if len(number) == 3:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr(kept, "save_file", fail_third)
    message = (
        r"samples.00000040-00000060\.safetensors could not be written: No space left on device\. Make room and start "
        r"the same command again: it goes on where it stopped\.$"
    )
    with pytest.raises(OSError, match=message):
        run(pipeline, tmp_path, **ARGUMENTS)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "00000000-00000020.safetensors",
        "00000020-00000040.safetensors",
        "settings.json",
    ]


def test_the_two_branches_of_a_class_conditional_network_are_compared(tmp_path):
    unet = small_unet(sample_size=28, num_class_embeds=11)
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    arguments = ARGUMENTS | {"bits_per_dim": 0, "loss_images": 0, "posterior": ()}
    metrics = run(tmp_path / "pipeline", tmp_path / "out", branch_images=3, **arguments)
    found = metrics["branches"]
    assert (found["number"], found["most"]) == (3, pytest.approx(math.log(10)))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipe(class_labels=[0, 1, 2], num_inference_steps=2, generator=generators, output_type="pt").images
    x, sigmas = to_model_range(to_uint8(images)), np.geomspace(0.01, 50, 40)
    generators = [torch.Generator().manual_seed(NOISE_SEED + i) for i in range(3)]
    noise = torch.stack([torch.randn(40, 1, 28, 28, generator=g) for g in generators], 1)
    ratios = log_class_ratio(pipe.denoise, x, torch.arange(3), sigmas, noise)
    assert found["mean_log_class_ratio"] == pytest.approx(ratios.mean().item(), rel=1e-3, abs=1e-3)
    assert "## With and without a class" in (tmp_path / "out" / "report.md").read_text()


def test_a_class_without_an_image_in_a_split(monkeypatch):
    pixels = [Image.new("L", (8, 8), 100 * label) for label in (0, 2)]
    splits = {
        "train": Dataset.from_dict(
            {"image": pixels, "kind": [0, 2]}, Features({"image": Picture(), "kind": Value("int64")})
        ),
        "test": Dataset.from_dict(
            {"image": pixels[1:], "kind": [2]}, Features({"image": Picture(), "kind": Value("int64")})
        ),
    }
    monkeypatch.setattr(evaluate, "load_training_data", lambda name, config, folder, split: splits[split])
    config = evaluate.EvaluateConfig(
        "pipeline", dataset_name="mine", reference_split="train", held_out_split="test", label_column="kind"
    )
    source = evaluate.RealSource(config, "train", "test")
    real = evaluate.load_real_images(config, source, Accelerator(cpu=True), (1, 8, 8), num_classes=3)
    assert real.class_names == ["0", "1", "2"]
    assert (100 * real.labels == real.reference.flatten(1)[:, 0]).all() and sorted(real.labels.tolist()) == [0, 2]


def test_digit_features_of_other_images(tmp_path, colored):
    arguments = {"train_data_dir": str(colored / "data"), "num_images": 40}
    message = (
        r"`features`='digits' do not fit images of shape \(3, 8, 8\) \(channels, height, width\), but random, incep"
    )
    with pytest.raises(ValueError, match=message):
        run(colored / "pipeline", tmp_path, features="digits", **arguments)


def test_gray_images_of_28_pixels_that_are_no_digits(tmp_path, pipeline, capsys):
    """Digits under names of clothes, one along: the digits' classifier is neither the default nor taken."""
    digits = load_training_data().select(range(300))
    names = [f"garment {k}" for k in range(10)]
    features = Features({"image": Picture(), "label": ClassLabel(names=names)})
    columns = {"image": digits["image"][:], "label": [(label + 1) % 10 for label in digits["label"]]}
    (tmp_path / "clothes").mkdir()
    Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "clothes" / "train.parquet"))
    arguments = {"dataset_name": str(tmp_path / "clothes"), "num_images": 140, "num_inference_steps": 1}
    arguments |= {"loss_images": 0, "max_reference_images": 300, "batch_size": 70}
    with pytest.raises(
        ValueError, match=r"`features`='digits' name only \d% of the reference's images as their labels"
    ):
        run(pipeline, tmp_path / "out", features="digits", **arguments)
    assert "random convolutions" in run(pipeline, tmp_path / "out", **arguments)["features"]
    assert "Features: 128 of random convolutions" in capsys.readouterr().out

    weights = load_digit_classifier().state_dict()
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name].roll(1, 0).contiguous()
    save_file(weights, tmp_path / "clothes.safetensors")
    found = run(pipeline, tmp_path / "out", features=str(tmp_path / "clothes.safetensors"), **arguments)
    assert found["features"] == "64 of the classifier clothes.safetensors"
    files = sorted((tmp_path / "out" / "samples").glob("*.safetensors"))
    samples = torch.cat([load_file(path)["images"] for path in files])
    shares = class_shares(load_digit_classifier()(samples).argmax(1), 10).tolist()
    given = found["class_shares"]["samples"]
    assert [given[f"garment {(k + 1) % 10}"] for k in range(10)] == pytest.approx(shares)

    (tmp_path / "other.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"other.safetensors' does not hold a classifier that"):
        run(pipeline, tmp_path / "out", features=str(tmp_path / "other.safetensors"), **arguments)
    with pytest.raises(
        ValueError, match="`features` must be digits, fashion, random, inception or the file of a classifier, no"
    ):
        evaluate.EvaluateConfig("pipeline", features="nowhere.safetensors")


def test_a_measurement_that_does_not_fit_is_refused_before_anything_is_drawn(monkeypatch, tmp_path, colored):
    monkeypatch.setattr(evaluate, "InceptionFeatures", Means)
    unet = small_unet(channels=3, out_channels=3, sample_size=10)
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    arguments = {"train_data_dir": str(colored / "data"), "resolution": 10, "num_images": 40, "features": "inception"}
    with pytest.raises(ValueError, match="`pixelated` needs height and width in multiples of 4, not 10 × 10 pixels"):
        run(tmp_path / "pipeline", tmp_path, posterior=("blurred", "pixelated"), **arguments)
    assert not (tmp_path / "samples").exists()


def test_the_settings_name_every_operator():
    assert get_args(OperatorName) == tuple(OPERATORS)


def test_errors_on_the_command_line(monkeypatch, tmp_path, pipeline):
    (tmp_path / "empty").mkdir()
    arguments = [str(pipeline), "--train_data_dir", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^ncsn-diffusers evaluate: .*empty"):
        main(arguments, "ncsn-diffusers evaluate")


def test_the_noise_of_measurements_is_not_that_of_a_chain():
    config = evaluate.EvaluateConfig("nowhere", seed=3)
    noise = evaluate.measure(config, torch.zeros(4, 1, 28, 28), lambda x: x, 1.0)
    chains = torch.stack([torch.randn((1, 28, 28), generator=torch.Generator().manual_seed(3 + i)) for i in range(4)])
    correlations = (noise.flatten(1) @ chains.flatten(1).T) / 784
    assert correlations.abs().max() < 5 / 28  # five standard errors
