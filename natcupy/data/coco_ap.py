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

from natcupy.data.coco import CocoPictures
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
        truth.dataset = _complete(pictures.dataset)
        truth.createIndex()
        given = truth.loadRes([dict(each) for each in results]) if results else None
        for kind, prefix in (("bbox", "box_"), ("segm", "mask_"))[: 2 if masks else 1]:
            if given is None:
                scores |= {f"{prefix}{name}": 0.0 for name in _STATS[:3]}
                continue
            examined = COCOeval(truth, given, kind)
            examined.params.catIds = sorted(map(pictures.category_id, range(len(pictures.classes))))
            examined.evaluate()
            examined.accumulate()
            examined.summarize()
            named = zip(_STATS, examined.stats.tolist(), strict=False)
            scores |= {f"{prefix}{name}": value for name, value in named if value >= 0}
    return scores


def _complete(dataset: dict[str, Any]) -> dict[str, Any]:
    """The data set with the keys that pycocotools reads but not every exporter writes."""
    annotations = [
        {
            "iscrowd": 0,
            "area": each["bbox"][2] * each["bbox"][3],
            **each,
            "id": number,  # 0 would count as not found
        }
        for number, each in enumerate(dataset["annotations"], 1)
    ]
    return {**dataset, "annotations": annotations, "info": dataset.get("info", {})}
