"""
What older versions have left goes on working: saved pipelines, checkpoints, published repositories, imports.

assets/b1b09e3 was made by that commit: `run` is the folder of a training of 4 steps when its checkpoint at step 2 was
complete, `pipeline` is what came out of it, `repository` is what `collect_files` made of that, and expected.json holds
what that commit drew with it and how its training ended; "inpainted" is of the present inpainting, which draws others.
"""

import importlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file

from ncsn_diffusers import NCSNInpaintPipeline, NCSNPipeline
from ncsn_diffusers.training import TrainingConfig, train

OLDER = Path(__file__).parent / "assets" / "b1b09e3"
EXPECTED = json.loads((OLDER / "expected.json").read_text())
# The same arithmetic on another machine or torch differs by float32's roundings, which three steps hardly enlarge.
TOLERANCE = {"rtol": 0, "atol": 2e-3}


def draw(pipe, **arguments):
    """The first four values of the last image's middle row."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "output_type": "latent", **arguments}
    return pipe(generator=torch.Generator().manual_seed(0), **arguments).images[-1, 0, 4, :4]


def check(values, name):
    torch.testing.assert_close(values, torch.tensor(EXPECTED[name]), **TOLERANCE)


@pytest.mark.parametrize("source", ["pipeline", "repository"])
def test_saved_pipeline_draws_the_same(source):
    image = Image.open(OLDER / "images/left/0.png")
    pipe = NCSNPipeline.from_pretrained(OLDER / source)
    check(draw(pipe), "annealed")
    check(draw(pipe, class_labels=[0, 1], guidance_scale=2.0), "guided")
    check(draw(pipe, image=image, strength=0.5), "image to image")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    check(draw(pipe), "DDIM")
    inpaint = NCSNInpaintPipeline.from_pretrained(OLDER / source)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[4:] = 255
    check(draw(inpaint, image=image, mask_image=Image.fromarray(mask)), "inpainted")


def test_published_repository_runs_its_own_code(hub, tmp_path):
    hub.publish("ann/digits", OLDER / "repository")
    program = """
    import sys
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("ann/digits", trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
    assert "ncsn_diffusers" not in sys.modules
    images = pipe(num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    print(images[-1, 0, 4, :4].tolist())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    check(torch.tensor(json.loads(result.stdout)), "annealed")
    check(draw(NCSNPipeline.from_pretrained("ann/digits")), "annealed")


def test_training_goes_on_from_a_checkpoint(tmp_path, monkeypatch, capfd):
    for name in ("run", "images"):
        shutil.copytree(OLDER / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    recorded = json.loads(Path("run/training_config.json").read_text())
    pipe = train(TrainingConfig(**{**recorded, "resume_from_checkpoint": "latest"}))
    assert "Going on from run/checkpoint-2" in capfd.readouterr().out
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert losses == pytest.approx(dict(zip((2, 4), EXPECTED["losses"], strict=True)), abs=1e-4)
    # as the run ended that was not cut in two
    for name, weight in load_file(OLDER / "pipeline/unet/diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(pipe.unet.state_dict()[name], weight, rtol=0, atol=1e-4, msg=name)
    check(draw(NCSNPipeline.from_pretrained("run")), "annealed")


NAMES = {
    "ncsn_diffusers": ("AnnealedLangevinScheduler", "NCSNInpaintPipeline", "NCSNPipeline", "pretrained"),
    "ncsn_diffusers.evaluation": (
        *("DIGIT_CLASSIFIER", "DigitClassifier", "InceptionFeatures", "class_entropy", "class_shares"),
        *("extract_features", "frechet_distance", "kernel_distance", "load_digit_classifier", "nearest_neighbours"),
        *("precision_recall", "to_uint8"),
    ),
    "ncsn_diffusers.hub": ("VARIANTS", "BackgroundPush", "collect_files", "make_model_card", "push_to_hub"),
    "ncsn_diffusers.likelihood": ("bits_per_dim", "log_likelihood", "loss_per_level", "score_error"),
    "ncsn_diffusers.noise_levels": ("choose_num_train_timesteps", "choose_sigma_max", "choose_step_size"),
    "ncsn_diffusers.pipeline_ncsn": ("NCSNPipeline",),
    "ncsn_diffusers.pipeline_ncsn_inpaint": ("NCSNInpaintPipeline",),
    "ncsn_diffusers.scheduling_annealed_langevin": ("AnnealedLangevinScheduler",),
    "ncsn_diffusers.score_matching": ("denoise", "draw_timesteps", "score_matching_loss", "stratified"),
    "ncsn_diffusers.training": ("Trainer", "TrainingConfig", "make_unet", "train"),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_they_were(module):
    missing = [name for name in NAMES[module] if not hasattr(importlib.import_module(module), name)]
    assert not missing
