"""What the papers print about each released dense model.

In: a model's name. Out: a `DensePublished` row. Sources: NAT (arXiv 2204.07143), DiNAT (arXiv
2209.15001) and the tables of their repository. "FLOPs" there are multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DensePublished:
    """One released model.

    Attributes:
        params: millions of parameters, as printed.
        gmacs: 10^9 multiply-adds, as printed, at `size`.
        size: height and width that the multiply-adds are counted at.
        scores: as printed: box and mask AP on COCO, or single- and multi-scale mIoU on ADE20K.
    """

    params: int
    gmacs: int
    size: tuple[int, int]
    scores: tuple[float, float]


_ADE, _ADE_LARGE, _COCO = (2048, 512), (2560, 640), (800, 1280)

DENSE_PUBLISHED: dict[str, DensePublished] = {
    "upernet_nat_mini": DensePublished(50, 900, _ADE, (45.1, 46.4)),
    "upernet_nat_tiny": DensePublished(58, 934, _ADE, (47.1, 48.4)),
    "upernet_nat_small": DensePublished(82, 1010, _ADE, (48.0, 49.5)),
    "upernet_nat_base": DensePublished(123, 1137, _ADE, (48.5, 49.7)),
    "upernet_dinat_mini": DensePublished(50, 900, _ADE, (45.8, 47.2)),
    "upernet_dinat_tiny": DensePublished(58, 934, _ADE, (47.8, 48.8)),
    "upernet_dinat_small": DensePublished(82, 1010, _ADE, (48.9, 49.9)),
    "upernet_dinat_base": DensePublished(123, 1137, _ADE, (49.6, 50.4)),
    "upernet_dinat_large": DensePublished(238, 2335, _ADE_LARGE, (54.0, 54.9)),
    "upernet_dinat_s_tiny": DensePublished(60, 941, _ADE, (46.0, 47.4)),
    "upernet_dinat_s_small": DensePublished(81, 1030, _ADE, (48.6, 49.9)),
    "upernet_dinat_s_base": DensePublished(121, 1173, _ADE, (49.4, 50.2)),
    "upernet_dinat_s_large": DensePublished(234, 2466, _ADE_LARGE, (53.4, 54.6)),
    "mask_rcnn_nat_mini": DensePublished(40, 225, _COCO, (46.5, 41.7)),
    "mask_rcnn_nat_tiny": DensePublished(48, 258, _COCO, (47.7, 42.6)),
    "mask_rcnn_nat_small": DensePublished(70, 330, _COCO, (48.4, 43.2)),
    "mask_rcnn_dinat_mini": DensePublished(40, 225, _COCO, (47.2, 42.5)),
    "mask_rcnn_dinat_tiny": DensePublished(48, 258, _COCO, (48.6, 43.5)),
    "mask_rcnn_dinat_small": DensePublished(70, 330, _COCO, (49.3, 44.0)),
    "mask_rcnn_dinat_s_tiny": DensePublished(48, 263, _COCO, (46.6, 42.1)),
    "mask_rcnn_dinat_s_small": DensePublished(69, 350, _COCO, (48.6, 43.5)),
    "cascade_mask_rcnn_nat_mini": DensePublished(77, 704, _COCO, (50.3, 43.6)),
    "cascade_mask_rcnn_nat_tiny": DensePublished(85, 737, _COCO, (51.4, 44.5)),
    "cascade_mask_rcnn_nat_small": DensePublished(108, 809, _COCO, (52.0, 44.9)),
    "cascade_mask_rcnn_nat_base": DensePublished(147, 931, _COCO, (52.3, 45.1)),
    "cascade_mask_rcnn_dinat_mini": DensePublished(77, 704, _COCO, (51.2, 44.4)),
    "cascade_mask_rcnn_dinat_tiny": DensePublished(85, 737, _COCO, (52.2, 45.1)),
    "cascade_mask_rcnn_dinat_small": DensePublished(108, 809, _COCO, (52.9, 45.8)),
    "cascade_mask_rcnn_dinat_base": DensePublished(147, 931, _COCO, (53.4, 46.2)),
    "cascade_mask_rcnn_dinat_large": DensePublished(258, 1276, _COCO, (55.3, 47.8)),
    "cascade_mask_rcnn_dinat_s_tiny": DensePublished(86, 742, _COCO, (51.0, 44.1)),
    "cascade_mask_rcnn_dinat_s_small": DensePublished(107, 829, _COCO, (52.3, 45.2)),
    "cascade_mask_rcnn_dinat_s_base": DensePublished(145, 966, _COCO, (52.6, 45.3)),
    "cascade_mask_rcnn_dinat_s_large": DensePublished(253, 1357, _COCO, (54.8, 47.2)),
}
