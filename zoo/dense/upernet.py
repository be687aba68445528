"""UPerNet: one class per pixel, from a pyramid of a backbone's maps.

In: pictures `[B, 3, H, W]`. Out: logits `[B, classes, H, W]`, the losses of training, or a map of
classes at a picture's own size. Paper: UPerNet (arXiv 1807.10221); the layers' names and the
details are those of the released NAT and DiNAT checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from natcupy.zoo.dense.base import DenseModel
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.layers import ConvUnit, init_normal, resize
from natcupy.zoo.dense.segment import Segmentation, Variant, combine

POOL_SCALES = (1, 2, 3, 6)
IGNORE_INDEX = 255  # pixels of this label take no part in training
AUX_WEIGHT = 0.4
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, top-down fusion, all levels side by side, classifier.

    In: maps of falling size, `dims[i]` channels each. Out `[B, num_classes, H0, W0]`, the size of
    the finest map.
    """

    def __init__(self, dims: Sequence[int], channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvUnit(dims[-1], channels, 1))
            for scale in POOL_SCALES
        )
        self.bottleneck = ConvUnit(dims[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvUnit(dim, channels, 1) for dim in dims[:-1])
        self.fpn_convs = nn.ModuleList(ConvUnit(channels, channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = ConvUnit(len(dims) * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        init_normal(self.conv_seg, 0.01)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of the backbone to logits at the finest map's size."""
        return self.conv_seg(self.dropout(self.fuse(maps)))

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Everything before the classifier: `[B, channels, H0, W0]`."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pool_pyramid(maps[-1]))
        for fine in range(len(levels) - 2, -1, -1):
            size = levels[fine].shape[2:]
            levels[fine] = levels[fine] + resize(levels[fine + 1], size)
        fused = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        fused.append(levels[-1])
        size = fused[0].shape[2:]
        return self.fpn_bottleneck(torch.cat([resize(x, size) for x in fused], dim=1))

    def pool_pyramid(self, x: Tensor) -> Tensor:
        """The coarsest map with its averages over 1x1 to 6x6 cells. PSPNet (arXiv 1612.01105)."""
        pooled = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier on one map: a second loss for training."""

    def __init__(self, dim: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.convs = nn.Sequential(ConvUnit(dim, channels, 3))
        self.dropout = nn.Dropout2d(0.1)
        init_normal(self.conv_seg, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` to `[B, num_classes, H, W]`."""
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(DenseModel):
    """Pictures `[B, 3, H, W]` of any size to logits `[B, num_classes, H, W]`."""

    def __init__(self, config: DenseConfig, pretrained_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(config, pretrained_cfg)
        dims = config.backbone.dims
        # The last map but one: index 2 of the released four.
        self.aux_index = len(dims) - 2
        self.decode_head = UPerHead(dims, config.channels, config.num_classes)
        self.auxiliary_head = FCNHead(dims[self.aux_index], config.aux_channels, config.num_classes)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, resized: bool = True
    ) -> Tensor | dict[str, Tensor]:
        """Logits at the pictures' size, or those of `decode`; with labels, the losses.

        Args:
            x: prepared pictures `[B, 3, H, W]`.
            labels: as for `losses`.
            resized: False leaves logits at the finest map's size; a wrapped model (sharded, DDP)
                must be called, so `decode` is not to be had there.
        """
        if labels is not None:
            return self.losses(x, labels)
        logits = self.decode(x)
        return resize(logits, x.shape[2:]) if resized else logits

    def decode(self, x: Tensor) -> Tensor:
        """Logits at the finest map's size, `[B, num_classes, ceil(H/4), ceil(W/4)]`."""
        self.check_pictures(x)
        return self.decode_head(self.backbone(x))

    def losses(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What training minimises: the sum of "decode" and "aux".

        Args:
            x: prepared pictures `[B, 3, H, W]`.
            labels: classes `[B, H, W]`, int64; 255 for pixels that do not count.
        """
        self.check_pictures(x)
        check_labels(labels, x, self.num_classes)
        maps = self.backbone(x)
        decode, aux = self.decode_head(maps), self.auxiliary_head(maps[self.aux_index])
        return {
            "decode": pixel_loss(decode, labels),
            "aux": AUX_WEIGHT * pixel_loss(aux, labels),
        }

    @torch.no_grad()
    def predict(
        self, image: Any, scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> Segmentation:
        """The class of every pixel of one picture, at the picture's own size.

        Args:
            image: a path, a PIL picture, an array or a tensor, as `Recipe.prepare` takes them.
            scales: multiples of the recipe's size to average over; the papers' multi-scale numbers
                use `MULTI_SCALE` with `flip=True`.
            flip: average with the mirrored picture as well.
        """
        if not scales:
            raise ValueError("there must be at least one scale to average over, got none.")
        like = next(self.parameters())
        variants = []
        for scale in scales:
            prepared = self.recipe.scaled(scale).prepare(image)
            x, frame = prepared.pixels.to(like), prepared.frame
            for mirrored in (False, True) if flip else (False,):
                logits = self.decode(x.flip(3) if mirrored else x)[0]
                variants.append(Variant(logits, frame.size, mirrored))
        return combine(variants, frame.original_size, self.label_names)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy at the labels' size, averaged over all pixels, also those that do not count.

    Args:
        logits: `[B, classes, h, w]`, resized to the labels' size.
        labels: `[B, H, W]`.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    logits = resize(exact, labels.shape[1:])  # a sum over pixels is beyond float16's range
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / labels.numel()


def check_labels(labels: Tensor, x: Tensor, num_classes: int) -> None:
    """Raise where labels cannot belong to the pictures `x`."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; use labels.long().")
    if labels.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"labels must be [batch, height, width] of the pictures, {(x.shape[0], *x.shape[2:])}, "
            f"got {tuple(labels.shape)}; resize them together with the pictures."
        )
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise ValueError(
            f"labels must be in 0..{num_classes - 1} or {IGNORE_INDEX} (ignored), got "
            f"{int(labels[wrong][0])}; map the data set's ids to this range first."
        )
