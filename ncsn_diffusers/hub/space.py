"""
The files of a Gradio Space that shows the demo page of a published pipeline.

They stand alone: this package is on no index, so that the modules that the page imports go along, as an installed
package has them, and requirements.txt names the packages that these import.
"""

import ast
import json
import re
from importlib.metadata import distribution
from pathlib import Path

GRADIO = "6.31.0"  # the version that the page was made with, which the extra `demo` asks for at least
PACKAGE = Path(__file__).parent.parent
# Of the package's dependencies, those that these modules import.
REQUIREMENTS = (
    *("accelerate", "diffusers", "huggingface_hub", "matplotlib", "numpy", "pillow", "safetensors", "torch", "tqdm"),
    "tyro",
)


def collect_space_files(repo_id: str, license: str | None = None) -> dict[str, bytes | Path]:
    """
    The files of a Space, by their paths in it: contents, or where they are.

    Args:
        repo_id (`str`): of the pipeline, whose name the Space takes.
        license (`str`, *optional*): of the weights, for the Space's card.
    """
    installed = distribution("ncsn_diffusers")
    files: dict[str, bytes | Path] = {}
    for path in sorted(_find_imported(PACKAGE / "demo" / "__init__.py")):
        files[f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}"] = path
    # by which the package knows its version
    metadata = f"Metadata-Version: 2.1\nName: {PACKAGE.name}\nVersion: {installed.version}\n"
    files[f"{PACKAGE.name}-{installed.version}.dist-info/METADATA"] = metadata.encode()
    files["app.py"] = _make_app(repo_id).encode()
    files["requirements.txt"] = _make_requirements(installed.requires or []).encode()
    files["README.md"] = _make_card(repo_id, license).encode()
    return files


def _find_imported(path: Path, found: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """`found` with a module of the package and all of the package's that it imports, however deep."""
    found |= {path}
    parent = path.parent if path.name != "__init__.py" else path.parent.parent
    near = [parent / "__init__.py"] if parent.is_relative_to(PACKAGE) else []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for module in (source, *(source / alias.name for alias in node.names)):
                near += [module.with_suffix(".py"), module / "__init__.py"]
    for module in near:
        if module not in found and module.is_file():
            found = _find_imported(module, found)
    return found


def _make_app(repo_id: str) -> str:
    return f'''"""The demo page of {repo_id}: `pip install -r requirements.txt`, then `python app.py`."""

from ncsn_diffusers.demo import launch

if __name__ == "__main__":
    launch({json.dumps(repo_id)})
'''


def _make_requirements(requires: list[str]) -> str:
    bounds = {re.match(r"[\w.-]+", line)[0].lower(): line for line in requires if "extra ==" not in line}
    lines = [bounds.get(name, name) for name in REQUIREMENTS]
    return "\n".join([*lines, f"gradio=={GRADIO}"]) + "\n"


def _make_card(repo_id: str, license: str | None) -> str:
    # quoted as in JSON, which YAML contains: a name may look like a number or a truth value
    terms = [f"license: {json.dumps(license)}"] if license else []
    data = [
        f"title: {json.dumps(repo_id.split('/')[-1])}",
        "emoji: 🎲",
        "colorFrom: yellow",
        "colorTo: red",
        "sdk: gradio",
        f"sdk_version: {GRADIO}",
        "app_file: app.py",
        *terms,
        f"models:\n- {json.dumps(repo_id)}",
    ]
    text = f"""Draws samples, from nothing or from what is left of one, with the noise conditional score network
[{repo_id}](https://huggingface.co/{repo_id}).

It also runs on your own computer: download the files of this Space, `pip install -r requirements.txt`, and
`python app.py`. Nothing that is uploaded to the page is kept.
"""
    return "---\n" + "\n".join(data) + "\n---\n\n" + text
