"""Average precision as COCO counts it, by pycocotools.

In: a COCO data set and detections as dicts. Out: fractions by name. Crowds, size classes and the
limit of 100 detections per picture are COCO's own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from natcupy.data.coco import CocoPictures, is_mask
from natcupy.zoo.dense import Detections

_STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def as_results(found: Detections, pictures: CocoPictures, index: int) -> list[dict[str, Any]]:
    """The detections of one picture as COCO's result format has them, masks as run lengths."""
    results = []
    for number in range(len(found)):
        x1, y1, x2, y2 = found.boxes[number].tolist()
        entry = {
            "image_id": pictures.image_id(index),
            "category_id": pictures.category_id(int(found.labels[number])),
            "score": float(found.scores[number]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        if found.mask_probabilities is not None:
            entry["segmentation"] = encode_mask(found.mask(number))
        results.append(entry)
    return results


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """A mask bool `[H, W]` as compressed run lengths, in text."""
    from pycocotools import mask as codec

    coded = codec.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in coded["size"]], "counts": coded["counts"].decode()}


def average_precision(
    pictures: CocoPictures, results: Sequence[dict[str, Any]], masks: bool = True
) -> dict[str, float]:
    """`box_ap`, `box_ap50`, `box_ap75`, `box_ap_small` … and the same for `mask_`, in 0..1.

    A number that nothing counts towards (no small objects, say) is left out.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = COCO()
        truth.dataset = _complete(pictures)
        truth.createIndex()
        for kind, prefix in (("bbox", "box_"), ("segm", "mask_"))[: 2 if masks else 1]:
            if not results:
                scores |= {f"{prefix}{name}": 0.0 for name in _STATS[:3]}
                continue
            examined = COCOeval(truth, truth.loadRes(_sized_by(kind, results)), kind)
            examined.params.catIds = sorted(map(pictures.category_id, range(len(pictures.classes))))
            examined.evaluate()
            examined.accumulate()
            examined.summarize()
            named = zip(_STATS, examined.stats.tolist(), strict=False)
            scores |= {f"{prefix}{name}": value for name, value in named if value >= 0}
    return scores


def _sized_by(kind: str, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the results. `loadRes` writes into them, and where there is a box takes its area
    for that of the mask: so masks come without."""
    if kind == "bbox":
        return [dict(each) for each in results]
    return [
        {k: v for k, v in each.items() if k != "bbox" or "segmentation" not in each}
        for each in results
    ]


def _complete(pictures: CocoPictures) -> dict[str, Any]:
    """The data set as pycocotools can read all of it.

    Objects of other classes are left out; so are keys that are null. Keys that not every exporter
    writes are added, and a mask that cannot be used, which only objects that are not learned from
    may have, is empty.
    """
    dataset = pictures.dataset
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    wanted = set(map(pictures.category_id, range(len(pictures.classes))))
    annotations = []
    for each in dataset["annotations"]:
        if each["category_id"] not in wanted:
            continue
        known = {key: value for key, value in each.items() if value is not None}
        entry = {"iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3], **known}
        if not is_mask(each.get("segmentation"), sizes[each["image_id"]]):
            entry["segmentation"] = _empty(sizes[each["image_id"]])
        # an id of 0 would count as not found
        annotations.append({**entry, "id": len(annotations) + 1})
    return {**dataset, "annotations": annotations, "info": dataset.get("info", {})}


def _empty(size: tuple[int, int]) -> dict[str, Any]:
    return {"size": list(size), "counts": [size[0] * size[1]]}
