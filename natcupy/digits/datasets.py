"""What nat-digits learns from and what it is examined on; the two share no picture, font or style.

In: a seed. Out: `Pictures`, bytes `[N, 32, 32]` with their digits, prepared as the model's own
preprocessing does. Sources, all inside PyPI packages or this file's neighbours: scikit-learn's
digits (1797 scans of handwriting), the fonts of matplotlib and Pillow, and pens simulated by
`drawing`.

Examination: a stratified fifth of scikit-learn's pictures, four font families that training never
sees, and one way of drawing that training never sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from natcupy.digits import drawing
from natcupy.zoo.ink import ink

SIDE = 32
SPLIT_SEED = 0
HELD_OUT_PART = 0.2

TRAINING_FONTS = (  # "#" and a code point: that font's sans, typewriter or outlined digits
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans.ttf#1d7d8",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf", "STIXGeneral.ttf#1d7e2",
    "STIXGeneral.ttf#1d7e2", "STIXGeneral.ttf#1d7ec", "STIXGeneral.ttf#1d7ec",
    "STIXGeneral.ttf#1d7ec", "STIXGeneral.ttf#1d7f6",
    "STIXGeneral.ttf#1d7d8", "cmr10.ttf", "cmb10.ttf", "cmti10.ttf", "cmmi10.ttf",
)  # fmt: skip
EXAMINATION_FONTS = {
    "Aileron (Pillow's own)": ("",),
    "DejaVu Serif": (
        "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf",
        "DejaVuSerif-BoldItalic.ttf",
    ),
    "Computer Modern Sans": ("cmss10.ttf",),
    "Computer Modern Typewriter": ("cmtt10.ttf",),
}  # fmt: skip
SHARES = {  # of the drawn pictures
    "strokes": 0.31,
    "nib": 0.14,
    "segments": 0.09,
    "dots": 0.07,
    "typeset": 0.24,
    "enlarged": 0.15,
}


@dataclass(frozen=True)
class Pictures:
    """Pictures and what they show.

    Attributes:
        images: `[N, SIDE, SIDE]` uint8, bright on black.
        labels: `[N]` int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def training_pictures(count: int, seed: int) -> Pictures:
    """`count` drawn pictures, then the training part of scikit-learn's as they are."""
    rng = np.random.default_rng([seed, 1])
    scans, digits = _scans(held_out=False)
    draw = _drawers(scans, digits)
    kinds = rng.choice(list(SHARES), size=count, p=list(SHARES.values()))
    drawn = (
        (drawing.distort(draw[kind](index % 10, rng), rng), index % 10)
        for index, kind in enumerate(kinds)
    )
    plain = ((_scan(scan), int(digit)) for scan, digit in zip(scans, digits, strict=True))
    return _gather(chain(drawn, plain))


@lru_cache(maxsize=1)
def examinations(per_digit: int = 50, seed: int = 0) -> Mapping[str, Pictures]:
    """Every held-out set by its name. Drawn ones have `per_digit` pictures of each digit."""
    scans, digits = _scans(held_out=True)
    sets = {
        "scikit-learn digits": _gather(
            (_scan(scan), int(digit)) for scan, digit in zip(scans, digits, strict=True)
        )
    }
    for index, (family, names) in enumerate(EXAMINATION_FONTS.items()):
        fonts = _paths(names)
        sets[f"font {family}"] = _drawn(
            lambda digit, rng, fonts=fonts: drawing.typeset(digit, rng, fonts),
            per_digit,
            np.random.default_rng([seed, 2, index]),
        )
    sets["straight strokes"] = _drawn(drawing.plotter, per_digit, np.random.default_rng([seed, 3]))
    return MappingProxyType(sets)


def held_out_scan(digit: int) -> Image.Image:
    """The first of scikit-learn's held-out scans of a digit, 8 x 8 pixels, bright on black."""
    scans, digits = _scans(held_out=True)
    return _scan(scans[digits == digit][0])


def _drawers(scans: np.ndarray, digits: np.ndarray) -> dict[str, Callable[..., Image.Image]]:
    fonts = _paths(TRAINING_FONTS)
    of_digit = [scans[digits == digit] for digit in range(10)]
    return {
        "strokes": drawing.strokes,
        "nib": drawing.nib,
        "segments": drawing.segments,
        "dots": drawing.dots,
        "typeset": lambda digit, rng: drawing.typeset(digit, rng, fonts),
        "enlarged": lambda digit, rng: drawing.enlarged(
            of_digit[digit][rng.integers(len(of_digit[digit]))], rng
        ),
    }


def _drawn(
    draw: Callable[[int, np.random.Generator], Image.Image],
    per_digit: int,
    rng: np.random.Generator,
) -> Pictures:
    return _gather(
        (drawing.distort(draw(index % 10, rng), rng), index % 10) for index in range(10 * per_digit)
    )


def require_sources() -> None:
    """Raise ImportError, which names the extra, where a package that holds pictures is missing."""
    drawing.font_folder()
    _scans(held_out=False)


def _scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits `[N, 8, 8]` with values 0..16, and their labels."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ImportError(
            "the scanned digits ship with scikit-learn, which is not installed: "
            "pip install 'natcupy[train]'."
        ) from None
    data = load_digits()
    kept, tested, kept_labels, tested_labels = train_test_split(
        data.images,
        data.target,
        test_size=HELD_OUT_PART,
        random_state=SPLIT_SEED,
        stratify=data.target,
    )
    return (tested, tested_labels) if held_out else (kept, kept_labels)


def _scan(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * (255 / 16)).astype(np.uint8))


def _paths(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(drawing.font_folder() / name) if name else "" for name in names)


def _gather(pairs: Iterator[tuple[Image.Image, int]]) -> Pictures:
    images, labels = [], []
    for picture, digit in pairs:
        images.append(np.asarray(ink(picture, (SIDE, SIDE))))
        labels.append(digit)
    return Pictures(torch.from_numpy(np.stack(images)), torch.tensor(labels))
