"""The folder of a run: claimed before the first step, filled with logs and tables after each epoch.

In: a `TrainConfig`, facts, rows. Out: `run.json` (what runs here), `log.csv` and `log.json` (one
row per epoch), all replaced in one step; and the bar on the terminal.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

import torch

from natcupy.hub.errors import Corrupt
from natcupy.hub.files import write_folder
from natcupy.train import checkpoint
from natcupy.train.config import RESTORED, TrainConfig, TrainError
from natcupy.train.task import PICTURES

RUN, LOG_CSV, LOG_JSON, CHECKPOINT = "run.json", "log.csv", "log.json", "checkpoint"
MODEL = "model"
RUNNING = ".running"
_BEYOND = 1 << 20  # the byte that is locked on Windows, where nobody may read what is locked


class Hold:
    """That this process trains in a folder, and no other.

    A lock on a file in the folder, which ends with the process however that ends: what a kill
    leaves of the file holds nobody up. Where the system cannot lock (some network drives) it keeps
    nobody out. Workers forked from the process do not inherit it.
    """

    def __init__(self) -> None:
        self._path, self._file = Path(), -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file < 0:
            return
        if fcntl is None:  # an open file cannot be removed on Windows
            os.close(self._file)
        with contextlib.suppress(OSError):
            if fcntl is None or self._is_there(self._file):
                self._path.unlink()
        if fcntl is not None:
            os.close(self._file)
        self._file = -1

    def take(self, folder: Path) -> None:
        """Hold a folder until the end of the block. Raises TrainError if another process does."""
        self._path = folder / RUNNING
        while self._file < 0:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(file)
            except OSError as error:
                os.lseek(file, 0, os.SEEK_SET)
                told = os.read(file, 200).decode("utf-8", "replace")
                os.close(file)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return
                raise TrainError(
                    f"{told or 'another process'} trains in {folder}. Wait for its end, or end it, "
                    "and continue with --resume (resume=True); or choose another output."
                ) from None
            if self._is_there(file):
                self._file = file
            else:  # whoever held it has just removed it
                os.close(file)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f"process {os.getpid()} of {platform.node()}, since {since},"
        with contextlib.suppress(OSError):  # it is the lock that counts
            os.ftruncate(self._file, 0)
            os.write(self._file, text.encode())

    def _is_there(self, file: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        return False


def _lock(file: int) -> None:
    """Lock an open file for this process. Raises OSError, EACCES or EAGAIN if another one has."""
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(file, _BEYOND, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)


def claim(
    config: TrainConfig,
    facts: Mapping[str, Any],
    hold: Hold,
    command: Mapping[str, Any] | None = None,
) -> Path:
    """Make the folder of a run, or check that it holds the run to be continued; and hold it.

    A run that ended before it kept a step has nothing to lose: it is begun anew where it is not
    continued, or with other numbers.

    Args:
        config: of the run; what it binds is recorded, and compared with the record of a run.
        facts: JSON values, likewise.
        hold: takes the folder.
        command: JSON values to record, which a continuation need not share; None leaves the record
            its own.

    Raises:
        TrainError: it holds a run and none is to be continued; another run; other files; another
            process trains there; or it cannot be written. Nothing in it was changed.
    """
    folder = Path(config.output).expanduser()
    wanted = {"config": config.binding(), "facts": json.loads(json.dumps(dict(facts)))}
    had = _read(folder / RUN)
    if had is not None:
        if is_begun(folder):
            _check_continued(folder, had, wanted, config.resume)
        _writable(folder)
        hold.take(folder)
        _take_over(folder, had, wanted, config.resume, command)
        return folder
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise TrainError(
            f"{folder} holds files that are not of a run. Choose an empty folder as output."
        )
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(
            f"the output {folder} cannot be made: {error.strerror or error}. Choose another."
        ) from None
    try:
        _writable(folder)
    except TrainError:
        if made:
            with contextlib.suppress(OSError):  # not empty: another process is quicker
                folder.rmdir()
        raise
    hold.take(folder)
    _write_record(folder, wanted, command)
    return folder


def _take_over(
    folder: Path,
    had: Mapping[str, Any],
    wanted: Mapping[str, Any],
    resume: bool,
    command: Mapping[str, Any] | None,
) -> None:
    """Continue the run of a folder that is held, or begin it anew if it kept no step."""
    had = _read(folder / RUN) or had  # again: until now another process may have trained
    begun = is_begun(folder)
    if begun:
        _check_continued(folder, had, wanted, resume)
    if begun or (resume and all(had[part] == wanted[part] for part in wanted)):
        if command is not None and had.get("command") != command:
            _write(folder, {**had, "command": command})
        return
    state = folder / CHECKPOINT
    (state / checkpoint.STATE).unlink(missing_ok=True)  # first: no checkpoint is read in part
    if state.is_dir():
        shutil.rmtree(state)
    _write_record(folder, wanted, command)


def is_begun(folder: Path) -> bool:
    """Whether the run of a folder has kept anything: a step, a log or a model."""
    if any((folder / name).exists() for name in (LOG_CSV, LOG_JSON, MODEL)):
        return True
    try:
        progress = checkpoint.read(folder / CHECKPOINT)
    except (Corrupt, OSError):
        return True  # nobody knows
    return progress is not None and progress.step > 0


def _check_continued(
    folder: Path, had: Mapping[str, Any], wanted: Mapping[str, Any], resume: bool
) -> None:
    """Raise TrainError unless the run of a folder is to be continued, with its own numbers."""
    if not resume:
        raise TrainError(
            f"{folder} holds a run already. Continue it with --resume (resume=True), or choose "
            "another output."
        )
    different = _differences(had, wanted)
    if different:
        raise TrainError(
            f"a run is continued with what it began with; {folder} differs in "
            f"{'; '.join(different[:5])}. Give the same, or choose another output."
        )


def _write_record(
    folder: Path, wanted: Mapping[str, Any], command: Mapping[str, Any] | None
) -> None:
    told = {} if command is None else {"command": command}
    _write(folder, {"natcupy run": 1, **wanted, **told, "environment": environment()})


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1)
    write_folder(folder, {RUN: lambda path: path.write_bytes(text.encode())})


def recorded(folder: Path) -> dict[str, Any] | None:
    """The record of a run, its `epochs` those of its last extension; None where there is no run.

    Raises TrainError, or Corrupt, where the folder's files are not those of a run.
    """
    had = _read(folder / RUN)
    if had is not None:
        progress = checkpoint.read(folder / CHECKPOINT)
        if progress is not None and progress.epochs:
            had["config"]["epochs"] = progress.epochs[-1]
    return had


def environment() -> dict[str, Any]:
    """Versions and machine, for logs."""
    from natcupy import __version__

    found = {"natcupy": __version__, "python": platform.python_version(), "system": sys.platform}
    for name in ("torch", "accelerate", "timm", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_logs(folder: Path, rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> None:
    """log.csv and log.json, anew."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    whole = {"config": config.binding(), "environment": environment(), "epochs": list(rows)}
    write_folder(
        folder,
        {
            LOG_CSV: lambda path: path.write_bytes(text.getvalue().encode()),
            LOG_JSON: lambda path: path.write_bytes(json.dumps(whole, indent=1).encode()),
        },
    )


def complete_logs(folder: Path, rows: Sequence[Mapping[str, Any]], config: TrainConfig) -> None:
    """Write the logs anew unless they have these rows: a run may end before it could."""
    try:
        had = json.loads((folder / LOG_JSON).read_bytes())["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        had = None
    if had != list(rows) or not (folder / LOG_CSV).exists():
        write_logs(folder, rows, config)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held: on the GPU, or, training on the CPU, in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


class Bar:
    """A line on stderr that says how it goes: loss, accuracy, items per second, time left."""

    def __init__(self, config: TrainConfig, done: int, steps: int, shown: bool) -> None:
        from tqdm import tqdm

        quiet = True if not shown else (None if config.progress is None else not config.progress)
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=quiet, smoothing=0.05)
        self.wanted = not self._bar.disable

    def step(self) -> None:
        """One step is done."""
        self._bar.update()

    def tell(self, epoch: str, values: Mapping[str, float], speed: float) -> None:
        """Numbers behind the bar."""
        self._bar.set_description_str(epoch, refresh=False)
        words = [f"{name} {value:.3g}" for name, value in values.items()]
        self._bar.set_postfix_str(", ".join([*words, f"{speed:.1f} items/s"]))

    def say(self, text: str) -> None:
        """A line above the bar. That nobody can read it is no reason to end a run."""
        with contextlib.suppress(OSError):
            if self.wanted:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or "natcupy run" not in values:
            raise ValueError("it has no line 'natcupy run'")
        for part in ("config", "facts"):
            if not isinstance(values.get(part), dict):
                raise ValueError(f"it has no part {part!r}")
        return values
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise TrainError(f"{path} is not the record of a run ({error}). Restore it.") from None


def _differences(had: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} (was {before.get(name)!r}, now {now.get(name)!r})"
        for part in ("config", "facts")
        for before, now in ((had[part], wanted[part]),)
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
        and name not in RESTORED
        and (name != PICTURES or name in before)  # older runs did not keep it
    ]


def _writable(folder: Path) -> None:
    probe = folder / f".{uuid4().hex}.probe"
    try:
        probe.write_bytes(b"natcupy")
        probe.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True) if folder.is_dir() else None
        raise TrainError(
            f"the output {folder} cannot be written to: {error.strerror or error}. Choose another."
        ) from None
