"""Loading what strangers have made: broken and hostile configs, pipelines of others, weights that are not finite."""

import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from forked import run_forked
from networks import small_unet
from safetensors.torch import load_file, save_file
from saved_pipelines import check_same, draw, flatten, make_pipeline

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNInpaintPipeline, NCSNPipeline
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.hub import collect_files, loading, saving
from ncsn_diffusers.hub.configs import translate_index
from ncsn_diffusers.hub.files import check_folder
from ncsn_diffusers.hub.weights import check_finite
from ncsn_diffusers.sampling import load_pipeline
from ncsn_diffusers.units import Units, image_units

INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def rewrite(path: Path, **values):
    """Replace keys of a JSON file; `...` removes one."""
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# --- Broken and hostile configs ---


@pytest.mark.parametrize("name", [INDEX, UNET, SCHEDULER])
@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"7",
        b"null",
        b"",
        b"{",
        b"\xff\xfe{\x00}\x00",
        "{}".encode("utf-16"),
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": [' + b"0.5, " * 2_100_000 + b"0.5]}",
    ],
    ids=["list", "number", "null", "empty", "cut", "utf-16", "utf-16-bom", "nested", "objects", "digits", "large"],
)
def test_config_that_is_no_json_object(saved, name, content):
    (saved / name).write_bytes(content)
    start = time.process_time()
    with pytest.raises(OSError, match=f"^{name} of '{saved}' cannot be used: it ") as raised:
        NCSNPipeline.from_pretrained(saved)
    assert time.process_time() - start < 1
    assert len(str(raised.value)) < 500


HOSTILE = [
    (INDEX, "_class_name", ...),
    (INDEX, "_class_name", 5),
    (INDEX, "_class_name", []),
    (INDEX, "_class_name", ["a", 1]),
    (INDEX, "_saved_format", "1"),
    (INDEX, "_saved_format", 0),
    (INDEX, "data_min", "0"),
    (INDEX, "data_min", float("nan")),
    (INDEX, "data_mean", "0"),
    (INDEX, "data_mean", float("nan")),
    (INDEX, "value_range", 1),
    (INDEX, "null_class", 3),
    (INDEX, "class_shares", "equal"),
    (INDEX, "unet", ...),
    (INDEX, "unet", []),
    (INDEX, "unet", "UNet2DModel"),
    (INDEX, "unet", [None, None]),
    (INDEX, "unet", {"a": 1}),
    (INDEX, "unet", ["antigravity", "UNet2DModel"]),
    (INDEX, "unet", ["diffusers", "AutoencoderKL"]),
    (INDEX, "unet", ["unet", "UNet2DModel"]),
    (INDEX, "scheduler", 7),
    (INDEX, "scheduler", ["antigravity", "DDIMScheduler"]),
    (INDEX, "scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
    (INDEX, "scheduler", ["diffusers", "EDMEulerScheduler"]),
    (INDEX, "scheduler", ["diffusers", "IPNDMScheduler"]),
    (UNET, "_class_name", "AutoencoderKL"),
    (UNET, "sample_size", ...),
    (UNET, "sample_size", None),
    (UNET, "sample_size", -8),
    (UNET, "sample_size", 8.5),
    (UNET, "sample_size", "8"),
    (UNET, "sample_size", 65_536),
    (UNET, "sample_size", [8, 8, 8]),
    (UNET, "sample_size", [[[[[[8]]]]]]),
    (UNET, "sample_size", True),
    (UNET, "in_channels", 10**9),
    (UNET, "in_channels", 2),
    (UNET, "out_channels", 2),
    (UNET, "layers_per_block", 10**6),
    (UNET, "layers_per_block", 0),
    (UNET, "block_out_channels", [10**9, 10**9]),
    (UNET, "block_out_channels", [8] * 10_000),
    (UNET, "block_out_channels", []),
    (UNET, "block_out_channels", 8),
    (UNET, "down_block_types", "DownBlock2D"),
    (UNET, "time_embedding_type", "os.system"),
    (UNET, "time_embedding_dim", 10**9),
    (UNET, "num_class_embeds", 10**9),
    (UNET, "num_class_embeds", -1),
    (UNET, "norm_num_groups", 0),
    (UNET, "norm_eps", float("inf")),
    (UNET, "dropout", "much"),
    (UNET, "flip_sin_to_cos", "no"),
]


@pytest.mark.parametrize(("file", "key", "value"), HOSTILE, ids=str)
def test_value_that_cannot_be_used(saved, file, key, value, monkeypatch):
    rewrite(saved / file, **{key: value})
    if key == "out_channels":
        rewrite(saved / file, in_channels=1)
    monkeypatch.setattr(loading, "check_weights", lambda *_, **__: pytest.fail("went on to the weights"))
    start = time.process_time()
    with pytest.raises(OSError, match=f"^{file} of '{saved}' cannot be used: ") as raised:
        NCSNPipeline.from_pretrained(saved)
    assert time.process_time() - start < 1
    assert f"`{key}`" in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_out_channels", [8, 16, 8]),
        ("block_out_channels", [8, 10]),
        ("down_block_types", ["DownBlock2D", "__import__"]),
        ("act_fn", "eval"),
        ("norm_num_groups", 3),
    ],
)
def test_network_that_diffusers_cannot_make(saved, key, value):
    rewrite(saved / UNET, **{key: value})
    with pytest.raises(OSError, match=f"^{UNET} of '{saved}' cannot be used: diffusers cannot make a network of it"):
        NCSNPipeline.from_pretrained(saved)


def test_scheduler_that_cannot_be_made(saved):
    rewrite(saved / SCHEDULER, beta_schedule="os.system")
    with pytest.raises(OSError, match=rf"^{SCHEDULER} of '{saved}' cannot be used: .*beta_schedule.*os\.system"):
        NCSNPipeline.from_pretrained(saved)
    make_pipeline(DDIMScheduler()).save_pretrained(saved)
    rewrite(saved / SCHEDULER, trained_betas="many")
    with pytest.raises(OSError, match=f"^{SCHEDULER} of '{saved}' cannot be used: "):
        NCSNPipeline.from_pretrained(saved)


def test_configs_are_checked_before_the_weights_are_downloaded(hub, saved):
    rewrite(saved / UNET, layers_per_block=10**6)
    hub.publish("ann/hostile", saved)
    with pytest.raises(OSError, match=r"^unet/config\.json of 'ann/hostile' cannot be used: `layers_per_block`"):
        NCSNPipeline.from_pretrained("ann/hostile")
    assert not any("safetensors" in path for _, path, _ in hub.requests)


def test_components_that_are_given_are_not_read(saved):
    for name in ("unet", "scheduler"):
        rewrite(saved / INDEX, **{name: ["antigravity", "Anything"]})
    with pytest.raises(OSError, match="give a fitting one as `scheduler="):
        NCSNPipeline.from_pretrained(saved, unet=small_unet())
    rewrite(saved / INDEX, scheduler=["diffusers", "DDIMScheduler"], unet=["diffusers", "UNet2DModel"])
    (saved / UNET).unlink()
    (saved / SCHEDULER).unlink()
    unet, scheduler = small_unet(), DDIMScheduler()
    pipe = NCSNPipeline.from_pretrained(saved, unet=unet, scheduler=scheduler)
    assert pipe.unet is unet and pipe.scheduler is scheduler


def test_index_that_names_more_than_a_pipeline_has(saved):
    rewrite(saved / INDEX, safety_checker=["antigravity", "Checker"], _ignore_files=5)
    assert set(NCSNPipeline.from_pretrained(saved).components) == {"unet", "scheduler"}
    assert "antigravity" not in sys.modules


def test_push_names_what_is_broken(saved):
    for file, values in ((INDEX, {"scheduler": 7}), (UNET, {"sample_size": "8"})):
        before = (saved / file).read_text()
        rewrite(saved / file, **values)
        with pytest.raises(OSError, match=f"^{file} of '{saved}' cannot be used: "):
            collect_files(saved, "ann/digits")
        (saved / file).write_text(before)
    (saved / SCHEDULER).write_bytes(b"\xff\xfe[")
    with pytest.raises(OSError, match=f"^{SCHEDULER} of "):
        collect_files(saved, "ann/digits")


@pytest.mark.parametrize(("data_min", "mean", "std"), [(-1, 0.5, 0.25), (0, 0.0, 0.5)])
def test_black_of_format_1_becomes_units(data_min, mean, std):
    index = {"_class_name": "NCSNPipeline", "data_min": data_min}
    index = translate_index({**index, "unet": ["diffusers", "UNet2DModel"]}, "NCSNPipeline")
    assert (index["data_mean"], index["data_std"]) == (mean, std)
    assert "data_min" not in index and "null_class" not in index  # ours: the last class embedding


def test_foreign_pipelines_have_no_null_class():
    for name, mean, std in (("DDPMPipeline", 0.5, 0.25), ("ScoreSdeVePipeline", 0.0, 0.5)):
        index = translate_index({"_class_name": name, "unet": ["diffusers", "UNet2DModel"]}, "NCSNPipeline")
        assert index["null_class"] is None and (index["data_mean"], index["data_std"]) == (mean, std)
    own = {"_class_name": "NCSNPipeline", "null_class": None, "class_shares": [0.25, 0.75], "value_range": None}
    kept = translate_index(own, "NCSNPipeline")
    assert {key: kept[key] for key in own} == own


# --- Weights ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(saved, value):
    weights = load_file(saved / WEIGHTS)
    weights["conv_out.bias"][0] = value
    save_file(weights, saved / WEIGHTS, metadata={"format": "pt"})
    for load in (NCSNPipeline.from_pretrained, NCSNInpaintPipeline.from_pretrained):
        with pytest.raises(OSError, match=rf"^{WEIGHTS} of '{saved}' cannot be used: `conv_out\.bias` holds NaN"):
            load(saved)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} .*`conv_out\.bias` holds NaN or infinity"):
        collect_files(saved, "ann/digits")


def test_weights_that_overflow_in_half_precision(saved):
    weights = load_file(saved / WEIGHTS)
    weights["conv_out.bias"][0] = 1e6
    save_file(weights, saved / WEIGHTS, metadata={"format": "pt"})
    assert NCSNPipeline.from_pretrained(saved).unet.conv_out.bias[0] == 1e6
    with pytest.raises(OSError, match=r"`conv_out\.bias` holds NaN or infinity in torch\.float16.*another `torch"):
        NCSNPipeline.from_pretrained(saved, torch_dtype=torch.float16)


def test_weights_that_do_not_fit_the_config(saved):
    weights = load_file(saved / WEIGHTS)
    bias = weights.pop("conv_in.bias")
    save_file(weights, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OSError, match=rf"^{WEIGHTS} .* lacks 1 tensors of the network: `conv_in\.bias`"):
        NCSNPipeline.from_pretrained(saved)
    save_file({**weights, "conv_in.bias": bias.repeat(2)}, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(OSError, match=rf"^{WEIGHTS} .*`conv_in\.bias` has shape \[16\], and {UNET} describes .* \[8\]"):
        NCSNPipeline.from_pretrained(saved)
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(OSError, match=rf"^{WEIGHTS} of '{saved}' cannot be used: it is damaged"):
        NCSNPipeline.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"\x04" + bytes(7) + b"abcd", None], ids=["garbled", "cut off"])
def test_damaged_weights_are_named_before_they_are_published(saved, content):
    (saved / WEIGHTS).write_bytes(content or (saved / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(OSError, match=rf"^{WEIGHTS} of '{saved}' cannot be used: it is damaged"):
        check_folder(saved)


def test_shards(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="20KB")
    assert len(list((tmp_path / "pipe" / "unet").glob("*-of-*.safetensors"))) > 1
    check_same(NCSNPipeline.from_pretrained(tmp_path / "pipe"), pipe)


def test_shard_indexes_are_checked(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe", max_shard_size="20KB")
    index = tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))[:2]
    key = next(key for key, shard in content["weight_map"].items() if shard == first)

    def changed(**shards):
        shards = {**content["weight_map"], **shards}
        return {**content, "weight_map": {key: shard for key, shard in shards.items() if shard is not ...}}

    for value, message in (
        ({}, "it has no `metadata`"),
        ({"metadata": {}}, "it has no `weight_map`"),
        ({**content, "weight_map": []}, r"`weight_map` must be a JSON object, not \[\]"),
        ({**content, "metadata": 3}, "`metadata` must be a JSON object, not 3"),
        (changed(**{key: 3}), f"`weight_map` must name a file of weights for `{key}`, not '3'"),
        (changed(**{key: "../../other"}), f"`weight_map` must name a file of weights for `{key}`, not '../../other'"),
        (
            changed(**{key: "diffusion_pytorch_model-9.safetensors"}),
            "`weight_map` names .*, which is missing",
        ),
        (changed(**{key: second}), f"`weight_map` says that `{key}` is in {second}, which lacks it"),
        (changed(**{key: ...}), f"`weight_map` lacks 1 tensors of the network: `{key}`"),
    ):
        index.write_text(json.dumps(value))
        start = time.process_time()
        with pytest.raises(OSError, match=f"^unet/{index.name} of '.*' cannot be used: {message}"):
            NCSNPipeline.from_pretrained(tmp_path / "pipe")
        assert time.process_time() - start < 1


@pytest.fixture
def foreign(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


@pytest.mark.parametrize("pickled", [False, True])
def test_foreign_weights_that_are_incomplete(foreign, pickled):
    """diffusers loads them, and draws from memory that nobody has written to."""
    weights = load_file(foreign / WEIGHTS)
    kept = {key: value for key, value in weights.items() if not key.startswith("conv_out.")}
    name = WEIGHTS
    if pickled:
        name = WEIGHTS.replace("safetensors", "bin")
        (foreign / WEIGHTS).unlink()
        torch.save(kept, foreign / name)
    else:
        save_file(kept, foreign / name, metadata={"format": "pt"})
    with pytest.raises(OSError, match=rf"^{name} of .* lacks 2 tensors of the network: `conv_out\.bias`"):
        NCSNPipeline.from_pretrained(foreign)


def test_a_tensor_that_diffusers_leaves_on_meta(foreign):
    unet = small_unet()
    unet.conv_out.to("meta")
    with pytest.raises(OSError, match=r"^The weights of 'ann/ddpm' .* diffusers has found no `conv_out\.weight`"):
        check_finite(unet, str(foreign), "ann/ddpm")
    check_finite(unet, str(foreign), "ann/ddpm", may_be_offloaded=True)


@pytest.mark.parametrize("pickled", [False, True])
def test_attention_of_2022_is_found_under_its_old_names(tmp_path, pickled):
    unet = small_unet(attention_head_dim=4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    weights, old = load_file(tmp_path / WEIGHTS), {}
    for key, value in weights.items():
        for new, name in ((".to_q.", "query"), (".to_k.", "key"), (".to_v.", "value"), (".to_out.0.", "proj_attn")):
            key = key.replace(new, f".{name}.")
        old[key] = value
    assert any(".proj_attn." in key for key in old)
    if pickled:
        (tmp_path / WEIGHTS).unlink()
        torch.save(old, tmp_path / WEIGHTS.replace("safetensors", "bin"))
    else:
        save_file(old, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = NCSNPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in unet.state_dict().items())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_are_no_file(foreign, suffix):
    (foreign / WEIGHTS).unlink()
    name = WEIGHTS.replace("safetensors", suffix)
    os.mkfifo(foreign / name)
    with pytest.raises(OSError, match=f"^{name} of '{foreign}' cannot be used: it is no file"):
        NCSNPipeline.from_pretrained(foreign)


def test_a_header_of_many_tensors(foreign):
    header = {f"a{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(300_000)}
    content = json.dumps(header).encode()
    (foreign / WEIGHTS).write_bytes(len(content).to_bytes(8, "little") + content + bytes(1_200_000))
    start = time.process_time()
    with pytest.raises(OSError, match=f"^{WEIGHTS} of .* its header takes 2[0-9,]* bytes, of 4,000,000 at most"):
        NCSNPipeline.from_pretrained(foreign)
    assert time.process_time() - start < 1


# --- Replacing a pipeline ---


def make_other_pipeline():
    """The same network's names and shapes, other weights, levels and settings."""
    pipe = make_pipeline(AnnealedLangevinScheduler(sigma_max=5.0, sigma_min=0.1, step_size=0.5))
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.25)
    return pipe


def run_apart(function):
    """Run a function in a process of its own; its exit code."""
    process = os.fork()
    if process == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_save_that_is_killed(tmp_path):
    old, new = make_pipeline(), make_other_pipeline()
    expected = {"old": draw(old), "new": draw(new)}
    assert (expected["old"] - expected["new"]).abs().max() > 0.1
    folder, outcomes = tmp_path / "pipe", []
    for kill_at in range(100):
        old.save_pretrained(folder)
        assert not list(folder.glob(".saving-*"))

        def save(kill_at=kill_at):
            replace, count = os.replace, iter(range(100))

            def replace_or_die(*arguments):
                if next(count) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*arguments)

            os.replace = replace_or_die
            new.save_pretrained(folder)

        code = run_apart(save)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        try:
            images = draw(NCSNPipeline.from_pretrained(folder))
        except OSError as error:
            assert "model_index.json is missing. A save into it was cut off" in str(error)
            outcomes.append("refused")
        else:
            (outcome,) = (name for name, other in expected.items() if torch.allclose(images, other, rtol=0, atol=1e-5))
            outcomes.append(outcome)
    # aside; the old index; then the three files and the new index
    assert outcomes == ["old", "old", "refused", "refused", "refused", "refused"]
    torch.testing.assert_close(draw(NCSNPipeline.from_pretrained(folder)), expected["new"], rtol=0, atol=1e-5)


def test_a_reader_beside_a_writer(tmp_path):
    pipes = {50.0: make_pipeline(), 5.0: make_other_pipeline()}
    weights = {sigma_max: pipe.unet.conv_in.weight.clone() for sigma_max, pipe in pipes.items()}
    folder = tmp_path / "pipe"
    pipes[50.0].save_pretrained(folder)
    process = os.fork()
    if process == 0:
        while True:
            for pipe in reversed(pipes.values()):
                pipe.save_pretrained(folder)
                time.sleep(0.1)
    read = []
    try:
        for _ in range(8):
            try:
                pipe = NCSNPipeline.from_pretrained(folder)
            except OSError as error:  # on a machine that is busy
                assert "is being replaced by another pipeline all the time" in str(error)
                continue
            read.append(pipe.scheduler.config.sigma_max)
            assert torch.equal(pipe.unet.conv_in.weight, weights[read[-1]])
            assert pipe.scheduler.config.step_size == pipes[read[-1]].scheduler.config.step_size
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert read


def test_files_of_two_pipelines(tmp_path, saved):
    make_other_pipeline().save_pretrained(tmp_path / "other")
    for name in (WEIGHTS, SCHEDULER):
        own = (saved / name).read_bytes()
        (saved / name).write_bytes((tmp_path / "other" / name).read_bytes())
        message = rf"^{WEIGHTS} of '{saved}' cannot be used: it was saved with .* other noise levels"
        with pytest.raises(OSError, match=message):
            NCSNPipeline.from_pretrained(saved)
        with pytest.raises(OSError, match=message):
            collect_files(saved, "ann/digits")
        (saved / name).write_bytes(own)
    rewrite(saved / SCHEDULER, step_size=0.1)  # not what the network was trained with
    rewrite(saved / UNET, sample_size=16)
    assert NCSNPipeline.from_pretrained(saved).scheduler.config.step_size == 0.1


def test_variants_beside_a_pipeline_that_is_replaced(tmp_path, caplog):
    folder, pipe = tmp_path / "pipe", make_pipeline()
    names = {f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")}

    def found():
        return {path.name for path in (folder / "unet").glob("diffusion*")}

    pipe.save_pretrained(folder, variant="fp16")
    pipe.save_pretrained(folder)
    pipe.save_pretrained(folder)
    assert found() == names and not caplog.text
    pipe.save_pretrained(folder, max_shard_size="20KB")
    assert not found() & names
    assert "diffusion_pytorch_model.fp16.safetensors" in caplog.text and "are removed" in caplog.text
    pipe.save_pretrained(folder)
    assert found() == {"diffusion_pytorch_model.safetensors"}
    pipe.save_pretrained(folder, variant="fp16")
    assert found() == names
    make_other_pipeline().save_pretrained(folder, variant="fp16")  # of other levels
    assert found() == {"diffusion_pytorch_model.fp16.safetensors"}


def test_a_save_that_fails_changes_nothing(saved, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    def fail(*arguments, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_metadata", fail)
    with pytest.raises(OSError, match="No space left"):
        make_other_pipeline().save_pretrained(saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


# --- Pipelines of others ---


def other_package(folder):
    """A folder as the package diffusers-ncsn 0.1.0 saves it."""
    make_pipeline().save_pretrained(folder)
    rewrite(
        folder / INDEX,
        _class_name="NCSNPipeline",
        _saved_format=...,
        **dict.fromkeys(("data_mean", "data_std", "value_range", "data_unit", "null_class", "class_shares"), ...),
        unet=["ncsn.unet.unet_2d_ncsn", "UNet2DModelForNCSN"],
        scheduler=["ncsn.scheduler.scheduling_ncsn", "AnnealedLangevinDynamicsScheduler"],
    )
    rewrite(folder / UNET, _class_name="UNet2DModelForNCSN", sigma_begin=1.0, sigma_end=0.01, num_train_timesteps=10)
    (folder / SCHEDULER).write_text(
        json.dumps(
            {
                "_class_name": "AnnealedLangevinDynamicsScheduler",
                "num_annealed_steps": 100,
                "num_train_timesteps": 10,
                "sampling_eps": 1e-05,
                "sigma_max": 1.0,
                "sigma_min": 0.01,
            }
        )
    )
    return folder


def test_pipeline_of_the_package_diffusers_ncsn(hub, tmp_path):
    folder = other_package(tmp_path / "other")
    hub.publish("ann/other", folder)
    on_the_hub = other_package(tmp_path / "code")  # as its README has one upload it
    rewrite(
        on_the_hub / INDEX,
        _class_name=["pipeline_ncsn", "UploadedNCSNPipeline"],
        unet=["unet_2d_ncsn", "UNet2DModelForNCSN"],
        scheduler=["scheduling_ncsn", "AnnealedLangevinDynamicsScheduler"],
    )
    for source in (folder, "ann/other", on_the_hub):
        for cls in (NCSNPipeline, NCSNInpaintPipeline):
            with pytest.raises(ValueError, match=r"is of the package diffusers-ncsn.*from ncsn import NCSNPipeline"):
                cls.from_pretrained(source)
    assert not any("safetensors" in path for _, path, _ in hub.requests)
    with pytest.raises(ValueError, match="of the package diffusers-ncsn"):
        load_pipeline(str(folder))
    # a part of it is no better
    rewrite(folder / INDEX, unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(ValueError, match="of the package diffusers-ncsn"):
        NCSNPipeline.from_pretrained(folder)
    unet = type("UNet2DModelForNCSN", (UNet2DModel,), {})(**dict(small_unet().config))
    with pytest.raises(ValueError, match="of the package diffusers-ncsn"):
        NCSNPipeline(unet, AnnealedLangevinScheduler())


DDPM_2022 = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("missing", [(), ("_class_name",), ("beta_schedule", "trained_betas")])
def test_ddpm_repository_of_2022(hub, tmp_path, flat, missing):
    DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    config = {key: value for key, value in DDPM_2022.items() if key not in missing}
    (tmp_path / "ddpm" / SCHEDULER).write_text(json.dumps(config))
    if flat:
        flatten(tmp_path / "ddpm")
    hub.publish("google/ddpm-cifar10-32", tmp_path / "ddpm")
    for source in ("google/ddpm-cifar10-32", tmp_path / "ddpm"):
        pipe = NCSNPipeline.from_pretrained(source)
        assert type(pipe.scheduler) is AnnealedLangevinScheduler
        assert pipe.scheduler.config.prediction_type == "epsilon"
        assert pipe.scheduler.config.conditioning == "timestep"
        torch.testing.assert_close(pipe.scheduler.betas, torch.linspace(1e-4, 0.02, 1000), rtol=1e-4, atol=1e-8)
        assert pipe.units == Units()
        # the denoised estimate is that of the stock scheduler, from one network and one input
        x, t = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
        with torch.no_grad():
            output = pipe.unet(x, t).sample
        stock = DDPMScheduler.from_config({**DDPM_2022, "clip_sample": False})
        expected = stock.step(output, 500, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        sigma = ((1 - stock.alphas_cumprod[500]) / stock.alphas_cumprod[500]).sqrt()
        denoised = pipe.denoise(x * (1 + sigma**2) ** 0.5, sigma).detach()
        torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "class_name",
    [
        *("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
        *("CMStochasticIterativeScheduler", "LCMScheduler", "IPNDMScheduler"),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("in_the_index", [None, "DDPMScheduler"])
def test_schedulers_of_another_time_or_scaling(hub, tmp_path, class_name, in_the_index, flat):
    scheduler = getattr(diffusers, class_name)()
    for kind, folder in (("DDPMPipeline", tmp_path / "foreign"), ("NCSNPipeline", tmp_path / "own")):
        DDPMPipeline(small_unet(), DDPMScheduler()).save_pretrained(folder)
        scheduler.save_pretrained(folder / "scheduler")
        rewrite(folder / INDEX, _class_name=kind, scheduler=["diffusers", in_the_index or class_name])
        if flat and kind == "DDPMPipeline":
            flatten(folder)
        hub.publish("ann/misfit", folder)
        for source in ("ann/misfit", folder):
            with pytest.raises(OSError, match=rf"(scheduler_config|model_index)\.json of '.*{class_name}"):
                NCSNPipeline.from_pretrained(source)
    assert not any("safetensors" in path for _, path, _ in hub.requests)


def test_scripts_refuse_schedulers_that_do_not_fit(saved):
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*DDIMScheduler"):
        load_pipeline(str(saved), FlowMatchEulerDiscreteScheduler)
    with pytest.raises(ValueError, match=r"IPNDMScheduler.*DDIMScheduler"):
        load_pipeline(str(saved), diffusers.IPNDMScheduler)
    assert type(load_pipeline(str(saved), DDIMScheduler).scheduler) is DDIMScheduler
    rewrite(saved / UNET, layers_per_block=10**6)
    with pytest.raises(ValueError, match="layers_per_block"):
        load_pipeline(str(saved))


# --- diffusers' habits ---


def test_diffusion_pipeline_loads_a_plainly_saved_folder(tmp_path):
    for scheduler in (AnnealedLangevinScheduler(), DDIMScheduler.from_config(AnnealedLangevinScheduler().config)):
        pipe = NCSNPipeline(small_unet(), scheduler, **image_units(0))
        pipe.save_pretrained(tmp_path / "pipe")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
        assert type(loaded) is NCSNPipeline and type(loaded.scheduler) is type(scheduler)
        assert loaded.units == Units(0.0, 0.5)
        check_same(loaded, pipe)
        NCSNInpaintPipeline(**pipe.components).save_pretrained(tmp_path / "inpaint")
        assert type(DiffusionPipeline.from_pretrained(tmp_path / "inpaint")) is NCSNInpaintPipeline


def test_deepinv_reads_a_plainly_saved_folder(tmp_path):
    deepinv = pytest.importorskip("deepinv")
    pipe = make_pipeline(DDIMScheduler.from_config(AnnealedLangevinScheduler().config))
    pipe.save_pretrained(tmp_path / "pipe")
    denoiser = deepinv.models.DiffusersDenoiserWrapper(str(tmp_path / "pipe"), clip_output=False)
    assert type(denoiser.scheduler) is DDIMScheduler
    # of images in [0, 1], where every sigma is half of ours
    scheduler, timestep = AnnealedLangevinScheduler(), torch.tensor(600.0)
    image, sigma = torch.rand(1, 1, 8, 8), scheduler.t_to_sigma(timestep)
    x = 2 * image - 1
    with torch.no_grad():
        expected = Denoiser.of(pipe.unet, scheduler)(x, sigma)
        denoised = denoiser(image, sigma=sigma.item() / 2)
    torch.testing.assert_close(denoised, (expected + 1) / 2, rtol=1e-4, atol=1e-4)


def test_without_the_import_the_message_names_the_class(saved):
    program = """
    import sys
    from diffusers import DiffusionPipeline

    try:
        DiffusionPipeline.from_pretrained(sys.argv[1])
    except AttributeError as error:
        assert "NCSNPipeline" in str(error), error
        import ncsn_diffusers

        assert type(DiffusionPipeline.from_pretrained(sys.argv[1])) is ncsn_diffusers.NCSNPipeline
    else:
        raise AssertionError("loaded")
    """
    result = run_forked("-c", textwrap.dedent(program), saved)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("black", [-1, 0])
def test_components_keep_the_units_of_the_data(black):
    pipe = NCSNPipeline(small_unet(), AnnealedLangevinScheduler(), **image_units(black))
    other = NCSNInpaintPipeline(**pipe.components)
    assert other.units == pipe.units and other.unet is pipe.unet
    assert NCSNPipeline(**other.components).units == pipe.units
    assert NCSNInpaintPipeline.from_pipe(pipe).units == pipe.units
    if black == -1:
        assert set(pipe.components) == {"unet", "scheduler"}
    else:  # a pipeline that takes data to lie in [-1, 1] does not draw this network's
        with pytest.raises(TypeError, match="data_mean"):
            DDPMPipeline(**pipe.components)
    # what diffusers does with the components
    pipe.to("cpu").to(torch.float32)
    pipe.maybe_free_model_hooks()
    pipe.remove_all_hooks()
    pipe.reset_device_map()
    pipe.enable_attention_slicing()
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe).shape == (1, 1, 8, 8)


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"`safe_serialization=False` writes the weights as a pickle"):
        make_pipeline().save_pretrained(tmp_path / "pipe", safe_serialization=False)
    assert not (tmp_path / "pipe").exists()


def test_checkpoint_folder_as_a_pipeline(tmp_path, saved):
    run = tmp_path / "run"
    for step in (8, 40):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    for load in (NCSNPipeline.from_pretrained, lambda folder: collect_files(folder, "ann/digits")):
        with pytest.raises(OSError, match=r"is a checkpoint of a training run.*--resume_from_checkpoint latest"):
            load(run / "checkpoint-40")
        with pytest.raises(OSError, match=r"run that has not ended, up to checkpoint-40.*--resume_from_checkpoint"):
            load(run)
    (saved / "checkpoint-40").mkdir()
    with pytest.raises(OSError, match=rf"is a checkpoint of a training run, whose pipeline is in '{saved}': load that"):
        NCSNPipeline.from_pretrained(saved / "checkpoint-40")
    NCSNPipeline.from_pretrained(saved)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_networks(tmp_path, process_group):
    pipe = make_pipeline()
    compiled = torch.compile(pipe.unet, backend="eager")
    for wrapped in (torch.nn.DataParallel(pipe.unet), torch.nn.parallel.DistributedDataParallel(pipe.unet)):
        assert NCSNPipeline(wrapped, AnnealedLangevinScheduler()).unet is pipe.unet
        recompiled = torch.compile(wrapped, backend="eager")
        assert NCSNPipeline(recompiled, AnnealedLangevinScheduler()).unet is pipe.unet
    again = NCSNPipeline(torch.nn.DataParallel(compiled), AnnealedLangevinScheduler())
    assert again.unet is compiled  # it stays compiled
    torch.testing.assert_close(draw(again), draw(pipe), rtol=0, atol=1e-5)
    again.save_pretrained(tmp_path / "pipe")
    check_same(NCSNPipeline.from_pretrained(tmp_path / "pipe"), pipe)
    for other in (torch.nn.Conv2d(1, 1, 3), "unet", None):
        with pytest.raises(ValueError, match=f"must be a UNet2DModel, alone or wrapped, not {type(other).__name__}"):
            NCSNPipeline(other, AnnealedLangevinScheduler())


@pytest.mark.parametrize("name", ["DDIMParallelScheduler", "DDPMParallelScheduler", "DDIMScheduler"])
def test_a_scheduler_that_draws_is_saved_and_loaded(tmp_path, name):
    pipe = make_pipeline(getattr(diffusers, name).from_config(AnnealedLangevinScheduler().config))
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = NCSNPipeline.from_pretrained(tmp_path / "pipe")
    assert type(loaded.scheduler) is type(pipe.scheduler)
    check_same(loaded, pipe)
