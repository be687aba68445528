"""Tensor-core instructions of a warp against matrix products and transpositions in numpy."""

import numpy as np
import pytest
from ptxsim.harness import HEAD, run, warp
from ptxsim.numerics import bf16_to_f32, f32_to_bf16

RNG = np.random.default_rng(3)


def mma_case(shape, kind, acc="f32"):
    """Run one mma with random fragments; returns (got, want) as matrices."""
    k = int(shape[6:])
    per = 1 if kind == "tf32" else 2
    na, nb = 16 * k // 32 // per, 8 * k // 32 // per
    nc = 4 if acc == "f32" else 2
    left, right = RNG.standard_normal((16, k)).astype(np.float32), RNG.standard_normal((k, 8))
    right, add = right.astype(np.float32), RNG.standard_normal((16, 8)).astype(np.float32)
    narrow, widen = {
        "f16": (lambda x: x.astype(np.float16).view(np.uint16),
                lambda b: b.view(np.float16).astype(np.float32)),
        "bf16": (f32_to_bf16, bf16_to_f32),
        "tf32": (lambda x: x.view(np.uint32) & np.uint32(0xFFFFE000), lambda b: b.view(np.float32)),
    }[kind]  # fmt: skip
    a_bits, b_bits = narrow(left), narrow(right)
    regs = np.zeros((32, na + nb + nc), np.uint32)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for r in range(na):
            row, col = g + 8 * (r & 1), (t * per) + 4 * per * (r >> 1)
            regs[lane, r] = pack(a_bits[row, col : col + per])
        for r in range(nb):
            row = t * per + 4 * per * r
            regs[lane, na + r] = pack(b_bits[row : row + per, g])
        for r in range(nc):
            if acc == "f32":
                value = add[g + 8 * (r >> 1), 2 * t + (r & 1)].view(np.uint32)
            else:
                value = pack(add[g + 8 * r, 2 * t : 2 * t + 2].astype(np.float16).view(np.uint16))
            regs[lane, na + nb + r] = value
    total = na + nb + nc
    names = [f"%r{i}" for i in range(total)]
    loads = "".join(f"ld.global.b32 %r{i}, [%at+{4 * i}];" for i in range(total))
    quads = [", ".join(names[s]) for s in (slice(0, na), slice(na, na + nb), slice(na + nb, total))]
    if acc == "f32":
        move = "".join(f"mov.b32 %f{i}, %r{na + nb + i};" for i in range(4))
        third, fourth = "%f0, %f1, %f2, %f3", "%f4, %f5, %f6, %f7"
        stores = "".join(f"st.global.f32 [%at+{4 * i}], %f{4 + i};" for i in range(4))
    else:
        move, third, fourth = "", quads[2], "%r30, %r31"
        stores = "".join(f"st.global.b32 [%at+{4 * i}], %r{30 + i};" for i in range(2))
    text = f"""{HEAD}
.visible .entry k(.param .u64 p_o, .param .u64 p_x) {{
.reg .b32 %r<40>; .reg .f32 %f<16>; .reg .b64 %at; .reg .b32 %l;
mov.u32 %l, %tid.x; ld.param.u64 %at, [p_x]; mad.wide.u32 %at, %l, {4 * total}, %at;
{loads} {move}
mma.sync.aligned.{shape}.row.col.{acc}.{kind}.{kind}.{acc}
 {{{fourth}}}, {{{quads[0]}}}, {{{quads[1]}}}, {{{third}}};
ld.param.u64 %at, [p_o]; mad.wide.u32 %at, %l, {4 * nc}, %at; {stores}
ret; }}"""
    out = np.zeros((32, nc), np.uint32)
    got, machine = run(text, (1, 1, 1), (32, 1, 1), {"o": (out, "out"), "x": (regs, "in")})
    assert not machine.issues.kinds()
    result = np.zeros((16, 8), np.float32)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for r in range(nc):
            if acc == "f32":
                result[g + 8 * (r >> 1), 2 * t + (r & 1)] = got["o"][lane, r].view(np.float32)
            else:
                result[g + 8 * r, 2 * t : 2 * t + 2] = got["o"][lane, r : r + 1].view(np.float16)
    start = add if acc == "f32" else add.astype(np.float16)
    return result, widen(a_bits).astype(np.float64) @ widen(b_bits).astype(np.float64) + start


def pack(bits):
    return bits.astype(np.uint32)[0] if len(bits) == 1 else bits[0] | np.uint32(bits[1]) << 16


@pytest.mark.parametrize(
    ("shape", "kind", "acc"),
    [
        ("m16n8k8", "f16", "f32"),
        ("m16n8k16", "f16", "f32"),
        ("m16n8k8", "bf16", "f32"),
        ("m16n8k16", "bf16", "f32"),
        ("m16n8k4", "tf32", "f32"),
        ("m16n8k8", "tf32", "f32"),
        ("m16n8k16", "f16", "f16"),
    ],
)
def test_mma(shape, kind, acc):
    got, want = mma_case(shape, kind, acc)
    np.testing.assert_allclose(got, want, rtol=2e-3 if acc == "f16" else 1e-5, atol=1e-2)
    if acc == "f32":
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_mma_f64():
    a, b = RNG.standard_normal((8, 4)), RNG.standard_normal((4, 8))
    c = RNG.standard_normal((8, 8))
    x = np.zeros((32, 4))
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        x[lane] = [a[g, t], b[t, g], c[g, 2 * t], c[g, 2 * t + 1]]
    text = f"""{HEAD}
.visible .entry k(.param .u64 p_o, .param .u64 p_x) {{
.reg .f64 %g<8>; .reg .b64 %at; .reg .b32 %l;
mov.u32 %l, %tid.x; ld.param.u64 %at, [p_x]; mad.wide.u32 %at, %l, 32, %at;
ld.global.v2.f64 {{%g0, %g1}}, [%at]; ld.global.v2.f64 {{%g2, %g3}}, [%at+16];
mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {{%g4, %g5}}, {{%g0}}, {{%g1}}, {{%g2, %g3}};
ld.param.u64 %at, [p_o]; mad.wide.u32 %at, %l, 16, %at; st.global.v2.f64 [%at], {{%g4, %g5}};
ret; }}"""
    got, _ = run(text, (1, 1, 1), (32, 1, 1), {"o": (np.zeros((32, 2)), "out"), "x": (x, "in")})
    np.testing.assert_allclose(got["o"].reshape(8, 8), a @ b + c, rtol=1e-13)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(count, trans):
    tiles = RNG.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    regs = ", ".join(f"%r{i}" for i in range(count))
    stores = "".join(f"st.global.b32 [%d2+{4 * i}], %r{i};" for i in range(count))
    text = f"""{HEAD}
.visible .entry k(.param .u64 p_o, .param .u64 p_x, .param .u64 p_y) {{
.reg .b32 %r<8>; .reg .b64 %d<8>; .reg .b32 %l; .reg .b32 %s; .shared .align 16 .b8 sh[1024];
mov.u32 %l, %tid.x; ld.param.u64 %d1, [p_x]; mad.wide.u32 %d1, %l, 16, %d1;
ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
mov.u32 %s, sh; mad.lo.u32 %s, %l, 16, %s; st.shared.v4.b32 [%s], {{%r4, %r5, %r6, %r7}};
bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{regs}}}, [%s];
ld.param.u64 %d2, [p_o]; mad.wide.u32 %d2, %l, {4 * count}, %d2; {stores}
stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%s+512], {{{regs}}};
bar.warp.sync -1;
setp.ge.u32 %p, %l, {8 * count}; @%p bra END;
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%s+512];
ld.param.u64 %d1, [p_y]; mad.wide.u32 %d1, %l, 16, %d1;
st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};
END: ret; }}""".replace(".reg .b32 %s;", ".reg .b32 %s; .reg .pred %p;")
    arrays = {
        "o": (np.zeros((32, count), np.uint32), "out"),
        "x": (tiles, "in"),
        "y": (np.zeros_like(tiles), "inout"),
    }
    got, machine = run(text, (1, 1, 1), (32, 1, 1), arrays)
    assert not list(map(str, machine.issues))
    halves = got["o"].view(np.uint16).reshape(8, 4, count, 2)  # row, pair, matrix, half
    seen = halves.transpose(2, 0, 1, 3).reshape(count, 8, 8)
    want = tiles[:count].swapaxes(1, 2) if trans else tiles[:count]
    np.testing.assert_array_equal(seen, want)
    np.testing.assert_array_equal(got["y"][:count], tiles[:count])


def test_movmatrix():
    tile = RNG.integers(0, 2**16, (8, 8)).astype(np.uint16)
    got, _ = warp("movmatrix.sync.aligned.m8n8.trans.b16 %o, %a;", tile.view(np.uint32).reshape(-1))
    np.testing.assert_array_equal(got.view(np.uint16).reshape(8, 8), tile.T)
