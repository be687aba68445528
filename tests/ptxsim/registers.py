"""The register file: one row per register, one column per thread.

In: declarations, immediates and special registers while a kernel is decoded (`Layout`); then a
number of threads (`RegisterFile`). Out: slot numbers, and per type ("u32", "f32", "s64", "pred",
...) a list of rows, so that an instruction is one numpy call on whole rows. Immediates and special
registers such as %tid.x are rows too: every operand is a slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import PtxParseError
from .parse import type_bytes

#: Unsigned view of each register class, by width in bytes; predicates are a class of their own.
CLASS_OF_WIDTH = {2: "u16", 4: "u32", 8: "u64"}
VIEWS = {
    "pred": ("pred",),
    "u16": ("u16", "s16", "f16"),
    "u32": ("u32", "s32", "f32"),
    "u64": ("u64", "s64", "f64"),
}
DTYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
_CLASS = {view: cls for cls, views in VIEWS.items() for view in views}
SPECIALS_32 = (
    *(f"%{base}.{axis}" for base in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *(f"%cluster_{base}.{axis}" for base in ("ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%clock", "%clock_hi"),
    *(f"%lanemask_{c}" for c in ("eq", "lt", "le", "gt", "ge")),
    *("%dynamic_smem_size", "%total_smem_size", "%cluster_ctarank", "%cluster_nctarank"),
)
SPECIALS_64 = ("%clock64", "%globaltimer")


def view_of(type_name: str) -> str:
    """The view that operates on PTX type `type_name`: b32 -> u32, bf16 -> u16, f16x2 -> u32."""
    if type_name in DTYPES and type_name not in ("u8", "s8"):
        return type_name
    width = type_bytes(type_name)
    return "u16" if width == 1 else CLASS_OF_WIDTH[width]


def class_of(view: str) -> str:
    """The register class a view belongs to."""
    return _CLASS[view]


@dataclass
class Layout:
    """Names and immediates of one kernel, each with the slot it lives in."""

    slots: dict[str, tuple[str, int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VIEWS, 0))
    constants: dict[str, dict[int, int]] = field(default_factory=lambda: {c: {} for c in VIEWS})

    def __post_init__(self) -> None:
        self.declare("b32", SPECIALS_32)
        self.declare("b64", SPECIALS_64)

    def declare(self, type_name: str, names: tuple[str, ...]) -> None:
        """Give each name a slot of its own; every name must come before the first constant."""
        cls = "pred" if type_name == "pred" else class_of(view_of(type_name))
        first = self.counts[cls]
        self.slots.update((name, (cls, slot)) for slot, name in enumerate(names, first))
        self.counts[cls] += len(names)

    def constant(self, cls: str, bits: int) -> int:
        """The slot of an immediate, given as the bits it has in its class."""
        known = self.constants[cls]
        return known.setdefault(bits, self.counts[cls] + len(known))

    def immediate(self, text: str, view: str) -> int | None:
        """The bits of a literal operand in `view`; None if `text` is no literal."""
        if view == "pred":
            return int(int(text, 0) != 0) if re.fullmatch(r"-?\d+", text) else None
        width = np.dtype(DTYPES[view]).itemsize
        hexes = re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text)
        if hexes and view in ("f32", "u32", "f64", "u64", "s32", "s64"):
            return int(hexes[2], 16)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            return int(text.rstrip("U"), 0) & ((1 << 8 * width) - 1)
        if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", text) and view in ("f32", "f64"):
            return int(np.array(float(text), DTYPES[view]).view(f"u{width}"))
        return None

    def constant_value(self, cls: str, slot: int) -> int | None:
        """The bits of slot `slot` if it is an immediate, else None."""
        return next((b for b, s in self.constants[cls].items() if s == slot), None)

    def register(self, name: str) -> tuple[str, int]:
        """(class, slot) of a declared register."""
        try:
            return self.slots[name]
        except KeyError:
            raise PtxParseError(f"operand {name!r} is not a register known here") from None


class RegisterFile:
    """Rows for `threads` threads; `views[type][slot]` is a writable row."""

    def __init__(self, layout: Layout, threads: int):
        self.views: dict[str, list[np.ndarray]] = {}
        for cls, names in VIEWS.items():
            constants = layout.constants[cls]
            first = layout.counts[cls]
            table = np.zeros((first + len(constants), threads), DTYPES[cls])
            if constants:
                table[first:] = np.array(list(constants), DTYPES[cls])[:, None]
            for name in names:
                self.views[name] = list(table.view(DTYPES[name]))
        self._slots = layout.slots

    def set_special(self, name: str, values: np.ndarray | int) -> None:
        """Fill the row of a special register."""
        cls, slot = self._slots[name]
        self.views[cls][slot][...] = values
