"""Weights in several safetensors files, and the index that says which tensor is in which.

In: the bytes of an index, or a state dict that is too large for one file. Out: a checked map from
tensor to file, or the parts and the index to write. Layout and names are those of the Hub:
`model-00001-of-00003.safetensors` beside `model.safetensors.index.json`.

An index names files, so it is checked like any hostile text: only names of that pattern, numbered
without gaps, in the folder of the index itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from natcupy.hub import schema
from natcupy.hub.errors import ConfigError, Corrupt, some
from natcupy.hub.tensors import MAX_TENSORS

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 4 * 1024 * 1024
MAX_SHARDS = 999
MAX_SHARD_BYTES = 5_000_000_000
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def parse_index(data: bytes, where: object = INDEX) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in the order of the files.

    Raises:
        Corrupt: what is wrong with the index.
    """
    try:
        values = schema.parse_json(data, where, MAX_INDEX_BYTES)
    except ConfigError as error:
        raise Corrupt(str(error)) from None
    table = values.get("weight_map")
    if values.keys() - {"metadata", "weight_map"} or not isinstance(table, dict) or not table:
        raise Corrupt(
            f"{where} must hold 'metadata' and a 'weight_map' of tensors, got the keys "
            f"{some(sorted(values), 5) or 'none'}."
        )
    if len(table) > MAX_TENSORS:
        raise Corrupt(f"{where}: at most {MAX_TENSORS:,} tensors, got {len(table):,}.")
    files: dict[str, list[str]] = {}
    for tensor, name in table.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise Corrupt(
                f"{where}: the file of a tensor is model-NNNNN-of-NNNNN.safetensors, got "
                f"{ascii(name)[:80]}."
            )
        files.setdefault(name, []).append(tensor)
    return {name: files[name] for name in _complete(files, where)}


def _complete(files: Mapping[str, object], where: object) -> list[str]:
    """The names in order, once they are 1 to N of N."""
    count = len(files)
    wanted = names(count)
    if count > MAX_SHARDS or set(files) != set(wanted):
        raise Corrupt(
            f"{where} must name the files {wanted[0]} to {wanted[-1]}, got "
            f"{some(sorted(files), 5)}. It is cut short or damaged; fetch it again."
        )
    return wanted


def names(count: int) -> list[str]:
    """The names of `count` files."""
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a part."""
    return _SHARD.fullmatch(name) is not None


def split(state: Mapping[str, Tensor], limit: int = MAX_SHARD_BYTES) -> list[dict[str, Tensor]]:
    """Tensors in order, cut into parts of at most `limit` bytes (a larger tensor is a part alone).

    Raises:
        ValueError: `limit` is no positive int, or would make too many files.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"max_shard_bytes must be an int of at least 1, got {limit!r}.")
    parts: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in state.items():
        size = tensor.numel() * tensor.element_size()
        if parts[-1] and held + size > limit:
            parts.append({})
            held = 0
        parts[-1][name] = tensor
        held += size
    if len(parts) > MAX_SHARDS:
        raise ValueError(
            f"weights may be cut into {MAX_SHARDS} files, max_shard_bytes={limit:,} makes "
            f"{len(parts):,}; pass a larger one."
        )
    return parts


def index_text(parts: list[dict[str, Tensor]]) -> str:
    """The index of these parts, as the Hub's libraries write it."""
    sizes = (t.numel() * t.element_size() for part in parts for t in part.values())
    where = {
        name: file for file, part in zip(names(len(parts)), parts, strict=True) for name in part
    }
    values = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    return json.dumps(values, indent=2) + "\n"
