"""Loads, stores, atomics and asynchronous copies, of every width and state space."""

import numpy as np
import pytest
from ptxsim.harness import HEAD, elementwise, run, warp, warp_kernel

RNG = np.random.default_rng(3)
LANE = np.arange(32)


@pytest.mark.parametrize("vector", ["v2.b32", "v4.b32", "v2.b64", "v4.b16", "v4.b8", "v4.b64"])
@pytest.mark.parametrize("place", ["global", "shared", "local"])
def test_vector_loads_and_stores(vector, place):
    count, bits = int(vector[1]), int(vector.split(".b")[1])
    size = count * bits // 8
    regs = {8: "%h", 16: "%h", 32: "%r2", 64: "%d"}[bits]
    names = ", ".join(f"{regs}{k + 1}" for k in range(count))
    there = {
        "global": f"ld.param.u64 %d9, [p_w]; mad.wide.u32 %d9, %l, {size}, %d9;",
        "shared": f"mov.u64 %d9, sh; mad.wide.u32 %d9, %l, {size}, %d9;",
        "local": "mov.u64 %d9, loc; add.u64 %d9, %d9, 32;",
    }[place]
    text = f"""{HEAD}
.visible .entry k(.param .u64 p_x, .param .u64 p_y, .param .u64 p_w) {{
.reg .b16 %h<8>; .reg .b32 %r2<8>; .reg .b64 %d<16>; .reg .b32 %l; .reg .b64 %at;
.shared .align 32 .b8 sh[1024]; .local .align 32 .b8 loc[64];
mov.u32 %l, %tid.x; ld.param.u64 %at, [p_x]; mad.wide.u32 %at, %l, {size}, %at;
ld.global.nc.{vector} {{{names}}}, [%at];
{there}
st.{place}.{vector} [%d9], {{{names}}};
ld.{place}.{vector} {{{names}}}, [%d9];
ld.param.u64 %at, [p_y]; mad.wide.u32 %at, %l, {size}, %at;
st.global.{vector} [%at], {{{names}}};
ret; }}"""
    x = RNG.integers(0, 256, 32 * size).astype(np.uint8)
    arrays = {"x": (x, "in"), "y": (np.zeros_like(x), "out"), "w": (np.zeros_like(x), "out")}
    got, machine = run(text, (1, 1, 1), (32, 1, 1), arrays)
    assert not list(map(str, machine.issues))
    np.testing.assert_array_equal(got["y"], x)


@pytest.mark.parametrize(
    ("load", "dtype"), [("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16)]
)
def test_loads_extend(load, dtype):
    info = np.iinfo(dtype)
    a = RNG.integers(info.min, info.max, 128, dtype, endpoint=True)
    line = f"mad.wide.u32 %at, %i, {a.itemsize}, %at; ld.global.{load} %o, [%at];"
    line = "ld.param.u64 %at, [p_a]; " + line
    got = elementwise(line, [a], np.int32)
    np.testing.assert_array_equal(got, a.astype(np.int32))


def test_generic_addresses_of_every_space():
    body = (
        "mov.u64 %d1, sh; cvta.shared.u64 %d2, %d1; mad.wide.u32 %d2, %l, 4, %d2;\n"
        "st.b32 [%d2], %a; ld.b32 %r1, [%d2]; cvta.to.shared.u64 %d3, %d2; ld.shared.b32 %q, [%d3];"
        "ld.param.u64 %d4, [p_a]; mad.wide.u32 %d4, %i, 4, %d4; setp.lt.u32 %p1, %l, 16;"
        "selp.b64 %d5, %d2, %d4, %p1; ld.b32 %o, [%d5]; isspacep.shared %p2, %d5;"
        "selp.u32 %r3, 1, 0, %p2; add.u32 %o, %o, %r3;"
    )
    a = RNG.integers(0, 2**31, 32).astype(np.uint32)
    got, q = warp(body, a, shared=128)
    np.testing.assert_array_equal(q, a)
    np.testing.assert_array_equal(got, a + (LANE < 16).astype(np.uint32))


ATOMICS = {
    "add": lambda old, b: (old + b) & 0xFFFFFFFF,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "inc": lambda old, b: 0 if old >= b else old + 1,
    "dec": lambda old, b: b if old == 0 or old > b else old - 1,
}


@pytest.mark.parametrize("place", ["global", "shared", "generic"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics_take_turns(name, place):
    a = RNG.integers(0, 2**32, 32).astype(np.uint32)
    kind = "b32" if name in ("and", "or", "xor", "exch") else "u32"
    if place == "global":
        where, there = "ld.param.u64 %d1, [p_q];", "global."
    else:
        where = "mov.u64 %d1, sh; mov.u32 %r1, 0; st.shared.b32 [%d1], %r1;"
        where = "setp.eq.u32 %p1, %l, 0; mov.u64 %d1, sh; @%p1 st.shared.b32 [%d1], 77;"
        there = "shared."
        if place == "generic":
            where, there = where + " cvta.shared.u64 %d1, %d1;", ""
    text = warp_kernel(f"{where} atom.{there}{name}.{kind} %o, [%d1], %a;", 1, shared=16)
    text = text.split("ld.param.u64 %at, [p_q]; mad")[0] + "ret; }\n"
    start = np.full(32, 77, np.uint32)
    arrays = {"o": (start.copy(), "out"), "q": (start, "inout"), "a": (a, "in")}
    got, machine = run(text, (1, 1, 1), (32, 1, 1), arrays)
    assert not list(map(str, machine.issues))
    old, seen = 77, []
    for value in a.tolist():
        seen.append(old)
        old = ATOMICS[name](old, value)
    assert got["o"].tolist() == seen
    if place == "global":
        assert got["q"][0] == old


def test_atomic_cas_and_floats():
    a = np.arange(32, dtype=np.uint32)
    text = warp_kernel("ld.param.u64 %d1, [p_q]; atom.global.cas.b32 %o, [%d1], %a, 5;", 1)
    text = text.split("ld.param.u64 %at, [p_q]; mad")[0] + "ret; }\n"
    arrays = {"o": (a.copy(), "out"), "q": (np.full(4, 3, np.uint32), "inout"), "a": (a, "in")}
    got, _ = run(text, (1, 1, 1), (32, 1, 1), arrays)
    assert got["o"].tolist() == [3] * 4 + [5] * 28 and got["q"][0] == 5
    x = RNG.standard_normal(32).astype(np.float32)
    text = warp_kernel(
        "ld.param.u64 %d1, [p_q]; mov.b32 %f1, %a; red.global.add.f32 [%d1], %f1;", 1
    )
    text = text.split("ld.param.u64 %at, [p_o]; mad")[0] + "ret; }\n"
    arrays = {"o": (x, "in"), "q": (np.zeros(4, np.float32), "inout"), "a": (x, "in")}
    got, _ = run(text, (1, 1, 1), (32, 1, 1), arrays)
    total = np.float32(0)
    for value in x:
        total += value
    assert got["q"][0] == total


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("given", [None, 0, 3, "size"])
def test_cp_async_fills_with_zeros(size, given):
    x = RNG.integers(1, 256, 32 * 16).astype(np.uint8)
    given = size if given == "size" else given
    tail = "" if given is None else f", {given}"
    kind = "cg" if size == 16 else "ca"
    text = f"""{HEAD}
.visible .entry k(.param .u64 p_o, .param .u64 p_x) {{
.reg .b32 %r<8>; .reg .b64 %d<8>; .reg .b32 %l; .reg .b32 %s; .shared .align 16 .b8 sh[512];
mov.u32 %l, %tid.x; ld.param.u64 %d1, [p_x]; mad.wide.u32 %d1, %l, 16, %d1;
mov.u32 %s, sh; mad.lo.u32 %s, %l, 16, %s; mov.u32 %r0, 0;
st.shared.v4.b32 [%s], {{%r0, %r0, %r0, %r0}};
cp.async.{kind}.shared.global [%s], [%d1], {size}{tail};
cp.async.commit_group; cp.async.wait_group 0;
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%s];
ld.param.u64 %d1, [p_o]; mad.wide.u32 %d1, %l, 16, %d1;
st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}}; ret; }}"""
    got, machine = run(
        text, (1, 1, 1), (32, 1, 1), {"o": (np.zeros_like(x), "out"), "x": (x, "in")}
    )
    assert not list(map(str, machine.issues))
    kept = size if given is None else given
    want = np.where(np.arange(16) < kept, x.reshape(32, 16), 0)
    np.testing.assert_array_equal(got["o"].reshape(32, 16), want)


def test_wait_group_counts_groups():
    """After wait_group 1 the first copy is there and the second is not."""
    x = RNG.integers(1, 2**32, 64).astype(np.uint32)
    text = f"""{HEAD}
.visible .entry k(.param .u64 p_o, .param .u64 p_x) {{
.reg .b32 %r<8>; .reg .b64 %d<8>; .reg .b32 %l; .reg .b32 %s; .shared .align 16 .b8 sh[256];
mov.u32 %l, %tid.x; ld.param.u64 %d1, [p_x]; mad.wide.u32 %d1, %l, 4, %d1;
mov.u32 %s, sh; mad.lo.u32 %s, %l, 4, %s;
cp.async.ca.shared.global [%s], [%d1], 4; cp.async.commit_group;
cp.async.ca.shared.global [%s+128], [%d1+128], 4; cp.async.commit_group;
cp.async.wait_group 1; ld.shared.b32 %r1, [%s+FIRST];
cp.async.wait_all;
ld.param.u64 %d1, [p_o]; mad.wide.u32 %d1, %l, 4, %d1; st.global.b32 [%d1], %r1; ret; }}"""
    arrays = {"o": (np.zeros(32, np.uint32), "out"), "x": (x, "in")}
    got, machine = run(text.replace("FIRST", "0"), (1, 1, 1), (32, 1, 1), arrays)
    assert not machine.issues.kinds()
    np.testing.assert_array_equal(got["o"], x[:32])
    _, machine = run(text.replace("FIRST", "128"), (1, 1, 1), (32, 1, 1), arrays)
    assert machine.issues.kinds() == {"uninitialised"}
