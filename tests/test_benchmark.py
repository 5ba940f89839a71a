"""What the benchmark measures, and what it refuses."""

import importlib.util
import itertools
import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from forked import run_forked, run_two_forked
from networks import Gaussian, GaussianUNet, quiet_pipeline, small_unet, train_sigmas
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline
from ncsn_diffusers.data import decode_images
from ncsn_diffusers.evaluation import CLASSIFIERS, load_digit_classifier, share_found

ROOT = Path(__file__).parent.parent

needs_statistics = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="distances need torch-fidelity"
)


@pytest.fixture(scope="module")
def scripts():
    """The folder of the scripts, where they find each other, as it is when Python runs one of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def benchmark(scripts):
    return scripts("benchmark")


@pytest.fixture(scope="module")
def posterior_benchmark(scripts):
    return scripts("benchmark_posterior")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline for 28×28 digits that has learned nothing, and a data set of 100 real digits in each split."""
    unet = small_unet(sample_size=28)
    pipeline, digits = tmp_path_factory.mktemp("pipeline"), tmp_path_factory.mktemp("digits")
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(pipeline)
    embedded = str(ROOT / "ncsn_diffusers/assets/mnist_train_10k.parquet")
    dataset = load_dataset("parquet", data_files=embedded, split="train")
    for i, split in enumerate(("train", "test")):
        dataset.select(range(100 * i, 100 * i + 100)).to_parquet(str(digits / f"{split}-00000.parquet"))
    return pipeline, digits


def rows_of(path):
    saved = json.loads(path.with_suffix(".json").read_text())
    assert saved["device"]
    return saved["rows"]


@needs_statistics
def test_samplers(tmp_path, benchmark, folders, capsys):
    pipeline, digits = folders
    names = ("annealed Langevin", "SDE-DPM-Solver++", "NCSNv2")
    output = tmp_path / "all"
    benchmark.samplers(
        str(pipeline), str(digits), budgets=(2, 5), names=names, num_images=70, batch_size=40, output=str(output)
    )
    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved["num_images"] == 70
    assert saved["dtype"] == "float32"
    real, *rows = saved["rows"]
    # NCSNv2 takes at least one level of 5 steps, and the final denoising
    counts = {name: (6, 6) if name == "NCSNv2" else (2, 5) for name in names}
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [(name, n) for name in names for n in counts[name]]
    # digits are nearer to digits than what this network draws, and spread over the classes
    assert all(real["distance"] < row["distance"] / 5 for row in rows)
    assert abs(real["kernel_distance"]) < 5 * real["kernel_distance_standard_error"]
    assert all(row["kernel_distance"] > 5 * row["kernel_distance_standard_error"] for row in rows)
    assert abs(real["pixel_kernel_distance"]) < 5 * real["pixel_kernel_distance_standard_error"]
    assert all(row["pixel_kernel_distance"] > 5 * row["pixel_kernel_distance_standard_error"] for row in rows)
    assert real["class_entropy"] > 2 > max(row["class_entropy"] for row in rows)
    assert real["recall"] > 0.5 > max(row["recall"] for row in rows)
    printed = "".join(capsys.readouterr())
    assert all(f"{row['distance']:.4f}" in printed for row in saved["rows"])
    assert Image.open(tmp_path / "all.png").width > 100


@needs_statistics
def test_several_sets_of_images_give_errors(tmp_path, benchmark, folders, capsys):
    pipeline, digits = folders
    arguments = {"budgets": (2,), "names": ("annealed Langevin", "DDIM"), "num_images": 66, "batch_size": 33}
    benchmark.samplers(str(pipeline), str(digits), **arguments, num_sets=2, output=str(tmp_path / "two"))
    *_, default, ddim = rows_of(tmp_path / "two")
    assert len(default["set_distances"]) == 2
    assert default["distance"] == pytest.approx(np.mean(default["set_distances"]))
    above = np.subtract(ddim["set_distances"], default["set_distances"])
    # of two numbers the standard error of the mean is half their difference
    line = f"DDIM     2 evaluations: {above.mean():+.4f} ± {abs(above[0] - above[1]) / 2:.4f} above annealed Langevin"
    assert line in capsys.readouterr().out
    # a set is what a run of its own draws from the same seeds
    benchmark.samplers(str(pipeline), str(digits), **arguments, seed=66, output=str(tmp_path / "second"))
    *_, alone, _ = rows_of(tmp_path / "second")
    assert alone["distance"] == pytest.approx(default["set_distances"][1], rel=1e-4)


def test_plot_samplers_from_the_table(tmp_path, benchmark, monkeypatch):
    distances = {  # by evaluations
        "annealed Langevin": {6: 0.45, 10: 0.54},
        "DDIM": {6: 13.3, 10: 3.3},
        "NCSNv2": {1161: 1.29},
        "SDE-DPM-Solver++ at equal levels": {6: 0.46, 10: 0.54},
    }
    rows = [{"sampler": "real images", "evaluations": 0, "distance": distance} for distance in (0.62, 0.51, 0.73)]
    for name, line in distances.items():
        rows += [{"sampler": name, "evaluations": n, "distance": distance} for n, distance in line.items()]
    (tmp_path / "all.json").write_text(json.dumps({"num_images": 500, "rows": rows}))
    figures = []

    class KeptFigure(benchmark.Figure):
        def savefig(self, *arguments, **keywords):
            figures.append(self)
            super().savefig(*arguments, **keywords)

    monkeypatch.setattr(benchmark, "Figure", KeptFigure)
    benchmark.plot_samplers(str(tmp_path / "all"))
    (figure,) = figures
    own, equal = figure.axes
    shown = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in own.lines}
    default = "annealed Langevin, the default"
    assert shown == {
        default: distances["annealed Langevin"],
        "DDIM": distances["DDIM"],
        "NCSNv2": distances["NCSNv2"],
    }
    shown = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in equal.lines}
    assert shown == {
        default: distances["annealed Langevin"],
        "SDE-DPM-Solver++": distances["SDE-DPM-Solver++ at equal levels"],
    }
    for axes in figure.axes:
        (band,) = axes.patches
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((0.51, 0.73))
        # where another line runs along the default, both are seen
        assert axes.lines[0].get_linewidth() > 3 * max(line.get_linewidth() for line in axes.lines[1:])
        assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "3 sets of real images"
    looks = list(benchmark.SAMPLER_LINES.values())
    assert benchmark.SAMPLER_LINES.keys() == {
        name.removesuffix(" at equal levels") for name in benchmark.SAMPLERS
    } and len({look[1] for look in looks}) == len(looks)
    assert Image.open(tmp_path / "all.png").width > 800


@needs_statistics
def test_samplers_draws_the_classes_in_turn(tmp_path, benchmark, folders, monkeypatch):
    pipe = quiet_pipeline(small_unet(sample_size=28, num_class_embeds=4), AnnealedLangevinScheduler())
    asked = []
    pipe.unet.register_forward_pre_hook(
        lambda _, inputs, keywords: asked.extend(keywords["class_labels"].tolist()), with_kwargs=True
    )
    monkeypatch.setattr(benchmark, "load", lambda name: pipe)
    settings = {"budgets": (1,), "names": ("annealed Langevin",), "num_images": 70, "batch_size": 40}
    benchmark.samplers("digits", str(folders[1]), **settings, output=str(tmp_path / "all"))
    assert asked == [i % 3 for i in range(70)]


@needs_statistics
def test_a_classifier_of_other_images(tmp_path, benchmark, folders):
    """Digits whose labels are one too large: the digits' classifier is refused, one that counts from 1 is taken."""
    pipeline, digits = folders
    for split in ("train", "test"):
        dataset = load_dataset("parquet", data_files=str(digits / f"{split}-00000.parquet"), split="train")
        labels = [(label + 1) % 10 for label in dataset["label"]]
        dataset = dataset.remove_columns("label").add_column("label", labels)
        (tmp_path / "shifted").mkdir(exist_ok=True)
        dataset.to_parquet(str(tmp_path / "shifted" / f"{split}-00000.parquet"))
    settings = {"budgets": (1,), "names": ("annealed Langevin",), "num_images": 70, "output": str(tmp_path / "all")}
    with pytest.raises(SystemExit, match="--classifier: none that comes with the package finds the labels of such ima"):
        benchmark.samplers(str(pipeline), str(tmp_path / "shifted"), **settings)
    weights = load_digit_classifier().state_dict()
    weights["head.weight"], weights["head.bias"] = (
        weights[f"head.{name}"].roll(1, 0).contiguous() for name in ("weight", "bias")
    )
    save_file(weights, tmp_path / "shifted.safetensors")
    dataset = load_dataset("parquet", data_files=str(tmp_path / "shifted/test-00000.parquet"), split="train")
    images, labels = decode_images(dataset), torch.tensor(dataset["label"][:])
    found = benchmark.load_classifier(str(tmp_path / "shifted.safetensors"), images, labels)
    assert share_found(found, images, labels) > 0.95
    with pytest.raises(SystemExit, match=r"--classifier .*digit_classifier.safetensors names only \d% of the images"):
        benchmark.load_classifier(str(CLASSIFIERS["digits"]), images, labels)
    (tmp_path / "other.safetensors").write_bytes(b"weights")
    with pytest.raises(
        SystemExit, match=r"--classifier: .*other.safetensors' does not hold a classifier that scripts/"
    ):
        benchmark.samplers(str(pipeline), str(digits), **settings, classifier=str(tmp_path / "other.safetensors"))


def test_schedulers_draws_the_classes_in_turn(tmp_path, benchmark, monkeypatch):
    asked = []

    class Pipeline(NCSNPipeline):
        def __call__(self, batch_size, class_labels, **arguments):
            asked.append(class_labels)
            return SimpleNamespace(images=torch.zeros(batch_size, 1, 8, 8))

    pipe = Pipeline(small_unet(num_class_embeds=4), AnnealedLangevinScheduler())
    monkeypatch.setattr(benchmark, "load", lambda name: pipe)
    titles = keep_row_titles(benchmark, monkeypatch)
    benchmark.schedulers("digits", str(tmp_path / "schedulers.png"), num_images=4)
    # two rows of annealed Langevin, and none of diffusers' own pipelines
    assert asked == [[0, 1, 2, 0]] * (2 + len(benchmark.STOCK_SCHEDULERS))
    assert titles[2:] == [f"{name}, 50" for name in benchmark.STOCK_SCHEDULERS]
    assert all(title.startswith("annealed Langevin,\n") for title in titles[:2])
    assert Image.open(tmp_path / "schedulers.png").width >= 600


def keep_row_titles(benchmark, monkeypatch):
    """The list that the row titles of each grid are added to."""
    titles, make_grid = [], benchmark.make_grid
    monkeypatch.setattr(benchmark, "make_grid", lambda *a, **k: titles.extend(k["row_titles"]) or make_grid(*a, **k))
    return titles


GAUSSIAN = Gaussian(
    mean=[0.4, -0.3, 0.2, -0.1],
    covariance=[[1.0, 0.3, 0.1, 0.0], [0.3, 0.5, 0.0, 0.1], [0.1, 0.0, 0.25, 0.05], [0.0, 0.1, 0.05, 0.16]],
)


def draw_gaussian(benchmark, name, num_levels, num_images=20_000):
    scheduler = AnnealedLangevinScheduler()
    pipe = quiet_pipeline(GaussianUNet(GAUSSIAN, 2, 2, train_sigmas(scheduler).tolist()), scheduler)
    pipe.scheduler = benchmark.make_scheduler(name, scheduler.config)
    generator = torch.Generator().manual_seed(0)
    x = pipe(num_images, num_levels, generator=generator, output_type="latent").images.flatten(1).double()
    assert pipe.unet.evaluations == num_levels
    return x


@pytest.mark.parametrize(
    "name",
    [
        "annealed Langevin",
        "DPM-Solver++ at equal levels",
        "SDE-DPM-Solver++ at equal levels",
        "Euler ancestral at equal levels",
    ],
)
def test_samplers_at_equal_levels_converge(benchmark, name):
    """On an exact score the mean and the covariance become the data's, as the levels become many."""
    x = draw_gaussian(benchmark, name, 200)
    # standard errors of 20,000 samples: 0.007 of a deviation, and 0.01 of a variance; the ODE leaves s/sigma_1 = 0.02
    # of the way from the start to the mean; Euler's variances are 4 % too small with 200 levels, as first order's are
    deviations = GAUSSIAN.covariance.diag().sqrt()
    assert ((x.mean(0) - GAUSSIAN.mean) / deviations).abs().max() < 0.03
    errors = (x.T.cov() - GAUSSIAN.covariance) / torch.outer(deviations, deviations)
    assert errors.abs().max() < (0.06 if name.startswith("Euler") else 0.035)


def test_samplers_at_equal_levels_are_at_equal_levels(benchmark):
    config = AnnealedLangevinScheduler().config
    ours = benchmark.make_scheduler("annealed Langevin", config)
    for name in benchmark.EQUAL_LEVELS:
        theirs = benchmark.make_scheduler(name, config)
        for num_levels in (6, 20):  # in turn: the levels are those of the last call
            for scheduler in (ours, theirs):
                scheduler.set_timesteps(num_levels)
            assert torch.equal(theirs.sigmas, ours.sigmas)
            assert torch.equal(theirs.timesteps, ours.timesteps)
        # the start has the same variance: in the data's units, or over 1 + sigma_1²
        sigma = ours.sigmas[0].item()
        scale = 1 if name.startswith("Euler") else (1 + sigma**2) ** 0.5
        assert float(theirs.init_noise_sigma) * scale == pytest.approx(ours.init_noise_sigma, rel=1e-5)


@pytest.fixture(scope="module")
def gaussian_of_digits():
    """The mean and the standard deviations of 2,000 digits in [-1, 1], in the directions of their covariance."""
    embedded = str(ROOT / "ncsn_diffusers/assets/mnist_train_10k.parquet")
    digits = decode_images(load_dataset("parquet", data_files=embedded, split="train").select(range(2000)))
    digits = digits.flatten(1).double() / 127.5 - 1
    variances, directions = torch.linalg.eigh(digits.T.cov())
    return digits.mean(0) @ directions, variances.clamp(min=0).sqrt()


def wasserstein(scheduler, num_levels, mean, deviations):
    """
    The squared Wasserstein distance of a Gaussian and of what the scheduler draws with its exact score, whose result is
    linear in the start, in each step's noise and in the mean: a batch with one impulse for each has it all.
    """
    scheduler.set_timesteps(num_levels)
    scheduler.set_begin_index(0)
    means, x = torch.zeros(2, num_levels + 2, len(mean), dtype=torch.float64)
    means[-1], x[0] = mean, float(scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].item()
        scale = 1 if isinstance(scheduler, AnnealedLangevinScheduler) else (1 + sigma**2) ** 0.5
        noise = torch.zeros_like(x)
        noise[i + 1] = 1
        denoised = means + (scale * x - means) * deviations**2 / (deviations**2 + sigma**2)
        x = scheduler.step(denoised, t, x, variance_noise=noise).prev_sample
    return ((x[:-1].square().sum(0).sqrt() - deviations).square() + (x[-1] - mean).square()).sum().item()


@pytest.mark.parametrize(
    ("num_levels", "expected"), [(6, (3.12, 3.39, 6.52)), (10, (0.707, 1.591, 2.708)), (20, (0.125, 0.449, 0.785))]
)
def test_second_order_is_ahead_at_equal_levels(benchmark, gaussian_of_digits, num_levels, expected):
    config = AnnealedLangevinScheduler(prediction_type="sample").config
    names = ("annealed Langevin", "SDE-DPM-Solver++ at equal levels", "DPM-Solver++ at equal levels")
    found = [wasserstein(benchmark.make_scheduler(name, config), num_levels, *gaussian_of_digits) for name in names]
    assert found == pytest.approx(expected, rel=0.02)  # the figures in docs/results.md


@needs_statistics
def test_samplers_goes_on_where_it_ended(tmp_path, benchmark, folders, monkeypatch):
    pipeline, digits = map(str, folders)
    call, drawn, most = NCSNPipeline.__call__, [], [3]

    def counted(self, batch_size, *args, **kwargs):
        if len(drawn) == most[0]:
            raise KeyboardInterrupt
        assert self.unet.dtype == torch.bfloat16
        drawn.append(batch_size)
        return call(self, batch_size, *args, **kwargs)

    monkeypatch.setattr(NCSNPipeline, "__call__", counted)
    arguments = {"budgets": (1, 2), "names": ("annealed Langevin",), "batch_size": 40, "dtype": "bfloat16"}
    arguments["output"] = str(tmp_path / "all")
    with pytest.raises(KeyboardInterrupt):
        benchmark.samplers(pipeline, digits, num_images=80, **arguments)
    most[0] = 100
    benchmark.samplers(pipeline, digits, num_images=80, **arguments)
    assert drawn == [40, 40, 40, 40]
    first = rows_of(tmp_path / "all")
    benchmark.samplers(pipeline, digits, num_images=90, **arguments)
    assert drawn == [40, 40, 40, 40, 10, 10]
    with pytest.raises(
        SystemExit, match=r"holds annealed Langevin, 1 that were made with another `seed`.*`overwrite_output_dir`"
    ):
        benchmark.samplers(pipeline, digits, num_images=80, seed=1, **arguments)
    benchmark.samplers(pipeline, digits, num_images=80, seed=1, overwrite_output_dir=True, **arguments)
    assert len(drawn) == 10
    assert rows_of(tmp_path / "all")[1:] != first[1:]


@needs_statistics
def test_samplers_in_two_processes(tmp_path, benchmark, folders):
    arguments = (
        "samplers",
        folders[0],
        "--dataset_name",
        folders[1],
        "--budgets",
        2,
        "--names",
        "DDIM",
        "--num_images",
        70,
        "--batch_size",
        20,
    )
    for name, run in (("one", run_forked), ("two", run_two_forked)):
        result = run(ROOT / "scripts/benchmark.py", *arguments, "--output", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("Saved") == result.stdout.count("sampler ") == 1
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


@needs_statistics
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ("DDIM", "Euler")}, "--names must be among annealed Langevin, DDIM, .*, not Euler"),
        ({"num_sets": 0}, "--num_sets must be at least 1, not 0"),
        ({"num_images": 50}, "--num_images 50 must be above the features' number, 64"),
        ({"num_images": 101}, "--num_images 101 is above the 100 images of the split `train`"),
        ({"output": "nowhere/all"}, "--output nowhere/all is not in a folder that exists"),
    ],
)
def test_samplers_refuses_bad_flags(benchmark, folders, arguments, message):
    pipeline, digits = folders
    with pytest.raises(SystemExit, match=message):
        benchmark.samplers(str(pipeline), str(digits), **arguments)


def test_samplers_asks_for_the_statistics_library_first(tmp_path, benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"^benchmark\.py: .*`pip install torch-fidelity`"):
        benchmark.samplers("nowhere", "nowhere", output=str(tmp_path / "all"))


def test_overhead_of_a_compiled_network(tmp_path, benchmark, folders, capsys):
    output = tmp_path / "overhead"
    # "eager" captures the graph and leaves out the C++ compiler
    arguments = {"batch_size": 2, "num_inference_steps": 3, "repeats": 1, "compile_backend": "eager"}
    benchmark.overhead(str(folders[0]), **arguments, output=str(output))
    (row,) = rows_of(output)
    assert row["ratio"] == row["pipeline_seconds"] / row["bare_seconds"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["pipeline", f"{row['pipeline_seconds']:.3f}", "s"] in printed
    assert ["bare", "calls", f"{row['bare_seconds']:.3f}", "s"] in printed
    assert next(words[1] for words in printed if words[0] == "ratio") == f"{row['ratio']:.3f}"


@pytest.mark.parametrize("subcommand", ["overhead", "memory"])
def test_a_class_conditional_pipeline(tmp_path, benchmark, subcommand):
    NCSNPipeline(small_unet(num_class_embeds=4), AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    settings = {"overhead": {"repeats": 1, "num_inference_steps": 2}, "memory": {"budgets": (2,)}}[subcommand]
    getattr(benchmark, subcommand)(str(tmp_path / "pipeline"), **settings, output=str(tmp_path / "out"))
    assert len(rows_of(tmp_path / "out")) == 1


def test_memory_is_few_buffers_whatever_the_number_of_steps(tmp_path, benchmark, folders, capsys):
    output = tmp_path / "memory"
    benchmark.memory(str(folders[0]), batch_size=8, budgets=(3, 12), output=str(output))
    rows = rows_of(output)
    assert [row["evaluations"] for row in rows] == [3, 12]
    # x itself, which the bare call was given; the previous denoised estimate, the next sample and its noise;
    # Python 3.10 keeps the start noise too, as the argument of a call that has not returned
    expected = 4 if sys.version_info >= (3, 11) else 5
    assert all(expected - 1 <= row["extra_buffers"] < expected + 0.1 for row in rows)
    assert abs(rows[0]["peak_bytes"] - rows[1]["peak_bytes"]) < 10_000
    assert f"{expected}.0" in capsys.readouterr().out


def test_arrays(tmp_path, benchmark, capsys):
    benchmark.arrays(num_arrays=5000, size=4, num_batches=10, rounds=2, output=str(tmp_path / "arrays"))
    rows = rows_of(tmp_path / "arrays")
    assert [row["data"] for row in rows] == ["from the file", "in memory"]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    ratio = np.median([a / b for a, b in zip(*(row["seconds"] for row in rows), strict=True)])
    assert f"ratio {ratio:.2f}; first pass" in capsys.readouterr().out


def test_compositions(tmp_path, benchmark, folders, capsys, monkeypatch):
    unet = small_unet(sample_size=28, num_class_embeds=11)
    NCSNPipeline(unet, AnnealedLangevinScheduler()).save_pretrained(tmp_path / "pipeline")
    measured = []

    def distance(drawn, real):
        measured.append((len(drawn), len(real)))
        return 1.0

    monkeypatch.setattr(benchmark, "frechet_distance", distance)  # 100 digits are too few for it
    arguments = {"num_images": 20, "num_inference_steps": 2, "dataset_name": str(folders[1])}
    titles = keep_row_titles(benchmark, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        benchmark.compositions(str(tmp_path / "pipeline"), **arguments, output=str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    assert [row["composition"] for row in rows] == list(benchmark.COMPOSITIONS)
    assert measured == [(20, 100)] * len(rows)
    assert all(row["ancestors"] == 20 or "resampled" in row["composition"] for row in rows)
    assert f"{rows[0]['named_as_asked']:7.1%}" in capsys.readouterr().out
    assert [title.replace("\n", " ") for title in titles] == list(benchmark.COMPOSITIONS)
    assert Image.open(tmp_path / "out.png").width >= 600


def test_convergence(tmp_path, benchmark, capsys):
    output = tmp_path / "convergence"
    benchmark.convergence(budgets=(50, 250), output=str(output))
    errors = [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()[:4]]
    assert errors[0] > 5 * errors[2]
    assert errors[2] < 3  # 50 evaluations
    assert errors[3] < 1  # 250
    assert [round(100 * row["variance_error"], 3) for row in rows_of(output)] == errors
    assert Image.open(tmp_path / "convergence.png").width > 100


def test_training(tmp_path, benchmark, capsys, monkeypatch):
    # a clock on which a step of each loop takes a known time: 1/2, 1/4 and 2 s, and twice that in the second round
    now = [0.0]
    seconds = {"training step": 0.5, "a constant batch": 0.25, "plain loop": 2.0, "diffusers' script": 1.0}
    seconds |= {"network alone": 0.125}
    calls = {name: 0 for name in seconds}
    constant = []

    def tick(name):
        calls[name] += 1
        # 2 steps a round, of which the first warms up
        now[0] += seconds[name] * (100 if calls[name] <= 2 else 1 if calls[name] <= 4 else 2)

    def training_step(trainer, batches):
        images, _ = next(batches)
        assert images.shape == (4, 1, 28, 28)
        is_constant = isinstance(batches, itertools.repeat)
        if is_constant:
            constant.append(images)
        tick("a constant batch" if is_constant else "training step")

    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(benchmark.time, clock, lambda: now[0])
    monkeypatch.setattr(benchmark.Trainer, "training_step", training_step)
    for name, function in (
        ("plain loop", "make_plain_step"),
        ("diffusers' script", "make_diffusers_step"),
        ("network alone", "make_network_step"),
    ):
        make_step = getattr(benchmark, function)

        def make(trainer, digits, name=name, make_step=make_step):
            assert digits.shape == (10_000, 1, 28, 28) and (digits.min(), digits.max()) == (-1, 1)
            step = make_step(trainer, digits)

            def counted():
                step()
                tick(name)

            return counted

        monkeypatch.setattr(benchmark, function, make)
    path = tmp_path / "training"
    benchmark.training(train_batch_size=4, block_out_channels=(8, 8), num_steps=2, rounds=2, output=str(path))
    assert calls == dict.fromkeys(seconds, 6)
    assert all(torch.equal(images, constant[0]) for images in constant)
    # 4 images a step: of each round, without the one that warms up
    assert {row["loop"]: row["images_per_second"] for row in rows_of(path)} == {
        "training step": [8, 4],
        "a constant batch": [16, 8],
        "plain loop": [2, 1],
        "diffusers' script": [4, 2],
        "network alone": [32, 16],
    }
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = [[word for word in words if word != "CPU"] for words in lines]  # of seconds, on a CPU
    medians = {" ".join(words[:-4]): float(words[-4]) for words in lines if words[-3:] == ["images", "a", "second"]}
    right = {"training step": 5.3, "a constant batch": 10.7, "plain loop": 1.3, "diffusers' script": 2.7}
    assert medians == pytest.approx(right | {"network alone": 21.3})
    ratios = {" ".join(words[2:-4]): words[-4:] for words in lines if words[:2] == ["throughput", "over"]}
    assert ratios == {
        "plain loop": ["4.000", "(4.000", "to", "4.000)"],
        "a constant batch": ["0.500", "(0.500", "to", "0.500)"],
        "diffusers' script": ["2.000", "(2.000", "to", "2.000)"],
        "network alone": ["0.250", "(0.250", "to", "0.250)"],
    }


def test_machine_makes_a_table_of_what_the_others_measured(tmp_path, benchmark, folders, monkeypatch):
    counts = iter([7, 1])
    monkeypatch.setattr(benchmark, "count_synchronizations", lambda function: next(counts))
    output = tmp_path / "machine"
    benchmark.machine(str(folders[0]), 2, num_inference_steps=3, num_steps=1, rounds=1, output=str(output))
    saved = {name: json.loads(Path(f"{output}-{name}.json").read_text()) for name in ("training", "overhead", "memory")}
    table = [line.strip("| ").split(" | ") for line in output.with_suffix(".md").read_text().splitlines()]
    assert table[0] == [f"{saved['training']['device']}, torch {torch.__version__}, 2 images a batch"]
    figures = dict(table[2:])
    rates = {row["loop"]: row["images_per_second"][0] for row in saved["training"]["rows"]}
    (call,), (peak,) = saved["overhead"]["rows"], saved["memory"]["rows"]
    (trained,) = [name for name in figures if name.startswith("training in ")]
    assert figures.pop(trained) == f"{rates['training step']:.1f}"
    assert float(figures.pop("features of an evaluation, images a second")) > 10
    assert figures == {
        "training step over a plain loop": f"{rates['training step'] / rates['plain loop']:.2f}",
        "times that 1 training steps wait for the GPU": "7",
        "sampling, images a second at 3 evaluations": f"{2 / call['pipeline_seconds']:.2f}",
        "a call over its bare network evaluations": f"{call['ratio']:.3f}",
        "times that a call waits for the GPU": "1",
        "peak memory of a training step, MB": "no GPU",
        "peak memory of a call, MB": f"{peak['peak_bytes'] / 1e6:.1f}",
    }


def test_waits_for_the_gpu_are_counted(benchmark, monkeypatch):
    assert torch.cuda.is_available() or benchmark.count_synchronizations(lambda: 1 / 0) is None
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def function():
        for words in ("called a synchronizing CUDA operation", "another", "called a synchronizing CUDA operation"):
            warnings.warn(words, stacklevel=1)

    assert benchmark.count_synchronizations(function) == 2
    assert modes == ["warn", "default"]


# --- Posterior samples ---

needs_deepinv = pytest.mark.skipif(
    importlib.util.find_spec("deepinv") is None, reason="the posterior benchmark needs deepinv"
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@needs_deepinv
def test_measurements_of_digits(posterior_benchmark):
    x = torch.randn(2, 1, 28, 28, generator=seeded())
    smaller = posterior_benchmark.make_task("4x smaller", 0, "cpu")(0.1)
    torch.testing.assert_close(smaller.A(x), F.avg_pool2d(x, 4))
    blur = posterior_benchmark.make_task("blur", 0, "cpu")(0.1)
    axis = torch.arange(-14.0, 14)
    weights = torch.exp(-axis.square() / 4.5)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    inner = F.conv2d(x, kernel[None, None], padding=14)[..., :28, :28]
    torch.testing.assert_close(blur.A(x)[..., 8:20, 8:20], inner[..., 8:20, 8:20], rtol=1e-3, atol=1e-4)
    missing = posterior_benchmark.make_task("missing pixels", 0, "cpu")(0.1)
    assert missing.A(x).count_nonzero().item() / x.numel() == pytest.approx(0.3, abs=0.05)
    for physics in (smaller, blur, missing):
        y = torch.randn(physics.A(x).shape, generator=seeded(1))
        assert (physics.A(x) * y).sum().item() == pytest.approx((x * physics.A_adjoint(y)).sum().item(), rel=1e-3)
        # the singular vectors are orthonormal
        torch.testing.assert_close(physics.V(physics.V_adjoint(x)), x, rtol=1e-4, atol=1e-4)
        assert physics.noise_model.sigma == pytest.approx(0.1)


def make_problem(posterior_benchmark, prior, num_samples, evaluations, noise_std):
    """Half of 4 × 4 Gaussian pixels measured, and the posterior in units of the data."""
    kept = (torch.arange(16) % 2 == 0).double()
    generator = seeded(4)
    x = prior.mean + torch.linalg.cholesky(prior.covariance) @ torch.randn(16, dtype=torch.float64, generator=generator)
    y = kept * (x + noise_std * torch.randn(16, dtype=torch.float64, generator=generator))
    a = torch.diag(kept)[kept > 0]
    gain = prior.covariance @ a.T @ torch.linalg.inv(a @ prior.covariance @ a.T + noise_std**2 * torch.eye(8).double())
    posterior = Gaussian(prior.mean + gain @ (a @ y - a @ prior.mean), prior.covariance - gain @ a @ prior.covariance)
    pipe = quiet_pipeline(GaussianUNet(prior, 4, 4, train_sigmas(AnnealedLangevinScheduler()).tolist()))
    y = (kept * (y + 1) / 2).float().reshape(1, 1, 4, 4).expand(num_samples, -1, -1, -1)
    physics = posterior_benchmark.make_masking(kept.float().reshape(4, 4))
    return posterior_benchmark.Problem(pipe, physics, y, noise_std / 2, evaluations), posterior, kept > 0


def smooth_prior():
    positions = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return Gaussian(torch.linspace(-0.3, 0.3, 16), 0.25 * torch.exp(-torch.cdist(positions, positions) / 3))


def ddpm_moments(mean, variances, num_steps, y=0.0, weight=0.0, noise_std=1.0):
    """
    The mean and variance to which deepinv's DDPM steps lead for a Gaussian, whose score is exact, by their definition;
    with a `weight` under DPS's "annealed" guidance towards pixels y.
    """
    times = torch.linspace((math.sqrt(0.01 + 39.8 * math.log1p(2500)) - 0.1) / 19.9, 0, num_steps + 1).double()
    sigmas = torch.expm1(0.1 * times + 9.95 * times**2).sqrt()
    m, v = 0.0, sigmas[0] ** 2
    for sigma, following in itertools.pairwise(sigmas):
        ratio, gain = (following / sigma) ** 2, variances / (variances + sigma**2)
        pull = weight * gain * sigma**2 / (noise_std**2 + sigma**2)
        m = ratio * m + (1 - ratio) * ((1 - pull) * (mean + gain * (m - mean)) + pull * y)
        v = (ratio + (1 - ratio) * (1 - pull) * gain) ** 2 * v + following**2 * (1 - ratio)
    return m, v


@needs_deepinv
@pytest.mark.parametrize("name", ["ours", "moment matching"])
def test_methods_that_are_right_for_gaussians(posterior_benchmark, name):
    # in the units of [0, 1], with the factors of the wrappers, and counted
    problem, expected, _ = make_problem(posterior_benchmark, smooth_prior(), 1000, 50, 0.2)
    draw, settings = posterior_benchmark.POSTERIOR_METHODS[name][0], {} if name == "ours" else {"cg_max_iter": 8}
    samples, calls, _ = posterior_benchmark.sample_counted(draw, problem, 1000, 0, settings)
    shares = torch.ones(16) if name == "ours" else ddpm_moments(0.0, expected.variances, 50)[1] / expected.variances
    w = (2 * samples.flatten(1).double() - 1 - expected.mean) @ expected.eigenvectors / expected.variances.sqrt()
    assert w.mean(0).abs().max() < 0.02 + 3.5 / 1000**0.5
    assert (w.var(0) / shares).mean().item() == pytest.approx(1, abs=0.04 + 3 * (2 / 16_000) ** 0.5)
    assert (w.var(0) / shares - 1).abs().max() < 0.14 + 3.5 * (2 / 1000) ** 0.5
    assert calls["evaluations"] == 50
    fewest, most = (0, 0) if name == "ours" else (50 * 3, 50 * 10)  # it stops where the residual is small
    assert fewest <= calls["backward_passes"] <= most


@needs_deepinv
@pytest.mark.parametrize(("noise", "share"), [("scaled", 0.74), ("as it is", 0.37)])
def test_ddrm_of_independent_pixels(posterior_benchmark, noise, share):
    """
    Measured pixels are theirs up to the noise, which is small here. The others have the prior's mean, and less than its
    variance: in small steps (1 + √(1 - eta²))/2 = 0.76 of it by the paper's rule, half of that by deepinv's.
    """
    prior = Gaussian(torch.linspace(-0.3, 0.3, 16), 0.25 * torch.eye(16))
    problem, expected, measured = make_problem(posterior_benchmark, prior, 2000, 200, 0.02)
    torch.manual_seed(0)
    samples = 2 * posterior_benchmark.sample_ddrm(problem, eta=0.85, noise=noise).flatten(1).double() - 1
    assert (samples.mean(0) - expected.mean)[measured].abs().max() < 0.02
    assert (samples.mean(0) - expected.mean)[~measured].abs().max() < 3.5 * 0.5 / 2000**0.5
    assert samples.var(0)[~measured].mean().item() == pytest.approx(0.25 * share, rel=0.05)


@needs_deepinv
def test_dps_of_independent_pixels(posterior_benchmark):
    prior = Gaussian(torch.linspace(-0.3, 0.3, 16), 0.04 * torch.eye(16))
    problem, _, measured = make_problem(posterior_benchmark, prior, 2000, 50, 0.1)
    samples, calls, _ = posterior_benchmark.sample_counted(
        posterior_benchmark.sample_dps, problem, 2000, 0, {"guidance": "annealed", "weight": 1.0}
    )
    samples = 2 * samples.flatten(1).double() - 1
    y = 2 * problem.y[0].flatten().double() - 1
    mean, variance = ddpm_moments(prior.mean, torch.full((16,), 0.04).double(), 50, y, measured.double(), 0.1)
    assert ((samples.mean(0) - mean) / variance.sqrt()).abs().max() < 0.01 + 3.5 / 2000**0.5
    assert (samples.var(0) / variance - 1).abs().max() < 0.01 + 3.5 * (2 / 2000) ** 0.5
    assert calls == {"evaluations": 50, "backward_passes": 50}


@needs_deepinv
def test_diffpir_of_independent_pixels(posterior_benchmark):
    # measured pixels are theirs up to the noise, which is small here, and the others have the prior's mean
    prior = Gaussian(torch.linspace(-0.3, 0.3, 16), 0.04 * torch.eye(16))
    problem, expected, measured = make_problem(posterior_benchmark, prior, 2000, 50, 0.02)
    samples, calls, _ = posterior_benchmark.sample_counted(
        posterior_benchmark.sample_diffpir, problem, 2000, 0, {"lambda_": 2.0, "zeta": 1.0}
    )
    error = (2 * samples.flatten(1).double() - 1).mean(0) - expected.mean
    assert error[measured].abs().max() < 0.01
    assert error[~measured].abs().max() < 0.005 + 3.5 * 0.2 / 2000**0.5
    assert calls == {"evaluations": 50, "backward_passes": 0}


@needs_deepinv
def test_posterior(tmp_path, posterior_benchmark, folders, capsys):
    pipeline, digits = folders
    tasks = ("4x smaller", "missing pixels, noiseless")
    arguments = {"num_images": 3, "num_samples": 3, "num_search_images": 2, "evaluations": 4, "batch_size": 5}
    output = tmp_path / "posterior"
    posterior_benchmark.posterior(str(pipeline), str(digits), tasks, **arguments, output=str(output))
    saved = json.loads((tmp_path / "posterior.json").read_text())
    assert saved["coverage_that_is_right"] == 0.5
    rows = {(row["task"], row["method"]): row for row in saved["rows"]}
    names = list(posterior_benchmark.POSTERIOR_METHODS)
    assert list(rows) == [(tasks[0], name) for name in names] + [
        (tasks[1], n) for n in posterior_benchmark.NOISELESS_METHODS
    ]
    assert {name: rows[tasks[0], name]["evaluations"] for name in names} == dict.fromkeys(names, 4)
    backward = {name: rows[tasks[0], name]["backward_passes"] for name in names}
    iterations = rows[tasks[0], "moment matching"]["settings"]["cg_max_iter"]
    assert backward == {"ours": 0, "DDRM": 0, "DiffPIR": 0, "DPS": 4, "moment matching": 4 * (2 + iterations)}
    # known pixels are kept exactly, up to the rounding of float32
    assert all(rows[tasks[1], name]["misfit_worst"] < 1e-6 for name in posterior_benchmark.NOISELESS_METHODS)
    for name in names[1:]:
        tried = [trial for trial in saved["search"] if trial["method"] == name]
        assert [trial["settings"] for trial in tried] == posterior_benchmark.POSTERIOR_METHODS[name][1]
        assert rows[tasks[0], name]["settings"] == min(tried, key=lambda trial: trial["crps"])["settings"]
    for task, name in rows:
        first = rows[task, "ours"]["crps"]
        assert rows[task, name]["crps_above_first"] == pytest.approx(rows[task, name]["crps"] - first, abs=1e-6)
        assert (rows[task, name]["crps_above_first_standard_error"] > 0) == (name != "ours")
    printed = capsys.readouterr().out
    assert all(f"{row['psnr_of_a_sample']:.4g}" in printed for row in saved["rows"])
    # the same again, and no other row changes one
    posterior_benchmark.posterior(str(pipeline), str(digits), tasks[:1], ("DDRM",), **arguments, output=str(output))
    (again,) = rows_of(output)
    change = {"seconds": 0.0, "crps_above_first": 0.0, "crps_above_first_standard_error": 0.0}
    assert again | change == rows[tasks[0], "DDRM"] | change


@needs_deepinv
def test_noise_of_measurements_is_apart_from_that_of_samples(tmp_path, posterior_benchmark, folders, monkeypatch):
    # a CPU's generator reads 32 bits of a seed, and y must not hold the numbers that a sampler then draws
    measurements, drawn = [], []

    def draw(problem):
        measurements.append(problem.y)
        drawn.append(torch.randn(problem.y.shape))
        return drawn[-1]

    monkeypatch.setitem(posterior_benchmark.POSTERIOR_METHODS, "ours", (draw, [{}]))
    for noise_std in (0.1, 0.2):
        settings = {"num_images": 8, "num_search_images": 1, "noise_std": noise_std, "output": str(tmp_path / "all")}
        posterior_benchmark.posterior(str(folders[0]), str(folders[1]), ("blur",), ("ours",), num_samples=2, **settings)
    noise = measurements[1] - measurements[0]  # of deviation 0.1 in units of [0, 1]
    assert noise[::2].std().item() == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(noise[::2], noise[1::2])  # the samples of a digit share its measurement
    assert drawn[0].std().item() == pytest.approx(1, rel=0.05)
    correlation = torch.corrcoef(torch.stack([noise.flatten(), drawn[0].flatten()]))[0, 1]
    shifted = torch.corrcoef(torch.stack([noise[::2].flatten(), drawn[0].flatten()[: noise[::2].numel()]]))[0, 1]
    assert max(abs(correlation), abs(shifted)) < 4 / noise[::2].numel() ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("rotation",)}, "--tasks must be among missing pixels, 4x smaller, .*, not rotation"),
        ({"names": ("ours", "DAPS")}, "--names must be among ours, DDRM, .*, not DAPS"),
        ({"num_images": 1}, "--num_images must be at least 2, not 1"),
        ({"num_samples": 1}, "--num_samples must be at least 2, not 1"),
        ({"num_search_images": 0}, "--num_search_images must be at least 1, not 0"),
        ({"evaluations": 49}, "--evaluations must be even and at least 4, not 49"),
        ({"noise_std": 0.0}, "--noise_std must be above 0, not 0.0: 'missing pixels, noiseless' is"),
        ({"output": "nowhere/all"}, "--output nowhere/all is not in a folder that exists"),
    ],
)
def test_posterior_refuses_bad_flags(posterior_benchmark, arguments, message):
    with pytest.raises(SystemExit, match=message):
        posterior_benchmark.posterior("nowhere", "nowhere", **arguments)


def test_posterior_asks_for_deepinv_first(tmp_path, posterior_benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(SystemExit, match=r"^benchmark_posterior\.py: this needs deepinv, .*\[inverse\]"):
        posterior_benchmark.posterior("nowhere", "nowhere", output=str(tmp_path / "all"))


@needs_deepinv
@pytest.mark.parametrize(
    ("size", "num_images", "message"),
    [(8, 3, "for 28×28 grayscale digits, not images of"), (28, 99, "must be 100 at most, taken together")],
)
def test_posterior_refuses_what_does_not_fit(tmp_path, posterior_benchmark, folders, size, num_images, message):
    pipeline = tmp_path / "pipeline"
    NCSNPipeline(small_unet(sample_size=size), AnnealedLangevinScheduler()).save_pretrained(pipeline)
    with pytest.raises(SystemExit, match=message):
        posterior_benchmark.posterior(
            str(pipeline), str(folders[1]), num_images=num_images, output=str(tmp_path / "all")
        )
