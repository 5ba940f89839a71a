import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from forked import Forked, run_forked, run_two_forked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, precision
from ncsn_diffusers.noise_levels import choose_num_train_timesteps
from ncsn_diffusers.training import Trainer, TrainingConfig, checkpoints, make_unet, memory, processes, train
from ncsn_diffusers.training import trainer as training
from ncsn_diffusers.training.config import training_command
from ncsn_diffusers.training.log import LossPerLevel, RunLog
from ncsn_diffusers.training.network import count_tokens

CPU_HAS_BFLOAT16 = precision.cpu_has_bfloat16  # which conftest.py replaces
SCRIPT = str(Path(__file__).parents[1] / "scripts" / "train_ncsn.py")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """40 gray images of 8×8: a bright left or a bright right half, in folders that name them."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(40):
        array = np.zeros((8, 8), dtype=np.uint8)
        array[:, 4 * (i % 2) : 4 + 4 * (i % 2)] = 255
        kind = folder / ("left", "right")[i % 2]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(kind / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the mixed precision of a process's first run


@pytest.fixture
def pictures():
    """For tests of what a run draws: with this fixture, it draws all that it draws for a user."""


@pytest.fixture(autouse=True)
def quick_pictures_elsewhere(request):
    if "pictures" not in request.fixturenames:
        request.getfixturevalue("quick_pictures")


def small_config(**arguments):
    defaults = {
        "block_out_channels": (16, 16),
        "train_batch_size": 20,
        "eval_batch_size": 3,
        "num_epochs": 2,
        "lr_warmup_steps": 1,
        "mixed_precision": "no",  # also in processes of their own, and on any machine
    }
    return TrainingConfig(**defaults | arguments)


@pytest.fixture
def small(image_folder, tmp_path):
    return partial(small_config, train_data_dir=str(image_folder), output_dir=str(tmp_path / "out"))


@pytest.fixture(scope="module")
def plain_weights(image_folder, tmp_path_factory):
    return trained_weights(
        small_config(train_data_dir=str(image_folder), output_dir=str(tmp_path_factory.mktemp("plain")))
    )


def trained_weights(config):
    AcceleratorState._reset_state(reset_partial_state=True)
    return torch.cat([p.detach().flatten() for p in train(config).unet.parameters()])


def test_learns_to_draw_two_images(small, tmp_path):
    train(small(num_epochs=100, learning_rate=5e-3))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for scheduler in (pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        images = pipe(batch_size=64, num_inference_steps=20, generator=generator, output_type="pt").images
        left, right = images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))
        drawn_left, drawn_right = (left > 0.8) & (right < 0.2), (right > 0.8) & (left < 0.2)
        assert (drawn_left | drawn_right).float().mean() > 0.8
        # a fair coin: 64 tosses have a standard deviation of 4
        assert 16 < drawn_left.sum() < 48


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample", "score"])
@pytest.mark.parametrize("conditioning", ["timestep", "sigma"])
def test_every_convention_trains_and_is_saved(small, tmp_path, prediction_type, conditioning):
    trained = train(
        small(prediction_type=prediction_type, conditioning=conditioning, sigma_max=20.0, num_train_timesteps=100)
    )
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    config = pipe.scheduler.config
    assert (config.prediction_type, config.conditioning) == (prediction_type, conditioning)
    assert (config.num_train_timesteps, config.sigma_max) == (100, pytest.approx(20.0))
    assert pipe.unet.config.time_embedding_type == ("fourier" if conditioning == "sigma" else "positional")
    assert same_weights(trained, pipe)
    images, expected = (
        p(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, trained)
    )
    assert torch.equal(images, expected)
    assert images.std() > 0.01


def test_output_folder(small, tmp_path, pictures):
    train(small(num_epochs=1))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("model_index.json", "unet", "scheduler", "samples.png", "loss.png"),
        *("checkpoint-2", "log.jsonl", "training_config.json", ".lock"),
    }
    saved = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert saved["num_epochs"] == 1
    assert set(saved) == {*TrainingConfig.__dataclass_fields__, "command"}
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert Image.open(tmp_path / "out" / "samples.png").size == (614, 614)  # 2 columns of 8 pixels, enlarged
    with pytest.raises(FileExistsError, match=r"`output_dir`=.* holds a pipeline or checkpoints already.*--overwrite"):
        train(small())
    train(small(num_epochs=1, overwrite_output_dir=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"train_data_dir": "my images", "train_split": "train[:90%]"},
        {"dataset_name": "ann/it's $HOME", "dataset_config_name": "32 px"},
        {"block_out_channels": (8, 16), "num_train_timesteps": "auto", "sigma_max": "auto"},
        {"use_ema": False, "random_flip": True, "compile": False},
        {"compile": True, "log_sigma_mean": -1e-05, "learning_rate": 1e-4},
        {"max_train_steps": 7, "streaming": True, "resolution": 8, "channels": 1, "mixed_precision": "bf16"},
    ],
)
def test_the_command_repeats_the_run(arguments):
    tyro = pytest.importorskip("tyro")
    config = TrainingConfig(**arguments)
    command = training_command(config)
    # as a shell reads it: what it would start, a word to a line
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {command}"], text=True).splitlines()
    assert words[:4] == ["accelerate", "launch", "-m", "ncsn_diffusers.commands.train"]
    assert tyro.cli(TrainingConfig, args=words[4:], use_underscores=True) == config


def test_the_command_tells_no_folders(tmp_path):
    home = {"train_data_dir": "/home/ann/faces", "output_dir": "/home/ann/out", "resume_from_checkpoint": "latest"}
    home |= {"logger": "tensorboard", "push_to_hub": True, "hub_model_id": "ann/faces", "hub_private_repo": True}
    command = "accelerate launch -m ncsn_diffusers.commands.train"
    assert training_command(TrainingConfig()) == command
    assert training_command(TrainingConfig(**home, num_epochs=7)) == f"{command} --train_data_dir faces --num_epochs 7"
    for name in ("~/faces", "../ann/faces", str(tmp_path / "faces")):
        assert training_command(TrainingConfig(dataset_name=name)) == f"{command} --dataset_name faces"
    assert training_command(TrainingConfig(dataset_name="ann/faces")) == f"{command} --dataset_name ann/faces"


def test_the_command_is_recorded(small, tmp_path):
    config = small(max_train_steps=1, seed=3)
    train(config)
    saved = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert saved.pop("command") == training_command(config)
    assert "--mixed_precision no --seed 3" in training_command(config)
    assert saved == json.loads(json.dumps(vars(config)))
    manifest = json.loads((tmp_path / "out" / "checkpoint-1" / "manifest.json").read_text())
    assert manifest["config"] == saved  # a checkpoint keeps the settings alone


def test_same_seed_same_weights(small):
    runs = [trained_weights(small(overwrite_output_dir=True, seed=s, random_flip=True)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_ema": False},
        {"ema_max_decay": 0.5},
        {"ema_inv_gamma": 100.0},
        {"ema_power": 0.1},
        {"learning_rate": 1e-4},
        {"lr_scheduler": "constant"},
        {"lr_warmup_steps": 3},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1.0},
        {"adam_weight_decay": 10.0},
        {"random_flip": True},
        {"noise_distribution": "uniform"},
        {"log_sigma_mean": 1.0},
        {"log_sigma_std": 0.5},
        {"sigma_min": 0.1},
        {"train_batch_size": 10},
        {"max_train_steps": 3},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 1e-3},
        {"loss_weighting": "sigma_squared"},
        {"layers_per_block": 2},
        {"add_attention": True},
        {"num_train_timesteps": 50},
        {"sigma_max": 10.0},
        {"class_conditional": True},
        {"channels": 3},
        {"train_split": "train[:50%]"},
        {"mixed_precision": "bf16"},
    ],
)
def test_every_option_of_the_loop_changes_the_weights(small, plain_weights, arguments):
    weights = trained_weights(small(**arguments))
    assert len(weights) != len(plain_weights) or not torch.equal(weights, plain_weights)


def test_ema_averages_the_weights(small):
    # decay 0 keeps the last weights, as no average does
    last = trained_weights(small(use_ema=False))
    no_memory = trained_weights(small(overwrite_output_dir=True, ema_max_decay=0.0))
    torch.testing.assert_close(no_memory, last)


def test_color_and_oblong_images(small, tmp_path):
    (tmp_path / "color").mkdir()
    for i in range(20):
        Image.new("RGB", (12, 8), (i, 100, 200)).save(tmp_path / "color" / f"{i}.png")
    folder = str(tmp_path / "color")
    pipe = train(small(train_data_dir=folder, num_epochs=1))
    assert pipe(num_inference_steps=2).images[0].size == (12, 8)
    pipe = train(small(train_data_dir=folder, num_epochs=1, overwrite_output_dir=True, resolution=16))
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)
    assert pipe(num_inference_steps=2).images[0].mode == "RGB"


def test_accelerate_launch_does_not_leave_cores_idle(small, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the mark of `accelerate launch`
    torch.set_num_threads(1)
    try:
        Trainer(small())
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(threads)


# Interrupted, and gone on


def checkpoint_state(folder):
    """Everything in a checkpoint that decides how the run goes on, by name."""
    state = {f"live.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    for file in ("optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "custom_checkpoint_2.pkl"):
        content = torch.load(folder / file, weights_only=True)
        leaves, _ = torch.utils._pytree.tree_flatten(content)
        state |= {f"{file}.{i}": leaf for i, leaf in enumerate(leaves)}
    return state


def assert_same_state(a, b):
    a, b = checkpoint_state(a), checkpoint_state(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_ema": False, "random_flip": True, "lr_scheduler": "constant"},
        {"max_cache_gb": 0.0, "gradient_accumulation_steps": 2, "train_batch_size": 8},
        {"max_cache_gb": 0.0, "random_crop": True, "resolution": 4, "dataloader_num_workers": 1},
        {"streaming": True, "resolution": 8, "channels": 1, "class_conditional": True},
        {"mixed_precision": "bf16", "eval_steps": 3},
    ],
    ids=["plain", "no ema", "accumulating", "random crop", "streaming", "bf16"],
)
def test_going_on_equals_never_stopping(small, tmp_path, arguments):
    arguments = {"max_train_steps": 6, "checkpointing_steps": 3, "checkpoints_total_limit": 5} | arguments
    whole = trained_weights(small(output_dir=str(tmp_path / "whole"), **arguments))
    for name in ("checkpoint-6", "model_index.json"):  # as if it had been killed on the way from 3 to 6
        path = tmp_path / "whole" / name
        path.rename(tmp_path / name)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    parts = trained_weights(small(resume_from_checkpoint="latest", **arguments))
    assert torch.equal(whole, parts)
    assert_same_state(tmp_path / "checkpoint-6", tmp_path / "out" / "checkpoint-6")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "out")]
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1] == sorted(steps[0])  # the steps after the checkpoint are logged once
    times = ("images_per_second",)
    for lines in zip(*logs, strict=True):
        first, second = ({k: v for k, v in json.loads(line).items() if k not in times} for line in lines)
        assert first == second


# What a full disk or a kill leaves of a line
TORN = ['{"step": 2, "lo', "", '{"step": 2, "lo{"step": 2, "loss": 0.5}', '"step"', '{"loss": 1.0}', "\0" * 20]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_log_costs_no_run(small, tmp_path, capsys, torn):
    train(small(max_train_steps=2, checkpointing_steps=1))
    path = tmp_path / "out" / "log.jsonl"
    whole = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole] == [1, 2]
    path.write_text(f"{whole[0]}\n{torn}" + ("\n" if torn == "" else ""))
    train(small(max_train_steps=3, checkpointing_steps=1, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    assert f"{path}: line 2 is damaged, as by a kill or a full disk, and left out." in said
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]  # of 2 what settings have changed
    assert records[1].keys() == {"step", "changed_settings"}


def test_a_full_disk_leaves_no_half_line(tmp_path, capsys, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, content):
            if len(content) > 5:
                return super().write(content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RunLog(Accelerator(), tmp_path)
    log.write({"step": 1})
    monkeypatch.setattr("builtins.open", lambda path, mode, **_: FullDisk(path, mode.replace("b", "")))
    log.write({"step": 2})
    monkeypatch.undo()
    log.write({"step": 3})
    assert (
        f"log.jsonl could not be written: [Errno 28] No space left on device: '{log.path}'." in capsys.readouterr().out
    )
    assert log.path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_what_cannot_be_written_leaves_the_old_file(small, tmp_path, monkeypatch, capsys, pictures):
    """As on a full disk: a file of 0 bytes is opened, and nothing goes into it."""
    train(small(num_epochs=1))
    out = tmp_path / "out"
    before = {
        name: (out / name).read_bytes() for name in ("training_config.json", "samples.png", "loss.png", "log.jsonl")
    }

    def full(self, path, *_, **__):
        Path(path).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    train(small(num_epochs=2, resume_from_checkpoint="latest"))
    said = capsys.readouterr().out
    for name in ("samples.png", "loss.png"):
        assert f"{name} could not be written: [Errno 28] No space left on device: '{out / name}'." in said
        assert (out / name).read_bytes() == before[name]
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: full(None, path))
    with pytest.raises(OSError, match=r"No space left on device: '.*training_config.json'"):
        train(small(num_epochs=3, resume_from_checkpoint="latest"))
    assert json.loads((out / "training_config.json").read_text())["num_epochs"] == 2
    assert not list(out.glob("incomplete-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_goes_on(small, tmp_path, monkeypatch, capfd, number):
    whole = trained_weights(small(output_dir=str(tmp_path / "whole")))
    loss, calls = training.score_matching_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return loss(*arguments)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def draw(*_):
        raise AssertionError("drawing takes a while")

    with monkeypatch.context() as patch:
        patch.setattr(training, "score_matching_loss", interrupted)
        patch.setattr(Trainer, "_draw", draw)
        train(small())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    captured = capfd.readouterr()
    assert "Interrupted: ending the step, then saving a checkpoint and the pipeline. A second" in captured.err
    assert "Interrupted after 2 of 4 steps" in captured.out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        *("checkpoint-2", "log.jsonl", "loss.png", "model_index.json", "scheduler", "training_config.json", "unet")
    ]
    assert checkpoints.is_complete(out / "checkpoint-2")
    averages = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    saved = torch.load(out / "checkpoint-2" / "custom_checkpoint_1.pkl")
    assert all(torch.equal(averages[name], saved[name]) for name in averages.keys() | saved.keys())
    assert torch.equal(trained_weights(small(resume_from_checkpoint="latest")), whole)


def test_a_kill_that_follows_an_interrupt_loses_nothing(small, plain_weights, tmp_path, monkeypatch):
    """A cluster kills what has not ended some seconds after SIGTERM: the checkpoint comes before the pipeline."""
    loss = training.score_matching_loss

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    def killed(*_, **__):
        raise MemoryError("in the place of SIGKILL")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(training, "score_matching_loss", interrupted)
        patch.setattr(Trainer, "_make_pipeline", killed)
        train(small())
    assert checkpoints.latest(tmp_path / "out") == tmp_path / "out" / "checkpoint-1"
    assert torch.equal(trained_weights(small(resume_from_checkpoint="latest")), plain_weights)


def test_second_interrupt_ends_at_once(small, monkeypatch):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # two at once would count as one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(training, "score_matching_loss", interrupted)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(small())
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("when", ["during the run", "at the end", "at the validation"])
def test_interrupt_ends_the_drawing(small, tmp_path, monkeypatch, capsys, when, pictures):
    forward, calls = UNet2DModel.forward, []

    def interrupted(self, *arguments, **keywords):
        if not self.conv_in.weight.requires_grad:  # what is sampled and evaluated
            calls.append(1)
            if len(calls) == (51 if when == "at the validation" else 3):
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(UNet2DModel, "forward", interrupted)
    eval_steps = None if when == "at the end" else 2
    train(small(eval_steps=eval_steps, validation_split="train[:40]", num_epochs=2))
    monkeypatch.undo()
    out, said = tmp_path / "out", capsys.readouterr().out
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert not any("validation_loss" in record for record in records)
    if when == "at the end":
        assert len(calls) < 10
        assert "samples.png is left out." in said
        assert checkpoints.latest(out).name == "checkpoint-4"
    else:
        assert "Interrupted after 2 of 4 steps" in said
        assert checkpoints.latest(out).name == "checkpoint-2"
    assert {path.name for path in out.glob("*.png")} == {"loss.png"} | ({"samples-2.png"} if len(calls) > 50 else set())
    assert (out / "model_index.json").exists()


def test_the_constructor_changes_nothing(small, tmp_path):
    out = tmp_path / "out"
    Trainer(small())
    assert not out.exists()
    train(small(max_train_steps=2, checkpointing_steps=1))
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    Trainer(small(overwrite_output_dir=True))
    Trainer(small(resume_from_checkpoint="latest"))
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))} == before


def test_the_folder_is_looked_at_again(small, tmp_path):
    """Another run has used it while this one has read its data."""
    waiting, resuming = Trainer(small()), Trainer(small(resume_from_checkpoint="latest"))
    train(small(max_train_steps=2))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(FileExistsError, match="holds a pipeline or checkpoints already"):
        waiting.train()
    with pytest.raises(OSError, match="was changed by another run: start again"):
        resuming.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def flags(config):
    """The command line that makes this config."""
    default, words = TrainingConfig(), []
    for name in TrainingConfig.__dataclass_fields__:
        value = getattr(config, name)
        if value != getattr(default, name):
            words += [f"--{name}"] if value is True else [f"--{name}", *map(str, np.atleast_1d(value))]
    return words


def test_killed_at_any_moment_loses_only_the_steps_since_the_last_checkpoint(small, tmp_path):
    arguments = {"max_train_steps": 24, "checkpointing_steps": 1}
    whole = trained_weights(small(output_dir=str(tmp_path / "whole"), **arguments))
    config, out = small(resume_from_checkpoint="latest", **arguments), tmp_path / "out"

    threads = torch.get_num_threads()  # other threads, other roundings

    def run_until(condition):
        process, deadline = Forked(SCRIPT, *flags(config), OMP_NUM_THREADS=str(threads)), time.monotonic() + 120
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)  # a checkpoint takes several times as long
        process.kill()

    run_until(lambda: any(out.glob("checkpoint-3")))  # between two checkpoints, as likely as not
    first = checkpoints.latest(out)
    assert first is not None
    start = int(first.name.split("-")[1])
    run_until(lambda: any(out.glob(f"incomplete-checkpoint-{start + 5}/*")))  # in the middle of one
    second = checkpoints.latest(out)
    assert start + 4 <= int(second.name.split("-")[1]) < 24
    assert torch.equal(trained_weights(config), whole)
    assert not list(out.glob("incomplete-*"))


# A run that kills itself at its n-th write, rename or deletion in `output_dir`; for n = 0 it counts them.
KILLED = """
import os, signal, sys
from ncsn_diffusers.training import trainer as training

config, last, count = training.CONFIG, int(sys.argv[1]), 0

def watch(event, arguments):
    global count
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        if config.output_dir in str(arguments[0]) or event == "os.rmdir":
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
training.train(config)
print("COUNT", count)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "resumed", "overwriting"])
def test_killed_at_a_write(small, tmp_path, kind):
    arguments = {"max_train_steps": 4, "checkpointing_steps": 1}
    whole = trained_weights(small(output_dir=str(tmp_path / "whole"), **arguments))
    old = None
    if kind == "resumed":
        train(small(output_dir=str(tmp_path / "start"), **arguments))
        shutil.rmtree(tmp_path / "start" / "checkpoint-4")
    if kind == "overwriting":
        old = trained_weights(small(output_dir=str(tmp_path / "start"), seed=1, **arguments))
    config = small(
        overwrite_output_dir=kind == "overwriting",
        resume_from_checkpoint=None if kind == "overwriting" else "latest",
        **arguments,
    )
    script = tmp_path / "run.py"
    script.write_text(KILLED.replace("CONFIG", repr(config)))

    def run(last):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if kind != "fresh":
            shutil.copytree(tmp_path / "start", tmp_path / "out")
        result = run_forked(script, last, OMP_NUM_THREADS=str(torch.get_num_threads()))
        assert result.returncode == (-signal.SIGKILL if last else 0), result.stderr
        return result.stdout

    count = int(run(0).split("COUNT ")[1])
    for last in range(3, count, count // 4):
        run(last)
        if old is not None:  # the older pipeline, or already the new one
            pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
            weights = torch.cat([p.detach().flatten() for p in pipe.unet.parameters()])
            assert torch.equal(weights, old) or torch.equal(weights, whole)
        assert torch.equal(trained_weights(config), whole), last
        assert not list((tmp_path / "out").glob("incomplete-*"))


def test_resume_errors(small, tmp_path, capsys):
    train(small(resume_from_checkpoint="latest", max_train_steps=2))  # there is none: a new run
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`='.*nowhere' is not a complete checkpoint"):
        train(small(resume_from_checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"has 2 steps behind it, more than the 1 of the run"):
        train(small(resume_from_checkpoint="latest", max_train_steps=1))
    with pytest.raises(ValueError, match=r"holds another network than these settings make. add_attention: None → T"):
        train(small(resume_from_checkpoint="latest", max_train_steps=2, add_attention=True))
    with pytest.raises(ValueError, match=r"holds another network than these settings make. block_out_channels"):
        train(small(resume_from_checkpoint="latest", block_out_channels=(8, 8)))
    capsys.readouterr()
    train(small(resume_from_checkpoint=str(out / "checkpoint-2"), max_train_steps=3, learning_rate=1e-4))
    output = capsys.readouterr().out
    assert "Going on with other settings than before: max_train_steps: 2 → 3; learning_rate: 0.001 → 0.0001." in output
    assert f"Going on from {out / 'checkpoint-2'}" in output
    (out / "checkpoint-3" / "optimizer.bin").write_bytes(b"")  # cut short: 2 is the last complete one
    train(small(resume_from_checkpoint="latest", max_train_steps=3))
    assert f"Going on from {out / 'checkpoint-2'}" in capsys.readouterr().out


def test_what_is_to_be_overwritten_stays_until_the_data_are_found_good(small, tmp_path):
    train(small(max_train_steps=2, checkpointing_steps=1))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "checkpoint-2" in before and "samples.png" in before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        train(small(train_data_dir=str(tmp_path / "other"), overwrite_output_dir=True))
    with pytest.raises(ValueError, match="is more than the"):
        train(small(train_batch_size=10_000, overwrite_output_dir=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_going_on_from_an_earlier_one_gives_up_the_later(small, tmp_path, capsys):
    out = tmp_path / "out"
    train(small(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=9))
    arguments = {"learning_rate": 1e-4, "resume_from_checkpoint": str(out / "checkpoint-1")}
    train(small(max_train_steps=2, **arguments))
    assert (
        f"Later checkpoints, up to {out / 'checkpoint-4'}, are deleted when the next one is written"
        in capsys.readouterr().out
    )
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    # what goes on next has the settings, and so the weights, of the branch that was kept
    manifest = checkpoints.read_manifest(checkpoints.latest(out))
    assert (manifest["step"], manifest["config"]["learning_rate"]) == (2, 1e-4)


def test_overwriting_starts_anew(small, tmp_path):
    train(small(max_train_steps=4, checkpointing_steps=2, checkpoints_total_limit=2))
    train(small(max_train_steps=1, overwrite_output_dir=True))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    train(small(max_train_steps=1, overwrite_output_dir=True, checkpointing_steps=0))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_checkpoints_total_limit(small, tmp_path):
    train(small(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=3))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 3, 4)}


def test_full_disk_and_unwritable_folder_are_reported_at_the_start(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        train(small(output_dir=str(tmp_path / "file" / "out")))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1_000_000))
    with pytest.raises(OSError, match=r"`output_dir`=.*the disk has 0.001 GB left, and 2 checkpoints .* take 0.0"):
        train(small(block_out_channels=(32, 32)))
    train(small(checkpointing_steps=0, max_train_steps=1))


@pytest.mark.parametrize("arguments", [{}, {"class_conditional": True}, {"architecture": "ncsnv2"}])
def test_a_step_that_does_not_fit_the_memory_is_refused(small, monkeypatch, arguments):
    """The estimate is what the backward pass of a real step has kept, and no more."""
    arguments = {"train_batch_size": 40, "block_out_channels": (16, 16, 16), **arguments}
    trainer = Trainer(small(**arguments))
    kept, weights = {}, {p.data_ptr() for p in trainer.weights}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # which keeps it alive
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.training_step(trainer.images.batches(40, seed=0))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    measured += 3 * 4 * sum(p.numel() for p in trainer.weights)

    monkeypatch.setattr(memory, "free_bytes", lambda _: int(0.5 * measured))
    message = r"`train_batch_size`=40: to train on as many images of 8×8 pixels takes at least [\d.]+ GB of memory, and"
    with pytest.raises(ValueError, match=message) as failure:
        Trainer(small(**arguments))
    estimate = float(str(failure.value).split("at least ")[1].split(" GB")[0]) * 1e9
    assert estimate == pytest.approx(measured, rel=0.1)
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(1.01 * estimate))
    Trainer(small(**arguments))


def test_a_resolution_that_does_not_fit_the_memory_is_refused_before_the_images_are_read(small, monkeypatch):
    monkeypatch.setattr(training, "open_training_data", None)
    with pytest.raises(ValueError, match="as many images of 16384×16384 pixels takes at least"):
        Trainer(small(resolution=16384))


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_a_resolution_enlarges_are_named(small, capsys, streaming):
    arguments = {"streaming": streaming, "channels": 1, "max_train_steps": 2}
    Trainer(small(resolution=16, **arguments))
    message = "`resolution`=16 enlarges images: the first has 8×8 pixels. They show no more for it, and a step costs"
    assert f"{message} about 4 times what it does at 8." in capsys.readouterr().out
    Trainer(small(resolution=8, overwrite_output_dir=True, **arguments))
    assert "enlarges" not in capsys.readouterr().out


def test_free_memory():
    free = memory.free_bytes(torch.device("cpu"))
    if not Path("/proc/meminfo").exists():
        assert free is None
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert 10_000_000 < free <= total
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory: …")],
)
def test_too_little_memory_during_a_step(small, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(training, "score_matching_loss", fail)
    with pytest.raises(
        ValueError, match=r"`train_batch_size`=20 takes more memory than cpu has: .* checkpoint is none"
    ):
        train(small())


def test_a_checkpoint_that_cannot_be_written_costs_no_training(small, tmp_path, monkeypatch, capsys):
    save = Accelerator.save_state

    def full_disk(self, folder):
        save(self, folder)
        if folder.name.endswith("-2"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full_disk)
    train(small(checkpointing_steps=1, checkpoints_total_limit=4))
    output = capsys.readouterr().out
    assert "The checkpoint of step 2 could not be written: [Errno 28] No space left on device." in output
    assert "The last good one is" in output
    assert {path.name for path in (tmp_path / "out").glob("*checkpoint-*")} == {f"checkpoint-{i}" for i in (1, 3, 4)}


def breaking(monkeypatch, broken_calls, what="loss"):
    """Break loss or gradient at the highest of eight parts of log sigma at these calls, the first of which is 1."""
    loss, calls = training.score_matching_loss, []

    def broken(denoiser, clean, noise, sigmas, *rest):
        calls.append(1)
        losses = loss(denoiser, clean, noise, sigmas, *rest)
        if what == "gradient" and len(calls) in broken_calls:
            return losses + (losses * 0).sqrt()  # 0, of an infinite derivative
        return torch.where((sigmas > 12) & torch.tensor(len(calls) in broken_calls), torch.nan, losses)

    monkeypatch.setattr(training, "score_matching_loss", broken)
    return calls


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(small, tmp_path, monkeypatch, capsys, what):
    arguments = {"checkpointing_steps": 1, "checkpoints_total_limit": 5, "noise_distribution": "uniform"}
    with monkeypatch.context() as patch:
        breaking(patch, {3}, what)
        pipe = train(small(**arguments))
    out = tmp_path / "out"
    states = {step: checkpoint_state(out / f"checkpoint-{step}") for step in (2, 3, 4)}
    for name, value in states[3].items():
        # not the weights, nor AdamW's moments, nor its count of steps
        if name.startswith("live.") or (name.startswith("optimizer.bin") and isinstance(value, torch.Tensor)):
            assert torch.equal(value, states[2][name]), name
    assert not torch.equal(states[4]["live.conv_in.weight"], states[3]["live.conv_in.weight"])
    assert all(p.isfinite().all() for p in pipe.unet.parameters())
    assert "Steps skipped, as their gradient was not finite: 1." in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1]
    assert all(math.isfinite(value) for record in records for value in record.values())
    # what goes on from before the step, or from after it, ends as the whole run did
    for step, calls in ((2, {1}), (3, set())):
        with monkeypatch.context() as patch:
            breaking(patch, calls, what)
            again = train(small(resume_from_checkpoint=str(out / f"checkpoint-{step}"), **arguments))
        assert same_weights(again, pipe)
        for name, value in checkpoint_state(out / "checkpoint-4").items():
            torch.testing.assert_close(value, states[4][name], rtol=0, atol=0, equal_nan=True)


def same_weights(first, second):
    return all(torch.equal(p, q) for p, q in zip(first.unet.parameters(), second.unet.parameters(), strict=True))


def test_many_steps_that_are_not_finite_end_the_run(small, tmp_path, monkeypatch):
    calls = breaking(monkeypatch, set(range(6, 100)))
    message = (
        r"The gradient was not finite at 20 steps in a row, up to step 25, nor the loss at noise levels sigma 5.9 "
        r"to 17, 17 to 50. The last good checkpoint is .*checkpoint-20; a lower `learning_rate`"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(small(checkpointing_steps=5, num_epochs=50, noise_distribution="uniform", checkpoints_total_limit=20))
    assert len(calls) == 25


def test_a_run_without_a_finite_step_is_not_saved(small, tmp_path, monkeypatch):
    breaking(monkeypatch, {1, 2, 3, 4})
    with pytest.raises(FloatingPointError, match=r"not finite at 4 steps in a row.*last good checkpoint is none"):
        train(small(noise_distribution="uniform"))
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("where", ["weights", "averages", "moments"])
def test_what_is_not_finite_is_not_saved(small, tmp_path, monkeypatch, where):
    step = Trainer.training_step

    def broken(self, batches):
        step(self, batches)
        if self.step == 3:
            moments = [s["exp_avg_sq"] for s in self.optimizer.optimizer.state.values()]
            tensors = {"weights": self.weights, "averages": self.averages, "moments": moments}[where]
            tensors[5].detach().view(-1)[0] = math.inf

    pipe = train(small(num_epochs=1))
    monkeypatch.setattr(Trainer, "training_step", broken)
    message = r"not finite at step 3, and are not saved. The last good checkpoint is .*checkpoint-2;"
    for checkpointing_steps in (1, 0):  # at a checkpoint, and at the end
        arguments = {"max_train_steps": 3, "checkpointing_steps": checkpointing_steps}
        with pytest.raises(FloatingPointError, match=message):
            train(small(resume_from_checkpoint="latest", **arguments))
        assert same_weights(NCSNPipeline.from_pretrained(tmp_path / "out"), pipe)
        assert not (tmp_path / "out" / "checkpoint-3").exists()


def test_a_checkpoint_that_is_not_finite_is_refused(small, tmp_path):
    train(small(num_epochs=1))
    path = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})  # as large as before
    with pytest.raises(ValueError, match=r"checkpoint-2 holds weights that are not finite; go on from an earlier one"):
        train(small(resume_from_checkpoint="latest"))


# What comes out


def test_returned_weights_can_be_trained_and_saved(small, tmp_path, monkeypatch):
    handed = []
    save = UNet2DModel.save_pretrained

    def watched(self, *arguments, **keywords):
        handed.extend(self.state_dict().values())
        return save(self, *arguments, **keywords)

    monkeypatch.setattr(UNet2DModel, "save_pretrained", watched)
    for use_ema in (True, False):
        trainer = Trainer(small(use_ema=use_ema, overwrite_output_dir=True, eval_steps=1))
        pipe = trainer.train()
        assert any(not p.is_contiguous() for p in trainer.eval_unet.parameters())  # channels last, while it trains
        assert all(p.is_leaf and p.grad_fn is None for p in trainer.averages)
        parameters = list(pipe.unet.parameters())
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in parameters)
        pipe.unet.requires_grad_(False)
        pipe.unet.requires_grad_(True)
        pipe.unet(torch.zeros(1, 1, 8, 8), torch.tensor([1.0])).sample.square().sum().backward()
        torch.optim.SGD(parameters, lr=0.1).step()
        pipe.save_pretrained(tmp_path / "again")
    assert handed  # diffusers 0.32 saves contiguous weights only
    assert all(tensor.is_contiguous() for tensor in handed)


@pytest.mark.slow
def test_notebook_launcher(small, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(
        "from accelerate import notebook_launcher\n"
        "from ncsn_diffusers.training import TrainingConfig, train\n"
        f"notebook_launcher(train, ({small(train_batch_size=10)!r},), num_processes=2)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    one = train(small(output_dir=str(tmp_path / "one"), adam_epsilon=1e-8))
    two = NCSNPipeline.from_pretrained(tmp_path / "out")
    for p, q in zip(one.unet.parameters(), two.unet.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


def test_another_precision_in_the_same_process(small):
    with_bf16 = trained_weights(small(mixed_precision="bf16"))
    train(small(overwrite_output_dir=True, mixed_precision="no"))
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = train(small(overwrite_output_dir=True))
    again = train(small(overwrite_output_dir=True, mixed_precision="bf16"))  # without a reset
    assert torch.equal(torch.cat([p.detach().flatten() for p in again.unet.parameters()]), with_bf16)
    assert same_weights(train(small(overwrite_output_dir=True, mixed_precision="no")), plain)


# Settings given anew


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e-4},
        {"lr_scheduler": "linear"},
        {"lr_scheduler": "polynomial", "learning_rate": 2e-3},
        {"lr_warmup_steps": 4},
        {"adam_weight_decay": 10.0},
        {"adam_beta1": 0.5, "adam_beta2": 0.9},
        {"adam_epsilon": 1e-2},
        {"max_train_steps": 9},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_settings_given_anew_hold(small, tmp_path, changes):
    train(small(max_train_steps=3, checkpointing_steps=3))
    arguments = {"max_train_steps": 6, "checkpointing_steps": 4} | changes
    config = small(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"), use_ema=False, **arguments)
    trainer = Trainer(config)
    trainer._resume(trainer.checkpoint)

    # the reference: AdamW with these settings, the moments so far, and the schedule four steps on
    before = [p.detach().clone().requires_grad_() for p in trainer.weights]
    names = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    reference = torch.optim.AdamW(before, weight_decay=config.adam_weight_decay, fused=True, **names)
    schedule = get_scheduler(
        config.lr_scheduler,
        reference,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    for _ in range(3):
        reference.step()
        schedule.step()
    (group,) = trainer.optimizer.param_groups
    (expected,) = reference.param_groups
    for name in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
        assert group[name] == expected[name], name
    for p, q in zip(before, trainer.weights, strict=True):
        reference.state[p] = {k: v.clone() for k, v in trainer.optimizer.optimizer.state[q].items()}

    def keep_gradients(grad_norm, add_gradient=trainer.statistics.add_gradient):
        for p, q in zip(before, trainer.weights, strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        return add_gradient(grad_norm)

    trainer.statistics.add_gradient = keep_gradients
    trainer.training_step(trainer.images.batches(config.train_batch_size, config.seed, 3))
    reference.step()
    schedule.step()
    for p, q in zip(before, trainer.weights, strict=True):
        assert torch.equal(p, q)
    assert trainer.lr_scheduler.get_last_lr() == schedule.get_last_lr() == [group["lr"]]


def test_log_tells_what_was_changed(small, tmp_path, capsys):
    out = tmp_path / "out"
    train(small(max_train_steps=2))
    train(small(max_train_steps=4, lr_scheduler="constant", learning_rate=1e-4, resume_from_checkpoint="latest"))
    assert "lr_scheduler: cosine → constant" in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert records[1]["step"] == 2
    assert records[1]["changed_settings"]["learning_rate"] == {"before": 1e-3, "now": 1e-4}
    assert records[-1]["learning_rate"] == 1e-4
    assert json.loads((out / "training_config.json").read_text())["learning_rate"] == 1e-4  # which the card quotes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "`prediction_type`: .*trained with 'v_prediction', and .* with 'epsilon'"),
        ({"sigma_max": 20.0}, r"`sigma_max`: .*trained with 50.0, and cannot go on with 20.0"),
        ({"num_train_timesteps": 100}, r"`num_train_timesteps`: .*trained with 1000, and cannot go on with 100"),
    ],
)
def test_what_a_network_means_cannot_change(small, changes, message):
    train(small(max_train_steps=1))
    with pytest.raises(ValueError, match=message):
        train(small(max_train_steps=2, resume_from_checkpoint="latest", **changes))


def test_classes_cannot_change_their_numbers(small, tmp_path):
    column = datasets.Value("string")
    data = split_labels(tmp_path / "data", train=(column, ["cat", "dog", "owl", "cat"]))
    train(small(**data, max_train_steps=1))
    data = split_labels(tmp_path / "more", train=(column, ["owl", "owl", "dog", "cat", "cat"]))
    train(small(**data, max_train_steps=2, resume_from_checkpoint="latest"))
    data = split_labels(tmp_path / "other", train=(column, ["cat", "fox", "owl", "cat"]))
    with pytest.raises(
        ValueError, match=r"the classes of .* are cat, dog, owl, and those of the data are cat, fox, owl"
    ):
        train(small(**data, max_train_steps=3, resume_from_checkpoint="latest"))


def test_noise_levels_that_the_data_chose_stay(small, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        Image.new("L", (8, 8), (100, 151)[i]).save(images / f"{i}.png")
    arguments = {"train_data_dir": str(images), "train_batch_size": 2}
    arguments |= {"sigma_max": "auto", "num_train_timesteps": "auto", "conditioning": "sigma"}
    train(small(**arguments, max_train_steps=1))
    first = NCSNPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert first.sigma_max == pytest.approx(8 * 0.4)  # 51 of 255 is 0.4 of [-1, 1]; of 64 pixels
    for i in range(2):
        Image.new("L", (8, 8), 255 * i).save(images / f"{i + 2}.png")
    train(small(**arguments, max_train_steps=2, resume_from_checkpoint="latest"))
    second = NCSNPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert (second.sigma_max, second.num_train_timesteps) == (first.sigma_max, first.num_train_timesteps)
    assert "num_images: 2 → 4" in capsys.readouterr().out
    train(small(**arguments, max_train_steps=1, overwrite_output_dir=True))
    assert NCSNPipeline.from_pretrained(tmp_path / "out").scheduler.config.sigma_max == pytest.approx(16)


def test_averages_begin_with_the_weights_when_they_are_asked_for_late(small):
    train(small(max_train_steps=3, use_ema=False))
    trainer = Trainer(small(max_train_steps=4, resume_from_checkpoint="latest"))
    trainer._resume(trainer.checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(trainer.weights, trainer.averages, strict=True))


# Two runs on one folder


def test_two_runs_on_one_folder(small, tmp_path):
    (tmp_path / "out").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = sorted((tmp_path / "out").iterdir())
    for arguments in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(BlockingIOError, match=r"Another run is using .*out: wait for it, or name another folder"):
            train(small(**arguments))
    assert sorted((tmp_path / "out").iterdir()) == before
    holder.kill()
    holder.wait()
    train(small(max_train_steps=1))  # the owner's death has released it


# what checkpoints.lock does, without the seconds that importing it takes
HOLD = """
import fcntl, pathlib, sys, time
file = (pathlib.Path(sys.argv[1]) / ".lock").open("a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(300)
"""


def test_a_run_that_is_over_leaves_the_folder_free(small, tmp_path):
    config = small(max_train_steps=1)
    train(config)
    with pytest.raises(FileExistsError) as failure:  # kept by a notebook, and with it the frames and what they hold
        train(config)
    code = HOLD.replace("time.sleep(300)", "")
    assert subprocess.check_output([sys.executable, "-c", code, tmp_path / "out"]) == b"held\n"
    assert "holds a pipeline" in str(failure.value)


# Batches, processes and schedules


def test_accumulated_batches_follow_the_whole_one(small):
    same = {"random_flip": True, "class_conditional": True, "adam_epsilon": 1e-3, "overwrite_output_dir": True}
    whole = trained_weights(small(**same))
    parts = trained_weights(small(train_batch_size=5, gradient_accumulation_steps=4, **same))
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)  # a large epsilon: Adam's first steps blow rounding up
    assert (trained_weights(small(seed=1, **same)) - whole).abs().max() > 1e-3


def torchrun(*command):
    """accelerate launches several CPU processes through MPI only; torchrun does it with gloo."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("max_cache_gb", "run_two"), [(4.0, torchrun), (0.0, run_two_forked)], ids=["torchrun", "fork"]
)
def test_two_processes_follow_one(small, tmp_path, max_cache_gb, run_two, pictures):
    arguments = {"class_conditional": True, "random_flip": True, "max_cache_gb": max_cache_gb, "num_epochs": 3}
    arguments |= {"eval_steps": 2, "eval_batch_size": 5, "validation_split": "train[:16]", "adam_epsilon": 1e-3}
    train(small(output_dir=str(tmp_path / "one"), **arguments))
    config = small(output_dir=str(tmp_path / "two"), train_batch_size=10, **arguments)
    result = run_two(SCRIPT, *flags(config))
    assert result.returncode == 0, result.stderr
    one, two = (
        torch.cat([p.flatten() for p in NCSNPipeline.from_pretrained(tmp_path / name).unet.parameters()])
        for name in ("one", "two")
    )
    torch.testing.assert_close(two, one, rtol=0, atol=2e-6)  # a large epsilon: Adam's first steps blow rounding up
    grids = [np.asarray(Image.open(tmp_path / name / "samples-2.png"), dtype=int) for name in ("one", "two")]
    assert abs(grids[0] - grids[1]).max() <= 2  # the same samples, however many draw them
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    for lines in zip(*logs, strict=True):
        first, second = map(json.loads, lines)
        assert first.keys() == second.keys()
        for key in first.keys() - {"images_per_second"}:
            assert second[key] == pytest.approx(first[key], rel=2e-3), key
    arguments |= {"num_epochs": 4, "resume_from_checkpoint": "latest"}
    train(small(output_dir=str(tmp_path / "two"), train_batch_size=10, **arguments))
    records = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    changed = next(record["changed_settings"] for record in records if "changed_settings" in record)
    assert changed["num_processes"] == {"before": 2, "now": 1}


# Rank 0's disk is full at step 2, for the checkpoint, and then for what else is named on the command line.
FULL_DISK = """
import errno, os, signal, sys
from accelerate import Accelerator
from ncsn_diffusers import NCSNPipeline
from ncsn_diffusers.training import trainer as training

rank, broken = int(os.environ["RANK"]), sys.argv[1]

def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

if rank == 0:
    save = Accelerator.save_state
    Accelerator.save_state = lambda self, folder: full() if folder.name.endswith("-2") else save(self, folder)
    if broken == "renaming":
        training.checkpoints.commit = full
    if broken == "pipeline":
        NCSNPipeline.save_pretrained = full
if rank == 1 and broken == "interrupt":
    step = training.Trainer.training_step
    def interrupted(self, batches):
        step(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    training.Trainer.training_step = interrupted
try:
    training.train(CONFIG)
except OSError as error:
    print("rank", rank, "ends with", error, flush=True)
else:
    print("rank", rank, "has ended", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["checkpoint", "renaming", "pipeline", "interrupt"])
def test_two_processes_and_a_full_disk(small, tmp_path, broken):
    config = small(train_batch_size=10, checkpointing_steps=1, checkpoints_total_limit=9)
    script = tmp_path / "run.py"
    script.write_text(FULL_DISK.replace("CONFIG", repr(config).replace("TrainingConfig", "training.TrainingConfig")))
    result = run_two_forked(script, broken)
    assert result.returncode == 0, result.stderr
    output = result.stdout
    assert "The checkpoint of step 2 could not be written: [Errno 28] No space left on device." in output
    saved = {path.name for path in (tmp_path / "out").glob("*checkpoint-*")}
    steps = {"renaming": (), "interrupt": (1, 3)}.get(broken, (1, 3, 4))
    assert saved == {f"checkpoint-{step}" for step in steps}
    for rank in (0, 1):
        ending = "ends with `output_dir`=" if broken == "pipeline" else "has ended"
        assert f"rank {rank} {ending}" in output
    if broken == "pipeline":
        assert "go on with --resume_from_checkpoint latest; the last good checkpoint is" in output
    assert (tmp_path / "out" / "model_index.json").exists() == (broken != "pipeline")


def test_learning_rate_counts_optimizer_steps(small, tmp_path):
    train(small(gradient_accumulation_steps=2, train_batch_size=4, num_epochs=2, checkpointing_steps=1))
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=10)
    for record in map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines()):
        optimizer.step()
        schedule.step()
        assert record["learning_rate"] == schedule.get_last_lr()[0]
    assert record["step"] == 10
    assert record["epoch"] == 2.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_step_does_not_wait_for_the_device(small, mixed_precision):
    trainer = Trainer(small(mixed_precision=mixed_precision, random_flip=True, class_conditional=True))
    batches = trainer.images.batches(20, seed=0)
    trainer.training_step(batches)  # fills what is kept between steps
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("noise_distribution", ["lognormal", "uniform"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_step_reads_nothing_from_the_device(small, noise_distribution, mixed_precision):
    class Counter(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.reads += function.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero")
            return function(*arguments, **keywords or {})

    arguments = {"random_flip": True, "class_conditional": True, "gradient_accumulation_steps": 2}
    arguments |= {"noise_distribution": noise_distribution, "mixed_precision": mixed_precision}
    trainer = Trainer(small(train_batch_size=10, **arguments))
    batches = trainer.images.batches(10, seed=0)
    trainer.training_step(batches)  # fills what is kept between steps
    with Counter() as counter:
        trainer.training_step(batches)
    assert counter.reads == 0
    with Counter() as counter:
        torch.ones(1).item()
    assert counter.reads == 1


def has_mps_kernel(function, functions):
    """Whether torch's table names a kernel for Apple's GPUs, or one for all devices, for an entry of the table."""
    delegate = function.get("structured_delegate")
    if delegate is not None:
        return has_mps_kernel(functions[delegate], functions)
    dispatch = function.get("dispatch")
    if dispatch is None:  # composed of other operations, which are looked at themselves
        return True
    keys = {key.strip() for keys in dispatch for key in keys.split(",")}
    return bool(keys & {"MPS", "CompositeImplicitAutograd"}) or any(key.startswith("CompositeExplicit") for key in keys)


@pytest.mark.parametrize("noise_distribution", ["lognormal", "uniform"])
def test_a_step_has_kernels_on_apples_gpus(small, noise_distribution):
    if "mps" not in _get_fused_kernels_supported_devices():
        pytest.skip("this torch has no fused AdamW for Apple's GPUs")
    yaml = pytest.importorskip("yaml")
    table = Path(torch.__file__).parents[1] / "torchgen" / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = yaml.load(table.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    functions = {entry["func"].split("(")[0]: entry for entry in entries}
    assert not has_mps_kernel(functions["special_ndtri"], functions)
    assert has_mps_kernel(functions["erfinv"], functions)

    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.add(function)
            return function(*arguments, **keywords or {})

    trainer = Trainer(small(random_flip=True, class_conditional=True, noise_distribution=noise_distribution))
    batches = trainer.images.batches(20, seed=0)
    # each device has its own fused attention, which PyTorch chooses
    with sdpa_kernel(SDPBackend.MATH), Recorder():
        trainer.training_step(batches)
    names = {str(function) for function in called if function.namespace == "aten"}
    names = {name.removeprefix("aten.").removesuffix(".default") for name in names}
    assert {"erfinv" if noise_distribution == "lognormal" else "floor", "_fused_adamw_", "convolution"} <= names
    assert not sorted(name for name in names if not has_mps_kernel(functions[name], functions))


def test_cached_and_loaded_data_train_alike(small):
    cached = trained_weights(small())
    arguments = {"max_cache_gb": 0.0, "overwrite_output_dir": True}
    assert torch.equal(trained_weights(small(**arguments)), cached)
    assert torch.equal(trained_weights(small(dataloader_num_workers=1, **arguments)), cached)


def test_the_settings_replace_the_environment(small, monkeypatch, capsys):
    expected = trained_weights(small(gradient_accumulation_steps=2, train_batch_size=10))
    for name, value in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.001"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_CPU", "true"),
    ):
        monkeypatch.setenv(name, value)
    arguments = {"gradient_accumulation_steps": 2, "train_batch_size": 10, "overwrite_output_dir": True}
    capsys.readouterr()
    trainer = Trainer(small(**arguments))
    assert not hasattr(trainer.model, "_orig_mod")  # as torch.compile would leave it
    said = capsys.readouterr().out.splitlines()
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is ignored: `gradient_accumulation_steps`=2 holds." in said
    assert "ACCELERATE_GRADIENT_CLIPPING=0.001 is ignored: `max_grad_norm`=1.0 holds." in said
    assert any(line.startswith("ACCELERATE_DYNAMO_BACKEND=INDUCTOR is ignored: `compile` decides") for line in said)
    assert "ACCELERATE_USE_CPU=true chooses the device." in said
    assert torch.equal(trained_weights(small(**arguments)), expected)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as `accelerate launch` has it if nobody chose
    said = processes.describe_environment(small(gradient_accumulation_steps=2, max_grad_norm=0.001))
    assert said == ["ACCELERATE_USE_CPU=true chooses the device."]


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_an_environment_that_shards_the_network_is_refused(small, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"^ACCELERATE_USE_{name}=true shards the network"):
        Trainer(small())


def test_sharded_networks_are_refused(small, monkeypatch):
    monkeypatch.setattr(processes, "_REPLICATED", ())
    with pytest.raises(ValueError, match="shards the network"):
        train(small())


# What is learnt, seen and logged


def test_classes(small, tmp_path):
    train(small(num_epochs=100, learning_rate=5e-3, class_conditional=True))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.config.num_class_embeds == 3  # left, right and no label
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        class_labels=[0] * 32 + [1] * 32, num_inference_steps=20, generator=generator, output_type="pt"
    ).images
    side = images[..., 4:].mean((1, 2, 3)) - images[..., :4].mean((1, 2, 3))
    assert (side[:32] < -0.6).float().mean() > 0.9
    assert (side[32:] > 0.6).float().mean() > 0.9
    images = pipe(batch_size=64, num_inference_steps=20, generator=generator, output_type="pt").images
    side = images[..., 4:].mean((1, 2, 3)) - images[..., :4].mean((1, 2, 3))
    assert 16 < (side > 0).sum() < 48  # without a label both, as a fair coin: its deviation is 4


@pytest.mark.parametrize("max_cache_gb", [4.0, 0.0])
@pytest.mark.parametrize(
    ("kind", "classes", "shares"),
    [
        (datasets.Value("int64"), (0, 1, 2, None), [1 / 3, 1 / 2, 1 / 6]),
        (datasets.Value("float64"), (0.0, 1.0, 2.0, math.nan), [1 / 3, 1 / 2, 1 / 6]),
        (datasets.Value("string"), ("a", "c", "d", None), [1 / 3, 1 / 2, 1 / 6]),  # names that occur are numbered
        (datasets.ClassLabel(names=list("abcd")), (0, 2, 3, None), [1 / 3, 0, 1 / 2, 1 / 6]),
    ],
    ids=["int64", "float64", "string", "ClassLabel"],
)
def test_shares_of_the_classes(small, tmp_path, max_cache_gb, kind, classes, shares):
    data = split_labels(tmp_path / "data", train=(kind, [classes[i] for i in (0, 1, 1, 1, 3, 0, 3, 2)]))
    trainer = Trainer(small(**data, max_cache_gb=max_cache_gb))
    assert trainer.class_shares == pytest.approx(shares)


def test_no_shares_without_classes(small):
    assert Trainer(small()).class_shares is None
    stream = {"streaming": True, "resolution": 8, "channels": 1, "max_train_steps": 2}
    assert Trainer(small(class_conditional=True, **stream)).class_shares is None


def test_columns_by_name(small, tmp_path, capsys):
    columns = {
        "gray": [Image.new("L", (8, 8))] * 20,
        "color": [Image.new("RGB", (8, 8))] * 20,
        "kind": [0, 1] * 10,
        "size": [0, 1, 2, 0] * 5,
    }
    features = {"gray": datasets.Image(), "color": datasets.Image(), "kind": datasets.ClassLabel(num_classes=2)}
    features = datasets.Features(features | {"size": datasets.Value("int64")})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    arguments = {"dataset_name": str(tmp_path / "data"), "train_data_dir": None, "class_conditional": True}
    with pytest.raises(ValueError, match="2 columns of images: `image_column` names one of gray, color"):
        train(small(**arguments))
    unet = train(small(**arguments, image_column="gray")).unet
    assert (unet.config.in_channels, unet.config.num_class_embeds) == (1, 3)
    assert "of 2 classes, from `gray` and `kind`." in capsys.readouterr().out
    arguments |= {"image_column": "color", "label_column": "size", "overwrite_output_dir": True}
    unet = train(small(**arguments)).unet
    assert (unet.config.in_channels, unet.config.num_class_embeds) == (3, 4)


def test_labels_are_dropped_as_often_as_asked_for(small, monkeypatch):
    loss, seen = training.score_matching_loss, []

    def watched(denoiser, *rest):
        seen.append(denoiser.labels)
        return loss(denoiser, *rest)

    monkeypatch.setattr(training, "score_matching_loss", watched)
    train(small(class_conditional=True, class_dropout_prob=0.3, num_epochs=20))
    labels = torch.cat(seen)
    assert len(labels) == 800
    assert (labels == 2).float().mean().item() == pytest.approx(0.3, abs=0.05)  # three standard errors
    assert (labels == 0).sum().item() == pytest.approx(280, abs=3 * 13.5)


def test_log(small, tmp_path):
    train(small(num_epochs=21, checkpointing_steps=0, loss_weighting="sigma_squared"))
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [20, 40, 42]
    first = records[0]
    assert first["epoch"] == 10
    assert first["ema_decay"] == pytest.approx(1 - 21**-0.75)
    assert 0 < first["grad_norm"] < 10
    assert first["images_per_second"] > 0
    assert records[-1]["loss"] < first["loss"]
    # the mean over levels of the losses per level is the loss: at the top of the ladder there is nothing to learn
    levels = {k: v for k, v in first.items() if k.startswith("loss at sigma")}
    assert len(levels) == 8
    assert levels["loss at sigma 17 to 50"] < 0.1 < levels["loss at sigma 0.01 to 0.029"]


def test_loss_per_level():
    scheduler = AnnealedLangevinScheduler(
        num_train_timesteps=9, sigma_min=0.01, sigma_max=100.0
    )  # a decade is 2 levels
    level_losses = LossPerLevel(scheduler, torch.device("cpu"))
    assert level_losses.names[0] == "0.01 to 0.032"
    assert level_losses.names[-1] == "32 to 1e+02"
    sigmas = torch.tensor([0.01, 0.02, 0.2, 0.2, 50.0, 100.0])
    for losses in ([1.0, 2.0, 3.0, math.nan, 5.0, 6.0], [1.0, 2.0, 3.0, math.inf, 5.0, 9.0]):
        level_losses.add(sigmas, torch.tensor(losses))
    accelerator = Accelerator()
    means, broken = level_losses.collect(accelerator)
    assert means == {"0.01 to 0.032": 1.5, "0.1 to 0.32": 3.0, "32 to 1e+02": 6.25}
    assert broken == ["0.1 to 0.32"]
    assert level_losses.collect(accelerator) == ({}, [])  # counted once


def test_validation_loss(small, tmp_path, monkeypatch):
    def zero_unet(*arguments):
        unet = make_unet(*arguments)
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
        return unet

    monkeypatch.setattr(training, "make_network", lambda config, scheduler, *data: zero_unet(config, *data))
    arguments = {"prediction_type": "score", "loss_weighting": "sigma_squared", "learning_rate": 1e-12}
    train(small(eval_steps=2, validation_split="train[:30]", **arguments))
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    # a score of 0 costs ½ z² a dimension: 30 images of 64 dimensions have a standard error of 0.016
    assert losses == [pytest.approx(0.5, abs=0.05)] * 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the same noise each time
    assert (tmp_path / "out" / "samples-2.png").exists()


def test_validation_leaves_the_live_weights_alone(small, tmp_path):
    plain = trained_weights(small(output_dir=str(tmp_path / "plain"), checkpointing_steps=4))
    watched = trained_weights(small(checkpointing_steps=4, eval_steps=1, validation_split="train[:8]"))
    assert torch.equal(plain, watched)
    assert_same_state(tmp_path / "plain" / "checkpoint-4", tmp_path / "out" / "checkpoint-4")


def split_labels(folder, **splits):
    """A data set of black images, for each split a type of label and the labels."""
    parts = {}
    for split, (kind, labels) in splits.items():
        features = datasets.Features({"image": datasets.Image(), "kind": kind})
        rows = {"image": [Image.new("L", (8, 8))] * len(labels), "kind": labels}
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(folder)
    return {"train_data_dir": str(folder), "label_column": "kind", "class_conditional": True, "train_batch_size": 2}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (datasets.Value("string"), ["cat", "dog", "fox", "owl"]),
        (datasets.Value("int64"), [0, 1, 2, 3]),
        (datasets.ClassLabel(names=["cat", "dog", "fox", "owl"]), ["cat", "dog", "fox", "owl"]),
    ],
)
def test_validation_numbers_classes_as_the_training_does(small, tmp_path, kind, names):
    cat, dog, fox, owl = names
    data = split_labels(tmp_path / "data", train=(kind, [owl, fox, dog, cat]), test=(kind, [cat, fox, None]))
    trainer = Trainer(small(**data, validation_split="test"))
    assert trainer.num_classes == 4
    assert trainer.validation.labels.tolist() == [0, 2, 4]  # and no label, after the last class


@pytest.mark.parametrize(
    ("train_kind", "test_kind", "train_labels", "test_labels", "message"),
    [
        ("string", "string", "abc", "abd", "`validation_split`='test': .*holds 'd', which is not among the classes of"),
        (
            "int64",
            "int64",
            (0, 1, 2),
            (0, 1, 3),
            "'test' has 4 classes, which are numbers, the training data 3 classes",
        ),
        ("abc", "cba", "abc", "abc", r"'test' has 3 classes \(c, b, a\), the training data 3 classes \(a, b, c\)"),
    ],
)
def test_validation_of_other_classes_is_refused(
    small, tmp_path, train_kind, test_kind, train_labels, test_labels, message
):
    def column(kind):
        return datasets.Value(kind) if kind in ("string", "int64") else datasets.ClassLabel(names=list(kind))

    train_split, test_split = (column(train_kind), list(train_labels)), (column(test_kind), list(test_labels))
    data = split_labels(tmp_path / "data", train=train_split, test=test_split)
    with pytest.raises(ValueError, match=message):
        Trainer(small(**data, validation_split="test"))


def test_validation_data_must_fit(small, image_folder, tmp_path):
    (tmp_path / "both").mkdir()
    shutil.copytree(image_folder, tmp_path / "both" / "train")
    (tmp_path / "both" / "test").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "both" / "test" / "a.png")
    with pytest.raises(ValueError, match=r"`validation_split`='test' has images of shape \(1, 16, 16\)"):
        train(small(train_data_dir=str(tmp_path / "both"), validation_split="test"))


class KeepingTracker(GeneralTracker):
    """A tracker that keeps what it is given, in the way that those of accelerate with images are called."""

    name = "keeping"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.values, self.images = [], []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.values.append((step, values))

    def log_images(self, values, step=None, **kwargs):
        self.images.append((step, values))


def test_trackers_show_sections(small, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = KeepingTracker()
    start = RunLog.start

    def start_both(self, *arguments):
        start(self, *arguments)
        self.accelerator.trackers.append(tracker)

    monkeypatch.setattr(RunLog, "start", start_both)
    train(small(logger="tensorboard", eval_steps=2, validation_split="train[:8]"))
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    tags = {
        "loss": "loss/train",
        "validation_loss": "loss/validation",
        "loss at sigma 0.084 to 0.24": "loss by sigma/0.084 to 0.24",
        "images_per_second": "speed/images_per_second",
        "epoch": "speed/epoch",
        "learning_rate": "optimizer/learning_rate",
        "grad_norm": "optimizer/grad_norm",
        "skipped_steps": "optimizer/skipped_steps",
        "ema_decay": "optimizer/ema_decay",
    }
    events = event_accumulator.EventAccumulator(str(tmp_path / "out" / "ncsn"))
    events.Reload()
    for key, tag in tags.items():
        logged = [(record["step"], pytest.approx(record[key], rel=1e-6)) for record in records if key in record]
        assert logged
        assert [(event.step, event.value) for event in events.Scalars(tag)] == logged
        assert [(step, values[tag]) for step, values in tracker.values if tag in values] == logged
    shown = events.Tags()["scalars"]
    assert set(tags.values()) <= set(shown) == {tag for _, values in tracker.values for tag in values}
    assert {tag.partition("/")[0] for tag in shown} == {"loss", "loss by sigma", "optimizer", "speed"}
    assert len(shown) == sum(len(record) - 1 for record in {frozenset(record): record for record in records}.values())
    assert [image.step for image in events.Images("samples/drawn")] == [2, 4]
    sheet = np.asarray(Image.open(tmp_path / "out" / "samples.png").convert("RGB"))
    (_, (step, images)) = tracker.images
    assert step == 4 and np.array_equal(images["samples/drawn"][0], sheet)


def test_logger_must_be_installed(small, monkeypatch):
    monkeypatch.setattr(processes, "get_available_trackers", list)
    with pytest.raises(ValueError, match="`logger`='wandb' needs a package that is not installed; available are: none"):
        train(small(logger="wandb"))


def test_noise_levels_from_the_data(small, tmp_path):
    train(small(sigma_max="auto", num_train_timesteps="auto", sigma_min=0.1))
    config = NCSNPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert config.sigma_max == pytest.approx(16.0)  # √(64 · 2²): opposite halves differ by 2 in each of 64 dimensions
    assert config.num_train_timesteps == choose_num_train_timesteps(0.1, config.sigma_max, 64)


def test_no_convolution_changes_the_layout(small):
    # diffusers' residual blocks, in training mode, hand their shortcut a copy in the other layout
    trainer = Trainer(small(mixed_precision="no"))
    layouts = {}
    for name, module in trainer.unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: layouts.update(
                    {name: inputs[0].is_contiguous(memory_format=torch.channels_last)}
                )
            )
    trainer.training_step(trainer.images.batches(20, seed=0))
    assert any(name.endswith("conv_shortcut") for name in layouts)
    assert all(layouts.values())


@pytest.mark.slow
def test_compiled_network_learns_the_same(small, tmp_path):
    eager = trained_weights(small())
    compiled = trained_weights(small(compile=True, overwrite_output_dir=True))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-3)
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_what_is_compiled(small):
    assert not Trainer(small()).compiled
    assert Trainer(small(compile=True)).compiled


def test_the_precision_that_is_chosen(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    cpu, gpu, other = torch.device("cpu"), torch.device("cuda"), torch.device("mps")

    def choose(device, **settings):
        return processes.choose_mixed_precision(TrainingConfig(**settings), device)

    assert choose(cpu) == ("no", "no faster format is known for this CPU")
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    assert choose(cpu) == ("bf16", "this CPU has instructions for it")
    assert choose(other)[0] == "no"  # the CPU does not compute
    for supported, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert choose(gpu)[0] == expected
    for name in ("no", "fp16", "bf16"):
        assert choose(cpu, mixed_precision=name) == (name, "`mixed_precision` says so")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose(cpu) == choose(gpu) == ("fp16", "accelerate's settings say so")
    assert choose(cpu, mixed_precision="no")[0] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(
        ValueError, match=r"^ACCELERATE_MIXED_PRECISION=fp8: the network computes in no, fp16, bf16 only"
    ):
        choose(cpu)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` has it if nobody chose
    assert choose(cpu)[0] == "bf16"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"get_capabilities": lambda: {"avx512_bf16": True, "amx_bf16": False}}, True),
        ({"get_capabilities": lambda: {"avx512_bf16": False, "amx_bf16": True}}, True),
        ({"get_capabilities": lambda: {"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}}, False),
        ({"get_capabilities": lambda: {"architecture": "aarch64", "bf16": True}}, False),
        ({"_is_avx512_bf16_supported": lambda: True, "_is_amx_tile_supported": lambda: False}, True),
        ({"_is_avx512_bf16_supported": lambda: False, "_is_amx_tile_supported": lambda: True}, True),
        ({"_is_avx512_bf16_supported": lambda: False, "_is_amx_tile_supported": lambda: False}, False),
        ({"_is_cpu_support_avx512": lambda: True}, False),  # torch 2.4
    ],
)
def test_how_a_cpu_is_known_to_have_bfloat16(found, expected):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cpu", SimpleNamespace(**found))
        assert CPU_HAS_BFLOAT16() is expected


def test_this_cpu_is_found_out():
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or not hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        pytest.skip("needs Linux and torch 2.6")
    words = flags.read_text().split()
    assert CPU_HAS_BFLOAT16() == bool({"avx512_bf16", "amx_bf16"} & set(words))


def test_a_run_keeps_the_precision_that_was_chosen(small, tmp_path, monkeypatch, capsys):
    arguments = {"max_train_steps": 2, "checkpointing_steps": 1}
    with_bf16 = trained_weights(small(mixed_precision="bf16", output_dir=str(tmp_path / "explicit"), **arguments))
    arguments["mixed_precision"] = None
    with monkeypatch.context() as patch:
        patch.setattr(precision, "cpu_has_bfloat16", lambda: True)
        assert torch.equal(trained_weights(small(**arguments)), with_bf16)
    assert "The network computes in bfloat16: this CPU has instructions for it." in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert saved["mixed_precision"] == "bf16"
    assert "--mixed_precision bf16" in saved["command"]
    for name in ("checkpoint-2", "model_index.json"):
        path = tmp_path / "out" / name
        path.rename(tmp_path / name)
    again = trained_weights(small(resume_from_checkpoint="latest", **arguments))  # on a CPU without
    assert torch.equal(again, with_bf16)
    said = capsys.readouterr().out
    assert "The network computes in bfloat16: the run that resumes did." in said
    assert "other settings" not in said
    train(small(resume_from_checkpoint="latest", **arguments | {"mixed_precision": "no"}))
    said = capsys.readouterr().out
    assert "The network computes in float32: `mixed_precision` says so." in said
    assert "mixed_precision: bf16 → no" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "noise"}, r"`prediction_type` must be one of v_prediction, .*not 'noise'"),
        ({"conditioning": "noise"}, "`conditioning` must be one of"),
        ({"noise_distribution": "cosine"}, "`noise_distribution` must be one of lognormal, uniform, not 'cosine'"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of no, fp16, bf16, not 'fp8'"),
        ({"lr_scheduler": "step"}, "`lr_scheduler` must be one of linear, cosine"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1, not 0"),
        ({"num_epochs": 0}, "`num_epochs` must be at least 1"),
        ({"resolution": -8}, "`resolution` must be at least 1, not -8"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"checkpointing_steps": -1}, "`checkpointing_steps` must be at least 0, not -1"),
        ({"class_dropout_prob": 1.0}, "`class_dropout_prob` must be at least 0 and below 1"),
        ({"loss_weighting": "flat"}, "`loss_weighting` must be one of sigma_squared, edm, not 'flat'"),
        ({"corrupt_images": "ignore"}, "`corrupt_images` must be one of error, skip, not 'ignore'"),
        ({"channels": 2}, "`channels` must be one of 1, 3, 4, not 2"),
        ({"logger": "paper"}, "`logger` must be one of all, .*tensorboard.*, not 'paper'"),
        ({"streaming": True}, "`streaming` needs `max_train_steps`"),
        ({"random_crop": True}, "`random_crop` needs `resolution`"),
        ({"label_column": "kind"}, "`label_column`=kind needs `class_conditional`"),
        ({"class_dropout_prob": 0.2}, r"`class_dropout_prob`=0\.2 needs `class_conditional`"),
        ({"log_sigma_mean": 0.0, "architecture": "ncsn"}, r"`log_sigma_mean`=0\.0 needs `noise_dist.*`='lognormal'"),
        ({"log_sigma_std": 1.0, "noise_distribution": "uniform"}, r"`log_sigma_std`=1\.0 needs `noise_distribution`"),
        ({"ema_power": 0.7, "use_ema": False}, r"`ema_power`=0\.7 needs `use_ema`"),
        ({"ema_max_decay": 1.0}, "`ema_max_decay` must be at least 0 and below 1, not 1.0"),
        ({"block_out_channels": (30, 64)}, r"`block_out_channels` must be multiples of 8, not \(30, 64\)"),
        ({"block_out_channels": ()}, "`block_out_channels` must be multiples of 8"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**arguments)


def test_options_that_do_not_fit_the_data(small):
    with pytest.raises(ValueError, match=r"8×8 are a single point before .* halved 4 times.*at least 9"):
        train(small(block_out_channels=(8,) * 5))
    with pytest.raises(
        ValueError, match=r"`train_batch_size`=64 on 1 process\(es\), times .*=1, is more than the 40 images"
    ):
        train(small(train_batch_size=64))
    with pytest.raises(ValueError, match=r"`sigma_min`=5.0 must be below `sigma_max`=2.0"):
        train(small(sigma_min=5.0, sigma_max=2.0))


@pytest.mark.parametrize("channels", [(8,), (16, 16), (32, 64, 64), (64, 128, 128), (24, 40), (136, 272)])
def test_no_norm_takes_the_embeddings_away(channels):
    unet = make_unet(TrainingConfig(block_out_channels=channels), (1, 8, 8), num_classes=2).eval()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([10.0])
    first = unet(x, t, class_labels=torch.tensor([0])).sample
    for timestep, label in ((900.0, 0), (10.0, 1)):
        other = unet(x, torch.tensor([timestep]), class_labels=torch.tensor([label])).sample
        assert (other - first).norm() > 1e-3 * first.norm()


@pytest.mark.parametrize(("channels", "heads"), [(64, 1), (96, 3), (128, 2), (40, 5)])
def test_heads_of_attention_are_as_wide_as_fits(channels, heads):
    attention = make_unet(
        TrainingConfig(block_out_channels=(32, channels), add_attention=True), (1, 8, 8)
    ).mid_block.attentions[0]
    assert attention.heads == heads
    assert attention.inner_dim == channels


def test_default_network_is_small_and_fits_digits():
    unet = make_unet(TrainingConfig(), (1, 28, 28))
    assert unet.config.sample_size == 28
    assert sum(p.numel() for p in unet.parameters()) == 1_124_161
    scheduler = AnnealedLangevinScheduler()
    x = torch.randn(2, 1, 28, 28)
    assert (
        unet(scheduler.scale_model_input(x, torch.tensor([3.0, 7.5])), torch.tensor([3.0, 7.5])).sample.shape == x.shape
    )


def test_a_grid_that_is_not_finite_does_not_end_the_run(small, tmp_path, monkeypatch, capsys):
    def draw(trainer, pipeline):
        raise FloatingPointError("The sample of AnnealedLangevinScheduler is not finite")

    monkeypatch.setattr(Trainer, "_draw", draw)
    train(small(eval_steps=1))
    assert "samples-1.png could not be drawn: The sample of" in capsys.readouterr().out
    assert (tmp_path / "out/model_index.json").exists()
    assert not (tmp_path / "out/samples.png").exists()


def test_a_schedule_that_needs_rules_is_refused():
    with pytest.raises(ValueError, match=r"`lr_scheduler` must be one of .*, not 'piecewise_constant'"):
        TrainingConfig(lr_scheduler="piecewise_constant")


@pytest.mark.parametrize("num_tokens", [49, 100])
def test_attention_in_bfloat16_on_a_cpu(num_tokens):
    torch.manual_seed(0)
    inputs = [torch.randn(4, 2, num_tokens, 16) for _ in range(3)]
    target = torch.randn(4, 2, num_tokens, 16)

    def gradients(context, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        with context:
            functional.scaled_dot_product_attention(*leaves).backward(target.to(dtype))
        return torch.stack([leaf.grad.float() for leaf in leaves])

    right = gradients(nullcontext(), torch.float32)
    fused = gradients(sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.bfloat16)
    chosen = gradients(precision.fast_attention(torch.device("cpu"), torch.bfloat16, num_tokens), torch.bfloat16)
    assert torch.equal(chosen, fused) == (num_tokens > 64)
    assert (chosen - right).norm() < 1.5 * (fused - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_step_in_bfloat16_on_a_cpu_has_the_faster_attention(small, monkeypatch, mixed_precision):
    enabled, loss = [], training.score_matching_loss

    def watched(*arguments):
        enabled.append(torch.backends.cuda.flash_sdp_enabled())  # for all devices, despite its name
        return loss(*arguments)

    monkeypatch.setattr(training, "score_matching_loss", watched)
    train(small(mixed_precision=mixed_precision, max_train_steps=1, eval_batch_size=1))
    assert enabled == [mixed_precision == "no"]


def test_tokens_of_the_last_level():
    assert count_tokens((8, 8, 8), 28, 28) == 49
    assert count_tokens((8, 8), 9, 6) == 15
    assert count_tokens((8,), 24) == 24
