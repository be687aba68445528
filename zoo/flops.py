"""Multiply-adds of one forward pass, by arithmetic, in the two ways the numbers are quoted.

In: a `ModelConfig` and the picture's height and width. Out: `Macs`, per kind of work. `plain` adds
convolutions, linear layers and attention (q·k and weights·v). `papers` adds what fvcore counted for
the published tables: 5 per LayerNorm element, 1 per relative bias added to a logit by neighborhood
attention, 1 per element pooled. Maps smaller than a window count at their padded size, because that
is what runs. One picture, batch of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from natcupy.zoo.config import PATCH_SIZE, SINGLE_LEVEL, ModelConfig

NORM_COST = 5  # fvcore's count per LayerNorm element


@dataclass(frozen=True)
class Macs:
    """Multiply-adds by kind of work."""

    conv: int = 0
    linear: int = 0
    attention: int = 0
    bias: int = 0
    norm: int = 0
    pool: int = 0

    @property
    def plain(self) -> int:
        """Convolutions, linear layers and attention."""
        return self.conv + self.linear + self.attention

    @property
    def papers(self) -> int:
        """The published tables' counting: `plain` plus biases, normalisation and pooling."""
        return self.plain + self.bias + self.norm + self.pool


def count_macs(config: ModelConfig, height: int, width: int) -> Macs:
    """Multiply-adds of the model on one `height` x `width` picture.

    Raises ValueError for sizes below 1 or, for a model of fixed size, other than its own.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture's sides must be at least 1, got {height} x {width}.")
    if config.img_size is not None and (height, width) != (config.img_size,) * 2:
        raise ValueError(
            f"this model takes {config.img_size} x {config.img_size} pictures only, got "
            f"{height} x {width}; build it with another img_size."
        )
    sums = dict.fromkeys((field.name for field in fields(Macs)), 0)
    for kind, count in _terms(config, height, width):
        sums[kind] += count
    return Macs(**sums)


_Terms = Iterator[tuple[str, int]]


def _terms(config: ModelConfig, height: int, width: int) -> _Terms:
    yield from _stem(config, height, width)
    patch = PATCH_SIZE[config.family]
    height, width = -(-height // patch), -(-width // patch)
    levels = len(config.depths)
    for level, dim in enumerate(config.dims):
        for block in range(config.depths[level]):
            yield from _block(config, level, block, height, width)
        if config.out_indices is not None and config.family not in SINGLE_LEVEL:
            yield "norm", NORM_COST * height * width * dim * (level in config.out_indices)
        if level < levels - 1:
            yield from _downsampler(config.family, dim, height, width)
            height, width = -(-height // 2), -(-width // 2)
    if config.out_indices is None:
        yield "norm", NORM_COST * height * width * config.dims[-1]
        yield "pool", height * width * config.dims[-1]
        yield "linear", config.dims[-1] * config.num_classes
    elif config.family in SINGLE_LEVEL:
        yield "norm", NORM_COST * height * width * config.embed_dim * len(config.out_indices)


def _stem(config: ModelConfig, height: int, width: int) -> _Terms:
    dim, patch = config.embed_dim, PATCH_SIZE[config.family]
    tokens = -(-height // patch) * -(-width // patch)
    if config.family == "nat":
        half = -(-height // 2) * -(-width // 2)
        yield "conv", half * 9 * config.in_chans * (dim // 2)
        yield "conv", tokens * 9 * (dim // 2) * dim
    else:
        yield "conv", tokens * patch * patch * config.in_chans * dim
    yield "norm", NORM_COST * tokens * dim


def _block(config: ModelConfig, level: int, block: int, height: int, width: int) -> _Terms:
    dim, heads, tokens = config.dims[level], config.num_heads[level], height * width
    if config.family == "vitrpb":
        queries, keys = tokens, tokens
    else:
        extent = config.kernel_size * config.dilation(level, block)
        queries, keys = max(height, extent) * max(width, extent), config.kernel_size**2
        yield "bias", queries * heads * keys
    yield "linear", 3 * queries * dim * dim
    yield "attention", 2 * queries * keys * dim
    yield "linear", tokens * dim * dim
    yield "linear", 2 * tokens * dim * int(dim * config.mlp_ratio)
    yield "norm", 2 * NORM_COST * tokens * dim


def _downsampler(family: str, dim: int, height: int, width: int) -> _Terms:
    tokens = -(-height // 2) * -(-width // 2)
    if family == "dinat_s":
        yield "norm", NORM_COST * tokens * 4 * dim
        yield "linear", tokens * 8 * dim * dim
    else:
        yield "conv", tokens * 18 * dim * dim
        yield "norm", NORM_COST * tokens * 2 * dim
