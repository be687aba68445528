"""`natcupy evaluate`: labelled pictures in, accuracy and loss out, as a table or JSON.

Exit status 1 if any picture could not be read; the others are counted all the same. Under torchrun,
the first process prints.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from natcupy import inference
from natcupy.cli import console, runtime
from natcupy.inference import Result
from natcupy.zoo import ImageModel


def run(arguments: argparse.Namespace) -> int:
    """Look at every picture once, and say how many were named right."""
    device = runtime.pick_device(arguments.device)
    model = runtime.load_classifier(arguments.model, device, arguments.dtype)
    result = inference.evaluate(
        model,
        arguments.data,
        split=arguments.split,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        class_map=arguments.class_map,
        progress=not arguments.quiet,
    )
    runtime.print_once(lambda: _show(result, arguments, model, device), device)
    return 1 if result.bad else 0


def _show(
    result: Result, arguments: argparse.Namespace, model: ImageModel, device: torch.device
) -> None:
    if arguments.json:
        console.print_json(_as_json(result, arguments, str(device)))
    else:
        running = runtime.describe(model, arguments.model, device)
        print(_text(result, running, arguments.per_class))
    console.list_bad(result.bad)


def _text(result: Result, running: str, per_class: bool) -> str:
    right = sum(entry.right for entry in result.classes)
    right5 = sum(entry.right5 for entry in result.classes)
    pictures = console.counted(result.pictures, "picture")
    classes = console.counted(len(result.classes), "class", "es")
    pairs = [
        ("data", f"{result.data}: {pictures}, {classes}"),
        ("model", running),
        ("top-1", f"{100 * result.top1:.2f} % ({right:,} of {result.pictures:,})"),
    ]
    if result.top5 is not None:
        pairs.append(("top-5", f"{100 * result.top5:.2f} % ({right5:,} of {result.pictures:,})"))
    pairs += [
        ("loss", f"{result.loss:.4f}"),
        ("speed", f"{result.pictures_per_second:,.1f} pictures/s: {_how(result)}"),
        *(("note", note) for note in result.notes),
    ]
    if result.bad:
        bad = console.counted(len(result.bad), "picture")
        pairs.append(("left out", f"{bad} that could not be read"))
    text = console.facts(pairs)
    return f"{text}\n\n{_per_class(result)}" if per_class else text


def _how(result: Result) -> str:
    processes = f"{result.processes} processes, " if result.processes > 1 else ""
    return (
        f"{result.seconds:.1f} s, {processes}batches of {result.batch_size}, "
        f"{result.workers} workers"
    )


def _per_class(result: Result) -> str:
    rows = [
        (
            entry.name,
            entry.pictures,
            entry.right,
            *(_share(count, entry.pictures) for count in (entry.right, entry.right5)),
        )
        for entry in result.classes
    ]
    headings = ("class", "pictures", "right", "top-1", "top-5")
    if result.top5 is None:
        headings, rows = headings[:4], [row[:4] for row in rows]
    return console.table(headings, rows)


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "-"


def _as_json(result: Result, arguments: argparse.Namespace, device: str) -> dict[str, object]:
    found = asdict(result)
    if not arguments.per_class:
        del found["classes"]
    return {"model": arguments.model, "device": device, "dtype": arguments.dtype, **found}
