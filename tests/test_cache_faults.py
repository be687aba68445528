"""The store under a failing file system: every call works, at most one warning, nothing left."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from natcupy import cache
from natcupy.cache import CacheWarning, Store

ERRNOS = (
    *("EACCES", "EROFS", "ENOTDIR", "ENOENT", "ENOSPC", "EDQUOT", "EMFILE"),
    *("ESTALE", "EBUSY", "ENOLCK", "ENOSYS", "EIO", "EPERM"),
)
CALLS = (
    *("open", "read", "write", "close", "replace", "utime", "unlink"),
    *("stat", "fstat", "mkdir", "makedirs", "scandir"),
)


class Builder:
    """A build() that counts its calls."""

    def __init__(self, image):
        self.image, self.calls = image, 0

    def __call__(self):
        self.calls += 1
        return self.image


class FaultyOS:
    """The os module, with one function that fails: at its n-th call, or at each (n = 0)."""

    def __init__(self, call, error, nth):
        self._call, self._error, self._nth, self.count = call, error, nth, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name != self._call:
            return real

        def faulty(*args, **options):
            self.count += 1
            if self._nth in (0, self.count):
                if name == "close":
                    real(*args)  # a close that fails has closed all the same
                raise OSError(self._error, os.strerror(self._error), "injected")
            return real(*args, **options)

        return faulty


def named(name):
    return {"engine": "test", "name": str(name)}


def leftovers(folder):
    return [path.name for path in folder.glob("*") if path.suffix != ".bin"]


@pytest.mark.parametrize("name", ERRNOS)
@pytest.mark.parametrize("call", CALLS)
def test_any_file_call_may_fail(call, name, tmp_path, monkeypatch):
    if not hasattr(errno, name):
        pytest.skip(f"this system has no {name}")
    for nth in (0, 1, 2, 3):
        folder = tmp_path / f"c{nth}"
        Store(folder).get_or_build(named("old"), lambda: b"old")
        faulty = FaultyOS(call, getattr(errno, name), nth)
        store = Store(folder)
        monkeypatch.setattr(cache, "os", faulty)
        builders = {name: Builder(name.encode() * 100) for name in ("new", "newer")}
        builders["old"] = Builder(b"old")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                for key, build in builders.items():
                    assert store.get_or_build(named(key), build) == build.image
            store.describe()
        monkeypatch.setattr(cache, "os", os)
        assert faulty.count > 0 or (call in ("unlink", "stat") and nth > faulty.count)
        assert len(caught) <= 1
        assert all("NATCUPY_CACHE_DIR" in str(warning.message) for warning in caught)
        assert all(build.calls <= 2 for build in builders.values())  # once more if reading fails
        if call != "unlink":
            assert leftovers(folder) == []
        # Healed, a new process sees sound entries only, whichever were kept.
        again = Store(folder)
        for key in ("new", "newer"):
            assert again.get_or_build(named(key), lambda key=key: key.encode() * 100) == (
                key.encode() * 100
            )
        assert again.describe()["state"] == "disk"


@pytest.mark.parametrize("call", ["open", "write", "replace", "mkdir"])
def test_a_failing_write_warns_once_and_names_the_reason(call, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "os", FaultyOS(call, errno.ENOSPC, 0))
    store = Store(tmp_path / "c")
    with pytest.warns(CacheWarning, match=os.strerror(errno.ENOSPC)) as caught:
        builders = [Builder(b"x") for _ in range(5)]
        for number in [*range(5), *range(5)]:
            assert store.get_or_build(named(number), builders[number]) == b"x"
    assert len(caught) == 1
    assert [build.calls for build in builders] == [1] * 5
    assert store.describe()["state"] == "memory"


def test_after_a_failed_write_old_entries_are_still_read(tmp_path, monkeypatch):
    Store(tmp_path / "c").get_or_build(named("old"), lambda: b"old")
    monkeypatch.setattr(cache, "os", FaultyOS("write", errno.EDQUOT, 0))
    store = Store(tmp_path / "c")
    with pytest.warns(CacheWarning):
        store.get_or_build(named("new"), lambda: b"new")
    assert store.get_or_build(named("old"), lambda: b"not called") == b"old"


@pytest.mark.parametrize("name", ["ESTALE", "EBUSY"])
def test_what_passes_is_tried_again_without_a_word(name, tmp_path, monkeypatch, recwarn):
    for call, nth in (("open", 1), ("fstat", 1), ("read", 1), ("write", 1), ("replace", 1)):
        Store(tmp_path / call).get_or_build(named("old"), lambda: b"old")
        monkeypatch.setattr(cache, "os", FaultyOS(call, getattr(errno, name), nth))
        store = Store(tmp_path / call)
        assert store.get_or_build(named("old"), lambda: b"not called") == b"old"
        assert store.get_or_build(named("new"), lambda: b"new") == b"new"
        monkeypatch.setattr(cache, "os", os)
        assert store.describe()["entries"] == 2
    assert len(recwarn) == 0


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EINVAL", "EIO", None])
def test_without_working_locks_it_stores_all_the_same(name, tmp_path, monkeypatch, recwarn):
    class NoLocks:
        LOCK_EX = LOCK_NB = LOCK_UN = 0

        @staticmethod
        def flock(file, operation):
            if name is not None:
                raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(cache, "fcntl", NoLocks)
    assert Store(tmp_path / "c").get_or_build(named(1), lambda: b"1") == b"1"
    assert Store(tmp_path / "c").get_or_build(named(1), lambda: b"not called") == b"1"
    assert leftovers(tmp_path / "c") == []
    assert len(recwarn) == 0


def test_a_lock_that_is_never_released_is_waited_for_only_so_long(tmp_path, monkeypatch):
    """Another process may be stopped while it builds: patience ends, and both are right."""
    now = iter(range(0, 10_000, 5))
    monkeypatch.setattr(cache, "_try_lock", lambda file: "busy")
    monkeypatch.setattr(cache.time, "monotonic", lambda: next(now))
    assert Store(tmp_path / "c").get_or_build(named(1), lambda: b"1") == b"1"
    assert Store(tmp_path / "c").describe()["entries"] == 1


@pytest.mark.skipif(os.name != "posix", reason="file locks of POSIX")
def test_a_released_lock_is_free_although_a_forked_child_shares_the_file(tmp_path):
    def opened():
        return os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)

    mine, theirs = opened(), opened()
    childs = os.dup(mine)  # what a fork leaves in a child
    assert cache._try_lock(mine) == "held"
    assert cache._try_lock(theirs) == "busy"
    cache._unlock(mine)
    assert cache._try_lock(theirs) == "held"
    for file in (mine, theirs, childs):
        os.close(file)


def test_a_refused_folder_stays_refused(tmp_path):
    """A write that fails lets old entries be read, but not those of a folder given up before."""
    Store(tmp_path / "c").get_or_build(named("old"), lambda: b"theirs")
    for opened in (False, True):
        store = Store(tmp_path / "c")
        if opened:
            store.describe()
        with pytest.warns(CacheWarning, match="first"):
            store.give_up("first")
        store.give_up("second", reads=True)
        assert store.get_or_build(named("old"), lambda: b"mine") == b"mine"


def test_as_windows_does_it(tmp_path, monkeypatch, recwarn):
    """No fcntl, no O_NOFOLLOW, a shared file that refuses to be replaced for a moment."""

    class Windows(FaultyOS):
        name = "nt"

    class Msvcrt:
        LK_NBLCK, LK_UNLCK, calls = 1, 2, []

        @classmethod
        def locking(cls, file, mode, size):
            cls.calls.append(mode)

    monkeypatch.setattr(cache, "fcntl", None)
    monkeypatch.setattr(cache, "msvcrt", Msvcrt)
    monkeypatch.setattr(cache, "_NO_LINK", 0)
    monkeypatch.setattr(cache, "os", Windows("replace", errno.EACCES, 1))
    store = Store(tmp_path / "c")
    assert store.get_or_build(named(1), lambda: b"1") == b"1"
    assert store.get_or_build(named(1), lambda: b"not called") == b"1"
    assert Msvcrt.calls == [1, 2]
    assert len(recwarn) == 0
    entry = next((tmp_path / "c").glob("*.bin"))
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(CacheWarning, match="symbolic link"):
        assert Store(tmp_path / "c").get_or_build(named(1), lambda: b"mine") == b"mine"


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_path_that_is_a_file_or_below_one(where, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    store = Store(tmp_path / where)
    with pytest.warns(CacheWarning, match="cannot be used") as caught:
        for _ in range(2):
            assert store.get_or_build(named(1), lambda: b"1") == b"1"
    assert len(caught) == 1
    assert (tmp_path / "file").read_bytes() == b"precious"


LIMITED = """
import importlib.util, resource, signal, sys, warnings
from pathlib import Path
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
store = cache.Store(sys.argv[2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for size in (1000, 200_000, 1000):
        for _ in range(2):
            image = store.get_or_build({"size": str(size)}, lambda: b"x" * size)
            assert image == b"x" * size
print(len(caught), [path.suffix for path in Path(sys.argv[2]).iterdir()])
"""


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_real_write_that_stops_half_way(tmp_path):
    """The system itself takes 64 KiB of a larger entry and refuses the rest."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", LIMITED, cache.__file__, str(tmp_path / "c")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1 ['.bin']\n"


READ_ONLY = """
import importlib.util, os, sys, warnings
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write anywhere
os.environ.update(HOME=sys.argv[2], XDG_CACHE_HOME="")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert cache.default_store().get_or_build({"a": "b"}, lambda: b"x") == b"x"
print([str(warning.message) for warning in caught], cache.default_store().describe()["state"])
"""


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_a_real_home_that_is_read_only(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    source = tmp_path / "cache.py"
    source.write_bytes(Path(cache.__file__).read_bytes())
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NATCUPY_")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", READ_ONLY, str(source), str(home)],
        capture_output=True,
        text=True,
        env=clean,
    )
    home.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("NATCUPY_CACHE_DIR") == 1
    assert result.stdout.endswith("memory\n")
    assert list(home.iterdir()) == []
