"""
Noise levels chosen from the data: techniques 1, 2 and 4 of NCSNv2 (Song & Ermon 2020, arXiv:2006.09011).

The largest level must let a chain move from any image to any other, so sigma_max is the largest distance between two
images ([`choose_sigma_max`]). In D dimensions, noise of level sigma lies in a shell of radius √D sigma and width
sigma/√2. The shells of neighboring levels must overlap, which gives their ratio and, with sigma_max/sigma_min, their
number L ([`choose_num_train_timesteps`]). The T steps of a level must then reduce the previous level's noise to its own
([`choose_step_size`]):

    sigma_max = choose_sigma_max(images)
    num_train_timesteps = choose_num_train_timesteps(sigma_min, sigma_max, images[0].numel())
    step_size = choose_step_size(sigma_min, sigma_max, num_train_timesteps, num_langevin_steps=5)

Every sigma is in the network's units, images in [-1, 1]. The paper's are in [0, 1]: there each sigma is half as large,
L and the relative step size are the same. Its CIFAR-10 ladder, 50 to 0.01 there and 100 to 0.02 here, has L = 232
levels and with T = 5 the relative step size r = 0.062, the paper's epsilon = r sigma_min² = 6.2e-6.
"""

import math
from statistics import NormalDist

import torch
from tqdm.auto import tqdm

from .images import to_model_range
from .scheduling_annealed_langevin import technique_4


@torch.no_grad()
def choose_sigma_max(
    images: torch.Tensor,
    max_num_images: int | None = 100_000,
    generator: torch.Generator | None = None,
    batch_size: int = 1000,
) -> float:
    """
    Technique 1: the largest Euclidean distance between two images.

    Pairs are searched in blocks of `batch_size` × `batch_size`, starting with the images farthest from the mean. The
    distance of two images is at most the sum of their distances to the mean, so most blocks can be skipped and the
    result is still exact.

    Args:
        images (`torch.Tensor` of shape `(n, ...)`):
            Data points on any device: uint8 images, which are scaled to [-1, 1], or floating ones, used as they are.
        max_num_images (`int`, *optional*, defaults to 100000):
            Of more points than this, a random subset is used and the result is a lower bound. `None` uses all.
        generator (`torch.Generator`, *optional*): draws that subset, on the CPU.
        batch_size (`int`, defaults to 1000): side of a block.

    Returns:
        `float`: sigma_max, in the network's units.

    Raises:
        ValueError: there are fewer than two points, all are the same, or they are neither uint8 nor finite floats.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"`images` must be uint8 or floating, not {images.dtype}.")
    if max_num_images is not None and max_num_images < 2:
        raise ValueError(f"`max_num_images` must be at least 2, not {max_num_images}.")
    if images.ndim < 2 or len(images) < 2:
        raise ValueError(f"`images` must be at least two points, of shape (n, ...), not {tuple(images.shape)}.")
    if max_num_images is not None and len(images) > max_num_images:
        chosen = torch.randperm(len(images), generator=generator)[:max_num_images]
        images = images[chosen.to(images.device)]
    images = images.flatten(1)

    def block(rows):
        return to_model_range(images[rows]) if images.dtype == torch.uint8 else images[rows].float()

    batches = torch.arange(len(images), device=images.device).split(batch_size)
    # on the CPU, since Apple GPUs have no float64
    mean = sum(block(rows).cpu().sum(0, dtype=torch.float64) for rows in batches) / len(images)
    if not mean.isfinite().all():
        raise ValueError("`images` has values that are not finite.")
    mean = mean.float().to(images.device)
    radii = torch.cat([(block(rows) - mean).norm(dim=1) for rows in batches])
    radii, order = radii.sort(descending=True)

    largest, pair = 0.0, None
    batches = order.split(batch_size)
    first_radii = radii[::batch_size].tolist()  # of each block: the others are nearer to the mean
    for i, rows in enumerate(tqdm(batches, desc="Largest distance", unit="block", leave=False)):
        if 2 * first_radii[i] <= largest:
            break
        a = block(rows) - mean
        for j, columns in enumerate(batches[i:], i):
            if first_radii[i] + first_radii[j] <= largest:
                break
            b = block(columns) - mean
            squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
            index = squares.argmax().item()
            distance = squares.flatten()[index].clamp(min=0).sqrt().item()
            if distance > largest:
                largest, pair = distance, torch.stack([rows[index // len(columns)], columns[index % len(columns)]])
    if pair is not None:
        a, b = block(pair).cpu().double()  # the squares above are rounded
        largest = (a - b).norm().item()
    if not largest:
        raise ValueError(f"`images` are {len(images)} equal points: the largest distance is 0.")
    return largest


def choose_num_train_timesteps(sigma_min: float, sigma_max: float, dim: int, overlap: float = 0.5668) -> int:
    """
    Technique 2: the number L of levels in geometric progression of which neighbors overlap. Their ratio gamma solves

        Phi(√(2D) (gamma - 1) + 3 gamma) - Phi(√(2D) (gamma - 1) - 3 gamma) = overlap,

    the share of level sigma's noise within three standard deviations of the shell of level gamma sigma.

    Args:
        sigma_min (`float`): smallest level, above 0.
        sigma_max (`float`): largest level, above `sigma_min`, in the same units.
        dim (`int`):
            D, the number of values in a data point (3,072 for CIFAR-10), at least 5: below, any two levels overlap.
        overlap (`float`, defaults to 0.5668):
            Above 0 and at most 0.99. The paper asks for "≈ 0.5"; all five of its ladders (232, 500, 788, 1,086 and
            2,311 levels) have 0.5668, where 0.5 itself gives 6 % fewer levels.

    Returns:
        `int`: L, at least 2.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_ladder(sigma_min, sigma_max)
    if dim < 5:
        raise ValueError(f"`dim` must be at least 5, not {dim}: in fewer dimensions any two noise levels overlap.")
    if not 0 < overlap <= 0.99:
        raise ValueError(f"`overlap` must be above 0 and at most 0.99, not {overlap}.")

    def overlap_at(gamma):
        distance = math.sqrt(2 * dim) * (gamma - 1)
        return NormalDist().cdf(distance + 3 * gamma) - NormalDist().cdf(distance - 3 * gamma)

    low, high = 1.0, 2.0
    while overlap_at(high) > overlap:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap_at(middle) > overlap else (low, middle)
    return max(2, 1 + round(math.log(sigma_max / sigma_min) / math.log(low)))


def choose_step_size(sigma_min: float, sigma_max: float, num_train_timesteps: int, num_langevin_steps: int) -> float:
    """
    Technique 4: the relative step size r of the paper's rule (Euler–Maruyama) with which T steps take the noise of a
    level to that of the next. What `AnnealedLangevinScheduler(noise_rule="euler_maruyama")` chooses for itself.

    Args:
        sigma_min (`float`): smallest level, above 0.
        sigma_max (`float`): largest level, above `sigma_min`, in the same units.
        num_train_timesteps (`int`): number L of levels in geometric progression, at least 2.
        num_langevin_steps (`int`): number T of steps a level, at least 1.

    Returns:
        `float`: r; the authors' `step_lr` or epsilon is r sigma_min², in their units [0, 1] a quarter of ours.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_ladder(sigma_min, sigma_max)
    if num_train_timesteps < 2 or num_langevin_steps < 1:
        raise ValueError(
            f"`num_train_timesteps`={num_train_timesteps} must be at least 2 and `num_langevin_steps`="
            f"{num_langevin_steps} at least 1."
        )
    return technique_4((sigma_max / sigma_min) ** (1 / (num_train_timesteps - 1)), num_langevin_steps)


def _check_ladder(sigma_min: float, sigma_max: float):
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"`sigma_min`={sigma_min} must be above 0 and below `sigma_max`={sigma_max}, both finite.")
