"""What commands print: tables, JSON, small pictures made of blocks.

In: rows, values, pixels. Out: text. Nothing here knows models.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

import numpy as np

_BLOCKS = " ▀▄█"  # two pixels, one above the other, in one character
_PLAIN = " ':#"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    right = [
        all(isinstance(row[i], int | float) or _numeric(row[i]) for row in rows)
        for i in range(len(headings))
    ]
    lines = [headings, ["-" * width for width in widths], *cells]
    return "\n".join(_line(line, widths, right) for line in lines)


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in pairs)


def counted(count: int, thing: str, ending: str = "s") -> str:
    """A number of things: `1 picture`, `2,000 pictures`."""
    return f"{count:,} {thing}{'' if count == 1 else ending}"


def print_json(value: object) -> None:
    """One JSON document on stdout, in ASCII where its encoding lacks a letter.

    NaN and infinity, for which JSON has no word, are null.
    """
    value = _finite(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text if _can_print(text) else json.dumps(value, indent=2))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_bad(bad: Sequence[tuple[str, str]], limit: int = 20) -> None:
    """Name pictures that could not be read, and why, on stderr."""
    for where, reason in bad[:limit]:
        print(f"natcupy: error: {where}: {reason}", file=sys.stderr)
    if len(bad) > limit:
        print(f"natcupy: error: and {len(bad) - limit:,} more like these", file=sys.stderr)


def blocks(pixels: np.ndarray) -> list[str]:
    """A picture `[H, W]` with values in 0..1 as lines of characters, two rows of pixels a line."""
    ink = pixels > 0.45
    if len(ink) % 2:
        ink = np.pad(ink, ((0, 1), (0, 0)))
    codes = ink[0::2] + 2 * ink[1::2].astype(int)
    letters = _BLOCKS if _can_print(_BLOCKS) else _PLAIN
    return ["".join(letters[code] for code in row) for row in codes]


def beside(pictures: Sequence[Sequence[str]], gap: int = 3) -> str:
    """Blocks of lines of equal size, next to each other."""
    return "\n".join((" " * gap).join(lines).rstrip() for lines in zip(*pictures, strict=True))


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(cells, widths, right, strict=True)
    )
    return "  ".join(aligned).rstrip()


def _numeric(cell: object) -> bool:
    text = str(cell).rstrip(" %msMG").replace(",", "")
    return text in ("", "-") or text.replace(".", "", 1).isdecimal()


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
