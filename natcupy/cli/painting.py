"""Results of segmentation and detection drawn on the picture they belong to.

In: pixels `[H, W, 3]` uint8 and a `Segmentation` or `Detections` of the same size. Out: a PIL
picture: a coloured overlay with a legend beside it, or boxes, masks and labels. Small pictures are
enlarged, so that lines and text have room.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from natcupy.zoo.dense.detections import Detections
from natcupy.zoo.dense.names import ADE20K, ADE20K_PALETTE, palette
from natcupy.zoo.dense.segment import Segmentation

PAPER, TEXT, FAINT = (18, 20, 26), (236, 238, 242), (150, 156, 168)
ROOMY = 480  # shorter side below which a picture is enlarged
UNPAINTED = "background"  # pixels of a class of this name keep their colours
MOST_ROWS = 24  # of a legend
_SHARE = 0.55  # of the class's colour in an overlay

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


def class_colours(names: Sequence[str]) -> tuple[Colour, ...]:
    """One colour per class; ADE20K's own for its classes."""
    return ADE20K_PALETTE if tuple(names) == ADE20K else palette(len(names))


# ---------------------------------------------------------------- segmentation


def paint_segmentation(pixels: np.ndarray, found: Segmentation) -> Image.Image:
    """The picture with every pixel tinted by its class, outlines between them, and a legend."""
    factor = _factor(pixels)
    colours = np.array(class_colours(found.names), dtype=np.float32)
    labels = _repeated(found.labels.cpu().numpy(), factor)
    picture = _enlarged(pixels, factor).astype(np.float32)
    grey = (picture @ LUMA)[..., None]  # the picture's own hue would bend the class's
    painted = (1 - _SHARE) * grey + _SHARE * colours[labels]
    plain = [index for index, name in enumerate(found.names) if name == UNPAINTED]
    painted = np.where(np.isin(labels, plain)[..., None], picture, painted)
    painted[_borders(labels, max(round(min(labels.shape) / 400), 1))] = 245
    image = Image.fromarray(painted.clip(0, 255).astype(np.uint8))
    rows = [(name, share, colours[found.names.index(name)]) for name, share in found.areas()]
    return _beside(image, rows)


def _borders(labels: np.ndarray, width: int) -> np.ndarray:
    """Pixels within `width` before a change of class, along rows or columns: bool `[H, W]`."""
    out = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        out[:, :-step] |= labels[:, step:] != labels[:, :-step]
        out[:-step] |= labels[step:] != labels[:-step]
    return out


def _beside(image: Image.Image, rows: list[tuple[str, float, np.ndarray]]) -> Image.Image:
    """The picture with a column of colours, names and shares to its right."""
    size = min(max(round(min(image.size) / 28), 13), 48)
    font, small = ImageFont.load_default(size), ImageFont.load_default(round(size * 0.85))
    line = round(size * 1.75)
    fit = max(image.height // line - 1, 3)
    most = min(MOST_ROWS, fit)
    shown = rows if len(rows) <= most else rows[: most - 1]
    pen = ImageDraw.Draw(image)
    names = max(pen.textlength(_short(name), font) for name, _, _ in shown)
    numbers = pen.textlength("100.0 %", small)
    width = round(names + numbers + 4.5 * size)
    height = max(image.height, (len(shown) + 1 + (len(rows) > len(shown))) * line)
    sheet = Image.new("RGB", (image.width + width, height), PAPER)
    sheet.paste(image, (0, 0))
    pen = ImageDraw.Draw(sheet)
    left, middle = image.width + size, line
    for name, share, colour in shown:
        half = size // 2
        swatch = (left, middle - half, left + size, middle + half)
        fill = None if name == UNPAINTED else tuple(int(c) for c in colour)
        pen.rectangle(swatch, fill=fill, outline=FAINT)
        pen.text((left + 1.6 * size, middle), _short(name), TEXT, font, anchor="lm")
        pen.text((sheet.width - size, middle), f"{100 * share:.1f} %", FAINT, small, anchor="rm")
        middle += line
    if len(rows) > len(shown):
        rest = rows[len(shown) :]
        text = f"{len(rest)} more"
        pen.text((left + 1.6 * size, middle), text, FAINT, font, anchor="lm")
        share = f"{100 * sum(s for _, s, _ in rest):.1f} %"
        pen.text((sheet.width - size, middle), share, FAINT, small, anchor="rm")
    return sheet


# ---------------------------------------------------------------- detection


def paint_detections(pixels: np.ndarray, found: Detections) -> Image.Image:
    """The picture with every object's mask tinted, its box, its class and its score."""
    factor = _factor(pixels)
    colours = class_colours(found.names)
    picture = _enlarged(pixels, factor).astype(np.float32)
    line = max(round(min(picture.shape[:2]) / 300), 2)
    for index in reversed(range(len(found))):  # the surest on top
        if found.mask_probabilities is None:
            break
        rows, columns = _around(found.boxes[index].tolist(), found.size)
        mask = _repeated(found.mask(index)[rows, columns].cpu().numpy(), factor)
        part = picture[_times(rows, factor), _times(columns, factor)]  # a view
        colour = np.array(colours[int(found.labels[index])], dtype=np.float32)
        tinted = 0.5 * part[mask] + 0.5 * (part[mask] @ LUMA)[:, None]
        part[mask] = 0.55 * tinted + 0.45 * colour
        part[_outline(mask, line)] = colour
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    boxes = [[factor * side for side in box] for box in found.boxes.tolist()]
    labels = found.labels.tolist()
    for box, label in reversed(list(zip(boxes, labels, strict=True))):
        pen.rectangle(_drawable(box, image.size), outline=colours[label], width=line)
    size = min(max(round(min(image.size) / 32), 12), 44)
    taken: list[Box] = []
    for box, label, score in zip(boxes, labels, found.scores.tolist(), strict=True):
        text = f"{_short(found.names[label])} {100 * score:.0f} %"
        taken.append(_tag(pen, image.size, box, text, colours[label], size, taken))
    return image


def _around(box: Sequence[float], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that hold a box's mask, with a pixel to spare."""
    x1, y1, x2, y2 = box
    rows = slice(max(int(y1) - 1, 0), min(int(y2) + 2, size[0]))
    return rows, slice(max(int(x1) - 1, 0), min(int(x2) + 2, size[1]))


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask within `width` of its edge: bool `[H, W]`."""
    inner = np.pad(mask, 1)
    for _ in range(width):
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    return mask & ~inner[1:-1, 1:-1]


def _drawable(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box in whole pixels within the picture, its right and bottom ones included."""
    x1, y1 = (min(max(round(v), 0), side - 1) for v, side in zip(box[:2], size, strict=True))
    x2, y2 = (min(max(round(v) - 1, 0), side - 1) for v, side in zip(box[2:], size, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)


def _tag(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: Sequence[float],
    text: str,
    colour: Colour,
    font_size: int,
    taken: Sequence[Box],
) -> Box:
    """Write a label at its box, where it covers no other label if there is such a place."""
    font = ImageFont.load_default(font_size)
    pad = font_size // 3
    width, height = pen.textlength(text, font) + 2 * pad, round(font_size * 1.45)
    x1, y1, _, y2 = box
    tops = (y1 - height, y1, y2, y2 - height, (y1 + y2 - height) / 2)
    places = [_within((x1, top, x1 + width, top + height), size) for top in tops]
    free = [place for place in places if not any(_touch(place, other) for other in taken)]
    place = (free or places)[0]
    pen.rectangle(place, fill=colour)
    ink = (0, 0, 0) if float(LUMA @ colour) > 140 else (255, 255, 255)
    pen.text((place[0] + pad, (place[1] + place[3]) / 2), text, ink, font, anchor="lm")
    return place


def _within(place: Box, size: tuple[int, int]) -> Box:
    """A rectangle moved into the picture."""
    x1, y1, x2, y2 = place
    x1 = max(min(x1, size[0] - (x2 - x1)), 0)
    y1 = max(min(y1, size[1] - (y2 - y1)), 0)
    return x1, y1, x1 + place[2] - place[0], y1 + place[3] - place[1]


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# ---------------------------------------------------------------- sizes


def _factor(pixels: np.ndarray) -> int:
    """How many times a picture is enlarged; long thin ones not beyond reason."""
    short, long = sorted(pixels.shape[:2])
    return max(min(-(-ROOMY // short), 4 * ROOMY // long), 1)


def _enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    size = (image.width * factor, image.height * factor)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC) if factor > 1 else image)


def _repeated(values: np.ndarray, factor: int) -> np.ndarray:
    return values.repeat(factor, axis=0).repeat(factor, axis=1)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
