"""Region proposal network: where in the picture there may be something.

In: the maps of a pyramid. Out: a score and four deltas per anchor, and from these the best boxes of
each picture. Paper: Faster R-CNN (arXiv 1506.01497).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.zoo.dense.anchors import RATIOS, pyramid_anchors
from natcupy.zoo.dense.boxes import decode
from natcupy.zoo.dense.images import Frame
from natcupy.zoo.dense.layers import init_normal
from natcupy.zoo.dense.nms import nms

STDS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class ProposalRules:
    """How proposals are picked.

    Attributes:
        per_level: best anchors of each level that are looked at.
        iou: proposals of one level that overlap a better one by more than this go.
        most: proposals kept per picture.
    """

    per_level: int = 1000
    iou: float = 0.7
    most: int = 1000


class RPNHead(nn.Module):
    """A 3x3 convolution with ReLU; per pixel and anchor (3) a logit and four deltas."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, len(RATIOS), 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * len(RATIOS), 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            init_normal(conv, 0.01)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level, logits `[B, 3, H, W]` and deltas `[B, 12, H, W]`."""
        hidden = [F.relu(self.rpn_conv(x), inplace=True) for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]


def flatten_levels(logits: list[Tensor], deltas: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The head's maps in the anchors' order: per level `[B, H*W*3]` and `[B, H*W*3, 4]`."""
    scores = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    return scores, [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for x in deltas]


@torch.no_grad()
def propose(
    logits: list[Tensor],
    deltas: list[Tensor],
    strides: Sequence[int],
    frames: Sequence[Frame],
    rules: ProposalRules,
) -> list[Tensor]:
    """Per picture, its best boxes `[n, 4]` by falling score, clipped to the unpadded picture."""
    shapes = [tuple(x.shape[2:]) for x in logits]
    scores, deltas = flatten_levels(logits, deltas)
    scores = [s.sigmoid() for s in scores]
    anchors = pyramid_anchors(shapes, strides, deltas[0])
    return [
        _propose_one([s[i] for s in scores], [d[i] for d in deltas], anchors, frame, rules)
        for i, frame in enumerate(frames)
    ]


def _propose_one(
    scores: list[Tensor],
    deltas: list[Tensor],
    anchors: list[Tensor],
    frame: Frame,
    rules: ProposalRules,
) -> Tensor:
    tops = [s.sort(descending=True, stable=True) for s in scores]
    picked = [top.indices[: rules.per_level] for top in tops]
    score = torch.cat([top.values[: rules.per_level] for top in tops])
    level = torch.cat([torch.full_like(index, n) for n, index in enumerate(picked)])
    reference = torch.cat([a[index] for a, index in zip(anchors, picked, strict=True)])
    delta = torch.cat([d[index] for d, index in zip(deltas, picked, strict=True)])
    boxes = decode(reference, delta, STDS, frame.size)[:, 0]
    # Clipping leaves nothing of some boxes.
    real = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero().flatten()
    boxes, score, level = boxes[real], score[real], level[real]
    return boxes[nms(boxes, score, rules.iou, level)[: rules.most]]
