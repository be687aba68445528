"""Small models of each family of the zoo, and pictures, for the tests of what models do."""

import pytest
import torch

from natcupy.zoo import create_model

SMALL = {"embed_dim": 32, "depths": (1, 2, 1, 2), "num_heads": (1, 2, 4, 8), "kernel_size": 3}
FLAT = {"embed_dim": 64, "depths": (3,), "num_heads": (2,), "img_size": 64}
FAMILIES = {
    "nat": ("nat_mini", SMALL),
    "dinat": ("dinat_base", {**SMALL, "layer_scale": 0.5}),
    "dinat_s": ("dinat_s_tiny", SMALL),
    "isotropic": ("dinat_isotropic_small", {**FLAT, "kernel_size": 2}),
    "vitrpb": ("vitrpb_small", FLAT),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
HIERARCHICAL = ["nat", "dinat", "dinat_s"]


def small(family, seed=0, **overrides):
    name, numbers = FAMILIES[family]
    torch.manual_seed(seed)
    return create_model(name, **{"num_classes": 5, **numbers, **overrides}).eval()


def pictures(*shape):
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(1))
