"""ld and st, of every space, scalar and vector.

In: ld / ldu / st with .global[.nc], .shared, .local, .param, .const or generic addresses. Out:
closures that read or write one record per active thread through `access`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import access, access_global
from .emit import put_at
from .errors import PtxParseError
from .memory import take, views
from .parse import Instruction, split_operands, type_bytes
from .program import Address, Op, Scope, opcode
from .registers import DTYPES

if TYPE_CHECKING:
    from .machine import Machine

Reader = Callable[["Machine", Instruction, int, np.ndarray, int], np.ndarray]
_SPACES = ("param", "shared", "global", "const", "local")


def space(inst: Instruction) -> str:
    """The state space an instruction names; "generic" if none."""
    for part in inst.parts[1:]:
        name = part.split("::")[0]
        if name in _SPACES:
            return name
    return "generic"


def vector(inst: Instruction) -> int:
    """How many elements a vector instruction moves."""
    return next((int(p[1:]) for p in inst.parts if p in ("v2", "v4", "v8")), 1)


def read_param(m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Records of the kernel's parameters."""
    if int(raw.min()) < 0 or int(raw.max()) + size > m.program.param_bytes:
        message = f"parameter byte {int(raw.max())}, there are {m.program.param_bytes}"
        m.report("out-of-bounds", message, inst, int(m.idx[0]))
    inside = np.clip(raw, 0, len(m.params) - size)
    return take(views(m.params), inside, size)


def read_generic(m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int) -> np.ndarray:
    """Records at generic addresses."""
    name = access.space_of(raw)
    if name is not None:
        return READERS[name](m, inst, at, access.in_space(raw, name), size)
    out: np.ndarray | None = None
    for name, rows in access.by_space(raw):
        before = m.only(rows)
        part = READERS[name](m, inst, at, access.in_space(raw[rows], name), size)
        if out is None:
            out = np.zeros(len(raw) * (len(part) // len(rows)), part.dtype)
        out.reshape(len(raw), -1)[rows] = part.reshape(len(rows), -1)
        m.restore(before)
    assert out is not None
    return out


def write_generic(
    m: Machine, inst: Instruction, at: int, raw: np.ndarray, size: int, records: np.ndarray
) -> None:
    """Store records at generic addresses."""
    name = access.space_of(raw)
    if name is not None:
        WRITERS[name](m, inst, at, access.in_space(raw, name), size, records)
        return
    for name, rows in access.by_space(raw):
        before = m.only(rows)
        data = records.reshape(len(raw), -1)[rows].reshape(-1)
        WRITERS[name](m, inst, at, access.in_space(raw[rows], name), size, data)
        m.restore(before)


READERS: dict[str, Reader] = {
    "global": access_global.read_global,
    "const": access_global.read_global,
    "shared": access.read_shared,
    "local": access.read_local,
    "param": read_param,
    "generic": read_generic,
}
WRITERS = {
    "global": access_global.write_global,
    "shared": access.write_shared,
    "local": access.write_local,
    "generic": write_generic,
}


def _param_space(scope: Scope, text: str) -> str:
    """Parameters of the entry lie in the launch; those of inlined functions in local memory."""
    name = text.strip("[] ").split("+")[0].strip()
    is_local = name in scope.program.symbols and name not in scope.program.params
    return "local" if is_local else "param"


@opcode("ld", "ldu")
def load(inst: Instruction, scope: Scope) -> Op:
    """One record per thread, cut into the destination registers."""
    type_name, count = inst.parts[-1], vector(inst)
    size = type_bytes(type_name)
    name = space(inst)
    if name == "param":
        name = _param_space(scope, inst.operands[1])
    text = inst.operands[0]
    names = split_operands(text[1:-1]) if text.startswith("{") else [text]
    if len(names) != count:
        raise PtxParseError(f"{count} elements but {len(names)} destinations")
    address = scope.address(inst.operands[1])
    if name == "param" and address.slot is None:
        return _load_constant_param(names, type_name, address, scope)
    outs = [_extender(scope, n, type_name) for n in names]
    where, read, at = access.addresses(address), READERS[name], scope.at
    total, element = size * count, np.dtype(f"u{size}")

    def run(m: Machine) -> None:
        records = read(m, inst, at, where(m), total).view(element)
        if count == 1:
            outs[0](m, records)
        else:
            table = records.reshape(-1, count)
            for k, out in enumerate(outs):
                out(m, table[:, k])

    return run


def _extender(scope: Scope, name: str, type_name: str) -> Callable[[Machine, np.ndarray], None]:
    """Store loaded elements, sign- or zero-extended to the register."""
    if name == "_":
        return lambda m, values: None
    cls, slot = scope.any_register(name)
    size, held = type_bytes(type_name), np.dtype(DTYPES[cls]).itemsize
    if size == held:
        return lambda m, values: put_at(m, cls, slot, np.ascontiguousarray(values))
    if size > held:
        raise PtxParseError(f"register {name} is too narrow for .{type_name}")
    kind = "i" if type_name[0] == "s" else "u"
    narrow, wide = np.dtype(f"{kind}{size}"), np.dtype(f"{kind}{held}")
    return lambda m, values: put_at(
        m, cls, slot, np.ascontiguousarray(values).view(narrow).astype(wide)
    )


def _load_constant_param(names: list[str], type_name: str, address: Address, scope: Scope) -> Op:
    """A parameter at a fixed offset is the same for every thread."""
    size = type_bytes(type_name)
    outs = [_extender(scope, n, type_name) for n in names]
    offsets = [address.offset + k * size for k in range(len(names))]

    def run(m: Machine) -> None:
        for offset, out in zip(offsets, outs, strict=True):
            value = m.params[offset : offset + size].view(f"u{size}")
            out(m, np.repeat(value, len(m.idx)))

    return run


def store_values(scope: Scope, texts: list[str], size: int) -> Callable[[Machine], np.ndarray]:
    """A function giving the records (size bytes per element) the active threads store."""
    slots = [_source(scope, t, size) for t in texts]
    unsigned = np.dtype(f"u{size}")
    if len(slots) == 1:
        ((cls, slot),) = slots
        return lambda m: m.pick(m.v[cls][slot]).astype(unsigned)

    def gather(m: Machine) -> np.ndarray:
        out = np.empty((len(m.idx), len(slots)), unsigned)
        for k, (cls, slot) in enumerate(slots):
            out[:, k] = m.pick(m.v[cls][slot])
        return out.reshape(-1)

    return gather


def _source(scope: Scope, text: str, size: int) -> tuple[str, int]:
    if text in scope.layout.slots:
        return scope.any_register(text)
    width = max(size, 2)
    return f"u{8 * width}", scope.src(text, f"b{8 * width}")


@opcode("st")
def store_op(inst: Instruction, scope: Scope) -> Op:
    """One record per thread."""
    size, count, name = type_bytes(inst.parts[-1]), vector(inst), space(inst)
    if name == "param":
        name = "local"
    text = inst.operands[1]
    texts = split_operands(text[1:-1]) if text.startswith("{") else [text]
    if len(texts) != count:
        raise PtxParseError(f"{count} elements but {len(texts)} sources")
    where, values = (
        access.addresses(scope.address(inst.operands[0])),
        store_values(scope, texts, size),
    )
    write, at, total = WRITERS[name], scope.at, size * count

    def run(m: Machine) -> None:
        write(m, inst, at, where(m), total, values(m))

    return run


@opcode("prefetch", "prefetchu", "discard", "applypriority", "createpolicy", "isspacep")
def hint(inst: Instruction, scope: Scope) -> Op:
    """Cache hints do nothing; isspacep tells where a generic address points."""
    if inst.parts[0] != "isspacep":
        return lambda m: None
    dst = scope.dst(inst.operands[0], "pred")
    src, want = scope.src(inst.operands[1], "u64"), inst.parts[1].split("::")[0]

    def run(m: Machine) -> None:
        raw = m.v["s64"][src]
        out = np.zeros(m.n, bool)
        for name, rows in access.by_space(raw):
            out[rows] = name == want
        put_at(m, "pred", dst, m.pick(out))

    return run
