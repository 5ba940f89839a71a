"""What the sdist and the wheel hold, and what somebody can do who has installed the wheel and has no clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "docs", "ncsn_diffusers", "scripts", "tests")
FILES = ("CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "ncsn_diffusers_cli.py", "pyproject.toml")
BUILD = """
from setuptools import build_meta

build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


def build(folder):
    """Build the sdist and the wheel from a copy of the repository in `folder`; what is printed."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder / "setuptools", "setuptools>=77"]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": str(folder / "setuptools")}
    result = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout + result.stderr


@pytest.mark.slow  # installs setuptools, from the package index
def test_sdist_and_wheel(tmp_path):
    printed = build(tmp_path)
    source = {
        path.relative_to(tmp_path).as_posix()
        for name in (*FOLDERS, *FILES)
        for path in [tmp_path / name, *(tmp_path / name).rglob("*")]
        if path.is_file()
    }
    assert "is absent from the `packages` configuration" not in printed

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


@pytest.mark.slow  # installs setuptools, from the package index
def test_a_strangers_path(tmp_path):
    """The wheel in a new environment outside any clone: draw, train, evaluate, resume."""
    pytest.importorskip("torch_fidelity")
    (tmp_path / "source").mkdir()
    build(tmp_path / "source")
    venv.create(tmp_path / "environment", with_pip=True)
    scripts = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*command):
        result = subprocess.run(
            [str(word) for word in (scripts / command[0], *command[1:])],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    wheel = next((tmp_path / "source" / "dist").glob("*.whl"))
    run("pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    # The dependencies are those of this environment: its editable installs do not reach through such a path.
    packages = Path(run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run("python", "-c", "import ncsn_diffusers; print(ncsn_diffusers.__file__)").strip()
    assert Path(found) == packages / "ncsn_diffusers" / "__init__.py"

    run("ncsn-diffusers", "sample", "--num_images", 4, "--num_inference_steps", 5)
    assert Image.open(folder / "samples" / "samples.png").size == (622, 622)  # 2 × 2 digits, 11 pixels a pixel

    train = ("train", "--block_out_channels", 8, 8, "--checkpointing_steps", 10, "--output_dir", "run")
    run("ncsn-diffusers", *train, "--max_train_steps", 20)
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in log if "loss" in record) == 20

    few = ("--num_images", 66, "--batch_size", 33, "--num_inference_steps", 2, "--max_reference_images", 200)
    run("ncsn-diffusers", "evaluate", "run", *few, "--loss_images", 0)
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert metrics["samples"]["number"] == 66 and metrics["samples"]["frechet_distance"] > 0

    module = ("python", "-m", "accelerate.commands.launch", "-m", "ncsn_diffusers.commands.train", *train[1:])
    printed = run(*module, "--max_train_steps", 25, "--resume_from_checkpoint", "latest")
    assert "checkpoint-20" in printed
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in log if "loss" in record) == 25
