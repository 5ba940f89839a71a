"""
What mkdocs.yml cannot say: the front page is README.md, links between the repository's files lead to pages of the site,
the API reference has a page for each group of modules, and references in docstrings become links.
"""

import posixpath
import re
import unicodedata
from html import unescape
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PACKAGE = "ncsn_diffusers"
# Pages of the API reference: titles, and the modules or objects on them.
API = {
    "pipelines": ("Pipelines", ("NCSNPipeline", "pipeline_ncsn_inpaint", "pipeline_ncsn_posterior", "pretrained")),
    "schedulers": ("Schedulers", ("scheduling_annealed_langevin", "ladder")),
    "networks": ("Networks", ("networks_ncsn", "networks_nd", "convert")),
    "denoisers": ("Denoisers", ("denoiser", "units", "resampling")),
    "operators": ("Measurements", ("operators", "measured", "twisted")),
    "training": ("Training", ("training", "score_matching", "noise_levels")),
    "evaluation": ("Evaluation", ("evaluation", "likelihood")),
    "hub": ("The Hub", ("hub",)),
}
WITHOUT_INHERITED = ("pipeline_ncsn_inpaint", "pipeline_ncsn_posterior")  # the page has NCSNPipeline's members once
_MODULES = {f"{PACKAGE}.{module}" for _, modules in API.values() for module in modules}
_LINK = re.compile(r"(?P<start>\]\(|<img src=\")(?P<link>[^)\s\"#]+)(?P<anchor>#[^)\s\"]*)?(?P<end>[)\"])")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\]")
# Entries of a docstring's sections: several arguments at once, on two lines; a type; what is returned.
_SEVERAL = re.compile(r"^( +)((?:\w+, )*\w+),\n\1(?=\w+[,:])", re.MULTILINE)
_ENTRY = re.compile(r"^( +\w+(?:, \w+)*) \((.+)\):", re.MULTILINE)
_RETURNED = re.compile(r"^((?:Returns|Yields):\n +)(`.+?):", re.MULTILINE)
_FORMULA = re.compile(
    r"<(?P<tag>code|pre|script|style)\b.*?</(?P=tag)>|(?P<mark>\$\$?)(?P<formula>.+?)(?P=mark)", re.DOTALL
)


# --- Pages and links ---


def find_target(link: str, page: Path) -> str | None:
    """The path in the repository that a page's link leads to, if it leads to one."""
    if ":" in link:
        return None
    return posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), link))


def find_links(page: Path) -> set[str]:
    """The paths in the repository that a page's links lead to."""
    prose = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return {target for found in _LINK.finditer(prose) if (target := find_target(found["link"], page))}


def to_site(target: str) -> str:
    """The path on the site of a file of the repository."""
    return "index.md" if target == "README.md" else target.removeprefix("docs/")


def is_code(target: str) -> bool:
    """Whether a link leads to the API reference, not to a file."""
    return target.startswith(f"{PACKAGE}/") and (target.endswith(".py") or (ROOT / target).is_dir())


def find_files() -> dict[str, Path]:
    """The pages, and the files that they lead to, by their paths on the site."""
    left = ["README.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    files = {}
    while left:
        target = left.pop()
        files[to_site(target)] = path = ROOT / target
        if path.suffix == ".md":
            left += [link for link in find_links(path) if not is_code(link) and to_site(link) not in files]
    return files


def on_files(files, config):
    for name, path in find_files().items():
        if files.get_file_from_path(name) is None:  # from outside docs/
            files.append(File.generated(config, name, content=path.read_bytes()))
    for name, (title, modules) in API.items():
        content = f"# {title}\n"
        for module in modules:
            content += f"\n::: {PACKAGE}.{module}\n"
            if module in WITHOUT_INHERITED:
                content += "    options:\n      inherited_members: false\n"
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    name = page.file.src_uri
    path = find_files().get(name)
    if path is None:
        return markdown
    if name == "index.md":
        page.meta["hide"] = ["toc"]  # a short tour, with wide lines of code

    def replace(found: re.Match) -> str:
        target = find_target(found["link"], path)
        if target is None:
            return found[0]
        if is_code(target):
            module = target.removesuffix(".py").replace("/", ".")
            while module not in _MODULES and "." in module:  # a package's page stands for its modules
                module = module.rpartition(".")[0]
            return f"][{module}]"
        link = posixpath.relpath(to_site(target), posixpath.dirname(name) or ".")
        return found["start"] + link + (found["anchor"] or "") + found["end"]

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(replace, part) for part in parts[::2]]
    return "".join(parts)


# --- The tutorial's formulas ---


def on_page_content(html, page, config, files):
    return _FORMULA.sub(_to_mathml, html) if page.file.src_uri.endswith(".ipynb") else html


def _to_mathml(found: re.Match) -> str:
    """A formula as browsers show it without scripts."""
    if found["tag"]:
        return found[0]
    formula = re.sub(r"\\tag\{(\w+)\}", r"\\quad\\text{(\1)}", unescape(found["formula"]))
    mathml = convert(formula, display="block" if found["mark"] == "$$" else "inline")
    mathml = mathml.replace("<mi>log</mi>", '<mspace width="0.167em" /><mi>log</mi><mspace width="0.167em" />')
    # browsers no longer know the other alphabets by an attribute
    return re.sub(
        r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>',
        lambda letter: f"<mi>{unicodedata.lookup(f'MATHEMATICAL {letter[1]} CAPITAL {letter[2]}'.upper())}</mi>",
        mathml,
    )


# --- Docstrings ---


class Docstrings(griffe.Extension):
    """
    diffusers' way of writing docstrings, as griffe reads Google's. Types are plain text, and the references [`Name`]
    and [`~Class.method`] are links where the site has the name.
    """

    def on_package(self, *, pkg, **kwargs):
        documented = [obj for obj in _walk(pkg) if obj.docstring is not None]
        paths = {}  # by the names that docstrings use; of several objects with one name, the first
        for obj in documented:
            parts = obj.path.split(".")
            for start in range(len(parts)):
                paths.setdefault(".".join(parts[start:]), obj.path)
        for obj in documented:

            def link(found: re.Match, obj=obj) -> str:
                name = found[1]
                near = (f"{scope.path}.{name}" for scope in (obj, obj.parent) if scope is not None)
                path = next((path for path in near if path in paths), paths.get(name))
                return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>' if path else f"`{name}`"

            text = _SEVERAL.sub(r"\1\2, ", obj.docstring.value)
            text = _ENTRY.sub(lambda found: f"{found[1]} ({_plain(found[2])}):", text)
            text = _RETURNED.sub(lambda found: f"{found[1]}{_plain(found[2])}:", text)
            obj.docstring.value = _REFERENCE.sub(link, text)


def _plain(kind: str) -> str:
    """A type without its marks, and without the default, which the signature gives."""
    kind = re.sub(r",? (\*optional\*|defaults to .*)", "", kind)
    return _REFERENCE.sub(r"\1", kind).replace("`", "")


def _walk(obj):
    """An object and its members, those that only have been imported left out."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _walk(member)
