"""
A page in the browser to try a pipeline: draw, inpaint, restore, measure, compare schedulers. It needs the extra `demo`.
"""

from .chains import Chains
from .fields import FieldChains
from .page import make_page
from .server import launch, serve

__all__ = ["Chains", "FieldChains", "launch", "make_page", "serve"]
