"""What `natcupy finetune` takes from elsewhere: from the run that goes on, or as usual.

In: the arguments as typed, None or False where nothing was. Out: the same with everything in its
place; and what of them a run records, so that `natcupy finetune --resume RUN` needs no more words.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from natcupy.cli.finetune_arguments import FIELDS, RECIPES, SPANS, TASKS
from natcupy.hub import weights
from natcupy.train import TrainError
from natcupy.train.run import RUN, is_begun, recorded

USUAL = {"task": TASKS[0], "recipe": RECIPES[0], "val_fraction": 0.1}
REQUIRED = ("data", "model", "output")
# What a run records besides its numbers.
WORDS = (
    "data", "model", "task", "val", "val_fraction", "images", "val_images", "reduce_zero_label",
    "backbone", "from_scratch", "kernel_size", "push", "private", "license",
)  # fmt: skip


def completed(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with those not typed from the record of the run that goes on, or as usual.

    Raises:
        SystemExit: DATA, the model or the output is named nowhere; the usage is printed.
        TrainError: the folder's files are not those of a run.
    """
    full = argparse.Namespace(**vars(arguments))
    if full.resume:
        _from_record(full)
    missing = [name for name in REQUIRED if getattr(full, name) is None]
    if missing:
        full.refuse(_what_is_missing(full, missing))
    _fill(full, USUAL)
    return full


def command_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The words for the record of a run, with paths that hold from any folder."""
    words = {name: getattr(arguments, name) for name in WORDS}
    for name in ("data", "images", "val_images"):
        words[name] = _absolute(words[name])
    for name in ("model", "backbone"):
        words[name] = _absolute(words[name], _is_released(words[name]))
    # A single word may be the name of a part of the data, whatever lies here.
    part = arguments.task != "detection" and os.path.basename(words["val"] or "") == words["val"]
    words["val"] = _absolute(words["val"], part)
    return words


def _from_record(full: argparse.Namespace) -> None:
    """What was not typed, from the run in the output; DATA alone is that folder."""
    if full.output is None and full.data is not None and (_path(full.data) / RUN).is_file():
        full.output, full.data = full.data, None
    had = None if full.output is None else recorded(_path(full.output))
    if had is None:
        return
    recipe = had["config"].get("recipe")
    if full.recipe in (None, recipe):
        full.recipe = recipe
        _fill(full, {name: had["config"].get(name) for name in (*FIELDS, *SPANS)})
    elif is_begun(_path(full.output)):  # else nothing is lost where it begins with other numbers
        raise TrainError(
            f"--recipe must be {recipe!r}, which {full.output} began with, got {full.recipe!r}. "
            "Leave it out, or choose another output."
        )
    command = had.get("command", {})
    if not isinstance(command, dict) or not all(map(_is_word, command.values())):
        raise TrainError(f"{_path(full.output) / RUN} is not the record of a run. Restore it.")
    _fill(full, {name: command.get(name) for name in WORDS})


def _fill(full: argparse.Namespace, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if getattr(full, name) is None or (getattr(full, name) is False and name in WORDS):
            setattr(full, name, value)


def _what_is_missing(full: argparse.Namespace, missing: list[str]) -> str:
    names = ", ".join("DATA" if name == "data" else f"--{name}" for name in missing)
    if not full.resume:
        return (
            f"DATA, --model and --output must be named, got no {names}. A run that was begun goes "
            "on with: natcupy finetune --resume RUN"
        )
    if full.output is None or recorded(_path(full.output)) is None:
        return (
            f"--resume alone needs the folder of a run, got {full.output or full.data or 'none'}, "
            f"which holds none. Check the path; or name {names}, too, to begin a run."
        )
    return (
        f"{full.output} does not say all that it was begun with: runs that Python began, or an "
        f"earlier natcupy, do not. Name {names}, too."
    )


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _absolute(text: str | None, is_name: bool = False) -> str | None:
    """The place of a file or folder that is there; other text, and names, as they are."""
    if text is None or is_name or not os.path.exists(os.path.expanduser(text)):
        return text
    return os.path.abspath(os.path.expanduser(text))


def _is_released(name: str | None) -> bool:
    """Whether a name means weights of the package or the Hub even beside a folder called so."""
    if name is None or weights.embedded(name):
        return name is not None
    row = weights.find(name.partition("@")[0])
    return row is not None and row.repo is not None


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
