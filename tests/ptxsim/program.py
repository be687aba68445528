"""A parsed entry to a runnable `Program`: a flat list of closures, one per instruction.

In: a `parse.Module` and an entry's name. Out: the entry with every `.func` call pasted in place
(so there is no call stack), all names in slots, variables at addresses, and each instruction
decoded once into a closure that works on a whole group of threads. Decoders register themselves
with `@opcode`.
"""

from __future__ import annotations

import re
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxParseError
from .parse import Function, Instruction, Label, Module, Registers, Statement, Variable
from .registers import Layout, class_of, view_of

if TYPE_CHECKING:
    from .machine import Machine

Op = Callable[["Machine"], "bool | None"]
Decoder = Callable[[Instruction, "Scope"], Op]

#: Generic addresses of the windows that are no real memory; device addresses lie far below.
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57
PARAM_WINDOW = 1 << 58
_ENDS_BLOCK = ("bra", "ret", "exit", "trap", "bar", "barrier", "brx")
_MOST_CALLS = 4000

DECODERS: dict[str, Decoder] = {}


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    """Register a decoder for the opcodes whose first part is one of `names`."""

    def keep(decoder: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return keep


@dataclass(frozen=True)
class Address:
    """`[base + offset]`: a register of class u32 or u64, or a constant when `slot` is None."""

    cls: str
    slot: int | None
    offset: int


@dataclass
class Block:
    """Instructions `start` to `end` that run together, and how many warps ran them."""

    start: int
    end: int
    ops: list[Op]
    runs: int = 0


@dataclass
class Program:
    """Everything a machine needs to run one entry; shared by all its launches."""

    name: str
    params: dict[str, tuple[int, int]]
    param_bytes: int
    static_shared: int
    dynamic_offset: int
    local_bytes: int
    maximum_threads: int | None
    layout: Layout
    code: list[Instruction] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    symbols: dict[str, int] = field(default_factory=dict)
    arrays: list[tuple[Variable, np.ndarray, int]] = field(default_factory=list)
    leaders: list[int] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)

    def block(self, start: int) -> Block:
        """The block that begins at instruction `start`, up to the next leader."""
        block = self.blocks.get(start)
        if block is None:
            end = self.leaders[bisect_right(self.leaders, start)]
            block = self.blocks[start] = Block(start, end, self.ops[start:end])
        return block

    def split(self, at: int) -> None:
        """Let a block begin at instruction `at`; counts of the parts start anew."""
        if at not in self.leaders:
            insort(self.leaders, at)
            for block in list(self.blocks.values()):
                if block.start < at < block.end:
                    block.end = at
                    block.ops = block.ops[: at - block.start]
                    tail = self.block(at)
                    tail.runs += block.runs

    def uses(self, *first_parts: str) -> bool:
        """Whether any instruction's opcode begins with one of these words."""
        return any(inst.parts[0] in first_parts for inst in self.code)


class Scope:
    """What a decoder asks: operands to slots, addresses, the position of the instruction."""

    def __init__(self, program: Program, at: int, labels: dict[str, int]):
        self.program, self.at, self._labels = program, at, labels
        self.layout = program.layout

    def src(self, text: str, type_name: str) -> int:
        """Slot of a source operand read as `type_name`: register, special, literal or symbol."""
        view = type_name if type_name == "pred" else view_of(type_name)
        cls = class_of(view)
        if text in self.layout.slots:
            found, slot = self.layout.slots[text]
            if found != cls:
                raise PtxParseError(f"{text} is of class {found}, wanted {cls}")
            return slot
        bits = self.layout.immediate(text, view)
        if bits is None:
            bits = self.symbol(text)
        return self.layout.constant(cls, bits)

    def literal(self, text: str, type_name: str) -> int | None:
        """The bits of a literal operand, None for a register."""
        if text in self.layout.slots:
            return None
        return self.layout.immediate(text, view_of(type_name))

    def dst(self, text: str, type_name: str) -> int:
        """Slot of a destination register of the width of `type_name`; "_" is a sink."""
        view = type_name if type_name == "pred" else view_of(type_name)
        cls = class_of(view)
        found, slot = self.any_register("%sink." + cls if text == "_" else text)
        if found != cls:
            raise PtxParseError(f"destination {text} is of class {found}, wanted {cls}")
        return slot

    def any_register(self, text: str) -> tuple[str, int]:
        """(class, slot) of a register of any width."""
        return self.layout.register(text)

    def predicate(self, text: str) -> tuple[int, bool]:
        """(slot, negated) of a predicate operand."""
        return self.src(text.lstrip("!"), "pred"), text.startswith("!")

    def symbol(self, text: str) -> int:
        """The address of a variable, with an optional +offset."""
        name, _, offset = text.partition("+")
        if name not in self.program.symbols:
            raise PtxParseError(f"operand {text!r} is neither register, literal nor variable")
        return self.program.symbols[name] + (int(offset, 0) if offset else 0)

    def address(self, text: str) -> Address:
        """Decode `[reg+8]`, `[name]`, `[name+4]`, `[reg+-4]`, `[4096]`."""
        m = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if m is None:
            raise PtxParseError(f"address {text!r} is malformed")
        offset = int(m[2], 0) if m[2] else 0
        if m[1] in self.layout.slots:
            cls, slot = self.layout.slots[m[1]]
            return Address(cls, slot, offset)
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", m[1]):
            return Address("u64", None, int(m[1], 0) + offset)
        return Address("u64", None, self.symbol(m[1]) + offset)

    def label(self, name: str) -> int:
        """Index of the instruction a label stands at."""
        if name not in self._labels:
            raise PtxParseError(f"no label {name!r}")
        return self._labels[name]


def link(module: Module, entry: str | None = None) -> Program:
    """Turn one entry of a module into a program."""
    function = module.entry(entry)
    body = _inline(module, function)
    program = _lay_out(module, function, body)
    labels = _flatten(program, body)
    _find_leaders(program, labels)
    for at, inst in enumerate(program.code):
        program.ops.append(_decode(inst, Scope(program, at, labels)))
    return program


def _decode(inst: Instruction, scope: Scope) -> Op:
    decoder = DECODERS.get(inst.parts[0])
    if decoder is None:
        raise PtxParseError(f"PTX line {inst.line}: instruction not handled: {inst.text}")
    try:
        op = decoder(inst, scope)
        if inst.predicate is None or inst.parts[0] == "bra":
            return op
        slot, negated = scope.src(inst.predicate, "pred"), inst.negated
    except (PtxParseError, ValueError, IndexError, KeyError, StopIteration) as error:
        raise PtxParseError(f"PTX line {inst.line}: {inst.text}: {error}") from error
    if ends_block(inst):
        return _guard_end(op, slot, negated, scope.at + 1)

    def guarded(m: Machine) -> bool | None:
        before = m.narrow(slot, negated)
        stop = op(m) if len(m.idx) else None
        m.restore(before)
        return stop

    return guarded


def _guard_end(op: Op, slot: int, negated: bool, after: int) -> Op:
    """A predicated barrier or exit: threads it does not concern go on at `after`."""

    def guarded(m: Machine) -> None:
        before = m.narrow(slot, negated)
        if len(m.idx):
            if len(m.idx) < len(before.idx):
                m.pc[before.idx] = after
                m.next = None
            op(m)
        m.restore(before)

    return guarded


def ends_block(inst: Instruction) -> bool:
    """Whether threads may part, stop or leave at this instruction."""
    if inst.parts[0] == "mbarrier":
        return inst.parts[1] in ("try_wait", "test_wait")
    return inst.parts[0] in _ENDS_BLOCK and inst.parts[:2] != ("bar", "warp")


def _find_leaders(program: Program, labels: dict[str, int]) -> None:
    leaders = {0, len(program.code), *labels.values()}
    leaders.update(at + 1 for at, inst in enumerate(program.code) if ends_block(inst))
    program.leaders = sorted(leaders)


def _flatten(program: Program, body: Iterable[Statement]) -> dict[str, int]:
    labels: dict[str, int] = {}
    for stmt in body:
        if isinstance(stmt, Instruction):
            program.code.append(stmt)
        elif isinstance(stmt, Label):
            labels[stmt.name] = len(program.code)
    line = program.code[-1].line if program.code else 0
    program.code.append(Instruction("exit", ("exit",), (), None, False, line, "", "end of kernel"))
    return labels


def _align(at: int, to: int) -> int:
    return (at + to - 1) // to * to


def _lay_out(module: Module, entry: Function, body: list[Statement]) -> Program:
    """Give every variable an address and every register a slot."""
    layout = Layout()
    for sink in ("pred", "b16", "b32", "b64"):
        cls = "pred" if sink == "pred" else class_of(view_of(sink))
        layout.declare(sink, (f"%sink.{cls}",))
    for stmt in body:
        if isinstance(stmt, Registers):
            layout.declare(stmt.type, stmt.names)
    params, at = {}, 0
    for var in entry.params:
        at = _align(at, var.align)
        params[var.name] = (at, var.size or 0)
        at += var.size or 0
    tid = re.search(r"\.(?:maxntid|reqntid) (\d+)(?:, ?(\d+))?(?:, ?(\d+))?", entry.directives)
    threads = int(np.prod([int(x or 1) for x in tid.groups()])) if tid else None
    program = Program(entry.name, params, at, 0, 0, 0, threads, layout)
    program.symbols.update({name: offset for name, (offset, _) in params.items()})
    text = " ".join(" ".join(s.operands) for s in body if isinstance(s, Instruction))
    used = set(re.findall(r"[%A-Za-z_$@][\w$@]*", text))
    outer = [v for v in module.variables.values() if v.name in used or v.space == "global"]
    _place(program, [*outer, *(s for s in body if isinstance(s, Variable))])
    return program


def _place(program: Program, variables: list[Variable]) -> None:
    dynamic: list[Variable] = []
    for var in variables:
        if var.space == "shared" and var.size is None:
            dynamic.append(var)
        elif var.space == "shared":
            start = _align(program.static_shared, var.align)
            program.symbols[var.name] = start
            program.static_shared = start + (var.size or 0)
        elif var.space in ("local", "param"):
            start = _align(program.local_bytes, var.align)
            program.symbols[var.name] = start
            program.local_bytes = start + (var.size or 0)
        else:
            _place_array(program, var)
    top = max([16, *(v.align for v in dynamic)])
    program.dynamic_offset = _align(program.static_shared, top)
    program.symbols.update({v.name: program.dynamic_offset for v in dynamic})


def _place_array(program: Program, var: Variable) -> None:
    """A `.global` or `.const` variable lives in host memory of its own, at its real address."""
    size = var.size or 0
    memory = np.zeros(size + 256 + 32, np.uint8)
    base = int(memory.ctypes.data)
    address = _align(base, max(var.align, 256)) if size else base
    program.symbols[var.name] = address
    program.arrays.append((var, memory, address - base))


def _inline(module: Module, entry: Function) -> list[Statement]:
    """The entry's body with every call replaced by the callee's body, names made unique."""
    if entry.body is None:
        raise PtxParseError(f"entry {entry.name!r} has no body")
    serial = [0]
    return _expand(module, entry.body, (entry.name,), serial)


def _expand(
    module: Module, body: list[Statement], path: tuple[str, ...], serial: list[int]
) -> list[Statement]:
    out: list[Statement] = []
    for stmt in body:
        if isinstance(stmt, Instruction) and stmt.parts[0] == "call":
            out += _expand_call(module, stmt, path, serial)
        else:
            out.append(stmt)
    return out


def _expand_call(
    module: Module, call: Instruction, path: tuple[str, ...], serial: list[int]
) -> list[Statement]:
    """Paste the callee: its parameters become names for the caller's .param variables."""
    operands = list(call.operands)
    returns = operands.pop(0) if operands[0].startswith("(") else "()"
    name = operands.pop(0)
    args = [a for a in operands[0].strip("()").split(",")] if operands else []
    callee = module.functions.get(name)
    if callee is None:
        raise PtxParseError(
            f"PTX line {call.line}: call of {name!r}: only direct calls are handled"
        )
    if callee.body is None:
        parts = ("extern", name)
        return [replace(call, opcode=".".join(parts), parts=parts)]
    serial[0] += 1
    if name in path or serial[0] > _MOST_CALLS:
        raise PtxParseError(f"PTX line {call.line}: recursion through {name!r} is not supported")
    tag = f"@call{serial[0]}"
    given = [*(r.strip() for r in returns.strip("()").split(",")), *(a.strip() for a in args)]
    formal = [v.name for v in (*callee.returns, *callee.params)]
    names = dict(zip(formal, [g for g in given if g], strict=True))
    for stmt in callee.body:
        if isinstance(stmt, Registers):
            names.update({n: n + tag for n in stmt.names})
        elif (isinstance(stmt, Variable) and stmt.space != "shared") or isinstance(stmt, Label):
            names[stmt.name] = stmt.name + tag
    end = Label("$return" + tag)
    renamed = [_rename(s, names, end.name) for s in callee.body]
    if isinstance(renamed[-1], Instruction) and renamed[-1].opcode == "bra":
        renamed.pop()  # the last return falls through to the end
    return [*_expand(module, renamed, (*path, name), serial), end]


def _rename(stmt: Statement, names: dict[str, str], end: str) -> Statement:
    if isinstance(stmt, Registers):
        return replace(stmt, names=tuple(names[n] for n in stmt.names))
    if isinstance(stmt, Label):
        return Label(names[stmt.name])
    if isinstance(stmt, Variable):
        return replace(stmt, name=names.get(stmt.name, stmt.name))

    def change(text: str) -> str:
        return re.sub(r"[%A-Za-z_$][\w$@]*", lambda t: names.get(t[0], t[0]), text)

    predicate = names.get(stmt.predicate, stmt.predicate) if stmt.predicate else None
    operands = tuple(change(o) for o in stmt.operands)
    if stmt.parts[0] == "ret":
        return replace(stmt, opcode="bra", parts=("bra",), operands=(end,), predicate=predicate)
    return replace(stmt, operands=operands, predicate=predicate)
