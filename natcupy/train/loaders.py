"""Which pictures each process sees at each step, and the loaders that bring them.

In: a data set, the number of processes, a seed, a place in the run. Out: batches. The order of an
epoch is one permutation by (seed, epoch), cut into batches that all processes share, so that two
processes with half the batch see what one process sees. Every item is drawn from (seed, epoch,
index): see `randomness`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from natcupy.data.workers import leave_with_parent, usual_workers
from natcupy.train import randomness
from natcupy.train.config import TrainConfig, TrainError


@dataclass(frozen=True)
class Plan:
    """How an epoch is cut.

    Attributes:
        batch_size: items per process and forward pass.
        accumulate: forward passes per step.
        processes: that share every batch.
        steps: of the optimizer, per epoch.
    """

    batch_size: int
    accumulate: int
    processes: int
    steps: int

    @classmethod
    def of(cls, count: int, config: TrainConfig, processes: int) -> Plan:
        """The plan for `count` items. Few items make the batch smaller; what is over is left out.

        Raises TrainError where there is not even one item each.
        """
        shares = processes * config.accumulate
        mixes = bool(config.mixup or config.cutmix)
        fewest = 2 if mixes else 1  # pictures are mixed in pairs
        batch = min(config.batch_size, count // shares)
        batch -= batch % fewest
        if not batch:
            raise TrainError(
                f"a step must have {'a pair to mix' if mixes else 'an item'} for each of "
                f"{processes} processes x {config.accumulate} passes, got {count} items. Add some, "
                f"use fewer processes or passes{', or set mixup and cutmix to 0' if mixes else ''}."
            )
        return cls(batch, config.accumulate, processes, count // (batch * shares))

    @property
    def step_size(self) -> int:
        """Items that one step of the optimizer sees."""
        return self.batch_size * self.accumulate * self.processes


class Drawn(Dataset):
    """A data set whose items, by (epoch, index), draw their random numbers from just that."""

    def __init__(self, items: Any, seed: int) -> None:
        self.items, self.seed = items, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with randomness.drawn_from(self.seed, *key):
            return self.items[key[1]]

    def __len__(self) -> int:
        return len(self.items)


def training(
    items: Any,
    plan: Plan,
    config: TrainConfig,
    process: int,
    epoch: int,
    first_step: int,
    collate: Callable[[list[Any]], Any],
    device: torch.device,
) -> DataLoader:
    """The batches of one process for the rest of an epoch, from step `first_step` of it on."""
    with randomness.drawn_from(config.seed, 1, epoch):
        order = torch.randperm(len(items)).tolist()
    whole = plan.batch_size * plan.processes
    first = process * plan.batch_size
    batches = [
        [(epoch, index) for index in order[start + first :][: plan.batch_size]]
        for start in range(first_step * plan.step_size, plan.steps * plan.step_size, whole)
    ]
    return _loader(Drawn(items, config.seed), batches, config, collate, device)


def examination(
    items: Any,
    batch_size: int,
    config: TrainConfig,
    process: int,
    processes: int,
    collate: Callable[[list[Any]], Any],
    device: torch.device,
) -> Iterator[tuple[Any, int]]:
    """(batch, how many of its first items count) of one process's share.

    Every process gets equally many batches of equal sizes, as sharded models need it; what fills
    up the last share is at its end and does not count.
    """
    share = -(-len(items) // processes)
    mine = range(process * share, (process + 1) * share)
    counts = [index < len(items) for index in mine]
    keys = [(0, min(index, len(items) - 1)) for index in mine]
    batches = [keys[start : start + batch_size] for start in range(0, share, batch_size)]
    loader = _loader(Drawn(items, config.seed), batches, config, collate, device)
    for number, batch in enumerate(loader):
        yield batch, sum(counts[number * batch_size :][:batch_size])


def _workers(config: TrainConfig) -> int:
    if config.workers is not None:
        return config.workers
    return usual_workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _loader(
    items: Dataset,
    batches: list[list[tuple[int, int]]],
    config: TrainConfig,
    collate: Callable[[list[Any]], Any],
    device: torch.device,
) -> DataLoader:
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=min(_workers(config), len(batches)),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_with_parent,
    )
