"""The command line: `ncsn-diffusers`, its subcommands as modules, their `--help`, flags and messages."""

import dataclasses
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import tyro
from forked import run_forked
from PIL import Image

import ncsn_diffusers
from ncsn_diffusers.commands import cli
from ncsn_diffusers.commands.convert import ConvertConfig
from ncsn_diffusers.commands.demo import DemoConfig
from ncsn_diffusers.commands.push import PushConfig
from ncsn_diffusers.commands.sample import SampleConfig
from ncsn_diffusers.evaluation import EvaluateConfig
from ncsn_diffusers.training import TrainingConfig
from ncsn_diffusers_cli import COMMANDS

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "train": TrainingConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "convert": ConvertConfig,
    "demo": DemoConfig,
    "push": PushConfig,
}
REQUIRED = {"convert": ["checkpoint.pth", "folder"], "push": ["folder", "user/name"]}


def run(*command, cwd):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def help_of(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    module = importlib.import_module(f"ncsn_diffusers.commands.{command}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"], f"ncsn-diffusers {command}")
    assert not end.value.code
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_every_setting_once_with_its_default(command, capsys, monkeypatch):
    text = help_of(command, capsys, monkeypatch)
    usage, _, boxes = text.partition("\n\n")
    assert f"ncsn-diffusers {command}" in usage
    example, _, boxes = boxes.partition("\n\n")
    assert example.startswith("Example: ")
    config = CONFIGS[command]
    for field in dataclasses.fields(config):
        flag = field.name
        positional = flag.upper() in ("PIPELINE", "FOLDER", "REPO_ID", "CHECKPOINT") or (command, flag) == (
            "convert",
            "output_dir",
        )
        start = rf"[│ ] {flag.upper()} " if positional else rf"[│ ] --{flag}[ ,\n]"
        assert len(re.findall(start, boxes)) == 1, flag
    assert boxes.count("(default: ") + boxes.count("(required)") >= 0.9 * len(dataclasses.fields(config))


@pytest.mark.skipif(not hasattr(tyro, "__version__") or tyro.__version__ < "1", reason="older tyro has one group")
def test_help_has_the_headings_of_the_base_classes(capsys, monkeypatch):
    text = help_of("sample", capsys, monkeypatch)
    found = ["options", "--output_dir", "Image options", "--seed"]
    found += ["Noise level and scheduler options", "--sigmas", "Class options", "--class_labels"]
    places = [re.search(rf"\W {re.escape(part)} ", text).start() for part in found]
    assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_in_one_group_and_has_a_text(command):
    config = CONFIGS[command]
    groups = cli.group_fields(config)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(config))
    texts = {}
    for owner in groups:
        texts |= cli.help_texts(owner)
        assert owner.__doc__
    assert set(names) <= set(texts)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_argument_gives_the_defaults(command):
    required = REQUIRED.get(command, [])
    assert CONFIGS[command](**cli.parse(CONFIGS[command], required, "name", "example")) == CONFIGS[command](*required)


def test_arguments_give_what_the_config_itself_is_given():
    words = "nowhere --num_images 3 --sigmas 3 0.5 --scheduler DDIMScheduler --scheduler_config a=1 --class_labels 1 2"
    words = words.replace("a=1", "clip_sample=false") + " --no_save_grid --animation gif --dtype bfloat16"
    assert SampleConfig(**cli.parse(SampleConfig, words.split(), "name", "example")) == SampleConfig(
        pipeline="nowhere",
        num_images=3,
        sigmas=(3.0, 0.5),
        scheduler="DDIMScheduler",
        scheduler_config=("clip_sample=false",),
        class_labels=(1, 2),
        save_grid=False,
        animation="gif",
        dtype="bfloat16",
    )
    words = ["--block_out_channels", "16", "32", "--sigma_max", "auto", "--compile", "True", "--no_use_ema"]
    assert TrainingConfig(**cli.parse(TrainingConfig, words, "name", "example")) == TrainingConfig(
        block_out_channels=(16, 32), sigma_max="auto", compile=True, use_ema=False
    )


def test_a_field_declared_again_stays_in_its_group_with_the_new_default_and_text():
    @dataclasses.dataclass
    class Base:
        """Base"""

        number: int = 1
        """Old."""
        other: int = 2
        """Other."""

    @dataclasses.dataclass
    class Derived(Base):
        """Derived."""

        number: int = 5
        """New."""
        own: str = "a"
        """Own."""

    assert cli.group_fields(Derived) == {Base: ["number", "other"], Derived: ["own"]}
    assert cli.parse(Derived, ["--own", "b"], "name", "example") == {"number": 5, "other": 2, "own": "b"}


@pytest.mark.parametrize(("word", "flag"), [("--num_images x", "--num_images"), ("--num_image 3", "--num_images")])
def test_errors_name_the_flag(word, flag, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(SampleConfig, word.split(), "ncsn-diffusers sample", "example")
    assert end.value.code == 2
    assert flag in "".join(capsys.readouterr())


def test_the_dispatcher_answers_without_importing_torch(tmp_path):
    program = (
        "import sys; sys.argv[1:] = sys.argv[1].split(); import ncsn_diffusers_cli\n"
        "try: ncsn_diffusers_cli.main()\n"
        "finally: assert not {'torch', 'diffusers', 'numpy', 'ncsn_diffusers'} & set(sys.modules)"
    )
    result = run("-c", program, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", result.stdout, re.MULTILINE)
    result = run("-c", program, "--version", cwd=tmp_path)
    assert result.stdout == f"{version('ncsn_diffusers')}\n" == f"{ncsn_diffusers.__version__}\n"
    result = run("-c", program, "evalute my-ncsn", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "ncsn-diffusers: there is no command 'evalute'; did you mean evaluate?\n"
    result = run("-c", program, "xyz", cwd=tmp_path)
    assert (
        result.stderr
        == "ncsn-diffusers: there is no command 'xyz'; there are train, sample, evaluate, convert, demo, push.\n"
    )


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (["-m", "ncsn_diffusers.commands.sample"], "python -m ncsn_diffusers.commands.sample"),
        ([ROOT / "ncsn_diffusers_cli.py", "sample"], "ncsn-diffusers sample"),
    ],
)
def test_errors_name_the_command_as_typed(start, name, tmp_path):
    result = run_forked(*start, "--num_images", 0, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"{name}: --num_images must be at least 1, not 0."


def test_a_module_draws_in_an_empty_folder(tmp_path):
    arguments = ["--num_images", 2, "--num_inference_steps", 2, "--save_images"]
    result = run("-m", "ncsn_diffusers.commands.sample", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"samples.png", "00000.png", "00001.png"}
    assert Image.open(tmp_path / "samples/00001.png").size == (28, 28)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [["--help"], ["--no_such_flag", "1"]])
def test_help_and_typos_are_answered_without_importing_torch(command, arguments, tmp_path):
    program = (
        "import sys; sys.argv[1:] = sys.argv[1].split(); import ncsn_diffusers_cli\n"
        "try: ncsn_diffusers_cli.main()\n"
        "finally: assert not {'torch', 'diffusers', 'numpy', 'datasets', 'accelerate'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("-c", program, " ".join([command, *arguments]), cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert result.returncode == (0 if arguments == ["--help"] else 2), result.stderr
    assert f"ncsn-diffusers {command}" in result.stdout + result.stderr


def test_what_was_left_out_is_imported_before_the_command_runs(tmp_path):
    program = """
import sys, ncsn_diffusers_cli
sys.argv[1:] = ["sample", "nowhere"]
try: ncsn_diffusers_cli.main()
except SystemExit as end: assert "there is no such folder" in str(end), end
import diffusers, ncsn_diffusers
from ncsn_diffusers.training import train
assert diffusers.NCSNPipeline is ncsn_diffusers.NCSNPipeline
"""
    result = run_forked("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


class Case:
    """A command line whose function raises."""

    @dataclasses.dataclass
    class Config:
        """A command."""

        folder: cli.Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")] = "a"
        """Where."""
        train_batch_size: int = 32
        """How many."""

    @classmethod
    def run(cls, error, **arguments):
        def fail(config):
            raise error

        cli.run(cls.Config, fail, "example", [], "program", **arguments)


def test_settings_in_messages_are_as_they_are_typed():
    with pytest.raises(SystemExit, match=r"^program: --train_batch_size must be 1, FOLDER='x', `other` not\.$"):
        Case.run(ValueError("`train_batch_size` must be 1, `folder`='x', `other` not."))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error"),
        MemoryError("Unable to allocate 3 GiB. x"),
    ],
)
def test_out_of_memory_names_a_way_out(error):
    said = ". ".join(str(error).split(". ")[:2])
    with pytest.raises(SystemExit) as end:
        Case.run(error)
    assert str(end.value).startswith(f"program: there is not enough memory: {said}")
    assert str(end.value).endswith(". A smaller --train_batch_size (now 32) needs less.")


def test_errors_of_the_program_itself_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        Case.run(RuntimeError("a fault"))


@pytest.mark.parametrize(("resumes", "text"), [(True, " The same command goes on where it stopped."), (False, "")])
def test_ctrl_c_says_how_to_go_on(resumes, text, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as end:
            Case.run(KeyboardInterrupt(), resumes=resumes)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    assert end.value.code == 130
    assert capsys.readouterr().err == f"\nprogram: interrupted.{text}\n"


def test_how_an_interrupted_program_ends(tmp_path):
    """
    It says nothing more: what it leaves half built, as a progress bar in its constructor, fails when it is freed. And
    it does not search torch's objects for cycles, which would take most of the time between a signal and the end.
    """
    code = """
import atexit
import gc
atexit.register(lambda: print(gc.get_freeze_count() > 0))  # called last
from dataclasses import dataclass
from ncsn_diffusers.commands import cli

class HalfBuilt:
    def __del__(self):
        raise AttributeError("pos")

@dataclass
class Config:
    \"\"\"Nothing.\"\"\"

def work(_):
    half_built = HalfBuilt()
    raise KeyboardInterrupt

cli.run(Config, work, "program", [], "program")
"""
    (tmp_path / "work.py").write_text(code)
    done = subprocess.run([sys.executable, "work.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "True\n", "\nprogram: interrupted.\n")
