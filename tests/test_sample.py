"""`ncsn-diffusers sample`, from the command line where that matters."""

import errno
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from forked import Forked, run_forked, run_two_forked
from networks import small_unet
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, precision, pretrained
from ncsn_diffusers import sample_images as module
from ncsn_diffusers.commands.sample import sample
from ncsn_diffusers.images import make_grid
from ncsn_diffusers.sampling import Sampler
from ncsn_diffusers.settings import SampleConfig, parse_settings

MODULE = ("-m", "ncsn_diffusers.commands.sample")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A class-conditional pipeline of 8 × 8 images, with the classes 0, 1 and 2."""
    unet = small_unet(num_class_embeds=4)
    torch.nn.init.normal_(unet.class_embedding.weight, std=5.0)
    folder = tmp_path_factory.mktemp("pipeline")
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(folder)
    return folder


def pixels(path):
    return np.asarray(Image.open(path))


def read_sheet(image, columns, size, top=0):
    """
    The images of a sheet of so many columns, with `size` pixels a side and in gray, as one array without margins. Their
    pixels are squares, 2 pixels lie between images, and the sheet is not wider than it needs to be.
    """
    sheet = np.asarray(image.convert("L"), dtype=int)[top:]
    scale, rest = divmod(sheet.shape[1] - 2 * (columns + 1), columns * size)
    rows, rest_down = divmod(sheet.shape[0] - 2, scale * size + 2)
    assert rest == rest_down == 0 and sheet.shape[1] >= 600 > sheet.shape[1] - columns * size
    lines = []
    for row in range(rows):
        line = []
        for column in range(columns):
            y, x = (2 + i * (scale * size + 2) for i in (row, column))
            large = sheet[y : y + scale * size, x : x + scale * size]
            line.append(large[::scale, ::scale].copy())
            assert np.abs(np.kron(line[-1], np.ones((scale, scale), int)) - large).max() <= 1
            sheet[y : y + scale * size, x : x + scale * size] = 255
        lines.append(line)
    assert (sheet == 255).all()
    return np.block(lines)


def test_the_number_of_processes_changes_nothing(tmp_path, pipeline):
    arguments = [pipeline, "--num_images", 5, "--batch_size", 2, "--num_inference_steps", 4, "--save_images"]
    arguments += ["--animation", "gif", "--class_labels", 0, 2, "--dtype", "float32"]
    files = {}
    for number, run in ((1, run_forked), (2, run_two_forked)):
        result = run(*MODULE, *arguments, "--output_dir", f"out{number}", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "image" in result.stderr  # the progress bar
        assert result.stdout.count("Saved 5 images in") == 1
        files[number] = {path.name: path.read_bytes() for path in (tmp_path / f"out{number}").iterdir()}
    assert set(files[1]) == {"samples.png", "samples.gif", *(f"{i:05d}.png" for i in range(5))}
    assert files[1] == files[2]

    # what the pipeline itself draws from seed + index, with the classes in turn
    pipe = NCSNPipeline.from_pretrained(pipeline)
    generators = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    images = pipe(class_labels=[0, 2], num_inference_steps=4, generator=generators).images
    assert np.array_equal(pixels(tmp_path / "out1" / "00003.png"), np.asarray(images[1]))
    # 3 × 2 in the grid, in order, the rest blank
    grid = read_sheet(Image.open(tmp_path / "out1" / "samples.png"), 3, 8)
    assert grid.shape == (16, 24)
    assert np.array_equal(grid[8:, :8], np.asarray(images[1]))
    assert (grid[8:, 16:] == 255).all()
    # the animation ends on the grid
    gif = Image.open(tmp_path / "out1" / "samples.gif")
    gif.seek(gif.n_frames - 1)
    assert np.abs(read_sheet(gif, 3, 8) - grid).max() <= 1


def test_a_cpu_with_bfloat16_draws_in_it(tmp_path, pipeline, monkeypatch, capsys):
    def drawn(name, **arguments):
        config = SampleConfig(str(pipeline), output_dir=str(tmp_path / name), num_inference_steps=2, **arguments)
        sample(config)
        return pixels(tmp_path / name / "samples.png"), Sampler(config).dtype

    plain, dtype = drawn("plain", num_images=2)
    asked, _ = drawn("asked", num_images=2, dtype="bfloat16")
    assert dtype == "float32"
    assert "computes in" not in capsys.readouterr().out
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    chosen, dtype = drawn("chosen", num_images=2)
    assert dtype == "bfloat16"
    assert "The network computes in bfloat16: this CPU has instructions for it." in capsys.readouterr().out
    assert np.array_equal(chosen, asked)
    assert not np.array_equal(chosen, plain)
    again, _ = drawn("again", num_images=2, dtype="float32")
    assert np.array_equal(again, plain)


@pytest.mark.parametrize(("dtype", "last"), [("float32", True), ("bfloat16", False)])
def test_the_layout_is_the_fast_one(pipeline, dtype, last):
    pipe = Sampler(SampleConfig(str(pipeline), dtype=dtype)).pipe
    layouts = [
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in pipe.unet.modules()
        if isinstance(module, torch.nn.Conv2d) and min(module.kernel_size) > 1 and module.in_channels > 1
    ]
    assert layouts and all(layout == last for layout in layouts)


def test_filmstrip_a_scheduler_with_settings_and_dtype(tmp_path, pipeline, monkeypatch):
    config = SampleConfig(
        str(pipeline),
        output_dir=str(tmp_path),
        num_images=2,
        num_inference_steps=6,
        seed=7,
        dtype="bfloat16",
        save_grid=False,
        animation="filmstrip",
        num_frames=4,
        scheduler="DPMSolverMultistepScheduler",
        scheduler_config=("algorithm_type=dpmsolver++", '{"solver_order": 3}', "use_karras_sigmas=true"),
    )
    sample(config)
    assert [path.name for path in tmp_path.iterdir()] == ["filmstrip.png"]

    pipe = NCSNPipeline.from_pretrained(pipeline).to(torch.bfloat16)
    settings = {"solver_order": 3, "use_karras_sigmas": True}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **settings)
    frames = []

    def callback(pipe, step, timestep, tensors):
        shown = pipe.units.to_data(tensors["denoised"])
        frames.append(pipe.image_processor.postprocess(shown, do_denormalize=[False] * 2)[1])

    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    names = ["denoised"]
    images = pipe(
        num_inference_steps=6,
        class_labels=[0, 1],
        generator=generators,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    ).images
    titles = []
    monkeypatch.setattr(module, "make_grid", lambda *a, **k: titles.extend(k["titles"]) or make_grid(*a, **k))
    sample(config)
    sigmas = pipe.scheduler.sigmas[[0, 2, 3]].tolist()
    # the network is told the level of the nearest timestep
    assert [float(title.removeprefix("σ = ")) for title in titles[:-1]] == pytest.approx(sigmas, rel=0.01)
    assert titles[-1] == "image"
    strip = read_sheet(Image.open(tmp_path / "filmstrip.png"), 4, 8, top=20)
    assert strip.shape == (16, 32)
    for column, image in enumerate([frames[0], frames[2], frames[3], images[1]]):  # of steps 0 to 5
        assert np.array_equal(strip[8:, 8 * column : 8 * column + 8], np.asarray(image))


def test_a_ddpm_pipeline_under_langevin_dynamics(tmp_path):
    NCSNPipeline(small_unet(channels=3, out_channels=3), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    config = SampleConfig(
        str(tmp_path / "ddpm"),
        output_dir=str(tmp_path / "out"),
        num_images=2,
        sigmas=(30.0, 4.0, 0.3),
        num_langevin_steps=2,
        scheduler="AnnealedLangevinScheduler",
        animation="gif",
        animation_shows="noisy",
    )
    sample(config)
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
    assert 1 < Image.open(tmp_path / "out" / "samples.gif").n_frames <= 6


def test_no_pipeline_named_draws_the_digits_of_the_package(tmp_path):
    result = run_forked(*MODULE, "--num_images", 3, "--num_inference_steps", 10, "--dtype", "float32", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    grid = read_sheet(Image.open(tmp_path / "samples" / "samples.png"), 3, 28)
    assert grid.shape == (28, 3 * 28)  # a column for each class
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    pipe = NCSNPipeline.from_pretrained(pretrained("mnist"))
    images = pipe(class_labels=[0, 1, 2], num_inference_steps=10, generator=generators).images
    assert np.abs(grid[:, 56:] - np.asarray(images[2], dtype=int)).max() <= 1


def test_classes_in_turn_a_column_for_each(tmp_path):
    unet = small_unet(num_class_embeds=6)
    torch.nn.init.normal_(unet.class_embedding.weight, std=5.0)
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    arguments = {"num_inference_steps": 2, "output_dir": str(tmp_path / "out"), "guidance_scale": 1.5}
    config = SampleConfig(str(tmp_path / "pipeline"), **arguments)
    sample(config)
    grid = read_sheet(Image.open(tmp_path / "out" / "samples.png"), 5, 8)
    assert grid.shape == (12 * 8, 5 * 8)
    pipe = NCSNPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.num_classes == 5
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    labels = [i % 5 for i in range(16)]
    images = pipe(class_labels=labels, num_inference_steps=2, guidance_scale=1.5, generator=generators).images
    for i in (0, 4, 13):
        row, column = divmod(i, 5)
        assert np.array_equal(grid[8 * row : 8 * row + 8, 8 * column : 8 * column + 8], np.asarray(images[i]))

    # classes that were asked for: a square
    config = SampleConfig(str(tmp_path / "pipeline"), num_images=4, class_labels=(3,), **arguments)
    sample(config)
    assert read_sheet(Image.open(tmp_path / "out" / "samples.png"), 2, 8).shape == (16, 16)


@pytest.mark.parametrize(("num_classes", "num_images"), [(None, 64), (10, 60), (64, 64), (100, 64)])
def test_the_default_number_of_images(tmp_path, num_classes, num_images):
    unet = small_unet(num_class_embeds=None if num_classes is None else num_classes + 1)
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    config = SampleConfig(str(tmp_path / "pipeline"), sigmas=(1.0,), output_dir=str(tmp_path / "out"))
    sample(config)
    side = math.isqrt(num_images) if num_classes != 10 else None
    rows, columns = (side, side) if side else (6, 10)
    image = Image.open(tmp_path / "out" / "samples.png")
    # pixels of images enlarged to 600 or more, and 2 between them
    scale = -(-600 // (8 * columns))
    assert image.size == tuple(8 * scale * num + 2 * (num + 1) for num in (columns, rows))
    assert read_sheet(image, columns, 8).shape == (8 * rows, 8 * columns)
    assert config == SampleConfig(str(tmp_path / "pipeline"), sigmas=(1.0,), output_dir=str(tmp_path / "out"))


def test_settings():
    items = ("a=1", "b=0.5", "c=true", "d=None", "e=dpmsolver++", "f=[1, 2]", '{"g": {"h": 1}, "a": 2}')
    assert parse_settings(items) == dict(a=2, b=0.5, c=True, d=None, e="dpmsolver++", f=[1, 2], g={"h": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler_config": ("clip_sample",)}, "must be name=value pairs or a JSON object, not 'clip_sample'"),
        ({"scheduler_config": ("{clip_sample: 1}",)}, "is not a JSON object"),
        ({"num_images": 0}, "`num_images` must be at least 1, not 0"),
        ({"batch_size": -1}, "`batch_size` must be at least 1, not -1"),
        ({"class_labels": ()}, "`class_labels` needs at least one class"),
        ({"save_grid": False}, "Nothing would be saved"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig("nowhere", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "DDIM"}, "`scheduler`='DDIM' is no scheduler of diffusers.* Did you mean DDIMScheduler"),
        ({"scheduler": "UNet2DModel"}, "`scheduler`='UNet2DModel' is no scheduler of diffusers"),
        ({"scheduler": "IPNDMScheduler"}, "IPNDMScheduler does not fit: .* AnnealedLangevinScheduler and DDIM"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler does not fit"),
        ({"scheduler": "LCMScheduler"}, "LCMScheduler does not fit"),
        ({"scheduler": "EDMEulerScheduler"}, "EDMEulerScheduler does not fit"),
        (
            {"scheduler": "DDIMScheduler", "scheduler_config": ("step_size=1",)},
            "DDIMScheduler has no setting step_size, but beta_end",
        ),
    ],
)
def test_schedulers_are_refused_before_the_pipeline_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(SampleConfig("nowhere", **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": (3,)}, "`class_labels` must be an int or a list of ints from 0 to 2"),
        (
            {"scheduler": "DPMSolverMultistepScheduler", "scheduler_config": ("use_flow_sigmas=true",)},
            "DPMSolverMultistepScheduler with use_flow_sigmas=True does not fit",
        ),
        (
            {"scheduler": "PNDMScheduler", "num_inference_steps": 3},
            "`num_inference_steps`=3 is too few for PNDMSchedul",
        ),
        ({"scheduler_config": ("no_such=1",)}, "AnnealedLangevinScheduler has no setting no_such"),
        ({"scheduler_config": ("step_size=2",)}, "`step_size` must be a finite number above 0 and at most 1, not 2"),
    ],
)
def test_what_the_pipeline_refuses(tmp_path, pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(SampleConfig(str(pipeline), output_dir=str(tmp_path), **arguments))


def test_black_images_are_an_error(tmp_path, pipeline):
    arguments = ["--num_images", 2, "--num_inference_steps", 2, "--scheduler", "KDPM2AncestralDiscreteScheduler"]
    result = run_forked(*MODULE, pipeline, *arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert "commands.sample: The sample of KDPM2AncestralDiscreteScheduler is not finite after step" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["unfinished"]


def test_errors_on_the_command_line(tmp_path):
    result = run_forked(*MODULE, "nowhere", cwd=tmp_path)
    assert result.returncode == 1
    assert "PIPELINE='nowhere': there is no such folder, and the Hub cannot be asked" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_pipelines_own_number_of_levels_is_the_default(tmp_path):
    NCSNPipeline(small_unet(), AnnealedLangevinScheduler(), num_inference_steps=3).save_pretrained(tmp_path / "own")
    config = SampleConfig(str(tmp_path / "own"), num_images=2, output_dir=str(tmp_path / "out"), save_images=True)
    sample(config)
    assert config.num_inference_steps is None  # settings are left as they are
    pipe = NCSNPipeline.from_pretrained(tmp_path / "own")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    for i, image in enumerate(pipe(batch_size=2, num_inference_steps=3, generator=generators).images):
        assert np.array_equal(pixels(tmp_path / "out" / f"{i:05d}.png"), np.asarray(image))


# --- How it goes on ---


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_interrupted_run_goes_on(tmp_path, pipeline, monkeypatch):
    arguments = {"num_images": 7, "batch_size": 3, "num_inference_steps": 2, "save_images": True, "animation": "gif"}
    sample(SampleConfig(str(pipeline), output_dir=str(tmp_path / "whole"), **arguments))
    whole, drawn, sample_frames = files_of(tmp_path / "whole"), [], module.sample_frames

    def interrupted(sampler, config, indices):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(indices)
        return sample_frames(sampler, config, indices)

    def counted(sampler, config, indices):
        drawn.append(indices)
        return sample_frames(sampler, config, indices)

    config = SampleConfig(str(pipeline), output_dir=str(tmp_path / "parts"), **arguments)
    monkeypatch.setattr(module, "sample_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(config)
    # what was drawn lies there, as it will in the end
    assert files_of(tmp_path / "parts") == {name: whole[name] for name in (f"{i:05d}.png" for i in range(6))}

    # other settings are refused, and nothing is lost
    monkeypatch.setattr(module, "sample_frames", counted)
    other = SampleConfig(str(pipeline), output_dir=str(tmp_path / "parts"), **arguments, seed=1)
    with pytest.raises(
        ValueError, match=r"that were made with another `seed`: use another folder, or .*`overwrite_out"
    ):
        sample(other)
    sample(config)
    assert drawn == [range(3), range(3, 6), range(6, 7)]
    assert files_of(tmp_path / "parts") == whole
    assert not (tmp_path / "parts" / "unfinished").exists()

    # unless they are to replace what is there
    sample(SampleConfig(str(pipeline), output_dir=str(tmp_path / "other"), **arguments, seed=1))
    drawn.clear()
    monkeypatch.setattr(module, "sample_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample(config)
    other.overwrite_output_dir = True
    monkeypatch.setattr(module, "sample_frames", counted)
    sample(other)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "other")


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_signals_end_a_run_at_once_and_it_says_how_to_go_on(tmp_path, pipeline, number, word, code):
    arguments = ["--num_images", 100000, "--save_images", "--num_inference_steps", 20]
    process = Forked(*MODULE, pipeline, *arguments, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("samples/unfinished/*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        start = time.monotonic()
        errors = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
        pytest.fail(process.communicate(timeout=60)[1][-5000:])
    finally:
        process.kill()
    assert time.monotonic() - start < 10  # 1 s on an idle machine
    assert process.poll() == code
    last = errors.splitlines()[-1]
    assert last.endswith(f"commands.sample: {word}. The same command goes on where it stopped.")
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("samples/**/.incomplete*"))


def test_a_full_disk(tmp_path, pipeline, monkeypatch):
    config = SampleConfig(str(pipeline), output_dir=str(tmp_path), num_images=4, batch_size=2, num_inference_steps=2)

    def fail(image, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", fail)
    message = r"samples\.png could not be written: No space left on device\. Make room and start the same command again"
    with pytest.raises(OSError, match=message):
        sample(config)
    # half a file is not left in its place, and what was drawn is kept
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]
    assert len(list((tmp_path / "unfinished").glob("*.safetensors"))) == 2


def test_compile_compiles_the_network_once_and_draws_the_same(tmp_path, pipeline, monkeypatch):
    calls = []

    def compile_network(function, **settings):
        assert settings == {"dynamic": False}

        def compiled(*arguments, **keywords):
            calls.append(len(arguments[0]))
            return function(*arguments, **keywords)

        return compiled

    arguments = {"num_images": 4, "batch_size": 2, "num_inference_steps": 2}
    sample(SampleConfig(str(pipeline), output_dir=str(tmp_path / "plain"), **arguments))
    monkeypatch.setattr(torch, "compile", compile_network)
    sample(SampleConfig(str(pipeline), output_dir=str(tmp_path / "compiled"), compile=True, **arguments))
    assert calls == [2] * 4
    assert np.array_equal(pixels(tmp_path / "plain/samples.png"), pixels(tmp_path / "compiled/samples.png"))


def test_no_such_folder_names_the_near_one(tmp_path, pipeline, monkeypatch):
    NCSNPipeline(small_unet(), AnnealedLangevinScheduler()).save_pretrained(tmp_path / "my-ncsn")
    (tmp_path / "my-ncnss").mkdir()  # no pipeline
    result = run_forked(*MODULE, "my-ncns", cwd=tmp_path)
    message = "PIPELINE='my-ncns': there is no such folder, and the Hub cannot be asked for a repository of that name. "
    assert result.stderr.splitlines()[-1].endswith(message + "Did you mean my-ncsn?")
