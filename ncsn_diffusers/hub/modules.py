"""
The package's modules as files of a repository, from which diffusers loads them where the package is not installed.

A module goes along with its siblings, the modules that it imports by `from .name import …`, and with theirs. diffusers
copies them all into one folder and imports them by their files' names, whatever repository they are from. A file of a
known name is then run again inside the module that is there (0.42), or not at all (0.32). So that two repositories in
one process keep their own code, each name ends in a hash of what is in the file: `units_3f2a91c0`. A file that is
changed, or whose siblings are, has another name.
"""

import ast
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

_HASHED = re.compile(r"(\w+/)?\w+_[0-9a-f]{8}\.py")


def collect_module(path: Path) -> tuple[str, dict[str, bytes]]:
    """
    A module and its siblings, flat, as the files of one folder.

    Args:
        path (`Path`): the module's file, beside those of its siblings.

    Returns:
        `str`: the module's name in the repository.
        `dict[str, bytes]`: the contents by the files' names.

    Raises:
        ValueError: a module imports relatively in another way than `from .name import …`, or a circle of them.
    """
    modules: dict[str, tuple[str, str]] = {}
    _collect(path, modules, ())
    name, text = modules.pop(path.stem)
    # diffusers copies a module's own siblings only, and not theirs, from a folder
    others = sorted({sibling for sibling, _ in modules.values()} - set(_find_siblings(text, path)))
    text += "".join(f"from .{sibling} import __name__ as _  # for diffusers, to copy it\n" for sibling in others)
    files = {f"{sibling}.py": content.encode() for sibling, content in modules.values()}
    return name, {f"{name}.py": text.encode(), **files}


def is_module(path: str) -> bool:
    """Whether a file of a repository is one that [`collect_module`] has named."""
    return _HASHED.fullmatch(path) is not None


def _collect(path: Path, modules: dict[str, tuple[str, str]], importers: tuple[str, ...]) -> None:
    """Put the names in the repository and the texts of a module and of its siblings into `modules`."""
    if path.stem in importers:
        raise ValueError(f"{path.name} imports itself by way of {' and '.join(importers)}.")
    text = path.read_text(encoding="utf-8")
    siblings = _find_siblings(text, path)
    for sibling in siblings:
        if sibling not in modules:
            _collect(path.with_name(f"{sibling}.py"), modules, (*importers, path.stem))
    text = _rename(text, {sibling: modules[sibling][0] for sibling in siblings})
    modules[path.stem] = f"{path.stem}_{hashlib.sha256(text.encode()).hexdigest()[:8]}", text


def _find_siblings(text: str, path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                raise ValueError(f"{path.name}:{node.lineno}: {ast.unparse(node)} must read `from .name import …`.")
            names.append(node.module)
    return sorted(set(names))


def _rename(text: str, names: Mapping[str, str]) -> str:
    for name, new in names.items():
        text = re.sub(rf"^(\s*from\s+\.){name}(\s+import\b)", rf"\g<1>{new}\g<2>", text, flags=re.MULTILINE)
    return text
