"""
The order of batches, which images and arrays share.

It depends only on the seed and the step and is the same for any number of processes, so nothing has to be saved for a
run to resume exactly where it stopped.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState


@dataclass(frozen=True)
class BatchOrder:
    """
    Which images, or arrays, make up a process's batches: each epoch has an order of its own, in which the processes
    take turns.

    Args:
        num_images (`int`): at least `batch_size * num_processes`; what remains of an epoch is left out.
        batch_size (`int`): images a batch.
        seed (`int`): of the orders.
    """

    num_images: int
    batch_size: int
    seed: int

    def order(self, epoch: int) -> torch.Tensor:
        """The epoch's permutation of the images, of shape `(num_images,)`, int64."""
        entropy = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        return torch.randperm(self.num_images, generator=torch.Generator().manual_seed(int(entropy[0])))

    def slices(self, first_batch: int = 0) -> Iterator[tuple[int, slice]]:
        """The epochs, and the parts of their orders, of this process's batches from number `first_batch` on."""
        process = PartialState()
        per_epoch = self.num_images // (self.batch_size * process.num_processes)
        for batch in itertools.count(first_batch):
            epoch, turn = divmod(batch, per_epoch)
            start = (turn * process.num_processes + process.process_index) * self.batch_size
            yield epoch, slice(start, start + self.batch_size)

    def batches(self, first_batch: int = 0, device: torch.device | str = "cpu") -> Iterator[tuple[int, torch.Tensor]]:
        """The epochs and the images of this process's batches: int64 `(batch_size,)` on the device."""
        order_epoch, order = None, None
        for epoch, part in self.slices(first_batch):
            if epoch != order_epoch:  # to the device once an epoch: a copy each step would make the host wait
                order_epoch, order = epoch, self.order(epoch).to(device)
            yield epoch, order[part]


def spread(num_rows: int, num: int) -> torch.Tensor:
    """At most `num` of so many rows, evenly spread: data sets are often sorted by class."""
    return torch.linspace(0, num_rows - 1, min(num, num_rows)).round().long()
