"""Tests of the hub: a local server instead of the Hub, started before the client is imported."""

import importlib
import os
import socket
import sys
import tempfile

import pytest
from server import LocalHub

# The client reads its environment once, at import.
assert "huggingface_hub" not in sys.modules, "tests/hub must set HF_ENDPOINT first"
HUB = LocalHub()
_HOME = tempfile.TemporaryDirectory(prefix="natcupy-hub-")
os.environ.update(HUB.environment(_HOME.name))
os.environ.pop("HF_TOKEN", None)
# before a test of another room switches it off
importlib.import_module("huggingface_hub.constants")


def pytest_sessionfinish():
    HUB.close()
    _HOME.cleanup()


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """Whatever a test does, no packet leaves the machine; the list holds attempts."""
    attempts, connect = [], socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            attempts.append(address)
            raise OSError(f"tests may not connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield attempts
    assert not attempts


@pytest.fixture
def no_sockets(monkeypatch):
    """A machine without any network: every connection fails at once; the list holds attempts."""
    attempts = []

    def refused(self, address):
        attempts.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return attempts


@pytest.fixture
def hub(monkeypatch):
    """The local Hub, empty, and retries that do not wait; the list `hub.pauses` holds the waits."""
    from natcupy.hub import client

    HUB.reset()
    HUB.pauses = []
    monkeypatch.setattr(client.time, "sleep", HUB.pauses.append)
    yield HUB
    HUB.reset()


@pytest.fixture
def cache(tmp_path):
    """The client's cache, of this test's own."""
    return tmp_path / "cache"


@pytest.fixture
def load(cache):
    """`from_pretrained` with that cache."""
    import natcupy

    return lambda name, **how: natcupy.from_pretrained(name, cache_dir=cache, **how)


@pytest.fixture
def files(tmp_path):
    """The files of a small saved model, as a repository holds them."""
    from small import folder_of, invented

    return folder_of(invented("nat"), tmp_path / "files")
