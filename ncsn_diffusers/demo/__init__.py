"""A page in the browser to try a pipeline: draw, inpaint, restore, compare schedulers. It needs the extra `demo`."""

from .chains import Chains
from .page import make_page
from .server import launch, serve

__all__ = ["Chains", "launch", "make_page", "serve"]
