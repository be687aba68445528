"""Find what is drawn on a picture and lift it off the paper.

In: a PIL picture of any mode and size with one drawing on a fairly even ground. Out: a PIL
picture of mode "L": the drawing alone, bright on black, centred, filling the frame but for a
margin, in its own proportions. Dark on bright, bright on dark and coloured drawings come out
alike. Pillow and NumPy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

MARGIN = 0.1  # of the frame, free on each side
LOOK = 64  # side of the copy on which the drawing is searched for
FAINT = 0.3  # of full strength: what is weaker does not count as drawn
SPECK = 0.06  # of the largest connected part: what is smaller is dirt
NOISE = 4.0  # times the typical stray of the ground: what is within is ground
FLAT = 8  # grey levels of 255: a picture with less contrast is blank

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class Ground(NamedTuple):
    """The paper: its grey level per band, and the median distance of a pixel from it."""

    levels: tuple[float, ...]
    stray: float


def ink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The drawing on a picture, as a picture "L" of `size` = (height, width).

    Raises ValueError for a picture without any contrast.
    """
    flat = opaque(image)
    ground = _ground(flat)
    view: Box = (0.0, 0.0, *map(float, flat.size))
    for _ in range(4):  # a small drawing on a large sheet is found again, better, in a closer look
        drawn = _bounding_box(flat, view, ground)
        closer = _widened(drawn, flat.size)
        if _area(closer) > 0.5 * _area(view):
            break
        view = closer
    return _frame(flat, drawn, ground, size)


def opaque(image: Image.Image) -> Image.Image:
    """The picture in "L" or "RGB"; what is transparent shows a sheet that sets the drawing off."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        grey = (values - low) * (255.0 / max(high - low, 1e-12))
        return Image.fromarray(grey.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    image = image.convert("RGBA")
    pixels = np.asarray(image, dtype=np.float32)
    alpha = pixels[..., 3]
    seen = float((pixels[..., :3].mean(-1) * alpha).sum() / max(float(alpha.sum()), 1.0))
    sheet = Image.new("RGBA", image.size, "black" if seen > 127 else "white")
    return Image.alpha_composite(sheet, image).convert("RGB")


def _ground(image: Image.Image) -> Ground:
    """The paper: the median colour along the picture's border, and how far the border strays."""
    planes = (np.asarray(band, dtype=np.float32) for band in image.split())
    borders = [np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]]) for p in planes]
    levels = [float(np.median(border)) for border in borders]
    # Twice the lower quartile is the median of a bell curve, and ink at the border hardly moves it.
    strays = [
        2 * np.quantile(np.abs(border - level), 0.25)
        for border, level in zip(borders, levels, strict=True)
    ]
    return Ground(tuple(levels), float(max(strays)))


def _bounding_box(image: Image.Image, view: Box, ground: Ground) -> Box:
    """What is drawn within the view; specks of dirt do not count."""
    strength = _strength(_sampled(image, view, LOOK), ground, _side(view))
    labels = _connected(strength > FAINT)
    masses = np.bincount(labels.ravel(), weights=strength.ravel())
    masses[0] = 0.0
    kept = (masses >= SPECK * masses.max())[labels]
    rows, columns = np.flatnonzero(kept.any(axis=1)), np.flatnonzero(kept.any(axis=0))
    across, down = (view[2] - view[0]) / kept.shape[1], (view[3] - view[1]) / kept.shape[0]
    return (
        view[0] + across * float(columns[0]),
        view[1] + down * float(rows[0]),
        view[0] + across * float(columns[-1] + 1),
        view[1] + down * float(rows[-1] + 1),
    )


def _frame(image: Image.Image, drawn: Box, ground: Ground, size: tuple[int, int]) -> Image.Image:
    """The drawing in the middle of a black frame, at full strength."""
    height, width = size
    zoom = (1 - 2 * MARGIN) * min(
        width / (drawn[2] - drawn[0]), height / (drawn[3] - drawn[1])
    )  # frame pixels per picture pixel
    centre = (drawn[0] + drawn[2]) / 2, (drawn[1] + drawn[3]) / 2
    left, top = centre[0] - width / 2 / zoom, centre[1] - height / 2 / zoom
    seen = (
        max(left, 0.0),
        max(top, 0.0),
        min(left + width / zoom, float(image.width)),
        min(top + height / zoom, float(image.height)),
    )
    # The part of the frame that the picture covers; beyond the picture there is no ink.
    at = [round((seen[i] - (left, top)[i % 2]) * zoom) for i in range(4)]
    at[2], at[3] = max(at[2], at[0] + 1), max(at[3], at[1] + 1)
    strength = _strength(_sampled(image, seen, 4 * max(size)), ground, _side(seen))
    part = Image.fromarray(strength).resize(
        (at[2] - at[0], at[3] - at[1]), Image.Resampling.BILINEAR
    )
    frame = np.zeros((height, width), dtype=np.float32)
    frame[at[1] : at[3], at[0] : at[2]] = np.asarray(part)[: height - at[1], : width - at[0]]
    full = max(float(np.quantile(frame, 0.98)), 0.5 * float(frame.max()), 1e-6)
    return Image.fromarray((np.clip(frame / full, 0.0, 1.0) * 255).round().astype(np.uint8))


def _sampled(image: Image.Image, view: Box, side: int) -> Image.Image:
    """The view, its longer side at most `side`: every pixel the mean of those it stands for."""
    box = (int(view[0]), int(view[1]), int(np.ceil(view[2])), int(np.ceil(view[3])))
    part = image.crop(box)
    longest = max(part.size)
    if longest <= side:
        return part
    shape = tuple(max(round(length * side / longest), 1) for length in part.size)
    return part.resize(shape, Image.Resampling.BOX)


def _strength(image: Image.Image, ground: Ground, side: float) -> np.ndarray:
    """How far each pixel is from the ground, 0..1 of the strongest strokes. `[H, W]` float32.

    `side` is the longer side before shrinking, which makes thin strokes paler and noise smaller.
    """
    shrunk = min(max(image.size) / side, 1.0)
    bands = zip(image.split(), ground.levels, strict=True)
    away = [np.abs(np.asarray(band, dtype=np.float32) - level) for band, level in bands]
    contrast = np.maximum.reduce(away)
    drawn = np.maximum(contrast - NOISE * ground.stray * shrunk, 0.0)
    if float(drawn.max()) < FLAT * shrunk:  # all of it as faint as the ground is rough
        drawn = contrast
    strongest = float(drawn.max())
    if strongest < FLAT * shrunk:
        raise ValueError(
            "there must be something drawn on the picture that stands out from its border, got "
            f"{image.width} x {image.height} pixels of nearly one colour."
        )
    peak = max(float(np.quantile(drawn, 1 - 4 / max(drawn.size, 4))), 0.5 * strongest)
    return np.minimum(drawn / peak, 1.0)


def _connected(mask: np.ndarray) -> np.ndarray:
    """A number for each connected part of the mask (8 neighbours), 0 outside. `[H, W]` ints."""
    inside = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), dtype=bool)
    inside[1:-1, 1:-1] = mask
    labels = np.where(inside, np.arange(inside.size).reshape(inside.shape), 0)
    while True:
        grown = labels.copy()
        np.maximum(grown[1:-1], np.maximum(labels[:-2], labels[2:]), out=grown[1:-1])
        wide = grown.copy()
        np.maximum(wide[:, 1:-1], np.maximum(grown[:, :-2], grown[:, 2:]), out=wide[:, 1:-1])
        wide *= inside
        # A label is the place of a pixel of the same part: taking over that pixel's label halves
        # the way still to go.
        wide = wide.ravel()[wide]
        if np.array_equal(wide, labels):
            return labels[1:-1, 1:-1]
        labels = wide


def _widened(drawn: Box, size: tuple[int, int]) -> Box:
    """A view of the drawing with some paper around it."""
    spare = 0.2 * _side(drawn)
    return (
        max(drawn[0] - spare, 0.0),
        max(drawn[1] - spare, 0.0),
        min(drawn[2] + spare, float(size[0])),
        min(drawn[3] + spare, float(size[1])),
    )


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _side(box: Box) -> float:
    return max(box[2] - box[0], box[3] - box[1])
