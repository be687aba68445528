"""What a detector is trained towards: which boxes belong to which objects, and which of them count.

In: boxes (anchors or proposals) and a picture's true objects. Out: an assignment per box, and a
random sample of positive and negative boxes. Rules of Faster R-CNN (arXiv 1506.01497), section
3.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natcupy.zoo.dense.boxes import iou_matrix
from natcupy.zoo.dense.images import Frame

BACKGROUND, IGNORED = -1, -2


@dataclass(frozen=True)
class Objects:
    """The true objects of one picture, in the pixels of the model's input.

    Attributes:
        boxes: `[n, 4]` floating point (x1, y1, x2, y2).
        labels: `[n]` int64.
        masks: `[n, H, W]` bool or uint8, of the picture without padding.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor

    def to(self, device: torch.device) -> Objects:
        """A copy on a device."""
        return Objects(self.boxes.to(device), self.labels.to(device), self.masks.to(device))


@dataclass(frozen=True)
class Matching:
    """When a box belongs to an object.

    Attributes:
        positive: IoU from which a box belongs to its best object.
        negative: IoU below which it is background; in between it does not count.
        least: where `low_quality`, each object also gets the boxes that overlap it most, if by
            this.
        low_quality: whether objects without a good box get their best ones.
    """

    positive: float
    negative: float
    least: float
    low_quality: bool


@dataclass(frozen=True)
class Sampling:
    """How many boxes count: `number` per picture, at most `fraction` of them positive."""

    number: int
    fraction: float


@dataclass(frozen=True)
class Sample:
    """The boxes of one picture that count, positive ones first.

    Attributes:
        boxes: `[n, 4]`.
        objects: `[p]` index of the object of each of the first p boxes; the other boxes are
            background.
        true_boxes: bool `[n]`, which boxes are the objects' own, added to help the start.
    """

    boxes: Tensor
    objects: Tensor
    true_boxes: Tensor

    @property
    def positives(self) -> Tensor:
        """The boxes of objects, `[p, 4]`."""
        return self.boxes[: self.objects.shape[0]]


def assign(boxes: Tensor, truth: Tensor, rules: Matching) -> Tensor:
    """Per box the index of its object, `BACKGROUND` or `IGNORED`: int64 `[n]`.

    Args:
        boxes: `[n, 4]`.
        truth: the objects' boxes `[k, 4]`.
        rules: the thresholds.
    """
    assignment = torch.full((boxes.shape[0],), IGNORED, dtype=torch.int64, device=boxes.device)
    if truth.shape[0] == 0 or boxes.shape[0] == 0:
        return assignment.fill_(BACKGROUND)
    overlaps = iou_matrix(truth, boxes)
    best, owner = overlaps.max(dim=0)
    assignment[best < rules.negative] = BACKGROUND
    assignment = torch.where(best >= rules.positive, owner, assignment)
    if rules.low_quality:
        most = overlaps.max(dim=1, keepdim=True).values
        wanted = (overlaps == most) & (most >= rules.least)
        # Where several objects want a box, the last of them gets it.
        numbers = torch.arange(truth.shape[0], device=boxes.device)[:, None]
        last = torch.where(wanted, numbers, BACKGROUND).max(dim=0).values
        assignment = torch.where(last >= 0, last, assignment)
    return assignment


def sample(
    assignment: Tensor, rules: Sampling, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of random positive and random negative boxes, together at most `rules.number`."""
    positive = (assignment >= 0).nonzero().flatten()
    negative = (assignment == BACKGROUND).nonzero().flatten()
    positive = _some(positive, int(rules.number * rules.fraction), generator)
    return positive, _some(negative, rules.number - positive.numel(), generator)


def sample_proposals(
    proposals: Tensor,
    objects: Objects,
    matching: Matching,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Sample:
    """The proposals of one picture, and its true boxes, that a head learns from."""
    assignment = assign(proposals, objects.boxes, matching)
    count = objects.boxes.shape[0]
    own = torch.arange(count, device=proposals.device)
    boxes = torch.cat([objects.boxes.to(proposals), proposals])
    assignment = torch.cat([own, assignment])
    positive, negative = sample(assignment, sampling, generator)
    chosen = torch.cat([positive, negative])
    return Sample(boxes[chosen], assignment[positive], chosen < count)


def check_objects(objects: Objects, frame: Frame, num_classes: int) -> None:
    """Raise where a picture's objects cannot be right."""
    boxes, labels, masks = objects.boxes, objects.labels, objects.masks
    count = boxes.shape[0]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"an object's boxes must be floating point [n, 4], got {boxes.dtype} "
            f"{tuple(boxes.shape)}; for a picture without objects use torch.zeros(0, 4)."
        )
    if labels.shape != (count,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64, one for each of the {count} boxes, got {labels.dtype} "
            f"{tuple(labels.shape)}."
        )
    if masks.shape != (count, *frame.size):
        raise ValueError(
            f"masks must be [{count}, {frame.size[0]}, {frame.size[1]}], one per box and as "
            f"large as the resized picture, got {tuple(masks.shape)}; resize them together with "
            f"the picture."
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {int(labels[wrong][0])}; map the data "
            f"set's ids to this range first."
        )
    flat = ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & boxes.isfinite().all(1))
    if flat.any():
        raise ValueError(
            f"boxes must be finite (x1, y1, x2, y2) with x2 > x1 and y2 > y1, got "
            f"{boxes[flat][0].tolist()}; leave such objects out."
        )


def _some(indices: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """At most `most` of the indices, chosen at random."""
    if indices.numel() <= most:
        return indices
    device = indices.device if generator is None else generator.device
    order = torch.randperm(indices.numel(), generator=generator, device=device)
    return indices[order[:most].to(indices.device)]
