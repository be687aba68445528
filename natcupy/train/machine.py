"""What accelerate makes of this machine: device, processes, precision, sharding.

In: a `TrainConfig`. Out: an `Accelerator`, or an error that says what the machine cannot do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from natcupy.processes import leave_at_exit
from natcupy.train.config import TrainConfig, TrainError


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Let a process train again with another precision: accelerate keeps the first one for good."""
    try:
        from accelerate.state import AcceleratorState
    except ImportError:  # `make_accelerator` says what to do
        yield
        return
    ours = not AcceleratorState._shared_state
    try:
        yield
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=False)


def make_accelerator(config: TrainConfig) -> Any:
    """accelerate's view of where this runs. Raises ConfigError for what the machine cannot do."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin, GradientAccumulationPlugin
    except ImportError as error:
        raise ImportError(
            f"training needs accelerate, which is not to be had here ({error}). Install it with: "
            "pip install 'natcupy[train]'."
        ) from None
    plugin = None
    if not torch.cuda.is_available():
        if config.mixed_precision == "fp16":
            raise TrainError(
                "mixed_precision 'fp16' needs a GPU, torch finds none. Use 'bf16' or 'no'."
            )
        if config.fsdp:
            raise TrainError("fsdp needs GPUs, torch finds none. Leave it out.")
    elif config.fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
        )
    joined = _backend()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        fsdp_plugin=plugin,
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.accumulate, adjust_scheduler=False, sync_with_dataloader=False
        ),
        step_scheduler_with_optimizer=False,
    )
    if not joined and "gloo" in _backend():
        leave_at_exit()  # NCCL has no such threads, and beside a process that failed might wait
    version = getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", 2)
    if version != 2:
        raise TrainError("of accelerate's FSDP natcupy takes version 2: --fsdp_version 2.")
    return accelerator


def _backend() -> str:
    """The backend of torch's group of processes; "" while there is none."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_backend() if ready else ""
