"""Every integer, bit and predicate opcode of the interpreter against Python's integers."""

import numpy as np
import pytest
from ptxsim.harness import elementwise

RNG = np.random.default_rng(7)
EDGES = [0, 1, 2, 3, 31, 32, 33, 255, 256, 0x7F, 0x80, 0x7FFF, 0x8000, 0xFFFF]


def numbers(dtype, count=256):
    """Random bits with the edges of the type mixed in."""
    info = np.iinfo(dtype)
    out = RNG.integers(info.min, info.max, count, dtype, endpoint=True)
    edges = [info.min, info.max, info.max - 1, *[e for e in EDGES if e <= info.max]]
    out[: len(edges)] = edges
    RNG.shuffle(out)
    return out


def expect(fn, *arrays, dtype):
    """`fn` over Python ints, wrapped to the type."""
    bits = 8 * np.dtype(dtype).itemsize
    values = [fn(*(int(x) for x in row)) & ((1 << bits) - 1) for row in zip(*arrays, strict=True)]
    return np.array(values, f"u{bits // 8}").view(dtype)


TYPES = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "u16": np.uint16,
         "s16": np.int16}  # fmt: skip
BITS = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


def quotient(a, b):
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a if b == 0 else a - quotient(a, b) * b


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": remainder,
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name, kind):
    a, b = numbers(TYPES[kind]), numbers(TYPES[kind])
    got = elementwise(f"{name}.{kind} %o, %a, %b;", [a, b], TYPES[kind])
    np.testing.assert_array_equal(got, expect(BINARY[name], a, b, dtype=TYPES[kind]))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64", "u16", "s16"])
def test_mul_hi(kind):
    dtype = TYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a, b = numbers(dtype), numbers(dtype)
    got = elementwise(f"mul.hi.{kind} %o, %a, %b;", [a, b], dtype)
    np.testing.assert_array_equal(got, expect(lambda x, y: (x * y) >> bits, a, b, dtype=dtype))


@pytest.mark.parametrize("kind", ["u32", "s32", "u16", "s16"])
def test_wide_products(kind):
    dtype = TYPES[kind]
    wide = np.dtype(f"{np.dtype(dtype).kind}{2 * np.dtype(dtype).itemsize}").type
    a, b, c = numbers(dtype), numbers(dtype), numbers(wide)
    got = elementwise(f"mul.wide.{kind} %o, %a, %b;", [a, b], wide)
    np.testing.assert_array_equal(got, expect(lambda x, y: x * y, a, b, dtype=wide))
    got = elementwise(f"mad.wide.{kind} %o, %a, %b, %c;", [a, b, c], wide)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: x * y + z, a, b, c, dtype=wide))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_mad(kind):
    dtype = TYPES[kind]
    a, b, c = (numbers(dtype) for _ in range(3))
    got = elementwise(f"mad.lo.{kind} %o, %a, %b, %c;", [a, b, c], dtype)
    np.testing.assert_array_equal(got, expect(lambda x, y, z: x * y + z, a, b, c, dtype=dtype))
    bits = 8 * np.dtype(dtype).itemsize
    got = elementwise(f"mad.hi.{kind} %o, %a, %b, %c;", [a, b, c], dtype)
    want = expect(lambda x, y, z: ((x * y) >> bits) + z, a, b, c, dtype=dtype)
    np.testing.assert_array_equal(got, want)


def test_saturating_add_and_sub():
    a, b = numbers(np.int32), numbers(np.int32)
    for name, fn in (("add", lambda x, y: x + y), ("sub", lambda x, y: x - y)):
        got = elementwise(f"{name}.sat.s32 %o, %a, %b;", [a, b], np.int32)
        clamp = expect(
            lambda x, y, fn=fn: max(-(2**31), min(2**31 - 1, fn(x, y))), a, b, dtype=np.int32
        )
        np.testing.assert_array_equal(got, clamp)


def test_min_max_relu_and_packed():
    a, b = numbers(np.int32), numbers(np.int32)
    got = elementwise("max.relu.s32 %o, %a, %b;", [a, b], np.int32)
    np.testing.assert_array_equal(got, np.maximum(np.maximum(a, b), 0))
    got = elementwise("min.s16x2 %o, %a, %b;", [a, b], np.int32)
    want = np.minimum(a.view(np.int16), b.view(np.int16)).view(np.int32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("name", ["and", "or", "xor", "not", "cnot"])
def test_bitwise(name, kind):
    a, b = numbers(BITS[kind]), numbers(BITS[kind])
    b[:5] = 0
    two = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}
    if name in two:
        got = elementwise(f"{name}.{kind} %o, %a, %b;", [a, b], BITS[kind])
        want = expect(two[name], a, b, dtype=BITS[kind])
    else:
        got = elementwise(f"{name}.{kind} %o, %b;", [a, b], BITS[kind])
        want = expect((lambda x: ~x) if name == "not" else (lambda x: x == 0), b, dtype=BITS[kind])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["s32", "s64", "s16"])
def test_neg_and_abs(kind):
    dtype = TYPES[kind]
    a = numbers(dtype)
    got = elementwise(f"neg.{kind} %o, %a;", [a], dtype)
    np.testing.assert_array_equal(got, expect(lambda x: -x, a, dtype=dtype))
    got = elementwise(f"abs.{kind} %o, %a;", [a], dtype)
    np.testing.assert_array_equal(got, expect(abs, a, dtype=dtype))


@pytest.mark.parametrize("kind", ["b32", "b64", "b16", "u32", "s32", "u64", "s64", "u16", "s16"])
@pytest.mark.parametrize("literal", [None, 0, 5, 31, 32, 63, 64, 70])
def test_shifts(kind, literal):
    dtype = TYPES.get(kind) or BITS[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a = numbers(dtype)
    by = RNG.integers(0, 2 * bits, len(a)).astype(np.uint32)
    by[:3] = [0, bits, 0xFFFFFFFF]
    amount, text = (by, "%b") if literal is None else (np.full_like(by, literal), str(literal))
    if kind[0] == "b":
        got = elementwise(f"shl.{kind} %o, %a, {text};", [a, by], dtype)
        want = expect(lambda x, s: x << s if s < bits else 0, a, amount, dtype=dtype)
    else:
        got = elementwise(f"shr.{kind} %o, %a, {text};", [a, by], dtype)
        want = expect(lambda x, s: x >> min(s, 200), a, amount, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shift(side, mode):
    a, b = numbers(np.uint32), numbers(np.uint32)
    s = RNG.integers(0, 70, len(a)).astype(np.uint32)

    def want(lo, hi, n):
        n = n & 31 if mode == "wrap" else min(n, 32)
        pair = hi << 32 | lo
        return (pair << n) >> 32 if side == "l" else pair >> n

    got = elementwise(f"shf.{side}.{mode}.b32 %o, %a, %b, %c;", [a, b, s], np.uint32)
    np.testing.assert_array_equal(got, expect(want, a, b, s, dtype=np.uint32))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfe(kind):
    dtype = TYPES[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a = numbers(dtype)
    pos = RNG.integers(0, bits + 8, len(a)).astype(np.uint32)
    length = RNG.integers(0, bits + 8, len(a)).astype(np.uint32)

    def want(x, p, n):  # the loop of the PTX manual
        x &= (1 << bits) - 1
        sign = 0
        if kind[0] == "s" and n:
            sign = x >> min(p + n - 1, bits - 1) & 1
        return sum(
            ((x >> (p + i) & 1) if i < n and p + i < bits else sign) << i for i in range(bits)
        )

    got = elementwise(f"bfe.{kind} %o, %a, %b, %c;", [a, pos, length], dtype)
    np.testing.assert_array_equal(got, expect(want, a, pos, length, dtype=dtype))


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bfi(kind):
    dtype = BITS[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a, b = numbers(dtype), numbers(dtype)
    pos = RNG.integers(0, bits + 8, len(a)).astype(np.uint32)
    length = RNG.integers(0, bits + 8, len(a)).astype(np.uint32)

    def want(x, y, p, n):
        for i in range(n):
            if p + i < bits:
                y = y & ~(1 << (p + i)) | (x >> i & 1) << (p + i)
        return y

    got = elementwise(f"bfi.{kind} %o, %a, %b, %c, %d;", [a, b, pos, length], dtype)
    np.testing.assert_array_equal(got, expect(want, a, b, pos, length, dtype=dtype))


def test_bmsk():
    a, b = (RNG.integers(0, 40, 256).astype(np.uint32) for _ in range(2))
    got = elementwise("bmsk.clamp.b32 %o, %a, %b;", [a, b], np.uint32)
    want = expect(lambda p, n: ((1 << min(n, 32)) - 1) << min(p, 32), a, b, dtype=np.uint32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("lut", [0x00, 0x1E, 0x80, 0x96, 0xCA, 0xE8, 0xFE, 0xFF])
def test_lop3(lut):
    a, b, c = (numbers(np.uint32) for _ in range(3))

    def want(x, y, z):
        bits = ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1 for i in range(32))
        return sum((lut >> k & 1) << i for i, k in enumerate(bits))

    got = elementwise(f"lop3.b32 %o, %a, %b, %c, {lut:#x};", [a, b, c], np.uint32)
    np.testing.assert_array_equal(got, expect(want, a, b, c, dtype=np.uint32))


def test_prmt():
    a, b, s = (numbers(np.uint32) for _ in range(3))

    def want(x, y, select):
        pair, out = y << 32 | x, 0
        for k in range(4):
            how = select >> 4 * k & 15
            byte = pair >> 8 * (how & 7) & 255
            if how & 8:
                byte = 255 if byte & 128 else 0
            out |= byte << 8 * k
        return out

    got = elementwise("prmt.b32 %o, %a, %b, %c;", [a, b, s], np.uint32)
    np.testing.assert_array_equal(got, expect(want, a, b, s, dtype=np.uint32))


@pytest.mark.parametrize("kind", ["b32", "b64"])
@pytest.mark.parametrize("name", ["popc", "clz", "brev"])
def test_count_bits(name, kind):
    dtype = BITS[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a = numbers(dtype)
    a[:40] >>= np.arange(40).astype(dtype) % bits
    want = {
        "popc": lambda x: bin(x).count("1"),
        "clz": lambda x: bits - x.bit_length(),
        "brev": lambda x: int(f"{x:0{bits}b}"[::-1], 2),
    }[name]
    out = dtype if name == "brev" else np.uint32
    got = elementwise(f"{name}.{kind} %o, %a;", [a], out)
    np.testing.assert_array_equal(got, expect(want, a, dtype=out))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfind(kind):
    a = numbers(TYPES[kind])
    bits = 8 * a.itemsize

    def highest(x):
        return ((~x if x < 0 else x).bit_length() - 1) & 0xFFFFFFFF

    got = elementwise(f"bfind.{kind} %o, %a;", [a], np.uint32)
    np.testing.assert_array_equal(got, expect(highest, a, dtype=np.uint32))
    got = elementwise(f"bfind.shiftamt.{kind} %o, %a;", [a], np.uint32)
    want = expect(lambda x: bits - 1 - highest(x) if highest(x) < 64 else -1, a, dtype=np.uint32)
    np.testing.assert_array_equal(got, want)


def test_sad_and_dp4a():
    a, b, c = (numbers(np.int32) for _ in range(3))
    got = elementwise("sad.s32 %o, %a, %b, %c;", [a, b, c], np.int32)
    np.testing.assert_array_equal(
        got, expect(lambda x, y, z: z + abs(x - y), a, b, c, dtype=np.int32)
    )
    got = elementwise("dp4a.s32.u32 %o, %a, %b, %c;", [a, b, c], np.int32)
    x = a.view(np.int8).reshape(-1, 4).astype(np.int64)
    y = b.view(np.uint8).reshape(-1, 4).astype(np.int64)
    np.testing.assert_array_equal(got, ((x * y).sum(1) + c).astype(np.int32))


COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64", "u16", "s16"])
@pytest.mark.parametrize("name", COMPARE)
def test_setp(name, kind):
    a, b = numbers(TYPES[kind]), numbers(TYPES[kind])
    b[::3] = a[::3]
    line = f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %o, 1, 0, %p1;"
    got = elementwise(line, [a, b], np.uint32)
    np.testing.assert_array_equal(got, COMPARE[name](a, b))


def test_unsigned_names_of_setp():
    a, b = numbers(np.uint32), numbers(np.uint32)
    b[::3] = a[::3]
    for name, like in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        line = f"setp.{name}.u32 %p1, %a, %b; selp.u32 %o, 1, 0, %p1;"
        got = elementwise(line, [a, b], np.uint32)
        np.testing.assert_array_equal(got, COMPARE[like](a, b))


@pytest.mark.parametrize("how", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", ["", "!"])
def test_setp_combines_and_has_a_second_result(how, negated):
    a, b, c = (numbers(np.int32) for _ in range(3))
    b[::2] = a[::2]
    line = (
        f"setp.gt.s32 %p3, %c, 0; setp.eq.{how}.s32 %p1|%p2, %a, %b, {negated}%p3;"
        "selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %o, %r1, %r2;"
    )
    got = elementwise(line, [a, b, c], np.uint32)
    fn = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[how]
    other = ~(c > 0) if negated else c > 0
    np.testing.assert_array_equal(got, fn(a == b, other) + 2 * fn(a != b, other))


@pytest.mark.parametrize(
    ("name", "fn"),
    [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)],
)
def test_predicate_logic(name, fn):
    a, b = numbers(np.int32), numbers(np.int32)
    line = (
        f"setp.gt.s32 %p1, %a, 0; setp.gt.s32 %p2, %b, 0; {name}.pred %p3, %p1, !%p2;"
        f"not.pred %p4, %p3; mov.pred %p5, %p4; {name}.pred %p6, %p5, %p1; selp.u32 %o, 1, 0, %p6;"
    )
    got = elementwise(line, [a, b], np.uint32)
    np.testing.assert_array_equal(got, fn(~fn(a > 0, ~(b > 0)), a > 0))


def test_set_gives_all_ones_or_one():
    a, b = numbers(np.int32), numbers(np.int32)
    got = elementwise("set.lt.u32.s32 %o, %a, %b;", [a, b], np.uint32)
    np.testing.assert_array_equal(got, np.where(a < b, 0xFFFFFFFF, 0))
    got = elementwise("set.lt.f32.s32 %o, %a, %b;", [a, b], np.float32)
    np.testing.assert_array_equal(got, (a < b).astype(np.float32))


def test_selp_negation_and_slct():
    a, b, c = (numbers(np.int32) for _ in range(3))
    got = elementwise("setp.lt.s32 %p1, %c, 0; selp.b32 %o, %a, %b, !%p1;", [a, b, c], np.int32)
    np.testing.assert_array_equal(got, np.where(c < 0, b, a))
    got = elementwise("slct.s32.s32 %o, %a, %b, %c;", [a, b, c], np.int32)
    np.testing.assert_array_equal(got, np.where(c >= 0, a, b))


def test_mov_packs_and_unpacks():
    a, b = numbers(np.uint32), numbers(np.uint32)
    got = elementwise("mov.b64 %o, {%a, %b};", [a, b], np.uint64)
    np.testing.assert_array_equal(got, a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))
    got = elementwise("mov.b64 %d1, {%a, %b}; mov.b64 {%r1, %o}, %d1;", [a, b], np.uint32)
    np.testing.assert_array_equal(got, b)
    line = "mov.b32 {%h1, %h2}, %a; mov.b32 %o, {%h2, %h1};"
    got = elementwise(line, [a], np.uint32)
    np.testing.assert_array_equal(got, a << np.uint32(16) | a >> np.uint32(16))
    line = "mov.b64 %d1, {%a, %b}; mov.b64 {_, %o}, %d1;"
    np.testing.assert_array_equal(elementwise(line, [a, b], np.uint32), b)


def test_predicated_instruction_keeps_the_old_value():
    a, b = numbers(np.int32), numbers(np.int32)
    line = "mov.u32 %o, 7; setp.gt.s32 %p1, %a, %b; @%p1 add.s32 %o, %a, 1; @!%p1 mov.u32 %o, 9;"
    got = elementwise(line, [a, b], np.int32)
    np.testing.assert_array_equal(got, np.where(a > b, a + np.int32(1), 9))


INTEGERS = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
}


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
@pytest.mark.parametrize("sat", ["", ".sat"])
def test_integer_conversions(source, target, sat):
    a = (
        numbers(INTEGERS[source])
        if source not in ("u8", "s8")
        else np.arange(256).astype(np.uint8).view(INTEGERS[source])
    )
    info = np.iinfo(INTEGERS[target])
    got = elementwise(f"cvt{sat}.{target}.{source} %o, %a;", [a], INTEGERS[target])
    clamp = (lambda x: min(max(x, info.min), info.max)) if sat else (lambda x: x)
    np.testing.assert_array_equal(got, expect(clamp, a, dtype=INTEGERS[target]))


def test_conversion_of_a_wider_register():
    a = numbers(np.uint32)
    got = elementwise("cvt.u64.u8 %o, %a;", [a], np.uint64)
    np.testing.assert_array_equal(got, a & 255)
    got = elementwise("cvt.s64.s16 %o, %a;", [a], np.int64)
    np.testing.assert_array_equal(got, a.astype(np.uint16).view(np.int16))
