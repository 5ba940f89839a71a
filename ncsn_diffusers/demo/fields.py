"""
What the demo page draws of pipelines whose samples are no images: signals, maps and volumes, in the units of the data.

A field that is drawn from the model is measured at a few points, its stations, and samples are drawn given the
measurement. So there is a truth to compare them with, about which the model is right: errors are the sampler's.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..hub.loading import NCSNPipeline
from ..pipeline_ncsn_posterior import NCSNPosteriorPipeline
from ..ranks import coverage, nominal_coverage
from ..sampling import make_generators
from ..sheets import MOST_CHANNELS, MOST_FIELDS_OF_CHANNELS, Limits, cut_shown, find_limits, plot_fields
from .chains import ANY_CLASS, MAX_SEED, Chains, Images, Opening, Run, check_number, check_whole

SHEET_WIDTH, PANEL_WIDTH = 5.0, 3.0  # inches: their labels can be read on a phone, too
SHARE_OF_STATIONS = 0.05  # of the points, at first
SHARE_OF_NOISE = 0.1  # of a measurement at first, in standard deviations of the data
LARGEST_NOISE = 10.0  # of them: beyond, nothing is measured
NUM_SHOWN = 2  # samples beside their mean


@dataclass
class Example:
    """
    A field, its measurement, and samples given the measurement, all in the units of the data.

    Args:
        truth (`np.ndarray` of shape `(channels, ...)`): The field.
        measured (`np.ndarray` of shape `(channels, ...)`): The measurement; NaN where there is none.
        figures (`list`): Pairs of pictures and a caption.
        samples (`np.ndarray` of shape `(num_samples, channels, ...)`, *optional*): When they are drawn.
        summary (`str`): What the samples' errors are.
    """

    truth: np.ndarray
    measured: np.ndarray
    figures: list[tuple[Images, str]]
    samples: np.ndarray | None = None
    summary: str = ""


class FieldChains(Chains):
    """
    As [`Chains`], of a pipeline whose samples are no images.

    Attributes:
        unit (`str`): What the values are in; "" if nobody has said so.
        has_one_scale (`bool`): Whether all channels have the same `data_std`.
        noise_std, largest_noise (`float`):
            The noise of a measurement at first, and the largest one; in the unit, or, without one scale, in standard
            deviations of each channel.
        num_points, num_stations (`int`): The number of points, and of those that are measured at first.
        num_samples (`int`): The number of samples at first.
        part (`str`): Which part of the samples plots show, in a sentence; "" for all.
    """

    of_images = False
    thing, things = "sample", "Samples"

    def __init__(self, pipe: NCSNPipeline, max_evaluations: int = 200, max_images: int = 16):
        channels, *sizes = pipe.sample_shape
        has_rows = len(sizes) > 1 and channels > 1
        super().__init__(pipe, max_evaluations, min(max_images, MOST_FIELDS_OF_CHANNELS) if has_rows else max_images)
        self.num_points = math.prod(sizes)
        self.num_images = min(8 if self.num_points <= 64**2 and not has_rows else 4, self.max_images)
        self.max_samples = max(2, max_images)
        self.num_samples = min(9, self.max_samples)
        self.num_stations = max(1, round(SHARE_OF_STATIONS * self.num_points))
        self.unit = pipe.units.name or ""
        stds = np.ravel(pipe.units.data_std)
        self.has_one_scale = bool((stds == stds[0]).all())
        self._scale = stds[0] if self.has_one_scale else 1.0
        self.noise_std, self.largest_noise = (
            float(f"{share * self._scale:.2g}") for share in (SHARE_OF_NOISE, LARGEST_NOISE)
        )
        parts = []
        if channels > MOST_CHANNELS:
            parts.append(f"the first {MOST_CHANNELS} of {channels} channels")
        if len(sizes) == 3:
            parts.append("the middle slice of each volume")
        self.part = f"Shown: {' and '.join(parts)}." if parts else ""

    def find_limits(self, samples: np.ndarray) -> Limits:
        return find_limits(samples)

    def to_pictures(self, samples: np.ndarray, limits: Limits | None) -> Images:
        return [plot_fields(samples, self.unit, limits, SHEET_WIDTH)]

    def plot_one(self, field: np.ndarray, limits: Limits | None, measured: np.ndarray | None = None) -> Images:
        """A field `(channels, ...)`, on its own."""
        return [plot_fields(field[None], self.unit, limits, PANEL_WIDTH, measured)]

    def measure(self, label: Any, num_stations: Any, noise_std: Any, num_samples: Any, levels: Any, seed: Any) -> Run:
        """
        A field measured, and samples given the measurement; the result is an [`Example`].

        The field is that of `pipe(generator=...)` with the seed; sample i has the seed `seed` + 1 + i, and stations and
        noise that after the samples'.

        Args:
            label, levels, seed: What was entered.
            num_stations: The number of points, drawn at random, where all channels are measured.
            noise_std: The noise's standard deviation, as [`FieldChains`] has it; 0 for none.
            num_samples: The number of samples.
        """
        arguments = self._check_class(label)
        num_stations = check_whole("num_stations", "Stations", num_stations, 1, self.num_points - 1)
        noise_std = check_number("noise_std", "Noise", noise_std, 0, self.largest_noise)
        num_samples = check_whole("num_samples", "Samples", num_samples, 2, self.max_samples)
        levels = check_whole("levels", "Noise levels", levels, 1, self.max_levels(2))
        seed = check_whole("seed", "Seed", seed, 0, MAX_SEED)
        prior, posterior = self.fork(NCSNPipeline), self.fork(NCSNPosteriorPipeline)
        shape = prior.sample_shape
        if not self.has_one_scale and noise_std:
            noise_std = noise_std * torch.tensor(prior.units.data_std)

        def work(run: Run) -> Example | None:
            truth = prior(batch_size=1, generator=make_generators(seed, range(1)), **arguments, **run.watch()).images
            if run.stopped:
                return None
            generator = torch.Generator().manual_seed(seed + 1 + num_samples)
            stations = torch.randperm(self.num_points, generator=generator)[:num_stations].sort().values

            def operator(x: torch.Tensor) -> torch.Tensor:
                return x.flatten(2)[..., stations.to(x.device)]

            measurement = operator(torch.from_numpy(truth))
            noise = torch.randn(measurement.shape, generator=generator)
            measurement = measurement + torch.as_tensor(noise_std).reshape(-1, 1) * noise
            measured = np.full((shape[0], self.num_points), np.nan, np.float32)
            measured[:, stations.numpy()] = measurement[0].numpy()  # a tensor of one index would be a number
            measured = measured.reshape(shape)
            caption = f"truth and {num_stations} station{'s' if num_stations > 1 else ''}"
            run.limits = find_limits(truth)
            picture = self.plot_one(truth[0], run.limits, measured)
            run.result = Example(truth[0], measured, [(picture, caption)])
            samples = posterior(
                measurement,
                operator,
                noise_std,
                batch_size=num_samples,
                num_inference_steps=levels,
                generator=make_generators(seed + 1, range(num_samples)),
                **arguments,
                **run.watch(),
            ).images
            if run.stopped:  # half a chain is no sample
                return run.result
            limits, mean, deviation = (
                find_limits(np.concatenate([truth, samples])),
                samples.mean(0),
                samples.std(0, ddof=1),
            )
            error = mean - truth[0]
            figures = [
                (self.plot_one(truth[0], limits, measured), caption),
                (self.plot_one(mean, limits), f"mean of {num_samples} samples"),
                (self.plot_one(error, [(-high, high) for high in _find_largest(error)]), "mean minus truth"),
                *((self.plot_one(sample, limits), f"sample {i}") for i, sample in enumerate(samples[:NUM_SHOWN], 1)),
                (self.plot_one(deviation, [(0, high) for high in _find_largest(deviation)]), "standard deviation"),
            ]
            return Example(truth[0], measured, figures, samples, self._summarize(truth[0], measured, samples))

        return Run(work)

    def _summarize(self, truth: np.ndarray, measured: np.ndarray, samples: np.ndarray) -> str:
        """The errors where nothing was measured."""
        between = np.isnan(measured[0]).ravel()
        truth, samples = (
            torch.from_numpy(values).flatten(values.ndim - len(self.pipe.sample_shape) + 1)[..., between]
            for values in (truth, samples)
        )
        error = (samples.double().mean(0) - truth).square().mean(-1).sqrt()
        spread = samples.double().var(0).mean(-1).sqrt()
        (share, _), right = coverage(samples[None], truth[None]), nominal_coverage(len(samples))
        error, spread = (
            f"{', '.join(f'{value:.2g}' for value in values)} {self.unit}".strip() for values in (error, spread)
        )
        channels = ", channel by channel" if len(truth) > 1 else ""
        return (
            f"Where nothing was measured, the mean of the samples is off by {error} (RMSE{channels}), and their "
            f"standard deviation is {spread}. The truth lies within the samples' range at {share:.0%} of these points; "
            f"right is {right:.0%}, on average over many truths."
        )


def _find_largest(field: np.ndarray) -> list[float]:
    """The largest size of what is shown of each channel."""
    return [np.abs(values).max() for values in cut_shown(field[None])[0]]


class FieldOpening(Opening):
    """As [`Opening`], of a pipeline whose samples are no images."""

    TABS = ("draw", "measure", "compare")

    def _prepare(self, shape: tuple[int, ...]) -> None:
        pass

    def _make_run(self, tab: str) -> Run:
        chains = self._chains
        if tab != "measure":
            return super()._make_run(tab)
        noise = chains.noise_std
        return chains.measure(ANY_CLASS, chains.num_stations, noise, chains.num_samples, chains.levels, 0)
