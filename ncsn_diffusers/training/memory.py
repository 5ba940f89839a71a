"""Whether a run fits in the memory and on the disk, found out before work is lost."""

import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from .config import TrainingConfig


def check_memory(
    config: TrainingConfig, accelerator: Accelerator, network: torch.nn.Module, shape: tuple[int, ...]
) -> None:
    """
    Estimate what a step takes of the memory, from below: what the backward pass needs of the forward pass, and the
    gradients and AdamW's moments. A compiled network may compute the former again instead, and is not checked.

    Args:
        config ([`TrainingConfig`]): the run's settings.
        accelerator (`Accelerator`): whose device and precision count.
        network (`torch.nn.Module`): on that device, not compiled.
        shape (`tuple` of ints): channels and sides of an image, such as height and width.

    Raises:
        ValueError: a step needs more than is free.
    """
    free = free_bytes(accelerator.device)
    if free is None:
        return
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    small = (shape[0], *[2 ** len(network.config.block_out_channels)] * len(shape[1:]))
    per_pixel = _bytes_per_pixel(network, accelerator, small)
    needed = config.train_batch_size * per_pixel * math.prod(shape[1:]) + 3 * weights
    if needed > free:
        size = "×".join(map(str, shape[1:]))
        raise ValueError(
            f"`train_batch_size`={config.train_batch_size}: to train on as many images of {size} pixels takes at least "
            f"{needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free. Choose a smaller `train_batch_size` "
            "(`gradient_accumulation_steps` makes up for it) or `resolution`."
        )


def _bytes_per_pixel(network: torch.nn.Module, accelerator: Accelerator, shape: tuple[int, ...]) -> float:
    """Measured on small images of this shape: all layers keep as much for each pixel whatever their number."""

    def saved(batch_size: int) -> int:
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.zeros(batch_size, *shape, device=accelerator.device)
        labels = {}
        if network.config.get("num_class_embeds") is not None:
            labels["class_labels"] = torch.zeros(batch_size, dtype=torch.long, device=accelerator.device)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with accelerator.autocast(), hooks:
            kept = network(x, torch.ones(batch_size, device=accelerator.device), **labels).sample
        del kept  # only now: the address of memory that is given back would count for two tensors
        return sum(storages.values())

    return (saved(3) - saved(1)) / 2 / math.prod(shape[1:])  # without what is kept once, such as the weights


def free_bytes(device: torch.device) -> int | None:
    """The memory that is free on a device; `None` where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        if device.type != "cpu":
            return None
        lines = Path("/proc/meminfo").read_text().splitlines()  # Linux
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        return free if limit == "max" else min(free, int(limit) - int(used) + int(cached))
    except (OSError, KeyError, ValueError):
        return free


def check_disk(config: TrainingConfig, num_weights: int, to_delete: list[Path]) -> None:
    """
    Args:
        config ([`TrainingConfig`]): the run's settings.
        num_weights (`int`): of the network.
        to_delete (`list` of `Path`): folders that the run deletes before it writes.

    Raises:
        OSError: the run's checkpoints would not fit on the disk.
    """
    # weights, their average and AdamW's two moments; an old checkpoint is deleted after the new one is written
    needed = 4 * num_weights * (4 * (config.checkpoints_total_limit + 1) if config.checkpointing_steps else 1)
    free = shutil.disk_usage(find_parent(Path(config.output_dir))).free
    free += sum(path.stat().st_size for folder in to_delete for path in folder.rglob("*") if path.is_file())
    if free < needed:
        raise OSError(
            f"`output_dir`={config.output_dir!r}: the disk has {free / 1e9:.3g} GB left, and "
            f"{config.checkpoints_total_limit} checkpoints and the pipeline take {needed / 1e9:.3g} GB. Make room, "
            "name a folder on another disk, or set --checkpointing_steps 0."
        )


def find_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
