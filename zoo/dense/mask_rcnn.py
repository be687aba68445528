"""Mask R-CNN: boxes, classes and masks of the objects in a picture.

In and out: as `Detector`. Paper: Mask R-CNN (arXiv 1703.06870); the layers' names and the details
are those of the released NAT and DiNAT checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natcupy.zoo.dense.bbox_heads import SIDE, BBoxHead
from natcupy.zoo.dense.boxes import decode
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.detection_losses import box_losses, class_targets, mask_loss, mask_targets
from natcupy.zoo.dense.detector import Detector, RoIHead, own_masks
from natcupy.zoo.dense.images import Frame
from natcupy.zoo.dense.mask_heads import MaskHead
from natcupy.zoo.dense.rpn import ProposalRules
from natcupy.zoo.dense.targets import Matching, Objects, Sampling, sample_proposals

STDS = (0.1, 0.1, 0.2, 0.2)
MATCHING = Matching(positive=0.5, negative=0.5, least=0.5, low_quality=True)
SAMPLING = Sampling(number=512, fraction=0.25)


class MaskRCNN(Detector):
    """One box head of two fully connected layers, one mask head."""

    rpn_beta = 0.0
    rpn_border = None
    train_proposals = ProposalRules(per_level=2000, most=1000)

    def _make_roi_head(self, config: DenseConfig) -> RoIHead:
        numbers = {"num_fcs": 2, "num_convs": 0, "num_classes": config.num_classes, "stds": STDS}
        return RoIHead(
            BBoxHead(config.channels, config.fc_channels, **numbers),
            MaskHead(config.channels, config.num_classes),
        )

    def classify(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], frames: Sequence[Frame]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per picture, input boxes `[n, classes, 4]` and probabilities `[n, classes + 1]`."""
        logits, deltas = self.roi_head.bbox_head(self.pool_boxes(maps, proposals, SIDE))
        counts = [boxes.shape[0] for boxes in proposals]
        probabilities = logits.to(proposals[0].dtype).softmax(dim=1).split(counts)
        deltas = deltas.to(proposals[0].dtype).split(counts)
        return [
            (decode(boxes, delta, STDS, frame.size), probability)
            for boxes, delta, probability, frame in zip(
                proposals, deltas, probabilities, frames, strict=True
            )
        ]

    def mask_probabilities(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Masks `[n, 28, 28]` of the pictures' boxes, of the given classes `[n]`."""
        return own_masks(self.roi_head.mask_head(self.pool_masks(maps, boxes)), labels)

    def region_losses(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        frames: Sequence[Frame],
        objects: Sequence[Objects],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """The losses of the box and mask heads on a sample of the proposals."""
        samples = [
            sample_proposals(boxes, found, MATCHING, SAMPLING, generator)
            for boxes, found in zip(proposals, objects, strict=True)
        ]
        features = self.pool_boxes(maps, [picked.boxes for picked in samples], SIDE)
        logits, deltas = self.roi_head.bbox_head(features)
        labels = class_targets(samples, objects, self.num_classes)
        losses = box_losses(logits, deltas, labels, samples, objects, STDS)
        masks = self.roi_head.mask_head(self.pool_masks(maps, [s.positives for s in samples]))
        targets = mask_targets(samples, objects)
        own = labels[labels < self.num_classes]
        return losses | {"loss_mask": mask_loss(masks, own, targets)}
