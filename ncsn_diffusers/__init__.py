"""Noise Conditional Score Networks for Hugging Face diffusers."""

from importlib.metadata import version

import diffusers

from .denoiser import NCSNDenoiser
from .hub.loading import NCSNPipeline
from .networks_ncsn import LevelUNet2DModel, RefineNet2DModel, SkipUNet2DModel
from .networks_nd import GaussianResidualModel, UNetNDModel
from .pipeline_ncsn_inpaint import NCSNInpaintPipeline
from .pipeline_ncsn_posterior import NCSNPosteriorPipeline
from .pretrained import pretrained
from .scheduling_annealed_langevin import AnnealedLangevinScheduler

# diffusers looks classes up by name in its own module: schedulers for `scheduler.compatibles`, and for the rule that a
# swap drops a known scheduler's own keys without a warning; pipelines and networks for
# `DiffusionPipeline.from_pretrained`.
for _class in (
    AnnealedLangevinScheduler,
    GaussianResidualModel,
    LevelUNet2DModel,
    NCSNInpaintPipeline,
    NCSNPipeline,
    NCSNPosteriorPipeline,
    RefineNet2DModel,
    SkipUNet2DModel,
    UNetNDModel,
):
    setattr(diffusers, _class.__name__, _class)

__version__ = version("ncsn_diffusers")

__all__ = [
    "AnnealedLangevinScheduler",
    "GaussianResidualModel",
    "LevelUNet2DModel",
    "NCSNDenoiser",
    "NCSNInpaintPipeline",
    "NCSNPipeline",
    "NCSNPosteriorPipeline",
    "RefineNet2DModel",
    "SkipUNet2DModel",
    "UNetNDModel",
    "pretrained",
]
