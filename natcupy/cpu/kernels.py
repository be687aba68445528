"""A kernel ready to be called: the plan, its table, and an argument block without addresses.

In: the sizes of a problem. Out: a `Kernel`, kept for the next call of the same sizes.
"""

from __future__ import annotations

import array
import ctypes
import functools
from math import prod

import torch

from natcupy.cpu import host, micro, plan, sums
from natcupy.cpu.classes import LANES, Tuning
from natcupy.cpu.emit import REAL_BYTES, Machine
from natcupy.cpu.memory import ALIGNMENT
from natcupy.cpu.plan import Plan, Shape
from natcupy.cpu.rows import MOST_SIDES
from natcupy.cpu.spec import BUFFERS, WORDS, Common, Spec, pitch
from natcupy.cpu.view import VIEW
from natcupy.neighborhood import Neighborhood

STORAGE = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "half",
    torch.bfloat16: "bfloat",
}
SMALL = 1_000_000  # multiply-adds of the logits below which one thread is faster than two
UNROLLED = 13  # most keys of a row whose loop is unrolled
LONG_ROW = 8  # vectors, from which on one more adds little
THREAD_BYTES = 1 << 20  # of scratch memory beyond which a step has one query row less
PLACE = {name: i for i, name in enumerate(WORDS)}
# Two counters follow the words, each with a cache line to itself.
COUNTERS = (len(WORDS) + 8, len(WORDS) + 16)
Block = ctypes.c_int64 * (len(WORDS) + 24)


class Kernel:
    """Everything about a call that does not depend on the tensors' addresses and strides."""

    def __init__(self, spec: Spec, shape: Shape, found: Plan, words: dict[str, int], size: int):
        self.spec, self.plan = spec, found
        self.storage = next(x for x, name in STORAGE.items() if name == spec.common.storage)
        self.compute = compute_dtype(self.storage)
        self.thread_bytes = -(-size // ALIGNMENT) * ALIGNMENT
        self.head_dim, self.value_dim = shape.head_dim, shape.value_dim
        #: keys of one head whose sums stay incomplete for a while, where they have own tensors
        self.partials = prod(found.partials) if spec.has_partials else 0
        #: multiply-adds of the logits of one head
        self.work = shape.head_dim * prod(shape.lengths) * prod(shape.kernel_size)
        self._table = array.array("i", found.words)
        found.words.clear()  # long windows have long tables
        self._block = Block()
        for name, value in words.items():
            self._block[PLACE[name]] = value
        self._block[PLACE["table"]] = self._table.buffer_info()[0]
        self._block[PLACE["thread_bytes"]] = self.thread_bytes
        self._address = 0

    @property
    def address(self) -> int:
        """Of the compiled function."""
        if not self._address:
            self._address = host.function(self.spec)
        return self._address

    def workers(self, heads: int, threads: int) -> int:
        """Threads for a call with so many (batch, query head) pairs, of those there are."""
        return threads if self.work * heads >= SMALL else 1

    def bias(self, rpb: torch.Tensor) -> torch.Tensor:
        """A bias table as it is read: contiguous, in the compute dtype or one to be widened.

        The kernel widens whole vectors only; shorter rows are widened here.
        """
        widened = rpb.dtype == self.storage and rpb.shape[-1] >= LANES
        return (rpb if widened else rpb.to(self.compute)).contiguous()

    def block(self) -> ctypes.Array:
        """A new argument block with all that is known."""
        return Block.from_buffer_copy(self._block)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, of the log-sum-exp and of partial gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def share(taps: int, most: int) -> int:
    """Size of the even shares into which so many taps are cut, each no larger than `most`."""
    return -(-taps // -(-taps // max(1, most)))


def most_sides(shape: Shape, together: int) -> int:
    """Query rows of a step: one on a line, more where registers hold the lanes of several."""
    if shape.lengths[0] * shape.lengths[1] == 1:
        return 1
    return MOST_SIDES if together > 1 else MOST_SIDES - 1


def _line_size(taps: int, registers: int, together: int) -> int:
    """Taps of a line to keep in registers, at most `taps`: the least work for all of them."""
    if together == 1:
        return share(taps, registers)

    def work(size: int) -> tuple[int, int]:
        return -(-taps // size) * (1 + held[size]), -size  # a query, and the taps

    held = {
        size: len(micro.registers_of(1, size, together))
        for size in range(1, 1 + min(taps, registers * together))
    }
    return min((size for size in held if held[size] <= registers), key=work)


def _with_smaller(size: int) -> tuple[int, ...]:
    """A size and the next smaller one, which together make up any larger number of taps."""
    return (size - 1, size) if size > 1 else (size,)


def logit_sizes(
    shape: Shape, registers: int, together: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Numbers of taps to keep in registers, for several query rows, for one, and for two blocks.

    A register holds `together` vectors: of query rows, or on a line of taps. No size is larger than
    the window, for the taps of a wrapped class are just as many.
    The smallest one is common to several rows and one, so that any number ends at the same place
    in both. Two neighboring blocks are those of a line, in registers that hold one vector; a key on
    its way serves both.
    """
    inner = shape.kernel_size[2]
    border = inner + inner // 2
    sides = most_sides(shape, together)
    if sides == 1:
        singles = {_line_size(taps, registers, together) for taps in (inner, border)}
        is_beside = together == 1 and inner >= 2 * LANES
        beside = _with_smaller(share(inner - LANES, registers // 2)) if is_beside else ()
        return (), tuple(sorted(singles)), beside
    size = share(inner, registers // -(-sides // together))
    shared = _with_smaller(size)
    return shared, tuple(sorted({shared[0], share(inner, registers)})), ()


@functools.lru_cache(maxsize=512)
def kernel(
    lengths: tuple[int, ...],
    hood: Neighborhood,
    head_dim: int,
    value_dim: int,
    extra: int,
    dtype: torch.dtype,
    backward: bool,
    stripes: int,
    grouped: bool = False,
) -> Kernel:
    """The kernel for a problem; `stripes` are those asked of a forward plan.

    `grouped`: a backward pass in which query heads share key heads.
    """
    machine, storage = host.machine(), STORAGE[dtype]
    shape = Shape.of(lengths, hood, head_dim, value_dim, extra)
    real = "double" if storage == "double" else "float"
    registers = (machine.registers - _spare(machine)) // machine.registers_of(LANES, real)
    together = machine.vectors_in(LANES, real)
    sizes = logit_sizes(shape, registers, together)
    sides = most_sides(shape, together)
    keys = shape.kernel_size[2] if shape.kernel_size[2] <= UNROLLED else 0
    common = Common(storage, head_dim, value_dim, *sizes, sides, keys, extra > 0)
    pitches = {
        what: pitch(channels, machine, real)
        for what, channels in (("key", head_dim), ("value", value_dim))
    }
    blocks = sums.weighted_block(machine), sums.spread_block(machine)
    lanes = [block.lanes for block in blocks]
    kept = head_dim + pitches["value"]
    if backward:  # keys along, and the sums of both gradients
        kept += value_dim + 2 * pitches["key"]
    item_bytes = REAL_BYTES[real] * kept
    for rows in _rows_to_try(sides, shape, backward):
        tuning = Tuning(*sizes, rows, keys, *lanes)
        found = plan.make(shape, tuning, backward, item_bytes, stripes, grouped)
        words, size = _constants(shape, found, pitches, backward)
        if size * REAL_BYTES[real] <= THREAD_BYTES:
            break
    spec = Spec(backward, common, backward and (grouped or len(found.phases) > 1))
    return Kernel(spec, shape, found, words, size * REAL_BYTES[real])


def _rows_to_try(sides: int, shape: Shape, backward: bool) -> tuple[int, ...]:
    """Query rows of a step, fewer where the scratch memory of more is too large."""
    if sides < MOST_SIDES:
        return (sides,)
    if backward and shape.lengths[0] > 1:  # rows of several planes leave no room for more
        return (sides - 1,)
    return sides, sides - 1


def _spare(machine: Machine) -> int:
    """Registers for queries, and for keys on their way; narrow ones take two for each vector."""
    if machine.registers < 32:
        return 4
    return 8 if machine.register_bytes == 16 else 6


def _constants(shape: Shape, p: Plan, pitches, backward: bool) -> tuple[dict[str, int], int]:
    """Words that only depend on the plan, and the number of scratch elements of a thread."""
    ends = [_whole(columns) for columns in p.ends]
    lead = -p.reach[0]
    lead += _whole(max(0, ends[0] - lead))  # taps of a block stay where they are
    padded = max(_whole(p.key_columns), p.key_columns + ends[1])
    key_pitch = _row_pitch(lead + max(p.reach[1], padded))
    extra_pitch = _whole(max(p.extra_taps, shape.extra))
    bias_pitch = p.bias_reach[1] - p.bias_reach[0]
    mirror_pitch = p.mirror_reach[1] - p.mirror_reach[0]
    query_pitch = p.query_columns
    d, dv = shape.head_dim, shape.value_dim
    logits = (p.taps + p.extra_taps) * LANES
    size = {
        "zeros": _whole(2 * (p.span + 2 * LANES)),
        "keys_across": p.ring * d * key_pitch,
        "query_across": p.sides * d * query_pitch,
        "logits": p.logits * logits,
        "bias": shape.bias_rows * bias_pitch,
        "mirror": shape.bias_rows * mirror_pitch,
        "extra_keys_across": d * extra_pitch,
        **dict.fromkeys(("max", "sum", "factor", "lse"), LANES),
        "views": 4 * VIEW,
    }
    rows = p.ring * p.key_columns
    if backward:
        size |= {
            "values_across": p.ring * dv * key_pitch,
            "keys_along": rows * pitches["key"],
            "key_sums": rows * pitches["key"],
            "value_sums": rows * pitches["value"],
            "query_along": p.sides * query_pitch * pitches["key"],
            "grad_across": p.sides * dv * query_pitch,
            "grad_along": p.sides * query_pitch * pitches["value"],
            "grads": p.logits * logits,
            "grad_lse_rows": MOST_SIDES * query_pitch,
            "bias_sums": shape.bias_rows * bias_pitch * LANES,
            "mirror_sums": _whole(shape.bias_rows * mirror_pitch),
            "extra_values_across": dv * extra_pitch,
            "extra_keys_along": shape.extra * pitches["key"],
            "extra_key_sums": _whole(shape.extra * pitches["key"]),
            "extra_value_sums": _whole(shape.extra * pitches["value"]),
        }
    else:
        size["values_along"] = rows * pitches["value"]
        size["extra_values_along"] = shape.extra * pitches["value"]
    layout = plan.lay_out({name: size.get(name, 0) for name in BUFFERS})
    words = {f"at_{name}": at for name, at in layout.offsets.items()}
    words |= {f"dilation{axis}": shape.dilation[axis] for axis in range(3)}
    words |= {
        "items": p.items,
        "task_items": 1,
        "zeros": size["zeros"],
        "extra": shape.extra,
        "extra_taps": p.extra_taps,
        "extra_classes_at": p.extra_classes_at,
        "extra_pitch": extra_pitch,
        "key_pitch": key_pitch,
        "key_lead": lead,
        "end_before": ends[0],
        "end_behind": ends[1],
        "key_columns": p.key_columns,
        "query_pitch": query_pitch,
        "logits_step": logits,
        "bias_rows": shape.bias_rows,
        "bias_length": 2 * shape.kernel_size[2] - 1,
        "bias_pitch": bias_pitch,
        "bias_lead": -p.bias_reach[0],
        "mirror_pitch": mirror_pitch,
        "mirror_lead": -p.mirror_reach[0],
        "partial_columns": p.partials[1],
        "partial_size": prod(p.partials),
    }
    return words, layout.size


def _whole(count: int) -> int:
    """As many elements or more, in vectors of 8."""
    return -(-count // LANES) * LANES


def _row_pitch(columns: int) -> int:
    """Columns of a packed row: whole vectors, of floats whole cache lines where that adds little.

    And no multiple of 16 vectors, which would put all channels of a column into few cache sets.
    """
    vectors = _whole(columns) // LANES
    if vectors % 2 and vectors > LONG_ROW:
        vectors += 1
    return LANES * (vectors + 1 if vectors % 16 == 0 else vectors)
