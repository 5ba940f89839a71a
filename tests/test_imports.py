"""
Imports point down, without circles, as pyproject.toml's contracts for import-linter have it; what is uploaded runs
without the package; importing the package changes nothing for whoever imports it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "ncsn_diffusers"
UPLOADED = ("networks_ncsn", "networks_nd", "pipeline_ncsn", "scheduling_annealed_langevin")
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint(folder: Path) -> tuple[int, str]:
    """Exit status and words of import-linter for the package in a folder, beside its pyproject.toml."""
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LINT], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout + result.stderr


def find_ancestors_imported(graph: grimp.ImportGraph) -> list[str]:
    """
    Modules that import a name from the `__init__.py` of a package that they are in, as sentences. Contracts of
    import-linter take a package's `__init__.py` for the whole of the package, or leave it out.
    """
    return [
        f"{module} imports {imported}"
        for module in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(module))
        if module.startswith(f"{imported}.")
    ]


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(PACKAGE, include_external_packages=True, cache_dir=None)


def test_imports_point_down_without_circles(graph):
    status, words = lint(ROOT)
    assert status == 0, words
    assert find_ancestors_imported(graph) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("hub/upload.py", "from ..training import train", "ncsn_diffusers.hub.upload -> ncsn_diffusers.training"),
        ("images.py", "def f():\n    from . import data", "ncsn_diffusers.images -> ncsn_diffusers.data"),
        ("precision.py", "from .units import Units", "ncsn_diffusers.precision -> ncsn_diffusers.units"),
        ("hub/configs.py", "def f():\n    from .upload import push_to_hub", "No circles inside the packages BROKEN"),
        ("new.py", "", "ncsn_diffusers.new"),
    ],
)
def test_faults_are_found(tmp_path, file, line, fault):
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=lambda *_: {"assets", "__pycache__"})
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / PACKAGE / file, "a") as source:
        source.write(f"\n{line}\n")
    status, words = lint(tmp_path)
    assert status == 1
    assert fault in words


def test_imports_of_ancestors_are_found():
    graph = grimp.ImportGraph()
    graph.add_import(importer="package.hub.upload", imported="package")
    graph.add_import(importer="package.hub.configs", imported="package.hub")
    graph.add_import(importer="package.hub.loading", imported="package.hub.configs")
    assert find_ancestors_imported(graph) == [
        "package.hub.configs imports package.hub",
        "package.hub.upload imports package",
    ]


@pytest.mark.parametrize("name", UPLOADED)
def test_uploaded_files_need_no_package(graph, name):
    """An uploaded file imports siblings, which go along with it, and what an installation of diffusers has."""
    allowed = {"PIL", "diffusers", "huggingface_hub", "numpy", "torch", *sys.stdlib_module_names}
    for module in {f"{PACKAGE}.{name}"} | graph.find_upstream_modules(f"{PACKAGE}.{name}"):
        if module.startswith(f"{PACKAGE}."):
            assert module.count(".") == 1 and not graph.find_children(module), f"{module} is no sibling of {name}"
        else:
            assert module in allowed, f"{name} needs {module}"


def test_the_theory_imports_no_data_set_and_no_command_line_and_importing_sets_nothing_global():
    program = """
import importlib, pkgutil, sys
import torch

before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
import ncsn_diffusers.likelihood, ncsn_diffusers.noise_levels, ncsn_diffusers.score_matching
unneeded = {"datasets", "tyro", "matplotlib"} & set(sys.modules)
assert not unneeded, unneeded

import matplotlib

matplotlib.use("svg")
for module in pkgutil.walk_packages(ncsn_diffusers.__path__, "ncsn_diffusers."):
    importlib.import_module(module.name)
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules
after = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
assert after == before, (before, after)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
