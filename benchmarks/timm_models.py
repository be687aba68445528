"""timm's models beside natcupy's.

In: a name. Out: the model with random weights, or why there is none.
"""

from __future__ import annotations

import importlib

import torch
from torch import nn

# A torchvision for another build of torch cannot load its library of operators. Its Python parts,
# all that timm's models need, want these two declared.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: list[torch.library.Library] = []


def mend_torchvision() -> None:
    """Let an installed torchvision be imported, also one whose operators do not load."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # the importer says so
    except RuntimeError:  # declared beside operators that do load, these would end the process
        if not _library and not hasattr(torch.ops.torchvision, "nms"):
            _library.append(torch.library.Library("torchvision", "FRAGMENT"))
            for schema in SCHEMAS:
                _library[0].define(schema)


def create(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module | str:
    """The model, or one line that says why it cannot be made."""
    mend_torchvision()
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        return f"timm cannot be imported: {error}"
    torch.manual_seed(0)
    return timm.create_model(name).to(device, dtype)
