"""Xet, the client's default for large files: up and down through the genuine hf_xet.

The client reads its switches once, at import, so each step is a process of its own.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import Fault
from server_xet import XetStore

pytest.importorskip("hf_xet")
ROOT = Path(__file__).parents[2]
ALICE = "hf_alice"

UP_AND_DOWN = """
import natcupy
from small import invented, same
model = invented("nat")
commit = model.push_to_hub("me/mine", token="hf_alice", max_shard_bytes=int(sys.argv[1])).commit
pulled = natcupy.from_pretrained("me/mine")
same(pulled.state_dict(), model.state_dict())
print(commit, pulled.source.commit)
"""
TROUBLE = """
import pathlib
import natcupy
from small import invented
model = invented("nat")
print(model.push_to_hub("me/mine", token="hf_alice").commit)
for path in pathlib.Path(sys.argv[1]).rglob("xorbs/default.*"):
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
try:
    natcupy.from_pretrained("me/mine")
except natcupy.hub.HubError as error:
    print(type(error).__name__)
try:
    invented("nat", seed=1).push_to_hub("me/mine", token="hf_alice")
except natcupy.hub.HubError as error:
    print(type(error).__name__)
"""
AGAIN = """
import natcupy
for name in sys.argv[1].split():
    print(natcupy.from_pretrained(name).source.commit)
"""


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script with Xet on and a store and a home of its own."""
    hub.xet = XetStore(tmp_path / "store")
    hub.xet.folder.mkdir()

    def run(script, argument, **switches):
        env = {
            **os.environ,
            **switches,
            "HF_HOME": str(tmp_path / "home"),
            "HF_XET_CHUNK_CACHE_SIZE_BYTES": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/hub")]),
        }
        del env["HF_HUB_DISABLE_XET"]
        done = subprocess.run([sys.executable, "-c", f"import sys\n{script}", str(argument)],
                              env=env, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()

    return run


def asked(hub, part):
    return [path for _, path, *_ in hub.requests if part in path]


@pytest.mark.parametrize("limit", [10**9, 8000])
def test_up_and_down(hub, run, limit):
    assert set(run(UP_AND_DOWN, limit)) == {hub.repos["me/mine"].refs["main"]}
    for name, data in hub.tree("me/mine").items():
        stored = hub.xet.find(hashlib.sha256(data).hexdigest())
        assert (stored is not None) == name.endswith(".safetensors"), name
    assert asked(hub, "/xet-write-token/") and not asked(hub, "/lfs/put/")
    assert asked(hub, "/xet-read-token/") and not asked(hub, "/blobs/")


def test_what_repositories_share_in_the_cache_is_found_again(hub, run, tmp_path):
    """Files of Xet lie once under a name that is no SHA-256, and blobs are links to them."""
    commit, _ = run(UP_AND_DOWN, 10**9)
    mirror = hub.commit("other/mirror", hub.tree("me/mine"))
    names = f"me/mine@{commit} other/mirror@{mirror}"
    assert run(AGAIN, "me/mine other/mirror") == [commit, mirror]
    del hub.requests[:]
    assert run(AGAIN, names) == [commit, mirror]
    assert run(AGAIN, "me/mine other/mirror", HF_HUB_OFFLINE="1") == [commit, mirror]
    assert not hub.requests
    weights = list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))
    assert len(weights) == 2 and all(path.exists() for path in weights)


def test_trouble_ends_in_errors_of_ours(hub, run, tmp_path):
    """A store that is damaged after the push, then a refused token: nothing is half there."""

    def refuse(method, path):
        late = "model.safetensors" in hub.tree("me/mine") and "/xet-write-token/" in path
        return Fault("", 1, status=403) if late else None

    hub.weather = refuse
    commit, damaged, refused = run(TROUBLE, tmp_path / "store")
    assert damaged == "Corrupt"
    assert refused in ("Forbidden", "Unavailable")  # clients from 1.0 on do not hand on the status
    assert commit == hub.repos["me/mine"].refs["main"]
    assert not list((tmp_path / "home").rglob("snapshots/*/model.safetensors"))
