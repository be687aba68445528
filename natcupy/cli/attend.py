"""`natcupy attend IMAGE`: a picture of where one place of an image looks, in one attention layer.

In: an image and a query. Out: a PNG (or what the file's suffix says): the image as the model sees
it with the query marked, the attention of all heads averaged over it, and each head alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from natcupy.cli import pictures, runtime
from natcupy.maps import AttentionMap, attention_map
from natcupy.modules import NeighborhoodAttention2D
from natcupy.zoo import ImageModel

PANEL, SMALL, GAP, HEADER, CAPTION = 420, 132, 18, 58, 24  # pixels
PAPER, TEXT, FAINT = (18, 20, 26), (236, 238, 242), (150, 156, 168)
QUERY = (64, 224, 255)
# Dark violet to pale yellow: even steps of brightness, told apart also without colour vision.
HEAT = np.array([(20, 11, 53), (101, 21, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)])


def run(arguments: argparse.Namespace) -> int:
    """Look, draw, save."""
    image = Path(arguments.image)
    if image.is_dir():
        raise ValueError(f"IMAGE must be one picture, got the folder {image}.")
    (output,) = pictures.targets([image], arguments.output)
    if not output.parent.is_dir():
        raise ValueError(f"--output's folder must exist, got {output.parent}; make it first.")
    device = runtime.pick_device(arguments.device)
    model = runtime.load_for(runtime.USUAL, arguments.model, device)
    layer, stage, block = pick_layer(model, arguments.stage, arguments.block)
    heads = _pick_heads(layer, arguments.head)
    picture = runtime.read_picture(model, image)
    if isinstance(picture, str):
        raise ValueError(f"{image}: {picture}")
    found = attention_map(model, picture, layer, arguments.query)
    title = f"{arguments.model}, stage {stage}, block {block}"
    drawn = draw(as_image(picture, model), found, heads, title, _about(layer, found))
    pictures.save(drawn, output)
    row, column = found.query
    print(
        f"{output}: {title}; query at row {row}, column {column} of a map "
        f"of {found.weights.shape[1]} x {found.weights.shape[2]}."
    )
    strongest = found.weights[heads].mean(0)
    at = divmod(int(strongest.argmax()), strongest.shape[1])
    most = 100 * float(strongest.max())
    print(f"It looks most at row {at[0]}, column {at[1]}: {most:.1f} % of the weight.")
    if float(found.outside.max()) > 0.005:
        print(
            f"{100 * float(found.outside[heads].mean()):.1f} % go to the zeros that pad the map to "
            "the size of the window, as in training."
        )
    return 0


def pick_layer(
    model: ImageModel, stage: int | None, block: int | None
) -> tuple[NeighborhoodAttention2D, int, int]:
    """An attention layer and its place.

    Without a stage: the last one whose map is at least two windows wide, so that it shows.
    Raises ValueError for places the model does not have, or a model without neighborhoods.
    """
    levels = _levels(model)
    if not any(levels):
        raise ValueError(f"--model must have neighborhood attention, got {model.name}.")
    if stage is None:
        stage = _telling_stage(model, levels)
    if not 0 <= stage < len(levels):
        raise ValueError(f"--stage must be in 0..{len(levels) - 1}, got {stage}.")
    block = -1 if block is None else block
    count = len(levels[stage])
    if not -count <= block < count:
        raise ValueError(f"--block must be in {-count}..{count - 1} at stage {stage}, got {block}.")
    return levels[stage][block], stage, block % count


def _levels(model: ImageModel) -> list[list[NeighborhoodAttention2D]]:
    return [
        [layer for layer in stage.modules() if isinstance(layer, NeighborhoodAttention2D)]
        for stage in model.stages
    ]


def _telling_stage(model: ImageModel, levels: Sequence[Sequence[NeighborhoodAttention2D]]) -> int:
    sides = model.pretrained_cfg["input_size"][1:]
    for stage in reversed(range(len(levels))):
        reduction = model.feature_info[stage]["reduction"]
        kernel = levels[stage][-1].hood.kernel_size
        if all(side // reduction >= 2 * k for side, k in zip(sides, kernel, strict=True)):
            return stage
    return 0


def _pick_heads(layer: NeighborhoodAttention2D, head: int | None) -> list[int]:
    if head is None:
        return list(range(layer.num_heads))
    if not 0 <= head < layer.num_heads:
        raise ValueError(f"--head must be in 0..{layer.num_heads - 1}, got {head}.")
    return [head]


def _about(layer: NeighborhoodAttention2D, found: AttentionMap) -> str:
    kernel, dilation = layer.hood.kernel_size, layer.hood.dilation
    text = f"window {kernel[0]} x {kernel[1]}"
    if set(dilation) != {1}:
        text += f", dilation {dilation[0]} x {dilation[1]}"
    height, width = found.weights.shape[1:]
    return f"{text} on a map of {height} x {width}; {layer.num_heads} heads"


def as_image(picture: Tensor, model: ImageModel) -> Image.Image:
    """A prepared picture `[1, C, H, W]` back to RGB: what the model sees."""
    cfg, channels = model.pretrained_cfg, picture.shape[1]
    mean, std = (_channels(cfg[key], channels) for key in ("mean", "std"))
    pixels = picture[0].float().cpu() * std + mean
    if channels != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values.contiguous().numpy())


def _channels(values: Sequence[float], channels: int) -> Tensor:
    given = torch.tensor(tuple(values))
    if len(given) != channels:
        given = given.mean().expand(channels)
    return given[:, None, None]


def draw(
    image: Image.Image, found: AttentionMap, heads: list[int], title: str, about: str
) -> Image.Image:
    """The finished sheet."""
    panel = _fitted(image, PANEL)
    columns = max((2 * panel.width + GAP + SMALL // 4) // (SMALL + SMALL // 4), 1)
    rows = -(-len(heads) // columns) if len(heads) > 1 else 0
    small = _fitted(image, SMALL)
    width = 2 * panel.width + 3 * GAP
    height = HEADER + panel.height + CAPTION + GAP + rows * (small.height + CAPTION + GAP // 2)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 12), title, TEXT, ImageFont.load_default(19))
    pen.text((GAP, 36), about, FAINT, ImageFont.load_default(13))
    together = found.weights[heads].mean(0)
    name = "average of all heads" if len(heads) > 1 else f"head {heads[0]}"
    right = 2 * GAP + panel.width
    _put(sheet, _marked(panel, found), (GAP, HEADER), "the query")
    _put(sheet, _overlaid(panel, together, found), (right, HEADER), f"where it looks: {name}")
    _scale_bar(sheet, (width - GAP, HEADER + panel.height + 6), float(together.max()))
    step = (width - 2 * GAP - small.width) // max(columns - 1, 1)
    for place, head in enumerate(heads if rows else ()):
        x = GAP + place % columns * min(step, small.width + SMALL // 4)
        y = HEADER + panel.height + CAPTION + GAP
        y += place // columns * (small.height + CAPTION + GAP // 2)
        weights = found.weights[head]
        _put(
            sheet,
            _overlaid(small, weights, found),
            (x, y),
            f"head {head}: up to {100 * float(weights.max()):.0f} %",
        )
    return sheet


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The picture enlarged or reduced to fit a panel; few pixels stay pixels."""
    zoom = side / max(image.size)
    size = tuple(max(round(length * zoom), 1) for length in image.size)
    few = max(image.size) <= 96
    return image.resize(size, Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC)


def _put(sheet: Image.Image, panel: Image.Image, at: tuple[int, int], caption: str) -> None:
    sheet.paste(panel, at)
    font = ImageFont.load_default(13)
    ImageDraw.Draw(sheet).text((at[0], at[1] + panel.height + 5), caption, FAINT, font)


def _marked(panel: Image.Image, found: AttentionMap) -> Image.Image:
    """The picture with the query's cell outlined, and thinly those that it can see."""
    marked = panel.copy()
    pen = ImageDraw.Draw(marked)
    for row, column in found.window.nonzero().tolist():
        pen.rectangle(_cell(panel, found, row, column), outline=(96, 120, 140))
    _outline_query(marked, found)
    return marked


def _overlaid(panel: Image.Image, weights: Tensor, found: AttentionMap) -> Image.Image:
    """The picture, greyed, with heat where the query looks."""
    grey = np.asarray(panel.convert("L").convert("RGB"), dtype=np.float32)
    relative = (weights / weights.max().clamp_min(1e-12)).numpy()
    heat, strength = np.zeros_like(grey), np.zeros(grey.shape[:2], dtype=np.float32)
    for row, column in found.window.nonzero().tolist():
        left, top, right, bottom = _cell(panel, found, row, column)
        inside = np.s_[top : bottom + 1, left : right + 1]
        heat[inside] = _colour(float(relative[row, column]))
        strength[inside] = 0.35 + 0.4 * relative[row, column]
    alpha = strength[..., None]
    mixed = grey * 0.55 * (1 - alpha) + heat * alpha + grey * 0.25 * alpha
    overlaid = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    _outline_query(overlaid, found)
    return overlaid


def _outline_query(panel: Image.Image, found: AttentionMap) -> None:
    pen = ImageDraw.Draw(panel)
    left, top, right, bottom = _cell(panel, found, *found.query)
    width = max(round(max(panel.size) / 140), 1)
    pen.rectangle((left, top, right, bottom), outline=QUERY, width=width)


def _cell(
    panel: Image.Image, found: AttentionMap, row: int, column: int
) -> tuple[int, int, int, int]:
    """The pixels of one place of the map, bounds included."""
    rows, columns = found.weights.shape[1:]
    left, right = (round(panel.width * c / columns) for c in (column, column + 1))
    top, bottom = (round(panel.height * r / rows) for r in (row, row + 1))
    return left, top, max(right - 1, left), max(bottom - 1, top)


def _colour(share: float) -> np.ndarray:
    """Heat of a share in 0..1."""
    place = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(place), len(HEAT) - 2)
    return HEAT[low] + (HEAT[low + 1] - HEAT[low]) * (place - low)


def _scale_bar(sheet: Image.Image, right_top: tuple[int, int], top: float) -> None:
    """0 % to the largest weight, as a strip of colours ending at `right_top`."""
    font, pen = ImageFont.load_default(13), ImageDraw.Draw(sheet)
    label = f"{100 * top:.0f} %"
    x, y = right_top[0] - pen.textlength(label, font), right_top[1]
    pen.text((x, y), label, FAINT, font)
    for step in range(80):
        colour = tuple(int(value) for value in _colour(step / 79))
        pen.line((x - 88 + step, y + 3, x - 88 + step, y + 12), fill=colour)
    pen.text((x - 94 - pen.textlength("0", font), y), "0", FAINT, font)
