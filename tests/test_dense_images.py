"""Test-time pictures: sizes, exact rounding, normalising, padding, many kinds of input; names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from natcupy.zoo.dense import names
from natcupy.zoo.dense.anchors import base_anchors
from natcupy.zoo.dense.images import Recipe, read_pixels, resize_bytes, resize_pixels

STORED = np.load(Path(__file__).parent / "goldens" / "opencv_linear.npz")


@pytest.mark.parametrize("number", range(len(STORED.files)), ids=STORED.files)
def test_bytes_are_resized_as_opencv_does(number):
    """Outputs of OpenCV 4.5.5, stored; the inputs come from seeds."""
    true = STORED[STORED.files[number]]
    size = [int(n) for n in STORED.files[number].split("_")[0].split("x")]
    generator = np.random.Generator(np.random.PCG64(100 + number))
    pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resize_bytes(torch.from_numpy(pixels), true.shape[:2])
    assert np.array_equal(ours.numpy(), true)


def test_floats_are_resized_without_rounding():
    pixels = torch.rand(9, 14, 3) * 255
    true = F.interpolate(pixels.permute(2, 0, 1)[None], (20, 11), mode="bilinear")[0]
    assert torch.equal(resize_pixels(pixels, (20, 11)), true.permute(1, 2, 0))


@pytest.mark.parametrize(
    ("recipe", "size", "target"),
    [
        (Recipe.for_task("detection"), (480, 640), (800, 1067)),
        (Recipe.for_task("detection"), (640, 480), (1067, 800)),
        (Recipe.for_task("detection"), (300, 1000), (400, 1333)),
        (Recipe.for_task("segmentation"), (512, 683), (512, 683)),
        (Recipe.for_task("segmentation"), (300, 2000), (307, 2048)),
        (Recipe.for_task("segmentation").scaled(0.75), (600, 800), (384, 512)),
        (Recipe.for_task("segmentation").scaled(1.75), (600, 800), (896, 1195)),
        (Recipe.for_task("detection"), (3000, 4000), (800, 1067)),
        (Recipe.for_task("detection"), (1, 1), (800, 800)),
        (Recipe.for_task("segmentation"), (1, 10000), (1, 2048)),
    ],
)
def test_sizes(recipe, size, target):
    assert recipe.target_size(*size) == target


def test_prepared_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8)
    prepared = Recipe(70, 70, pad_divisor=32).prepare(pixels)
    assert prepared.pixels.shape == (1, 3, 64, 96)
    assert (prepared.frame.size, prepared.frame.original_size) == ((48, 70), (48, 70))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    true = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)
    assert torch.allclose(prepared.pixels[0, :, :48, :70].double(), true, atol=1e-6)
    assert prepared.pixels[0, :, 48:].eq(0).all() and prepared.pixels[0, :, :, 70:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8)
    expected = Recipe(70, 70).prepare(pixels).pixels, base_anchors(32)
    torch.set_default_dtype(dtype)
    try:
        found = Recipe(70, 70).prepare(pixels).pixels, base_anchors(32)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, true in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, true)


def test_a_frame_leads_back():
    frame = Recipe(1333, 800).prepare(np.zeros((480, 640, 3), np.uint8)).frame
    assert frame.scale == (1067 / 640, 800 / 480, 1067 / 640, 800 / 480)


def test_kinds_of_pictures(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kinds = (
        pixels,
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        Image.fromarray(pixels),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    )
    for kind in kinds:
        assert np.array_equal(read_pixels(kind).numpy(), pixels)
    floats = read_pixels(pixels.astype(np.float32) / 255)
    assert floats.dtype == torch.float32 and np.allclose(floats.numpy(), pixels, atol=1e-3)
    assert read_pixels(pixels[..., 0]).shape == (9, 7, 3)


def test_bad_pictures(tmp_path):
    recipe = Recipe(64, 64)
    with pytest.raises(TypeError):
        recipe.prepare(None)
    with pytest.raises(OSError):
        recipe.prepare(tmp_path / "missing.png")
    with pytest.raises(ValueError):
        recipe.prepare(np.zeros((0, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="crop it first"):
        Recipe(65536, 65536).prepare(np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    "numbers",
    [
        {"long_side": 0, "short_side": 5},
        {"long_side": 5, "short_side": 2.5},
        {"long_side": 5, "short_side": 5, "std": (1.0, 0.0, 1.0)},
        {"long_side": 5, "short_side": 5, "mean": (1.0,)},
        {"long_side": 5, "short_side": 5, "mean": (1.0, float("nan"), 2.0)},
    ],
)
def test_bad_recipes(numbers):
    with pytest.raises(ValueError):
        Recipe(**numbers)


def test_recipe_round_trip():
    recipe = Recipe(70, 60, pad_divisor=8)
    assert Recipe.from_pretrained_cfg(recipe.to_dict(), "detection") == recipe
    assert Recipe.from_pretrained_cfg({}, "detection") == Recipe.for_task("detection")


def test_names():
    assert len(set(names.COCO)) == 80 and len(names.ADE20K) == 150
    assert names.COCO[0] == "person" and names.COCO[-1] == "toothbrush"
    assert (names.ADE20K[0], names.ADE20K[149]) == ("wall", "flag")
    assert len(names.COCO_IDS) == 80 and (names.COCO_IDS[11], names.COCO_IDS[79]) == (13, 90)
    assert len(names.ADE20K_PALETTE) == 150 and names.ADE20K_PALETTE[2] == (6, 230, 230)
    assert len(set(names.palette(90))) == 90
