"""How many parameters a dense model has, by arithmetic alone: nothing is built.

In: a `DenseConfig`. Out: a number; buffers (running means and variances) are not counted.
"""

from __future__ import annotations

from natcupy.zoo.config import num_parameters
from natcupy.zoo.dense.anchors import RATIOS
from natcupy.zoo.dense.bbox_heads import SIDE
from natcupy.zoo.dense.cascade import STAGES
from natcupy.zoo.dense.config import DenseConfig
from natcupy.zoo.dense.mask_heads import CONVS
from natcupy.zoo.dense.upernet import POOL_SCALES


def num_dense_parameters(config: DenseConfig) -> int:
    """Parameters of the whole model: backbone, neck and every head, the auxiliary one included."""
    backbone = num_parameters(config.backbone)
    if config.architecture == "upernet":
        return backbone + _decoder(config) + _auxiliary(config)
    stages = STAGES if config.architecture == "cascade_mask_rcnn" else 1
    heads = _box_head(config) + _mask_head(config)
    return backbone + _pyramid(config) + _proposals(config) + stages * heads


def _unit(fan_in: int, channels: int) -> int:
    """A convolution without bias and its batch norm."""
    return fan_in * channels + 2 * channels


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _decoder(config: DenseConfig) -> int:
    dims, wide = config.backbone.dims, config.channels
    total = len(POOL_SCALES) * _unit(dims[-1], wide)
    total += _unit(9 * (dims[-1] + len(POOL_SCALES) * wide), wide)
    total += sum(_unit(dim, wide) + _unit(9 * wide, wide) for dim in dims[:-1])
    total += _unit(9 * len(dims) * wide, wide)
    return total + _linear(wide, config.num_classes)


def _auxiliary(config: DenseConfig) -> int:
    wide = config.aux_channels
    return _unit(9 * config.backbone.dims[-2], wide) + _linear(wide, config.num_classes)


def _pyramid(config: DenseConfig) -> int:
    wide = config.channels
    return sum(_linear(dim, wide) + _linear(9 * wide, wide) for dim in config.backbone.dims)


def _proposals(config: DenseConfig) -> int:
    wide = config.channels
    return _linear(9 * wide, wide) + _linear(wide, 5 * len(RATIOS))


def _box_head(config: DenseConfig) -> int:
    wide, hidden, classes = config.channels, config.fc_channels, config.num_classes
    total = _linear(SIDE * SIDE * wide, hidden)
    total += _linear(hidden, classes + 1) + _linear(hidden, 4 * classes)
    if config.architecture == "cascade_mask_rcnn":
        return total + 4 * _unit(9 * wide, wide)
    return total + _linear(hidden, hidden)


def _mask_head(config: DenseConfig) -> int:
    wide = config.channels
    upsample = 4 * wide * wide + wide
    return CONVS * _linear(9 * wide, wide) + upsample + _linear(wide, config.num_classes)
