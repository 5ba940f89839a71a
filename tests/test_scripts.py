"""The scripts, run as a user runs them. The slow tests judge digits that the default command learned to draw."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from forked import run_forked
from networks import small_unet
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline
from ncsn_diffusers.evaluation import extract_features, load_digit_classifier
from ncsn_diffusers.foreign_configs import SCHEDULERS

ROOT = Path(__file__).parent.parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def run(*command, cwd, **environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(32):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


SMALL = [
    *("--block_out_channels", 16, 16),
    *("--train_batch_size", 8),
    *("--eval_batch_size", 4),
    *("--num_epochs", 2),
    *("--output_dir", "out"),
]


@pytest.mark.parametrize("start", [run_forked, partial(run, *ACCELERATE, "--cpu", "--num_processes", "1")])
def test_train_from_a_folder(tmp_path, images, start):
    result = start(ROOT / "scripts/train_ncsn.py", "--train_data_dir", images, *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8/8" in result.stderr  # the progress bar, with the loss
    assert "loss=" in result.stderr
    assert {"samples.png", "loss.png", "model_index.json"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert NCSNPipeline.from_pretrained(tmp_path / "out").unet.config.block_out_channels == [16, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prediction_type", "noise"], "--prediction_type must be one of v_prediction"),
        (["--train_data_dir", "nowhere"], "--train_data_dir='nowhere' is not a folder"),
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--num_epochs", "many"], "many"),
    ],
)
def test_bad_flags(tmp_path, arguments, message):
    result = run_forked(ROOT / "scripts/train_ncsn.py", *arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert message in " ".join((result.stdout + result.stderr).split())


@pytest.fixture(scope="module")
def small_pipeline(tmp_path_factory):
    unet = small_unet()
    folder = tmp_path_factory.mktemp("pipeline")
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(folder)
    return folder


def test_benchmark_overhead(tmp_path, small_pipeline):
    arguments = ["--batch_size", 2, "--num_inference_steps", 3, "--repeats", 2]
    result = run_forked(ROOT / "scripts/benchmark.py", "overhead", small_pipeline, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"^ratio +(\S+)", result.stdout, re.MULTILINE)[1]) > 0


@pytest.mark.slow
def test_benchmark_schedulers(tmp_path, small_pipeline):
    result = run_forked(ROOT / "scripts/benchmark.py", "schedulers", small_pipeline, "--num_images", 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "schedulers.png").width > 300


# --- Quality, slow ---


@pytest.fixture(scope="module")
def digits_pipeline(tmp_path_factory):
    """What NCSN_PIPELINE names, or what the default command makes."""
    folder = os.environ.get("NCSN_PIPELINE")
    if folder is None:
        cwd = tmp_path_factory.mktemp("default")
        result = run(*ACCELERATE, ROOT / "scripts/train_ncsn.py", cwd=cwd)
        assert result.returncode == 0, result.stderr
        folder = cwd / "ncsn-mnist"
    return NCSNPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def classifier():
    return load_digit_classifier()


def draw(pipe, count, **arguments):
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [pipe(batch_size=50, generator=generator, output_type="pt", **arguments).images for _ in range(count // 50)]
    )


def check_readable(pipe, classifier, count, at_least, **arguments):
    """How many of each digit there are, once the classifier is sure enough; `pytest -rP` shows the figures."""
    pipe.set_progress_bar_config(disable=True)
    sureness, digits = extract_features(draw(pipe, count, **arguments), classifier).softmax(1).max(1)
    sureness, counts = sureness.mean().item(), digits.bincount(minlength=10).tolist()
    print(f"classifier {sureness:.1%} sure on average; of {count}, digits 0 to 9: {counts}")
    assert sureness > at_least
    return counts


@pytest.mark.slow
def test_default_command_draws_readable_digits(digits_pipeline, classifier):
    counts = check_readable(digits_pipeline, classifier, 500, at_least=0.75)
    assert min(counts) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("noise_rule", "levels"), [("consistent", 50), ("euler_maruyama", 232)])
def test_both_noise_rules_draw_readable_digits(digits_pipeline, classifier, noise_rule, levels):
    config = digits_pipeline.scheduler.config
    scheduler = AnnealedLangevinScheduler.from_config(config, noise_rule=noise_rule, num_langevin_steps=2)
    pipe = NCSNPipeline(digits_pipeline.unet, scheduler)
    check_readable(pipe, classifier, 50, at_least=0.7, num_inference_steps=levels)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_stock_schedulers_draw_readable_digits(digits_pipeline, classifier, name):
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    pipe = NCSNPipeline(digits_pipeline.unet, getattr(diffusers, name).from_config(digits_pipeline.scheduler.config))
    check_readable(pipe, classifier, 50, at_least=0.7, num_inference_steps=50)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_stock_pipelines_draw_readable_digits(digits_pipeline, classifier, name):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(digits_pipeline.scheduler.config)
    pipe = getattr(diffusers, f"{name}Pipeline")(digits_pipeline.unet, scheduler)
    check_readable(pipe, classifier, 50, at_least=0.7, num_inference_steps=50)
