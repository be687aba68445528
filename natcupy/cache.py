"""A store of compiled binaries: named ingredients come in, the bytes built from them go out.

An entry's name is the hash of everything that decides its content, so an entry is never changed
and never stale. It is written to a temporary file and put in place in one step; it carries a
checksum and its own key, so whatever a crash, a full disk or a wrong copy left behind is a miss.
Locks only save work: without them two processes build the same thing and both are right.

Whoever can write the folder decides what runs. It must belong to this user and be writable for
nobody else, and so must each entry; otherwise nothing in it is read. Where the folder cannot be
used, binaries are kept in memory and one warning says why.

This module needs the standard library alone: no torch, no numpy, no CuPy.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import stat
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

FOLDER_VARIABLE = "NATCUPY_CACHE_DIR"
SWITCH_VARIABLE = "NATCUPY_CACHE"
SIZE_VARIABLE = "NATCUPY_CACHE_MB"
DEFAULT_LIMIT = 512 << 20  # bytes
LOCK_PATIENCE = 20.0  # seconds to wait for another process that builds the same entry
JUST_USED = 60.0  # seconds in which an entry counts as in use
ABANDONED = 3600.0  # seconds after which a temporary file has no writer any more
UNWATCHED = 64  # part of the limit that a process may add before it looks at the folder again

_MAGIC = b"natcupy1"
_KEY = re.compile(r"[0-9a-f]{64}")
_BODY = len(_MAGIC) + 32  # where the part under the checksum begins
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PASSING = {errno.ESTALE, errno.EBUSY, errno.EINTR, errno.EAGAIN}  # worth another try


class CacheWarning(UserWarning):
    """Binaries cannot be kept on disk, or not be trusted there; they are built anew each time."""


class _UntrustedError(Exception):
    """Someone else could have written what lies here."""


def key_of(ingredients: Mapping[str, str]) -> str:
    """The name of an entry: 64 hexadecimal digits from every ingredient's name and value."""
    for name, value in ingredients.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(
                f"ingredients are text by name, got {name!r}: {type(value).__name__}; "
                "write numbers out with str()."
            )
    if not ingredients:
        raise ValueError("an entry needs at least one ingredient, got none.")
    text = json.dumps(dict(ingredients), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(_MAGIC + text.encode("ascii")).hexdigest()


class Store:
    """Binaries by key: on disk in `folder`, or in memory where that is None or of no use.

    `limit` bounds the folder in bytes; a process may exceed it by a 64th. One store may be used by
    any number of threads, one folder by any number of processes.
    """

    def __init__(self, folder: str | os.PathLike | None, limit: int = DEFAULT_LIMIT) -> None:
        self._folder = Path(folder) if folder is not None else None
        self._limit = limit
        self._added = limit  # bytes since the folder was looked at, which the first entry asks for
        self._opened = self._folder is None
        self._reads = self._writes = False  # decided when the folder is opened, at first use
        self._why = ""  # why binaries are not kept on disk; empty while all is well
        self._warned: dict[str, object] = {}
        self._memory: dict[str, bytes] = {}
        self._told: dict[str, dict[str, str]] = {}  # the short ingredients of what is in memory
        self._locks: dict[tuple[int, str], threading.Lock] = {}

    def get_or_build(self, ingredients: Mapping[str, str], build: Callable[[], bytes]) -> bytes:
        """The entry for `ingredients`; `build()` makes it if nobody has yet.

        Of the threads that ask at once exactly one builds, and of the processes exactly one where
        file locks work. What `build` raises comes through and the next caller tries again; no
        trouble with the folder does.
        """
        key = key_of(ingredients)
        with self._lock(key):
            image = self._look_up(key)
            if image is not None:
                return image
            with self._alone(key) as image:
                if image is None:
                    image = self._look_up(key)
                if image is None:
                    image = _checked(build())
                    self._keep(key, ingredients, image)
                return image

    def get(self, ingredients: Mapping[str, str]) -> bytes | None:
        """The entry for `ingredients` if somebody has made it."""
        return self._look_up(key_of(ingredients))

    def find(self, **told: str) -> list[tuple[dict[str, str], bytes]]:
        """Every entry whose ingredients hold `told`: its ingredients (the short ones) and bytes."""
        return [(known, image) for _, known, image in self._find(told)]

    def discard_all(self, **told: str) -> int:
        """Forget every entry whose ingredients hold `told`; how many there were."""
        found = [key for key, _, _ in self._find(told)]
        for key in found:
            self._drop(key)
        return len(found)

    def _find(self, told: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str], bytes]]:
        self._open()
        for key, data in [*self._memory.items(), *self._on_disk()]:
            held = self._told.get(key)
            known, image = (held, data) if held is not None else _contents(key, data)
            if image is not None and known.items() >= told.items():
                yield key, known, image

    def _on_disk(self) -> Iterator[tuple[str, bytes]]:
        """Key and bytes of every file that may be an entry, none of them marked as used."""
        for name, _, _ in self._files():
            key, ending = os.path.splitext(name)
            if ending == ".bin" and _KEY.fullmatch(key) and key not in self._memory:
                with contextlib.suppress(OSError, _UntrustedError):
                    yield key, _read_file(self._path(key), mark=False)

    def discard(self, ingredients: Mapping[str, str]) -> None:
        """Forget an entry, for instance one that its user could not load."""
        self._drop(key_of(ingredients))

    def _drop(self, key: str) -> None:
        self._memory.pop(key, None)
        self._told.pop(key, None)
        self._open()
        if self._writes:
            _remove(self._path(key))

    def describe(self) -> dict[str, Any]:
        """Facts for a report; `state` is "disk", "memory" (and `why`) or "off"."""
        self._open()
        entries = [size for name, size, _ in self._files() if name.endswith(".bin")]
        off = self._folder is None and not self._why
        return {
            "folder": None if self._folder is None else str(self._folder),
            "state": "off" if off else "disk" if self._writes else "memory",
            "why": self._why,
            "entries": len(entries),
            "bytes": sum(entries),
            "limit": self._limit,
            "in_memory": len(self._memory),
        }

    def give_up(self, why: str, *, reads: bool = False) -> None:
        """Keep binaries in memory from now on, and warn once for this store."""
        self._reads, self._writes, self._opened = self._reads and reads, False, True
        self._why = self._why or why
        mine = object()
        if self._warned.setdefault("warned", mine) is mine:
            warnings.warn(
                f"natcupy keeps compiled binaries in memory and builds them again in each "
                f"process, because {why}. Set {FOLDER_VARIABLE} to a folder that only you can "
                f"write, or {SWITCH_VARIABLE}=off to do without one silently.",
                CacheWarning,
                stacklevel=2,
            )

    def _open(self) -> None:
        """Make the folder and judge it, once."""
        if self._opened:
            return
        with self._lock("the folder"):
            if self._opened:
                return
            why = ""
            try:
                _patiently(lambda: _make_folder(self._folder))
                self._reads = self._writes = True
            except _UntrustedError as error:
                why = str(error)
            except OSError as error:
                why = f"the folder {self._folder} cannot be used ({_reason(error)})"
            self._opened = True
        if why:
            self.give_up(why)

    def _lock(self, name: str) -> threading.Lock:
        # With the process in its name: a lock that another thread held while this process was
        # forked would never be released in the child.
        return self._locks.setdefault((os.getpid(), name), threading.Lock())

    def _path(self, key: str, ending: str = ".bin") -> str:
        return os.path.join(self._folder, key + ending)

    def _files(self) -> list[tuple[str, int, float]]:
        """Name, size and time of last use of each file in the folder."""
        found = []
        if self._reads:
            with contextlib.suppress(OSError), os.scandir(self._folder) as items:
                for item in items:
                    with contextlib.suppress(OSError):
                        info = item.stat(follow_symlinks=False)
                        found.append((item.name, info.st_size, info.st_mtime))
        return found

    def _look_up(self, key: str) -> bytes | None:
        image = self._memory.get(key)
        if image is not None:
            return image
        self._open()
        if not self._reads:
            return None
        try:
            data = _patiently(lambda: _read_file(self._path(key)))
        except FileNotFoundError:
            return None
        except _UntrustedError as error:
            self.give_up(str(error))
            return None
        except OSError as error:
            self.give_up(f"an entry in {self._folder} cannot be read ({_reason(error)})")
            return None
        image = _unpack(key, data)
        if image is None:
            _remove(self._path(key))
        return image

    def _keep(self, key: str, ingredients: Mapping[str, str], image: bytes) -> None:
        """Put an entry in place in one step; in memory it stays only if that fails."""
        self._told[key], self._memory[key] = _short(ingredients), image
        if not self._writes or len(image) > self._limit:
            return
        try:
            _patiently(lambda: self._put(key, _pack(key, ingredients, image)))
        except _UntrustedError as error:
            self.give_up(str(error))
        except OSError as error:
            self.give_up(f"{self._folder} cannot be written ({_reason(error)})", reads=True)
        else:
            self._memory.pop(key, None)
            self._told.pop(key, None)
            self._added += len(image)
            if self._added > self._limit // UNWATCHED:
                self._added = 0
                self._trim(key + ".bin")

    def _put(self, key: str, data: bytes) -> None:
        temporary = self._path(key, f".{os.getpid()}-{secrets.token_hex(8)}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        try:
            try:
                file = os.open(temporary, flags, 0o600)
            except FileNotFoundError:  # the folder was deleted under us, which is anyone's right
                _make_folder(self._folder)
                file = os.open(temporary, flags, 0o600)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(file, rest) :]
            finally:
                os.close(file)
            os.replace(temporary, self._path(key))
        except BaseException:
            _remove(temporary)
            raise

    def _trim(self, newest: str) -> None:
        """Delete what dead writers left, and the longest unused entries above the limit."""
        now = time.time()
        files = sorted(self._files(), key=lambda file: file[2])
        total = sum(size for name, size, _ in files if name.endswith(".bin"))
        for name, size, used in files:
            if name.endswith((".tmp", ".lock")):
                doomed = now - used > ABANDONED
            else:
                doomed = name.endswith(".bin") and total > self._limit
                doomed = doomed and name != newest and now - used > JUST_USED
                total -= size if doomed else 0
            if doomed:
                _remove(os.path.join(self._folder, name))

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[bytes | None]:
        """Hold the key's file lock, or receive the entry that its holder has just made.

        Where locks fail or take too long the block runs without one: it then works for nothing at
        worst.
        """
        path = self._path(key, ".lock") if self._writes else None
        file = None
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600) if path else None
        if file is None:
            yield None
            return
        mine = False
        try:
            mine, image = self._wait(key, file)
            yield image
        finally:
            if mine:
                _remove(path)  # before the release, so that whoever comes next makes a new one
                _unlock(file)
            with contextlib.suppress(OSError):
                os.close(file)

    def _wait(self, key: str, file: int) -> tuple[bool, bytes | None]:
        deadline, pause = time.monotonic() + LOCK_PATIENCE, 0.002
        while True:
            state = _try_lock(file)
            if state != "busy" or time.monotonic() > deadline:
                return state != "busy", None
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            image = self._look_up(key)
            if image is not None:
                return False, image


def _make_folder(folder: Path) -> None:
    """Make `folder` for its owner alone; raise _UntrustedError unless it is this user's alone."""
    os.makedirs(folder.parent, 0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    info = os.stat(folder)
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _check_owner(info, f"the folder {folder}")
    above = os.stat(folder.parent).st_mode
    if os.name == "posix" and above & stat.S_IWOTH and not above & stat.S_ISVTX:
        raise _UntrustedError(f"{folder.parent} can be written by every user of this machine")


def _check_owner(info: os.stat_result, what: str) -> None:
    if os.name != "posix":
        return  # there, access lists of the user's profile guard the folder
    if info.st_uid != os.geteuid():
        raise _UntrustedError(f"{what} belongs to another user (id {info.st_uid})")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UntrustedError(
            f"{what} can be written by other users (mode {stat.S_IMODE(info.st_mode):04o})"
        )


def _read_file(path: str, mark: bool = True) -> bytes:
    """All bytes of a plain file of this user; marks it as used now, unless told not to."""
    if not _NO_LINK and os.path.islink(path):
        raise _UntrustedError(f"{path} is a symbolic link")
    try:
        file = os.open(path, _FLAGS | _NO_LINK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _UntrustedError(f"{path} is a symbolic link") from None
        raise
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise _UntrustedError(f"{path} is not a plain file")
        _check_owner(info, path)
        parts = []
        while part := os.read(file, 1 << 20):
            parts.append(part)
    finally:
        os.close(file)
    if mark:
        with contextlib.suppress(OSError):
            os.utime(path)
    return b"".join(parts)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _patiently(action: Callable[[], Any], tries: int = 3) -> Any:
    """Run `action`, again if it meets what passes: a stale handle, a busy or shared file."""
    try:
        return action()
    except OSError as error:
        passing = error.errno in _PASSING or (os.name == "nt" and error.errno == errno.EACCES)
        if not passing or tries == 1:
            raise
    time.sleep(0.005)
    return _patiently(action, tries - 1)


def _reason(error: OSError) -> str:
    if isinstance(error, FileExistsError):  # where a folder should be made
        return f"{error.filename} is not a folder, or a link to nowhere"
    return error.strerror or type(error).__name__


def _try_lock(file: int) -> str:
    """ "held", "busy" (another has it) or "unsupported" here."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            return "unsupported"
    except OSError as error:
        busy = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
        return "busy" if error.errno in busy else "unsupported"
    return "held"


def _unlock(file: int) -> None:
    """Release at once: a child forked meanwhile shares the file and would keep the lock."""
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_UN)
        elif msvcrt is not None:
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)


def _checked(image: bytes) -> bytes:
    if type(image) is not bytes or not image:
        raise TypeError(f"build() must return non-empty bytes, got {type(image).__name__}.")
    return image


def _pack(key: str, ingredients: Mapping[str, str], image: bytes) -> bytes:
    """Magic, checksum, key, the short ingredients for the curious, the image."""
    note = json.dumps(_short(ingredients), sort_keys=True).encode("ascii")
    body = bytes.fromhex(key) + struct.pack("<I", len(note)) + note + image
    return _MAGIC + hashlib.sha256(body).digest() + body


def _short(ingredients: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in ingredients.items() if len(value) <= 200}


def _contents(key: str, data: bytes) -> tuple[dict[str, str], bytes | None]:
    """The short ingredients and the image of an entry; no image where anything is not right."""
    image = _unpack(key, data)
    if image is None:
        return {}, None
    size = struct.unpack_from("<I", data, _BODY + 32)[0]
    return json.loads(data[_BODY + 36 : _BODY + 36 + size]), image


def _unpack(key: str, data: bytes) -> bytes | None:
    """The image, or None where anything at all is not as `_pack` made it for this key."""
    checksum, body = data[len(_MAGIC) : _BODY], data[_BODY:]
    whole = data.startswith(_MAGIC) and hashlib.sha256(body).digest() == checksum
    if not whole or body[:32] != bytes.fromhex(key):
        return None
    start = 36 + struct.unpack_from("<I", body, 32)[0]
    return body[start:]


def default_store() -> Store:
    """The store of this process, as the environment says:

    NATCUPY_CACHE_DIR moves it, NATCUPY_CACHE=off keeps binaries in memory, NATCUPY_CACHE_MB bounds
    it. Without them it lies in the user's cache folder.
    """
    names = (SWITCH_VARIABLE, FOLDER_VARIABLE, SIZE_VARIABLE)
    return _store(*(os.environ.get(name, "").strip() for name in names))


@functools.cache
def _store(switch: str, folder: str, size: str) -> Store:
    if switch.lower() in ("off", "0", "no", "false"):
        return Store(None)
    if switch.lower() not in ("", "on", "1", "yes", "true"):
        warnings.warn(
            f"{SWITCH_VARIABLE} must be on or off, got {switch!r}; the cache stays on.",
            CacheWarning,
            stacklevel=3,
        )
    limit = int(size) << 20 if size.isdecimal() else DEFAULT_LIMIT
    where = os.path.abspath(os.path.expanduser(folder)) if folder else _user_folder()
    if where is None:
        store = Store(None, limit)
        store.give_up("this user has no home folder")
        return store
    return Store(Path(where) / "binaries", limit)


def _user_folder() -> str | None:
    """Where this system keeps what can be made again, for this user; None without a home."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser(r"~\AppData\Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    return os.path.join(base, "natcupy") if os.path.isabs(base) else None
