"""The site that mkdocs builds of docs/, README.md and the docstrings: no warnings, and what the hooks make of them."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import ncsn_diffusers

pytest.importorskip("mkdocs")
pytest.importorskip("material")

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """A page's anchors, and what it links to and shows."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes["id"]} if "id" in attributes else set()
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_lead_to_files_and_anchors_of_the_site(site, pages):
    missing = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("data", "http", "https"), f"{name}: {link}"
                continue
            target = ((site / name).parent / unquote(parts.path)).resolve() if parts.path else site / name
            target = target / "index.html" if target.is_dir() else target
            other = pages.get(target.relative_to(site.resolve()).as_posix()) if target.suffix == ".html" else None
            if not target.exists() or (parts.fragment and other and unquote(parts.fragment) not in other.anchors):
                missing.append(f"{name}: {link}")
    assert not missing


def test_the_front_page_is_the_readme(pages):
    titles = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == re.findall(r"<h2 id=[^>]*>(.+?)<a", pages["index.html"].text)


def test_the_reference_has_every_public_name(pages):
    anchors = set().union(*(page.anchors for name, page in pages.items() if name.startswith("api/")))
    for name in ncsn_diffusers.__all__:
        thing = getattr(ncsn_diffusers, name)
        assert anchors & {f"ncsn_diffusers.{name}", f"{thing.__module__}.{thing.__qualname__}"}, name
    assert "ncsn_diffusers.denoiser.Denoiser.__call__" in anchors
    assert "ncsn_diffusers.scheduling_annealed_langevin.AnnealedLangevinScheduler.step" in anchors


def test_docstrings_read_as_prose(pages):
    """References and types have become links and text; none of diffusers' marks is left outside the source code."""
    for name, page in pages.items():
        if name.startswith("api/"):
            text = re.sub(r"<pre.*?</pre>", "", page.text, flags=re.DOTALL)
            assert not re.search(r"\[(`|<code>)~?[\w.]+(`|</code>)\]|\*optional\*", text), name
    page = pages["api/denoisers.html"].text
    assert re.search(r'href="#ncsn_diffusers\.denoiser\.Guided"[^>]*><code>Guided</code>', page)
    assert (
        '<a class="autorefs autorefs-internal" ' in page
        and 'href="schedulers.html#ncsn_diffusers.ladder.Ladder"' in page
    )


def test_the_tutorials_formulas_need_no_script(pages):
    text = re.sub(r"<(code|pre|script|style)\b.*?</\1>", "", pages["tutorial.html"].text, flags=re.DOTALL)
    assert "$" not in text
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
    assert "<mtext>(6)</mtext>" in text and "<mi>𝒩</mi>" in text
