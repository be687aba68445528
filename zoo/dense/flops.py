"""Multiply-adds of a dense model on one picture, by arithmetic, counted as the papers' tables were.

In: a `DenseConfig` and the prepared picture's height and width. Out: `DenseMacs` per part. Counted:
what `natcupy.zoo.count_macs` counts for the backbone, convolutions and linear layers, 2 per
batch-norm element, 4 per bilinearly and 1 per nearest resized element, 1 per pooled input element.
The box heads see 1000 proposals and the mask heads 100 boxes. UPerNet's auxiliary head does not
run.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from natcupy.zoo.dense.cascade import STAGES
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.upernet import POOL_SCALES
from natcupy.zoo.flops import count_macs

PROPOSALS = 1000
DETECTIONS = 100
_BOX, _MASK = 7, 14  # sides of the features cut out for boxes and masks
_ANCHORS = 3


@dataclass(frozen=True)
class DenseMacs:
    """Multiply-adds by part; `neck` is UPerNet's whole decoder or the detectors' pyramid."""

    backbone: int
    neck: int
    rpn: int = 0
    boxes: int = 0
    masks: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(astuple(self))


def count_dense_macs(config: DenseConfig, height: int, width: int) -> DenseMacs:
    """Multiply-adds of the model on one `height` x `width` picture.

    Raises ValueError for sizes below 1.
    """
    backbone = count_macs(config.backbone, height, width).papers
    areas = _areas(config, height, width)
    if config.architecture == "upernet":
        last_resize = 4 * config.num_classes * height * width
        return DenseMacs(backbone, _upernet(config, areas) + last_resize)
    stages = STAGES if config.architecture == "cascade_mask_rcnn" else 1
    areas.append(_halved(config, height, width))
    return DenseMacs(
        backbone,
        _pyramid(config, areas),
        _rpn(config, areas),
        stages * _box_head(config),
        stages * _mask_head(config),
    )


def _sides(config: DenseConfig, height: int, width: int) -> list[tuple[int, int]]:
    height, width = -(-height // 4), -(-width // 4)
    sides = []
    for _ in config.backbone.depths:
        sides.append((height, width))
        height, width = -(-height // 2), -(-width // 2)
    return sides


def _areas(config: DenseConfig, height: int, width: int) -> list[int]:
    return [h * w for h, w in _sides(config, height, width)]


def _halved(config: DenseConfig, height: int, width: int) -> int:
    """Pixels of the pyramid's extra level, half the coarsest map."""
    h, w = _sides(config, height, width)[-1]
    return -(-h // 2) * -(-w // 2)


def _unit(positions: int, fan_in: int, channels: int, norm: bool = True) -> int:
    """A convolution with `fan_in` weights per output, and its batch norm."""
    return positions * channels * (fan_in + 2 * norm)


def _upernet(config: DenseConfig, areas: list[int]) -> int:
    dims, wide, last = config.backbone.dims, config.channels, areas[-1]
    total = 0
    for scale in POOL_SCALES:
        total += last * dims[-1] + _unit(scale * scale, dims[-1], wide) + 4 * last * wide
    total += _unit(last, 9 * (dims[-1] + len(POOL_SCALES) * wide), wide)
    for area, dim in zip(areas[:-1], dims[:-1], strict=True):
        total += _unit(area, dim, wide) + _unit(area, 9 * wide, wide)
        total += 4 * area * wide  # the coarser map, resized to this one
    total += 4 * areas[0] * wide * (len(areas) - 1)
    total += _unit(areas[0], 9 * wide * len(areas), wide)
    return total + areas[0] * wide * config.num_classes


def _pyramid(config: DenseConfig, areas: list[int]) -> int:
    wide = config.channels
    convs = sum(
        area * wide * (dim + 9 * wide)
        for area, dim in zip(areas, config.backbone.dims, strict=False)
    )
    return convs + wide * sum(areas[: len(config.backbone.dims) - 1])


def _rpn(config: DenseConfig, areas: list[int]) -> int:
    wide = config.channels
    return sum(areas) * wide * (9 * wide + 5 * _ANCHORS)


def _box_head(config: DenseConfig) -> int:
    wide, hidden = config.channels, config.fc_channels
    outputs = hidden * (5 * config.num_classes + 1)
    flat = _BOX * _BOX * wide * hidden
    if config.architecture == "cascade_mask_rcnn":
        convs = 4 * _unit(_BOX * _BOX, 9 * wide, wide)
        return PROPOSALS * (convs + flat + outputs)
    return PROPOSALS * (flat + hidden * hidden + outputs)


def _mask_head(config: DenseConfig) -> int:
    wide, area = config.channels, _MASK * _MASK
    convs = 4 * area * 9 * wide * wide
    upsampled = 4 * area * wide * wide + 4 * area * wide * config.num_classes
    return DETECTIONS * (convs + upsampled)
