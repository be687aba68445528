"""A table that is made in parts, by several processes, and survives being killed.

In: what the run is (its settings) and where the table goes. Out: parts, each complete or absent,
and in the end the table, complete or absent.

Beside `preds.csv` a folder `preds.csv.parts` holds the run's settings, and every finished part
under its number; a part appears by one rename. The process that sees all parts there puts them
together, in order, into a file in that folder, moves it to `preds.csv` by one rename, writes
`preds.csv.run.json` (the settings, and the pictures that could not be read), marks the folder as
joined and removes it. Whatever moment it is killed at, the next run finds out how far it came.
Several processes may work on one folder: what they write is determined by the settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from natcupy.hub.files import sync_folder, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SETTINGS, JOINED = "settings.json", "joined"
Bad = list[tuple[str, str]]


@dataclass(frozen=True)
class Run:
    """One table in the making.

    Attributes:
        out: the table.
        settings: everything that decides its content, as JSON values.
        count: how many parts it has.
        problems: (path, reason) of what could not be read before any part was begun.
    """

    out: Path
    settings: dict[str, Any]
    count: int
    problems: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.out.with_name(self.out.name + ".parts")

    @property
    def record(self) -> Path:
        """What is kept about the finished table."""
        return self.out.with_name(self.out.name + ".run.json")

    # -- beginning ---------------------------------------------------------------------------------

    def begin(self, resume: bool, overwrite: bool) -> bool:
        """Make the folder ready, or take up the one that is there; True if all is done already.

        Args:
            resume: go on with an unfinished run of the same settings, where there is one.
            overwrite: replace a finished table, and drop an unfinished run.

        Raises FileExistsError for a table or an unfinished run that may not be touched, ValueError
        where the settings of an unfinished run are others, OSError where nothing can be written.
        """
        if not self.out.parent.is_dir():
            raise FileNotFoundError(
                f"the output's folder must exist, got {self.out.parent}. Make it first."
            )
        if self.out.is_dir():
            raise IsADirectoryError(f"the output must be a file, got the folder {self.out}.")
        if self._is_left_over() or (overwrite and not resume):
            self._remove()
        if self.folder.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.folder} holds an unfinished run with {len(self.done()):,} of its parts "
                    "done. Go on with --resume (resume=True), or drop it with --overwrite."
                )
        elif self.out.exists() and not overwrite:
            return self._is_finished(resume)
        else:
            self._create()
        self.check()
        return False

    def _is_left_over(self) -> bool:
        """Whether the folder is one that was being removed when the process was killed."""
        if not self.folder.exists():
            return False
        return (self.folder / JOINED).exists() or not (self.folder / SETTINGS).exists()

    def _create(self) -> None:
        """Make the folder appear with the settings in it, unless another process just did."""
        draft = self.out.with_name(f"{self.folder.name}.{uuid4().hex}.tmp")
        try:
            draft.mkdir()
        except OSError as error:
            raise type(error)(
                f"nothing can be written to {self.out.parent}: {error.strerror or error}. Choose "
                "another output."
            ) from None
        try:
            text = json.dumps(self.settings, indent=1, ensure_ascii=False)
            with writing(self.folder):
                (draft / SETTINGS).write_text(text, "utf-8")
                draft.rename(self.folder)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not self.folder.exists():
                raise

    def check(self) -> None:
        """Raise ValueError where the folder's settings are not this run's."""
        theirs = _read_json(self.folder / SETTINGS)
        self._compare(theirs, f"the unfinished run in {self.folder}")

    def _is_finished(self, resume: bool) -> bool:
        """Whether the table that is there is this run's. Raises where it is not, or may not be."""
        if not resume:
            raise FileExistsError(
                f"{self.out} exists. Choose another output, or replace it with --overwrite."
            )
        if not self.record.exists():
            raise FileExistsError(
                f"{self.out} exists, and no {self.record.name} says which run it is of, so there "
                "is nothing to go on with. Replace it with --overwrite."
            )
        self._compare(_read_json(self.record)["settings"], f"the finished table {self.out}")
        return True

    def _compare(self, theirs: dict[str, Any], what: str) -> None:
        if theirs == self.settings:
            return
        names = [k for k in {**theirs, **self.settings} if theirs.get(k) != self.settings.get(k)]
        differ = ", ".join(f"{k} {theirs.get(k)!r} (here {self.settings.get(k)!r})" for k in names)
        raise ValueError(
            f"{what} must have been made with the same settings, got {differ}. Use those, another "
            "output, or --overwrite alone."
        )

    # -- parts -------------------------------------------------------------------------------------

    def done(self) -> set[int]:
        """The numbers of the parts that are complete."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return {int(e.name) for e in entries if e.name.isdecimal()}
        return set()

    def put(self, number: int, write: Callable[[IO[bytes]], Any], bad: Bad) -> None:
        """Make a part appear, complete; its bad pictures before it."""
        listed = self.folder / f"{number}.bad"
        if bad:
            text = json.dumps(bad, ensure_ascii=False)
            self._put(listed, lambda file: file.write(text.encode()))
        else:  # one that a failed run left names pictures that have been repaired since
            listed.unlink(missing_ok=True)
        self._put(self.folder / str(number), write)

    def _put(self, path: Path, write: Callable[[IO[bytes]], Any]) -> None:
        draft = self.folder / f".{path.name}.{uuid4().hex}.tmp"
        try:
            with open(draft, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise

    # -- end ---------------------------------------------------------------------------------------

    def finish(self, join: Callable[[Iterator[Path], IO[bytes]], Any]) -> bool:
        """Put the parts together if all are there; False while some are missing.

        Of several processes that come here at once, one does it and the others wait for it, or,
        where the system cannot lock, do the same.
        """
        try:
            with self._turn():
                if (self.folder / JOINED).exists():
                    return True  # another process was quicker
                if len(self.done()) < self.count:
                    return False
                self._join(join)
                self._remove()
        except FileNotFoundError:  # another process was quicker and has tidied up
            if not self.record.exists():
                raise
        return True

    def _join(self, join: Callable[[Iterator[Path], IO[bytes]], Any]) -> None:
        self._sweep()
        pieces = (self.folder / str(number) for number in range(self.count))
        self._put(self.out, lambda file: join(pieces, file))
        text = json.dumps({"settings": self.settings, "bad": self._bad()}, indent=1)
        self._put(self.record, lambda file: file.write(text.encode()))
        sync_folder(self.out.parent)
        self._put(self.folder / JOINED, lambda file: None)

    def _sweep(self) -> None:
        """Remove what a kill in `_create` left beside the folder; nobody creates it any more."""
        for path in self.out.parent.iterdir():
            if path.name.startswith(f"{self.folder.name}.") and path.name.endswith(".tmp"):
                shutil.rmtree(path, ignore_errors=True)

    def _bad(self) -> Bad:
        parts = (self.folder / f"{number}.bad" for number in range(self.count))
        listed = [tuple(entry) for part in parts if part.exists() for entry in _read_json(part)]
        return [*self.problems, *listed]

    def bad(self) -> Bad:
        """The pictures of the finished table that could not be read."""
        return [(where, reason) for where, reason in _read_json(self.record)["bad"]]

    def _remove(self) -> None:
        """Remove the folder; its mark last, so that a kill in between is understood."""
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            for path in self.folder.iterdir():
                if path.name != JOINED:
                    path.unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other process joins. The lock on the folder ends with the process."""
        if fcntl is None:
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network drives cannot
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        raise ValueError(
            f"{path} is damaged. Remove it and what it belongs to, and begin again."
        ) from None
