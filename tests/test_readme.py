"""README.md and the pages in docs/: the Python blocks run, the commands' flags exist, the links lead to files."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from accelerate.commands.launch import launch_command_parser
from networks import small_unet
from PIL import Image
from torch.distributed.run import get_args_parser

import ncsn_diffusers
import ncsn_diffusers_cli
from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass
class Block:
    """
    A block of code, and the comment before it: `<!-- skip: reason -->` keeps it from being run,
    `<!-- given: name, name -->` runs it with these of [`given`].
    """

    page: Path
    line: int
    language: str
    code: str
    skip: str | None
    given: list[str]


def blocks(page: Path, language: str) -> list[Block]:
    pattern = r"(?:<!-- (skip|given): (.+?) -->\n)?^```(\w+)\n(.*?)^```$"
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        kind, value, name, code = match.groups()
        if name == language:
            line = text.count("\n", 0, match.start(4)) + 1
            given = value.split(", ") if kind == "given" else []
            found.append(Block(page, line, name, code, value if kind == "skip" else None, given))
    return found


def with_blocks(language: str) -> list:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of untrained pipelines, in place of the shipped ones."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name, settings in (
        ("plain", {"sample_size": 28}),
        ("classes", {"sample_size": 28, "num_class_embeds": 11}),
        ("colored", {"sample_size": 16, "channels": 3, "out_channels": 3}),
    ):
        unet = small_unet(**settings)
        NCSNPipeline(unet, AnnealedLangevinScheduler(), num_inference_steps=5).save_pretrained(folder / name)
    return folder


def given(pipelines: Path) -> dict[str, object]:
    """What a block may be given; the last word is its name there."""
    digits = torch.randint(0, 256, (160, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {
        "pipe": NCSNPipeline.from_pretrained(pipelines / "plain"),
        "image": Image.fromarray(digits[0, 0].numpy()),
        "mask_image": Image.fromarray((np.arange(28 * 28).reshape(28, 28) > 400).astype(np.uint8) * 255),
        "images": digits[:4],
        "digits": digits[:10],
        "real_images": digits[:80],
        "fake_images": digits[80:],
    }


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks(page, pipelines, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shipped = ncsn_diffusers.pretrained
    untrained = {"mnist": str(pipelines / "classes"), "avatars": str(pipelines / "colored")}
    monkeypatch.setattr(ncsn_diffusers, "pretrained", lambda name: untrained.get(name) or shipped(name))
    (tmp_path / "my-ncsn").symlink_to(pipelines / "plain")
    for block in blocks(page, "python"):
        where = f"{page.name}, line {block.line}"
        # blanks before the code make the lines in a traceback those of the page
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.skip is None:
            names = given(pipelines) if block.given else {}
            namespace = {name.split()[-1]: names[name] for name in block.given}
            try:
                exec(code, namespace)
            except ImportError as error:
                if (error.name or "").startswith("torch_fidelity"):
                    pytest.skip("distances need torch-fidelity")
                raise
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"


# --- Commands ---


class _Parsed(BaseException):
    """Leaves a script once its command line has been read; nothing in it catches this."""


def parse(monkeypatch, start: Callable[[], object], arguments: list[str]) -> None:
    """Have a program read its command line, and no more than that."""
    cli = tyro.cli

    def only_parse(function, **settings):
        if inspect.isfunction(function):
            function = wraps(function)(lambda *values, **named: None)
        cli(function, **settings)
        raise _Parsed

    def subcommands(functions, **settings):
        only_parse(functions[arguments[0]], args=arguments[1:], **settings)

    with monkeypatch.context() as patch:
        patch.setattr(tyro, "cli", only_parse)
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", subcommands)
        patch.setattr(sys, "argv", ["name", *arguments])
        with pytest.raises(_Parsed):
            start()


STARTS = r"ncsn-diffusers |scripts/|ncsn_diffusers\.commands\."


def commands(page: Path) -> list[list[str]]:
    """The words of each of our commands in the page's bash blocks, and of those in its text."""
    text = [block.code.replace("\\\n", " ") for block in blocks(page, "bash")]
    code = "\n".join(text).replace("srun bash -c '", "").replace("latest'", "latest")
    lines = [part for line in code.splitlines() for part in line.split("&&")]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names = "train|sample|evaluate|demo|push"
    pattern = rf"`((?:python scripts/|accelerate launch (?:scripts/|-m )|ncsn-diffusers (?:{names}))[^`]*)`"
    lines += re.findall(pattern, prose)
    lines = [re.sub(r"\$\(.*?\)|\$\w+", "0", line).replace("…", "") for line in lines]
    return [shlex.split(line, comments=True) for line in lines if re.search(STARTS, line) and not line.startswith("#")]


def start_and_arguments(words: list[str]) -> tuple[Callable[[], object], list[str]]:
    """What the command starts, and the arguments that it gives."""
    while "=" in words[0]:  # settings of the environment
        words = words[1:]
    if words[0] == "ncsn-diffusers":
        return ncsn_diffusers_cli.main, words[1:]
    if words[:2] == ["accelerate", "launch"] or words[0] == "torchrun":
        parser, rest = (
            (get_args_parser(), words[1:]) if words[0] == "torchrun" else (launch_command_parser(), words[2:])
        )
        launch = parser.parse_args(rest)
        program = [*(["-m"] if launch.module else []), launch.training_script]
        words = ["python", *program, *launch.training_script_args]
    assert words[0] == "python"
    if words[1] == "-m":
        return importlib.import_module(words[2]).main, words[3:]
    return partial(runpy.run_path, str(ROOT / words[1]), run_name="__main__"), words[2:]


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if commands(page)])
def test_commands_have_these_flags(page, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where a script finds its siblings
    for words in commands(page):
        try:
            start, arguments = start_and_arguments(words)
            if "--help" not in arguments:
                parse(monkeypatch, start, arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)}\n{''.join(capsys.readouterr())}")


# --- Links ---


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    missing = [link for link in links if "://" not in link and not (page.parent / link.partition("#")[0]).exists()]
    assert not missing
