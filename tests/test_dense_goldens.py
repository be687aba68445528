"""Whole dense models against stored outputs of the original heads: decoders, pyramids, heads."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_fill import picture
from golden_fill_dense import BOX_SEED, MASK_SEED, fill_dense, noise
from tolerances import MODEL, TOLERANCES, close

from natcupy.zoo.dense import create_dense_model
from natcupy.zoo.dense.anchors import base_anchors
from natcupy.zoo.dense.bbox_heads import BBoxHead

FOLDER = Path(__file__).parent / "goldens"
DTYPES = (torch.float32, torch.float64)
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@lru_cache
def golden(file):
    with np.load(FOLDER / f"{file}.npz") as stored:
        return dict(stored)


@lru_cache(maxsize=1)
def filled(file):
    return fill_dense(create_dense_model(file)).eval()


def compare(value, name, stored, dtype):
    """A tensor against its stored shape, sums and samples (which were stored in float32)."""
    assert tuple(value.shape) == tuple(stored[f"{name}_shape"])
    flat = value.reshape(-1)
    at = np.linspace(0, flat.numel() - 1, 64).astype(np.int64)
    sums = torch.stack([flat.abs().sum(), flat.square().sum().sqrt()]).double()
    samples = torch.from_numpy(stored[f"{name}_sample64"])
    if dtype == torch.float64:
        close(flat[at], samples, torch.float32, name)
    worst = (flat[at].double() - samples).abs().max().item()
    assert worst <= MODEL[torch.float32], f"{name} differs by {worst:.3g}"
    true = torch.from_numpy(stored[f"{name}_stats"])[1:]
    worst = ((sums - true).abs() / true).max().item()
    assert worst <= TOLERANCES[dtype][0], f"{name}: sums differ by {worst:.3g}"


@pytest.mark.parametrize(
    ("case", "dtype"), [("a", torch.float32), ("b", torch.float32), ("b", torch.float64)]
)
def test_upernet(case, dtype):
    stored, model = golden("upernet_nat_mini"), filled("upernet_nat_mini").to(dtype)
    x = picture(stored[f"{case}_input_shape"]).to(dtype)
    with torch.no_grad():
        maps = model.backbone(x)
        compare(model.decode_head(maps), f"{case}_decode", stored, dtype)
        compare(model.auxiliary_head(maps[2]), f"{case}_aux", stored, dtype)
        compare(model(x), f"{case}_logits_fullres", stored, dtype)
    model.float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_rcnn(dtype):
    stored, model = golden("mask_rcnn_nat_mini"), filled("mask_rcnn_nat_mini").to(dtype)
    x = picture(stored["a_input_shape"]).to(dtype)
    with torch.no_grad():
        maps = model.pyramid(x)
        logits, deltas = model.rpn_head(maps)
        for level in range(5):
            compare(maps[level], f"a_fpn{level}", stored, dtype)
            compare(logits[level], f"a_rpn_cls{level}", stored, dtype)
            compare(deltas[level], f"a_rpn_reg{level}", stored, dtype)
        logits, deltas = model.roi_head.bbox_head(noise(BOX_SEED, 8, 256, 7, 7).to(dtype))
        compare(logits, "bbox0_cls", stored, dtype)
        compare(deltas, "bbox0_reg", stored, dtype)
        masks = model.roi_head.mask_head(noise(MASK_SEED, 4, 256, 14, 14).to(dtype))
        compare(masks, "mask0", stored, dtype)
    model.float()


def test_base_anchors():
    stored = torch.from_numpy(golden("mask_rcnn_nat_mini")["base_anchors"])
    ours = torch.stack([base_anchors(stride) for stride in (4, 8, 16, 32, 64)])
    assert torch.equal(ours.to(stored.dtype), stored)


def by_hand(x, state):
    """The cascade's box head, written out from its checkpoint's tensors."""
    for number in range(4):
        x = F.conv2d(x, state[f"shared_convs.{number}.conv.weight"], padding=1)
        bn = {k: state[f"shared_convs.{number}.bn.{k}"][:, None, None] for k in BATCH_NORM}
        x = (x - bn["running_mean"]) / (bn["running_var"] + 1e-5).sqrt() * bn["weight"] + bn["bias"]
        x = x.clamp(min=0)
    x = x.reshape(len(x), -1)  # channels, then rows, then columns
    x = (x @ state["shared_fcs.0.weight"].T + state["shared_fcs.0.bias"]).clamp(min=0)
    return [x @ state[f"{name}.weight"].T + state[f"{name}.bias"] for name in ("fc_cls", "fc_reg")]


def test_cascade_heads():
    """No stored outputs: the heads against the description, at the released sizes."""
    head = fill_dense(BBoxHead(256, 1024, 1, 4, 80, (0.033, 0.033, 0.067, 0.067))).double().eval()
    x = noise(BOX_SEED, 8, 256, 7, 7).double()
    with torch.no_grad():
        ours = head(x)
    assert [tuple(each.shape) for each in ours] == [(8, 81), (8, 320)]
    for each, true in zip(ours, by_hand(x, head.state_dict()), strict=True):
        assert true.abs().max() > 0.1
        close(each, true, torch.float64)
