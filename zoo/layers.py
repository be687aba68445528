"""The parts of the models: stems, downsamplers, blocks. Maps are channels-last `[B, H, W, C]`.

In: numbers (channels, heads, rates) and, for a block, its attention module. Out: modules whose
parameters carry the names of the original checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from natcupy.modules import NeighborhoodAttention2D
from natcupy.zoo.config import ModelConfig

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 has none


class ConvTokenizer(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2, then LayerNorm. NAT (arXiv 2204.07143), 3.2.

    In `[B, in_chans, H, W]`, out `[B, ceil(H/4), ceil(W/4), embed_dim]`.
    """

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Picture to tokens."""
        # Channels-last memory from here on makes every later permute a view.
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, then LayerNorm.

    In `[B, in_chans, H, W]`, zero-padded right and bottom to whole patches; out
    `[B, ceil(H/patch), ceil(W/patch), embed_dim]`.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Picture to tokens."""
        bottom, right = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """3x3 convolution of stride 2 without bias, LayerNorm: half the side, twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, ceil(H/2), ceil(W/2), 2C]`."""
        if _is_laid_out_anew(x):
            return self.norm(self._as_product(x))
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def _as_product(self, x: Tensor) -> Tensor:
        """The convolution as a matrix product: for each token, its nine neighbours in a row."""
        rows, columns = (-(-side // 2) for side in x.shape[1:3])
        x = F.pad(x, (0, 0, 1, 1, 1, 1))
        taps = [
            x[:, row : row + 2 * rows - 1 : 2, column : column + 2 * columns - 1 : 2]
            for row in range(3)
            for column in range(3)
        ]
        return F.linear(torch.cat(taps, -1), self.reduction.weight.permute(0, 2, 3, 1).flatten(1))


def _is_laid_out_anew(x: Tensor) -> bool:
    """Whether Inductor would choose memory layouts for a convolution of these tokens.

    It then takes all maps before it for `[B, C, H, W]`: those kept for the backward pass are copied
    to transposed ones, and it fails on sizes it does not know.
    """
    if not torch.compiler.is_compiling() or _is_exporting():
        return False
    return torch.is_grad_enabled() or x.device.type == "cpu"


class PatchMerging(nn.Module):
    """2x2 neighbours side by side, LayerNorm, Linear without bias. Swin (arXiv 2103.14030), 3.1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, ceil(H/2), ceil(W/2), 2C]`; odd sides get a zero row or column."""
        bottom, right = x.shape[1] % 2, x.shape[2] % 2
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        # The released weights expect the phases (row, column) in the order (0,0) (1,0) (0,1) (1,1).
        phases = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(phases, dim=-1)))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drop whole samples and scale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]` to the same shape."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3f}"


class Block(nn.Module):
    """Pre-norm transformer block around a given attention module, on `[B, H, W, C]`.

    x += drop(gamma1 * attn(norm1(x))); x += drop(gamma2 * mlp(norm2(x))). The gammas exist only
    with layer scale (arXiv 2103.17239).
    """

    downsample = None  # a block may stand as a stage of its own: it keeps the map's size

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False  # recompute activations in the backward pass
        self.layer_scale = layer_scale
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.empty(dim))
            self.gamma2 = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gammas to `layer_scale`, as after `to_empty`."""
        if self.layer_scale is not None:
            nn.init.constant_(self.gamma1, self.layer_scale)
            nn.init.constant_(self.gamma2, self.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the same shape."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._residuals, x, use_reentrant=False)
        return self._residuals(x)

    # Sum and norm stay two operators: one pass for both would spare 2 of the 16 tensors that the
    # norms, sums and GELU of a block move, in eager mode alone (torch.compile fuses them), and a
    # block's last sum would have to wait for the first norm of the next block.
    def _residuals(self, x: Tensor) -> Tensor:
        x = _add(x, self.gamma1, self.drop_path(self.attn(self.norm1(x))))
        return _add(x, self.gamma2, self.drop_path(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """Blocks of one level. The downsampler stands beside them: feature maps are taken before it."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the same shape, without the downsampler."""
        for block in self.blocks:
            x = block(x)
        return x


def neighborhood_stages(config: ModelConfig, downsampler: type[nn.Module]) -> Iterator[Stage]:
    """The levels of a hierarchical model, with a downsampler after each but the last."""
    last = len(config.depths) - 1
    for level, blocks in enumerate(neighborhood_blocks(config)):
        yield Stage(blocks, downsampler(config.dims[level]) if level < last else None)


def neighborhood_blocks(config: ModelConfig) -> Iterator[list[Block]]:
    """Per level, its blocks with 2-D neighborhood attention and relative positional bias."""
    rates = iter(drop_path_rates(config))
    for level, (dim, depth) in enumerate(zip(config.dims, config.depths, strict=True)):
        yield [
            Block(
                dim,
                NeighborhoodAttention2D(
                    dim,
                    config.num_heads[level],
                    config.kernel_size,
                    dilation=config.dilation(level, block),
                    rel_pos_bias=True,
                ),
                config.mlp_ratio,
                next(rates),
                config.layer_scale,
            )
            for block in range(depth)
        ]


def drop_path_rates(config: ModelConfig) -> list[float]:
    """A linear ramp from 0 to `drop_path_rate` over all blocks in order."""
    last = max(sum(config.depths) - 1, 1)
    return [config.drop_path_rate * block / last for block in range(sum(config.depths))]


def init_weights(module: nn.Module) -> None:
    """The papers' initialisation of one module, for `nn.Module.apply`.

    Linear: truncated normal of deviation 0.02, bias 0. LayerNorm: 1 and 0. Convolutions keep
    torch's own; `rpb` is set where it is made.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _add(x: Tensor, gamma: Tensor | None, branch: Tensor) -> Tensor:
    return x + branch if gamma is None else torch.addcmul(x, gamma, branch)
