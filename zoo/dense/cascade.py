"""Cascade Mask R-CNN: three heads in a row, each refining the boxes of the one before.

In and out: as `Detector`. Paper: Cascade R-CNN (arXiv 1712.00726 and 1906.09756); the layers' names
and the details are those of the released NAT and DiNAT checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from natcupy.zoo.dense.bbox_heads import SIDE, BBoxHead
from natcupy.zoo.dense.boxes import decode
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.detection_losses import box_losses, class_targets, mask_loss, mask_targets
from natcupy.zoo.dense.detector import Detector, RoIHead, own_masks
from natcupy.zoo.dense.images import Frame
from natcupy.zoo.dense.mask_heads import MaskHead
from natcupy.zoo.dense.mask_rcnn import SAMPLING
from natcupy.zoo.dense.rpn import ProposalRules
from natcupy.zoo.dense.targets import Matching, Objects, Sample, sample_proposals

STAGES = 3
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
MATCHINGS = tuple(Matching(iou, iou, iou, low_quality=False) for iou in (0.5, 0.6, 0.7))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)


class CascadeMaskRCNN(Detector):
    """Three box heads of four convolutions and one fully connected layer, three mask heads."""

    rpn_beta = 1 / 9
    rpn_border = 0
    train_proposals = ProposalRules(per_level=2000, most=2000)

    def _make_roi_head(self, config: DenseConfig) -> RoIHead:
        numbers = {"num_fcs": 1, "num_convs": 4, "num_classes": config.num_classes}
        boxes = (BBoxHead(config.channels, config.fc_channels, stds=s, **numbers) for s in STDS)
        masks = (MaskHead(config.channels, config.num_classes) for _ in range(STAGES))
        return RoIHead(nn.ModuleList(boxes), nn.ModuleList(masks))

    def classify(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], frames: Sequence[Frame]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per picture, input boxes `[n, classes, 4]` and probabilities `[n, classes + 1]`.

        Between the stages a box follows its most probable class. The boxes are the last stage's,
        the probabilities those of the stages' mean logits.
        """
        boxes, total = list(proposals), 0
        for stage, head in enumerate(self.roi_head.bbox_head):
            logits, deltas = head(self.pool_boxes(maps, boxes, SIDE))
            logits, deltas = (part.to(boxes[0].dtype) for part in (logits, deltas))
            total = total + logits
            if stage < STAGES - 1:
                labels = logits[:, :-1].argmax(dim=1)
                boxes = _follow(boxes, deltas, labels, STDS[stage], frames)
        counts = [b.shape[0] for b in boxes]
        probabilities = (total / STAGES).softmax(dim=1).split(counts)
        parts = zip(boxes, deltas.split(counts), frames, strict=True)
        decoded = [decode(box, delta, STDS[-1], frame.size) for box, delta, frame in parts]
        return list(zip(decoded, probabilities, strict=True))

    def mask_probabilities(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Mean over the stages of the masks `[n, 28, 28]` of the pictures' boxes."""
        features = self.pool_masks(maps, boxes)
        return sum(own_masks(head(features), labels) for head in self.roi_head.mask_head) / STAGES

    def region_losses(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        frames: Sequence[Frame],
        objects: Sequence[Objects],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """The losses of each stage's heads on a sample of its boxes, weighted."""
        losses, boxes = {}, list(proposals)
        for stage, weight in enumerate(LOSS_WEIGHTS):
            samples = [
                sample_proposals(b, found, MATCHINGS[stage], SAMPLING, generator)
                for b, found in zip(boxes, objects, strict=True)
            ]
            logits, deltas, own = self._stage_losses(stage, maps, samples, objects)
            losses |= {f"s{stage}.{name}": weight * value for name, value in own.items()}
            if stage < STAGES - 1:
                boxes = self._refine(stage, logits, deltas, samples, objects, frames)
        return losses

    def _stage_losses(
        self,
        stage: int,
        maps: Sequence[Tensor],
        samples: Sequence[Sample],
        objects: Sequence[Objects],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        features = self.pool_boxes(maps, [picked.boxes for picked in samples], SIDE)
        logits, deltas = self.roi_head.bbox_head[stage](features)
        labels = class_targets(samples, objects, self.num_classes)
        losses = box_losses(logits, deltas, labels, samples, objects, STDS[stage], decoded=True)
        features = self.pool_masks(maps, [picked.positives for picked in samples])
        masks = self.roi_head.mask_head[stage](features)
        own = labels[labels < self.num_classes]
        losses["loss_mask"] = mask_loss(masks, own, mask_targets(samples, objects))
        return logits, deltas, losses

    @torch.no_grad()
    def _refine(
        self,
        stage: int,
        logits: Tensor,
        deltas: Tensor,
        samples: Sequence[Sample],
        objects: Sequence[Objects],
        frames: Sequence[Frame],
    ) -> list[Tensor]:
        """The sampled boxes, moved, for the next stage; the objects' own boxes are left out.

        Boxes of objects follow the true class, the others their most probable one.
        """
        labels = class_targets(samples, objects, self.num_classes)
        guess = logits[:, :-1].argmax(dim=1)
        labels = torch.where(labels == self.num_classes, guess, labels)
        boxes = [picked.boxes for picked in samples]
        moved = _follow(boxes, deltas.to(boxes[0].dtype), labels, STDS[stage], frames)
        return [b[~picked.true_boxes] for b, picked in zip(moved, samples, strict=True)]


def _follow(
    boxes: Sequence[Tensor],
    deltas: Tensor,
    labels: Tensor,
    stds: Sequence[float],
    frames: Sequence[Frame],
) -> list[Tensor]:
    """Each box moved by the deltas of one class and clipped to its picture."""
    rows = torch.arange(labels.numel(), device=labels.device)
    own = deltas.unflatten(1, (-1, 4))[rows, labels]
    parts = own.split([b.shape[0] for b in boxes])
    triples = zip(boxes, parts, frames, strict=True)
    return [decode(box, delta, stds, frame.size)[:, 0] for box, delta, frame in triples]
