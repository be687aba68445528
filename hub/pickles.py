"""Foreign PyTorch checkpoints (.pth, .bin, .pt): plain tensors out, nothing run.

In: a path. Out: one flat state dict of ordinary CPU tensors, wrappers and `module.` prefixes
removed, and the hash of the bytes it came from.

A pickle is a program. Four barriers, each enough for most hostile files, none ever relaxed and no
second attempt after a refusal:

1. torch >= 2.10, whose restricted unpickler is the first without known memory errors;
2. the zip container is looked at: stored entries only, so that a small file stays small;
3. the pickle's instructions are listed without running them: only the names that a state dict of
   plain tensors needs may occur;
4. `torch.load(weights_only=True)`, then every tensor is checked to be dense, strided, on the CPU
   and no larger than its own storage, before anything copies it.
"""

from __future__ import annotations

import argparse
import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from natcupy.hub.errors import Corrupt, HubError, Truncated, UnsafePickle, some
from natcupy.hub.files import looks_like, read_bytes, refuse_lookalikes, sha256_of
from natcupy.hub.tensors import _NAME, DTYPES, MAX_TENSORS, Weights

SUFFIXES = (".pth", ".bin", ".pt")
TORCH_FLOOR = (2, 10)
MAX_FILE_BYTES = 16 * 1024**3
MAX_PROGRAM_BYTES = 64 * 1024 * 1024
MAX_ENTRIES = 4 * MAX_TENSORS
WRAPPERS = ("state_dict_ema", "state_dict", "model")

_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch Size",
    # Training scripts keep their options beside the weights; this one class only holds them.
    "argparse Namespace",
}
_STORAGE = re.compile(r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage")
_OTHER_WAYS_TO_NAMES = {
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "EXT1",
    "EXT2",
    "EXT4",
    "NEWOBJ_EX",
    "PERSID",
    "NEXT_BUFFER",
    "READONLY_BUFFER",
}


def read_pickle(path: Path | str) -> Weights:
    """Read a PyTorch checkpoint into a flat state dict.

    Returns:
        Weights with an empty `metadata`; `sha256` is of the bytes that were decoded.

    Raises:
        UnsafePickle: it asks for anything but plain tensors, or torch is too old to read it safely.
        Corrupt, Truncated, LfsPointer, HtmlPage: it is not a whole checkpoint.
    """
    _require_torch()
    data = read_bytes(path, MAX_FILE_BYTES)
    refuse_lookalikes(data[:1024], path)
    for program in _programs(data, path):
        _check_program(program, path)
    loaded = _load(data, path)
    return Weights(_flatten(loaded, len(data), path), {}, sha256_of(data))


def _require_torch(version: str = torch.__version__) -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < TORCH_FLOOR:
        raise UnsafePickle(
            f"reading .pth and .bin files needs torch >= {TORCH_FLOOR[0]}.{TORCH_FLOOR[1]} (older "
            f"ones can be made to run code by such a file), got torch {version}. Upgrade torch, or "
            "use a safetensors file."
        )


def _programs(data: bytes, path: Path | str) -> list[bytes]:
    """The pickle programs inside the zip container that torch.save writes."""
    if looks_like(data[:64]) != "zip":
        raise UnsafePickle(
            f"{path} is not a PyTorch zip checkpoint (the only form read; files of torch < 1.6 and "
            "bare pickles are refused). Save it again with a current torch, where you trust it, or "
            "as safetensors."
        )
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if len(entries) > MAX_ENTRIES or packed or total > len(data):
            raise UnsafePickle(
                f"{path}: a checkpoint holds at most {MAX_ENTRIES:,} uncompressed entries, smaller "
                f"than the file; got {len(entries):,} entries, {len(packed):,} compressed, "
                f"{total:,} bytes in {len(data):,}. Save it again with torch.save."
            )
        found = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len([e for e in found if e.filename.split("/")[-1] == "data.pkl"]) != 1:
            raise UnsafePickle(
                f"{path}: a checkpoint holds one data.pkl, got {len(found)} pickles."
            )
        if sum(entry.file_size for entry in found) > MAX_PROGRAM_BYTES:
            raise UnsafePickle(f"{path}: the pickle is larger than {MAX_PROGRAM_BYTES:,} bytes.")
        return [archive.read(entry) for entry in found]
    except zipfile.BadZipFile as error:
        raise Truncated(
            f"{path} is a damaged or cut zip checkpoint of {len(data):,} bytes ({error}). "
            "Fetch it again."
        ) from error
    except (NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        raise Corrupt(f"{path} is not a readable zip checkpoint ({error}).") from error


def _check_program(program: bytes, path: Path | str) -> None:
    """List a pickle's instructions, running none, and refuse every name but the few known."""
    refused = []
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in _OTHER_WAYS_TO_NAMES:
                refused.append(f"instruction {opcode.name}")
            elif opcode.name == "PROTO" and argument != 2:  # the one torch.save writes
                refused.append(f"pickle protocol {argument}")
            elif opcode.name == "GLOBAL" and not (
                argument in _NAMES or _STORAGE.fullmatch(str(argument))
            ):
                refused.append(str(argument).replace(" ", ".")[:80])
            if len(refused) > 20:
                break
    except Exception as error:  # the disassembler raises many kinds on damaged input
        raise UnsafePickle(f"{path}: the pickle is damaged ({type(error).__name__}).") from error
    if refused:
        raise UnsafePickle(
            f"{path} holds more than plain tensors: {some(dict.fromkeys(refused))}. It was not "
            "loaded and nothing in it was run. If you trust its origin, extract the state dict "
            "where it was made and save that as safetensors."
        )


def _load(data: bytes, path: Path | str) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # every failure of the restricted unpickler is a refusal
        raise UnsafePickle(
            f"{path} was refused by torch's restricted unpickler ({type(error).__name__}). Nothing "
            "in it was run. If you trust its origin, save the state dict as safetensors there."
        ) from error


# ---------------------------------------------------------------- what came out


def _flatten(loaded: object, file_size: int, path: Path | str) -> dict[str, Tensor]:
    """Unwrap, strip `module.`, and keep a dict of checked tensors."""
    for _ in range(3):
        inner = (
            next((loaded[key] for key in WRAPPERS if isinstance(_get(loaded, key), Mapping)), None)
            if isinstance(loaded, Mapping)
            else None
        )
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded or len(loaded) > MAX_TENSORS:
        raise UnsafePickle(
            f"{path} must hold a state dict of 1 to {MAX_TENSORS:,} tensors (bare, or under "
            f"{', '.join(WRAPPERS)}), got {type(loaded).__name__}."
        )
    tensors: dict[str, Tensor] = {}
    total = 0
    for key, value in loaded.items():
        name = _strip(key, path)
        if name in tensors:
            raise UnsafePickle(f"{path}: two tensors are named {name!r} once 'module.' is removed.")
        tensors[name] = _plain(name, value, path)
        total += value.numel() * value.element_size()
        if total > 2 * file_size:
            raise UnsafePickle(
                f"{path}: its tensors would take {total:,} bytes of memory or more, from a file "
                f"of {file_size:,}."
            )
    return tensors


def _get(mapping: object, key: str) -> object:
    return mapping.get(key) if isinstance(mapping, Mapping) else None


def _strip(key: object, path: Path | str) -> str:
    name = key.removeprefix("module.") if isinstance(key, str) else ""
    if len(name) > 256 or not _NAME.fullmatch(name):
        raise UnsafePickle(f"{path}: a state dict's keys are dotted names, got {str(key)[:80]!r}.")
    return name


def _plain(name: str, value: object, path: Path | str) -> Tensor:
    """The value as an ordinary tensor, or an error; looks at sizes before anything is copied."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise UnsafePickle(f"{path}: {name!r} must be a tensor, got {type(value).__name__}.")
    if (
        value.layout != torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
        or value.dtype not in DTYPES.values()
        or value.is_conj()
        or value.is_neg()
    ):
        raise UnsafePickle(
            f"{path}: {name!r} must be a dense CPU tensor of {', '.join(DTYPES)}, got "
            f"{value.dtype}, {value.layout}, {value.device}."
        )
    needed = value.numel() * value.element_size()
    offset = value.storage_offset() * value.element_size()
    held = value.untyped_storage().nbytes()
    overlapping = any(
        size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)
    )
    if needed + offset > held or overlapping:
        raise UnsafePickle(
            f"{path}: {name!r} of shape {tuple(value.shape)} needs {needed:,} bytes, its storage "
            f"holds {held:,}: an expanded view, refused before it is copied."
        )
    return value.detach()
