"""Bytes on disk: look before reading, read whole, write so that a kill leaves old or new.

In: paths. Out: bytes, hashes, or a written folder. Knows nothing of tensors or of the Hub.

Saving a folder is one transaction. Every new file is first written beside the old one under a
temporary name and synced; then a journal that maps final names to temporary ones appears by one
rename: that instant is the commit. Only then are files renamed (or, where the new ones make them
void, removed), and the journal itself. A process killed before the commit leaves the old folder;
killed after it, `member` (the only way natcupy opens a file of a model folder) reads through the
journal and sees the new one complete. The next save finishes what was left. Processes that save
into one folder take turns where the system can lock a folder (not on Windows and some network
drives; there they may only do so with the same content, as the ranks of one training run do), and
who reads several files inside `steady` gets all of them from one save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from natcupy.hub.errors import Corrupt, HtmlPage, LfsPointer, NotFound, Truncated

JOURNAL = ".natcupy-save.json"
MAX_JOURNAL_BYTES = 64 * 1024
LEFTOVER_AGE_S = 3600.0  # without a lock: a temporary file this old belongs to no living save
READER_WAITS_S = 30.0
REMOVED = ""  # in the journal, in place of a temporary name
_CHUNK = 1 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REMOVABLE = re.compile(r"model[0-9a-z-]*\.safetensors(\.index\.json)?")
_TEMPORARY = re.compile(r"\.(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,127})\.[0-9a-f]{32}\.tmp")


# ---------------------------------------------------------------- reading


def looks_like(head: bytes) -> str:
    """Name what the first bytes of a file are: lfs, html, zip, json, empty or unknown."""
    text = head.lstrip()[:64].lower()
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "lfs"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        return "html"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    return "json" if text.startswith(b"{") else "unknown"


def refuse_lookalikes(head: bytes, path: Path | str) -> None:
    """Raise for files that are something well known instead of the weights or config wanted.

    Raises:
        LfsPointer, HtmlPage, Truncated: with the remedy for each.
    """
    kind = looks_like(head)
    if kind == "lfs":
        size = re.search(rb"size (\d{1,18})", head)
        text = f" for a file of {int(size[1]):,} bytes" if size else ""
        raise LfsPointer(
            f"{path} is a Git-LFS pointer{text}, not the file itself. Fetch the content with "
            "'git lfs pull' in that clone, or load the repository by its name instead."
        )
    if kind == "html":
        raise HtmlPage(
            f"{path} is a web page, not a model file: a login, error or preview page was saved in "
            "its place. Download the raw file again (log in first if the page asks for it)."
        )
    if kind == "empty":
        raise Truncated(f"{path} is empty (0 bytes). Download or save it again.")


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes into memory.

    Memory, not a map: a mapped file that shrinks under the reader kills the process.

    Raises:
        NotFound: no such regular file.
        Corrupt: larger than `limit`.
        Truncated: the file shrank while it was read.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}. Check the path.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise Corrupt(f"{path} must be at most {limit:,} bytes, got {size:,}.")
        data = file.read(size)
        if len(data) != size:
            raise Truncated(
                f"{path} changed while it was read: got {len(data):,} of {size:,} bytes. Try again."
            )
    return data


def sha256_of(data: bytes) -> str:
    """SHA-256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def git_blob_id(data: bytes) -> str:
    """The id git gives this content: SHA-1 over a small header and the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file, in constant memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def member(folder: Path | str, name: str) -> Path:
    """The path to read for file `name` of a model folder, through an unfinished save if any."""
    folder = Path(folder)
    temporary = _journal(folder).get(name)
    if temporary == REMOVED:
        return folder / f".{name}.removed"  # a name that no file has
    if temporary is not None and (folder / temporary).is_file():
        return folder / temporary
    return folder / name


@contextlib.contextmanager
def steady(folder: Path) -> Iterator[None]:
    """Keep saves into the folder waiting, once one under way has ended, where it can be locked.

    After READER_WAITS_S without its turn a reader goes on: whoever saves may have been stopped.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a folder that cannot be opened: told when read
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                _wait_for_lock(handle, fcntl.LOCK_SH)
        yield


def _wait_for_lock(handle: int, kind: int) -> None:
    end = time.monotonic() + READER_WAITS_S
    while time.monotonic() < end:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)


def _journal(folder: Path) -> dict[str, str]:
    try:
        data = read_bytes(folder / JOURNAL, MAX_JOURNAL_BYTES)
    except FileNotFoundError:
        return {}
    try:
        entries = json.loads(data)
        good = isinstance(entries, dict) and all(
            isinstance(temporary, str)
            and (
                (temporary == REMOVED and _REMOVABLE.fullmatch(name))
                or (
                    (match := _TEMPORARY.fullmatch(temporary)) is not None and match["name"] == name
                )
            )
            for name, temporary in entries.items()
        )
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise Corrupt(
            f"{folder / JOURNAL} is not a record of an unfinished save. Delete that file, or fetch "
            "the folder again."
        )
    return entries


# ---------------------------------------------------------------- writing


def write_folder(
    folder: Path | str,
    writers: dict[str, Callable[[Path], None]],
    outdated: Callable[[str], bool] = lambda name: False,
) -> None:
    """Replace the named files of a folder, all or none (see the opening paragraph).

    Args:
        folder: made if missing; other files in it are left alone.
        writers: plain file name -> function that writes the content to the path it is given.
        outdated: which of the other weights files (model*.safetensors and index) the new ones make
            void; they go in the same transaction.
    """
    folder = Path(folder)
    for name in writers:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"a file name must be plain letters, digits, '._-', got {name!r}.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the target must be a folder, got the file {folder}.")
    made = not folder.exists()
    try:
        _replace(folder, writers, outdated)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty: another process has saved there
                folder.rmdir()
        raise


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Give errors of the system the path that is meant, not a temporary one's or none."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of ours, which says all
            raise
        text = error.strerror or os.strerror(error.errno)
        raise OSError(error.errno, text, os.fspath(path)) from error


def _replace(
    folder: Path, writers: dict[str, Callable[[Path], None]], outdated: Callable[[str], bool]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _turn(folder) as alone:
        _finish(folder)
        _sweep(folder, 0.0 if alone else LEFTOVER_AGE_S)
        others = {path.name for path in folder.iterdir()} - writers.keys()
        gone = sorted(n for n in others if _REMOVABLE.fullmatch(n) and outdated(n))
        _write(folder, writers, gone)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[bool]:
    """Wait until no other process saves into the folder; False where that cannot be known.

    The lock is on the folder itself: it leaves no file behind and ends with the process.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(handle)


def _write(folder: Path, writers: dict[str, Callable[[Path], None]], gone: list[str]) -> None:
    pending = {name: f".{name}.{uuid4().hex}.tmp" for name in writers}
    try:
        for name, temporary in pending.items():
            with writing(folder / name):
                writers[name](folder / temporary)
                _sync(folder / temporary)
        with writing(folder):
            _commit(folder, pending | dict.fromkeys(gone, REMOVED))
    except BaseException:
        committed = _journal(folder).values()  # an interrupt may strike just after the commit
        for temporary in pending.values():
            if temporary not in committed:
                (folder / temporary).unlink(missing_ok=True)
        raise
    _finish(folder)


def _commit(folder: Path, pending: dict[str, str]) -> None:
    """Make the journal appear complete, by one rename."""
    draft = folder / f".{JOURNAL[1:]}.{uuid4().hex}.tmp"
    try:
        draft.write_text(json.dumps(pending), encoding="utf-8")
        _sync(draft)
        os.replace(draft, folder / JOURNAL)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def _finish(folder: Path) -> None:
    """Carry out the renames of a committed save; safe to repeat, safe to run in several places."""
    entries = _journal(folder)
    if not entries:
        return
    for name, temporary in entries.items():
        # Absent means that this was done before the kill, or by another process.
        with contextlib.suppress(FileNotFoundError):
            if temporary == REMOVED:
                (folder / name).unlink()
            else:
                os.replace(folder / temporary, folder / name)
    sync_folder(folder)
    (folder / JOURNAL).unlink(missing_ok=True)


def _sweep(folder: Path, age: float) -> None:
    """Remove temporary files of dead saves: those older than `age` seconds."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            ours = _TEMPORARY.fullmatch(path.name)
            if ours and (not age or time.time() - path.stat().st_mtime > age):
                path.unlink()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames durable where the system can sync a folder (Windows cannot, and need not)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the renames are still atomic there
    finally:
        os.close(handle)
