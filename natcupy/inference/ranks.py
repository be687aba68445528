"""The processes that `torchrun` started, of which this is one.

In: the environment. Out: a `Group` that adds, gathers and broadcasts; alone, it does nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from natcupy.processes import leave_at_exit

Value = TypeVar("Value")
PATIENCE = timedelta(hours=12)  # between processes with unequal amounts of slow pictures


@dataclass(frozen=True)
class Group:
    """This process among `world` processes.

    Attributes:
        rank: 0..world - 1.
        world: how many there are.
        device: where tensors must be for the group's backend.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of an integer tensor, on the CPU in every one."""
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def gather(self, value: Value) -> list[Value]:
        """What every process has, in the order of ranks, in every one."""
        if self.world == 1:
            return [value]
        everything: list[Any] = [None] * self.world
        dist.all_gather_object(everything, value)
        return everything

    def broadcast(self, value: Value) -> Value:
        """What rank 0 has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device(self.device))
        return box[0]


def world_size() -> int:
    """How many processes there are, before any joined the others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_rank() -> int:
    """Which of them this is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def local_rank() -> int | None:
    """Which process of this machine this is; None outside torchrun."""
    text = os.environ.get("LOCAL_RANK")
    return int(text) if text is not None else None


def group(device: torch.device) -> Group:
    """The group of processes; an existing one is used, otherwise torchrun's processes are joined.

    They stay joined until the process ends, since they cannot meet a second time.

    Args:
        device: the model's; CUDA takes NCCL, everything else gloo.
    """
    if world_size() == 1:
        return Group()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=PATIENCE)
        leave_at_exit()
    place = device if "nccl" in dist.get_backend() else "cpu"
    return Group(dist.get_rank(), dist.get_world_size(), place)
