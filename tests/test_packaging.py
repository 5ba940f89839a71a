"""What the sdist and the wheel hold."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "docs", "ncsn_diffusers", "scripts", "tests")
FILES = ("CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "ncsn_diffusers_cli.py", "pyproject.toml")
BUILD = """
from setuptools import build_meta

build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


@pytest.mark.slow  # installs setuptools, from the package index
def test_sdist_and_wheel(tmp_path):
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    source = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "setuptools", "setuptools>=77"]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "setuptools")}
    result = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "is absent from the `packages` configuration" not in result.stdout + result.stderr

    with tarfile.open(next((tmp_path / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert source <= names

    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert names == {name for name in source if name.startswith("ncsn_diffusers/")} | {"ncsn_diffusers_cli.py"}
    assert "ncsn_diffusers/py.typed" in names
    # and it works without the repository
    code = (
        "from ncsn_diffusers import *; pipe = NCSNPipeline.from_pretrained(pretrained('mnist')); print(pipe.unet.dtype)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "dist", env=environment, capture_output=True, text=True
    )
    assert result.stdout == "torch.float32\n", result.stderr
