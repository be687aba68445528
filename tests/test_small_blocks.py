"""Which block of the joint backward launch works on which tile: each tile of both sides once.

The kernel's own arithmetic on the numbers that a launch brings, for all blocks of a grid at once:
products of 32 bits, one block of the query side among those of the key side, tiles and warps.
"""

import random

import numpy as np
import pytest
from test_plan import problem, unpacked

from natcupy.cuda import small, small_tiles
from natcupy.cuda.heuristics import QUERIES


def divide(n, values, by):
    """`divide` of small.cuh, for arrays."""
    times, shift = values[f"{by}.times"] % 2**32, values[f"{by}.shift"]
    n = np.asarray(n, np.uint64)
    assert (n < 2**31).all()
    product = (n << np.uint64(1)) * np.uint64(times)
    return (product >> np.uint64(32 + shift)).astype(np.int64)


def remainder(n, values, by):
    """(n % number, n // number)."""
    whole = divide(n, values, by)
    return np.asarray(n, np.int64) - whole * values[f"{by}.number"], whole


def tiles_of(number, values, of):
    """`SmallItem::set`: (image, group, extent, begin) by tile, and which tiles there are."""
    group, extent, begin = [0, 0], [0, 0], [0, 0]
    for axis, step in ((1, 8 * values[f"{of}.blocks"]), (0, values[f"{of}.rows"])):
        group[axis], number = remainder(number, values, f"{of}.by_dilation.{axis}")
        at, number = remainder(number, values, f"{of}.by_tiles.{axis}")
        begin[axis] = at * step
        rest = values[f"{of}.length.{axis}"] - group[axis] + values[f"{of}.dilation.{axis}"] - 1
        extent[axis] = divide(rest, values, f"{of}.by_dilation.{axis}")
    there = (begin[0] < extent[0]) & (begin[1] < extent[1])
    return (number, group, extent, begin), there


def warps_of(threads, values, of):
    """`Role`: (first column in the tile, split, head in the block) of every warp."""
    column, rest = remainder(np.arange(threads // 32), values, f"{of}.by_blocks")
    split, head = remainder(rest, values, f"{of}.by_splits")
    return zip(8 * column, split, head, strict=True)


def count(p, threads, values, of, first_head, number):
    """How often each token and head is somebody's own row, [batch, head, *shape]."""
    found = np.zeros((p.batch, p.heads, *p.shape), np.int64)
    (image, group, extent, begin), there = tiles_of(number, values, of)
    rows = values[f"{of}.rows"]
    last = np.minimum(begin[0] + rows, extent[0]) - 1
    for column, split, head in warps_of(threads, values, of):
        for down in range(2 * split, rows, 2 * values[f"{of}.splits"]):
            row = begin[0] + down
            for side in range(2):
                for right in range(8):
                    y, x = row + side, begin[1] + column + right
                    mine = there & (row <= last) & (y < extent[0]) & (x < extent[1])
                    places = [group[0] + y * p.hood.dilation[0], group[1] + x * p.hood.dilation[1]]
                    where = (image, first_head + head, *places)
                    np.add.at(found, tuple(axis[mine] for axis in where), 1)
    return found


def queries_of(values, blocks):
    """(first head, tile) of each turn of the query side, and (table, first head) of its blocks."""
    items, here = values["items"], values["geometry.heads_here"]
    team, worker = remainder(blocks, values, "geometry.by_teams")
    workers = divide(values["query_blocks"], values, "geometry.by_teams")
    heads, numbers = [], []
    for first in range(0, items, int(workers)):
        turn = first + worker
        heads.append((team * here)[turn < items])
        numbers.append(turn[turn < items])
    return np.concatenate(heads), np.concatenate(numbers), worker, team * here


def keys_of(values, blocks):
    """(first head, tile) of blocks of the key side."""
    team, number = remainder(blocks, values, "key_geometry.by_teams")
    return team * values["key_geometry.heads_here"], number


def sides_of(values, grid):
    """Numbers of blocks of the query side, of the key side, and what the latter lie beside."""
    place, block = remainder(np.arange(grid), values, "by_share")
    far = block + (place - 1) * values["query_blocks"]
    key = (place > 0) & (far < values["key_blocks"])
    return block[place == 0], far[key], block[key], place[key]


def each_once(p, recipe, values, slices):
    """Raise AssertionError unless each query, key and table of bias sums has one owner."""
    threads = recipe.block[0]
    blocks, keys, _, _ = sides_of(values, recipe.grid[0])
    heads, numbers, worker, first_head = queries_of(values, blocks)
    assert (count(p, threads, values, "geometry", heads, numbers) == 1).all()
    assert (count(p, threads, values, "key_geometry", *keys_of(values, keys)) == 1).all()
    here = values["geometry.heads_here"]
    tables = worker[:, None] * p.heads + first_head[:, None] + np.arange(here)
    assert sorted(tables.ravel()) == list(range(slices * p.heads))


def random_call(rng):
    """A problem that one launch may compute, and one of its shapes of tiles."""
    while True:
        kernel = [rng.randint(2, 13) for _ in range(2)]
        dilation = [rng.choice((1, 1, 2, 3)) for _ in range(2)]
        room = [rng.choice((0, 1, rng.randint(0, 30))) for _ in range(2)]
        shape = [k * d + more for k, d, more in zip(kernel, dilation, room, strict=True)]
        heads, batch, arch = rng.choice((1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((75, 80, 90))
        p = problem(shape, kernel, (1, 1), dilation, (False, False), batch=batch, heads=heads,
                    kv_heads=heads, rpb=True, arch=arch)  # fmt: skip
        if not small.why_not(p) and small.joins(p):
            shapes = [tile.shape for tile in small_tiles.tiles(p, QUERIES)]
            return p, rng.choice([s for s in shapes if small_tiles.joint_tile(p, s)])


@pytest.mark.parametrize("seed", range(4))
def test_every_tile_of_both_sides_once(seed):
    rng = random.Random(seed)
    several = more_keys = 0
    for _ in range(25):
        p, shape = random_call(rng)
        rpb, most = rng.random() < 0.7, rng.choice((1, 2, 3, 7, 1024))
        recipe, slices = small.both_sides(p, rpb, most, shape)
        values = unpacked(recipe)
        each_once(p, recipe, values, slices)
        several += values["items"] > slices
        more_keys += values["key_blocks"] > values["query_blocks"]
    assert several > 5 and more_keys > 5, "blocks of several tiles, several blocks of keys to one"


def test_blocks_that_lie_together_work_on_the_same_tiles():
    """Of the same heads; of the tiles that the block of the query side walks, in its order."""
    p = problem((28, 28), (7, 7), (1, 1), (1, 1), (False, False), batch=3, arch=90, rpb=True)
    for most in (5, 1024):
        recipe, _ = small.both_sides(p, True, most)
        values = unpacked(recipe)
        _, keys, beside, place = sides_of(values, recipe.grid[0])
        head, number = keys_of(values, keys)
        team, worker = remainder(beside, values, "geometry.by_teams")
        workers = divide(values["query_blocks"], values, "geometry.by_teams")
        assert (head == team * values["geometry.heads_here"]).all()
        assert (number == worker + (place - 1) * workers).all()


@pytest.mark.parametrize("field", ["query_blocks", "key_blocks", "items", "by_share"])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_number_that_is_off_by_one_is_found(field, by):
    p = problem((20, 31), (5, 7), (1, 1), (1, 2), (False, False), batch=2, heads=2, kv_heads=2,
                rpb=True)  # fmt: skip
    recipe, slices = small.both_sides(p, True, 6)
    values = unpacked(recipe)
    each_once(p, recipe, values, slices)
    if field == "by_share":
        values |= small._divisor("by_share", values["by_share.number"] + by, of="")
    else:
        values[field] += by
    with pytest.raises((AssertionError, IndexError)):
        each_once(p, recipe, values, slices)
