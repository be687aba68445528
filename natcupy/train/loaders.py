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

from natcupy.data.workers import leave_with_parent, usable_cores, usual_workers
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
    def of(
        cls, count: int, config: TrainConfig, processes: int, fewest: int = 1, why: str = ""
    ) -> Plan:
        """The plan for `count` items. Few items make the batch smaller; what is over is left out.

        Raises TrainError where a batch would have fewer than `fewest` items, which is `why`, or
        not even one.
        """
        shares = processes * config.accumulate
        mixes = bool(config.mixup or config.cutmix)
        batch = min(config.batch_size, count // shares)
        batch -= batch % (2 if mixes else 1)  # pictures are mixed in pairs
        if 0 < batch < fewest:
            raise TrainError(
                f"a batch must have at least {fewest} pictures, got {batch} (batch_size "
                f"{config.batch_size}; {count} pictures for {processes} processes x "
                f"{config.accumulate} passes): {why}. "
                + (
                    f"Set batch_size to {fewest} or more."
                    if config.batch_size < fewest
                    else "Add pictures, or use fewer processes or passes."
                )
            )
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

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """Items of a batch, on one thread, as torch has it in workers.

        An item is small: threads would spend more on waiting for each other than they save, and
        far more where other processes use the cores.
        """
        threads = torch.get_num_threads()
        if threads == 1:
            return [self[key] for key in keys]
        torch.set_num_threads(1)
        try:
            return [self[key] for key in keys]
        finally:
            torch.set_num_threads(threads)

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


def _workers(config: TrainConfig, device: torch.device) -> int:
    """Processes that read. On a CPU they get what torch's threads leave free.

    Those threads wait for each other after every operation: one reader on a core of theirs stops
    them all, again and again.
    """
    if config.workers is not None:
        return config.workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    usual = usual_workers(processes)
    if device.type != "cpu":
        return usual
    return max(min(usable_cores() // processes - torch.get_num_threads(), usual), 0)


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
        num_workers=min(_workers(config, device), len(batches)),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_with_parent,
    )
