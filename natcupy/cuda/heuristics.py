"""Which family of kernels runs a call, and how large its tiles are: the table and its reasons.

In: an architecture, a class of shapes, and tiles that would be legal. Out: the one that runs. A
`Row` of the table decides where there is one, else the least `cost`. Every row says why: `Counted`
holds the traffic and the occupancy that made it the cheapest, which a test counts again, and
`Measured` names a record in `benchmarks/results`, as `python -m benchmarks.tiles` makes them. Tiles
never decide whether a result is right, and for outputs and gradients but that of the bias not even
its bits: all tiles of these two families sum in the same order. (Those of `mma`, which do not, are
not chosen here: a call has one.)

Pure arithmetic over plain numbers, so that every architecture can be tried without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

# The sides of a call, by whose rows stay with a block: a kernel of each family computes each.
FORWARD, QUERIES, KEYS = "forward", "queries", "keys"
SIDES = (FORWARD, QUERIES, KEYS)
BOTH = "both"  # QUERIES and KEYS in one launch


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor holds, and how many the common chip has (CUDA guide, table 30)."""

    multiprocessors: int
    shared: int  # KiB; a block may have all but one of them, on sm_75 all
    threads: int
    blocks: int


ARCHITECTURES = {
    75: Architecture(40, 64, 1024, 16),
    80: Architecture(108, 164, 2048, 32),
    86: Architecture(84, 100, 1536, 16),
    87: Architecture(16, 164, 1536, 16),
    89: Architecture(128, 100, 1536, 24),
    90: Architecture(132, 228, 2048, 32),
    100: Architecture(148, 228, 2048, 32),
    103: Architecture(148, 228, 2048, 32),
    110: Architecture(20, 228, 1536, 24),
    120: Architecture(170, 100, 1536, 24),
    121: Architecture(48, 100, 1536, 24),
}
CLASSES = {  # architectures that hold alike share the rows of the table
    "64 KiB": (75,),
    "164 KiB": (80, 87),
    "100 KiB": (86, 89, 120, 121),
    "228 KiB": (90, 100, 103, 110),
}


def architecture(arch: int) -> Architecture:
    """The numbers of `arch`; of an unknown one, those of the nearest older."""
    known = [number for number in ARCHITECTURES if number <= arch]
    return ARCHITECTURES[max(known, default=min(ARCHITECTURES))]


def arch_class(arch: int) -> str:
    """The class of architectures whose rows `arch` uses."""
    shared = architecture(arch).shared
    return next(name for name in CLASSES if name == f"{shared} KiB")


def block_limit(arch: int) -> int:
    """Bytes of shared memory that one block may have."""
    return (architecture(arch).shared - (arch >= 80)) * 1024


# ------------------------------------------------------------------------------------------------
# families

# Keys of a window from which the small-window kernels run where they can, by dtype. Below, more
# than three quarters of a step of 16 columns is masked. Counted, not measured.
LEAST_KEYS = {"F16": 9, "BF16": 9, "F32": 9}


def family(dtype: str, keys: int) -> str:
    """The family that is expected to be the faster for windows of `keys` keys."""
    return "small" if keys >= LEAST_KEYS.get(dtype, keys + 1) else "portable"


# ------------------------------------------------------------------------------------------------
# what a tile costs, by counting

# Tensors of its own rows that a block moves, beside the two it stages with their halo: query and
# out; query, out, d_out and d_query; key, value, d_key and d_value; both of these.
OWN = {FORWARD: 2, QUERIES: 4, KEYS: 4, BOTH: 8}
# Warps that hide some of the latency; registers allow no more.
WANTED = {FORWARD: 24, QUERIES: 16, KEYS: 16, BOTH: 16}
# Instructions of a warp before and after its pairs of rows, its share of staging among them, in
# those of one pair: counted in the tiles of a 56x56 map. Not of dense groups forward: with two
# warps a group an H200 is 10 % faster than with one, though they count more instructions.
AROUND = {FORWARD: 1.0, QUERIES: 0.4, KEYS: 0.4, BOTH: 0.4}
ALONE = 1.5  # a block without another beside it loads and computes in turn, not at once


@dataclass(frozen=True)
class Cover:
    """How blocks cover a problem, in the numbers that cost time.

    `halo` is staged tokens per token, `fill` the share of a block's places that hold a token,
    `around` what `AROUND` says.
    """

    shape: tuple[int, int, int, int]  # blocks of 8 columns, rows, splits, heads
    halo: float
    fill: float
    shared: int
    grid: int
    most_warps: int  # that a multiprocessor's registers hold
    around: float = 0.0

    @property
    def warps(self) -> int:
        """Warps of a block."""
        blocks, _, splits, heads = self.shape
        return blocks * splits * heads

    @property
    def balance(self) -> float:
        """The share of a block's time that its warps work, as each takes whole pairs of rows."""
        _, rows, splits, _ = self.shape
        pairs = rows // 2
        return pairs / (splits * -(-pairs // splits))


def shared_holds(arch: int, shared: int) -> int:
    """Blocks of `shared` bytes of shared memory each that a multiprocessor holds."""
    return architecture(arch).shared * 1024 // (shared + (1024 if arch >= 80 else 0))


def resident(arch: int, cover: Cover) -> int:
    """Blocks that a multiprocessor holds at once."""
    chip, warps = architecture(arch), cover.warps
    return min(
        shared_holds(arch, cover.shared),
        cover.most_warps // warps,
        chip.threads // (32 * warps),
        chip.blocks,
    )


def cost(arch: int, side: str, cover: Cover) -> float:
    """Traffic through L2 in tensors and instructions, over chip, warps and places at work."""
    together = min(max(1, resident(arch, cover)), cover.grid / architecture(arch).multiprocessors)
    # Backward an even share shows no gain: at 14x14 two warps for 7 pairs are 12 % faster than one.
    even = cover.balance if side == FORWARD else 1.0
    busy = min(1.0, together * cover.warps * even / WANTED[side])
    at_work = min(1.0, together) * busy * cover.fill
    _, rows, splits, _ = cover.shape
    work = (OWN[side] + 2 * cover.halo) * (1 + cover.around * 2 * splits / rows)
    return work * (ALONE if together < 2 else 1.0) / at_work


# ------------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Counted:
    """Staged tokens per token, and blocks and warps of a multiprocessor, on the row's own map."""

    halo: float
    blocks: int
    warps: int


@dataclass(frozen=True)
class Measured:
    """The record in `benchmarks/results` and its case that justify a row."""

    record: str
    case: str


@dataclass(frozen=True)
class Row:
    """For 7 x 7 windows, 16-bit rows of 64 bytes and many images: the tile that runs.

    `width` bounds the dilation groups' last axis; the table is searched in order.
    """

    archs: str  # a class of architectures
    side: str
    width: int
    tile: tuple[int, int, int]  # blocks of 8 columns, rows, warps that share a block's rows
    why: Counted | Measured


H200 = partial(Measured, "tiles-nvidia-h200-2026-11-26.json")
WIDE = 2**30
MAPS = {16: (14, 14), 32: (28, 28), 64: (56, 56), WIDE: (112, 200)}  # that rows are counted on
ROWS = (
    Row("64 KiB", FORWARD, 16, (2, 8, 4), Counted(1.63, 2, 16)),
    Row("64 KiB", FORWARD, 32, (4, 8, 2), Counted(1.64, 1, 8)),
    Row("64 KiB", FORWARD, 64, (2, 14, 4), Counted(2.08, 1, 8)),
    Row("64 KiB", FORWARD, WIDE, (2, 14, 4), Counted(1.97, 1, 8)),
    Row("64 KiB", QUERIES, 16, (2, 8, 2), Counted(1.63, 2, 8)),
    Row("64 KiB", QUERIES, 32, (2, 14, 4), Counted(1.65, 1, 8)),
    Row("64 KiB", QUERIES, 64, (4, 6, 2), Counted(2.48, 1, 8)),
    Row("64 KiB", QUERIES, WIDE, (2, 10, 4), Counted(2.29, 1, 8)),
    Row("64 KiB", KEYS, 16, (2, 14, 2), Counted(1.14, 2, 8)),
    Row("64 KiB", KEYS, 32, (4, 10, 2), Counted(1.43, 1, 8)),
    Row("64 KiB", KEYS, 64, (1, 8, 4), Counted(3.29, 2, 8)),
    Row("64 KiB", KEYS, WIDE, (1, 8, 4), Counted(3.39, 2, 8)),
    Row("164 KiB", FORWARD, 16, (2, 14, 4), Counted(1.14, 3, 24)),
    Row("164 KiB", FORWARD, 32, (4, 16, 2), Counted(1.21, 2, 16)),
    Row("164 KiB", FORWARD, 64, (4, 8, 2), Counted(2.05, 2, 16)),
    Row("164 KiB", FORWARD, WIDE, (2, 16, 4), Counted(1.89, 2, 16)),
    Row("164 KiB", QUERIES, 16, (2, 14, 2), Counted(1.14, 4, 16)),
    Row("164 KiB", QUERIES, 32, (4, 14, 2), Counted(1.21, 2, 16)),
    Row("164 KiB", QUERIES, 64, (4, 8, 2), Counted(2.05, 2, 16)),
    Row("164 KiB", QUERIES, WIDE, (2, 16, 4), Counted(1.89, 2, 16)),
    Row("164 KiB", KEYS, 16, (2, 14, 2), Counted(1.14, 4, 16)),
    Row("164 KiB", KEYS, 32, (4, 14, 2), Counted(1.21, 2, 16)),
    Row("164 KiB", KEYS, 64, (2, 20, 4), Counted(1.91, 2, 16)),
    Row("164 KiB", KEYS, WIDE, (2, 16, 4), Counted(1.89, 2, 16)),
    Row("100 KiB", FORWARD, 16, (2, 14, 4), Counted(1.14, 2, 16)),
    Row("100 KiB", FORWARD, 32, (4, 4, 2), Counted(2.29, 2, 16)),
    Row("100 KiB", FORWARD, 64, (2, 8, 4), Counted(2.58, 2, 16)),
    Row("100 KiB", FORWARD, WIDE, (2, 8, 4), Counted(2.43, 2, 16)),
    Row("100 KiB", QUERIES, 16, (2, 14, 4), Counted(1.14, 2, 16)),
    Row("100 KiB", QUERIES, 32, (2, 10, 4), Counted(1.94, 2, 16)),
    Row("100 KiB", QUERIES, 64, (2, 8, 4), Counted(2.58, 2, 16)),
    Row("100 KiB", QUERIES, WIDE, (2, 8, 4), Counted(2.43, 2, 16)),
    Row("100 KiB", KEYS, 16, (2, 14, 4), Counted(1.14, 2, 16)),
    Row("100 KiB", KEYS, 32, (2, 14, 4), Counted(1.65, 2, 16)),
    Row("100 KiB", KEYS, 64, (2, 8, 4), Counted(2.58, 2, 16)),
    Row("100 KiB", KEYS, WIDE, (2, 10, 4), Counted(2.26, 2, 16)),
    Row("228 KiB", FORWARD, 16, (2, 14, 2), Counted(1.14, 6, 24)),
    Row("228 KiB", FORWARD, 32, (4, 14, 2), Counted(1.21, 3, 24)),
    Row("228 KiB", FORWARD, 64, (4, 8, 2), H200("56x56 h2 d1 dim32 k7 b128, forward")),
    Row("228 KiB", FORWARD, WIDE, (2, 16, 4), H200("112x112 h2 d1 dim32 k7 b16, forward")),
    Row("228 KiB", QUERIES, 16, (2, 14, 2), H200("14x14 h8 d1 dim32 k7 b128, queries")),
    Row("228 KiB", QUERIES, 32, (4, 28, 2), Counted(1.0, 2, 16)),
    Row("228 KiB", QUERIES, 64, (7, 8, 1), H200("56x56 h2 d1 dim32 k7 b128, queries")),
    Row("228 KiB", QUERIES, WIDE, (2, 16, 4), H200("112x112 h2 d1 dim32 k7 b16, queries")),
    Row("228 KiB", KEYS, 16, (2, 14, 2), H200("14x14 h8 d1 dim32 k7 b128, keys")),
    Row("228 KiB", KEYS, 32, (4, 28, 2), Counted(1.0, 2, 16)),
    Row("228 KiB", KEYS, 64, (7, 8, 1), H200("56x56 h2 d1 dim32 k7 b128, keys")),
    Row("228 KiB", KEYS, WIDE, (2, 28, 4), Counted(1.66, 2, 16)),
)


@lru_cache(maxsize=1024)
def row_for(arch: int, side: str, width: int) -> Row | None:
    """The first row of `arch` and `side` whose width holds `width`."""
    name = arch_class(arch)
    rows = (row for row in ROWS if (row.archs, row.side) == (name, side))
    return next((row for row in rows if width <= row.width), None)


def rank(arch: int, side: str, covers: Sequence[Cover], pinned: Row | None = None) -> list[Cover]:
    """All covers from the cheapest on, that of `pinned` before them if its grid fills the GPU."""
    ordered = sorted(covers, key=lambda cover: cost(arch, side, cover))
    for cover in ordered if pinned is not None else ():
        held = resident(arch, cover) * architecture(arch).multiprocessors
        if cover.shape[:3] == pinned.tile and cover.grid >= held:
            return [cover, *(other for other in ordered if other is not cover)]
    return ordered
