"""
A pipeline that format 1 has saved goes on loading, and draws the same numbers.

assets/format_1 holds a class-conditional network of 4 × 4 pixels as `save_pretrained` wrote it, and drawings.json what
was drawn with it. New formats get a folder of their own; this one stays as it is.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from ncsn_diffusers import NCSNInpaintPipeline, NCSNPipeline
from ncsn_diffusers.hub import collect_files

FOLDER = Path(__file__).parent / "assets" / "format_1"
IMAGE = Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4))
MASK = Image.fromarray(np.repeat(np.array([[0], [0], [255], [255]], dtype=np.uint8), 4, axis=1))
DRAWINGS = {
    "of a class": {},
    "guided": {"guidance_scale": 2.0},
    "20 steps": {"num_inference_steps": 20},
    "image to image": {"image": IMAGE, "strength": 0.5},
    "DDIM": {"scheduler": DDIMScheduler},
    "inpainted": {"pipeline_class": NCSNInpaintPipeline, "image": IMAGE, "mask_image": MASK},
}


def draw(name: str, folder: Path = FOLDER) -> torch.Tensor:
    arguments = {**DRAWINGS[name]}
    pipe = arguments.pop("pipeline_class", NCSNPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if "scheduler" in arguments:
        pipe.scheduler = arguments.pop("scheduler").from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[0, 1], generator=generator, output_type="latent", **arguments).images


@pytest.mark.parametrize("name", DRAWINGS)
def test_it_draws_the_same(name):
    expected = torch.tensor(json.loads((FOLDER / "drawings.json").read_text())[name])
    torch.testing.assert_close(draw(name), expected, rtol=0, atol=1e-5)


def test_it_is_published_and_saved_again(tmp_path):
    for name, content in collect_files(FOLDER, "ann/older").items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    NCSNPipeline.from_pretrained(FOLDER).save_pretrained(tmp_path / "saved")
    expected = draw("of a class")
    for folder in ("repository", "saved"):
        torch.testing.assert_close(draw("of a class", tmp_path / folder), expected, rtol=0, atol=1e-6)
