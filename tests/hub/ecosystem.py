"""Other libraries beside any build of torch.

In: nothing. Out: timm or transformers, or a skip that says why.
"""

import importlib

import pytest

from benchmarks.timm_models import mend_torchvision


def library(name):
    """Import a library, or skip the module."""
    mend_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not here ({error}): pip install 'natcupy[{name}]'",
                    allow_module_level=True)  # fmt: skip
