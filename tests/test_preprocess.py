"""Pictures of every kind into tensors: the published recipe, EXIF, channels, bad input."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from natcupy.data import why
from natcupy.zoo import Preprocess, create_model
from natcupy.zoo.dense.images import read_pixels
from natcupy.zoo.preprocess import CROP_MODES, IMAGENET_MEAN, IMAGENET_STD, open_picture

PLAIN = {"mean": (0.0,), "std": (1.0,)}


def photo(width=320, height=200, channels=3, seed=0):
    """A smooth random picture, uint8 `[H, W, C]`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., c]) for c in range(channels)]
    return np.stack([np.asarray(b.resize((width, height), 2)) for b in bands], -1)


def levels(tensor):
    """`[1, C, H, W]` in 0..1 back to uint8 `[H, W, C]`."""
    return (tensor[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()


def small(**options):
    return Preprocess(input_size=(3, 32, 32), **{**PLAIN, **options})


# -- the recipe ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(320, 200), (200, 333), (256, 256), (90, 61)])
@pytest.mark.parametrize(("side", "crop_pct"), [(224, 0.875), (384, 1.0)])
def test_the_published_evaluation_recipe(width, height, side, crop_pct):
    """Shorter side to floor(side / crop_pct), bicubic; crop the centre; ImageNet mean and std."""
    picture = Image.fromarray(photo(width, height))
    shorter = int(side / crop_pct)
    long = int(shorter * max(width, height) / min(width, height))
    size = (shorter, long) if width <= height else (long, shorter)
    resized = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = (round((n - side) / 2.0) for n in resized.shape[:2])
    cropped = resized[top : top + side, left : left + side].astype(np.float64) / 255
    expected = (cropped - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    got = Preprocess((3, side, side), crop_pct)(picture)
    assert got.shape == (1, 3, side, side)
    assert got.dtype == torch.float32
    assert np.abs(got[0].movedim(0, -1).numpy() - expected).max() < 1e-6


def test_the_squash_recipe():
    picture = Image.fromarray(photo())
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(levels(small(crop_mode="squash")(picture)), expected)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "lanczos", "box", "hamming"])
def test_interpolations(name):
    picture = Image.fromarray(photo())
    expected = picture.resize((32, 32), Image.Resampling[name.upper()])
    got = small(crop_mode="squash", interpolation=name)(picture)
    assert np.array_equal(levels(got), np.asarray(expected))


def test_inputs_that_are_not_square():
    got = Preprocess((3, 48, 96), 0.75, **PLAIN)
    for width, height in ((300, 100), (100, 300), (128, 64)):
        assert got(photo(width, height)).shape == (1, 3, 48, 96)
    picture = Image.fromarray(photo(256, 128))  # the input's shape: the border goes
    resized = np.asarray(picture.resize((128, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(levels(got(picture)), resized[8:56, 16:112])


def test_modes_are_one_table():
    assert set(CROP_MODES) >= {"center", "squash"}
    for mode in CROP_MODES:
        assert small(crop_mode=mode)(photo()).shape == (1, 3, 32, 32)


def test_the_ink_recipe_frames_a_drawing_whatever_its_place():
    sheet = np.full((120, 160, 3), 250, np.uint8)
    sheet[20:60, 100:110] = (200, 30, 30)
    recipe = Preprocess((1, 32, 32), crop_mode="ink", **PLAIN)
    got = recipe(Image.fromarray(sheet))
    assert got.shape == (1, 1, 32, 32)
    assert got[0, 0, 0].max() == 0
    assert got[0, 0, 16, 16] > 0.9
    moved = np.roll(sheet, (30, -60), (0, 1))
    assert (recipe(moved) - got).abs().max() < 0.1
    assert (recipe(torch.from_numpy(moved).movedim(-1, 0)) - got).abs().max() < 0.1
    assert (recipe(moved.astype(np.float32) / 255) - got).abs().max() < 0.1


# -- kinds of pictures --------------------------------------------------------------------------


def test_every_kind_of_picture_gives_the_same(tmp_path):
    array, recipe = photo(), small()
    expected = recipe(Image.fromarray(array))
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    tensor = torch.from_numpy(array)
    for same in (path, str(path), array, tensor, tensor.movedim(-1, 0), array[::-1][::-1]):
        assert torch.equal(recipe(same), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_agree_with_bytes(dtype):
    array, recipe = photo(), small()
    expected = recipe(array)
    floats = (array / 255).astype(dtype)
    for same in (floats, torch.from_numpy(floats).movedim(-1, 0)):
        assert (recipe(same) - expected).abs().max() < 1.1 / 255
    half = torch.from_numpy(floats).to(torch.bfloat16)
    assert (recipe(half) - expected).abs().max() < 3 / 255


def test_floats_stay_in_range_after_bicubic():
    edge = np.zeros((40, 40), np.float32)
    edge[:, 20:] = 1
    got = small(crop_mode="squash")(edge)
    assert got.min() == 0
    assert got.max() == 1


def test_grey_colour_and_transparency():
    grey, colour = photo(channels=1)[..., 0], photo()
    rgb, one = small(), Preprocess((1, 32, 32), **PLAIN)
    assert torch.equal(rgb(grey), rgb(np.stack([grey] * 3, -1)))
    assert torch.equal(rgb(Image.fromarray(grey)), rgb(grey))
    assert torch.equal(one(grey), one(grey[..., None]))
    assert torch.equal(one(torch.from_numpy(grey)[None]), one(grey))
    expected = one(Image.fromarray(colour).convert("L"))
    for same in (colour, Image.fromarray(colour), (colour / 255).astype(np.float32)):
        assert (one(same) - expected).abs().max() < 1.1 / 255
    alpha = np.concatenate([colour, np.full_like(colour[..., :1], 9)], -1)
    for same in (alpha, Image.fromarray(alpha)):
        assert torch.equal(rgb(same), rgb(colour))
    assert Preprocess((4, 32, 32), **PLAIN)(Image.fromarray(alpha)).shape == (1, 4, 32, 32)


def test_palettes_black_and_white_and_sixteen_bits():
    colour, recipe = Image.fromarray(photo()), small()
    palette = colour.quantize(64)
    assert torch.equal(recipe(palette), recipe(palette.convert("RGB")))
    palette.info["transparency"] = bytes(range(64))
    assert torch.equal(recipe(palette), recipe(palette.convert("RGBA").convert("RGB")))
    bits = colour.convert("1")
    assert torch.equal(recipe(bits), recipe(bits.convert("RGB")))
    assert torch.equal(recipe(np.asarray(bits)), recipe(bits))
    grey = photo(channels=1)[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (recipe(deep) - recipe(grey)).abs().max() < 1.1 / 255
    floats = Image.fromarray((grey / 255).astype(np.float32))
    assert (recipe(floats) - recipe(grey)).abs().max() < 1.1 / 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Every EXIF orientation of one scene gives the scene."""
    scene = Image.fromarray(photo())
    transpose = Image.Transpose
    stored = {
        1: None, 2: transpose.FLIP_LEFT_RIGHT, 3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM, 5: transpose.TRANSPOSE, 6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE, 8: transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    turned = scene if stored is None else scene.transpose(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    with Image.open(file) as opened:
        assert torch.equal(small()(opened), small()(scene))


def with_exif(block):
    """A JPEG of a scene with such an EXIF block."""
    file = io.BytesIO()
    Image.fromarray(photo(40, 30)).save(file, "JPEG")
    whole, segment = file.getvalue(), b"Exif\0\0" + block
    length = (len(segment) + 2).to_bytes(2, "big")
    return io.BytesIO(whole[:2] + b"\xff\xe1" + length + segment + whole[2:])


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (b"garbage garbage garbage", (40, 30)),
        # orientation 6, and a number stored as text
        (
            b"II*\0\x08\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\1\2\0\2\0\0\0ab\0\0\0\0\0\0",
            (30, 40),
        ),
    ],
)
def test_damaged_exif_loses_no_picture(block, size):
    picture = open_picture(with_exif(block))
    assert picture.size == size
    with Image.open(with_exif(block)) as stored:
        assert torch.equal(small()(stored), small()(picture))


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>"""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "XMP"])
def test_a_picture_is_turned_once(kind):
    """What was turned when it was opened is not turned again by the recipe."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    if kind == "XMP":
        Image.fromarray(photo(40, 30)).save(file, "JPEG", xmp=XMP)
    else:
        Image.fromarray(photo(40, 30)).save(file, kind, exif=exif)
    picture = open_picture(file)
    assert picture.size == (30, 40)
    assert torch.equal(small()(picture), small()(np.asarray(picture)))


def test_torchs_default_device_moves_nothing():
    expected = small()(photo())
    with torch.device("meta"):
        assert torch.equal(small()(photo()), expected)


def test_many_channels():
    array = photo(channels=6)
    recipe = Preprocess((6, 32, 32), **PLAIN)
    assert recipe(array).shape == (1, 6, 32, 32)
    assert torch.equal(recipe(torch.from_numpy(array).movedim(-1, 0)), recipe(array))
    for channel in (0, 5):
        assert torch.equal(recipe(array)[:, channel], small()(array[..., channel])[:, 0])


# -- bad input ----------------------------------------------------------------------------------


def test_wrong_pictures():
    recipe = small()
    for kind in (None, 3, [[1, 2]], b"bytes"):
        with pytest.raises(TypeError, match="must be a path, a PIL picture, a NumPy array or a te"):
            recipe(kind)
    for shape in ((3,), (2, 3, 32, 32), (0, 5, 3), (5, 0)):
        with pytest.raises(ValueError, match=r"must be \[H, W\] or \[H, W, C\]"):
            recipe(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="must have 3 channels like the model, got 5"):
        recipe(np.zeros((8, 8, 5), np.uint8))
    with pytest.raises(TypeError, match=r"uint8 or floats in 0\.\.1, got int64"):
        recipe(np.zeros((8, 8, 3), np.int64))
    for wrong in (np.full((8, 8), 255.0), np.full((8, 8), -1.0), np.full((8, 8), np.nan)):
        with pytest.raises(ValueError, match=r"must hold values in 0\.\.1, got .* divide by 255"):
            recipe(wrong)
    with pytest.raises(ValueError, match=r"would be resized to .* crop it first"):
        recipe(np.zeros((1, 3_000_000), np.uint8))


def test_wrong_files(tmp_path):
    text = tmp_path / "not-a-picture.png"
    text.write_text("hello")
    with pytest.raises(OSError, match=r"not-a-picture\.png"):
        small()(text)
    with pytest.raises(FileNotFoundError, match="missing"):
        small()(tmp_path / "missing.png")


def test_wrong_files_are_told_as_on_the_command_line(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    for name, kind in (
        ("missing.png", FileNotFoundError),
        ("text.png", UnidentifiedImageError),
        ("empty.png", OSError),
        (".", OSError),
    ):
        path = tmp_path / name
        for look in (create_model("nat-digits").preprocess, read_pixels):
            with pytest.raises(kind) as caught:
                look(str(path))
            assert str(caught.value) == f"{path}: {why(caught.value)}."
            again = pickle.loads(pickle.dumps(caught.value))  # as workers hand it on
            assert str(again) == str(caught.value) and again.errno == caught.value.errno
    with pytest.raises(UnidentifiedImageError, match="BytesIO"):
        open_picture(io.BytesIO(b"hello"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_size": (3, 0, 32)}, "input_size must be three ints"),
        ({"input_size": (3, 32)}, "input_size must be three ints"),
        ({"input_size": (3, 32, True)}, "input_size must be three ints"),
        ({"crop_pct": 0}, "crop_pct must be in"),
        ({"crop_pct": float("nan")}, "crop_pct must be in"),
        ({"interpolation": "cubic"}, "interpolation must be one of .*'bicubic'.* got 'cubic'"),
        ({"crop_mode": "border"}, "crop_mode must be one of .*'center'.* got 'border'"),
        ({"mean": ()}, "mean must be a list of finite numbers"),
        ({"mean": 0.5}, "mean must be a list of finite numbers"),
        ({"std": (1, 1, float("inf"))}, "std must be a list of finite numbers"),
        ({"std": (1, 1, 0)}, "std must be above 0"),
    ],
)
def test_wrong_recipes(options, words):
    with pytest.raises(ValueError, match=words):
        Preprocess(**{"input_size": (3, 32, 32), **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(dtype):
    recipe = Preprocess(input_size=(3, 32, 32))
    expected = recipe(photo())
    torch.set_default_dtype(dtype)
    try:
        ours = recipe(photo())
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)


# -- on the model -------------------------------------------------------------------------------

NUMBERS = {"embed_dim": 32, "depths": (1,), "num_heads": (1,), "kernel_size": 3, "num_classes": 2}


def test_model_preprocess():
    model = create_model("nat_mini", **NUMBERS)
    x = model.preprocess(photo())
    assert torch.equal(x, Preprocess()(photo()))
    assert model.double().preprocess(photo()).dtype == torch.float64
    assert model(model.preprocess(photo())).shape == (1, 2)
    assert create_model("dinat_large_384", **NUMBERS).preprocess(photo()).shape[2:] == (384, 384)


def test_model_preprocess_follows_channels_and_size():
    grey = create_model("nat_mini", in_chans=1, **NUMBERS)
    x = grey.preprocess(photo())
    assert x.shape == (1, 1, 224, 224)
    raw = Preprocess((1, 224, 224), **PLAIN)(photo())
    expected = (raw - sum(IMAGENET_MEAN) / 3) / (sum(IMAGENET_STD) / 3)
    assert (x - expected).abs().max() < 1e-5
    fixed = create_model("nat_isotropic_small", **{**NUMBERS, "img_size": 96})
    assert fixed.preprocess(photo()).shape == (1, 3, 96, 96)
    assert fixed(fixed.preprocess(photo())).shape == (1, 2)


def test_model_preprocess_uses_the_config_of_its_weights():
    model = create_model("nat_mini", **NUMBERS)
    model.pretrained_cfg.update(
        input_size=(3, 32, 32), crop_mode="squash", mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1
    )
    recipe = Preprocess((3, 32, 32), 1.0, mean=(0.5,), std=(0.5,), crop_mode="squash")
    assert torch.equal(model.preprocess(photo()), recipe(photo()))
