"""Noise Conditional Score Networks for Hugging Face diffusers."""

import diffusers

from .pipeline_ncsn import NCSNPipeline
from .pipeline_ncsn_inpaint import NCSNInpaintPipeline
from .pretrained import pretrained
from .scheduling_annealed_langevin import AnnealedLangevinScheduler

# diffusers looks schedulers up by name in its own module: `scheduler.compatibles`, and the rule that a swap drops a
# known scheduler's own keys without a warning.
diffusers.AnnealedLangevinScheduler = AnnealedLangevinScheduler

__all__ = ["AnnealedLangevinScheduler", "NCSNInpaintPipeline", "NCSNPipeline", "pretrained"]
