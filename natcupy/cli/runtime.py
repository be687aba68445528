"""What commands that run a model share: the device, the model, the backend, the answers.

In: names and paths from the command line. Out: a model on its device, and the `Answer`s it gives.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from natcupy import backends
from natcupy.arguments import neighborhood
from natcupy.data import why
from natcupy.hub import from_pretrained
from natcupy.hub.locate import known_row
from natcupy.inference import ranks
from natcupy.zoo import ImageModel
from natcupy.zoo.dense import DenseModel

USUAL = "classification"
# Which command answers with a model of a task.
COMMANDS = {USUAL: "classify", "segmentation": "segment", "detection": "detect"}


@dataclass(frozen=True)
class Answer:
    """One of the labels a model gives a picture."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Outcome:
    """What became of one file: answers, best first, or the reason why there are none."""

    file: str
    answers: tuple[Answer, ...] = ()
    seconds: float = 0.0
    error: str = ""


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one. Raises ValueError for a bad name."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.local_rank() is not None:  # under torchrun, a GPU each
        name = f"cuda:{ranks.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"--device must name a device such as cpu or cuda:0, got {name!r}."
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must name a device that is there, got {name!r} with "
            f"{torch.cuda.device_count()} CUDA devices; `natcupy doctor` tells why."
        )
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of another kind for every kind of device
        reason = " ".join(str(error).split()).partition(". ")[0][:160]
        raise ValueError(
            f"--device must name a device that is there, got {name!r}: {reason}."
        ) from None
    return device


def load(name: str, device: torch.device, dtype: str | None = None) -> ImageModel | DenseModel:
    """A model with its weights, ready to answer; float32 unless another dtype is named."""
    return from_pretrained(name, device=device, dtype=getattr(torch, dtype) if dtype else None)


def load_for(
    task: str, name: str, device: torch.device, dtype: str | None = None
) -> ImageModel | DenseModel:
    """A model of a task of `COMMANDS`; "classification" takes backbones, too.

    Raises ValueError for a model of another task, before anything is fetched if its name tells.
    """
    row = known_row(name)
    if row is not None and row.task != task:
        takes = f"`natcupy {COMMANDS[row.task]}` takes it"
        raise ValueError(_wrong_kind(task, name, _kind(row.task), takes))
    model = load(name, device, dtype)
    found = model.config.task if isinstance(model, DenseModel) else USUAL
    if found != task:
        gives_maps = found == USUAL and _is_backbone(model)
        kind, command = ("backbone", "attend") if gives_maps else (_kind(found), COMMANDS[found])
        raise ValueError(_wrong_kind(task, name, kind, f"`natcupy {command}` takes it"))
    return model


def load_classifier(name: str, device: torch.device, dtype: str | None = None) -> ImageModel:
    """A model that has a classifier. Raises ValueError for one without."""
    model = load_for(USUAL, name, device, dtype)
    if _is_backbone(model):
        pools = model.config.out_indices is None
        also = " and `natcupy predict --features` take it" if pools else " takes it"
        raise ValueError(_wrong_kind(USUAL, name, "backbone", f"`natcupy attend`{also}"))
    return model


def _wrong_kind(task: str, name: str, kind: str, remedy: str) -> str:
    return (
        f"--model must be a {_kind(task)}, got {name!r}, a {kind}; {remedy}, `natcupy models` "
        "lists the others."
    )


def _kind(task: str) -> str:
    return "classifier" if task == USUAL else f"{task} model"


def _is_backbone(model: ImageModel) -> bool:
    return model.num_classes < 1 or model.config.out_indices is not None


def print_once(show: Callable[[], None], device: torch.device) -> None:
    """Let the first process print while the others wait.

    Once a process exits with 1, torchrun ends the others, whatever they are about to say.
    """
    if ranks.world_rank() == 0:
        show()
        sys.stdout.flush()
    ranks.group(device).gather(None)


def why_not(backend: str, device: torch.device) -> str | None:
    """None if a backend runs neighborhood attention on a device, else the reason."""
    try:
        backends.choose(backend, *_usual_call(device))
    except RuntimeError as error:
        return " ".join(str(error).partition("cannot run this call: ")[2].split()) or str(error)
    return None


def chosen_backend(device: torch.device) -> str:
    """The name of the backend that a call on this device gets when it asks for none."""
    call = _usual_call(device)
    chosen = backends.choose(None, *call)
    able = (name for name in backends.BACKENDS if why_not(name, device) is None)
    return next(name for name in able if backends.choose(name, *call) is chosen)


def _usual_call(device: torch.device) -> tuple:
    """Arguments of a small call of the usual kind."""
    query = torch.zeros(1, 8, 8, 1, 16, device=device)
    return query, query, query, neighborhood(2, 3, 1, 1, False), None, None, None


def describe(model: ImageModel, name: str, device: torch.device) -> str:
    """One line on what runs where."""
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = {"embedded": "bundled", "hub": "from the Hub"}.get(model.source.kind, "from disk")
    return f"{name} ({kind}, {count:,} parameters) on {device}, backend {chosen_backend(device)!r}"


def classify(
    model: ImageModel, files: Sequence[Path], topk: int, batch_size: int
) -> Iterator[Outcome]:
    """The outcome for every file, in order. A file that is no picture does not stop the others."""
    for start in range(0, len(files), batch_size):
        yield from _classify_batch(model, files[start : start + batch_size], topk)


def label_of(model: ImageModel, index: int) -> str:
    """The name of a class, where the weights came with names."""
    names = model.pretrained_cfg.get("label_names")
    return names[index] if names else f"class {index}"


def _classify_batch(model: ImageModel, files: Sequence[Path], topk: int) -> list[Outcome]:
    begun = time.perf_counter()
    read = [read_picture(model, file) for file in files]
    pictures = [picture for picture in read if isinstance(picture, Tensor)]
    answers = iter(_answers(model, torch.cat(pictures), topk) if pictures else ())
    each = (time.perf_counter() - begun) / len(files)
    return [
        Outcome(str(file), next(answers), each)
        if isinstance(picture, Tensor)
        else Outcome(str(file), error=picture)
        for file, picture in zip(files, read, strict=True)
    ]


def read_picture(model: ImageModel, file: Path) -> Tensor | str:
    """The prepared picture, or what is wrong with the file."""
    try:
        return model.preprocess(os.fspath(file))
    except Exception as error:  # decoders raise nearly anything for broken data
        return why(error)


@torch.inference_mode()
def _answers(model: ImageModel, pictures: Tensor, topk: int) -> list[tuple[Answer, ...]]:
    chances = model(pictures).float().softmax(-1)
    best = chances.topk(min(topk, model.num_classes))
    return [
        tuple(
            Answer(label_of(model, index), index, chance)
            for index, chance in zip(indices, values, strict=True)
        )
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
