"""Plans are arithmetic: legal on every device, covering every token, one for all image sizes."""

import random
import re
import struct
from importlib import resources
from itertools import product
from math import prod

import pytest

from natcupy.cuda import params, plan, tiling
from natcupy.neighborhood import Neighborhood, inverse_window, window


@pytest.fixture(autouse=True)
def portable():
    """The portable kernels' plans; those for small windows have tests of their own."""
    with plan.use_family("portable"):
        yield


NAMES = ("query", "key", "value", "extra_key", "extra_value", "out", "d_out")


def random_problem(rng, rank=None, largest=70_000):
    rank = rank or rng.choice((1, 2, 2, 3))
    kernel, stride, dilation, shape = [], [], [], []
    for _ in range(rank):
        k = rng.choice((1, 2, 3, 5, 7, 8, 13, 31, 64))
        d = rng.choice((1, 1, 1, 2, 5, 16))
        kernel.append(k)
        dilation.append(d)
        stride.append(rng.randint(1, k))
        room = max(k * d, int(largest ** (1 / rank)))
        shape.append(rng.choice((k * d, k * d + 1, rng.randint(k * d, room))))
    causal = [rng.random() < 0.3 for _ in range(rank)]
    kv_heads = rng.choice((1, 2, 3, 16))
    return problem(
        shape, kernel, stride, dilation, causal,
        dtype=rng.choice(tuple(tiling.ITEM_SIZE)),
        batch=rng.choice((1, 2, 7, 128, 65536, 70_000)),
        kv_heads=kv_heads,
        heads=kv_heads * rng.choice((1, 1, 2, 5)),
        head_dim=rng.choice((1, 5, 8, 31, 32, 64, 80, 128, 256, 511, 512)),
        value_dim=rng.choice((1, 8, 32, 64, 128, 512)),
        extras=rng.choice((0, 0, 1, 4, 300)),
        rpb=rng.random() < 0.5,
    )  # fmt: skip


def problem(shape, kernel_size, stride, dilation, causal, **more):
    sizes = {
        "dtype": "F16", "batch": 2, "heads": 4, "kv_heads": 4, "head_dim": 32, "value_dim": 32,
        "extras": 0, "scale": 0.5, "rpb": False, "arch": 80, "alignment": 16,
    }  # fmt: skip
    sizes |= more
    every = (sizes["batch"], *shape)
    rows = {
        "query": (*every, sizes["heads"], sizes["head_dim"]),
        "key": (*every, sizes["kv_heads"], sizes["head_dim"]),
        "value": (*every, sizes["kv_heads"], sizes["value_dim"]),
        "out": (*every, sizes["heads"], sizes["value_dim"]),
        "d_out": (*every, sizes["heads"], sizes["value_dim"]),
    }
    if sizes["extras"]:
        extra = (sizes["batch"], sizes["extras"], sizes["kv_heads"])
        rows |= {"extra_key": (*extra, sizes["head_dim"])}
        rows |= {"extra_value": (*extra, sizes["value_dim"])}
    strides = tuple((name, plan.contiguous(rows[name])) for name in NAMES if name in rows)
    hood = Neighborhood(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(causal))
    return plan.Problem(shape=tuple(shape), hood=hood, strides=strides, **sizes)


def every_plan(p):
    return plan.forward(p), plan.backward(p, True, p.rpb, True)


def unpacked(recipe):
    """The recipe's argument struct by field name."""
    packer, offsets = params.layout(recipe.spec.entry)
    return dict(zip(offsets, packer.unpack(recipe.args), strict=True))


def test_every_launch_is_legal():
    """5,000 random problems: the limits every architecture shares, and the kernels' own."""
    rng = random.Random(0)
    for _ in range(5_000):
        p = random_problem(rng)
        for made in every_plan(p):
            for recipe in made.recipes:
                check_launch(p, recipe)
            for name, count, _ in made.scratch:
                check_scratch(p, name, count)


def check_scratch(p, name, count):
    """Partial sums stay within the bound unless a single slice of them exceeds it."""
    sums = 8 if p.dtype == "F64" else 4
    rows = p.batch * p.extras * p.kv_heads
    least = {
        "delta": p.batch * p.heads * prod(p.shape),
        "partial": p.heads * p.biases,
        "partial_key": rows * p.head_dim * 32,  # a warp holds up to 32 slices
        "partial_value": rows * p.value_dim * 32,
    }[name]
    assert 0 < count and count * sums <= max(plan.SCRATCH, least * sums), (p, name)


def check_launch(p, recipe):
    constants = dict(recipe.spec.constants)
    threads = prod(recipe.block)
    assert 0 < recipe.grid[0] < 2**31 and recipe.grid[1:] == (1, 1), p
    values = unpacked(recipe)
    many = values.get("slices", 0) >= plan.MANY_SLICES
    most = 1024 if recipe.spec.entry == "reduce_partials" and many else tiling.THREADS
    assert 32 <= threads <= most and threads % 32 == 0, p
    assert 0 <= recipe.shared <= 48 * 1024 - 256, p
    if recipe.spec.entry == "reduce_partials":
        assert recipe.grid[0] == min(-(-values["size"] // recipe.block[0]), plan.LARGEST_GRID)
        assert recipe.block[1].bit_count() == 1, "rows are added up by halves"
        return
    lanes = constants["LANES"]
    assert threads % lanes == 0
    per_chunk = 16 // tiling.ITEM_SIZE[p.dtype]
    assert lanes * constants["QK_CHUNKS"] * per_chunk >= p.head_dim, p
    assert lanes * constants["V_CHUNKS"] * per_chunk >= p.value_dim, p
    if recipe.spec.entry == "na_bwd_extra":
        slots = threads // lanes
        assert slots % values["keys"] == 0 and values["slices"] % (slots // values["keys"]) == 0
        rounds = -(-p.extras // values["keys"])
        blocks = p.batch * p.kv_heads * rounds * values["slices"] // (slots // values["keys"])
        assert blocks == values["blocks"] and recipe.grid[0] == min(blocks, plan.LARGEST_GRID), p
        return
    tile = [values[f"geometry.tile.{a}"] for a in range(3)]
    stage = [values[f"geometry.stage.{a}"] for a in range(3)]
    assert prod(tile) * lanes <= threads, p
    assert min(tile) >= 1 and min(stage) >= 1, p
    capacity = values["geometry.capacity"]
    assert capacity == prod(stage), p
    row = 16 * lanes * (constants["QK_CHUNKS"] + constants["V_CHUNKS"])
    need = (capacity + 1) * row
    sums = 8 if p.dtype == "F64" else 4
    if recipe.spec.entry == "na_bwd_dkv":
        need += (capacity + 1) * 2 * sums
    if constants.get("RPB_GRAD"):
        assert values["pitch"] >= capacity and values["pitch"] % 2 == 1
        need += threads // lanes * values["pitch"] * sums
    assert recipe.shared == need, p
    heads = values["kv_heads"] if recipe.spec.entry == "na_bwd_dkv" else values["heads"]
    assert recipe.grid[0] % heads == 0
    check_cover(p, values, tile)


def check_cover(p, values, tile):
    """Tiles of every dilation group reach its end; the item count is theirs."""
    items = p.batch
    for a, (length, d) in enumerate(zip(p.shape, p.hood.dilation, strict=True)):
        longest = -(-length // d)
        tiles = values[f"geometry.tiles.{a}"]
        assert (tiles - 1) * tile[a] < longest <= tiles * tile[a], p
        items *= tiles * d
    assert values["items"] == items, p
    assert items // p.batch < 2**32, p  # counted in 32 bits within an image


def owners(p, recipe):
    """Every token that some (item, slot) owns, decoded as the kernels do."""
    v = unpacked(recipe)
    axes = range(p.rank)
    for number in range(v["items"] // p.batch):
        rest, group, begin = number, [0] * p.rank, [0] * p.rank
        for a in reversed(axes):
            rest, group[a] = divmod(rest, p.hood.dilation[a])
        for a in reversed(axes):
            rest, at = divmod(rest, v[f"geometry.tiles.{a}"])
            begin[a] = at * v[f"geometry.tile.{a}"]
        spans = []
        for a in axes:
            d = p.hood.dilation[a]
            members = range(group[a], p.shape[a], d)
            spans.append(members[begin[a] : begin[a] + v[f"geometry.tile.{a}"]])
        yield from product(*spans)


def test_every_token_has_one_owner():
    rng = random.Random(1)
    for _ in range(60):
        p = random_problem(rng, largest=400)
        if prod(p.shape) > 4000:
            continue
        for made in every_plan(p):
            for recipe in made.recipes:
                if "geometry.tile.0" in unpacked(recipe):
                    found = list(owners(p, recipe))
                    assert len(found) == len(set(found)) == prod(p.shape), p


def test_a_new_image_size_compiles_nothing():
    def specs(shape, batch):
        p = problem(shape, (7, 7), (1, 1), (1, 1), (False, False), batch=batch, rpb=True)
        return {recipe.spec for made in every_plan(p) for recipe in made.recipes}

    first = specs((56, 56), 128)
    assert all(specs((h, w), b) == first for h, w, b in ((7, 7, 1), (31, 200, 3), (512, 9, 64)))


def test_window_sizes_share_binaries():
    """A window's size reaches the code only as the number of keys per turn."""
    kinds = {
        plan.forward(problem((64, 64), (k, k), (1, 1), (1, 1), (False, False))).recipes[0].spec
        for k in range(1, 33)
    }
    assert len(kinds) <= 7


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_many_images_and_heads(rank):
    """batch * heads past 65,535: everything lies on the x axis of the grid."""
    for batch, heads in ((65_535, 1), (65_536, 1), (65_537, 3), (70_000, 16), (2**24, 64)):
        p = problem(
            (4,) * rank, (3,) * rank, (1,) * rank, (1,) * rank, (False,) * rank,
            batch=batch, heads=heads, kv_heads=heads,
        )  # fmt: skip
        recipe = plan.forward(p).recipes[0]
        values = unpacked(recipe)
        assert recipe.grid[0] < 2**31 and recipe.grid[0] % heads == 0
        assert values["items"] >= recipe.grid[0] // heads


def test_halo_covers_windows():
    """An inner tile's box holds all that its tokens see; the estimate is exact there."""
    for n, k, s, t in product((20, 33), (1, 2, 5, 8), (1, 2, 5), (1, 4, 7)):
        if s > k:
            continue
        bound = tiling.halo_of((n,), (k,), (s,), (t,))[0]
        for first in range(n - t + 1):
            seen = window(first + t - 1, n, k, s)[1] - window(first, n, k, s)[0]
            assert seen <= bound, (n, k, s, t, first)
        inner = (n // 2) - t
        if s == 1 and inner > k and n - inner - t > k:
            back = inverse_window(inner + t - 1, n, k, s)[1] - inverse_window(inner, n, k, s)[0]
            assert back <= bound


def test_stage_fits():
    rng = random.Random(2)
    for _ in range(2000):
        halo = tuple(rng.randint(1, 300) for _ in range(rng.choice((1, 2, 3))))
        capacity = rng.randint(1, 400)
        stage = tiling.choose_stage(halo, capacity)
        assert prod(stage) <= max(capacity, 1) and all(
            1 <= s <= h for s, h in zip(stage, halo, strict=True)
        )
        if prod(halo) <= capacity:
            assert stage == halo


# ------------------------------------------------------------------------------------------------
# access width


def test_access_never_wider_than_the_address_allows():
    """All offsets within 16 bytes, dims 1 to 64, every dtype."""
    for dtype, size in tiling.ITEM_SIZE.items():
        for offset in range(0, 16, size):
            address = 16 | offset
            for dim in range(1, 65):
                p = problem((9,), (3,), (1,), (1,), (False,), dtype=dtype, heads=3, kv_heads=3,
                            head_dim=dim, value_dim=dim, alignment=address & -address)  # fmt: skip
                width = plan.access(p)
                assert width in (2, 4, 8, 16) and width >= size
                assert offset % width == 0 and dim * size % width == 0
                if offset == 0 and dim * size % 16 == 0:
                    assert width == 16


def test_access_looks_at_strides_that_are_used():
    p = problem((9,), (3,), (1,), (1,), (False,), batch=2)
    (query, strides), *others = p.strides
    padded = (query, (strides[0] + 1, *strides[1:]))
    assert plan.access(p) == 16
    assert plan.access(plan.Problem(**{**p.__dict__, "strides": (padded, *others)})) == 2
    alone = problem((9,), (3,), (1,), (1,), (False,), batch=1)
    assert plan.access(plan.Problem(**{**alone.__dict__, "strides": (padded, *others)})) == 16


# ------------------------------------------------------------------------------------------------
# argument structs: the tables in params.py are what the sources declare

C_TYPES = {"int": ("int", 4), "long long": ("long", 8), "double": ("double", 8)}


def parse_struct(text, name):
    """Fields of `struct name { ... };` as the tables write them: (name, type, count)."""
    body = re.search(rf"^struct {name} {{[^\n]*\n(.*?)^}};", text, re.S | re.M).group(1)
    fields = []
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if not line:
            continue
        kind, star, field, count = re.fullmatch(
            r"(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)(?:\[(\d+)\])?;", line
        ).groups()
        kind = "pointer" if star else C_TYPES.get(kind, (kind,))[0]
        fields.append((field, kind, int(count or 1)))
    return tuple(fields)


def c_layout(fields):
    """Size and alignment by the rules of C, nested structs kept whole."""
    sizes = {"int": 4, "float": 4, "long": 8, "double": 8, "pointer": 8}
    offset = widest = 0
    for _, kind, count in fields:
        size, align = c_layout(params.NESTED[kind]) if kind in params.NESTED else (sizes[kind],) * 2
        offset = -(-offset // align) * align + size * count
        widest = max(widest, align)
    return -(-offset // widest) * widest, widest


def source(name):
    return (resources.files("natcupy.kernels") / name).read_text()


@pytest.mark.parametrize("kernel", sorted(params.PARAMS))
def test_argument_struct(kernel):
    assert parse_struct(source(f"{kernel}.cu"), "Params") == params.PARAMS[kernel]
    assert params.layout(kernel)[0].size == c_layout(params.PARAMS[kernel])[0]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Geometry", "tile.cuh"),
        ("View", "common.cuh"),
        ("SmallGeometry", "small.cuh"),
        ("Divisor", "small.cuh"),
    ],
)
def test_nested_struct(name, file):
    assert parse_struct(source(file), name) == params.NESTED[name]


def test_every_kernel_has_a_table():
    names = {p.name for p in resources.files("natcupy.kernels").iterdir()}
    portable = {f"{kernel}.cu" for kernel in params.PARAMS}
    assert portable <= names


def test_strides_travel_in_64_bits():
    big = problem((2**15, 2**15), (7, 7), (1, 1), (1, 1), (False, False), batch=2**10, heads=64,
                  kv_heads=64)  # fmt: skip
    values = unpacked(plan.forward(big).recipes[0])
    assert values["query.batch"] == 2**30 * 64 * 32 > 2**40


def test_fill_puts_pointers_in_place():
    recipe = plan.forward(problem((9,), (3,), (1,), (1,), (False,))).recipes[0]
    launch = plan.fill(recipe, {"query": 0x1234567890, "lse": 2**63})
    _, offsets = params.layout("na_fwd")
    assert struct.unpack_from("<Q", launch.args, offsets["query.data"]) == (0x1234567890,)
    assert struct.unpack_from("<Q", launch.args, offsets["lse"]) == (2**63,)
    assert struct.unpack_from("<Q", launch.args, offsets["rpb"]) == (0,)
