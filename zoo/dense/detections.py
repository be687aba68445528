"""What a detector found in one picture, in the picture's own pixels; masks are drawn when asked
for.

In: boxes, scores, classes and the small masks inside the boxes. Out: `Detections`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class Detections:
    """Objects by falling score.

    Attributes:
        boxes: `[n, 4]` (x1, y1, x2, y2) in pixels of the picture.
        scores: `[n]` in 0..1.
        labels: `[n]` int64, indices into `names`.
        mask_probabilities: `[n, 28, 28]` within the boxes, or None where no masks were asked for.
        size: height and width of the picture.
        names: one per class.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probabilities: Tensor | None
    size: tuple[int, int]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> Detections:
        """The objects that a mask, a list of indices or a slice picks."""
        masks = self.mask_probabilities
        return replace(
            self,
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            mask_probabilities=None if masks is None else masks[chosen],
        )

    def above(self, score: float) -> Detections:
        """The objects with at least this score."""
        return self[self.scores >= score]

    def mask(self, index: int) -> Tensor:
        """The pixels of one object: bool `[H, W]`."""
        if self.mask_probabilities is None:
            raise ValueError(
                "there are no masks: they were left out; ask for them with masks=True."
            )
        return paste_mask(self.mask_probabilities[index], self.boxes[index], self.size)

    def masks(self) -> Tensor:
        """The pixels of every object: bool `[n, H, W]`; for many objects use `mask` one by one."""
        if len(self) == 0:
            return torch.zeros((0, *self.size), dtype=torch.bool, device=self.boxes.device)
        return torch.stack([self.mask(index) for index in range(len(self))])


def paste_mask(probabilities: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """A small mask, stretched over its box by bilinear sampling and cut at 0.5.

    Args:
        probabilities: `[h, w]`, zero outside.
        box: `[4]` in pixels.
        size: height and width of the result.

    Returns:
        Bool `[H, W]`; a pixel is sampled at its centre. A side without length samples the mask's
        middle.
    """
    height, width = size
    out = torch.zeros(size, dtype=torch.bool, device=box.device)
    x1, y1, x2, y2 = box.float().tolist()
    left, top = max(int(x1 // 1) - 1, 0), max(int(y1 // 1) - 1, 0)
    right, bottom = min(-int(-x2 // 1) + 1, width), min(-int(-y2 // 1) + 1, height)
    if left >= right or top >= bottom:
        return out
    box = box.float()
    grid_x = _relative(left, right, box[0], box[2])
    grid_y = _relative(top, bottom, box[1], box[3])
    grid = torch.stack(torch.meshgrid(grid_x, grid_y, indexing="xy"), dim=-1)[None]
    pasted = F.grid_sample(probabilities[None, None].float(), grid, align_corners=False)[0, 0]
    out[top:bottom, left:right] = pasted >= MASK_THRESHOLD
    return out


def _relative(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Pixel centres relative to a box side, -1 to 1; the middle where it has no length."""
    centres = torch.arange(start, stop, device=low.device, dtype=torch.float32) + 0.5
    relative = (centres - low) / (high - low) * 2 - 1
    return torch.where(relative.isfinite(), relative, 0.0)
