"""
Publishing and loading with huggingface_hub's own client, over HTTP, against the server of hub_server.py.

The test that needs an environment of its own (this package not installed) runs a process with HF_ENDPOINT set.
"""

import ast
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from hub_server import TOKEN
from huggingface_hub import HfApi, ModelCard
from networks import small_unet
from packaging.requirements import Requirement
from PIL import Image
from saved_pipelines import check_same, draw, flatten, make_pipeline

import ncsn_diffusers
from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    GaussianResidualModel,
    LevelUNet2DModel,
    NCSNInpaintPipeline,
    NCSNPipeline,
    RefineNet2DModel,
    SkipUNet2DModel,
    UNetNDModel,
    pipeline_ncsn,
)
from ncsn_diffusers.commands import push
from ncsn_diffusers.foreign_configs import SCHEDULERS
from ncsn_diffusers.hub import BackgroundPush, collect_files, push_to_hub, upload
from ncsn_diffusers.hub.configs import OWN_NETWORKS
from ncsn_diffusers.hub.files import MODULES
from ncsn_diffusers.hub.modules import collect_module, is_module
from ncsn_diffusers.hub.space import GRADIO, collect_space_files
from ncsn_diffusers.training import TrainingConfig, train

ROOT = Path(__file__).parent.parent
PIPELINE, SCHEDULER = (collect_module(MODULES[name]) for name in ("UploadedNCSNPipeline", "AnnealedLangevinScheduler"))
FILES = {
    ".gitattributes",
    "README.md",
    "model_index.json",
    *PIPELINE[1],
    "scheduler/scheduler_config.json",
    *(f"scheduler/{name}" for name in SCHEDULER[1]),
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def pipe():
    return make_pipeline()


@pytest.fixture
def folder(tmp_path, pipe):
    """What a training run leaves."""
    folder = tmp_path / "run"
    pipe.save_pretrained(folder)
    settings = {
        "dataset_name": None,
        "train_data_dir": None,
        "output_dir": "/home/ann/run",
        "num_epochs": 7,
        "random_flip": True,
        "use_ema": True,
        "block_out_channels": [8, 8],
        "train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "seed": 0,
        "hub_token": TOKEN,
    }
    (folder / "training_config.json").write_text(json.dumps(settings))
    records = [
        {"step": 20, "loss": 0.5, "images_per_second": 90.0, "epoch": 3.5},
        {"step": 40, "loss": 0.125, "images_per_second": 100.0, "epoch": 7.0},
        {"step": 40, "validation_loss": 0.25},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name in ("samples.png", "loss.png"):
        Image.new("L", (8, 8)).save(folder / name)
    (folder / "checkpoint-40").mkdir()
    (folder / "checkpoint-40" / "optimizer.bin").write_bytes(b"pickle")
    (folder / "events.out.tfevents").write_text(TOKEN)
    return folder


# --- Publishing ---


def test_push_and_load(hub, pipe, tmp_path):
    info = pipe.push_to_hub("ann/digits", commit_message="First")
    assert info.oid == hub.repositories["ann/digits"].branches["main"]
    assert hub.repositories["ann/digits"].messages[info.oid] == "First"
    assert set(hub.files("ann/digits")) == FILES
    loaded = NCSNPipeline.from_pretrained("ann/digits")
    assert type(loaded) is NCSNPipeline and type(loaded.scheduler) is AnnealedLangevinScheduler
    assert loaded.config._name_or_path == "ann/digits"
    check_same(loaded, pipe)
    inpaint = NCSNInpaintPipeline.from_pretrained("ann/digits")
    assert type(inpaint) is NCSNInpaintPipeline
    # and once more from what has been loaded, whose config names other modules
    loaded.push_to_hub("copy")
    assert json.loads(hub.files("ann/copy")["model_index.json"]) == json.loads(
        hub.files("ann/digits")["model_index.json"]
    )


def test_save_and_push(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "digits", push_to_hub=True, private=True, commit_message="First")
    pipe.save_pretrained(tmp_path / "digits", push_to_hub=True, repo_id="lab/digits", token=TOKEN)
    assert set(hub.files("ann/digits")) == set(hub.files("lab/digits")) == FILES
    assert hub.repositories["ann/digits"].private and not hub.repositories["lab/digits"].private
    check_same(NCSNPipeline.from_pretrained(tmp_path / "digits"), pipe)


def test_only_what_belongs_there_is_uploaded(hub, folder):
    push_to_hub(folder, "lab/digits", private=True)
    files = hub.files("lab/digits")
    assert set(files) == FILES | {"samples.png", "loss.png"}
    assert hub.repositories["lab/digits"].private
    assert not any(TOKEN.encode() in content for content in files.values())
    assert b"/home/ann" not in b"".join(files.values())


def test_unet_loads_alone_under_any_scheduler(hub, pipe):
    pipe.push_to_hub("ann/digits")
    unet = UNet2DModel.from_pretrained("ann/digits", subfolder="unet", use_safetensors=True)
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], weight)
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    stock = DDPMPipeline(unet, ddim)
    stock.set_progress_bar_config(disable=True)
    assert stock(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_stock_scheduler_stays(hub):
    make_pipeline(DDIMScheduler.from_config(AnnealedLangevinScheduler().config)).push_to_hub("ann/ddim")
    assert type(NCSNPipeline.from_pretrained("ann/ddim").scheduler) is DDIMScheduler
    assert not any(name.startswith("scheduler/scheduling") for name in hub.files("ann/ddim"))


def test_revision_and_tag(hub, pipe):
    pipe.push_to_hub("ann/digits", tag="v1")
    before = NCSNPipeline.from_pretrained("ann/digits")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1.0)
    pipe.push_to_hub("ann/digits", revision="next")
    check_same(NCSNPipeline.from_pretrained("ann/digits", revision="next"), pipe)
    for revision in ("v1", None, hub.repositories["ann/digits"].tags["v1"]):
        check_same(NCSNPipeline.from_pretrained("ann/digits", revision=revision), before)
    hub.requests.clear()
    with pytest.raises(ValueError, match="`tag`='v1' exists already"):
        pipe.push_to_hub("ann/digits", tag="v1")
    assert not any(method in ("POST", "PUT") for method, _, _ in hub.requests)


def test_variants(hub, folder, pipe):
    push_to_hub(folder, "ann/digits", variants=("fp16", "ema"))
    names = {"unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.ema.safetensors"}
    files = hub.files("ann/digits")
    assert names < set(files)
    half = NCSNPipeline.from_pretrained("ann/digits", variant="fp16", torch_dtype=torch.float16)
    weights = pipe.unet.state_dict()
    for name, weight in half.unet.state_dict().items():
        assert weight.dtype == torch.float16 and torch.equal(weight, weights[name].half())
    assert not any("model.safetensors" in path for _, path, _ in hub.requests if "/resolve/" in path)
    average = NCSNPipeline.from_pretrained("ann/digits", variant="ema")
    check_same(average, pipe)
    with pytest.raises(ValueError, match="variant"):
        NCSNPipeline.from_pretrained("ann/digits", variant="bf16")


def test_weights_of_an_earlier_upload_do_not_stay(hub, folder, pipe, caplog):
    """They would load as a variant of the new network."""
    push_to_hub(folder, "ann/digits", variants=("fp16", "ema"))
    push_to_hub(folder, "ann/digits", variants=("fp16",), revision="other")
    hub.repositories["ann/digits"].commit(
        "main", {"unet/diffusion_pytorch_model.bin": (b"pickle", True), "notes.txt": (b"mine", False)}, "By hand"
    )
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1.0)
    pipe.save_pretrained(folder)
    push_to_hub(folder, "ann/digits", variants=("fp16",))
    weights = [name for name in sorted(hub.files("ann/digits")) if name.startswith("unet/diffusion")]
    assert weights == ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    assert "unet/diffusion_pytorch_model.bin, unet/diffusion_pytorch_model.ema.safetensors of ann/digits" in caplog.text
    assert hub.files("ann/digits")["notes.txt"] == b"mine"
    half = NCSNPipeline.from_pretrained("ann/digits", variant="fp16")
    assert torch.equal(half.unet.conv_out.bias, pipe.unet.conv_out.bias.half().float())
    BackgroundPush("ann/digits", folder).push(pipe, "Step 1").result()
    assert FILES | {"notes.txt", "samples.png", "loss.png"} == set(hub.files("ann/digits"))
    assert "unet/diffusion_pytorch_model.ema.safetensors" not in hub.files("ann/digits", "other")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.files("ann/digits", "other")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), FileNotFoundError, "model_index.json is missing"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), FileNotFoundError, "safetensors is miss"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").rename(f / "unet/diffusion_pytorch_model.bin"),
            ValueError,
            "pickle",
        ),
        (
            lambda f: DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(f),
            ValueError,
            "holds a DDPMPipeline: load it by NCSNPipeline",
        ),
        (lambda f: (f / "README.md").write_text(f"My token is {TOKEN}"), ValueError, "README.md holds an access token"),
    ],
)
def test_folder_that_cannot_be_published(hub, folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        push_to_hub(folder, "ann/digits")
    assert TOKEN not in str(raised.value)
    assert not hub.repositories


def test_the_folder_is_looked_at_before_the_token(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match=f"There is no folder '{tmp_path}/nothing'"):
        push_to_hub(tmp_path / "nothing", "ann/digits")
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline: model_index\.json is missing"):
        push_to_hub(tmp_path, "ann/digits")
    assert not hub.requests


def test_arguments_that_cannot_work(hub, folder, pipe, monkeypatch):
    with pytest.raises(ValueError, match="`variants` must be among fp16, ema"):
        push_to_hub(folder, "ann/digits", variants=("int8",))
    pipe.save_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match=r"`variants` must be among fp16, ema, .*, not 'fp1'"):
        push_to_hub(folder, "ann/digits", variants=("fp1",))
    with pytest.raises(ValueError, match="no 'ema'"):
        pipe.push_to_hub("ann/digits", variants=("ema",))
    with pytest.raises(ValueError, match="not/a/name"):
        pipe.push_to_hub("not/a/name")
    with pytest.raises(PermissionError, match=r"ann, lab, and not of bob"):
        pipe.push_to_hub("bob/digits")
    with pytest.raises(PermissionError, match="hf auth login"):
        pipe.push_to_hub("ann/digits", token="hf_wrongwrongwrongwrong")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="hf auth login"):
        pipe.push_to_hub("ann/digits")
    assert not hub.repositories
    pipe.push_to_hub("ann/digits", token=TOKEN)
    with pytest.raises(ValueError, match="`private`: ann/digits exists and is public"):
        pipe.push_to_hub("ann/digits", private=True, token=TOKEN)


@pytest.mark.parametrize(
    ("method", "path", "how"),
    [
        ("POST", "/api/repos/create", 503),
        ("PUT", "/storage/", "cut"),
        ("POST", "/commit/", 500),
        ("POST", "/commit/", "cut"),
        ("ANSWER", "/commit/", "cut"),
    ],
)
def test_failures_that_pass_are_tried_again(hub, pipe, method, path, how, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client's own waits, too
    hub.fail(method, path, how)
    pipe.push_to_hub("ann/digits")
    assert not hub.failures[0][3]
    assert len(hub.repositories["ann/digits"].commits) == 2  # the repository's first and ours, once
    assert set(hub.files("ann/digits")) == FILES


def test_failures_that_stay_are_reported(hub, pipe, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.fail("POST", "/commit/", 503, times=100)
    with pytest.raises(OSError, match="failed 5 times") as raised:
        pipe.push_to_hub("ann/digits")
    assert TOKEN not in str(raised.value)
    assert set(hub.files("ann/digits")) == {".gitattributes"}


def test_token_that_may_only_read(hub, pipe):
    hub.fail("POST", "/commit/", 403, times=100)
    with pytest.raises(PermissionError, match="`token` that may write"):
        pipe.push_to_hub("ann/digits")
    assert hub.failures[0][3] == 99  # asked once


# --- Spaces ---


def read_card(content):
    return yaml.safe_load(content.decode().split("---\n")[1])


def test_a_space_beside_the_model(hub, folder):
    info = push_to_hub(folder, "digits", space=True, license="cc-by-4.0", commit_message="First")
    assert info.oid == hub.repositories["ann/digits"].branches["main"]
    assert set(hub.files("ann/digits")) >= FILES  # the model's as ever
    files = hub.files("spaces/ann/digits")
    card = read_card(files["README.md"])
    assert {key: card[key] for key in ("title", "sdk", "app_file", "models", "license")} == {
        "title": "digits",
        "sdk": "gradio",
        "app_file": "app.py",
        "models": ["ann/digits"],
        "license": "cc-by-4.0",
    }
    requirements = [Requirement(line) for line in files["requirements.txt"].decode().splitlines()]
    assert f"gradio=={card['sdk_version']}" in map(str, requirements)
    assert 'launch("ann/digits")' in files["app.py"].decode()
    assert f"Version: {ncsn_diffusers.__version__}\n" in next(
        content.decode() for name, content in files.items() if name.endswith(".dist-info/METADATA")
    )
    modules = {name for name in files if name.startswith("ncsn_diffusers/")}
    assert {
        f"ncsn_diffusers/{name}.py" for name in ("demo/page", "ladder", "hub/loading", "ranks", "sheets", "twisted")
    } <= modules
    unused = ("sample_images", "likelihood", "score_matching")
    assert not modules & {f"ncsn_diffusers/{name}.py" for name in unused}
    for name, content in files.items():  # the package's own code, and none of the training's
        if name.startswith("ncsn_diffusers/"):
            assert content == (ROOT / name).read_bytes()
            assert not re.match("ncsn_diffusers/(training|evaluation|commands|convert|assets)/", name)
            # with all that it imports
            for node in ast.walk(ast.parse(content)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    module = Path(name).parents[node.level - 1].joinpath(*node.module.split("."))
                    assert {f"{module}.py", f"{module}/__init__.py"} & modules, (name, module)
                for module in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names}:
                    module = {"PIL": "pillow"}.get(module, module)
                    assert module in {requirement.name for requirement in requirements}, (name, module)
    older = {f"ncsn_diffusers{name}": (b"", False) for name in ("-0.0.1.dist-info/METADATA", "/older.py")}
    hub.repositories["spaces/ann/digits"].commit("main", older | {"notes.txt": (b"mine", False)}, "An older version")
    push_to_hub(folder, "digits", space=True)  # and once more, where both exist
    assert set(hub.files("spaces/ann/digits")) == set(files) | {"notes.txt"}
    assert len(hub.repositories["spaces/ann/digits"].commits) >= 2


@pytest.mark.parametrize("name", ["2024", "true", "no", "1e3", "null", "digits"])
def test_the_title_of_a_space_is_a_string(name):
    card = read_card(collect_space_files(f"ann/{name}", license="mit")["README.md"])
    assert (card["title"], card["models"], card["license"]) == (name, [f"ann/{name}"], "mit")


def test_the_spaces_gradio_is_what_the_extra_asks_for():
    assert f'demo = ["gradio>={GRADIO}"]\n' in (ROOT / "pyproject.toml").read_text()


def test_a_private_model_has_a_private_space(hub, pipe):
    pipe.push_to_hub("digits", private=True)
    pipe.push_to_hub("digits", space=True)
    assert hub.repositories["spaces/ann/digits"].private
    pipe.push_to_hub("lab/digits", space=True)
    assert not hub.repositories["spaces/lab/digits"].private


def test_a_space_that_cannot_be_made_is_found_before_any_upload(hub, pipe):
    with pytest.raises(ValueError, match="`space`: a Space shows the branch main, and `revision` is 'v2'"):
        pipe.push_to_hub("digits", space=True, revision="v2")
    HfApi().create_repo("ann/digits", repo_type="space", space_sdk="gradio")
    with pytest.raises(ValueError, match="`private`: the Space ann/digits exists and is public"):
        pipe.push_to_hub("digits", space=True, private=True)
    assert list(hub.repositories) == ["spaces/ann/digits"]
    pipe.push_to_hub("digits", private=True)
    commits = len(hub.repositories["ann/digits"].commits)
    with pytest.raises(ValueError, match="`private`: the Space ann/digits exists and is public"):
        pipe.push_to_hub("digits", space=True, commit_message="Second")
    assert len(hub.repositories["ann/digits"].commits) == commits


# --- In the background ---


def test_background_push_uploads_what_was_pushed_last(hub, folder, pipe):
    uploads = BackgroundPush("digits", folder, private=True)
    uploads.create_repository()
    assert uploads.repo_id == "ann/digits" and hub.repositories["ann/digits"].private
    with hub.lock:  # no request is answered: the first is under way, and those behind it give way to the last
        futures = []
        for step in range(4):
            with torch.no_grad():
                pipe.unet.conv_out.bias.fill_(float(step))
            futures.append(uploads.push(pipe, f"Step {step}"))
        (folder / "samples.png").write_bytes(b"of a later step")
    info = uploads.finish()
    assert futures[1].result() is None or futures[2].result() is None
    assert info.oid == hub.repositories["ann/digits"].branches["main"]
    assert hub.repositories["ann/digits"].messages[info.oid] == "Step 3"
    loaded = NCSNPipeline.from_pretrained("ann/digits")
    assert (loaded.unet.conv_out.bias == 3).all()
    assert hub.files("ann/digits")["samples.png"] != b"of a later step"


def test_background_push_warns_and_never_raises(hub, folder, pipe, monkeypatch, caplog):
    monkeypatch.setattr("time.sleep", lambda _: None)
    uploads = BackgroundPush("ann/digits", folder)
    hub.fail("POST", "/commit/", "cut", times=100)
    with caplog.at_level(logging.WARNING):
        assert uploads.push(pipe, "Step 1").result() is None
        assert uploads.finish() is None
    assert "The upload to ann/digits has failed" in caplog.text and TOKEN not in caplog.text
    hub.failures.clear()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryDirectory", lambda: (_ for _ in ()).throw(OSError("No space left on device")))
        assert uploads.push(pipe, "Step 2").result() is None
    assert "No space left on device" in caplog.text
    assert uploads.push(pipe, "Step 3").result().oid == hub.repositories["ann/digits"].branches["main"]


@pytest.fixture
def training_config(tmp_path):
    for i in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 30 * i).save(tmp_path / "images" / f"{i}.png")
    return partial(
        TrainingConfig,
        train_data_dir=str(tmp_path / "images"),
        output_dir=str(tmp_path / "run"),
        block_out_channels=(8, 8),
        train_batch_size=4,
        eval_batch_size=1,
        max_train_steps=2,
        checkpointing_steps=1,
        push_to_hub=True,
    )


def test_training_publishes_at_checkpoints_and_at_the_end(hub, training_config, monkeypatch, tmp_path):
    messages = []
    push = BackgroundPush.push
    monkeypatch.setattr(
        BackgroundPush, "push", lambda self, pipe, text: messages.append(text) or push(self, pipe, text)
    )
    pipe = train(training_config(hub_model_id="lab/digits", hub_private_repo=True))
    assert messages == ["Step 1", "End of training"]
    assert hub.repositories["lab/digits"].private
    files = hub.files("lab/digits")
    assert {"README.md", "samples.png", "loss.png", "unet/diffusion_pytorch_model.safetensors"} <= files.keys()
    assert not any(b"hf_" in content for content in files.values())
    check_same(NCSNPipeline.from_pretrained("lab/digits"), pipe)


def test_training_anew_publishes_nothing_of_the_run_before(hub, training_config, tmp_path, monkeypatch):
    train(training_config(push_to_hub=False, eval_steps=1)).save_pretrained(tmp_path / "run", variant="fp16")
    collected = []
    monkeypatch.setattr(
        upload, "collect_files", lambda *a, **kw: collected.append(collect_files(*a, **kw)) or collected[-1]
    )
    pipe = train(training_config(overwrite_output_dir=True, seed=1))
    first, last = collected
    assert not {"samples.png", "loss.png"} & first.keys() and {"samples.png", "loss.png"} <= last.keys()
    assert {path.name for path in (tmp_path / "run").glob("samples*.png")} == {"samples.png"}
    assert [path.name for path in (tmp_path / "run" / "unet").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    check_same(NCSNPipeline.from_pretrained(tmp_path / "run"), pipe)


def test_a_hub_that_is_gone_costs_no_training(hub, training_config, caplog, tmp_path):
    hub.fail("POST", "/commit/", "cut", times=100)
    train(training_config())
    assert "The upload to ann/run has failed" in caplog.text  # named after the folder
    assert (tmp_path / "run" / "samples.png").exists()


def test_training_finds_a_wrong_repository_first(hub, training_config, tmp_path):
    with pytest.raises(OSError, match="bob/digits"):
        train(training_config(hub_model_id="bob/digits"))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    with pytest.raises(ValueError, match="`hub_model_id`=digits needs `push_to_hub`"):
        TrainingConfig(hub_model_id="digits")


def test_background_push_finds_mistakes_before_the_training(hub, folder):
    with pytest.raises(PermissionError, match="not of bob"):
        BackgroundPush("bob/digits", folder)
    with pytest.raises(PermissionError, match="hf auth login"):
        BackgroundPush("ann/digits", folder, token="hf_wrongwrongwrongwrong")


# --- The card ---


def test_card_of_a_training_run(hub, folder):
    push_to_hub(folder, "ann/digits", license="apache-2.0", variants=("fp16",))
    text = hub.files("ann/digits")["README.md"].decode()
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "datasets": ["ylecun/mnist"],
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["ncsn", "score-matching", "langevin-dynamics", "diffusion"],
    }
    for expected in (
        "gray images of 8 × 8 pixels",
        "![Samples](samples.png)",
        "![Loss curve](loss.png)",
        'NCSNPipeline.from_pretrained("ann/digits")',
        "trust_remote_code=True",
        "DDIMScheduler.from_config(pipe.scheduler.config)",
        'Other weights: `variant="fp16"`.',
        "| sigma, largest | 50.0 |",
        "| steps | 40 |",
        "| epochs | 7 |",
        "| images per step and process | 64 |",
        "| loss at the end | 0.125 |",
        "| validation loss | 0.25 |",
        "CC BY-SA 3.0",
        "@inproceedings{song2019generative",
    ):
        assert expected in text
    assert "```bash" not in text  # the settings alone do not say which command it was
    assert "| learning rate | 0.001 |" in text and "| weights | moving average |" in text


def test_card_quotes_the_command_of_the_run(hub, folder):
    command = "accelerate launch train.py \\\n    --train_data_dir 'my faces' --random_flip"
    settings = json.loads((folder / "training_config.json").read_text())
    (folder / "training_config.json").write_text(json.dumps({**settings, "command": command}))
    push_to_hub(folder, "ann/digits")
    text = hub.files("ann/digits")["README.md"].decode()
    assert text.split("```bash\n")[1].split("\n```")[0] == command
    assert text.index("| learning rate |") < text.index("```bash") < text.index("![Loss curve]")
    (folder / "training_config.json").write_text(json.dumps({**settings, "command": f"train --token {TOKEN}"}))
    with pytest.raises(ValueError, match=r"README\.md holds an access token"):
        push_to_hub(folder, "ann/other")
    (folder / "training_config.json").write_text(json.dumps({**settings, "command": ["accelerate", "launch"]}))
    with pytest.raises(OSError, match=r"^training_config\.json of .* cannot be used: `command` must be a string"):
        push_to_hub(folder, "ann/other")
    assert "ann/other" not in hub.repositories


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training_config.json", "[1]", "it must be a JSON object, not \\[1\\]"),
        ("training_config.json", '{"seed": 0', "it is not JSON"),
        ("log.jsonl", '{"step": 20, "lo\n{"step": 40, "loss": 0.5}\n', "line 1 is not JSON"),
        ("log.jsonl", '{"step": 20, "loss": 0.5}\n[7]\n', "line 2 must be a JSON object"),
    ],
)
def test_run_that_cannot_be_read(hub, folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(OSError, match=f"^{name} of '{folder}' cannot be used: {message}"):
        push_to_hub(folder, "ann/digits")
    assert not hub.repositories


def test_a_log_whose_last_line_is_torn(hub, folder, caplog):
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 60, "loss": 0.0')
    push_to_hub(folder, "ann/digits")
    assert "| loss at the end | 0.125 |" in hub.files("ann/digits")["README.md"].decode()
    assert f"The last line of {folder / 'log.jsonl'} is incomplete" in caplog.text


def test_card_names_the_schedulers_that_fit(hub, folder):
    push_to_hub(folder, "ann/digits")
    text = hub.files("ann/digits")["README.md"].decode()
    named = set(
        re.findall(r"\w+Scheduler", text.split("These schedulers of diffusers sample it as well: ")[1].split(". ")[0])
    )
    assert {"DDIMScheduler", "UniPCMultistepScheduler"} <= named
    assert named == set(SCHEDULERS)
    assert not {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "LCMScheduler", "RePaintScheduler"} & named


def test_card_names_the_data_set(hub, folder):
    (folder / "training_config.json").write_text(json.dumps({"dataset_name": "ylecun/mnist"}))
    push_to_hub(folder, "ann/digits")
    text = hub.files("ann/digits")["README.md"].decode()
    assert ModelCard(text).data.datasets == ["ylecun/mnist"] and "first 10,000" not in text
    push_to_hub(folder, "ann/digits", dataset="ann/numbers")
    text = hub.files("ann/digits")["README.md"].decode()
    assert ModelCard(text).data.datasets == ["ann/numbers"] and "CC BY-SA" not in text
    with pytest.raises(ValueError, match="`dataset`='/home/ann/x' must be the name"):
        push_to_hub(folder, "ann/digits", dataset="/home/ann/x")


def test_card_shows_the_newest_samples(hub, folder):
    for step, age in ((20, 2), (40, 1)):
        path = folder / f"samples-{step}.png"
        path.write_bytes(f"{step}".encode())
        os.utime(path, (time.time() + 60 - age,) * 2)
    push_to_hub(folder, "ann/digits")
    assert hub.files("ann/digits")["samples.png"] == b"40"


def test_card_of_private_folders_and_sigma_conditioning(hub, folder):
    settings = json.loads((folder / "training_config.json").read_text())
    settings["train_data_dir"] = "/home/ann/faces"
    (folder / "training_config.json").write_text(json.dumps(settings))
    make_pipeline(AnnealedLangevinScheduler(conditioning="sigma")).save_pretrained(folder)
    push_to_hub(folder, "ann/faces")
    text = hub.files("ann/faces")["README.md"].decode()
    assert "| data | faces |" in text and "/home/ann" not in text and "\ndatasets:" not in text
    assert "DDIMScheduler" not in text


def test_card_of_ones_own(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push_to_hub(folder, "ann/digits")
    assert hub.files("ann/digits")["README.md"].decode().endswith("# Mine\n")
    (folder / "README.md").write_text("---\nlicense: free beer\n---\n# Mine\n")
    for repo_id in ("ann/digits", "ann/new"):
        with pytest.raises(ValueError, match="license"):  # the Hub's own check
            push_to_hub(folder, repo_id)
    assert "ann/new" not in hub.repositories


# --- Loading ---


def test_without_the_package(hub, pipe, tmp_path):
    pipe.push_to_hub("ann/digits")
    expected = draw(pipe)
    torch.save(expected, tmp_path / "expected.pt")
    program = textwrap.dedent(
        """
        import importlib.abc, os, sys

        class Hidden(importlib.abc.MetaPathFinder):  # as if it were not installed
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "ncsn_diffusers":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hidden())
        import torch
        from diffusers import DDIMScheduler, DiffusionPipeline

        try:
            DiffusionPipeline.from_pretrained("ann/digits")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("code of a repository was run unasked")

        for offline in (False, True):
            pipe = DiffusionPipeline.from_pretrained(
                "ann/digits", trust_remote_code=True, **({"local_files_only": True} if offline else {})
            )
            pipe.set_progress_bar_config(disable=True)
            assert type(pipe).__name__ == "UploadedNCSNPipeline"
            images = pipe(num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0)).images
            torch.testing.assert_close(images, torch.load(sys.argv[1], weights_only=True), rtol=0, atol=1e-5)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe(num_inference_steps=2)
        pipe.save_pretrained(sys.argv[2])
        for publish in (
            lambda: pipe.push_to_hub("ann/copy"),
            lambda: pipe.save_pretrained("unwritten", push_to_hub=True, repo_id="ann/copy"),
        ):
            try:
                publish()
            except ImportError as error:
                assert "`pip install ncsn_diffusers`" in str(error), error
            else:
                raise AssertionError("published without the package")
        assert not os.path.exists("unwritten")
        assert not any(name.startswith("ncsn_diffusers") for name in sys.modules)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "expected.pt", tmp_path / "saved"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert set(hub.repositories) == {"ann/digits"}
    # as the message says: the package publishes what has been saved
    saved = NCSNPipeline.from_pretrained(tmp_path / "saved")
    assert type(saved.scheduler) is DDIMScheduler
    saved.push_to_hub("ann/copy")
    check_same(NCSNPipeline.from_pretrained("ann/copy"), saved)


def make_networks():
    """A small pipeline of each class of networks that diffusers does not have, of images and of fields."""
    torch.manual_seed(0)
    levels, sigmas = AnnealedLangevinScheduler(), [1.0, 0.4, 0.1]
    by_sigma = AnnealedLangevinScheduler(conditioning="sigma", prediction_type="score")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    small = {"block_out_channels": [8, 16], "norm_num_groups": 4}
    refine = {"block_out_channels": [8] * 3, "dilations": [1, 2, 4], "sigmas": sigmas}
    field = GaussianResidualModel.fit(5 + torch.randn(9, 2, 3, 4), levels, rank=3, unet=small)
    torch.nn.init.normal_(field.model.conv_out.weight)
    networks = [
        (UNetNDModel((7,), 2, **small), levels),
        (field, levels),
        (RefineNet2DModel(8, 1, **refine), by_sigma),
        (LevelUNet2DModel(sigmas, 8, 1, {**blocks, **small}), by_sigma),
        (SkipUNet2DModel(8, 1, 1, **blocks, **small), levels),
    ]
    return {type(network).__name__: NCSNPipeline(network, scheduler) for network, scheduler in networks}


def test_each_network_without_the_package(hub, tmp_path):
    pipes = make_networks()
    assert pipes.keys() == OWN_NETWORKS.keys()
    expected = {}
    for name, pipe in pipes.items():
        pipe.push_to_hub(f"ann/{name}", variants=["fp16"])
        modules = [file for file in hub.files(f"ann/{name}") if re.fullmatch(r"unet/.*\.py", file)]
        assert [re.sub(r"_[0-9a-f]{8}\.py", ".py", file) for file in modules] == [f"unet/{MODULES[name].name}"]
        loaded = NCSNPipeline.from_pretrained(f"ann/{name}")
        assert type(loaded.unet) is type(pipe.unet)
        expected[name] = draw(loaded, output_type="latent")
        torch.testing.assert_close(draw(pipe, output_type="latent"), expected[name], rtol=1e-5, atol=1e-5)
    torch.save(expected, tmp_path / "expected.pt")
    program = """
    import importlib.abc, sys

    class Hidden(importlib.abc.MetaPathFinder):  # as if it were not installed
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "ncsn_diffusers":
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hidden())
    import torch
    from diffusers import DiffusionPipeline

    for name, expected in torch.load(sys.argv[1], weights_only=True).items():
        pipe = DiffusionPipeline.from_pretrained(f"ann/{name}", trust_remote_code=True)
        assert type(pipe.unet).__name__ == name
        assert type(pipe.unet).__module__.startswith("diffusers_modules."), type(pipe.unet).__module__
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(num_inference_steps=3, output_type="latent", generator=generator).images
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        half = DiffusionPipeline.from_pretrained(f"ann/{name}", trust_remote_code=True, variant="fp16").unet
        for key, weight in half.state_dict().items():
            torch.testing.assert_close(weight.float(), pipe.unet.state_dict()[key], rtol=1e-3, atol=1e-6)
    assert not any(name.startswith("ncsn_diffusers") for name in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "expected.pt"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def write_modules(folder, value):
    """The package's modules with two siblings more, and a constant that differs."""
    folder.mkdir()
    for path in MODULES["UploadedNCSNPipeline"].parent.glob("*.py"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    for module in ("pipeline_ncsn", "scheduling_annealed_langevin"):
        with open(folder / f"{module}.py", "a", encoding="utf-8") as file:
            file.write(f"\nfrom .tiny import (\n    double,\n)\n\nCONSTANT = {value}\n")
    (folder / "tiny.py").write_text("from .tinier import VALUE\n\n\ndef double():\n    return 2 * VALUE\n")
    (folder / "tinier.py").write_text(f"VALUE = {value}\n")
    return {name: folder / path.name for name, path in MODULES.items()}


def test_siblings_of_two_repositories_in_one_process(hub, pipe, tmp_path, monkeypatch):
    for name, value in (("first", 1), ("second", 2)):
        monkeypatch.setattr("ncsn_diffusers.hub.files.MODULES", write_modules(tmp_path / name, value))
        pipe.push_to_hub(f"ann/{name}")
    assert sum("tiny" in name or "tinier" in name for name in hub.files("ann/first")) == 4
    torch.save(draw(pipe), tmp_path / "expected.pt")
    program = """
    import sys
    import torch
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    pipes = []

    def check():
        for value, pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
            for part in (pipe, pipe.scheduler):
                module = sys.modules[type(part).__module__]
                assert module.__name__.startswith("diffusers_modules."), module
                assert (module.double(), module.CONSTANT) == (2 * value, value), (module.double(), value)
            images = pipe(num_inference_steps=3, output_type="pt", generator=torch.Generator().manual_seed(0)).images
            torch.testing.assert_close(images, torch.load(sys.argv[1], weights_only=True), rtol=0, atol=1e-5)

    for how in ("online", "offline", "folder"):
        for value, name in ((1, "ann/first"), (2, "ann/second"), (1, "ann/first")):
            source = snapshot_download(name) if how == "folder" else name
            options = {"local_files_only": True} if how == "offline" else {}
            pipes.append((value, DiffusionPipeline.from_pretrained(source, trust_remote_code=True, **options)))
            check()
    assert not any(name.startswith("ncsn_diffusers") for name in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "expected.pt"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_names_of_modules(tmp_path):
    paths = write_modules(tmp_path / "one", 1)
    name, files = collect_module(paths["UploadedNCSNPipeline"])
    assert re.fullmatch(r"pipeline_ncsn_[0-9a-f]{8}", name) and all(map(is_module, files))
    assert not any(map(is_module, ["pipeline.py", "scheduler/my_file.py", "a/b/units_12345678.py", "x_12345678.txt"]))
    assert collect_module(paths["UploadedNCSNPipeline"]) == (name, files)
    # the same sibling has one name, whichever module it goes with; a change deep below renames all above it
    siblings = {file for file in files if file.startswith("tin")}
    assert len(siblings) == 2 and siblings <= collect_module(paths["AnnealedLangevinScheduler"])[1].keys()
    changed = collect_module(write_modules(tmp_path / "two", 2)["AnnealedLangevinScheduler"])[1].keys() - files.keys()
    assert {re.sub(r"_[0-9a-f]{8}\.py", "", file) for file in changed} == {
        "scheduling_annealed_langevin",
        "tinier",
        "tiny",
    }
    # diffusers copies what the file itself imports
    imported = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", files[f"{name}.py"].decode(), flags=re.MULTILINE))
    assert {f"{module}.py" for module in imported} == files.keys() - {f"{name}.py"}
    (tmp_path / "one" / "tinier.py").write_text("from . import tiny\n")
    with pytest.raises(ValueError, match=r"tinier\.py:1: from \. import tiny must read `from \.name import"):
        collect_module(paths["UploadedNCSNPipeline"])
    (tmp_path / "one" / "tinier.py").write_text("from .tiny import double\n")
    with pytest.raises(ValueError, match="imports itself"):
        collect_module(paths["UploadedNCSNPipeline"])
    for network in OWN_NETWORKS:
        assert len(collect_module(MODULES[network])[1]) == 1, network  # diffusers would not download a sibling in unet/


def test_modules_of_an_earlier_upload_do_not_stay(hub, pipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ncsn_diffusers.hub.files.MODULES", write_modules(tmp_path / "older", 1))
        pipe.push_to_hub("ann/digits")
    hub.repositories["ann/digits"].commit("main", {"mine.py": (b"", False)}, "By hand")
    pipe.push_to_hub("ann/digits")
    assert set(hub.files("ann/digits")) == FILES | {"mine.py"}


@pytest.mark.parametrize("arguments", [{"push_to_hub": True}, {"push_to_hub": True, "repo_id": "ann/copy"}])
def test_code_of_a_repository_does_not_publish(hub, pipe, tmp_path, arguments):
    uploaded = pipeline_ncsn.UploadedNCSNPipeline(**pipe.components)
    for publish in (
        lambda: uploaded.push_to_hub("ann/copy", private=True),
        lambda: uploaded.save_pretrained(tmp_path / "copy", **arguments),
        lambda: uploaded.save_pretrained(tmp_path / "copy", True, None, None, True),
    ):
        with pytest.raises(ImportError, match=r"Install the package.*NCSNPipeline\.from_pretrained.*push_to_hub"):
            publish()
    assert not hub.repositories and not (tmp_path / "copy").exists()
    uploaded.save_pretrained(tmp_path / "copy", variant="fp16")
    assert (tmp_path / "copy/unet/diffusion_pytorch_model.fp16.safetensors").is_file()


def test_clone_with_code_loads_without_running_it(hub, pipe, tmp_path):
    pipe.push_to_hub("ann/digits")
    clone = Path(huggingface_hub.snapshot_download("ann/digits", local_dir=tmp_path / "clone"))
    for path in clone.rglob("*.py"):
        path.write_text("raise RuntimeError('run')")
    check_same(NCSNPipeline.from_pretrained(clone), pipe)


def test_offline_from_the_cache(hub, pipe, monkeypatch):
    pipe.push_to_hub("ann/digits", tag="v1")
    NCSNPipeline.from_pretrained("ann/digits")
    hub.requests.clear()
    check_same(NCSNPipeline.from_pretrained("ann/digits", local_files_only=True), pipe)
    assert not hub.requests
    with pytest.raises(OSError, match="not in the cache"):
        NCSNPipeline.from_pretrained("ann/other", local_files_only=True)
    hub.close()
    check_same(NCSNPipeline.from_pretrained("ann/digits"), pipe)
    with pytest.raises(OSError, match="out of reach"):
        NCSNPipeline.from_pretrained("ann/digits", revision="v1")


@pytest.mark.skipif(huggingface_hub.__version__ < "1", reason="clients before 1.0 give up then")
def test_download_goes_on_after_a_cut_connection(hub, pipe, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    pipe.push_to_hub("ann/digits")
    hub.fail("GET", "/storage/", "cut")
    check_same(NCSNPipeline.from_pretrained("ann/digits"), pipe)
    assert not hub.failures[0][3]


def test_tokens_are_not_sent_to_the_storage(hub, pipe):
    pipe.push_to_hub("ann/digits")
    NCSNPipeline.from_pretrained("ann/digits")
    assert {token for _, path, token in hub.requests if path.startswith("/storage/")} == {None}


def test_private_repository(hub, pipe, monkeypatch, tmp_path):
    pipe.push_to_hub("ann/secret", private=True)
    for token in (False, "hf_bobsSecretToken0123456789"):
        with pytest.raises(OSError, match="hf auth login"):
            NCSNPipeline.from_pretrained("ann/secret", token=token, cache_dir=tmp_path / "bob")
    monkeypatch.delenv("HF_TOKEN")
    loaded = NCSNPipeline.from_pretrained("ann/secret", token=TOKEN)
    check_same(loaded, pipe)
    assert TOKEN not in json.dumps(dict(loaded.config), default=str)


def test_what_is_not_there(hub, pipe, tmp_path):
    pipe.push_to_hub("ann/digits")
    with pytest.raises(OSError, match="'ann/digit' is neither a folder here nor a repository"):
        NCSNPipeline.from_pretrained("ann/digit")
    with pytest.raises(OSError, match="no revision 'v2'"):
        NCSNPipeline.from_pretrained("ann/digits", revision="v2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"model_index\.json is missing"):
        NCSNPipeline.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "unet/*.safetensors"]
)
def test_missing_file(hub, pipe, tmp_path, name):
    pipe.save_pretrained(tmp_path / "pipe")
    for path in (tmp_path / "pipe").glob(name):
        path.unlink()
    hub.publish("ann/digits", tmp_path / "pipe")
    for source in ("ann/digits", tmp_path / "pipe"):
        with pytest.raises(OSError, match=name.split("/")[-1].replace("*.", "")):
            NCSNPipeline.from_pretrained(source)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_wrong_hash(hub, pipe, name):
    pipe.push_to_hub("ann/digits")
    hub.damaged.add(name)
    with pytest.raises(OSError, match=r"damaged.*Delete (\S+) and load again") as raised:
        NCSNPipeline.from_pretrained("ann/digits")
    hub.damaged.clear()
    Path(str(raised.value).split("Delete ")[1].split(" and load")[0]).unlink()
    check_same(NCSNPipeline.from_pretrained("ann/digits"), pipe)


def test_of_a_newer_version(hub, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    index["_saved_format"] += 1
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    hub.publish("ann/digits", tmp_path / "pipe")
    for source in ("ann/digits", tmp_path / "pipe"):
        with pytest.raises(ValueError, match=r"newer version.*Update the package"):
            NCSNPipeline.from_pretrained(source)


# --- Public checkpoints ---


@pytest.mark.parametrize("flat", [False, True])
def test_ncsnpp_repository(hub, tmp_path, caplog, flat):
    unet = small_unet(time_embedding_type="fourier")
    stock = ScoreSdeVePipeline(unet, ScoreSdeVeScheduler(num_train_timesteps=2000, sigma_max=378.0, snr=0.17))
    stock.save_pretrained(tmp_path / "pp")
    if flat:
        flatten(tmp_path / "pp")
    hub.publish("google/ncsnpp", tmp_path / "pp")
    with caplog.at_level(logging.WARNING):
        pipe = NCSNPipeline.from_pretrained("google/ncsnpp")
    assert "google/ncsnpp is a ScoreSdeVePipeline: its ScoreSdeVeScheduler has become an Anneal" in caplog.text
    assert "in [0, 1]" in caplog.text
    assert type(pipe.scheduler) is AnnealedLangevinScheduler
    assert pipe.scheduler.config.conditioning == "sigma" and pipe.scheduler.config.prediction_type == "score"
    assert pipe.scheduler.config.sigma_max == pytest.approx(378.0)
    assert (pipe.units.data_mean, pipe.units.data_std) == (0, 0.5)
    for name, weight in unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight)
    # its data range is kept, in the own format too
    pipe.push_to_hub("ann/pp")
    again = NCSNPipeline.from_pretrained("ann/pp")
    assert again.units == pipe.units and "in [0, 1]" in hub.files("ann/pp")["README.md"].decode()
    check_same(again, pipe)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_ddpm_repository(hub, tmp_path, caplog, flat, pickled):
    stock = DDPMPipeline(small_unet(), DDPMScheduler())
    stock.save_pretrained(tmp_path / "ddpm", safe_serialization=not pickled)
    if flat:
        flatten(tmp_path / "ddpm")
    hub.publish("google/ddpm", tmp_path / "ddpm")
    with caplog.at_level(logging.WARNING):
        pipe = NCSNPipeline.from_pretrained("google/ddpm")
    assert "google/ddpm is a DDPMPipeline: its DDPMScheduler has become an Annealed" in caplog.text
    assert "in [-1, 1]" in caplog.text
    assert type(pipe.scheduler) is AnnealedLangevinScheduler and pipe.scheduler.config.prediction_type == "epsilon"
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, stock.scheduler.alphas_cumprod)
    assert draw(pipe).shape == (1, 1, 8, 8)
    if pickled:
        with pytest.raises(OSError, match="safetensors"):
            NCSNPipeline.from_pretrained("google/ddpm", use_safetensors=True)


def test_pickles_are_refused_under_our_name(hub, pipe, tmp_path):
    DiffusionPipeline.save_pretrained(pipe, tmp_path / "pipe", safe_serialization=False)
    hub.publish("ann/pickle", tmp_path / "pipe")
    for source in ("ann/pickle", tmp_path / "pipe"):
        with pytest.raises(OSError, match="safetensors"):
            NCSNPipeline.from_pretrained(source)


def test_other_pipelines_are_refused(hub, tmp_path):
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    hub.publish("ann/sd", tmp_path / "sd")
    for source in ("ann/sd", tmp_path / "sd"):
        with pytest.raises(ValueError, match="is a StableDiffusionPipeline"):
            NCSNPipeline.from_pretrained(source)


# --- The command ---


def run_push(*arguments):
    push.main([*map(str, arguments)], "ncsn-diffusers push")


def test_push(hub, folder, capfd):
    arguments = ["--private", "--tag", "v1", "--revision", "release", "--variants", "fp16", "--license", "mit"]
    run_push(folder, "lab/digits", *arguments)
    repository = hub.repositories["lab/digits"]
    assert repository.private and repository.tags["v1"] == repository.branches["release"]
    files = hub.files("lab/digits", "release")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files and b"license: mit" in files["README.md"]
    out, err = capfd.readouterr()
    assert f"{hub.url}/lab/digits" in out
    assert "100%" in err  # the progress bar
    assert TOKEN not in out + err
    run_push(folder, "lab/digits", "--space")
    assert f"The page: {hub.url}/spaces/lab/digits\n" in capfd.readouterr().out
    assert "app.py" in hub.files("spaces/lab/digits")


def test_push_fails_before_any_upload(hub, tmp_path):
    with pytest.raises(SystemExit, match=r"^ncsn-diffusers push: .*model_index\.json is missing"):
        run_push(tmp_path, "ann/digits")
    assert not hub.repositories


def test_collected_files_are_loadable_as_a_folder(folder, pipe, tmp_path):
    for name, content in collect_files(folder, "ann/digits").items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    check_same(NCSNPipeline.from_pretrained(tmp_path / "copy"), pipe)


def test_login_is_used_where_no_token_is_given(hub, pipe):
    pipe.push_to_hub("digits")
    assert {token for method, path, token in hub.requests if method == "POST" and "/api/models/" in path} == {TOKEN}
    assert HfApi().repo_exists("ann/digits")
