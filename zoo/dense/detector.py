"""What Mask R-CNN and its cascade share: backbone, pyramid, proposals, and the way to detections.

In: prepared pictures and their frames, or one picture of any kind. Out: `Detections` per picture,
or the losses of training. The subclasses say what happens to a region.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from natcupy.zoo.dense.base import DenseModel
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.detection_losses import rpn_losses
from natcupy.zoo.dense.detections import Detections
from natcupy.zoo.dense.fpn import FPN
from natcupy.zoo.dense.images import Frame
from natcupy.zoo.dense.mask_heads import SIDE
from natcupy.zoo.dense.nms import nms
from natcupy.zoo.dense.roi_align import pool_regions
from natcupy.zoo.dense.rpn import ProposalRules, RPNHead, propose
from natcupy.zoo.dense.targets import Objects, check_objects


@dataclass(frozen=True)
class DetectionRules:
    """How detections are picked.

    Attributes:
        score: probability that a detection must exceed.
        iou: detections of one class that overlap a better one by more than this go.
        most: detections kept per picture.
        proposals: how the regions are picked.
    """

    score: float = 0.05
    iou: float = 0.5
    most: int = 100
    proposals: ProposalRules = field(default_factory=ProposalRules)


PAPERS = DetectionRules()  # made here, since torch 2.6's dynamo trips over one made while tracing


class RoIHead(nn.Module):
    """The container of the box and mask heads, for the sake of their names."""

    def __init__(self, bbox_head: nn.Module, mask_head: nn.Module) -> None:
        super().__init__()
        self.bbox_head = bbox_head
        self.mask_head = mask_head


class Detector(DenseModel):
    """Pictures to boxes, classes and masks."""

    rpn_beta: float  # where the proposals' regression loss turns quadratic
    rpn_border: int | None  # pixels that a trained anchor may reach across an edge; None: any
    train_proposals: ProposalRules

    def __init__(self, config: DenseConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(config, pretrained_cfg)
        self.strides = (*config.strides, 2 * config.strides[-1])
        self.neck = FPN(config.backbone.dims, config.channels)
        self.rpn_head = RPNHead(config.channels)
        self.roi_head = self._make_roi_head(config)

    @abstractmethod
    def _make_roi_head(self, config: DenseConfig) -> RoIHead:
        """The heads."""

    @abstractmethod
    def classify(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], frames: Sequence[Frame]
    ) -> list[tuple[Tensor, Tensor]]:
        """Per picture, input boxes `[n, classes, 4]` and probabilities `[n, classes + 1]`."""

    @abstractmethod
    def mask_probabilities(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Masks `[n, 28, 28]` of the pictures' boxes, of the given classes `[n]`."""

    @abstractmethod
    def region_losses(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        frames: Sequence[Frame],
        objects: Sequence[Objects],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """The losses of the box and mask heads."""

    # -- inference -------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        frames: Sequence[Frame] | None = None,
        objects: Sequence[Objects] | None = None,
    ) -> list[Detections] | dict[str, Tensor]:
        """Prepared pictures `[B, 3, H, W]` to the detections of each; see `detect`.

        With the true objects, the losses; see `losses`.
        """
        if objects is not None:
            return self.losses(x, frames, objects)
        return self.detect(x, frames)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The feature pyramid: maps of strides 4, 8, 16, 32, 64 with equal channels."""
        self.check_pictures(x)
        return self.neck(self.backbone(x))

    @torch.no_grad()
    def detect(
        self,
        x: Tensor,
        frames: Sequence[Frame] | None = None,
        rules: DetectionRules | None = None,
        masks: bool = True,
    ) -> list[Detections]:
        """Objects in a batch of prepared pictures.

        Args:
            x: `[B, 3, H, W]`.
            frames: where each picture lies in its input (of `Recipe.prepare` and `stack`); None:
                the whole input, not resized.
            rules: thresholds; None: the papers'.
            masks: whether the mask heads run.
        """
        rules = rules or PAPERS
        frames = self._frames(x, frames)
        maps = self.pyramid(x)
        logits, deltas = (_exact(part) for part in self.rpn_head(maps))
        proposals = propose(logits, deltas, self.strides, frames, rules.proposals)
        found = []
        results = self.classify(maps[:-1], proposals, frames)
        for (boxes, probabilities), frame in zip(results, frames, strict=True):
            boxes = boxes / boxes.new_tensor(frame.scale)
            boxes, scores, labels = select(boxes, probabilities, rules)
            size = frame.original_size
            found.append(Detections(boxes, scores, labels, None, size, self.label_names))
        return self._with_masks(maps[:-1], found, frames) if masks else found

    def predict(
        self, image: Any, rules: DetectionRules | None = None, masks: bool = True
    ) -> Detections:
        """Objects in one picture, in its own pixels.

        Args:
            image: a path, a PIL picture, an array or a tensor, as `Recipe.prepare` takes them.
            rules: thresholds; None: the papers'.
            masks: whether the mask heads run.
        """
        prepared = self.recipe.prepare(image)
        x = prepared.pixels.to(next(self.parameters()))
        return self.detect(x, [prepared.frame], rules, masks)[0]

    def _with_masks(
        self, maps: Sequence[Tensor], found: list[Detections], frames: Sequence[Frame]
    ) -> list[Detections]:
        boxes = [
            d.boxes * d.boxes.new_tensor(frame.scale)
            for d, frame in zip(found, frames, strict=True)
        ]
        masks = self.mask_probabilities(maps, boxes, torch.cat([d.labels for d in found]))
        parts = masks.split([len(d) for d in found])
        return [
            Detections(d.boxes, d.scores, d.labels, part, d.size, d.names)
            for d, part in zip(found, parts, strict=True)
        ]

    def _frames(self, x: Tensor, frames: Sequence[Frame] | None) -> list[Frame]:
        size = tuple(x.shape[2:])
        if frames is None:
            return [Frame(size, size)] * x.shape[0]
        fits = [f.size[0] <= size[0] and f.size[1] <= size[1] for f in frames]
        if len(frames) != x.shape[0] or not all(fits):
            raise ValueError(
                f"there must be one frame per picture, within the input's {size}, got "
                f"{len(frames)} for {x.shape[0]} pictures: {list(frames)}; use stack(prepared)."
            )
        return list(frames)

    # -- training --------------------------------------------------------------------------------

    def losses(
        self,
        x: Tensor,
        frames: Sequence[Frame] | None,
        objects: Sequence[Objects],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """What training minimises: the sum of the values.

        Args:
            x: prepared pictures `[B, 3, H, W]`.
            frames: as for `detect`.
            objects: per picture, in the input's pixels; may be empty.
            generator: of the random choice of boxes; None: torch's own.
        """
        frames = self._frames(x, frames)
        if len(objects) != len(frames):
            raise ValueError(
                f"there must be one Objects per picture, got {len(objects)} for {len(frames)}."
            )
        for found, frame in zip(objects, frames, strict=True):
            check_objects(found, frame, self.num_classes)
        objects = [found.to(x.device) for found in objects]
        maps = self.pyramid(x)
        logits, deltas = self.rpn_head(maps)
        divisor = self.recipe.pad_divisor
        padded = [tuple(-(-side // divisor) * divisor for side in f.size) for f in frames]
        sizes = None if self.rpn_border is None else [f.size for f in frames]
        total = rpn_losses(
            logits, deltas, self.strides, padded, objects, self.rpn_beta, generator, sizes,
            self.rpn_border or 0,
        )  # fmt: skip
        detached = (_exact([part.detach() for part in parts]) for parts in (logits, deltas))
        proposals = propose(*detached, self.strides, frames, self.train_proposals)
        return total | self.region_losses(maps[:-1], proposals, frames, objects, generator)

    def pool_boxes(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
        """Features `[n, C, side, side]` of the pictures' boxes."""
        return pool_regions(maps, self.strides[:-1], boxes, side)

    def pool_masks(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Features `[n, C, 14, 14]` of the pictures' boxes."""
        return self.pool_boxes(maps, boxes, SIDE)


def select(
    boxes: Tensor, probabilities: Tensor, rules: DetectionRules
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections among all pairs of box and class.

    Args:
        boxes: `[n, classes, 4]`.
        probabilities: `[n, classes + 1]`, background last.
        rules: thresholds.

    Returns:
        Boxes `[m, 4]`, scores `[m]` and labels `[m]`, by falling score.
    """
    scores = probabilities[:, :-1]
    chosen = scores > rules.score
    labels = chosen.nonzero()[:, 1]
    boxes, scores = boxes[chosen], scores[chosen]
    kept = nms(boxes, scores, rules.iou, labels)[: rules.most]
    return boxes[kept], scores[kept], labels[kept]


def own_masks(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities `[n, 28, 28]` of each box's own class, from `[n, classes, 28, 28]`."""
    rows = torch.arange(labels.numel(), device=labels.device)
    return logits[rows, labels].float().sigmoid()


def _exact(parts: Sequence[Tensor]) -> list[Tensor]:
    """Box arithmetic takes at least float32."""
    return [part if part.dtype == torch.float64 else part.float() for part in parts]
