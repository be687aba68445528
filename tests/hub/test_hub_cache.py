"""What the cache keeps: loads after the first one, without a connection, and from a damaged one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from small import invented, same

import natcupy
from natcupy.hub import client, convert, download
from natcupy.hub.download import Access
from natcupy.hub.errors import Corrupt, Offline, Unavailable
from natcupy.hub.tensors import write_tensors

ROOT = Path(__file__).parents[2]


def test_a_second_load_asks_once_and_a_pinned_one_not_at_all(hub, load, files):
    commit = hub.commit("me/mine", files)
    load("me/mine")
    del hub.requests[:]
    load("me/mine")
    assert len(hub.requests) == 1
    load(f"me/mine@{commit}")
    load("hf-hub:me/mine", revision=commit)
    assert len(hub.requests) == 1


def theirs(tmp_path):
    """A transformers repository whose pictures are not prepared as by default."""
    model = invented("nat")
    tensors = convert.to_transformers(model.state_dict())
    path = tmp_path / "theirs.safetensors"
    write_tensors(tensors, path)
    config = {
        "model_type": "nat", "architectures": ["NatForImageClassification"], "embed_dim": 8,
        "depths": [1, 2], "num_heads": [1, 2], "kernel_size": 3, "mlp_ratio": 3.0,
        "layer_scale_init_value": 0.0, "num_labels": 5,
        "id2label": {str(i): f"c{i}" for i in range(5)},
    }  # fmt: skip
    recipe = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_resize": True,
        "do_normalize": True,
    }  # fmt: skip
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": path.read_bytes(),
        "preprocessor_config.json": json.dumps(recipe).encode(),
    }


def test_a_pinned_commit_that_is_partly_cached_is_completed(hub, load, cache, tmp_path):
    """Another library has fetched config and weights alone."""
    commit = hub.commit("me/theirs", theirs(tmp_path))
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("me/theirs", name, revision=commit, cache_dir=cache)
    model = load("me/theirs", revision=commit)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_without_a_connection_unknown_preprocessing_is_told(hub, load, cache, tmp_path, caplog):
    commit = hub.commit("me/theirs", theirs(tmp_path))
    for name in ("config.json", "model.safetensors"):
        huggingface_hub.hf_hub_download("me/theirs", name, revision=commit, cache_dir=cache)
    load("me/theirs", revision=commit, local_files_only=True)
    assert "how pictures are prepared" in caplog.text
    load("me/theirs", revision=commit)
    caplog.clear()
    load("me/theirs", revision=commit, local_files_only=True)
    assert not caplog.text


def test_a_load_that_failed_midway_is_completed(hub, load, tmp_path, monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    commit = hub.commit("me/theirs", theirs(tmp_path))
    hub.fault("preprocessor_config", times=50, status=500)
    with pytest.raises(Unavailable):
        load("me/theirs", revision=commit)
    with pytest.raises(Offline):  # rather than pictures prepared otherwise
        load("me/theirs", revision=commit, local_files_only=True)
    hub.faults.clear()
    assert load("me/theirs", revision=commit).pretrained_cfg["input_size"] == (3, 64, 64)
    folder = invented("nat").save_pretrained(tmp_path / "parts", max_shard_bytes=8000)
    commit = hub.commit("me/parts", {p.name: p.read_bytes() for p in folder.iterdir()})
    hub.fault("model-00003-of", times=50, status=500)
    with pytest.raises(Unavailable):
        load("me/parts", revision=commit)
    hub.faults.clear()
    same(load("me/parts", revision=commit).state_dict(), invented("nat").state_dict())


def test_a_home_folder_in_the_name_of_the_cache(hub, files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    commit = hub.commit("me/mine", files)
    natcupy.from_pretrained("me/mine", cache_dir="~/hub")
    again = natcupy.from_pretrained("me/mine", cache_dir="~/hub", local_files_only=True)
    assert again.source.commit == commit
    assert (tmp_path / "home/hub").is_dir()


def test_a_damaged_cache_is_noticed_and_repaired(hub, load, files, caplog):
    hub.commit("me/mine", files)
    path = Path(load("me/mine").source.path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.resolve().write_bytes(data)
    same(load("me/mine").state_dict(), invented("nat").state_dict())
    assert "SHA-256" in caplog.text
    path.resolve().write_bytes(data)
    with pytest.raises(Corrupt, match="with a connection"):  # nobody to ask for a better copy
        load("me/mine", local_files_only=True)
    assert path.exists()


# ---------------------------------------------------------------- offline


def test_cached_works_without_network(hub, load, files, no_sockets, monkeypatch, caplog):
    monkeypatch.undo()
    commit = hub.commit("me/mine", files)
    load("me/mine")

    def refused(self, address):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.socket.connect", refused)
    _close_connections()
    model = load("me/mine")
    assert model.source.commit == commit and commit in caplog.text
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    same(load("me/mine", local_files_only=True).state_dict(), model.state_dict())
    same(load(f"me/mine@{commit}").state_dict(), model.state_dict())
    with pytest.raises(Offline):
        load("me/mine@other", local_files_only=True)


def _close_connections():
    """Kept-alive connections of the client would reach the server without a new socket."""
    from huggingface_hub import utils

    for name in ("close_session", "reset_sessions"):
        getattr(utils, name, lambda: None)()


def test_without_network_and_cache_it_fails_at_once(load, no_sockets, hub):
    _close_connections()
    with pytest.raises(Offline) as caught:
        load("nat-small")
    assert len(no_sockets) == 1 and hub.pauses == []  # one try, where the client makes six
    text = str(caught.value)
    assert "not in the cache" in text and "natcupy demo" in text and "nat-digits" in text
    with pytest.raises(Offline, match="offline mode"):
        load("nat-small", local_files_only=True)
    assert len(no_sockets) == 1


def test_the_offline_switch(files, hub, cache):
    """HF_HUB_OFFLINE=1 in another process: cached works, uncached says so, nothing is asked."""
    hub.commit("me/mine", files)
    code = (
        "import sys, natcupy\n"
        "from natcupy.hub import Offline\n"
        "natcupy.from_pretrained('me/mine', cache_dir=sys.argv[1])\n"
        "try: natcupy.from_pretrained('me/other', cache_dir=sys.argv[1])\n"
        "except Offline as e: print(e)\n"
    )
    natcupy.from_pretrained("me/mine", cache_dir=cache)
    del hub.requests[:]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, cache], env=environment, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "natcupy demo" in done.stdout and hub.requests == []


def test_a_read_only_cache_still_serves(hub, load, files, monkeypatch):
    hub.commit("me/mine", files)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(download.os, "replace", refuse)
    snapshot = download.resolve("me/mine", None, Access(cache_dir="/nonexistent"))
    assert snapshot.files
