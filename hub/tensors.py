"""Safetensors files: a strict look at the header, then the tensors, from memory.

In: a path or bytes. Out: name -> shape and dtype without reading data (`read_header`), or the
tensors with the hash of the bytes they came from (`read_tensors`); `write_tensors` is the way back.

The format (an 8-byte length, a JSON header, one data block) leaves room for files that different
readers understand differently, or that cost seconds and gigabytes before they are refused. The
look here is stricter than the format: capped, duplicate-free, plain names, known dtypes, and the
tensors tile the data block exactly.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from natcupy.hub.errors import Corrupt, NotFound, Truncated
from natcupy.hub.files import looks_like, read_bytes, refuse_lookalikes, sha256_of

MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_TENSORS = 20_000
MAX_FILE_BYTES = 16 * 1024**3
MAX_AXIS = 2**31 - 1
MAX_RANK = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME = re.compile(r"[A-Za-z0-9_]+(?:[.\-][A-Za-z0-9_]+)*")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds.

    Attributes:
        shapes: name -> tensor on the meta device (shape and dtype, no memory).
        metadata: the free text pairs of the file.
        data_start: offset of the data block in the file.
    """

    shapes: dict[str, Tensor]
    metadata: dict[str, str]
    data_start: int


@dataclass(frozen=True)
class Weights:
    """Tensors and where they came from: `sha256` is of exactly the bytes that were decoded."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str


def read_header(path: Path | str) -> Header:
    """Check and decode the header of a safetensors file; reads no tensor data.

    Raises:
        NotFound: no such file.
        Corrupt, Truncated, LfsPointer, HtmlPage: what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}. Check the path.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        rest = file.read(min(length, MAX_HEADER_BYTES))
    return parse_header(head + rest, size, path)


def parse_header(start: bytes, size: int, path: Path | str) -> Header:
    """Check and decode a header from the first bytes of a file of `size` bytes."""
    refuse_lookalikes(start, path)
    if looks_like(start) == "zip":
        raise Corrupt(
            f"{path} is a zip archive (a PyTorch checkpoint, wrongly named), not safetensors. "
            "Rename it to .bin or .pth to have it read as one."
        )
    if size < 8 or len(start) < 8:
        raise Truncated(f"{path} ends inside its header length: got {size} of at least 8 bytes.")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise Corrupt(
            f"{path}: a safetensors header may take {MAX_HEADER_BYTES:,} bytes, this file declares "
            f"{length:,}. It is not a safetensors file, or a damaged one; fetch it again."
        )
    if size < 8 + length or len(start) < 8 + length:
        raise Truncated(
            f"{path} ends inside its header: got {size:,} of at least {8 + length:,} bytes. "
            "Fetch it again."
        )
    entries = _decode(start[8 : 8 + length], path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Corrupt(f"{path}: the header's __metadata__ must map text to text.")
    return Header(_layout(entries, size - 8 - length, path), metadata, 8 + length)


def read_tensors(path: Path | str) -> Weights:
    """Read a safetensors file into memory and decode it.

    Raises:
        HubError: the classes of `read_header`.
    """
    return decode_tensors(read_bytes(path, MAX_FILE_BYTES), path)


def decode_tensors(data: bytes, path: Path | str) -> Weights:
    """Check and decode the bytes of a safetensors file; `path` only names it in errors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    header = parse_header(data[: 8 + MAX_HEADER_BYTES], len(data), path)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise Corrupt(
            f"{path} cannot be decoded as safetensors ({error}). Fetch it again."
        ) from error
    return Weights(tensors, header.metadata, sha256_of(data))


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a new safetensors file, in the form every torch reader expects.

    Args:
        tensors: dense tensors on any device; views and shared memory are written out in full.
        path: the file to make; writing it atomically is the caller's business.
        metadata: text pairs, besides the `format: pt` that is always written.

    Raises:
        ValueError: a name or dtype that `read_tensors` would refuse.
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dense = {}
    for name, tensor in tensors.items():
        if not _NAME.fullmatch(name) or tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"a tensor to save needs a plain name and one of the dtypes {sorted(DTYPES)}, "
                f"got {name!r} of {tensor.dtype}."
            )
        dense[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    Path(path).touch()
    mode = Path(path).stat().st_mode & 0o777  # as the umask has it; save_file makes its own, 0600
    try:
        save_file(dense, path, metadata={**(metadata or {}), "format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from None
    Path(path).chmod(mode)


# ---------------------------------------------------------------- the header, piece by piece


def _decode(raw: bytes, path: Path | str) -> dict:
    """JSON to a dict; refuses what two readers could read in two ways."""
    # Counting braces first keeps a header of a million tiny objects from costing anything.
    if not raw.startswith(b"{") or raw.count(b"{") > MAX_TENSORS + 2:
        raise Corrupt(
            f"{path}: a safetensors header must be one JSON object of at most {MAX_TENSORS:,} "
            f"tensors, got {raw.count(b'{'):,} objects starting with {raw[:1]!r}."
        )
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: the safetensors header is not valid ({error}).") from error


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} stands twice")
    return entries


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _layout(entries: dict, data_size: int, path: Path | str) -> dict[str, Tensor]:
    """Check every entry and that together they tile the data block; meta tensors out."""
    if len(entries) > MAX_TENSORS:
        raise Corrupt(f"{path}: at most {MAX_TENSORS:,} tensors, got {len(entries):,}.")
    shapes, spans = {}, []
    for name, entry in entries.items():
        shape, dtype, start, end = _entry(name, entry, path)
        shapes[name] = torch.empty(shape, dtype=dtype, device="meta")
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise Corrupt(
                f"{path}: tensors must follow each other without hole or overlap, {name!r} starts "
                f"at byte {start:,} instead of {position:,} of the data."
            )
        position = end
    if position > data_size:
        raise Truncated(
            f"{path} is cut short: got {data_size:,} of {position:,} bytes of tensor data. "
            "Fetch it again."
        )
    if position < data_size:
        raise Corrupt(f"{path}: {data_size - position:,} bytes follow the last tensor.")
    return shapes


def _entry(name: str, entry: object, path: Path | str) -> tuple[list[int], torch.dtype, int, int]:
    if len(name) > 256 or not _NAME.fullmatch(name):
        raise Corrupt(
            f"{path}: a tensor name is made of letters, digits, '_', '-' and single dots, "
            f"got {name[:80]!r}."
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Corrupt(f"{path}: tensor {name!r} needs exactly dtype, shape and data_offsets.")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise Corrupt(
            f"{path}: tensor {name!r} has dtype {str(entry['dtype'])[:40]!r}; readable are "
            f"{', '.join(DTYPES)}."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or len(shape) > MAX_RANK or any(n > MAX_AXIS for n in shape):
        raise Corrupt(
            f"{path}: tensor {name!r} needs up to {MAX_RANK} axes of 0 to {MAX_AXIS:,}, "
            f"got shape {str(shape)[:80]}."
        )
    if not _sizes(offsets) or len(offsets) != 2:
        raise Corrupt(f"{path}: tensor {name!r} needs two data_offsets, got {str(offsets)[:80]}.")
    start, end = offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise Corrupt(
            f"{path}: tensor {name!r} of shape {shape} and {dtype} takes "
            f"{math.prod(shape) * dtype.itemsize:,} bytes, its data_offsets span {end - start:,}."
        )
    return shape, dtype, start, end


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
