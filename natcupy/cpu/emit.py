"""LLVM IR as text: the small builder that every kernel here is written with.

In: calls that each append one instruction or one control structure. Out: the text of a function.

Values are the names of SSA registers (`%v7`) or constants; integers are plain Python ints where
known, and folded. Every vector holds elements of the compute type, float or double. Memory is
touched by `load` and `store` alone, at any alignment of the element.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Value = str | int

STORAGE = {
    "float": ("float", 4),
    "double": ("double", 8),
    "half": ("half", 2),
    "bfloat": ("i16", 2),
}
REAL_BYTES = {"float": 4, "double": 8}
REAL_INT = {"float": "i32", "double": "i64"}


@dataclass(frozen=True)
class Machine:
    """What the generated code may count on: vector registers, their number and size in bytes."""

    registers: int
    register_bytes: int

    def registers_of(self, lanes: int, real: str) -> int:
        """Registers that one vector of `lanes` elements fills."""
        return max(1, lanes * REAL_BYTES[real] // self.register_bytes)

    def vectors_in(self, lanes: int, real: str) -> int:
        """Vectors of `lanes` elements that one register holds, at least 1."""
        return max(1, self.width(real) // lanes)

    def width(self, real: str) -> int:
        """Elements of one register, at least 2."""
        return max(2, self.register_bytes // REAL_BYTES[real])


class Builder:
    """One function under construction. `real` is the compute type: "float" or "double"."""

    def __init__(self, name: str, params: Sequence[tuple[str, str]], real: str, public=False):
        self.real = real
        self.declared: set[str] = set()
        self._name = name
        self._lines: list[str] = []
        self._count = 0
        self._block = "entry"
        linkage = "" if public else "internal "
        params = ", ".join(f"{kind} %{param}" for kind, param in params)
        self._head = f"define {linkage}void @{name}({params}) #0 {{\nentry:"

    def text(self) -> str:
        """The finished function."""
        return "\n".join([self._head, *self._lines, "  ret void", "}", ""])

    # -- instructions -----------------------------------------------------------------------------

    def op(self, instruction: str) -> str:
        """Append an instruction that yields a value; its register."""
        self._count += 1
        self._lines.append(f"  %v{self._count} = {instruction}")
        return f"%v{self._count}"

    def do(self, instruction: str) -> None:
        """Append an instruction that yields nothing."""
        self._lines.append("  " + instruction)

    def call(self, function: str, *args: tuple[str, Value]) -> None:
        """Call another function of the module."""
        self.do(f"call void @{function}({', '.join(f'{kind} {value}' for kind, value in args)})")

    # -- integers and addresses -------------------------------------------------------------------

    def add(self, a: Value, b: Value) -> Value:
        """Sum of two i64."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self.op(f"add i64 {a}, {b}")

    def sum(self, *terms: Value) -> Value:
        """Sum of any number of i64."""
        total: Value = 0
        for term in terms:
            total = self.add(total, term)
        return total

    def sub(self, a: Value, b: Value) -> Value:
        """Difference of two i64."""
        if isinstance(b, int):
            return self.add(a, -b)
        return self.op(f"sub i64 {a}, {b}")

    def mul(self, a: Value, b: Value) -> Value:
        """Product of two i64."""
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1 or b == 1:
            return b if a == 1 else a
        return self.op(f"mul i64 {a}, {b}")

    def least(self, a: Value, b: Value) -> Value:
        """Smaller of two i64."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self.op(f"select i1 {self.less(a, b)}, i64 {a}, i64 {b}")

    def less(self, a: Value, b: Value) -> str:
        """True where a < b, signed i64."""
        return self.op(f"icmp slt i64 {a}, {b}")

    def choose(self, condition: str, a: Value, b: Value, kind: str = "i64") -> str:
        """A where the condition holds, else b."""
        return self.op(f"select i1 {condition}, {kind} {a}, {kind} {b}")

    def at(self, pointer: str, index: Value, kind: str | None = None) -> str:
        """Address of element `index`; elements are of the compute type unless `kind` is given."""
        if index == 0:
            return pointer
        return self.op(f"getelementptr {kind or self.real}, ptr {pointer}, i64 {index}")

    def load(self, kind: str, pointer: str, align: int = 4) -> str:
        """A scalar or vector of any type."""
        return self.op(f"load {kind}, ptr {pointer}, align {align}")

    def table(self, pointer: str, index: Value) -> str:
        """Entry of a table of 32-bit integers, as i64."""
        entry = self.load("i32", self.at(pointer, index, "i32"))
        return self.op(f"sext i32 {entry} to i64")

    def prefetch(self, pointer: str, nearness: int) -> None:
        """Ask for the bytes around an address to be read soon; any will do, valid or not.

        `nearness` 3 is the cache next to the core, 2 the one behind it.
        """
        self.declared.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.do(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 {nearness}, i32 1)")

    # -- vectors of the compute type --------------------------------------------------------------

    def vec(self, lanes: int) -> str:
        """The type of a vector."""
        return f"<{lanes} x {self.real}>"

    def number(self, x: float) -> str:
        """A constant of the compute type."""
        if self.real == "float":
            x = struct.unpack("<f", struct.pack("<f", x))[0]
        return self.double(x)

    def double(self, x: float) -> str:
        """A constant of type double, or of type float if x is one exactly."""
        return "0x" + struct.pack(">d", x).hex().upper()

    def fill(self, x: float, lanes: int) -> str:
        """A vector constant with equal elements."""
        return f"splat ({self.real} {self.number(x)})" if x else "zeroinitializer"

    def vload(self, pointer: str, lanes: int) -> str:
        """A vector from scratch memory."""
        return self.load(self.vec(lanes), pointer, REAL_BYTES[self.real])

    def vstore(self, vector: str, pointer: str, lanes: int) -> None:
        """A vector to scratch memory."""
        self.do(f"store {self.vec(lanes)} {vector}, ptr {pointer}, align {REAL_BYTES[self.real]}")

    def splat(self, scalar: str, lanes: int) -> str:
        """A vector of copies of a run-time scalar."""
        kind = self.vec(lanes)
        one = self.op(f"insertelement {kind} poison, {self.real} {scalar}, i64 0")
        return self.op(
            f"shufflevector {kind} {one}, {kind} poison, <{lanes} x i32> zeroinitializer"
        )

    def splat_load(self, pointer: str, lanes: int) -> str:
        """A vector of copies of one element of scratch memory."""
        return self.splat(self.load(self.real, pointer, REAL_BYTES[self.real]), lanes)

    def shuffle(self, a: str, b: str, lanes: int, picks: Sequence[int]) -> str:
        """Elements of the concatenation of two vectors."""
        kind, mask = self.vec(lanes), ", ".join(f"i32 {pick}" for pick in picks)
        return self.op(f"shufflevector {kind} {a}, {kind} {b}, <{len(picks)} x i32> <{mask}>")

    def part(self, vector: str, lanes: int, start: int, count: int) -> str:
        """Elements start .. start + count - 1 of a vector."""
        if start == 0 and count == lanes:
            return vector
        return self.shuffle(vector, "poison", lanes, range(start, start + count))

    def arith(self, name: str, a: str, b: str, lanes: int) -> str:
        """`fadd`, `fsub`, `fmul` or `fdiv`."""
        return self.op(f"{name} {self.vec(lanes)} {a}, {b}")

    def fma(self, a: str, b: str, c: str, lanes: int) -> str:
        """A * b + c, rounded once."""
        kind = self.vec(lanes)
        name = f"llvm.fma.v{lanes}f{8 * REAL_BYTES[self.real]}"
        self.declared.add(f"declare {kind} @{name}({kind}, {kind}, {kind})")
        return self.op(f"call {kind} @{name}({kind} {a}, {kind} {b}, {kind} {c})")

    def add_up(self, vector: str, lanes: int, start: str) -> str:
        """Sum of a vector's elements and a scalar, in an order fixed by the number of lanes."""
        kind, name = (
            self.vec(lanes),
            f"llvm.vector.reduce.fadd.v{lanes}f{8 * REAL_BYTES[self.real]}",
        )
        self.declared.add(f"declare {self.real} @{name}({self.real}, {kind})")
        return self.op(f"call reassoc {self.real} @{name}({self.real} {start}, {kind} {vector})")

    def greater_of(self, a: str, b: str, lanes: int) -> str:
        """Elementwise maximum; b where a is NaN."""
        kind = self.vec(lanes)
        larger = self.op(f"fcmp ogt {kind} {a}, {b}")
        return self.op(f"select <{lanes} x i1> {larger}, {kind} {a}, {kind} {b}")

    def lanes_seen(self, pointer: str, lanes: int) -> str:
        """True in the lanes whose 32-bit integer of a mask is negative."""
        mask = self.load(f"<{lanes} x i32>", pointer)
        return self.op(f"icmp slt <{lanes} x i32> {mask}, zeroinitializer")

    def choose_lanes(self, seen: str, a: str, b: str, lanes: int) -> str:
        """A where `seen`, else b."""
        kind = self.vec(lanes)
        return self.op(f"select <{lanes} x i1> {seen}, {kind} {a}, {kind} {b}")

    # -- control ----------------------------------------------------------------------------------

    def _label(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label

    def _labels(self, count: int) -> list[str]:
        self._count += 1
        return [f"l{self._count}_{i}" for i in range(count)]

    def _holes(self, count: int) -> list[tuple[str, int]]:
        """Registers of phis that are written later, with their line numbers."""
        holes = []
        for _ in range(count):
            self._count += 1
            holes.append((f"%v{self._count}", len(self._lines)))
            self._lines.append("")
        return holes

    def when(self, condition: str, then: Callable, otherwise: Callable | None = None) -> None:
        """An if without values."""
        yes, no, end = self._labels(3)
        self.do(f"br i1 {condition}, label %{yes}, label %{no}")
        self._label(yes)
        then()
        self.do(f"br label %{end}")
        self._label(no)
        if otherwise is not None:
            otherwise()
        self.do(f"br label %{end}")
        self._label(end)

    def loop(self, count: Value, body: Callable, step: int = 1) -> None:
        """`for i in range(0, count, step): body(i)`, any number of rounds including none."""
        self.fold(0, count, [], lambda i, _: body(i) or [], step)

    def fold(self, start: Value, end: Value, init: list, body: Callable, step: Value = 1) -> list:
        """A counted loop that carries values: `body(i, values)` returns the next values.

        `init` holds (type, value) pairs. The values after the last round are returned.
        """
        before = self._block
        head, inside, after = self._labels(3)
        self.do(f"br label %{head}")
        self._label(head)
        holes = self._holes(1 + len(init))
        names = [name for name, _ in holes]
        self.do(f"br i1 {self.less(names[0], end)}, label %{inside}, label %{after}")
        self._label(inside)
        following = body(names[0], names[1:])
        following = [self.add(names[0], step), *following]
        for (name, line), (kind, first), new in zip(
            holes, [("i64", start), *init], following, strict=True
        ):
            self._lines[line] = (
                f"  {name} = phi {kind} [ {first}, %{before} ], [ {new}, %{self._block} ]"
            )
        self.do(f"br label %{head}")
        self._label(after)
        return names[1:]

    def fold_some(self, count: Value, init: list, body: Callable) -> list:
        """`fold` from 0 by 1 for at least one round: the test is at the end of the body."""
        before = self._block
        head, after = self._labels(2)
        self.do(f"br label %{head}")
        self._label(head)
        holes = self._holes(1 + len(init))
        names = [name for name, _ in holes]
        following = [self.add(names[0], 1), *body(names[0], names[1:])]
        for (name, line), (kind, first), new in zip(
            holes, [("i64", 0), *init], following, strict=True
        ):
            self._lines[line] = (
                f"  {name} = phi {kind} [ {first}, %{before} ], [ {new}, %{self._block} ]"
            )
        self.do(f"br i1 {self.less(following[0], count)}, label %{head}, label %{after}")
        self._label(after)
        return following[1:]

    def repeat_while(self, first: str, test: Callable, body: Callable, following: Callable) -> None:
        """`x = first; while test(x): body(x); x = following()`."""
        before = self._block
        head, inside, after = self._labels(3)
        self.do(f"br label %{head}")
        self._label(head)
        ((name, line),) = self._holes(1)
        self.do(f"br i1 {test(name)}, label %{inside}, label %{after}")
        self._label(inside)
        body(name)
        new = following()
        self._lines[line] = f"  {name} = phi i64 [ {first}, %{before} ], [ {new}, %{self._block} ]"
        self.do(f"br label %{head}")
        self._label(after)

    def switch(self, value: str, cases: int, kinds: Sequence[str], body: Callable) -> list:
        """Run `body(i)` for the value i of 0 .. cases - 1; the values it returned, of `kinds`."""
        *entries, other, after = self._labels(cases + 2)
        arms = " ".join(f"i64 {i}, label %{entry}" for i, entry in enumerate(entries))
        self.do(f"switch i64 {value}, label %{other} [ {arms} ]")
        results = []
        for i, entry in enumerate(entries):
            self._label(entry)
            results.append((body(i) or [], self._block))
            self.do(f"br label %{after}")
        self._label(other)
        self.do("unreachable")
        self._label(after)
        merged = []
        for place, kind in enumerate(kinds):
            sources = ", ".join(f"[ {values[place]}, %{block} ]" for values, block in results)
            merged.append(self.op(f"phi {kind} {sources}"))
        return merged


class Module:
    """Functions collected into one module."""

    def __init__(self, real: str, shared: bool = False, uses: Module | None = None):
        """`shared`: other modules call its functions; `uses`: the shared module that this calls."""
        self.real, self._shared, self._uses = real, shared, uses
        self._texts: list[str] = []
        self._declared: set[str] = set()
        self._heads: list[str] = []

    def function(self, name: str, params: str, public: bool = False) -> Builder:
        """Begin a function; `params` reads "ptr a, i64 b"."""
        pairs = [tuple(param.split()) for param in params.split(", ")]
        self._heads.append(f"declare void @{name}({', '.join(kind for kind, _ in pairs)})")
        return Builder(name, pairs, self.real, public or self._shared)

    def finish(self, builder: Builder) -> None:
        """Add a function that is complete."""
        self._texts.append(builder.text())
        self._declared |= builder.declared

    def text(self, vector_bits: int) -> str:
        """The module as LLVM assembly."""
        width = f'"prefer-vector-width"="{vector_bits}" "min-legal-vector-width"="{vector_bits}"'
        others = self._uses._heads if self._uses else []
        lines = [*self._texts, *others, *sorted(self._declared)]
        return "\n".join([*lines, f"attributes #0 = {{ nounwind {width} }}", ""])


def pieces(count: int, largest: int) -> list[tuple[int, int]]:
    """`count` elements as (offset, width) vectors: many of the largest width, then powers of two.

    Exact, so that a row's loads and stores never leave the row.
    """
    cut, at = [], 0
    while at < count:
        width = largest
        while width > count - at:
            width //= 2
        cut.append((at, width))
        at += width
    return cut
