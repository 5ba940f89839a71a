"""Noise Conditional Score Networks for Hugging Face diffusers."""

import diffusers

from .denoiser import NCSNDenoiser
from .hub.loading import NCSNPipeline
from .pipeline_ncsn_inpaint import NCSNInpaintPipeline
from .pipeline_ncsn_posterior import NCSNPosteriorPipeline
from .pretrained import pretrained
from .scheduling_annealed_langevin import AnnealedLangevinScheduler

# diffusers looks classes up by name in its own module: schedulers for `scheduler.compatibles`, and for the rule that a
# swap drops a known scheduler's own keys without a warning; pipelines for `DiffusionPipeline.from_pretrained`.
for _class in (AnnealedLangevinScheduler, NCSNInpaintPipeline, NCSNPipeline, NCSNPosteriorPipeline):
    setattr(diffusers, _class.__name__, _class)

__all__ = [
    "AnnealedLangevinScheduler",
    "NCSNDenoiser",
    "NCSNInpaintPipeline",
    "NCSNPipeline",
    "NCSNPosteriorPipeline",
    "pretrained",
]
