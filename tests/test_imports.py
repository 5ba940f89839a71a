"""Imports point down, without circles; importing the package changes nothing for whoever imports it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "ncsn_diffusers"
# Modules and packages, from low to high. A module imports from lower layers and from its own entry, and nothing else.
LAYERS = (
    (
        *("atomic_files", "checked_files", "networks_ncsn", "operators", "precision", "pretrained"),
        *("scheduling_annealed_langevin", "units"),
    ),
    ("pipeline_ncsn",),
    ("images", "score_matching"),
    ("data", "dataset_settings", "likelihood", "noise_levels"),
    ("hub",),
    ("pipeline_ncsn_inpaint", "pipeline_ncsn_posterior", "denoiser", "convert"),
    ("",),  # the public names, in the package's own __init__.py
    ("settings",),
    ("sampling",),
    ("kept_batches",),
    ("demo", "evaluation", "sample_images", "training"),
    ("commands",),
)
UPLOADED = ("networks_ncsn", "pipeline_ncsn", "scheduling_annealed_langevin")


def find_modules(root: Path) -> dict[str, Path]:
    """The files of a package's modules by dotted name; that of a package is its `__init__.py`."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Lines and modules of the package that a module imports, wherever in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def resolve(level: int, name: str) -> str:
        if not level:
            return name
        parts = package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name])])

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve(node.level, node.module or "")
            found = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            *("importlib.import_module", "import_module", "__import__"),
        ):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                level = len(name.value) - len(name.value.lstrip("."))
                found = [resolve(level, name.value.lstrip("."))]
            elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):  # any that begins so
                start = name.values[0].value
                level = len(start) - len(start.lstrip("."))
                start = resolve(level, start.lstrip("."))
                found = [other for other in modules if other.startswith(start) and other != module]
            else:
                raise AssertionError(f"{module}:{node.lineno}: which module {ast.unparse(node)} means cannot be read")
        for name in found:
            if name.split(".")[0] != PACKAGE:
                continue
            if name not in modules:
                raise AssertionError(f"{module}:{node.lineno}: there is no module {name}")
            yield node.lineno, name


def find_unit(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return module.partition(".")[2].partition(".")[0]


def find_faults(root: Path) -> list[str]:
    """What in the package's imports is a circle or points upwards, as sentences."""
    modules = find_modules(root)
    heights = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}
    faults = [f"{module} is in no layer" for module in modules if find_unit(module) not in heights]
    if faults:
        return faults
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for line, name in find_imports(module, path, modules):
            unit, other = find_unit(module), find_unit(name)
            if unit != other and heights[other] >= heights[unit]:
                faults.append(f"{path.relative_to(root)}:{line}: {module} imports {name}, which does not lie below it")
            graph[module].add(name)
            # Python runs the packages around a module first; those that the importing one is in are running already
            parents = [name.rsplit(".", n)[0] for n in range(1, name.count("."))]
            graph[module].update(parent for parent in parents if not f"{module}.".startswith(f"{parent}."))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f"circle: {' imports '.join(reversed(error.args[1]))}")
    return faults


def test_imports_point_down_without_circles():
    faults = find_faults(ROOT)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", UPLOADED)
def test_uploaded_files_stand_alone(name):
    allowed = {"PIL", "diffusers", "huggingface_hub", "numpy", "torch", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((ROOT / PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            assert node.module.split(".")[0] in allowed, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("hub/upload.py", "from ..training import train", "hub.upload imports ncsn_diffusers.training, which does"),
        ("hub/upload.py", "import ncsn_diffusers.settings", "hub.upload imports ncsn_diffusers.settings, which does"),
        ("hub/upload.py", "from .. import NCSNPipeline", "hub.upload imports ncsn_diffusers, which does"),
        ("training/config.py", "from ..evaluation import metrics", "imports ncsn_diffusers.evaluation.metrics, which"),
        ("images.py", "def f():\n    from . import data", "images imports ncsn_diffusers.data, which does not"),
        ("images.py", "importlib.import_module('.hub.files', __package__)", "images imports ncsn_diffusers.hub.files"),
        ("images.py", "import_module(f'ncsn_diffusers.commands.{name}')", "imports ncsn_diffusers.commands.cli, which"),
        ("hub/configs.py", "def f():\n    from .upload import push_to_hub", "circle: ncsn_diffusers.hub."),
        ("hub/configs.py", "from . import push_to_hub", "circle: ncsn_diffusers.hub"),
        ("new.py", "", "ncsn_diffusers.new is in no layer"),
    ],
)
def test_faults_are_found(tmp_path, file, line, fault):
    for path in find_modules(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with open(tmp_path / PACKAGE / file, "a") as source:
        source.write(f"\n{line}\n")
    faults = find_faults(tmp_path)
    assert any(fault in found for found in faults), faults


@pytest.mark.parametrize("line", ["importlib.import_module(name)", "from .nowhere import thing"])
def test_imports_that_cannot_be_read(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    with pytest.raises(AssertionError, match=r"^ncsn_diffusers\.a:1: "):
        list(
            find_imports("ncsn_diffusers.a", tmp_path / "a.py", {"ncsn_diffusers": Path(), "ncsn_diffusers.a": Path()})
        )


def test_importing_sets_nothing_global():
    program = """
import importlib, pkgutil, sys
import matplotlib
import torch

matplotlib.use("svg")
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
import ncsn_diffusers

for module in pkgutil.walk_packages(ncsn_diffusers.__path__, "ncsn_diffusers."):
    importlib.import_module(module.name)
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules
after = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed()
assert after == before, (before, after)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
