"""Every floating-point opcode of the interpreter against numpy and exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ptxsim.harness import elementwise
from ptxsim.numerics import bf16_to_f32, f32_to_bf16, f64_to_half, half_to_f64, round_tf32

RNG = np.random.default_rng(11)
NAN, INF = np.nan, np.inf


def floats(dtype=np.float32, count=256, spread=20.0, special=True):
    """Numbers of many sizes, with zeros, infinities, NaN and subnormals mixed in."""
    out = (RNG.standard_normal(count) * 2.0 ** RNG.uniform(-spread, spread, count)).astype(dtype)
    if special:
        tiny = np.finfo(dtype).tiny
        out[:10] = [0.0, -0.0, INF, -INF, NAN, tiny, -tiny, tiny / 4, -tiny / 4, 1.0]
        RNG.shuffle(out)
    return out


def same(got, want):
    """Equal bits, any NaN being as good as another."""
    want = np.asarray(want, got.dtype)
    both = np.isnan(got) & np.isnan(want)
    unsigned = f"u{got.dtype.itemsize}"
    ok = both | (got.view(unsigned) == want.view(unsigned))
    bad = np.flatnonzero(~ok)[:5]
    assert ok.all(), (got[bad], want[bad])


def flush(x):
    """Subnormal float32 to zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


FN = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FN)
def test_arithmetic(name, dtype):
    a, b = floats(dtype), floats(dtype)
    kind = f"f{8 * np.dtype(dtype).itemsize}"
    with np.errstate(all="ignore"):
        for text in (name, name + ".rn"):
            same(elementwise(f"{text}.{kind} %o, %a, %b;", [a, b], dtype), FN[name](a, b))
        if dtype == np.float32:
            same(elementwise(f"{name}.ftz.f32 %o, %a, %b;", [a, b], dtype), flush(FN[name](a, b)))
            sat = np.nan_to_num(np.clip(FN[name](a, b), 0, 1), nan=0.0)
            same(elementwise(f"{name}.sat.f32 %o, %a, %b;", [a, b], dtype) + 0, sat + 0)


def rounded(exact, mode):
    """The float32 next to an exact fraction in the direction of `mode`."""
    near = np.float32(float(exact))
    value = Fraction(float(near))
    if value == exact or mode == "rn":
        return near
    up = mode == "rp" or (mode == "rz" and exact < 0)
    if up and value < exact:
        return np.nextafter(near, np.float32(INF))
    if not up and value > exact:
        return np.nextafter(near, np.float32(-INF))
    return near


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    a, b, c = (floats(spread=6.0, special=False) for _ in range(3))
    fractions = [[Fraction(float(x)) for x in row] for row in (a, b, c)]
    got = elementwise(f"fma.{mode}.f32 %o, %a, %b, %c;", [a, b, c], np.float32)
    same(got, [rounded(x * y + z, mode) for x, y, z in zip(*fractions, strict=True)])
    got = elementwise(f"add.{mode}.f32 %o, %a, %b;", [a, b], np.float32)
    same(got, [rounded(x + y, mode) for x, y, _ in zip(*fractions, strict=True)])
    got = elementwise(f"mul.{mode}.f32 %o, %a, %b;", [a, b], np.float32)
    same(got, [rounded(x * y, mode) for x, y, _ in zip(*fractions, strict=True)])


def test_fma_f32_rounds_once():
    a, b = (floats(spread=8.0, special=False) for _ in range(2))
    c = -(a * b)  # what is left is the rounding error of the product
    got = elementwise("fma.rn.f32 %o, %a, %b, %c;", [a, b, c], np.float32)
    exact = [
        float(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    same(got, np.array(exact).astype(np.float32))
    assert np.count_nonzero(got) > 200


def test_fma_f32_special_values_and_flush():
    a, b, c = floats(), floats(), floats()
    with np.errstate(all="ignore"):
        exact = (a.astype(np.float64) * b + c).astype(np.float32)
        same(elementwise("fma.rn.f32 %o, %a, %b, %c;", [a, b, c], np.float32), exact)
        same(elementwise("fma.rn.ftz.f32 %o, %a, %b, %c;", [a, b, c], np.float32), flush(exact))
        same(elementwise("mad.rn.f32 %o, %a, %b, %c;", [a, b, c], np.float32), exact)
        sat = np.nan_to_num(np.clip(exact, 0, 1), nan=0.0)
        same(elementwise("fma.rn.sat.f32 %o, %a, %b, %c;", [a, b, c], np.float32) + 0, sat + 0)


def test_fma_f64_carries_the_error_of_the_product():
    a, b = (floats(np.float64, spread=8.0, special=False) for _ in range(2))
    c = -(a * b)
    got = elementwise("fma.rn.f64 %o, %a, %b, %c;", [a, b, c], np.float64)
    exact = [
        float(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    same(got, exact)
    assert np.count_nonzero(got) > 200
    special = floats(np.float64)
    with np.errstate(all="ignore"):
        got = elementwise("fma.rn.f64 %o, %a, %b, %c;", [special, special, special], np.float64)
        want = special * special + special
        np.testing.assert_allclose(got, want, rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_max_rules(name, dtype):
    a, b = floats(dtype), floats(dtype)
    b[::5] = -a[::5]
    kind = f"f{8 * np.dtype(dtype).itemsize}"

    def number_wins(x, y):
        if math.isnan(x) or math.isnan(y):
            return y if math.isnan(x) else x
        if x == y == 0:  # -0 is below +0
            negative = [math.copysign(1, v) < 0 for v in (x, y)]
            return -0.0 if (any if name == "min" else all)(negative) else 0.0
        return (min if name == "min" else max)(x, y)

    want = np.array([number_wins(float(x), float(y)) for x, y in zip(a, b, strict=True)], dtype)
    same(elementwise(f"{name}.{kind} %o, %a, %b;", [a, b], dtype), want)
    if dtype == np.float32:
        either = np.isnan(a) | np.isnan(b)
        got = elementwise(f"{name}.NaN.f32 %o, %a, %b;", [a, b], dtype)
        same(got, np.where(either, NAN, want))
        c = floats(special=False)
        got = elementwise(f"{name}.f32 %o, %a, %b, %c;", [a, b, c], dtype)
        fn = np.fmin if name == "min" else np.fmax
        np.testing.assert_array_equal(got, fn(fn(a, b), c))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sign_bits(dtype):
    a, b = floats(dtype), floats(dtype)
    kind = f"f{8 * np.dtype(dtype).itemsize}"
    same(elementwise(f"neg.{kind} %o, %a;", [a], dtype), -a)
    same(elementwise(f"abs.{kind} %o, %a;", [a], dtype), np.abs(a))
    got = elementwise(f"copysign.{kind} %o, %a, %b;", [a, b], dtype)
    same(got, np.copysign(b, a))


@pytest.mark.parametrize("text", ["div.rn.f32", "div.full.f32", "div.approx.f32", "div.rn.f64"])
def test_division(text):
    dtype = np.float64 if text.endswith("64") else np.float32
    a, b = floats(dtype), floats(dtype)
    with np.errstate(all="ignore"):
        same(elementwise(f"{text} %o, %a, %b;", [a, b], dtype), a / b)
        if text == "div.full.f32":
            got = elementwise("div.full.ftz.f32 %o, %a, %b;", [a, b], dtype)
            same(got, flush(flush(a) / flush(b)))


FUNCTIONS = {
    "ex2.approx": np.exp2,
    "lg2.approx": np.log2,
    "rcp.approx": lambda x: np.float32(1) / x,
    "rcp.rn": lambda x: np.float32(1) / x,
    "rsqrt.approx": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "sqrt.approx": np.sqrt,
    "sqrt.rn": np.sqrt,
    "sin.approx": np.sin,
    "cos.approx": np.cos,
    "tanh.approx": np.tanh,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    a = floats(spread=5.0)
    with np.errstate(all="ignore"):
        same(elementwise(f"{name}.f32 %o, %a;", [a], np.float32), FUNCTIONS[name](a))
        got = elementwise(f"{name}.ftz.f32 %o, %a;", [a], np.float32)
        same(got, flush(FUNCTIONS[name](flush(a))))


def test_functions_of_f64():
    a = np.abs(floats(np.float64))
    with np.errstate(all="ignore"):
        same(elementwise("sqrt.rn.f64 %o, %a;", [a], np.float64), np.sqrt(a))
        same(elementwise("rcp.rn.f64 %o, %a;", [a], np.float64), 1 / a)
        upper = ((1 / a).view(np.uint64) & ~np.uint64(0xFFFFFFFF)).view(np.float64)
        same(elementwise("rcp.approx.ftz.f64 %o, %a;", [a], np.float64), upper)


def test_testp():
    a = floats()
    tiny = np.finfo(np.float32).tiny
    want = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "subnormal": (np.abs(a) < tiny) & (a != 0),
        "normal": np.isfinite(a) & (np.abs(a) >= tiny),
    }
    for name, truth in want.items():
        line = f"testp.{name}.f32 %p1, %a; selp.u32 %o, 1, 0, %p1;"
        np.testing.assert_array_equal(elementwise(line, [a], np.uint32), truth)


ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", ORDERED)
def test_setp_and_nan(name, kind):
    dtype = np.float32 if kind == "f32" else np.float64
    a, b = floats(dtype), floats(dtype)
    b[::3] = a[::3]
    nan = np.isnan(a) | np.isnan(b)
    for text, want in (
        (name, ORDERED[name](a, b)),
        (name + "u", ORDERED[name](a, b) | nan),
        ("num", ~nan),
        ("nan", nan),
    ):
        line = f"setp.{text}.{kind} %p1, %a, %b; selp.u32 %o, 1, 0, %p1;"
        np.testing.assert_array_equal(elementwise(line, [a, b], np.uint32), want)


# -- halves ---------------------------------------------------------------------------------------


def halves(kind, count=256):
    """Bits of f16 or bf16 numbers with specials."""
    values = floats(np.float32, count, spread=4.0)
    return f64_to_half(values.astype(np.float64), kind)


def as_float(bits, kind):
    return half_to_f64(bits, kind)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn", "min", "max", "neg", "abs"])
def test_half_arithmetic_rounds_once(name, kind):
    a, b, c = (halves(kind) for _ in range(3))
    x, y, z = (as_float(v, kind) for v in (a, b, c))
    fn = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "fma.rn": lambda: x * y + z,
        "min": lambda: np.fmin(x, y),
        "max": lambda: np.fmax(x, y),
        "neg": lambda: -x,
        "abs": lambda: np.abs(x),
    }[name]
    count = {"fma.rn": 3, "neg": 1, "abs": 1}.get(name, 2)
    operands = ", ".join(["%a", "%b", "%c"][:count])
    with np.errstate(all="ignore"):
        want = as_float(f64_to_half(fn(), kind), kind)
        got = as_float(elementwise(f"{name}.{kind} %o, {operands};", [a, b, c], np.uint16), kind)
        np.testing.assert_array_equal(got, want)
        packed = [v.view(np.uint32) for v in (a, b, c)]
        pair = elementwise(f"{name}.{kind}x2 %o, {operands};", packed, np.uint32)
        np.testing.assert_array_equal(as_float(pair.view(np.uint16), kind), want)


def test_half_functions_and_comparisons():
    a, b = halves("f16"), halves("f16")
    x, y = as_float(a, "f16"), as_float(b, "f16")
    with np.errstate(all="ignore"):
        got = elementwise("ex2.approx.f16 %o, %a;", [a], np.uint16)
        np.testing.assert_array_equal(got.view(np.float16), np.exp2(x).astype(np.float16))
        got = elementwise("fma.rn.relu.f16 %o, %a, %b, %b;", [a, b], np.uint16).view(np.float16)
        want = (x * y + y).astype(np.float16)
        np.testing.assert_array_equal(got, np.where(want < 0, 0, want))
    line = "setp.lt.f16 %p1, %a, %b; selp.u32 %o, 1, 0, %p1;"
    np.testing.assert_array_equal(elementwise(line, [a, b], np.uint32), x < y)
    line = (
        "setp.gt.f16x2 %p1|%p2, %a, %b; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2;"
        "or.b32 %o, %r1, %r2;"
    )
    got = elementwise(line, [a.view(np.uint32), b.view(np.uint32)], np.uint32)
    np.testing.assert_array_equal(got, (x > y)[::2] + 2 * (x > y)[1::2])


# -- conversions ----------------------------------------------------------------------------------

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
WHOLE = {"s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "s32": np.int32,
         "u32": np.uint32, "s64": np.int64, "u64": np.uint64}  # fmt: skip


@pytest.mark.parametrize("mode", ROUND)
@pytest.mark.parametrize("target", WHOLE)
@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_float_to_integer(source, target, mode):
    a = floats(source, spread=35.0)
    info = np.iinfo(WHOLE[target])

    def want(x):
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return info.max if x > 0 else info.min
        return min(max(int(ROUND[mode](x)), info.min), info.max)

    kind = f"f{8 * np.dtype(source).itemsize}"
    got = elementwise(f"cvt.{mode}.{target}.{kind} %o, %a;", [a], WHOLE[target])
    assert got.tolist() == [want(float(x)) for x in a]


@pytest.mark.parametrize("source", ["s8", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["f32", "f64"])
def test_integer_to_float(source, target):
    info = np.iinfo(WHOLE[source])
    a = RNG.integers(info.min, info.max, 256, WHOLE[source], endpoint=True)
    a[:2] = [info.min, info.max]
    dtype = np.float32 if target == "f32" else np.float64
    got = elementwise(f"cvt.rn.{target}.{source} %o, %a;", [a], dtype)
    same(got, [dtype(int(x)) if target == "f64" else a.dtype.type(x).astype(dtype) for x in a])
    if target == "f32":
        got = elementwise(f"cvt.rz.f32.{source} %o, %a;", [a], dtype)
        assert all(abs(int(g)) <= abs(int(x)) for g, x in zip(got, a, strict=True))


def test_float_to_float():
    a, d = floats(), floats(np.float64)
    with np.errstate(all="ignore"):
        same(elementwise("cvt.f64.f32 %o, %a;", [a], np.float64), a.astype(np.float64))
        same(elementwise("cvt.rn.f32.f64 %o, %a;", [d], np.float32), d.astype(np.float32))
        same(elementwise("cvt.rni.f32.f32 %o, %a;", [a], np.float32), np.rint(a))
        same(elementwise("cvt.rmi.f32.f32 %o, %a;", [a], np.float32), np.floor(a))
        same(elementwise("cvt.ftz.f32.f32 %o, %a;", [a], np.float32), flush(a))
        want = np.nan_to_num(np.clip(a, 0, 1), nan=0.0)
        same(elementwise("cvt.sat.f32.f32 %o, %a;", [a], np.float32) + 0, want + 0)
        small = floats(np.float64, spread=3.0, special=False)
        got = elementwise("cvt.rz.f32.f64 %o, %a;", [small], np.float32)
        same(got, [rounded(Fraction(x), "rz") for x in small.tolist()])


def test_halves_to_and_from_f32():
    a = floats(spread=12.0)
    with np.errstate(all="ignore"):
        want = a.astype(np.float16)
        got = elementwise("cvt.rn.f16.f32 %o, %a;", [a], np.uint16).view(np.float16)
        np.testing.assert_array_equal(got, want)
        back = elementwise("cvt.f32.f16 %o, %a;", [want.view(np.uint16)], np.float32)
        same(back, want.astype(np.float32))
        b16 = f32_to_bf16(a)
        got = elementwise("cvt.rn.bf16.f32 %o, %a;", [a], np.uint16)
        same(bf16_to_f32(got), bf16_to_f32(b16))
        same(elementwise("cvt.f32.bf16 %o, %a;", [b16], np.float32), bf16_to_f32(b16))
        cut = elementwise("cvt.rz.bf16.f32 %o, %a;", [a], np.uint16)
        finite = ~np.isnan(a)
        np.testing.assert_array_equal(cut[finite], (a.view(np.uint32) >> 16)[finite])


def test_bf16_rounding_is_to_nearest_even():
    a = np.array([1.00390625, 1.01171875, 1.0 + 2.0**-8 + 2.0**-20, -1.00390625], np.float32)
    want = np.array([1.0, 1.015625, 1.0078125, -1.0], np.float32)
    got = elementwise("cvt.rn.bf16.f32 %o, %a;", [a], np.uint16)
    same(bf16_to_f32(got), want)
    double = np.array([1.00390625 + 2.0**-40], np.float64)  # rounding twice would give 1.0
    assert bf16_to_f32(f64_to_half(double, "bf16"))[0] == np.float32(1.0078125)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_pairs_from_f32(kind):
    a, b = floats(spread=8.0), floats(spread=8.0)
    with np.errstate(all="ignore"):
        got = elementwise(f"cvt.rn.{kind}x2.f32 %o, %a, %b;", [a, b], np.uint32)
        low = elementwise(f"cvt.rn.{kind}.f32 %o, %b;", [a, b], np.uint16)
        high = elementwise(f"cvt.rn.{kind}.f32 %o, %a;", [a, b], np.uint16)
        np.testing.assert_array_equal(got.view(np.uint16)[::2], low)
        np.testing.assert_array_equal(got.view(np.uint16)[1::2], high)
        relu = elementwise(f"cvt.rn.relu.{kind}x2.f32 %o, %a, %b;", [a, b], np.uint32)
        negative = (b < 0) & (low.view(np.uint16) != 0x8000)
        assert (as_float(relu.view(np.uint16)[::2], kind)[negative] == 0).all()


def test_half_to_integer_and_back():
    a = halves("f16")
    x = as_float(a, "f16")
    got = elementwise("cvt.rni.s32.f16 %o, %a;", [a], np.int32)
    want = np.clip(
        np.nan_to_num(np.rint(x), nan=0, posinf=2**31 - 1, neginf=-(2**31)), -(2**31), 2**31 - 1
    )
    np.testing.assert_array_equal(got, want.astype(np.int32))
    n = RNG.integers(-4000, 4000, 256).astype(np.int32)
    got = elementwise("cvt.rn.f16.s32 %o, %a;", [n], np.uint16)
    np.testing.assert_array_equal(got.view(np.float16), n.astype(np.float16))
    got = elementwise("cvt.rn.bf16.s32 %o, %a;", [n], np.uint16)
    np.testing.assert_array_equal(got, f32_to_bf16(n.astype(np.float32)))


def test_tf32():
    a = floats(special=False)
    got = elementwise("cvt.rna.tf32.f32 %o, %a;", [a], np.uint32)
    np.testing.assert_array_equal(got, round_tf32(a))
    assert (np.abs(got.view(np.float32) / a - 1) <= 2.0**-11).all()
    assert not (got & np.uint32(0x1FFF)).any()


def test_float_literals():
    a = floats()
    same(elementwise("add.f32 %o, %a, 0f3F800000;", [a], np.float32), a + np.float32(1))
    d = floats(np.float64)
    same(elementwise("mul.f64 %o, %a, 0d4000000000000000;", [d], np.float64), d * 2)
