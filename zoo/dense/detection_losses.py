"""The losses of region proposal, box and mask heads.

In: the heads' outputs, the sampled boxes and the true objects. Out: scalars, each connected to the
outputs even where a batch has no object, so that every parameter has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from natcupy.zoo.dense.anchors import inside, pyramid_anchors, within
from natcupy.zoo.dense.boxes import decode, encode, giou
from natcupy.zoo.dense.mask_heads import MASK_SIDE
from natcupy.zoo.dense.roi_align import roi_align
from natcupy.zoo.dense.rpn import STDS, flatten_levels
from natcupy.zoo.dense.targets import (
    IGNORED,
    Matching,
    Objects,
    Sample,
    Sampling,
    assign,
    sample,
)

RPN_MATCHING = Matching(positive=0.7, negative=0.3, least=0.3, low_quality=True)
RPN_SAMPLING = Sampling(number=256, fraction=0.5)
GIOU_WEIGHT = 10.0


def rpn_losses(
    logits: list[Tensor],
    deltas: list[Tensor],
    strides: Sequence[int],
    padded_sizes: Sequence[tuple[int, int]],
    objects: Sequence[Objects],
    beta: float = 0.0,
    generator: torch.Generator | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    border: int = 0,
) -> dict[str, Tensor]:
    """Binary cross entropy and box regression over the sampled anchors of all pictures.

    Args:
        logits: per level `[B, 3, H, W]`.
        deltas: per level `[B, 12, H, W]`.
        strides: per level.
        padded_sizes: per picture, height and width with its own padding; anchors beyond do not
            count.
        objects: per picture.
        beta: where smooth L1 turns quadratic; 0 is L1.
        generator: of the random choice.
        sizes: per picture, height and width without padding; only anchors within them count, unless
            there is none. None: anchors may reach across the edges.
        border: pixels by which an anchor may still reach across.
    """
    shapes = [tuple(x.shape[2:]) for x in logits]
    flat_logits, flat_deltas = (torch.cat(x, 1).float() for x in flatten_levels(logits, deltas))
    anchors = torch.cat(pyramid_anchors(shapes, strides, flat_deltas))
    picked_logits, truths, picked_deltas, targets, total = [], [], [], [], 0
    for index, (size, found) in enumerate(zip(padded_sizes, objects, strict=True)):
        pairs = zip(shapes, strides, strict=True)
        valid = torch.cat([inside(shape, stride, size, anchors.device) for shape, stride in pairs])
        if sizes is not None:
            valid = _narrowed(valid, within(anchors, sizes[index], border))
        assignment = torch.full((anchors.shape[0],), IGNORED, device=anchors.device)
        assignment[valid] = assign(anchors[valid], found.boxes.to(anchors), RPN_MATCHING)
        positive, negative = sample(assignment, RPN_SAMPLING, generator)
        chosen = torch.cat([positive, negative])
        picked_logits.append(flat_logits[index, chosen])
        truths.append((assignment[chosen] >= 0).float())
        picked_deltas.append(flat_deltas[index, positive])
        boxes = found.boxes.to(anchors)[assignment[positive]]
        targets.append(encode(anchors[positive], boxes, STDS))
        total += max(positive.numel(), 1) + max(negative.numel(), 1)
    score, truth = torch.cat(picked_logits), torch.cat(truths)
    objectness = F.binary_cross_entropy_with_logits(score, truth, reduction="sum")
    regression = smooth_l1(torch.cat(picked_deltas), torch.cat(targets), beta)
    return {"loss_rpn_cls": objectness / total, "loss_rpn_bbox": regression / total}


def _narrowed(valid: Tensor, wanted: Tensor) -> Tensor:
    """Both; where that leaves nothing, as in a very small picture, all valid ones: a step needs
    anchors to learn from.
    """
    both = valid & wanted
    return torch.where(both.any(), both, valid)


def class_targets(samples: Sequence[Sample], objects: Sequence[Objects], background: int) -> Tensor:
    """The class of every sampled box, picture by picture: int64 `[n]`."""
    labels = []
    for picked, found in zip(samples, objects, strict=True):
        own = torch.full((picked.boxes.shape[0],), background, device=picked.boxes.device)
        own[: picked.objects.shape[0]] = found.labels[picked.objects]
        labels.append(own)
    return torch.cat(labels)


def box_losses(
    logits: Tensor,
    deltas: Tensor,
    labels: Tensor,
    samples: Sequence[Sample],
    objects: Sequence[Objects],
    stds: Sequence[float],
    decoded: bool = False,
) -> dict[str, Tensor]:
    """Cross entropy over all sampled boxes and regression of the positive ones.

    Args:
        logits: `[n, classes + 1]`.
        deltas: `[n, classes * 4]`.
        labels: `[n]`, of `class_targets`.
        samples, objects: per picture, the n boxes and what they belong to.
        stds: of the deltas.
        decoded: compare boxes by generalised IoU (weight 10) rather than deltas by L1.
    """
    count = max(labels.numel(), 1)
    positive = (labels < logits.shape[1] - 1).nonzero().flatten()
    reference = torch.cat([picked.positives for picked in samples])
    pairs = zip(samples, objects, strict=True)
    truth = torch.cat([found.boxes.to(reference)[picked.objects] for picked, found in pairs])
    own = deltas.float().unflatten(1, (-1, 4))[positive, labels[positive]]
    if decoded:
        boxes = decode(reference, own, stds)[:, 0]
        regression = GIOU_WEIGHT * (1 - giou(boxes, truth)).sum()
    else:
        regression = smooth_l1(own, encode(reference, truth, stds), 0.0)
    classes = F.cross_entropy(logits.float(), labels, reduction="sum")
    return {"loss_cls": classes / count, "loss_bbox": regression / count}


def mask_targets(samples: Sequence[Sample], objects: Sequence[Objects]) -> Tensor:
    """The objects' masks within the positive boxes: float `[p, 28, 28]` of zeros and ones."""
    targets = []
    for picked, found in zip(samples, objects, strict=True):
        height, width = found.masks.shape[1:]
        limit = picked.boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum(picked.positives.clamp(min=0), limit)
        rois = torch.cat([picked.objects[:, None].to(boxes), boxes], dim=1)
        masks = found.masks[:, None].to(boxes.dtype)
        targets.append(roi_align(masks, rois, MASK_SIDE, 1.0)[:, 0] >= 0.5)
    return torch.cat(targets).float()


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of each object's own class's mask.

    Args:
        logits: `[p, classes, 28, 28]`.
        labels: `[p]`.
        targets: `[p, 28, 28]`.
    """
    if labels.numel() == 0:
        return logits.float().sum() * 0
    own = logits.float()[torch.arange(labels.numel(), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, targets)


def smooth_l1(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Sum of |a - b|, within `beta` of zero quadratic."""
    if beta == 0:
        return (a - b).abs().sum()
    return F.smooth_l1_loss(a, b, beta=beta, reduction="sum")
