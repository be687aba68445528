"""The store among processes: cold starts, kills, forks. The workers load cache.py by its path."""

import os
import signal
import subprocess
import sys

import pytest

from natcupy import cache
from natcupy.cache import Store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks are POSIX")

LOAD = """
import hashlib, importlib.util, os, random, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
assert not {"torch", "numpy", "cupy", "natcupy"} & set(sys.modules)

def say(text):
    os.write(1, text.encode())

def image_of(name):
    return hashlib.pbkdf2_hmac("sha256", name.encode(), b"", ROUNDS) * 4000

def note_build():
    file = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, b"built\\n")
    os.close(file)
"""

COLD = """
ROUNDS = int(sys.argv[4])
if sys.argv[5] == "no-op":
    cache.fcntl.flock = lambda file, operation: None
elif sys.argv[5] == "unsupported":
    def flock(file, operation):
        raise OSError(38, "no locks here")
    cache.fcntl.flock = flock
say("r")
sys.stdin.buffer.read()  # until everyone is ready
def build():
    note_build()
    return image_of("kernel")
image = cache.Store(sys.argv[2]).get_or_build({"name": "kernel"}, build)
assert image == image_of("kernel")
say("ok")
"""


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LOAD + code, cache.__file__, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return out


def builds(folder):
    path = folder / "builds"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("locks", "count", "rounds"),
    [("real", 64, 100_000), ("no-op", 24, 5000), ("unsupported", 8, 5000)],
)
def test_cold_start(tmp_path, locks, count, rounds):
    """All processes ask at once: all get the same bytes, and with locks one of them builds."""
    workers = [
        start(COLD, tmp_path / "c", tmp_path / "builds", rounds, locks) for _ in range(count)
    ]
    for worker in workers:
        assert worker.stdout.read(1) == b"r"
    for worker in workers:
        worker.stdin.close()
        worker.stdin = None
    assert [finish(worker) for worker in workers] == [b"ok"] * count
    if locks == "real":
        assert builds(tmp_path) == 1
    assert 1 <= builds(tmp_path) <= count
    assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".bin"]


CHURN = """
ROUNDS = 1
parent = os.getpid()
images = {name: image_of(name) for name in "abcdefgh"}
for round in range(int(sys.argv[4])):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        store, rng = cache.Store(sys.argv[2]), random.Random(round)
        while True:
            name = rng.choice("abcdefgh")
            def build(name=name):
                os.write(into, b"b")
                return images[name]
            image = store.get_or_build({"name": name}, build)
            os.write(into, b"." if image == images[name] else b"X")
            if rng.random() < 0.7:
                store.discard({"name": name})
    os.close(into)
    heard = b""
    for _ in range(random.Random(-round).randrange(1, 40)):  # a moment by the child's own progress
        heard += os.read(out, 1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(out)
    if b"X" in heard:
        say("wrong bytes")
        sys.exit(1)
say("ok")
"""


def test_kill_9_a_hundred_times_leaves_no_corrupt_entry(tmp_path):
    folder = tmp_path / "c"
    assert finish(start(CHURN, folder, tmp_path / "builds", 100)) == b"ok"
    for path in folder.glob("*.bin"):
        assert cache._unpack(path.stem, path.read_bytes()) is not None
    store = Store(folder)
    for name in "abcdefgh":  # locks of the dead hold nobody up
        store.discard({"name": name})
        assert store.get_or_build({"name": name}, lambda: b"new") == b"new"
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    Store(folder).get_or_build({"name": "last"}, lambda: b"x")
    assert {path.suffix for path in folder.iterdir()} == {".bin"}


HOLDER = """
ROUNDS = 1
def build():
    note_build()
    say("building")
    sys.stdin.buffer.read()
    say("never")
    return b"never"
cache.Store(sys.argv[2]).get_or_build({"name": "kernel"}, build)
"""

WAITER = """
ROUNDS = 1
once = []
real = cache._try_lock
def try_lock(file):
    state = real(file)
    if not once:
        once.append(state)
        say(state[0])
    return state
cache._try_lock = try_lock
def build():
    note_build()
    return image_of("kernel")
assert cache.Store(sys.argv[2]).get_or_build({"name": "kernel"}, build) == image_of("kernel")
say("ok")
"""


def test_kill_9_the_holder_of_the_lock_and_the_waiters_go_on(tmp_path):
    args = (tmp_path / "c", tmp_path / "builds")
    holder = start(HOLDER, *args)
    assert holder.stdout.read(8) == b"building"
    waiters = [start(WAITER, *args) for _ in range(8)]
    for waiter in waiters:
        assert waiter.stdout.read(1) == b"b"  # it found the lock busy
    assert builds(tmp_path) == 1
    os.kill(holder.pid, signal.SIGKILL)
    assert [finish(waiter) for waiter in waiters] == [b"ok"] * 8
    assert holder.wait() == -signal.SIGKILL
    assert builds(tmp_path) == 2  # the killed one and one of the waiters
    for pipe in (holder.stdin, holder.stdout, holder.stderr):
        pipe.close()


FORK = """
import threading
ROUNDS = 1
store = cache.Store(sys.argv[2])
building, release = threading.Event(), threading.Event()
def slow():
    building.set()
    release.wait()
    return b"slow"
thread = threading.Thread(target=store.get_or_build, args=({"name": "kernel"}, slow))
thread.start()
building.wait()
cache.LOCK_PATIENCE = 0.01  # the parent does hold the file lock, and waits for this child
child = os.fork()
if child == 0:
    image = store.get_or_build({"name": "kernel"}, lambda: b"child")
    os._exit(0 if image == b"child" else 1)
status = os.waitpid(child, 0)[1]
release.set()
thread.join()
assert status == 0
say("ok")
"""


def test_a_fork_while_another_thread_builds_does_not_hang_the_child(tmp_path):
    assert finish(start(FORK, tmp_path / "c", tmp_path / "builds")) == b"ok"


def test_two_stores_trim_one_folder_under_load(tmp_path):
    """Eviction takes entries from under readers: they build again and never see a wrong byte."""
    code = """
ROUNDS = 1
cache.JUST_USED = -1.0
store, rng = cache.Store(sys.argv[2], 40_000), random.Random(int(sys.argv[4]))
for _ in range(150):
    name = str(rng.randrange(30))
    assert store.get_or_build({"name": name}, lambda: name.encode() * 3000) == name.encode() * 3000
say("ok")
"""
    workers = [start(code, tmp_path / "c", "-", seed) for seed in range(4)]
    assert [finish(worker) for worker in workers] == [b"ok"] * 4
    for path in (tmp_path / "c").glob("*.bin"):
        assert cache._unpack(path.stem, path.read_bytes()) is not None
    total = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.bin"))
    assert total <= 40_000 + 4 * 6400
