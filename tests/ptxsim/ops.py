"""Imports every room of decoders, so that all opcodes are registered."""

from . import (  # noqa: F401
    ops_async,
    ops_atomic,
    ops_compare,
    ops_control,
    ops_convert,
    ops_float,
    ops_half,
    ops_hopper,
    ops_int,
    ops_memory,
    ops_mma,
    ops_move,
    ops_warp,
)
