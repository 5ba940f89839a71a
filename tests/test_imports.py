"""Importing the package changes nothing for whoever imports it."""

import subprocess
import sys


def test_importing_sets_nothing_global():
    program = """
import importlib, pkgutil, sys
import matplotlib
import torch

matplotlib.use("svg")
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
import ncsn_diffusers

for module in pkgutil.iter_modules(ncsn_diffusers.__path__):
    importlib.import_module(f"ncsn_diffusers.{module.name}")
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules
after = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
assert after == before, (before, after)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
