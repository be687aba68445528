"""Writing a folder: all or nothing, also when the process is killed; hashes; lookalikes."""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natcupy.hub import files
from natcupy.hub.errors import Corrupt, NotFound
from natcupy.hub.files import (
    JOURNAL,
    git_blob_id,
    member,
    read_bytes,
    sha256_file,
    sha256_of,
    write_folder,
)

ROOT = Path(__file__).parents[2]


def writer(text):
    return lambda path: path.write_text(text)


def content(folder, *names):
    return [member(folder, name).read_text() for name in names]


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_writes_replaces_and_leaves_the_rest(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_folder(folder, {"a": writer("1"), "b": writer("1")})
    (folder / "mine.txt").write_text("keep")
    write_folder(folder, {"a": writer("2"), "b": writer("2")})
    assert content(folder, "a", "b", "mine.txt") == ["2", "2", "keep"]
    assert leftovers(folder) == []


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".hidden", "a\\b", "/a", "a\n"])
def test_only_plain_names(tmp_path, name):
    with pytest.raises(ValueError, match="plain"):
        write_folder(tmp_path / "x", {name: writer("")})
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(NotADirectoryError, match="folder"):
        write_folder(tmp_path / "x", {"a": writer("")})


def test_a_failing_writer_changes_nothing(tmp_path):
    write_folder(tmp_path, {"a": writer("old"), "b": writer("old")})

    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="space"):
        write_folder(tmp_path, {"a": writer("new"), "b": full})
    assert content(tmp_path, "a", "b") == ["old", "old"] and leftovers(tmp_path) == []


@pytest.mark.parametrize("call", range(12))
def test_every_system_call_may_fail(tmp_path, monkeypatch, call):
    """The n-th sync or rename fails: old or new, never a mix, and the next save works."""
    write_folder(tmp_path, {"a": writer("old"), "b": writer("old")})
    count = 0

    def failing(real):
        def run(*args):
            nonlocal count
            count += 1
            if count == call + 1:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing(os.replace))
        patch.setattr(files.os, "fsync", failing(os.fsync))
        with contextlib.suppress(OSError):
            write_folder(tmp_path, {"a": writer("new"), "b": writer("new")})
    assert content(tmp_path, "a", "b") in (["old", "old"], ["new", "new"])
    write_folder(tmp_path, {"a": writer("next"), "b": writer("next")})
    assert content(tmp_path, "a", "b") == ["next", "next"] and leftovers(tmp_path) == []


# One process imports once, then forks a child for each step; the child dies before its n-th call.
STEPS = """
import os, signal, sys
from natcupy.hub import files

def counted(real):
    def run(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return run

for step, folder in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        left = step
        for name in ("replace", "fsync", "open"):
            setattr(files.os, name, counted(getattr(os, name)))
        files.Path.unlink = counted(files.Path.unlink)
        files.write_folder(folder, {n: (lambda p: p.write_text("new")) for n in "ab"})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    print(os.WIFSIGNALED(status), flush=True)  # or the next child would print it once more
"""


def run_python(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step(tmp_path):
    """SIGKILL before the n-th system call of a save: `member` sees old or new, both files alike."""
    folders = [tmp_path / str(step) for step in range(14)]
    for folder in folders:
        write_folder(folder, {"a": writer("old"), "b": writer("old")})
    out, errors = run_python(STEPS, *folders).communicate()
    killed = [line == "True" for line in out.split()]
    assert len(killed) == len(folders), errors
    seen = set()
    for folder, dead in zip(folders, killed, strict=True):
        found = content(folder, "a", "b")
        assert found in (["old", "old"], ["new", "new"])
        assert dead or found == ["new", "new"]
        seen.add((dead, found[0]))
        write_folder(folder, {"a": writer("next")})  # finishes what was left
        assert content(folder, "a") == ["next"] and not (folder / JOURNAL).exists()
    assert {(True, "old"), (True, "new"), (False, "new")} <= seen


def test_leftovers_are_swept(tmp_path, monkeypatch):
    """All of them where a lock tells that nobody else saves; elsewhere only old ones."""
    fresh, foreign = tmp_path / f".a.{'0' * 32}.tmp", tmp_path / ".something.tmp"
    fresh.write_text("")
    foreign.write_text("")
    write_folder(tmp_path, {"a": writer("1")})
    assert fresh.exists() == (files.fcntl is None) and foreign.exists()
    monkeypatch.setattr(files, "fcntl", None)
    fresh.write_text("")
    old = tmp_path / f".a.{'1' * 32}.tmp"
    old.write_text("")
    hours_ago = time.time() - 2 * files.LEFTOVER_AGE_S
    os.utime(old, (hours_ago, hours_ago))
    os.utime(foreign, (hours_ago, hours_ago))
    write_folder(tmp_path, {"a": writer("1")})
    assert not old.exists() and fresh.exists() and foreign.exists()


@pytest.mark.parametrize(
    "journal",
    [
        b"[]",
        b"{",
        b"[" * 50_000,
        json.dumps({"config.json": "../secret"}).encode(),
        json.dumps({"config.json": "/etc/passwd"}).encode(),
        json.dumps({"config.json": f".other.{'0' * 32}.tmp"}).encode(),
        json.dumps({"../x": f".../x.{'0' * 32}.tmp"}).encode(),
        json.dumps({"config.json": 3}).encode(),
        b" " * (files.MAX_JOURNAL_BYTES + 1),
    ],
)
def test_a_journal_cannot_point_elsewhere(tmp_path, journal):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / JOURNAL).write_bytes(journal)
    with pytest.raises(Corrupt):
        member(tmp_path, "config.json")


TOGETHER = """
import os, sys
from natcupy.hub.files import write_folder
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        for _ in range(30):
            write_folder(sys.argv[1], {n: (lambda p: p.write_text("same" * 999)) for n in "abc"})
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_saving_the_same_from_several_processes(tmp_path):
    out, errors = run_python(TOGETHER, tmp_path).communicate()
    assert out.strip() == "[0, 0, 0, 0]", errors
    assert set(content(tmp_path, "a", "b", "c")) == {"same" * 999}
    assert leftovers(tmp_path) == []


def test_hashes_and_bounded_reading(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"neighborhood" * 200_000)
    assert sha256_file(path) == sha256_of(path.read_bytes())
    assert sha256_of(b"x") == hashlib.sha256(b"x").hexdigest()
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git's own
    with pytest.raises(Corrupt, match="at most"):
        read_bytes(path, 10)
    with pytest.raises(NotFound):
        read_bytes(tmp_path, 10)


def test_a_full_disk_is_told_with_the_file(tmp_path):
    """The name is the file's own, not the temporary one's; a folder made for it does not stay."""

    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="space") as caught:
        write_folder(tmp_path / "new", {"a": writer("x"), "b": full})
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "new" / "b")
    assert not (tmp_path / "new").exists()
