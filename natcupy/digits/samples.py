"""The pictures that `natcupy demo` shows: twelve, small, none of a kind that was trained on.

In: a folder. Out: PNG files whose names begin with the digit they show. `python -m
natcupy.digits.samples FOLDER` draws them anew, the same ones each time (the typeset ones up to the
version of Pillow).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from natcupy.digits import drawing
from natcupy.digits.datasets import held_out_scan

BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def write_samples(folder: Path) -> list[Path]:
    """Draw the pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "0-scanned": _scanned(0),
        "1-printed": _printed(1, (28, 60, 120), (250, 246, 235), 120, 8),
        "2-plotter": _plotter(2, BLACK, WHITE),
        "3-scanned": _scanned(3),
        "4-printed": _printed(4, (255, 214, 64), (24, 40, 32), 96, -6),
        "5-plotter": _plotter(5, (180, 30, 40), (240, 240, 240)),
        "6-scanned": _scanned(6),
        "7-printed": _printed(7, (90, 90, 90), WHITE, 40, 0),
        "8-plotter": _plotter(8, WHITE, (40, 44, 52)),
        "9-transparent": _transparent(9),
        "3-noisy": _noisy(3),
        "8-tiny": _printed(8, BLACK, WHITE, 16, 0),
    }
    paths = []
    for name, picture in pictures.items():
        paths.append(folder / f"{name}.png")
        picture.save(paths[-1], optimize=True)
    return paths


def _printed(
    digit: int, ink: tuple[int, ...], paper: tuple[int, ...], size: int, turn: float
) -> Image.Image:
    """In Pillow's own typeface, off the middle."""
    sheet = Image.new("RGB", (int(size * 1.5), int(size * 1.6)), paper)
    pen = ImageDraw.Draw(sheet)
    at = (sheet.width * 0.55, sheet.height * 0.45)
    pen.text(at, str(digit), ink, ImageFont.load_default(size), anchor="mm")
    return sheet.rotate(turn, Image.Resampling.BICUBIC, fillcolor=paper)


def _plotter(digit: int, ink: tuple[int, ...], paper: tuple[int, ...]) -> Image.Image:
    """Shaky straight lines, in colours."""
    drawn = drawing.plotter(digit, np.random.default_rng(100 + digit))
    return ImageOps.colorize(drawn, paper, ink)


def _scanned(digit: int) -> Image.Image:
    """One of scikit-learn's held-out scans, 8 x 8 pixels, black on white, in larger pixels."""
    return ImageOps.invert(held_out_scan(digit)).resize((96, 96), Image.Resampling.NEAREST)


def _transparent(digit: int) -> Image.Image:
    """Black on nothing."""
    drawn = _plotter(digit, WHITE, BLACK).convert("L")
    sheet = Image.new("RGBA", drawn.size)
    sheet.putalpha(drawn)
    return sheet


def _noisy(digit: int) -> Image.Image:
    """Printed, then photographed in bad light."""
    clean = _printed(digit, (60, 60, 60), (190, 190, 190), 80, 5).convert("L")
    noise = np.random.default_rng(0).normal(0, 18, (clean.height, clean.width))
    return Image.fromarray(np.clip(np.asarray(clean) + noise, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    for written in write_samples(Path(sys.argv[1])):
        print(written)
