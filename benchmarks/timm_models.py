"""timm's models beside natcupy's.

In: a name. Out: the model with random weights, or why there is none.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

# torchvision's own library of operators does not load beside a CPU build of torch. Its Python
# parts, all that timm's models need, want these two declared.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []


def create(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module | str:
    """The model, or one line that says why it cannot be made."""
    if not _library and not hasattr(torch.ops.torchvision, "nms"):
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            fragment.define(schema)
        _library.append(fragment)
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        return f"timm cannot be imported: {error}"
    torch.manual_seed(0)
    return timm.create_model(name).to(device, dtype)
