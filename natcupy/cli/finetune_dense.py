"""`natcupy finetune --task segmentation|detection`: data and a model become a model's folder.

In: for segmentation a folder of pictures and masks, for detection a COCO file and its pictures; a
model, numbers. Out: the folder of the run; on stdout a line per epoch and what came out.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from natcupy.cli import console
from natcupy.cli.finetune_arguments import given
from natcupy.cli.finetune_resume import command_of
from natcupy.data.coco import CocoPictures
from natcupy.data.label_maps import LabelledMaps, find_maps
from natcupy.data.source import DataError, refuse_shared
from natcupy.train import TrainConfig
from natcupy.train.dense_finetuning import DenseResult, finetune_dense, load_dense
from natcupy.train.finetuning import CURVES_PNG, is_first

# Where the command line sets nothing: smaller steps and a smaller rate than a classifier's, the
# same for all layers.
USUAL = {"batch_size": 8, "lr": 1e-4, "layer_decay": 1.0}
Data = LabelledMaps | CocoPictures


def run(arguments: argparse.Namespace) -> int:
    """Find the data, load the model, train, report."""
    config = TrainConfig.of(arguments.recipe, **{**USUAL, **given(arguments)})
    train, val = data_of(arguments, config.seed)
    if is_first() and not arguments.json:
        for note in train.notes:
            print(note, flush=True)
    wishes = {} if arguments.kernel_size is None else {"kernel_size": arguments.kernel_size}
    model = load_dense(
        arguments.model,
        config,
        pretrained=not arguments.from_scratch,
        backbone=arguments.backbone,
        **wishes,
    )
    if model.config.task != arguments.task:
        raise ValueError(
            f"--task must be {model.config.task} for {arguments.model}, got {arguments.task}."
        )
    name = Path(arguments.data).resolve()
    result = finetune_dense(
        model,
        train,
        val,
        config,
        data_name=name.stem,
        push=arguments.push,
        private=arguments.private,
        license=arguments.license,
        command=command_of(arguments),
    )
    if result.main:
        _report(result, arguments.json)
    return 0


def data_of(arguments: argparse.Namespace, seed: int) -> tuple[Data, Data | None]:
    """The pictures to train on and those held out, with the same classes."""
    _check_fraction(arguments.val_fraction)
    if arguments.task == "segmentation":
        parts = find_maps(arguments.data, reduce_zero_label=arguments.reduce_zero_label)
        train: Data | None = parts.get("train") or parts.get("")
        if train is None:
            raise DataError(
                f"{arguments.data} must have a part called train, got {', '.join(parts)}. "
                "Name the folder inside a part to train on it."
            )
        val: Data | None = parts.get("val")
        if arguments.val is not None:
            val = _maps_named(arguments, parts, train)
    else:
        train = CocoPictures(arguments.data, arguments.images)
        val = None
        if arguments.val is not None:
            folder = arguments.val_images or arguments.images
            val = CocoPictures(arguments.val, folder, classes=train.classes)
    if val is None:
        return held_out(train, arguments.val_fraction, seed)
    refuse_shared(train, val)
    return train, val


def _maps_named(
    arguments: argparse.Namespace, parts: Mapping[str, LabelledMaps], train: LabelledMaps
) -> LabelledMaps:
    """What `--val` names: a part of the data, or other data."""
    options = {"classes": train.classes, "reduce_zero_label": arguments.reduce_zero_label}
    name = arguments.val.lower()
    outside = train.images.parent != train.masks.parent  # images/train, not train/images
    place = train.images.parent if outside else Path(arguments.data).expanduser()
    folder = _folder_named(place, name)
    itself = folder in (train.images, train.images.parent)
    if itself or (folder is None and parts.get(name) is train):
        raise DataError(
            f"--val must be another part than the one to train on, got {arguments.val}. Name "
            "another, or other data."
        )
    if folder is not None and outside:
        return LabelledMaps(folder, train.masks.with_name(folder.name), **options)
    if folder is None and name in parts:  # such as val, which is called validation here
        return parts[name]
    others = find_maps(folder or arguments.val, **options)
    return others.get("val") or next(iter(others.values()))


def _folder_named(folder: Path, name: str) -> Path | None:
    """The folder in another one of that name, in capitals or not."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((each for each in inside if each.name.lower() == name and each.is_dir()), None)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 0.9:  # so for NaN, too
        raise ValueError(
            f"--val-fraction must lie in 0..0.9, got {fraction}. Name a share of the pictures, or "
            "0 to hold none out."
        )


def held_out(data: Data, fraction: float, seed: int) -> tuple[Data, Data | None]:
    """A fraction of the pictures set apart, by their names and the seed alone; a note says so."""
    count = min(max(round(len(data) * fraction), 1), len(data) - 1) if fraction else 0
    if count < 1:
        return data, None
    ranked = sorted(range(len(data)), key=lambda index: _rank(data.key(index), seed))
    train, val = data.subset(sorted(ranked[count:])), data.subset(sorted(ranked[:count]))
    told = f"{count:,} of {len(data):,} pictures are held out: {100 * fraction:g} %, by seed {seed}"
    train.notes = (*data.notes, told)
    return train, val


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()


def _report(result: DenseResult, as_json: bool) -> None:
    if as_json:
        names = ("scores", "epoch", "seconds", "peak_bytes")
        told: dict[str, Any] = {name: getattr(result, name) for name in names}
        pushed = vars(result.pushed) if result.pushed else None
        console.print_json({**told, "folder": str(result.folder), "pushed": pushed})
        return
    rows = [
        (name.removeprefix("val_").replace("_", " "), f"{100 * value:.2f} % held out")
        for name, value in result.scores.items()
    ]
    rows += [
        ("epoch kept", f"{result.epoch} of {len(result.history)}"),
        ("time", f"{result.seconds:.0f} s"),
        ("peak memory", f"{result.peak_bytes / 2**20:,.0f} MiB"),
        ("model", f"{result.folder / 'model'}"),
        ("logs", f"log.csv, log.json, {CURVES_PNG} in {result.folder}"),
    ]
    if result.pushed:
        rows.append(("pushed", result.pushed.url))
    print(console.facts(rows))
