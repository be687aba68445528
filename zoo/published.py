"""What the papers print about each released model, and how far this code's counts agree.

In: a model's name. Out: a `Published` row: weight tag, picture size, parameters, multiply-adds,
top-1. Sources: NAT (arXiv 2204.07143), DiNAT (arXiv 2209.15001) and the tables of their repository.
The papers say "FLOPs"; the numbers are multiply-adds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One released model.

    Attributes:
        tag: the weights: "in1k" (ImageNet-1K from scratch), "in22k_ft_in1k" (pretrained on
            ImageNet-22K, tuned on 1K) or "in22k".
        img_size: side of the pictures they were trained and measured on.
        params: millions of parameters, as printed; None where nothing was printed.
        gmacs: 10^9 multiply-adds per picture, as printed.
        top1: ImageNet-1K accuracy in percent, as printed.
        note: where a printed digit is not what the papers' own counting gives.
    """

    tag: str
    img_size: int = 224
    params: int | None = None
    gmacs: str | None = None
    top1: float | None = None
    note: str = ""

    @property
    def crop_pct(self) -> float:
        """Centre crop over resized picture: 0.875, or everything at 384."""
        return 0.875 if self.img_size == 224 else 1.0


_IN1K, _FT, _IN22K = "in1k", "in22k_ft_in1k", "in22k"
_PLAIN = "printed MACs are those without normalisation and bias terms"
_HEAD_22K = "MACs count to 30.5; 30.6 is the same model with the classifier of its 22K weights"
_TRUNCATED = "printed millions of parameters are cut off, not rounded"

PUBLISHED: dict[str, Published] = {
    "nat_mini": Published(_IN1K, 224, 20, "2.7", 81.8),
    "nat_tiny": Published(_IN1K, 224, 28, "4.3", 83.2),
    "nat_small": Published(_IN1K, 224, 51, "7.8", 83.7),
    "nat_base": Published(_IN1K, 224, 90, "13.7", 84.3),
    "dinat_mini": Published(_IN1K, 224, 20, "2.7", 81.8),
    "dinat_tiny": Published(_IN1K, 224, 28, "4.3", 82.7),
    "dinat_small": Published(_IN1K, 224, 51, "7.8", 83.8),
    "dinat_base": Published(_IN1K, 224, 90, "13.7", 84.4),
    "dinat_large": Published(_FT, 224, 200, "30.6", 86.6, f"{_HEAD_22K}; {_TRUNCATED}"),
    "dinat_large_384": Published(_FT, 384, 200, "89.7", 87.4, _TRUNCATED),
    "dinat_large_384_11x11": Published(_FT, 384, 200, "92.4", 87.5, _TRUNCATED),
    "dinat_large_21k": Published(_IN22K),
    "dinat_large_21k_11x11": Published(_IN22K),
    "dinat_s_tiny": Published(_IN1K, 224, 28, "4.5", 81.8),
    "dinat_s_small": Published(_IN1K, 224, 50, "8.7", 83.5, _PLAIN),
    "dinat_s_base": Published(_IN1K, 224, 88, "15.4", 83.8, _PLAIN),
    "dinat_s_large": Published(_FT, 224, 197, "34.5", 86.5),
    "dinat_s_large_384": Published(_FT, 384, 197, "101.5", 87.4),
    "dinat_s_large_21k": Published(_IN22K),
    "nat_isotropic_small": Published(_IN1K, 224, 22, "4.3", 80.0),
    "nat_isotropic_base": Published(_IN1K, 224, 86, "16.9", 81.6, _PLAIN),
    "dinat_isotropic_small": Published(_IN1K, 224, 22, "4.3", 80.8),
    "dinat_isotropic_base": Published(_IN1K, 224, 86, "16.9", 82.1, _PLAIN),
    "vitrpb_small": Published(_IN1K, 224, 22, "4.6", 81.2),
    "vitrpb_base": Published(_IN1K, 224, 86, "17.5", 82.5, _TRUNCATED),
}
