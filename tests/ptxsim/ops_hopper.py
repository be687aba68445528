"""sm_90 instructions: mbarrier, bulk and TMA loads, wgmma.

In: mbarrier init / arrive / expect_tx / wait, cp.async.bulk from global to shared (1-D and tensor
tiles), wgmma.mma_async with f16 or bf16 operands from shared memory or registers. Out: closures.
wgmma's product is there at once; clusters, multicast, bulk stores and tcgen05 are not handled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import access
from .barriers import whole_warps
from .emit import put_at
from .errors import PtxFaultError, PtxParseError
from .memory import mark
from .numerics import bf16_to_f32
from .ops_mma import slots
from .parse import Instruction, split_operands
from .program import SHARED_WINDOW, Op, Scope, opcode
from .tensormap import TensorMap, swizzle

if TYPE_CHECKING:
    from .machine import Machine

F32 = np.float32


def _shared_address(raw: np.ndarray) -> np.ndarray:
    """Shared addresses, given as such or as generic ones."""
    return np.where(raw >= SHARED_WINDOW, raw - SHARED_WINDOW, raw)


def _keys(m: Machine, raw: np.ndarray) -> list[tuple[int, int]]:
    blocks = m.lane_block[m.idx]
    return [(int(b), int(a)) for b, a in zip(blocks, _shared_address(raw), strict=True)]


@opcode("mbarrier")
def mbarrier(inst: Instruction, scope: Scope) -> Op:
    """init, inval, arrive, expect_tx, try_wait, test_wait."""
    action = inst.parts[1]
    if action in ("init", "inval"):
        return _init(inst, scope)
    if action in ("arrive", "arrive_drop"):
        return _arrive(inst, scope)
    if action == "expect_tx":
        return _expect(inst, scope)
    if action in ("try_wait", "test_wait"):
        return _test(inst, scope)
    raise PtxParseError(f"{inst.opcode} is not handled")


def _init(inst: Instruction, scope: Scope) -> Op:
    where = access.addresses(scope.address(inst.operands[0]))
    count = scope.src(inst.operands[1], "b32") if len(inst.operands) > 1 else None

    def run(m: Machine) -> None:
        raw = where(m)
        access.aligned(m, inst, raw, 8, "shared")
        counts = m.pick(m.v["u32"][count]) if count is not None else np.zeros(len(raw), int)
        for key, n in zip(_keys(m, raw), counts, strict=True):
            m.mbarriers.init(key, int(n))

    return run


def _arrive(inst: Instruction, scope: Scope) -> Op:
    """arrive[.expect_tx] state, [bar](, count); the state is the phase arrived at."""
    expects = "expect_tx" in inst.parts
    state, address, *rest = inst.operands
    where = access.addresses(scope.address(address))
    amount = scope.src(rest[0], "b32") if rest else None
    dst = None if state == "_" else scope.dst(state, "b64")

    def run(m: Machine) -> None:
        raw = where(m)
        amounts = m.pick(m.v["u32"][amount]) if amount is not None else np.ones(len(raw), int)
        phases = np.zeros(len(raw), np.uint64)
        for row, (key, n) in enumerate(zip(_keys(m, raw), amounts, strict=True)):
            count, size = (1, int(n)) if expects else (int(n), 0)
            phases[row] = m.mbarriers.arrive(key, inst, int(m.idx[row]), count, size)
        if dst is not None:
            put_at(m, "u64", dst, phases)

    return run


def _expect(inst: Instruction, scope: Scope) -> Op:
    where, size = (
        access.addresses(scope.address(inst.operands[0])),
        scope.src(inst.operands[1], "b32"),
    )

    def run(m: Machine) -> None:
        sizes = m.pick(m.v["u32"][size])
        for row, key in enumerate(_keys(m, where(m))):
            m.mbarriers.expect(key, inst, int(m.idx[row]), int(sizes[row]))

    return run


def _test(inst: Instruction, scope: Scope) -> Op:
    """Is the phase over? Threads for which it is not sleep before they go on to ask again."""
    dst = scope.dst(inst.operands[0], "pred")
    where = access.addresses(scope.address(inst.operands[1]))
    parity = "parity" in inst.parts
    want = scope.src(inst.operands[2], "b32" if parity else "b64")
    view = "u32" if parity else "u64"

    def run(m: Machine) -> None:
        wanted = m.pick(m.v[view][want])
        done = np.array(
            [
                m.mbarriers.passed(key, inst, int(lane), int(phase) & 1)
                for key, lane, phase in zip(_keys(m, where(m)), m.idx, wanted, strict=True)
            ]
        )
        put_at(m, "pred", dst, done)
        m.mbarriers.sleep(m.idx[~done])
        m.pc[m.idx] = scope.at + 1
        m.next = None

    return run


def copy_arrive(inst: Instruction, scope: Scope) -> Op:
    """cp.async.mbarrier.arrive: arrive when the thread's copies so far have landed."""
    where = access.addresses(scope.address(inst.operands[0]))
    noinc = "noinc" in inst.parts

    def run(m: Machine) -> None:
        m.copies.commit()
        m.copies.wait(0)
        for row, key in enumerate(_keys(m, where(m))):
            lane = int(m.idx[row])
            if not noinc:
                m.mbarriers.get(key, inst, lane).pending += 1
            m.mbarriers.arrive(key, inst, lane, 1, 0)

    return run


# -- bulk copies ----------------------------------------------------------------------------------


def bulk(inst: Instruction, scope: Scope) -> Op:
    """cp.async.bulk global -> shared, plain or by tensor map, completing on an mbarrier."""
    parts = inst.parts
    if "commit_group" in parts or "wait_group" in parts or "prefetch" in parts:
        return lambda m: None
    spaces = [p.split("::")[0] for p in parts if p.split("::")[0] in ("shared", "global")]
    if spaces[:2] != ["shared", "global"] or any("multicast" in p for p in parts):
        raise PtxParseError(f"{inst.opcode} is not handled: only loads without multicast are")
    return _tensor_load(inst, scope) if "tensor" in parts else _plain_load(inst, scope)


def _plain_load(inst: Instruction, scope: Scope) -> Op:
    target, source = (access.addresses(scope.address(x)) for x in inst.operands[:2])
    size, bar = (
        scope.src(inst.operands[2], "b32"),
        access.addresses(scope.address(inst.operands[3])),
    )

    def run(m: Machine) -> None:
        to, of = _shared_address(target(m)), source(m)
        sizes = m.pick(m.v["u32"][size]).astype(np.int64)
        access.aligned(m, inst, to | of | sizes, 16, "global")
        for row, key in enumerate(_keys(m, bar(m))):
            n, lane = int(sizes[row]), int(m.idx[row])
            offsets = np.arange(0, n, 16)
            _start(m, inst, key, lane, int(to[row]) + offsets, int(of[row]) + offsets, 16, n)

    return run


def _start(
    m: Machine,
    inst: Instruction,
    key: tuple[int, int],
    lane: int,
    raw: np.ndarray,
    address: np.ndarray,
    element: int,
    nbytes: int,
    inside: np.ndarray | None = None,
) -> None:
    """Check a bulk copy and hand it to the mbarrier it completes on."""
    m.mbarriers.get(key, inst, lane)
    if not len(raw):
        m.mbarriers.launch(lambda: None, key, nbytes)
        return
    if int(raw.max()) + element > m.shared.size:
        message = f"bulk copy reaches shared byte {int(raw.max())}, there are {m.shared.size}"
        m.report("out-of-bounds", message, inst, lane)
        raise PtxFaultError(message)
    wanted = address if inside is None else address[inside]
    buffer = m.memory.find(int(wanted.min()), int(wanted.max()) + element) if len(wanted) else None
    if buffer is None and len(wanted):
        where = m.memory.where(int(wanted.min()))
        m.report("out-of-bounds", f"bulk copy from {where}", inst, lane)
        raise PtxFaultError(f"bulk copy from {where}: {inst.text}")
    flat = raw + key[0] * m.shared.stride
    m.shared.lose(flat, max(element, 2))

    def land() -> None:
        out = np.zeros((len(raw), element), np.uint8)
        if buffer is not None:
            rows = (wanted - buffer.origin)[:, None] + np.arange(element)
            out[slice(None) if inside is None else inside] = buffer.bytes[rows]
        m.shared.data[1][flat[:, None] + np.arange(element)] = out
        mark(m.shared.marks, flat, element)

    m.mbarriers.launch(land, key, nbytes)


def _tensor_load(inst: Instruction, scope: Scope) -> Op:
    """[dst], [map, {coordinates}], [bar]."""
    target = access.addresses(scope.address(inst.operands[0]))
    inner = inst.operands[1].strip()[1:-1]
    name, _, coordinates = inner.partition(",")
    where = access.addresses(scope.address(f"[{name.strip()}]"))
    axes = [scope.src(x, "s32") for x in split_operands(coordinates.strip().strip("{}"))]
    bar = access.addresses(scope.address(inst.operands[2]))
    if "im2col" in inst.parts:
        raise PtxParseError("im2col tensor loads are not handled")

    def run(m: Machine) -> None:
        to, maps = _shared_address(target(m)), _param_offsets(where(m))
        at = [m.pick(m.v["s32"][a]) for a in axes]
        for row, key in enumerate(_keys(m, bar(m))):
            offset, lane = int(maps[row]), int(m.idx[row])
            tensor = TensorMap.decode(m.params[offset : offset + 128].tobytes())
            if int(to[row]) % (8 * tensor.span or 128):
                message = f"tile at shared byte {int(to[row])}, {tensor.span}-byte swizzle"
                m.report("misaligned", message, inst, lane)
            address, inside = tensor.gather([int(c[row]) for c in at])
            raw = int(to[row]) + np.arange(len(address)) * tensor.element
            raw = swizzle(raw, tensor.span)
            _start(m, inst, key, lane, raw, address, tensor.element, tensor.nbytes, inside)

    return run


def _param_offsets(raw: np.ndarray) -> np.ndarray:
    from .program import PARAM_WINDOW

    return np.where(raw >= PARAM_WINDOW, raw - PARAM_WINDOW, raw)


# -- wgmma ----------------------------------------------------------------------------------------


@opcode("wgmma")
def wgmma(inst: Instruction, scope: Scope) -> Op:
    """fence, commit_group, wait_group; mma_async m64nNk16."""
    parts = inst.parts
    at = scope.at
    if parts[1] in ("fence", "commit_group", "wait_group"):
        return lambda m: whole_warps(m, inst, at)
    shape = next(p for p in parts if p.startswith("m64n"))
    columns, depth = (int(x) for x in shape[4:].split("k"))
    kind = parts[-1]
    if depth != 16 or kind not in ("f16", "bf16") or parts[-3] != "f32":
        raise PtxParseError(f"{inst.opcode} is not handled")
    d = slots(scope, inst.operands[0], "f32")
    from_registers = inst.operands[1].startswith("{")
    a = (
        slots(scope, inst.operands[1], "b32")
        if from_registers
        else [scope.src(inst.operands[1], "b64")]
    )
    b, keep = scope.src(inst.operands[2], "b64"), scope.src(inst.operands[3], "pred")
    flags = [int(x) for x in inst.operands[4:]]
    sign = flags[0] * flags[1]
    major_a, major_b = (0, flags[2]) if from_registers else (*flags[2:4], 0, 0)[:2]

    def run(m: Machine) -> bool | None:
        if whole_warps(m, inst, at):
            return True
        for group in _warpgroups(m):
            block = int(m.lane_block[group[0]])
            if from_registers:
                left = _fragments(m, a, group, kind)
            else:
                left = _tile(m, inst, a[0], group, block, 64, major_a, kind)
            right = _tile(m, inst, b, group, block, columns, major_b, kind)
            _accumulate(m, d, keep, group, sign * (left @ right.T), columns)
        return None

    return run


def _warpgroups(m: Machine) -> np.ndarray:
    """The group's threads in rows of four consecutive warps."""
    if len(m.idx) % 128:
        raise PtxFaultError("wgmma needs four consecutive warps together")
    groups = m.idx.reshape(-1, 128)
    if (groups[:, 0] % m.threads % 128).any() or (groups[:, -1] - groups[:, 0] != 127).any():
        raise PtxFaultError("wgmma needs four consecutive warps together")
    return groups


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(F32)


def _fragments(m: Machine, a: list[int], group: np.ndarray, kind: str) -> np.ndarray:
    """A as 64 x 16 from four registers a thread."""
    out = np.empty((4, 2, 8, 2, 4, 2), F32)
    for r, slot in enumerate(a):
        bits = np.ascontiguousarray(m.v["u32"][slot][group]).view(np.uint16)
        out[:, r & 1, :, r >> 1] = _numbers(bits, kind).reshape(4, 8, 4, 2)
    return out.reshape(64, 16)


def _tile(
    m: Machine,
    inst: Instruction,
    slot: int,
    group: np.ndarray,
    block: int,
    rows: int,
    major: int,
    kind: str,
) -> np.ndarray:
    """rows x 16 operand named by a shared-memory matrix descriptor."""
    descriptors = m.v["u64"][slot][group]
    if (descriptors != descriptors[0]).any():
        m.report("divergent", "descriptors differ within a warpgroup", inst, int(group[0]))
    desc = int(descriptors[0])
    start, leading = (desc & 0x3FFF) << 4, (desc >> 16 & 0x3FFF) << 4
    stride, span = (desc >> 32 & 0x3FFF) << 4, {0: 0, 1: 128, 2: 64, 3: 32}[desc >> 62 & 3]
    if span == 0 or (major and span != 128):
        raise PtxParseError(f"wgmma operands with swizzle {span}, major {major} are not handled")
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if major:  # 64 rows side by side in a 128-byte line, lines of k
        at = start + r % 64 * 2 + r // 64 * leading + k % 8 * 128 + k // 8 * stride
    else:
        at = start + r // 8 * stride + r % 8 * span + k * 2
    at = swizzle(at, span).reshape(-1)
    if int(at.max()) + 2 > m.shared.size:
        message = f"wgmma operand at shared byte {int(at.max())}, there are {m.shared.size}"
        m.report("out-of-bounds", message, inst, int(group[0]))
        raise PtxFaultError(message)
    flat = at + block * m.shared.stride
    if m.checks.uninitialised and m.shared.unwritten(flat, 2).any():
        m.report("uninitialised", "wgmma reads unwritten shared memory", inst, int(group[0]))
    return _numbers(m.shared.data[2][flat >> 1], kind).reshape(rows, 16)


def _accumulate(
    m: Machine, d: list[int], keep: int, group: np.ndarray, product: np.ndarray, columns: int
) -> None:
    """Thread (g, t) of warp w holds rows 16 w + g (+ 8), columns 8 j + 2 t (+ 1)."""
    table = product.reshape(4, 2, 8, columns // 8, 4, 2)
    old = m.v["pred"][keep][group]
    for k, slot in enumerate(d):
        row = m.v["f32"][slot]
        part = table[:, k >> 1 & 1, :, k >> 2, :, k & 1].reshape(-1)
        row[group] = np.where(old, row[group], F32(0)) + part
