"""Other libraries beside a CPU build of torch: torchvision's operators do not load there.

In: nothing. Out: the import of timm or transformers, or a skip that says why. Declaring the
schemas of two operators is enough for the Python parts of torchvision, which is all that is used.
"""

import importlib

import pytest
import torch

_SCHEMAS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip
_library = []


def library(name):
    """Import a library, or skip the module."""
    if not _library and not hasattr(torch.ops.torchvision, "nms"):
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            fragment.define(schema)
        _library.append(fragment)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not here ({error}): pip install 'natcupy[{name}]'",
                    allow_module_level=True)  # fmt: skip
