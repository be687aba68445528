"""Whole models against stored outputs of the original code: logits, stages, feature backbones."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_fill import fill, picture
from tolerances import MODEL, close

from natcupy.zoo import create_model

FOLDER = Path(__file__).parent / "goldens"
SEGMENTATION = ((1, 16, 1), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2, 1, 2, 1))
FILES = {  # file: (architecture, overrides)
    "nat_mini": ("nat_mini", {}),
    "nat_mini_hot": ("nat_mini", {}),
    "nat_small": ("nat_small", {}),
    "dinat_mini": ("dinat_mini", {}),
    "dinat_s_tiny": ("dinat_s_tiny", {}),
    "dinat_isotropic_small": ("dinat_isotropic_small", {}),
    "backbone_nat_mini": ("nat_mini", {"features_only": True}),
    "backbone_dinat_mini_seg": (
        "dinat_mini",
        {"features_only": True, "dilations": SEGMENTATION},
    ),
}


@lru_cache(maxsize=1)
def golden(file):
    with np.load(FOLDER / f"{file}.npz") as stored:
        return dict(stored)


@lru_cache(maxsize=1)
def filled(file):
    name, overrides = FILES[file]
    return fill(create_model(name, **overrides), hot=file.endswith("_hot")).eval()


def cases():
    """Every stored case in float32, the smallest of each file in float64 too."""
    for file in FILES:
        with np.load(FOLDER / f"{file}.npz") as stored:
            shapes = {k[0]: stored[k] for k in stored if k.endswith("_input_shape")}
        smallest = min(shapes, key=lambda case: shapes[case].prod())
        yield from (pytest.param(file, c, torch.float32, id=f"{file}-{c}") for c in shapes)
        yield pytest.param(file, smallest, torch.float64, id=f"{file}-{smallest}-float64")


def run(model, x):
    """Name of every stored map and the model's value for it; logits last, if any."""
    if model.config.out_indices is not None:
        return {f"out{i}": m for i, m in enumerate(model(x))}, None
    features, maps = model.forward_intermediates(x, output_fmt="NHWC")
    names = "stage{}" if len(maps) == 4 else "layer{}"
    first = 1 if len(maps) == 4 else 0
    named = {names.format(i): m for i, m in enumerate(maps, first)}
    logits = model.forward_head(features)
    assert torch.equal(logits, model(x))
    return {"embed": model.patch_embed(x), **named}, logits


@pytest.mark.parametrize(("file", "case", "dtype"), list(cases()))
def test_golden(file, case, dtype):
    stored, model = golden(file), filled(file).to(dtype)
    x = picture(stored[f"{case}_input_shape"]).to(dtype)
    with torch.no_grad():
        maps, logits = run(model, x)
    model.float()
    names = [name for name in maps if f"{case}_{name}_shape" in stored]
    assert len(names) >= 4
    for name in names:
        assert tuple(maps[name].shape) == tuple(stored[f"{case}_{name}_shape"])
    if dtype == torch.float64:
        for name in names:
            compare_exactly(maps[name], stored, f"{case}_{name}")
    if logits is None:
        true = {name: torch.from_numpy(stored[f"{case}_{name}_sample64"]) for name in names}
        got = {name: sample(maps[name]) for name in names}
    else:
        true, got = {"logits": torch.from_numpy(stored[f"{case}_logits_f64"])}, {"logits": logits}
    # Maps were stored in float32, which bounds how near a float64 run can come to them.
    bound = MODEL[dtype if logits is not None else torch.float32]
    for name in got:
        worst = (got[name].double() - true[name]).abs().max().item()
        assert worst <= bound, f"{name} differs by {worst:.3g}, more than {bound:.3g}"


def sample(value):
    flat = value.reshape(-1)
    return flat[np.linspace(0, flat.numel() - 1, 64).astype(np.int64)]


def compare_exactly(value, stored, name):
    """A map against its stored sums in float64 and its stored samples, which are float32."""
    flat = value.reshape(-1)
    stats = torch.stack([flat.sum(), flat.abs().sum(), flat.square().sum().sqrt()])
    close(stats, torch.from_numpy(stored[f"{name}_stats"]), torch.float64, f"{name} stats")
    close(sample(value), torch.from_numpy(stored[f"{name}_sample64"]), torch.float32, name)


def test_the_fill_tells_a_wrong_bias_from_a_right_one():
    """The stored outputs would notice a bias table read the wrong way round."""
    model, stored = filled("nat_mini_hot"), golden("nat_mini_hot")
    x = picture(stored["c_input_shape"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".rpb"):
                parameter.copy_(parameter.transpose(1, 2).clone())
        error = (model(x).double() - torch.from_numpy(stored["c_logits_f64"])).abs().max()
    filled.cache_clear()
    assert error > 1000 * MODEL[torch.float32]
