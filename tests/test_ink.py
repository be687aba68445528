"""The preprocessing mode "ink": however it was drawn, the same drawing comes out."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from natcupy.zoo import Preprocess
from natcupy.zoo.ink import MARGIN, ink, opaque

SIZE = (32, 32)


def drawing(fg=0, bg=255, side=200, at=(60, 40), high=100, width=10, mode="L"):
    """A seven, `high` pixels tall."""
    sheet = Image.new(mode, (side, side), bg)
    x, y = at
    wide = high * 0.6
    ImageDraw.Draw(sheet).line(
        [(x, y), (x + wide, y), (x + wide / 2, y + high)], fill=fg, width=width, joint="curve"
    )
    return sheet


def values(image):
    return np.asarray(ink(image, SIZE), dtype=float) / 255


REFERENCE = drawing()
ALIKE = {
    "bright on black": drawing(255, 0),
    "grey on grey": drawing(100, 140),
    "red on green of the same brightness": drawing((150, 0, 0), (0, 77, 0), mode="RGB"),
    "transparent, black": drawing((0, 0, 0, 255), (0, 0, 0, 0), mode="RGBA"),
    "transparent, white": drawing((255, 255, 255, 255), (255, 255, 255, 0), mode="RGBA"),
    "grey with transparency": drawing((0, 255), (0, 0), mode="LA"),
    "palette": drawing().convert("P"),
    "bits": drawing().convert("1"),
    "CMYK": drawing((0, 0, 0, 255), (0, 0, 0, 0), mode="CMYK"),
    "16 bits": drawing(0, 65535, mode="I;16"),
    "32 bits": drawing(0, 1000, mode="I"),
    "floats": drawing(0.0, 1.0, mode="F"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_ground_colour_and_mode_do_not_matter(name):
    assert np.abs(values(ALIKE[name]) - values(REFERENCE)).mean() < 0.02


@pytest.mark.parametrize(
    "moved", [drawing(at=(120, 90)), drawing(at=(3, 5)), drawing(side=900, at=(700, 30))]
)
def test_the_place_does_not_matter(moved):
    """But for the fraction of a pixel by which the frame is found differently."""
    assert np.abs(values(moved) - values(REFERENCE)).mean() < 0.05


@pytest.mark.parametrize("zoom", [0.2, 0.5, 2, 4])
def test_size_does_not_matter(zoom):
    size = tuple(round(200 * zoom) for _ in range(2))
    scaled = REFERENCE.resize(size, Image.Resampling.LANCZOS)
    assert np.abs(values(scaled) - values(REFERENCE)).mean() < 0.05


def test_the_drawing_is_centred_with_its_margin_and_proportions():
    found = values(REFERENCE) > 0.3
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert abs(height - 32 * (1 - 2 * MARGIN)) <= 2
    assert abs(width / height - (60 + 10) / (100 + 10)) < 0.1
    assert abs(rows.mean() - 15.5) <= 1 and abs((columns[0] + columns[-1]) / 2 - 15.5) <= 1


def test_noise_and_specks_do_not_move_the_frame():
    rng = np.random.default_rng(0)
    noisy = np.asarray(REFERENCE) + rng.normal(0, 12, (200, 200))
    noisy[5:8, 190:193] = 0  # a speck of dust
    noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    assert np.abs(values(noisy) - values(REFERENCE)).mean() < 0.04


def test_a_hairline_keeps_its_strength():
    thin = values(drawing(side=1200, at=(100, 100), high=900, width=1))
    assert np.quantile(thin, 0.97) > 0.5


def test_parts_that_do_not_touch_stay():
    sheet = Image.new("L", (100, 100), 255)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((20, 20, 30, 80), fill=0)
    pen.rectangle((70, 20, 80, 80), fill=0)
    found = values(sheet) > 0.5
    assert found[:, :10].any() and found[:, -10:].any()


def test_other_shapes_of_frames():
    assert ink(REFERENCE, (40, 24)).size == (24, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 20)])
def test_a_blank_picture_is_refused(size):
    with pytest.raises(ValueError, match="must be something drawn"):
        ink(Image.new("RGB", size, (10, 200, 30)), SIZE)


def test_nothing_is_shown_through_full_transparency():
    with pytest.raises(ValueError, match="must be something drawn"):
        ink(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), SIZE)


def test_opaque_keeps_what_was_opaque():
    assert opaque(REFERENCE).tobytes() == REFERENCE.tobytes()


def test_it_is_a_mode_of_preprocess():
    recipe = Preprocess((1, 32, 32), mean=(0.2,), std=(0.35,), crop_mode="ink")
    out = recipe(REFERENCE)
    expected = (np.asarray(ink(REFERENCE, SIZE), dtype=np.float32) / 255 - 0.2) / 0.35
    np.testing.assert_allclose(out[0, 0].numpy(), expected, rtol=1e-6, atol=1e-6)
    array = np.asarray(REFERENCE.convert("RGB"))
    assert recipe(array).equal(out)
