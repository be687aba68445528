"""What decides a kernel, and the block of numbers that one call hands to it.

In: nothing. Out: `Spec`, and the order of the words of the argument block, which `task.py` reads
and `launch.py` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from natcupy.cpu.emit import Machine


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TENSORS = _names("query key value out grad_out grad_query grad_key grad_value")
STRIDES = _names("batch head axis0 axis1 axis2")
# Scratch memory of one thread. "across" means channel by channel with columns as neighbors, "along"
# column by column with channels as neighbors.
BUFFERS = _names("""
    zeros keys_across values_across keys_along values_along key_sums value_sums
    query_across query_along grad_across grad_along logits grads
    max sum grad_lse_rows factor lse bias mirror bias_sums mirror_sums
    extra_keys_across extra_values_across extra_keys_along extra_values_along
    extra_key_sums extra_value_sums views
""")
# All 64 bits wide. Strides and sizes count elements, except that `thread_bytes` counts bytes.
WORDS = (
    *TENSORS,
    *_names("""
        lse grad_lse rpb rpb_sums extra_keys extra_values extra_key_grads extra_value_grads
        table scratch next threads thread_count thread_bytes
        tasks task_items first_item phase_items items heads kv_heads scale
        round_batch round_head round_heads
        partial_keys partial_values partial_columns partial_size partials_of_threads
        dilation0 dilation1 dilation2 lse_batch lse_axis0 lse_axis1 lse_axis2
        extra extra_taps extra_classes_at extra_pitch
        extra_key_batch extra_key_token extra_key_head
        extra_value_batch extra_value_token extra_value_head
        key_pitch key_lead end_before end_behind key_columns query_pitch logits_step zeros
        bias_rows bias_length bias_pitch bias_lead mirror_pitch mirror_lead
        has_rpb want_query want_key_value want_rpb
    """),
    *(f"{tensor}_{stride}" for tensor in TENSORS for stride in STRIDES),
    *(f"at_{buffer}" for buffer in BUFFERS),
)
# What `has_rpb` tells of a bias table: in the compute type, or in the tensors' half type.
BIAS_READ, BIAS_WIDENED = 1, 2


@dataclass(frozen=True)
class Common:
    """What decides the functions that a forward and a backward kernel have in common."""

    storage: str  # type of the tensors: "float", "double", "half" or "bfloat"
    head_dim: int
    value_dim: int
    shared: tuple[int, ...]  # taps of the logit kernels for several query rows; none, no such rows
    singles: tuple[int, ...]  # and for one
    beside: tuple[int, ...]  # of a line's for two neighboring blocks; none, one block at a time
    sides: int  # query rows that there are functions for; a plan's steps may have fewer
    keys: int  # that a query sees in a row, where their loop is unrolled; else 0
    extra: bool  # whether there are additional keys

    @property
    def real(self) -> str:
        """The type everything is computed in."""
        return "double" if self.storage == "double" else "float"


@dataclass(frozen=True)
class Spec:
    """What decides the machine code of a kernel, beside the machine itself."""

    backward: bool
    common: Common
    # whether a gradient of a key is added to what an earlier item or query head has stored: in the
    # compute type, so that beside tensors of a half type there are others for what is incomplete
    adds: bool = False

    @property
    def has_partials(self) -> bool:
        """Whether incomplete gradients of keys have tensors of their own, see `partials.py`."""
        return self.adds and self.common.storage != self.common.real


def pitch(channels: int, machine: Machine, real: str) -> int:
    """Elements from one packed column to the next where channels lie along."""
    width = machine.width(real)
    return -(-channels // width) * width
