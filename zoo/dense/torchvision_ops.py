"""torchvision's compiled operators, where they are installed and work.

In: a device. Out: the module `torchvision.ops`, or None; the callers then use their own plain-torch
code, which does the same.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch


@torch.compiler.assume_constant_result  # dynamo cannot trace an import that fails
def torchvision_ops(device: torch.device) -> ModuleType | None:
    """`torchvision.ops`; None where it is missing, for another torch, or not for this device.

    It is tried out on each type of device: one for CPUs alone loads beside a torch for GPUs.
    """
    return _tried(device.type)


@lru_cache
def _tried(kind: str) -> ModuleType | None:
    try:
        import torchvision.ops as ops

        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=kind, dtype=torch.float32)
        kept = ops.nms(box, box[0, 2:3], 0.5).tolist()
        pooled = ops.roi_align(box.reshape(1, 1, 2, 2), [box], 1, 1.0, -1, True)
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError):
        return None
    return ops if kept == [0] and pooled.shape == (1, 1, 1, 1) else None
