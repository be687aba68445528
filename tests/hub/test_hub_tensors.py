"""Safetensors files: what is written reads back; what is wrong is refused by one class, cheaply."""

import errno
import json
import os

import pytest
import torch
from damage import mutated_tensors
from safetensors.torch import load, save

from natcupy.hub import tensors
from natcupy.hub.errors import Corrupt, HtmlPage, HubError, LfsPointer, NotFound, Truncated
from natcupy.hub.tensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    decode_tensors,
    parse_header,
    read_header,
    read_tensors,
    write_tensors,
)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 203000000\n" % 7


def crafted(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(data, kind=Corrupt):
    with pytest.raises(kind) as caught:
        decode_tensors(data, "model.safetensors")
    assert "model.safetensors" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_round_trip(tmp_path, dtype):
    values = {
        "a.b": torch.arange(6).reshape(2, 3).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
    }
    values["scalar"] = torch.ones((), dtype=dtype)
    write_tensors(values, tmp_path / "x.safetensors", {"note": "text"})
    read = read_tensors(tmp_path / "x.safetensors")
    assert read.metadata == {"format": "pt", "note": "text"}
    for name, value in values.items():
        assert read.tensors[name].dtype == dtype and torch.equal(read.tensors[name], value)
    header = read_header(tmp_path / "x.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in header.shapes.items()} == {
        n: (t.shape, t.dtype) for n, t in values.items()
    }
    assert all(t.device.type == "meta" for t in header.shapes.values())


def test_views_and_shared_memory_are_written_in_full(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    values = {"t": base.t(), "same": base, "row": base[1], "wide": torch.ones(1).expand(5)}
    write_tensors(values, tmp_path / "x.safetensors")
    read = load((tmp_path / "x.safetensors").read_bytes())
    assert all(torch.equal(read[name], value) for name, value in values.items())


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "a\nb"])
def test_unreadable_names_are_not_written(tmp_path, name):
    with pytest.raises(ValueError, match="plain name"):
        write_tensors({name: torch.ones(1)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_lookalikes_are_told_apart(tmp_path):
    for content, kind, word in (
        (LFS, LfsPointer, "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", HtmlPage, "web page"),
        (b"\n <html lang=en>", HtmlPage, "web page"),
        (b"", Truncated, "empty"),
        (b"\x10\x00\x00", Truncated, "header length"),
        (b"PK\x03\x04" + bytes(40), Corrupt, "zip"),
    ):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        for read in (read_header, read_tensors):
            with pytest.raises(kind, match=word):
                read(path)
    with pytest.raises(NotFound):
        read_header(tmp_path / "absent.safetensors")


def test_every_truncation_is_named():
    data = save({"a": torch.arange(40.0), "b": torch.ones(3, 3)})
    for length in range(len(data)):
        with pytest.raises(Truncated):
            decode_tensors(data[:length], "model.safetensors")
    assert "bytes" in refused(data[:-1], Truncated)
    assert "follow the last tensor" in refused(data + b"\0")


BAD_HEADERS = {
    "not an object": b"[]",
    "no JSON": b"{'a': 1}",
    "not UTF-8": b'{"\xff": 1}',
    "duplicate tensor": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "duplicate key": b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
    "NaN": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "huge number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "path-like name": {"../../etc/passwd": entry()},
    "absolute name": {"/a": entry()},
    "control character": {"a\u0000b": entry()},
    "long name": {"a" * 300: entry()},
    "entry is a list": {"a": [1]},
    "extra key": {"a": {**entry(), "url": "x"}},
    "missing key": {"a": {"dtype": "F32", "shape": [2]}},
    "unknown dtype": {"a": entry(dtype="F8_E4M3")},
    "dtype is a list": {"a": entry(dtype=["F32"])},
    "negative axis": {"a": entry(shape=(-2,))},
    "boolean axis": {"a": entry(shape=(True, 2))},
    "float axis": {"a": {**entry(), "shape": [2.0]}},
    "zero times 2**62": {"a": entry(shape=(0, 2**62), offsets=(0, 0)), "b": entry()},
    "zero times 2**64-1": {"a": entry(shape=(0, 2**64 - 1), offsets=(0, 0)), "b": entry()},
    "too many axes": {"a": entry(shape=(1,) * 9 + (2,))},
    "size disagrees": {"a": entry(shape=(3,))},
    "reversed offsets": {"a": entry(offsets=(8, 0))},
    "hole": {"a": entry(shape=(1,), offsets=(4, 8))},
    "overlap": {"a": entry(), "b": entry(shape=(1,), offsets=(4, 8))},
    "three offsets": {"a": entry(offsets=(0, 8, 8))},
    "metadata is no text": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata is a list": {"__metadata__": [], "a": entry()},
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers(header):
    refused(crafted(header, bytes(8)))


def test_good_header_for_comparison():
    read = decode_tensors(crafted({"a": entry()}, bytes(8)), "x")
    assert read.tensors["a"].tolist() == [0, 0]


def test_header_bombs_are_refused_before_they_are_parsed(monkeypatch):
    many = b"{" + b",".join(b'"%d":{}' % n for n in range(400_000)) + b"}"
    bombs = [
        crafted(many[:MAX_HEADER_BYTES]),
        crafted(b"{" + b'"a":{},' * 500_000),
        (2**63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + b" " * 100,
    ]
    monkeypatch.setattr(tensors.json, "loads", lambda *_, **__: pytest.fail("parsed a bomb"))
    for bomb in bombs:
        with pytest.raises(HubError):
            parse_header(bomb, 10**12, "x")


def test_mutations_raise_one_class():
    assert mutated_tensors(20_000, 20261124) > 15_000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_file_that_cannot_be_written(tmp_path):
    """An error of the system, with its number, where the writer of safetensors has its own."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_tensors({"x": torch.zeros(1 << 19)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "x.safetensors")
