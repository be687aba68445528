"""Boxes, anchors, suppression, RoIAlign and mask pasting against plain loops."""

import os
import subprocess
import sys
from pathlib import Path

import dense_oracles as slow
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import close

from natcupy.zoo.dense import nms as nms_room
from natcupy.zoo.dense import roi_align as roi_room
from natcupy.zoo.dense.anchors import grid_anchors, inside
from natcupy.zoo.dense.boxes import decode, encode, giou, iou_matrix
from natcupy.zoo.dense.detections import paste_mask
from natcupy.zoo.dense.nms import nms
from natcupy.zoo.dense.roi_align import pool_regions, region_levels, roi_align
from natcupy.zoo.dense.torchvision_ops import torchvision_ops


@pytest.fixture(params=["plain", "torchvision"])
def operators(request, monkeypatch):
    """Both ways to run NMS and RoIAlign; torchvision's only where it works."""
    if request.param == "plain":
        for room in (nms_room, roi_room):
            monkeypatch.setattr(room, "torchvision_ops", lambda device: None)
    elif torchvision_ops(torch.device("cpu")) is None:
        pytest.skip("torchvision is not installed or does not fit this torch")


def test_torchvision_is_asked_for_every_kind_of_device():
    assert torchvision_ops(torch.device("meta")) is None  # has none of the two operators' results


def test_a_torchvision_that_fails_to_load_is_no_obstacle_to_compiling(tmp_path):
    """One for another torch raises on import, which dynamo cannot trace."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    text = """
import torch
from natcupy.zoo.dense.nms import nms
boxes, scores = torch.rand(20, 4).sort().values, torch.rand(20)
compiled = torch.compile(lambda *x: nms(*x, 0.5), backend="eager")
assert torch.equal(compiled(boxes, scores), nms(boxes, scores, 0.5))
"""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def random_boxes(rng, count, width, height, dtype=torch.float64):
    corners = rng.uniform(-0.1, 1.1, (count, 2, 2)) * [width, height]
    low, high = corners.min(1), corners.max(1)
    return torch.from_numpy(np.concatenate([low, high], 1)).to(dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 60, 333])
@pytest.mark.parametrize("grouped", [False, True])
def test_nms(operators, count, grouped, monkeypatch):
    monkeypatch.setattr(nms_room, "BLOCK", 50)  # so that several blocks meet
    rng = np.random.default_rng(count)
    boxes = random_boxes(rng, count, 40, 40)
    scores = torch.from_numpy(rng.permutation(count) / 400)
    groups = torch.from_numpy(rng.integers(0, 4, count)) if grouped else None
    for threshold in (0.1, 0.5, 0.9):
        kept = nms(boxes, scores, threshold, groups)
        assert kept.tolist() == slow.greedy_nms(
            boxes.tolist(), scores.tolist(), threshold, None if groups is None else groups.tolist()
        )


def test_nms_of_a_chain_and_of_equals(operators):
    """Each box suppresses only its next neighbour, so every second one stays; equals keep one."""
    left = torch.arange(200, dtype=torch.float64) * 0.5
    boxes = torch.stack([left, 0 * left, left + 1.5, 0 * left + 1], dim=1)
    scores = torch.linspace(1, 0, 200, dtype=torch.float64)
    assert nms(boxes, scores, 0.45).tolist() == list(range(0, 200, 2))
    same = boxes[:1].expand(50, 4).contiguous()
    assert nms(same, torch.ones(50, dtype=torch.float64), 0.5).numel() == 1


def test_nms_of_boxes_without_area(operators):
    boxes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 2, 2]])
    assert sorted(nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("side", "scale"), [(7, 0.25), (3, 1.0), (1, 0.5), (14, 0.125)])
def test_roi_align(operators, dtype, side, scale):
    rng = np.random.default_rng(side)
    maps = torch.from_numpy(rng.standard_normal((2, 2, 17, 23)))
    # to eighths of a pixel, which float32 holds exactly
    boxes = (random_boxes(rng, 12, 23 / scale, 17 / scale) * 8).round() / 8
    boxes[0] = torch.tensor([3.0, 3.0, 3.0, 9.0])  # no width
    boxes[1] = torch.tensor([-900.0, 2.0, -800.0, 9.0])  # far outside
    boxes[2] = torch.tensor([0.0, 0.0, 23 / scale, 17 / scale])  # everything
    rois = torch.cat([torch.from_numpy(rng.integers(0, 2, (12, 1))).double(), boxes], 1)
    true = torch.from_numpy(slow.roi_align(maps.numpy(), rois.tolist(), side, scale))
    pooled = roi_align(maps.to(dtype), rois.to(dtype), side, scale)
    assert pooled.dtype == dtype
    close(pooled, true, dtype)


def test_roi_align_in_chunks_and_of_nothing(monkeypatch):
    monkeypatch.setattr(roi_room, "torchvision_ops", lambda device: None)
    rng = np.random.default_rng(5)
    maps = torch.from_numpy(rng.standard_normal((1, 3, 30, 30)))
    rois = torch.cat([torch.zeros(40, 1).double(), random_boxes(rng, 40, 30, 30)], 1)
    whole = roi_align(maps, rois, 4, 1.0)
    monkeypatch.setattr(roi_room, "CHUNK_ELEMENTS", 600)
    assert torch.equal(roi_align(maps, rois, 4, 1.0), whole)
    assert roi_align(maps, rois[:0], 4, 1.0).shape == (0, 3, 4, 4)


def test_roi_align_gradient(operators):
    rng = np.random.default_rng(6)
    maps = torch.from_numpy(rng.standard_normal((1, 1, 6, 7))).requires_grad_()
    rois = torch.tensor([[0, 1.2, 0.7, 6.1, 5.3], [0, -1.0, 2.0, 9.0, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, 3, 1.0), maps)


def test_pooling_takes_each_region_from_its_level():
    """sqrt(area) below 112 is level 0, then one level per doubling; the last takes the rest."""
    sides = torch.tensor([1.0, 111.9, 112.1, 223.9, 224.1, 447.9, 448.1, 5000.0])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert region_levels(boxes, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert region_levels(boxes, 2).tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    maps = [torch.full((2, 1, 64 >> i, 64 >> i), float(i)) for i in range(4)]
    small = torch.tensor([[20.0, 20.0, 60.0, 60.0]])
    large = torch.tensor([[0.0, 0.0, 230.0, 230.0], [10.0, 10.0, 50.0, 50.0]])
    pooled = pool_regions(maps, (4, 8, 16, 32), [small, large], 2)
    assert pooled.amax(dim=(1, 2, 3)).tolist() == [0.0, 2.0, 0.0]
    assert pool_regions(maps, (4, 8, 16, 32), [small[:0], small[:0]], 2).shape == (0, 1, 2, 2)


def test_overlaps():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 9, 20, 20), random_boxes(rng, 6, 20, 20)
    true = torch.tensor([[slow.overlap(p, q) for q in b.tolist()] for p in a.tolist()])
    close(iou_matrix(a, b), true.double(), torch.float32)
    # far apart: as much below zero as the hull is empty
    one, two = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[3.0, 0, 4, 1]])
    assert giou(one, two).item() == pytest.approx(-0.5)
    assert giou(one, one).item() == pytest.approx(1.0)
    assert giou(one, torch.tensor([[0.0, 0, 2, 1]])).item() == pytest.approx(0.5)


def test_coding():
    rng = np.random.default_rng(2)
    reference, shift = random_boxes(rng, 20, 90, 60), random_boxes(rng, 20, 3, 2)
    boxes = torch.cat([reference[:, :2] - shift[:, :2], reference[:, 2:] + shift[:, 2:] + 4], 1)
    stds = (0.1, 0.1, 0.2, 0.2)
    deltas = encode(reference, boxes, stds)
    close(decode(reference, deltas, stds)[:, 0], boxes, torch.float64)
    wild = torch.from_numpy(rng.standard_normal((20, 12)) * 9)
    ours = decode(reference, wild, stds, (60, 90))
    true = [
        [slow.decode(r, d[4 * k : 4 * k + 4], stds, (60, 90)) for k in range(3)]
        for r, d in zip(reference.tolist(), wild.tolist(), strict=True)
    ]
    close(ours, torch.tensor(true, dtype=torch.float64), torch.float64)
    assert ours.min() >= 0 and ours[..., 0::2].max() <= 90 and ours[..., 1::2].max() <= 60


def test_decoding_bounds_growth_and_shrinking():
    reference = torch.tensor([[0.0, 0.0, 16.0, 16.0]], dtype=torch.float64)
    deltas = torch.tensor([[0.0, 0.0, 99.0, -99.0]], dtype=torch.float64)
    box = decode(reference, deltas, (1, 1, 1, 1))[0, 0]
    assert (box[2] - box[0]).item() == pytest.approx(1000)
    assert (box[3] - box[1]).item() == pytest.approx(0.256)


def test_grid_of_anchors():
    anchors = grid_anchors((2, 3), 8, torch.zeros(1, dtype=torch.float64)).reshape(2, 3, 3, 4)
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    for row in range(2):
        for column in range(3):
            assert centres[row, column].tolist() == [[column * 8, row * 8]] * 3
    width, height = (anchors[..., 2:] - anchors[..., :2]).unbind(-1)
    assert torch.allclose(height / width, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    assert torch.allclose(height * width, torch.tensor(64.0**2, dtype=torch.float64))


def test_anchors_beyond_a_picture_of_a_batch():
    flags = inside((4, 4), 8, (17, 32), torch.device("cpu")).reshape(4, 4, 3)
    assert flags[:3].all() and not flags[3].any()


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(*[st.floats(-6, 26, width=16)] * 2),
    st.tuples(*[st.floats(0.25, 30, width=16)] * 2),
    st.integers(0, 2**16),
)
def test_pasting(corner, extent, seed):
    small = np.random.default_rng(seed).random((5, 5)).astype(np.float32)
    box = [corner[0], corner[1], corner[0] + extent[0], corner[1] + extent[1]]
    pasted = paste_mask(torch.from_numpy(small), torch.tensor(box), (21, 19)).numpy()
    near = [slow.paste(small + shift, box, (21, 19)) for shift in (-1e-4, 1e-4)]
    assert (pasted >= near[0]).all() and (pasted <= near[1]).all()


def test_pasting_boxes_without_area_or_outside():
    small = torch.ones(5, 5)
    for box in ([3.0, 3, 3, 9], [40, 40, 50, 50], [-9, -9, -5, -5], [0, 0, 0, 0]):
        assert paste_mask(small, torch.tensor(box), (20, 20)).shape == (20, 20)
    assert not paste_mask(small, torch.tensor([40.0, 40, 50, 50]), (20, 20)).any()
    assert paste_mask(small, torch.tensor([-5.0, -5, 50, 50]), (20, 20)).all()
