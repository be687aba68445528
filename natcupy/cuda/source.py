"""The text of a kernel: a `Spec` comes in, the complete CUDA C++ source goes out.

A spec names one file of `natcupy.kernels` and the constants it is compiled with. The text is a
prelude of `#define` lines, then the file, with each header pasted in where it is first included.
So the text alone decides the binary, and a cache keyed by it cannot miss an edited header.

Text that reaches a compiler is code. Therefore names follow a pattern, and values are bounded
integers or one of the few `WORDS`; everything else is refused before a character is written.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

WORDS = frozenset({"F16", "BF16", "F32", "F64"})  # element types, as kernels/*.cuh number them
LARGEST = 2**31 - 1

_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}\.cu")
_INCLUDE = re.compile(r"\s*#\s*include\b\s*(.*)")
_HEADER = re.compile(r'"([a-z][a-z0-9_]{0,63}\.cuh)"\s*(?://.*|/\*.*\*/\s*)?')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b.*")
_OPEN = re.compile(r"\s*#\s*if(?:n?def)?\b")
_CLOSE = re.compile(r"\s*#\s*endif\b")

_folder: Path | None = None  # None: the package's own kernels


@dataclass(frozen=True)
class Spec:
    """What decides a binary: a source file and its constants, in any order.

    The file's one entry point bears the file's name without the ending: "na_fwd.cu" holds
    `extern "C" __global__ void na_fwd(const Params p)`.
    """

    source: str
    constants: tuple[tuple[str, int | str], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not _FILE.fullmatch(self.source):
            raise ValueError(
                "a kernel source is a plain file name such as 'na_fwd.cu' "
                f"(lower case, digits, underscores), got {_short(self.source)}."
            )
        checked = tuple(sorted(_constant(name, value) for name, value in self.constants))
        names = [name for name, _ in checked]
        if len(set(names)) != len(names):
            raise ValueError(f"a constant is given once, got the names {names} for {self.source}.")
        object.__setattr__(self, "constants", checked)
        object.__setattr__(self, "_hash", hash((self.source, checked)))

    def __hash__(self) -> int:
        return self._hash  # computed once: a launch looks its spec up in a dict every time

    @property
    def entry(self) -> str:
        """The name of the kernel in the source."""
        return self.source[: -len(".cu")]

    def __str__(self) -> str:
        return f"{self.entry}({', '.join(f'{name}={value}' for name, value in self.constants)})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _constant(name: object, value: object) -> tuple[str, int | str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a constant's name is upper case, digits and underscores, got {_short(name)}."
        )
    if type(value) is str and value in WORDS:
        return name, value
    if type(value) in (int, bool) and -LARGEST <= value <= LARGEST:
        return name, int(value)
    raise ValueError(
        f"the constant {name} must be an int from {-LARGEST} to {LARGEST} "
        f"or one of {', '.join(sorted(WORDS))}, got {_short(value)}."
    )


def source_text(spec: Spec) -> str:
    """The complete source of `spec`: prelude, file and headers in one string.

    Raises FileNotFoundError for a file that is not there, ValueError for an include that cannot be
    pasted (a toolkit header, or an include inside a conditional).
    """
    prelude = [f"#define {name} {_literal(value)}" for name, value in spec.constants]
    return "\n".join([*prelude, *_paste(spec.source, set()), ""])


def _literal(value: int | str) -> str:
    return f"({value})" if isinstance(value, int) and value < 0 else str(value)


def _paste(name: str, seen: set[str]) -> Iterator[str]:
    """Lines of `name`, headers in place of their includes, `#line` around each change of file."""
    yield f'#line 1 "{name}"'
    depth = 0
    for number, line in enumerate(_read(name).splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include is None:
            depth += bool(_OPEN.match(line)) - bool(_CLOSE.match(line))
            yield "" if _ONCE.match(line) else line
            continue
        header = _HEADER.fullmatch(include[1])
        if header is None or depth:
            raise ValueError(
                'a kernel includes only headers beside it, as #include "name.cuh" outside any '
                f"conditional, got {line.strip()!r} in line {number} of {name}."
            )
        if header[1] not in seen:
            seen.add(header[1])
            yield from _paste(header[1], seen)
        yield f'#line {number + 1} "{name}"'


def _read(name: str) -> str:
    folder = _folder if _folder is not None else resources.files("natcupy.kernels")
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the kernel file {name} is not installed; reinstall natcupy."
        ) from None


@contextlib.contextmanager
def use_sources(folder: str | Path) -> Iterator[None]:
    """Take kernel files from `folder` inside the block, in every thread: a door for tests."""
    global _folder
    before, _folder = _folder, Path(folder)
    try:
        yield
    finally:
        _folder = before
