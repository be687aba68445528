"""Which of a model's classes each class of the data is.

In: the data's class names, the model's label names or their number, perhaps a file that maps them.
Out: an index per class of the data, and a sentence on how it was found.

Names are compared without regard to case, underscores and hyphens; a label with commas stands for
each of its names.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from natcupy.data import DataError

MAX_MAP_BYTES = 16 << 20
NONE = -1  # stands for the model's class of a class without pictures
IN_ORDER = (
    "no class name is one of the model's, so the classes in the data's order are taken as the "
    "model's classes 0, 1, ..."
)


def match(
    classes: Sequence[str],
    labels: Sequence[str] | None,
    num_classes: int,
    class_map: Path | None = None,
    empty: Collection[int] = (),
) -> tuple[list[int], str]:
    """The model's class for every class of the data, and how it was found.

    Args:
        classes: of the data, in its order (folders: sorted).
        labels: the model's, where its weights came with names.
        num_classes: of the model.
        class_map: a file that says it: JSON `{"folder": 3}`, or lines of folder, tab or comma,
            and class; a class is an index or one of the model's label names.
        empty: indices of the data's classes without pictures: they need no match and get `NONE`.

    Raises DataError where a class has no match.
    """
    known = _by_name(labels or ())
    filled = [index for index in range(len(classes)) if index not in empty]
    names = [classes[index] for index in filled]
    if class_map is not None:
        indices, how = _mapped(names, known, num_classes, class_map), f"classes by {class_map}"
    elif any(known.get(_plain(name)) is not None for name in names):
        indices, how = _named(names, known, num_classes), "classes matched by name"
    elif _are_numbers(names, num_classes):
        indices, how = list(map(int, names)), "class names taken as the model's class numbers"
        _refuse_twins(names, indices)
    elif len(classes) == num_classes:
        indices, how = filled, IN_ORDER
    else:
        raise _no_match(names, labels, num_classes)
    found = [NONE] * len(classes)
    for place, index in zip(filled, indices, strict=True):
        found[place] = index
    return found, how


def alike(classes: Sequence[str], labels: Sequence[str]) -> dict[int, int]:
    """The model's class of every class of the data that has a name of that one alone."""
    known = _by_name(labels)
    named = {place: known.get(_plain(name)) for place, name in enumerate(classes)}
    claims = Counter(named.values())
    return {place: i for place, i in named.items() if i is not None and claims[i] == 1}


def _named(names: Sequence[str], known: dict[str, int | None], num_classes: int) -> list[int]:
    found = [known.get(_plain(name)) for name in names]
    lost = [name for name, index in zip(names, found, strict=True) if index is None]
    if lost:
        raise DataError(
            f"every class of the data must be one of the model's {num_classes}, got {len(lost)} "
            f"of {len(names)} that are not: {', '.join(lost[:10])}. Rename them or say which "
            "they are with a class map."
        )
    _refuse_twins(names, found)
    return found


def _are_numbers(names: Sequence[str], num_classes: int) -> bool:
    """Whether all names are class numbers, with or without zeros in front."""
    return all(re.fullmatch(r"\d{1,6}", name) and int(name) < num_classes for name in names)


def _no_match(names: Sequence[str], labels: Sequence[str] | None, num_classes: int) -> DataError:
    return DataError(
        f"the data must have the model's classes, got {len(names)} ({', '.join(names[:5])}"
        f"{', ...' if len(names) > 5 else ''}) for a model with {num_classes}"
        f"{' (' + ', '.join(labels[:5]) + ', ...)' if labels else ''}. Say which is which with a "
        "class map (--class-map FILE): lines of folder, tab, class."
    )


def _by_name(labels: Sequence[str]) -> dict[str, int | None]:
    """Every name of a label to its index; None for a name that several labels have."""
    whole = {_plain(label): index for index, label in enumerate(labels)}
    found: dict[str, int | None] = {}
    for index, label in enumerate(labels):
        for name in {_plain(part) for part in label.split(",")}:
            found[name] = None if name in found else index
    twice = {p for p in map(_plain, labels) if sum(p == _plain(label) for label in labels) > 1}
    return {**found, **{name: i for name, i in whole.items() if name not in twice}}


def _plain(name: str) -> str:
    text = unicodedata.normalize("NFC", name).casefold()
    return " ".join(re.sub(r"[_-]", " ", text).split())


def _mapped(
    classes: Sequence[str], known: dict[str, int | None], num_classes: int, path: Path
) -> list[int]:
    entries = _read_map(path)
    found = []
    for name in classes:
        if name not in entries:
            raise DataError(f"{path} must name every class of the data, got none for {name}.")
        value = str(entries[name]).strip()
        index = known.get(_plain(value))
        if index is None and value.isdecimal():
            index = int(value)
        if index is None or index >= num_classes:
            raise DataError(
                f"{path} must give each class an index in 0..{num_classes - 1} or one of the "
                f"model's label names, got {value!r} for {name}."
            )
        found.append(index)
    return found


def _read_map(path: Path) -> dict[str, object]:
    if path.stat().st_size > MAX_MAP_BYTES:
        raise DataError(f"a class map must be at most {MAX_MAP_BYTES:,} bytes, got {path}.")
    try:
        text = path.read_text("utf-8-sig")
        if text.lstrip().startswith("{"):
            entries = json.loads(text)
        else:
            lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
            # A name may have commas where tabs part the columns.
            pairs = [line.split("\t" if "\t" in line else ",", maxsplit=1) for line in lines]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError("a line without tab or comma")
            entries = {name.strip(): value for name, value in pairs}
    except ValueError as error:
        raise DataError(
            f'{path} must be JSON {{"folder": class}} or lines of folder, tab or comma, class; '
            f"got {error}."
        ) from None
    return {unicodedata.normalize("NFC", str(name)): value for name, value in entries.items()}


def _refuse_twins(classes: Sequence[str], found: Sequence[int | None]) -> None:
    if len(set(found)) < len(found):
        twins = [n for n, index in zip(classes, found, strict=True) if found.count(index) > 1]
        raise DataError(
            "two classes of the data must not be the same class of the model, got "
            f"{', '.join(twins[:10])}. Merge the folders or use a class map."
        )
