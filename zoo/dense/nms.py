"""Non-maximum suppression: of boxes that overlap too much only the one with the best score stays.

In: boxes, scores, a threshold, perhaps groups that do not compete with each other. Out: the indices
of the boxes kept, best first. torchvision's operator where it works, else plain torch with the same
result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natcupy.zoo.dense.boxes import area, intersection
from natcupy.zoo.dense.torchvision_ops import torchvision_ops

BLOCK = 1024  # boxes compared with each other at once


def nms(boxes: Tensor, scores: Tensor, threshold: float, groups: Tensor | None = None) -> Tensor:
    """Greedy suppression by falling score; equal scores in their given order.

    Args:
        boxes: `[n, 4]`.
        scores: `[n]`.
        threshold: a box goes if its IoU with a better one that stays is above this.
        groups: `[n]` integers (levels, classes); boxes of different groups do not compete.

    Returns:
        Indices `[m]` of the boxes that stay, by falling score.
    """
    order = scores.sort(descending=True, stable=True).indices
    ops = torchvision_ops(boxes.device)
    if ops is None or boxes.shape[0] == 0:
        return order[_keep(boxes[order], threshold, None if groups is None else groups[order])]
    if groups is None:
        return ops.nms(boxes, scores, threshold)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        kept[members[ops.nms(boxes[members], scores[members], threshold)]] = True
    return order[kept[order]]


def _keep(boxes: Tensor, threshold: float, groups: Tensor | None) -> Tensor:
    """Which of the boxes, sorted by falling score, stay: bool `[n]`."""
    keep = torch.ones(boxes.shape[0], dtype=torch.bool, device=boxes.device)
    for start in range(0, boxes.shape[0], BLOCK):
        stop = min(start + BLOCK, boxes.shape[0])
        for earlier in range(0, start, BLOCK):
            rows = slice(earlier, earlier + BLOCK)
            rivals = _rivals(boxes, groups, rows, slice(start, stop), threshold)
            keep[start:stop] &= ~(rivals & keep[rows, None]).any(dim=0)
        own = slice(start, stop)
        rivals = _rivals(boxes, groups, own, own, threshold).triu(diagonal=1)
        keep[own] = _settle(rivals, keep[own])
    return keep


def _settle(rivals: Tensor, alive: Tensor) -> Tensor:
    """The greedy choice: a box stays if it is alive and no earlier rival stays.

    Repeating this rule for all boxes at once fixes at least one more box in order each time, so it
    ends, and it ends where going through them one by one would.
    """
    keep = alive
    while True:
        settled = alive & ~(rivals & keep[:, None]).any(dim=0)
        if torch.equal(settled, keep):
            return keep
        keep = settled


def _rivals(
    boxes: Tensor, groups: Tensor | None, rows: slice, columns: slice, threshold: float
) -> Tensor:
    """Pairs of the same group with an IoU above the threshold: bool `[rows, columns]`."""
    a, b = boxes[rows], boxes[columns]
    shared = intersection(a[:, None], b[None])
    rivals = shared / (area(a)[:, None] + area(b)[None] - shared) > threshold
    if groups is not None:
        rivals &= groups[rows, None] == groups[None, columns]
    return rivals
