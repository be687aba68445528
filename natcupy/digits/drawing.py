"""Pictures of one digit, drawn in the many ways programs draw: strokes, fonts, displays, outlines.

In: a digit and a random generator. Out: a picture "L", bright ink on black, `SHEET` pixels square.
Every function draws from its generator in a fixed order: the same seed gives the same pictures.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from natcupy.digits.strokes import (
    DOTS,
    FORMS,
    PLOTTER,
    SEGMENT_LINES,
    SEGMENTS,
    Form,
    write,
)

SHEET = 128
CENTRE = SHEET / 2


def strokes(digit: int, rng: np.random.Generator) -> Image.Image:
    """Written with a round pen in one of the digit's forms, curved or cornered."""
    form = FORMS[digit][rng.integers(len(FORMS[digit]))]
    coarse = int(rng.choice([0, 0, 2, 3]))
    return _pen(form, rng, jitter=rng.uniform(0.0, 0.045), coarse=coarse)


def plotter(digit: int, rng: np.random.Generator) -> Image.Image:
    """Straight lines only, shaky: a way of drawing kept for the examination."""
    return _pen(PLOTTER[digit], rng, jitter=rng.uniform(0.01, 0.035), coarse=1)


def nib(digit: int, rng: np.random.Generator) -> Image.Image:
    """Written with a broad nib: thick and thin by direction, as in serif typefaces."""
    form = FORMS[digit][rng.integers(len(FORMS[digit]))]
    paths = _laid_out(write(form, rng, rng.uniform(0.0, 0.03)), rng)
    breadth, angle = rng.uniform(4, 14), rng.uniform(-0.4, 1.2)
    thin = rng.uniform(1.5, 4.0)
    sheet = Image.new("L", (SHEET, SHEET))
    pen = ImageDraw.Draw(sheet)
    for offset in np.linspace(-0.5, 0.5, int(breadth / thin * 2) + 2):
        shift = breadth * offset * np.array([np.cos(angle), -np.sin(angle)])
        for path in paths:
            _line(pen, path + shift, thin)
    return sheet


def segments(digit: int, rng: np.random.Generator) -> Image.Image:
    """A seven-segment display: bars with or without gaps, upright or slanted."""
    lit = SEGMENTS[digit][rng.integers(len(SEGMENTS[digit]))]
    gap = max(rng.uniform(-0.06, 0.12), 0.0)
    slant = max(rng.uniform(-0.1, 0.15), 0.0)
    high = rng.uniform(70, 90)
    wide = high * rng.uniform(0.4, 0.9)
    thick = _width(rng, 1.5, 16.0)
    pointed = rng.random() < 0.5
    sheet = Image.new("L", (SHEET, SHEET))
    pen = ImageDraw.Draw(sheet)
    for name in lit:
        line = np.asarray(SEGMENT_LINES[name])
        middle = line.mean(axis=0)
        line = middle + (line - middle) * (1 - 2 * gap)
        line = (line - 0.5) * (wide, high) + CENTRE
        line[:, 0] -= slant * (line[:, 1] - CENTRE)
        if pointed:
            _line(pen, line, thick)
        else:
            pen.line([tuple(p) for p in line], fill=255, width=max(round(thick), 1))
    return sheet


def dots(digit: int, rng: np.random.Generator) -> Image.Image:
    """Five by seven dots, as squares that touch or as round dots that do not quite."""
    rows = bytes.fromhex(DOTS[digit][rng.integers(len(DOTS[digit]))])
    step = rng.uniform(9, 13)
    wide = step * rng.uniform(0.75, 1.2)
    fill = rng.uniform(0.7, 1.0) if rng.random() < 0.5 else 1.0
    round_dots = rng.random() < 0.5 and fill < 1
    sheet = Image.new("L", (SHEET, SHEET))
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x in range(5):
            if not row >> (4 - x) & 1:
                continue
            at = np.array([CENTRE + (x - 2.5) * wide, CENTRE + (y - 3.5) * step])
            box = (*(at + 0.5 * (1 - fill)), at[0] + wide * fill, at[1] + step * fill)
            (pen.ellipse if round_dots else pen.rectangle)(box, fill=255)
    return sheet


def typeset(digit: int, rng: np.random.Generator, fonts: tuple[str, ...]) -> Image.Image:
    """Set in one of the fonts, light to bold, now and then as an outline.

    A font is a path; `path#1d7e2` starts counting at that character instead of the plain zero.
    """
    path, _, first = fonts[rng.integers(len(fonts))].partition("#")
    font = _font(path, int(rng.integers(80, 105)))
    weight = int(rng.choice([0, 0, 0, 1, 2, 3]))
    hollow = rng.random() < 0.06
    text = chr(int(first or "30", 16) + digit)
    sheet = Image.new("L", (SHEET, SHEET))
    pen = ImageDraw.Draw(sheet)
    at = {"xy": (CENTRE, CENTRE), "text": text, "font": font, "anchor": "mm"}
    if hollow:
        pen.text(**at, fill=0, stroke_width=2, stroke_fill=255)
    else:
        pen.text(**at, fill=255, stroke_width=weight)
    return sheet


def enlarged(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A small scanned picture `[8, 8]` of values 0..16, enlarged smoothly or in blocks."""
    small = Image.fromarray((np.clip(pixels / 16.0, 0, 1) * 255).astype(np.uint8))
    filters = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    large = small.resize((88, 88), filters[rng.integers(3)])
    if rng.random() < 0.3:  # as if scanned in black and white
        large = large.point(lambda value: 255 * (value > 110))
    sheet = Image.new("L", (SHEET, SHEET))
    sheet.paste(large, (20, 20))
    return sheet


def distort(sheet: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The same digit turned, slanted, stretched, rubbed, dirtied: still that digit."""
    turn, slant = rng.normal(0, 0.09), rng.normal(0, 0.12)
    stretch = np.exp(rng.normal(0, 0.16))
    zoom = rng.uniform(0.95, 1.25)
    wobble = rng.normal(0, 0.006, 2)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    matrix = zoom * matrix @ np.array([[stretch, slant], [0, 1 / stretch]])
    shift = CENTRE - matrix @ [CENTRE, CENTRE]
    # Eight numbers of a perspective: an affine map and a slight tilt of the sheet.
    tilt = wobble / SHEET * 10
    sheet = sheet.transform(
        sheet.size,
        Image.Transform.PERSPECTIVE,
        (*matrix[0], shift[0], *matrix[1], shift[1], *tilt),
        Image.Resampling.BILINEAR,
    )
    return _wear(sheet, rng)


def _wear(sheet: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.12:
        sheet = sheet.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 4.0)))
    elif kind < 0.2:
        sheet = sheet.filter(ImageFilter.MaxFilter(3))
    elif kind < 0.38:  # few pixels: smoothed, in blocks, or in blocks of black and white
        side = int(rng.integers(12, 32))
        small = sheet.resize((side, side), Image.Resampling.BOX)
        look = rng.random()
        if look < 0.3:
            top = max(small.getextrema()[1], 1)
            small = small.point(lambda value: 255 * (value > 0.4 * top))
        smooth = Image.Resampling.BILINEAR if look > 0.55 else Image.Resampling.NEAREST
        sheet = small.resize(sheet.size, smooth)
    if rng.random() < 0.15:
        noise = rng.normal(0, rng.uniform(3, 30), (SHEET, SHEET))
        values = np.asarray(sheet, dtype=np.float32) + 60 + noise
        sheet = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return sheet


def _pen(form: Form, rng: np.random.Generator, jitter: float, coarse: int) -> Image.Image:
    paths = _laid_out(write(form, rng, jitter, coarse), rng)
    width = _width(rng, 1.5, 20.0)
    sheet = Image.new("L", (SHEET, SHEET))
    pen = ImageDraw.Draw(sheet)
    capped = rng.random() < 0.7
    for path in paths:
        if capped:
            _line(pen, path, width)
        else:
            pen.line([tuple(p) for p in path], fill=255, width=max(round(width), 1), joint="curve")
    return sheet


def _width(rng: np.random.Generator, least: float, most: float) -> float:
    """The width of a line, any factor between as likely as any other."""
    return float(np.exp(rng.uniform(np.log(least), np.log(most))))


def _laid_out(paths: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Unit boxes to sheet coordinates, with a random size and width."""
    high = rng.uniform(66, 86)
    wide = high * rng.uniform(0.42, 0.9)
    return [(path - 0.5) * (wide, high) + CENTRE for path in paths]


def _line(pen: ImageDraw.ImageDraw, path: np.ndarray, width: float) -> None:
    """A line with round ends and corners."""
    points = [tuple(p) for p in path]
    pen.line(points, fill=255, width=max(round(width), 1), joint="curve")
    radius = width / 2
    for x, y in (points[0], points[-1], *(points if len(points) < 16 else ())):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    if not path:  # the typeface inside Pillow
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size)


def font_folder() -> Path:
    """Where matplotlib keeps its fonts. Raises ImportError naming the extra when it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "the digit pictures are set in fonts that ship with matplotlib, which is not "
            "installed: pip install 'natcupy[train]'."
        ) from None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
