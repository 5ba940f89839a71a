"""
Posterior samples beside those of deepinv's samplers: `python scripts/benchmark_posterior.py --help`. It needs the extra
`inverse`. deepinv's import takes seconds, so that it waits until it is needed.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from benchmark import PipelineName, check_output, load, load_classifier, save_json
from datasets import load_dataset
from torch.nn import functional as F  # noqa: N812
from tqdm.auto import tqdm

from ncsn_diffusers import (
    AnnealedLangevinScheduler,
    NCSNDenoiser,
    NCSNInpaintPipeline,
    NCSNPipeline,
    NCSNPosteriorPipeline,
)
from ncsn_diffusers.data import decode_images
from ncsn_diffusers.evaluation import extract_features
from ncsn_diffusers.evaluation.calibration import (
    IMAGE_TOLERANCE,
    coverage,
    crps,
    misfit,
    nominal_coverage,
    psnr,
    variance_ratio,
)
from ncsn_diffusers.evaluation.metrics import mean_and_error
from ncsn_diffusers.sampling import NOISE_SEED, cast


@dataclass
class Problem:
    """
    Measurements y = A x + n of images in [0, 1], as each method is given them.

    Args:
        pipe (`NCSNPipeline`): the network.
        make_physics (function): A as an object of `deepinv.physics`, for a noise of the given standard deviation.
        y (`torch.Tensor` of shape `(n, 1, height, width)`): the measurements, 0 where nothing was measured.
        noise_std (`float`): of n, in units of [0, 1].
        evaluations (`int`): how many network evaluations a sample may take.
    """

    pipe: NCSNPipeline
    make_physics: Callable[[float], Any]
    y: torch.Tensor
    noise_std: float
    evaluations: int

    @property
    def physics(self):
        return self.make_physics(self.noise_std)

    @property
    def device(self) -> torch.device:
        return self.y.device

    def to_unit_range(self, x: torch.Tensor) -> torch.Tensor:
        """From the network's units to those of [0, 1], without clipping."""
        return self.pipe.units.to_data(x, clip=False)

    @property
    def largest_level(self) -> float:
        """Of the network, in units of [0, 1]."""
        scheduler = AnnealedLangevinScheduler.from_config(self.pipe.scheduler.config)
        return scheduler.ladder.largest * 2 * self.pipe.units.data_std


def make_masking(kept: torch.Tensor) -> Callable[[float], Any]:
    """The measurement of the pixels where `kept`, `(height, width)`, is 1."""
    from deepinv.physics import DecomposablePhysics, GaussianNoise

    return lambda noise_std: DecomposablePhysics(
        mask=kept[None, None], noise_model=GaussianNoise(noise_std), device=kept.device
    )


def make_separable(matrix: torch.Tensor) -> Callable[[float], Any]:
    """The measurement M x Mᵀ for M `(m, height)`, whose singular vectors are products of those of M."""
    from deepinv.physics import DecomposablePhysics, GaussianNoise

    u, s, vh = torch.linalg.svd(matrix)
    m, n = matrix.shape
    rest = (0, n - m, 0, n - m)
    return lambda noise_std: DecomposablePhysics(
        U=lambda c: u @ c[..., :m, :m] @ u.mT,
        U_adjoint=lambda y: F.pad(u.mT @ y @ u, rest),
        V=lambda c: vh.mT @ c @ vh,
        V_adjoint=lambda x: vh @ x @ vh.mT,
        mask=F.pad(torch.outer(s, s), rest)[None, None],
        noise_model=GaussianNoise(noise_std),
        device=matrix.device,
    )


def make_task(name: str, seed: int, device: torch.device) -> Callable[[float], Any]:
    """The measurement of 28×28 digits that a row of [`posterior`] is about."""
    if name.startswith("missing pixels"):
        kept = torch.rand(28, 28, generator=torch.Generator().manual_seed(seed)) < 0.3
        return make_masking(kept.float().to(device))
    if name == "4x smaller":
        return make_separable(torch.eye(7, device=device).repeat_interleave(4, 1) / 4)
    axis = torch.arange(28.0, device=device)
    weights = torch.exp(-0.5 * ((axis[:, None] - axis) / 1.5) ** 2)  # a Gaussian of 1.5 pixels
    return make_separable(weights / weights.sum(1, keepdim=True))


def sample_ours(problem: Problem) -> torch.Tensor:
    pipe = NCSNPosteriorPipeline(**problem.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": problem.evaluations // 2, "output_type": "latent"}
    return problem.to_unit_range(pipe(problem.y, problem.physics, problem.noise_std, **arguments).images)


def sample_inpainting(problem: Problem) -> torch.Tensor:
    pipe = NCSNInpaintPipeline(**problem.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    mask = 1 - problem.physics.mask
    # four evaluations at each level
    images = pipe(problem.y, mask, num_inference_steps=problem.evaluations // 4 + 1, output_type="latent").images
    return problem.to_unit_range(images)


def sample_ddrm(problem: Problem, eta: float, noise: str) -> torch.Tensor:
    from deepinv.sampling import DDRM

    # deepinv 0.5 divides the noise of each level by √2, which is right where the singular vectors are complex. Ours are
    # real, and "scaled" makes up for it: then x has the noise that the denoiser is told, as the paper has it.
    root = 2**0.5 if noise == "scaled" else 1.0
    sigmas = (root * torch.linspace(1, 0, problem.evaluations)).tolist()  # its default
    denoiser = NCSNDenoiser(problem.pipe)
    sampler = DDRM(lambda x, sigma: denoiser(x, sigma / root), sigmas=sigmas, eta=eta)
    return sampler(problem.y, problem.make_physics(root * problem.noise_std))


def make_solver(problem: Problem):
    """deepinv's DDPM steps at even times, from where its diffusion of [-1, 1] has the network's largest level."""
    from deepinv.sampling import DDPMSolver

    last = (math.sqrt(0.1**2 + 39.8 * math.log1p((2 * problem.largest_level) ** 2)) - 0.1) / 19.9
    return DDPMSolver(torch.linspace(last, 0, problem.evaluations + 1).double())  # log(1 + sigma²) = 0.1 t + 9.95 t²


def sample_dps(problem: Problem, guidance: str, weight: float) -> torch.Tensor:
    from deepinv.sampling import DPS

    settings = {"guidance": guidance, "weight": weight, "device": problem.device}
    sampler = DPS(NCSNDenoiser(problem.pipe), solver=make_solver(problem), **settings)
    return sampler(problem.y, problem.physics).float()


def sample_moment_matching(problem: Problem, cg_max_iter: int) -> torch.Tensor:
    from deepinv.sampling import MomentMatchingDataFidelity, PosteriorDiffusion, VariancePreservingDiffusion

    fidelity = MomentMatchingDataFidelity(cg_max_iter=cg_max_iter)
    diffusion = VariancePreservingDiffusion(alpha=1.0, device=problem.device)
    denoiser, solver = NCSNDenoiser(problem.pipe), make_solver(problem)
    sampler = PosteriorDiffusion(fidelity, denoiser, diffusion, solver, device=problem.device)
    return sampler(problem.y, problem.physics).float()


def sample_diffpir(problem: Problem, lambda_: float, zeta: float) -> torch.Tensor:
    from deepinv.optim import L2
    from deepinv.sampling import DiffPIR

    denoiser, largest = NCSNDenoiser(problem.pipe), problem.largest_level

    def denoise(x, sigma):
        # The first of its levels is above the network's: there x is noise, whatever the image, and is shrunk to it.
        share = min(1.0, largest / sigma.item())
        return denoiser(0.5 + share * (x - 0.5), share * sigma)

    settings = {"max_iter": problem.evaluations, "lambda_": lambda_, "zeta": zeta, "device": problem.device}
    return DiffPIR(denoise, L2(), sigma=problem.noise_std, **settings)(problem.y, problem.physics)


def combine(**values: tuple) -> list[dict[str, Any]]:
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


# Each method with the settings that the search is among.
POSTERIOR_METHODS: dict[str, tuple[Callable[..., torch.Tensor], list[dict[str, Any]]]] = {
    "ours": (sample_ours, [{}]),
    "DDRM": (sample_ddrm, combine(eta=(0.85, 1.0), noise=("as it is", "scaled"))),
    "DiffPIR": (sample_diffpir, combine(lambda_=(1.0, 3.0, 10.0, 30.0), zeta=(0.3, 1.0))),
    "DPS": (
        sample_dps,
        combine(guidance=("norm",), weight=(30.0, 100.0, 300.0, 1000.0))
        + combine(guidance=("annealed",), weight=(3.0, 10.0, 30.0)),
    ),
    # three backward passes at each level, or five
    "moment matching": (sample_moment_matching, combine(cg_max_iter=(1, 3))),
}
NOISELESS = "missing pixels, noiseless"
# Without noise ours stands beside inpainting alone: deepinv's samplers divide by the noise.
NOISELESS_METHODS = {"ours": (sample_ours, [{}]), "NCSNInpaintPipeline": (sample_inpainting, [{}])}
POSTERIOR_TASKS = ("missing pixels", "4x smaller", "blur", NOISELESS)


def sample_counted(method: Callable, problem: Problem, batch_size: int, seed: int, settings: dict) -> tuple:
    """Samples for all measurements, in batches, with the evaluations and backward passes of each, and the seconds."""
    calls = {"evaluations": 0, "backward_passes": 0}

    def count(_, __, output):
        calls["evaluations"] += 1
        output = output[0] if isinstance(output, tuple) else output.sample
        if output.requires_grad:
            output.register_hook(count_backward)

    def count_backward(_):
        calls["backward_passes"] += 1

    handle = problem.pipe.unet.register_forward_hook(count)
    torch.manual_seed(seed)  # deepinv's samplers take no generator
    start = time.perf_counter()
    batches = problem.y.split(batch_size)
    try:
        samples = torch.cat([method(replace(problem, y=y), **settings).detach() for y in batches]).cpu()
    finally:
        handle.remove()
    seconds = time.perf_counter() - start
    samples = samples.nan_to_num(0.0, 0.0, 0.0)  # one that has diverged is black
    return samples, {name: number / len(batches) for name, number in calls.items()}, seconds / len(problem.y)


def posterior(
    pipeline: PipelineName = None,
    dataset_name: str = "ylecun/mnist",
    tasks: tuple[str, ...] = POSTERIOR_TASKS,
    names: tuple[str, ...] = tuple(POSTERIOR_METHODS),
    num_images: int = 16,
    num_samples: int = 8,
    num_search_images: int = 4,
    num_search_samples: int = 2,
    evaluations: int = 50,
    noise_std: float = 0.025,
    batch_size: int = 64,
    seed: int = 0,
    classifier: str | None = None,
    output: str = "posterior",
) -> None:
    """
    Digits given a measurement: the posterior pipeline beside the samplers of deepinv, at equal network evaluations.

    Each method has the settings with the least continuous ranked probability score on other digits of the `test` split.
    The table has the PSNR of a sample and of the samples' mean, the misfit (right: 1), the share of the samples that
    the digit classifier names rightly, how often a pixel lies between the least and the largest sample, the samples'
    variance over their mean's squared error (right: 1), network evaluations, backward passes and seconds a sample, the
    score, and by how much it is above the task's first row, with the standard error of that over the images. It is
    written to OUTPUT.json row by row, with what the search has tried.

    Args:
        pipeline: A pipeline of 28×28 grayscale images: its folder, or the name of one of the package; mnist by default.
        dataset_name: The real digits, on the Hub or in a folder, with the split `test`.
        tasks: Which measurements.
        names: Which methods; inpainting joins the measurement without noise, where deepinv's cannot.
        num_images: Digits of the table.
        num_samples: Samples for each of them.
        num_search_images: Digits, apart from those, for the search of the settings.
        num_search_samples: Samples for each of them.
        evaluations: Network evaluations for a sample; even.
        noise_std: The noise's standard deviation, for images in [0, 1].
        batch_size: Samples drawn at a time.
        seed: Seed of the choice of digits, of the missing pixels and of all noise.
        classifier: File of a classifier that scripts/train_digit_classifier.py wrote, for images that none of the
            package's knows.
        output: Path of the table, without its ending .json.
    """
    check_output(output)
    for option, given, known in (("tasks", tasks, POSTERIOR_TASKS), ("names", names, POSTERIOR_METHODS)):
        unknown = set(given) - set(known)
        if unknown:
            raise SystemExit(f"--{option} must be among {', '.join(known)}, not {', '.join(sorted(unknown))}.")
    for option, given, least in (
        ("num_images", num_images, 2),
        ("num_samples", num_samples, 2),
        ("num_search_images", num_search_images, 1),
        ("num_search_samples", num_search_samples, 2),
        ("batch_size", batch_size, 1),
    ):
        if given < least:
            raise SystemExit(f"--{option} must be at least {least}, not {given}.")
    if evaluations < 4 or evaluations % 2:
        raise SystemExit(f"--evaluations must be even and at least 4, not {evaluations}: ours takes two at each level.")
    if not 0 < noise_std < math.inf:
        raise SystemExit(f"--noise_std must be above 0, not {noise_std}: {NOISELESS!r} is the task without noise.")
    try:
        import deepinv
    except ImportError as error:
        raise SystemExit(
            f'benchmark_posterior.py: this needs deepinv, which `pip install -e ".[inverse]"` brings ({error}).'
        ) from error
    pipe = load(pipeline)
    if pipe.sample_shape != (1, 28, 28):
        raise SystemExit(
            f"benchmark_posterior.py: this is for 28×28 grayscale digits, not images of {pipe.sample_shape}."
        )
    dataset = load_dataset(dataset_name, split="test").shuffle(seed=seed)
    if len(dataset) < num_search_images + num_images:
        raise SystemExit(f"--num_images and --num_search_images must be {len(dataset)} at most, taken together.")
    dataset = dataset.select(range(num_search_images + num_images))
    digits, labels = decode_images(dataset) / 255, torch.tensor(dataset["label"])
    cast(pipe, "float32")
    searched, shown = digits[:num_search_images], digits[num_search_images:]
    labels, network = labels[num_search_images:], load_classifier(classifier, digits, labels)
    rows, trials = [], []
    settings = {"pipeline": pipeline, "dataset_name": dataset_name, "num_images": num_images}
    settings |= {"num_samples": num_samples, "num_search_images": num_search_images}
    settings |= {"num_search_samples": num_search_samples, "noise_std": noise_std, "seed": seed}
    settings |= {"coverage_that_is_right": nominal_coverage(num_samples), "deepinv": deepinv.__version__}

    def measure(task, images, count, noise_seed):
        """The measurements, `count` times each, of digits."""
        std = 0.0 if task == NOISELESS else noise_std
        make_physics = make_task(task, seed, pipe.device)
        y = make_physics(std).A(images.to(pipe.device))
        generator = torch.Generator().manual_seed(NOISE_SEED + noise_seed)
        noise = std * torch.randn(y.shape, generator=generator).to(y.device)
        y = torch.where(find_measured(make_physics), y + noise, 0.0)
        return Problem(pipe, make_physics, y.repeat_interleave(count, 0), std, evaluations)

    def find_measured(make_physics):
        return make_physics(0.0).A(torch.ones(1, 1, 28, 28, device=pipe.device)) != 0

    widths = (26, 20, 7, 7, 8, 8, 7, 9, 9, 12, 9, 9, 9, 11, 9)
    titles = ("measurement", "method", "PSNR", "of mean", "misfit", "worst", "named", "coverage", "variance")
    titles += ("evaluations", "backward", "seconds", "CRPS", "above first", "± error")
    print(" ".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)))
    for task in tasks:
        methods = NOISELESS_METHODS if task == NOISELESS else {name: POSTERIOR_METHODS[name] for name in names}
        problem, trial = measure(task, shown, num_samples, seed), measure(task, searched, num_search_samples, seed + 1)
        measured, first_scores = find_measured(problem.make_physics)[0].cpu(), None
        for name, (method, candidates) in methods.items():
            best = []
            for candidate in candidates if len(candidates) > 1 else ():
                samples, _, _ = sample_counted(method, trial, batch_size, seed + 1, candidate)
                score = crps(samples.clamp(0, 1).unflatten(0, (-1, num_search_samples)), searched).mean().item()
                best.append((score, candidate))
                trials.append({"task": task, "method": name, "settings": candidate, "crps": score})
            chosen = min(best, key=lambda pair: pair[0])[1] if best else candidates[0]
            samples, calls, seconds = sample_counted(method, problem, batch_size, seed, chosen)
            samples = samples.unflatten(0, (-1, num_samples))
            y, physics = problem.y[::num_samples].cpu()[:, measured], problem.physics
            std = problem.noise_std or 1 / 255  # without noise, in units of a gray level
            fits = misfit(samples, y, lambda x: physics.A(x.to(pipe.device)).cpu()[:, measured], std)  # noqa: B023
            clipped = samples.clamp(0, 1)
            classes = extract_features(clipped.flatten(0, 1), network).argmax(1).reshape(-1, num_samples)
            scores = crps(clipped, shown)
            first_scores = scores if first_scores is None else first_scores
            above, above_error = mean_and_error(scores - first_scores)
            rows.append(
                {
                    "task": task,
                    "method": name,
                    "psnr_of_a_sample": psnr(clipped, shown[:, None]).mean().item(),
                    "psnr_of_the_mean": psnr(clipped.mean(1), shown).mean().item(),
                    "misfit": fits.mean().item(),
                    "misfit_worst": fits.max().item(),
                    "named_rightly": (classes == labels[:, None]).double().mean().item(),
                    "coverage": coverage(clipped, shown, tolerance=IMAGE_TOLERANCE)[0],
                    "variance_ratio": variance_ratio(clipped, shown)[0],
                    **calls,
                    "seconds": seconds,
                    "crps": scores.mean().item(),
                    "crps_above_first": above,
                    "crps_above_first_standard_error": above_error,
                    "settings": chosen,
                }
            )
            save_json(output, rows, **settings, search=trials)
            values = list(rows[-1].values())[: len(widths)]
            texts = [value if isinstance(value, str) else f"{value:.4g}" for value in values]
            tqdm.write(" ".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)))
    print(f"Saved {Path(output).resolve()}.json.")


if __name__ == "__main__":
    tyro.cli(posterior, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
