"""A data set made by code: circles, squares and triangles on textured ground, with exact masks.

In: a seed and a size. Out: a `Scene` with the picture, its objects and its map of classes; the same
seed gives the same scene everywhere. It serves to see a model learn within minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from natcupy.zoo.dense.targets import Objects

NAMES = ("circle", "square", "triangle")
SEGMENT_NAMES = ("background", *NAMES)
VISIBLE = 0.7  # share of each shape that later ones must leave uncovered


@dataclass(frozen=True)
class Scene:
    """One picture and the truth about it.

    Attributes:
        pixels: `[H, W, 3]` uint8.
        objects: boxes, labels (of `NAMES`) and masks of the shapes, later ones on top.
        labels: `[H, W]` int64, classes of `SEGMENT_NAMES`.
    """

    pixels: Tensor
    objects: Objects
    labels: Tensor


def make_scene(seed: int, height: int = 128, width: int = 128, most: int = 4) -> Scene:
    """A scene with 1 to `most` shapes, which may partly cover each other.

    Args:
        seed: of everything random.
        height, width: of the picture, at least 32.
        most: largest number of shapes; 0 gives bare ground.
    """
    if min(height, width) < 32 or most < 0:
        raise ValueError(
            f"a scene must be at least 32 x 32 with no negative number of shapes, got "
            f"{height} x {width} with {most}."
        )
    rng = torch.Generator().manual_seed(seed)
    pixels, shade = _ground(height, width, rng)
    masks: list[Tensor] = []
    areas: list[Tensor] = []  # of the shapes before others covered them
    labels: list[int] = []
    for _ in range(_integer(1, most, rng) if most else 0):
        label = _integer(0, len(NAMES) - 1, rng)
        mask = _shape(NAMES[label], height, width, rng)
        colour = _vivid(pixels[mask], rng)
        left = [old & ~mask for old in masks]
        if any(m.sum() < VISIBLE * area for m, area in zip(left, areas, strict=True)):
            continue
        masks, areas = [*left, mask], [*areas, mask.sum()]
        labels.append(label)
        texture = 0.06 * torch.randn(height, width, 1, generator=rng) + 0.1 * shade
        pixels = torch.where(mask[..., None], (colour + texture).clamp(0, 1), pixels)
    return _scene(pixels, masks, labels)


def _scene(pixels: Tensor, masks: list[Tensor], labels: list[int]) -> Scene:
    height, width = pixels.shape[:2]
    stacked = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
    classes = torch.tensor(labels, dtype=torch.int64)
    painted = torch.zeros(height, width, dtype=torch.int64)
    for mask, label in zip(masks, labels, strict=True):
        painted[mask] = label + 1
    boxes = boxes_of(stacked)
    return Scene((pixels * 255).round().to(torch.uint8), Objects(boxes, classes, stacked), painted)


def boxes_of(masks: Tensor) -> Tensor:
    """The tight boxes (x1, y1, x2, y2) of masks `[n, H, W]`, none empty: `[n, 4]` float32."""
    columns, rows = masks.any(1), masks.any(2)
    sides = []
    for line in (columns, rows):
        index = torch.arange(line.shape[1], device=masks.device)
        low = torch.where(line, index, line.shape[1]).amin(1)
        high = torch.where(line, index + 1, 0).amax(1)
        sides.append((low, high))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def _ground(height: int, width: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two colours mixed by clouds and stripes `[H, W, 3]`, and a smooth shade `[H, W, 1]`."""
    clouds = torch.zeros(height, width)
    for cells in (3, 8, 20):
        coarse = torch.randn(1, 1, cells, cells, generator=rng)
        clouds += F.interpolate(coarse, (height, width), mode="bicubic")[0, 0] / cells**0.5
    angle, pitch = _uniform(0, math.pi, rng), _uniform(4, 12, rng)
    y, x = _grid(height, width)
    stripes = torch.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / pitch)
    mix = torch.sigmoid(clouds + 0.5 * stripes)[..., None]
    one, two = (_dull(colour) for colour in torch.rand(2, 3, generator=rng))
    grain = 0.04 * torch.randn(height, width, 3, generator=rng)
    return (one * mix + two * (1 - mix) + grain).clamp(0, 1), torch.tanh(clouds)[..., None]


def _shape(name: str, height: int, width: int, rng: torch.Generator) -> Tensor:
    """The pixels of a shape of random place, size and tilt, wholly inside: bool `[H, W]`."""
    side = min(height, width)
    radius = _uniform(0.14 * side, 0.28 * side, rng)
    x = _uniform(radius, width - radius, rng)
    y = _uniform(radius, height - radius, rng)
    rows, columns = _grid(height, width)
    dy, dx = rows + 0.5 - y, columns + 0.5 - x
    if name == "circle":
        return dx**2 + dy**2 <= radius**2
    corners = 4 if name == "square" else 3
    turn = math.pi / 2 + _uniform(-0.3, 0.3, rng)  # a side below, more or less
    inner = radius * math.cos(math.pi / corners)  # from the centre to the middle of a side
    inside = torch.ones(height, width, dtype=torch.bool)
    for corner in range(corners):
        angle = turn + 2 * math.pi * corner / corners
        inside &= dx * math.cos(angle) + dy * math.sin(angle) <= inner
    return inside


def _dull(colour: Tensor) -> Tensor:
    """A colour drawn towards grey."""
    return colour.mean() + 0.3 * (colour - colour.mean())


def _vivid(below: Tensor, rng: torch.Generator) -> Tensor:
    """A saturated colour away from the mean of what it will cover."""
    choices = torch.rand(8, 3, generator=rng)
    low, high = choices.amin(1, keepdim=True), choices.amax(1, keepdim=True)
    choices = (choices - low) / (high - low)
    return choices[(choices - below.mean(dim=0)).norm(dim=1).argmax()]


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return y.float(), x.float()


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=rng).item()


def _integer(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))
