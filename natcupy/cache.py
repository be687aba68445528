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

import errno
import functools
import hashlib
import json
import os
import secrets
import stat
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

_MAGIC = b"natcupy1"
_HEADER = len(_MAGIC) + 32 + 32  # magic, checksum of all that follows, key
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PASSING = {errno.ESTALE, errno.EBUSY, errno.EINTR, errno.EAGAIN}  # worth another try
_TRIES = 3


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
    """Binaries by key, on disk in `folder` or, where that is impossible or None, in memory.

    `limit` bounds the folder in bytes; `why` tells why there is no folder (no warning is given
    then). One store may be used by any number of threads, one folder by any number of processes.
    """

    def __init__(
        self, folder: str | os.PathLike | None, limit: int = DEFAULT_LIMIT, why: str = ""
    ) -> None:
        self._folder = Path(folder) if folder is not None else None
        self._limit = limit
        self._why = why  # why nothing is kept on disk; empty while everything is well
        self._readable = folder is not None
        self._opened = False
        self._warned = False
        self._memory: dict[str, bytes] = {}
        self._locks: dict[tuple[int, str], threading.Lock] = {}
        self._counts = {"hits": 0, "builds": 0}

    def get_or_build(self, ingredients: Mapping[str, str], build: Callable[[], bytes]) -> bytes:
        """The entry for `ingredients`; `build()` makes it if nobody has yet.

        Exactly one of the threads that ask at once builds, and one of the processes where file
        locks work. What `build` raises comes through; the next caller tries again. No trouble with
        the folder ever does.
        """
        key = key_of(ingredients)
        # The process id is part of the name: a lock held by another thread during a fork would
        # stay locked in the child for ever.
        lock = self._locks.setdefault((os.getpid(), key), threading.Lock())
        with lock:
            found = self._look_up(key)
            if found is not None:
                self._counts["hits"] += 1
                return found
            with self._only_process(key) as published:
                found = published or self._look_up(key)
                if found is not None:
                    self._counts["hits"] += 1
                    return found
                image = _checked(build())
                self._counts["builds"] += 1
                if not self._write(key, ingredients, image):
                    self._memory[key] = image
        return image

    def discard(self, ingredients: Mapping[str, str]) -> None:
        """Forget an entry, for instance one that its user could not load."""
        key = key_of(ingredients)
        self._memory.pop(key, None)
        if self._usable():
            _remove(self._path(key))

    def describe(self) -> dict[str, Any]:
        """Facts for a report: folder, state ("disk", "memory" or "off"), reason, size, counts."""
        usable = self._usable()
        entries = self._entries() if usable else []
        state = "disk" if usable and not self._why else "memory"
        return {
            "folder": str(self._folder) if self._folder is not None else None,
            "state": "off" if self._folder is None and not self._warned else state,
            "why": self._why,
            "entries": len(entries),
            "bytes": sum(size for _, size, _ in entries),
            "limit": self._limit,
            "in_memory": len(self._memory),
            **self._counts,
        }
