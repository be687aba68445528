"""torchvision's compiled operators, where they are installed and work.

In: nothing. Out: the module `torchvision.ops`, or None; the callers then use their own plain-torch
code, which does the same.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch


@lru_cache(maxsize=1)
def torchvision_ops() -> ModuleType | None:
    """`torchvision.ops`, tried out once; None where it is missing or built for another torch."""
    try:
        import torchvision.ops as ops

        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        kept = ops.nms(box, torch.ones(1), 0.5)
        pooled = ops.roi_align(torch.ones(1, 1, 2, 2), [box], 1, 1.0, -1, True)
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError):
        return None
    return ops if kept.tolist() == [0] and pooled.shape == (1, 1, 1, 1) else None
