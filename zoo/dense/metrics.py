"""How good results are: mean IoU of segmentations, average precision of detections.

In: predicted and true label maps, or `Detections` and `Objects` in the same pixels. Out: fractions.
Average precision follows COCO: best matches by falling score, precision interpolated at 101
recalls, the mean over classes that occur and over IoU thresholds. Crowds and size classes are not
treated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from natcupy.zoo.dense.boxes import iou_matrix
from natcupy.zoo.dense.detections import Detections
from natcupy.zoo.dense.targets import Objects

COCO_IOUS = tuple(0.5 + 0.05 * step for step in range(10))


def confusion(predicted: Tensor, truth: Tensor, num_classes: int, ignore: int = 255) -> Tensor:
    """Counts of pixels by true (rows) and predicted (columns) class: `[classes, classes]`.

    Maps of any but equal shape; pixels whose true class is `ignore` do not count. The matrices of
    several pictures add up.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"label maps must have the same shape, got {tuple(predicted.shape)} and "
            f"{tuple(truth.shape)}."
        )
    counts = truth != ignore
    pairs = truth[counts].long() * num_classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(matrix: Tensor) -> tuple[float, Tensor]:
    """Mean over the classes that occur of their IoU, and the IoU per class (NaN: none there)."""
    matrix = matrix.double()
    hit = matrix.diag()
    union = matrix.sum(0) + matrix.sum(1) - hit
    per_class = hit / union  # 0 / 0 is NaN: neither there nor claimed
    return per_class.nanmean().item(), per_class


def average_precision(
    found: Sequence[Detections],
    truth: Sequence[Objects],
    ious: Sequence[float] = COCO_IOUS,
    masks: bool = False,
) -> float:
    """Mean average precision over classes and IoU thresholds, in 0..1.

    Args:
        found: per picture.
        truth: per picture, in the same pixels.
        ious: thresholds; `(0.5,)` gives AP50.
        masks: compare masks rather than boxes.
    """
    if len(found) != len(truth):
        raise ValueError(f"there must be one truth per picture, got {len(found)}, {len(truth)}.")
    found = [_on_cpu(detections) for detections in found]
    truth = [objects.to(torch.device("cpu")) for objects in truth]
    classes = torch.cat([objects.labels for objects in truth]).unique().tolist()
    if not classes:
        raise ValueError("there must be at least one true object, got none in any picture.")
    tables = [_overlaps(d, objects, masks) for d, objects in zip(found, truth, strict=True)]
    values = []
    for label in classes:
        total = sum(int((objects.labels == label).sum()) for objects in truth)
        for iou in ious:
            values.append(_class_precision(found, truth, tables, label, iou, total))
    return sum(values) / len(values)


def _on_cpu(found: Detections) -> Detections:
    """The matching is many small steps: there, and all of it on one device."""
    masks = found.mask_probabilities
    return replace(
        found,
        boxes=found.boxes.cpu(),
        scores=found.scores.cpu(),
        labels=found.labels.cpu(),
        mask_probabilities=None if masks is None else masks.cpu(),
    )


def _overlaps(found: Detections, truth: Objects, masks: bool) -> Tensor:
    """IoU of every detection with every object: `[n, k]`."""
    if not masks:
        return iou_matrix(found.boxes.double(), truth.boxes.double(), eps=1e-12)
    drawn = [found.mask(index).flatten() for index in range(len(found))]
    true = truth.masks.bool().flatten(1).double()
    if not drawn or not len(true):
        return true.new_zeros((len(drawn), len(true)))
    ours = torch.stack(drawn).double()
    shared = ours @ true.T
    return shared / (ours.sum(1)[:, None] + true.sum(1)[None] - shared)


def _class_precision(
    found: Sequence[Detections],
    truth: Sequence[Objects],
    tables: Sequence[Tensor],
    label: int,
    iou: float,
    total: int,
) -> float:
    scores, hits = [], []
    for detections, objects, table in zip(found, truth, tables, strict=True):
        own = (detections.labels == label).nonzero().flatten()
        own = own[detections.scores[own].sort(descending=True, stable=True).indices]
        scores.append(detections.scores[own])
        hits.append(_matches(table[own][:, objects.labels == label], iou))
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    hit = torch.cat(hits)[order].double()
    if not hit.numel():
        return 0.0
    recall = hit.cumsum(0) / total
    precision = hit.cumsum(0) / torch.arange(1, hit.numel() + 1, device="cpu")
    # The best precision at this recall or beyond, read at 0, 0.01, ..., 1.
    envelope = precision.flip(0).cummax(0).values.flip(0)
    points = torch.linspace(0, 1, 101, dtype=torch.float64, device="cpu")
    index = torch.searchsorted(recall, points)
    return (
        torch.where(index < hit.numel(), envelope[index.clamp(max=hit.numel() - 1)], 0.0)
        .mean()
        .item()
    )


def _matches(table: Tensor, iou: float) -> Tensor:
    """Which detections of a picture, by falling score, take an object not yet taken: bool `[n]`."""
    table = table.clone()
    hits = torch.zeros(table.shape[0], dtype=torch.bool, device="cpu")
    for row in range(table.shape[0] if table.shape[1] else 0):
        best, column = table[row].max(dim=0)
        if best >= iou:
            hits[row] = True
            table[:, column] = -1
    return hits
