"""The released segmentation and detection models by name, with the papers' dilations and drop path.

In: overrides, as `sizes.sized` takes them: `num_classes`, widths, fields of the backbone. Out: a
model. Papers: NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001) with their released
configurations.
"""

from __future__ import annotations

from typing import Any

from natcupy.zoo import dinat_s, nat
from natcupy.zoo.dense.cascade import CascadeMaskRCNN
from natcupy.zoo.dense.mask_rcnn import MaskRCNN
from natcupy.zoo.dense.sizes import (
    DETECT,
    DETECT_S,
    SEGMENT,
    SEGMENT_LARGE,
    SEGMENT_S,
    SEGMENT_S_LARGE,
    sized,
)
from natcupy.zoo.dense.upernet import UPerNet

# -- UPerNet ---------------------------------------------------------------------------------------


def upernet_nat_mini(**overrides: Any) -> UPerNet:
    """UPerNet on NAT-Mini."""
    return sized(UPerNet, "upernet", nat.nat_mini, overrides, 0.2)


def upernet_nat_tiny(**overrides: Any) -> UPerNet:
    """UPerNet on NAT-Tiny."""
    return sized(UPerNet, "upernet", nat.nat_tiny, overrides, 0.3)


def upernet_nat_small(**overrides: Any) -> UPerNet:
    """UPerNet on NAT-Small."""
    return sized(UPerNet, "upernet", nat.nat_small, overrides, 0.5)


def upernet_nat_base(**overrides: Any) -> UPerNet:
    """UPerNet on NAT-Base."""
    return sized(UPerNet, "upernet", nat.nat_base, overrides, 0.5)


def upernet_dinat_mini(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-Mini."""
    return sized(UPerNet, "upernet", nat.dinat_mini, overrides, 0.2, SEGMENT)


def upernet_dinat_tiny(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-Tiny."""
    return sized(UPerNet, "upernet", nat.dinat_tiny, overrides, 0.3, SEGMENT)


def upernet_dinat_small(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-Small."""
    return sized(UPerNet, "upernet", nat.dinat_small, overrides, 0.5, SEGMENT)


def upernet_dinat_base(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-Base."""
    return sized(UPerNet, "upernet", nat.dinat_base, overrides, 0.5, SEGMENT)


def upernet_dinat_large(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-Large, pretrained on ImageNet-22K."""
    return sized(UPerNet, "upernet", nat.dinat_large_21k, overrides, 0.3, SEGMENT_LARGE)


def upernet_dinat_s_tiny(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-s-Tiny."""
    return sized(UPerNet, "upernet", dinat_s.dinat_s_tiny, overrides, 0.3, SEGMENT_S)


def upernet_dinat_s_small(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-s-Small."""
    return sized(UPerNet, "upernet", dinat_s.dinat_s_small, overrides, 0.3, SEGMENT_S)


def upernet_dinat_s_base(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-s-Base."""
    return sized(UPerNet, "upernet", dinat_s.dinat_s_base, overrides, 0.3, SEGMENT_S)


def upernet_dinat_s_large(**overrides: Any) -> UPerNet:
    """UPerNet on DiNAT-s-Large, pretrained on ImageNet-22K."""
    return sized(UPerNet, "upernet", dinat_s.dinat_s_large_21k, overrides, 0.3, SEGMENT_S_LARGE)


# -- Mask R-CNN ------------------------------------------------------------------------------------


def mask_rcnn_nat_mini(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on NAT-Mini."""
    return sized(MaskRCNN, "mask_rcnn", nat.nat_mini, overrides, 0.2)


def mask_rcnn_nat_tiny(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on NAT-Tiny."""
    return sized(MaskRCNN, "mask_rcnn", nat.nat_tiny, overrides, 0.2)


def mask_rcnn_nat_small(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on NAT-Small."""
    return sized(MaskRCNN, "mask_rcnn", nat.nat_small, overrides, 0.35)


def mask_rcnn_dinat_mini(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on DiNAT-Mini."""
    return sized(MaskRCNN, "mask_rcnn", nat.dinat_mini, overrides, 0.2, DETECT)


def mask_rcnn_dinat_tiny(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on DiNAT-Tiny."""
    return sized(MaskRCNN, "mask_rcnn", nat.dinat_tiny, overrides, 0.2, DETECT)


def mask_rcnn_dinat_small(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on DiNAT-Small."""
    return sized(MaskRCNN, "mask_rcnn", nat.dinat_small, overrides, 0.35, DETECT)


def mask_rcnn_dinat_s_tiny(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on DiNAT-s-Tiny."""
    return sized(MaskRCNN, "mask_rcnn", dinat_s.dinat_s_tiny, overrides, 0.2, DETECT_S)


def mask_rcnn_dinat_s_small(**overrides: Any) -> MaskRCNN:
    """Mask R-CNN on DiNAT-s-Small."""
    return sized(MaskRCNN, "mask_rcnn", dinat_s.dinat_s_small, overrides, 0.35, DETECT_S)


# -- Cascade Mask R-CNN ----------------------------------------------------------------------------


def cascade_mask_rcnn_nat_mini(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on NAT-Mini."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.nat_mini, overrides, 0.2)


def cascade_mask_rcnn_nat_tiny(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on NAT-Tiny."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.nat_tiny, overrides, 0.3)


def cascade_mask_rcnn_nat_small(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on NAT-Small."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.nat_small, overrides, 0.3)


def cascade_mask_rcnn_nat_base(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on NAT-Base."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.nat_base, overrides, 0.5)


def cascade_mask_rcnn_dinat_mini(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-Mini."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.dinat_mini, overrides, 0.2, DETECT)


def cascade_mask_rcnn_dinat_tiny(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-Tiny."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.dinat_tiny, overrides, 0.3, DETECT)


def cascade_mask_rcnn_dinat_small(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-Small."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.dinat_small, overrides, 0.5, DETECT)


def cascade_mask_rcnn_dinat_base(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-Base."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.dinat_base, overrides, 0.6, DETECT)


def cascade_mask_rcnn_dinat_large(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-Large, pretrained on ImageNet-22K."""
    return sized(CascadeMaskRCNN, "cascade_mask_rcnn", nat.dinat_large_21k, overrides, 0.6, DETECT)


def cascade_mask_rcnn_dinat_s_tiny(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-s-Tiny."""
    return sized(
        CascadeMaskRCNN, "cascade_mask_rcnn", dinat_s.dinat_s_tiny, overrides, 0.3, DETECT_S
    )


def cascade_mask_rcnn_dinat_s_small(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-s-Small."""
    return sized(
        CascadeMaskRCNN, "cascade_mask_rcnn", dinat_s.dinat_s_small, overrides, 0.5, DETECT_S
    )


def cascade_mask_rcnn_dinat_s_base(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-s-Base."""
    return sized(
        CascadeMaskRCNN, "cascade_mask_rcnn", dinat_s.dinat_s_base, overrides, 0.6, DETECT_S
    )


def cascade_mask_rcnn_dinat_s_large(**overrides: Any) -> CascadeMaskRCNN:
    """Cascade Mask R-CNN on DiNAT-s-Large, pretrained on ImageNet-22K."""
    return sized(
        CascadeMaskRCNN, "cascade_mask_rcnn", dinat_s.dinat_s_large_21k, overrides, 0.6, DETECT_S
    )
