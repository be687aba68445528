"""The state of a run on disk: safetensors and JSON, replaced as a whole or not at all.

In: what trains. Out: the folder `checkpoint` of a run, and back. `natcupy.hub.files` replaces its
files in one transaction, so a kill at any moment leaves the state before or the state after. A file
of the best weights stays as it is while there are no better ones.

Tensors of sharded models are gathered to the first process, which writes; a run may be continued on
another number of processes as long as a step sees equally many pictures.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from natcupy.hub.errors import Corrupt
from natcupy.hub.files import member, read_bytes, write_folder
from natcupy.hub.tensors import read_tensors, write_tensors
from natcupy.train.config import TrainError

STATE = "state.json"
MODEL, OPTIMIZER, AVERAGE, BEST = (
    f"{name}.safetensors" for name in ("weights", "optimizer", "average", "best")
)
FORMAT = 2
MAX_STATE_BYTES = 256 * 1024 * 1024


@dataclass
class Progress:
    """Where a run is, as JSON values.

    Attributes:
        step: steps done.
        steps_per_epoch, step_size: of the plan; a continuation must have the same.
        epochs: how many were planned; one number more for every extension.
        sums: of the running epoch: name -> (sum, weight).
        history: one row per finished epoch.
        best: the row of the best epoch; None before the first examination.
        schedule, scaler: their state.
        seconds: spent so far.
    """

    step: int = 0
    steps_per_epoch: int = 0
    step_size: int = 0
    epochs: list[int] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    schedule: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


# -- tensors of a model and its optimizer, whole, on the CPU ---------------------------------------


def whole(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies of the tensors, gathered from their shards; empty where `keep` is False.

    Every process must call it, since gathering takes all of them.
    """
    gathered = {}
    for name, tensor in named:
        full = tensor.detach()
        full = full.full_tensor() if hasattr(full, "full_tensor") else full
        if keep:
            gathered[name] = full.to("cpu", copy=True)
    return gathered


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, Tensor]]:
    """The tensors of the optimizer's state, named by parameter and entry."""
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield f"{name}.{key}", value


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """Put whole tensors into a model, sharded or not."""
    state = model.state_dict()
    wrong = sorted(state.keys() ^ tensors.keys())
    wrong += [n for n in state.keys() & tensors.keys() if state[n].shape != tensors[n].shape]
    if wrong:
        raise TrainError(
            f"{where} must hold the tensors of the model that is trained, it differs in "
            f"{', '.join(wrong[:5])}. Continue with the model and data the run began with."
        )
    for name, tensor in state.items():
        tensor.copy_(_laid_out(tensors[name], tensor))


@torch.no_grad()
def load_values(values: list[Tensor], names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into others, by name."""
    for name, value in zip(names, values, strict=True):
        value.copy_(_laid_out(tensors[name], value))


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put whole tensors into the optimizer's state; its groups stay as they were made."""
    if not tensors:
        return  # before the first step
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made = optimizer.state_dict()
    entries: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        entries.setdefault(owner, {})[key] = tensor
    number = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = entries.get(names[id(parameter)], {})
            made["state"][number] = {
                key: _laid_out(value, parameter) if value.ndim else value
                for key, value in found.items()
            }
            number += 1
    optimizer.load_state_dict(made)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device, in the memory format and in the shards of another."""
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    laid = torch.empty_like(like, dtype=tensor.dtype)
    return laid.copy_(tensor)


# -- the folder ------------------------------------------------------------------------------------


def write(
    folder: Path,
    progress: Progress,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    best: Mapping[str, Tensor] | None,
) -> None:
    """Replace the checkpoint. `best` None leaves the file of the best weights as it is.

    Raises TrainError where it cannot be written; the checkpoint before then stays.
    """
    marked = {"step": str(progress.step)}
    writers = {
        MODEL: lambda path: write_tensors(weights, path, marked),
        OPTIMIZER: lambda path: write_tensors(optimizer, path, marked),
    }
    if average is not None:
        writers[AVERAGE] = lambda path: write_tensors(average, path, marked)
    if best is not None:
        writers[BEST] = lambda path: write_tensors(best, path, marked)
    text = json.dumps({"format": FORMAT, **vars(progress)}, allow_nan=False)
    writers[STATE] = lambda path: path.write_bytes(text.encode())
    try:
        write_folder(folder, writers)
    except OSError as error:
        held = "the one before is whole" if (folder / STATE).exists() else "there was none before"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
        raise TrainError(
            f"the checkpoint of step {progress.step} cannot be written to {folder}: {why}; {held}. "
            "Make room there, then continue with --resume."
        ) from error


def read(folder: Path) -> Progress | None:
    """Where the run in a folder is; None where there is no checkpoint."""
    path = member(folder, STATE)
    if not path.is_file():
        return None
    try:
        values = json.loads(read_bytes(path, MAX_STATE_BYTES))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        return Progress(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Corrupt(
            f"{path} is not the state of a run ({error}). Restore it, or train into another folder."
        ) from error


def tensors(folder: Path, name: str, step: int | None = None) -> dict[str, Tensor]:
    """The tensors of one file, which must be of step `step`."""
    path = member(folder, name)
    read_ = read_tensors(path)
    if step is not None and read_.metadata.get("step") != str(step):
        raise Corrupt(
            f"{path} must be of step {step}, it is of {read_.metadata.get('step')}: files of "
            "different checkpoints were mixed. Restore the folder, or train into another one."
        )
    return read_.tensors
