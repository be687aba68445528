"""Weights in several files: cut, written, read back; an index that lies is refused."""

import json
import os

import pytest
import torch
from small import CONFIGS, invented, same

from natcupy import hub
from natcupy.hub import shards
from natcupy.hub.errors import Corrupt, NotFound
from natcupy.hub.tensors import read_tensors, write_tensors


@pytest.fixture(autouse=True)
def offline(no_sockets):
    yield
    assert no_sockets == []


def sharded(tmp_path, limit=8000):
    model = invented("dinat")
    return model, hub.save_pretrained(model, tmp_path / "x", max_shard_bytes=limit)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("limit", [1000, 20_000])
def test_round_trip(tmp_path, name, limit):
    model = invented(name)
    folder = hub.save_pretrained(model, tmp_path / "x", max_shard_bytes=limit)
    again = hub.from_pretrained(folder)
    same(again.state_dict(), model.state_dict())
    assert again.source.path == str(folder / shards.INDEX)
    same(hub.from_pretrained(folder / shards.INDEX).state_dict(), model.state_dict())
    assert again.source.sha256 == hub.from_pretrained(folder).source.sha256


def test_every_tensor_is_in_one_part_and_no_part_is_too_large():
    state = invented("dinat").state_dict()
    parts = shards.split(state, 3000)
    assert [name for part in parts for name in part] == list(state)
    for part in parts:
        size = sum(t.numel() * t.element_size() for t in part.values())
        assert size <= 3000 or len(part) == 1
    index = shards.parse_index(shards.index_text(parts).encode())
    assert list(index) == shards.names(len(parts))
    assert [set(names) for names in index.values()] == [set(part) for part in parts]


def test_the_hash_of_several_is_that_of_their_list(tmp_path):
    import hashlib

    _, folder = sharded(tmp_path)
    files = sorted(folder.glob("model-*.safetensors"))
    listing = "".join(f"{hub.files.sha256_file(p)}  {p.name}\n" for p in files)
    want = hashlib.sha256(listing.encode()).hexdigest()
    assert hub.from_pretrained(folder).source.sha256 == want


def test_other_libraries_read_them(tmp_path):
    """One file a part, `format: pt`, and the index's total size."""
    model, folder = sharded(tmp_path)
    values = json.loads((folder / shards.INDEX).read_text())
    state = model.state_dict()
    total = sum(t.numel() * t.element_size() for t in state.values())
    assert values["metadata"]["total_size"] == total
    assert values["weight_map"].keys() == state.keys()
    for path in folder.glob("model-*.safetensors"):
        assert read_tensors(path).metadata == {"format": "pt"}


def test_another_cut_replaces_the_first(tmp_path):
    model, folder = sharded(tmp_path)
    (folder / "model-card.safetensors.txt").write_text("mine")
    (folder / "optimizer.safetensors").write_bytes(b"mine")
    for limit in (20_000, 10**9, 8000):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        hub.save_pretrained(model, folder, max_shard_bytes=limit)
        names = {path.name for path in folder.glob("model*")} - {"model-card.safetensors.txt"}
        assert ("model.safetensors" in names) == (limit == 10**9)
        assert len(names) == 1 if limit == 10**9 else len(names) > 2
        same(hub.from_pretrained(folder).state_dict(), model.state_dict())
    assert (folder / "optimizer.safetensors").is_file()


@pytest.mark.parametrize("stop", range(14))
def test_an_interrupted_change_of_cut(tmp_path, monkeypatch, stop):
    """Whatever call fails, the folder loads as the old model or the new one."""
    old, folder = sharded(tmp_path)
    new = invented("dinat", 5)
    left = [stop]

    def counted(real):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "the disk is gone")
            return real(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(hub.files.Path, "unlink", counted(hub.files.Path.unlink))
        try:
            hub.save_pretrained(new, folder)
            done = True
        except OSError:
            done = False
    state = hub.from_pretrained(folder).state_dict()
    which = new if torch.equal(state["head.bias"], new.state_dict()["head.bias"]) else old
    same(state, which.state_dict())
    assert not done or which is new
    hub.save_pretrained(old, folder)
    same(hub.from_pretrained(folder).state_dict(), old.state_dict())


# ---------------------------------------------------------------- an index that lies


GOOD = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("names", [
    "../model-00001-of-00001.safetensors", "/etc/passwd", "model-00001-of-00001.bin",
    "..\\model-00001-of-00001.safetensors", "a/model-00001-of-00001.safetensors", "", None, 3,
    ["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors\n",
    "model-1-of-1.safetensors", "MODEL-00001-of-00001.safetensors", "C:model-00001-of-00001",
    "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors",
    "model-00000-of-00001.safetensors", "model-\u0660\u0660\u0660\u0660\u0661-of-00001.safetensors",
], ids=ascii)  # fmt: skip
def test_names_that_lead_elsewhere(names):
    data = json.dumps({"weight_map": {"a": names}}).encode()
    with pytest.raises(Corrupt):
        shards.parse_index(data)


@pytest.mark.parametrize("data", [
    b"", b"[]", b"{}", b"null", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"{" * 5000,
    json.dumps({"weight_map": GOOD, "auto_map": {}}).encode(),
    b'{"weight_map": {"a": "x", "a": "y"}}',
    json.dumps({"weight_map": {str(i): GOOD["a"] for i in range(20_001)}}).encode(),
    b" " * (shards.MAX_INDEX_BYTES + 1),
], ids=range(12))  # fmt: skip
def test_broken_indexes(data):
    with pytest.raises(Corrupt):
        shards.parse_index(data)


def test_files_that_are_not_what_the_index_says(tmp_path):
    _, folder = sharded(tmp_path)
    path = sorted(folder.glob("model-*.safetensors"))[1]
    data = path.read_bytes()
    tensors = dict(read_tensors(path).tensors)
    path.unlink()
    with pytest.raises(NotFound, match=path.name):
        hub.from_pretrained(folder)
    write_tensors({**tensors, "levels.0.extra": torch.zeros(1)}, path)
    with pytest.raises(Corrupt, match=r"levels\.0\.extra"):
        hub.from_pretrained(folder)
    path.unlink()
    write_tensors(dict(list(tensors.items())[1:]), path)
    with pytest.raises(Corrupt, match="index names"):
        hub.from_pretrained(folder)
    path.write_bytes(data[:-7])
    with pytest.raises(Corrupt):
        hub.from_pretrained(folder)
    path.write_bytes(data)
    hub.from_pretrained(folder)
