"""`natcupy segment`: the class of every pixel, as a coloured overlay, a table or JSON.

In: picture files or folders and a segmentation model. Out: per picture the classes and their
shares; overlays (`-o`) and maps of class numbers (`--labels`). Exit status 1 if any file or folder
failed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from natcupy.cli import console, pictures, runtime
from natcupy.cli.painting import paint_segmentation
from natcupy.cli.pictures import Record
from natcupy.zoo.dense import MULTI_SCALE, Segmentation


def run(arguments: argparse.Namespace) -> int:
    """Segment the files and folders named."""
    files, status = pictures.named(arguments.images)
    overlays = pictures.targets(files, arguments.output)
    maps = pictures.targets(files, arguments.labels, "--labels", pictures.LOSSLESS)
    _refuse_one_place(overlays, maps)
    device = runtime.pick_device(arguments.device)
    model = runtime.load_for("segmentation", arguments.model, device)
    scales = MULTI_SCALE if arguments.multi_scale else (1.0,)

    def work(number: int, pixels: np.ndarray) -> Record:
        found = model.predict(pictures.as_given(pixels), scales, flip=arguments.multi_scale)
        record = _record(found)
        if overlays[number] is not None:
            image = paint_segmentation(pictures.colour(pixels), found)
            pictures.save(image, overlays[number])
            record["overlay"] = str(overlays[number])
        if maps[number] is not None:
            pictures.save(_numbers(found), maps[number])
            record["labels"] = str(maps[number])
        return record

    records = list(pictures.each(files, model.config.in_chans, work))
    if arguments.json:
        head = {"model": arguments.model, "device": str(device), "names": list(model.label_names)}
        console.print_json({**head, "results": records})
    else:
        _print_table(records, runtime.describe(model, arguments.model, device))
    return max(status, pictures.report(records))


def _refuse_one_place(overlays: list[Path | None], maps: list[Path | None]) -> None:
    """The map of a picture would replace its overlay."""
    drawn = {path.resolve() for path in overlays if path is not None}
    both = next((path for path in maps if path is not None and path.resolve() in drawn), None)
    if both is not None:
        raise ValueError(
            f"--output and --labels must name different files or folders, both would write {both}."
        )


def _record(found: Segmentation) -> Record:
    confidence = found.confidence.float()
    classes = []
    for name, share in found.areas():
        index = found.names.index(name)
        sure = confidence[found.labels == index].mean().item()
        classes.append({"name": name, "index": index, "share": share, "confidence": sure})
    return {"classes": classes}


def _numbers(found: Segmentation) -> Image.Image:
    """The class numbers as a grey picture: 8 bits, or 16 where there are more than 256 classes."""
    kind = np.uint8 if len(found.names) <= 256 else np.uint16
    return Image.fromarray(found.labels.cpu().numpy().astype(kind))


def _print_table(records: list[Record], running: str) -> None:
    rows = [
        (
            record["file"] if first else "",
            each["name"],
            f"{100 * each['share']:.1f} %",
            f"{100 * each['confidence']:.1f} %",
        )
        for record in records
        if "error" not in record
        for first, each in zip([True] + [False] * 999_999, record["classes"], strict=False)
    ]
    if rows:
        print(console.table(("file", "class", "share", "confidence"), rows))
        print()
        print(running)
    for record in records:
        for key in ("overlay", "labels"):
            if key in record:
                print(f"{record['file']}: {key} in {Path(record[key])}")
