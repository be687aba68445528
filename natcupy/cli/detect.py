"""`natcupy detect`: objects with boxes, masks, classes and scores, drawn, as a table or as JSON.

In: picture files or folders and a detection model. Out: per picture its objects; pictures with
boxes, masks and labels (`-o`). Exit status 1 if any file or folder failed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from natcupy.cli import console, pictures, runtime
from natcupy.cli.painting import paint_detections
from natcupy.cli.pictures import Record
from natcupy.zoo.dense import Detections
from natcupy.zoo.dense.detector import DetectionRules


def run(arguments: argparse.Namespace) -> int:
    """Detect objects in the files and folders named."""
    files, status = pictures.named(arguments.images)
    drawn = pictures.targets(files, arguments.output)
    device = runtime.pick_device(arguments.device)
    model = runtime.load_for("detection", arguments.model, device)
    least = arguments.score_threshold
    usual = DetectionRules()
    rules = replace(usual, score=min(usual.score, least))

    def work(number: int, pixels: np.ndarray) -> Record:
        found = model.predict(pictures.as_given(pixels), rules, masks=arguments.masks).above(least)
        record: Record = {"objects": [_object(found, index) for index in range(len(found))]}
        if drawn[number] is not None:
            pictures.save(paint_detections(pictures.colour(pixels), found), drawn[number])
            record["picture"] = str(drawn[number])
        return record

    records = list(pictures.each(files, model.config.in_chans, work))
    if arguments.json:
        head = {"model": arguments.model, "device": str(device), "names": list(model.label_names)}
        console.print_json({**head, "score_threshold": least, "results": records})
    else:
        _print_table(records, runtime.describe(model, arguments.model, device))
    return max(status, pictures.report(records))


def _object(found: Detections, index: int) -> Record:
    label = int(found.labels[index])
    record: Record = {
        "name": found.names[label],
        "label": label,
        "score": float(found.scores[index]),
        "box": [round(side, 2) for side in found.boxes[index].tolist()],
    }
    if found.mask_probabilities is not None:
        mask = found.mask(index)
        record["area"] = int(mask.sum())
        record["mask"] = run_lengths(mask)
    return record


def run_lengths(mask: Tensor) -> Record:
    """A mask bool `[H, W]` in COCO's uncompressed form: runs of 0 and 1, column by column."""
    flat = mask.T.flatten().cpu()
    edges = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    ends = torch.cat([edges, edges.new_tensor([flat.numel()])])
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _print_table(records: list[Record], running: str) -> None:
    rows = []
    for record in records:
        for number, each in enumerate(record.get("objects", ())):
            box = ", ".join(f"{side:.0f}" for side in each["box"])
            file = "" if number else record["file"]
            rows.append((file, each["name"], f"{100 * each['score']:.1f} %", box))
        if record.get("objects") == []:
            rows.append((record["file"], "nothing above the threshold", "-", ""))
    if rows:
        print(console.table(("file", "object", "score", "x1, y1, x2, y2"), rows))
        print()
        print(running)
    for record in records:
        if "picture" in record:
            print(f"{record['file']}: drawn in {record['picture']}")
