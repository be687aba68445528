"""How many 32-byte sectors the small-window kernels must move, from the tiles of their plan alone.

In: a case and an architecture. Out: sectors read and written by each kernel. A tile reads the
tokens that it sees (or that see it) of two tensors and its own of the others, each row whole;
beside rows there are the bias tables, and log-sum-exp and delta, 4 bytes a token, read row by row.
"""

from __future__ import annotations

from itertools import product
from math import prod

from kernel_cases import Case
from test_plan import problem

from natcupy.cuda import plan, run, small, small_tiles
from natcupy.neighborhood import inverse_window, window


def sectors(addresses) -> int:
    """Sectors that one access of a warp touches."""
    return len({address // 32 for address in addresses})


def plan_of(given: Case, arch: int):
    return problem(
        given.shape, given.hood.kernel_size, (1, 1), given.hood.dilation, (False, False),
        dtype=run.DTYPES[given.dtype], batch=given.batch, heads=given.heads,
        kv_heads=given.kv_heads, head_dim=given.head_dim, value_dim=given.head_dim,
        rpb=given.rpb, arch=arch,
    )  # fmt: skip


def expected(given: Case, arch: int = 90) -> dict[str, tuple[int, int]]:
    """(sectors read, sectors written) by kernel."""
    p = plan_of(given, arch)
    return {
        "na2d_small_fwd": _kernel(given, p, small.FORWARD),
        "na2d_small_bwd_dq": _kernel(given, p, small.QUERIES),
        "na2d_small_bwd_dkv": _kernel(given, p, small.KEYS),
        **({"na2d_small_bwd_dense": _fused(given, p)} if small.fuses(p) else {}),
        **({"na2d_small_bwd": _joint(given, p)} if small.joins(p) else {}),
    }


def _joint(given: Case, p) -> tuple[int, int]:
    """Both sides; the key side makes delta itself, from out and the gradient of log-sum-exp."""
    pair = small_tiles.joint_tiles(p)[0]
    sides = [_kernel(given, p, side, tile, joint=True)
             for side, tile in zip((small.QUERIES, small.KEYS), pair, strict=True)]  # fmt: skip
    return tuple(map(sum, zip(*sides, strict=True)))


def _kernel(given: Case, p, side: str, tile=None, joint: bool = False) -> tuple[int, int]:
    tile = tile or small_tiles.tile(p, side)
    row = given.head_dim * given.dtype.itemsize // 32
    heads = given.kv_heads if side == small.KEYS else given.heads
    group = given.heads // given.kv_heads if side == small.KEYS else 1
    read = write = 0
    for image, head, box in product(range(given.batch), range(heads), list(_boxes(given, tile))):
        own, segments = _own(box, tile)
        staged = _staged(given, box, side, tile.pitch)
        firsts = [
            ((image * given.heads + head * group + m) * prod(given.shape)) for m in range(group)
        ]
        mine = sum(_scalars(given, firsts[0], *segment, 8) for segment in segments)
        if side == small.FORWARD:
            read += row * (own + 2 * len(staged[0]) * len(staged[1]))
            write += row * own + mine
        elif side == small.QUERIES:
            read += row * (3 * own + 2 * len(staged[0]) * len(staged[1])) + 2 * mine
            write += row * own + (0 if joint else mine)
        else:
            passes = group if group > 1 else 1
            tensors = 3 if joint else 2
            read += row * (2 * own + tensors * passes * len(staged[0]) * len(staged[1]))
            for first in firsts:
                read += 2 * sum(_scalars(given, first, down, staged[1], 32) for down in staged[0])
            write += 2 * row * own
    tables = _tables(given, p, side, tile)
    return read + tables[0], write + tables[1]


def _fused(given: Case, p) -> tuple[int, int]:
    """Five tensors in and three out, log-sum-exp and its gradient, a table per warp."""
    tile, row = small_tiles.tile(p, small.QUERIES), given.head_dim * given.dtype.itemsize // 32
    rows = scalars = 0
    for image, head, box in product(
        range(given.batch), range(given.heads), list(_boxes(given, tile))
    ):
        own, segments = _own(box, tile)
        first = (image * given.heads + head) * prod(given.shape)
        rows += row * own
        scalars += 2 * sum(_scalars(given, first, *segment, 8) for segment in segments)
    slots = small.dense_backward(p, given.rpb, plan.BLOCKS)[1]
    read, written = (0, 0) if not given.rpb else (_table(given), _partial(given, slots))
    return 5 * rows + scalars + slots * given.heads * read, 3 * rows + written


def _boxes(given: Case, tile):
    """Every tile: per axis (group, its length, first token, end), in group coordinates."""
    steps = (tile.rows, 8 * tile.blocks)
    axes = []
    for length, d, step in zip(given.shape, given.hood.dilation, steps, strict=True):
        extents = [(g, -(-(length - g) // d)) for g in range(d)]
        axes.append([(g, n, b, min(b + step, n)) for g, n in extents for b in range(0, n, step)])
    return product(*axes)


def _own(box, tile):
    """Tokens of a tile, and the runs of at most 8 columns in which warps take them."""
    (g, _, top, bottom), (h, _, left, right) = box
    del g, h
    segments = [
        (down, range(x, min(x + 8, right)))
        for down in range(top, bottom)
        for x in range(left, right, 8)
    ]
    return (bottom - top) * (right - left), [
        (_real(box, 0, d), _reals(box, 1, x)) for d, x in segments
    ]


def _real(box, axis: int, position: int) -> tuple[int, int]:
    return box[axis][0], position


def _reals(box, axis: int, positions) -> list[tuple[int, int]]:
    return [(box[axis][0], position) for position in positions]


def _staged(given: Case, box, side: str, pitch: int):
    """Tokens per axis that a tile sees, or that see it, with the columns that fill the pitch."""
    sees = inverse_window if side == small.KEYS else window
    found = []
    for axis, ((_, n, begin, end), k) in enumerate(zip(box, given.hood.kernel_size, strict=True)):
        first, last = sees(begin, n, k)[0], sees(end - 1, n, k)[1]
        if axis == 1:
            first = max(0, min(first, n - pitch))
            last = min(n, first + pitch)
        found.append(_reals(box, axis, range(first, last)))
    return found


def _scalars(given: Case, first: int, down, columns, lanes: int) -> int:
    """Sectors of numbers of 4 bytes, one for each of these tokens of a row."""
    d, e = given.hood.dilation
    line = first + (down[0] + down[1] * d) * given.shape[1]
    at = [4 * (line + g + x * e) for g, x in columns]
    return sum(sectors(at[i : i + lanes]) for i in range(0, len(at), lanes))


def _tables(given: Case, p, side: str, tile) -> tuple[int, int]:
    """Bias tables of all blocks: read whole, and with the gradient one written."""
    if not given.rpb:
        return 0, 0
    if side == small.QUERIES:
        blocks = small.query_side(p, True, plan.BLOCKS, tile.shape)[1]
        return blocks * given.heads * _table(given), _partial(given, blocks)
    return tile.items * given.heads * _table(given), 0


def _table(given: Case) -> int:
    """Sectors of one head's bias table, read row by row with what pads the rows."""
    height, width = given.hood.kernel_size
    pitch = (2 * width + 3) // 4 * 4
    padded = [
        4 * (down * (2 * width - 1) + x) if x < 2 * width - 1 and down >= 0 else None
        for down in range(-1, 2 * height - 1)
        for x in range(pitch)
    ]
    starts = range(0, len(padded), 32)
    return sum(sectors(at for at in padded[i : i + 32] if at is not None) for i in starts)


def _partial(given: Case, tables: int) -> int:
    """Sectors of so many tables of sums per head."""
    height, width = given.hood.kernel_size
    per_head = (2 * height - 1) * (2 * width - 1)
    return sum(
        sectors(4 * (table * per_head + at) for at in range(i, min(i + 32, per_head)))
        for table in range(tables * given.heads)
        for i in range(0, per_head, 32)
    )
