"""Cutting: taps into chunks, axes into parts, parts into phases that may run at once.

In: plain numbers. Out: plain numbers.
"""

from __future__ import annotations

import functools

# Phases before and after that of a part, as bits.
EARLIER, LATER = 1, 2


def lane_cases(size: int) -> list[tuple[int, int]]:
    """Every (first lane, end lane) that a run in a group of `size` lanes can have."""
    return [(a, b) for a in range(size) for b in range(a + 1, size + 1)]


@functools.cache
def cover(count: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """`count` taps as chunks (first tap, index into `sizes`) with the least work.

    The last chunk ends with the last tap, and may share taps with the one before. Only where even
    the smallest size is larger than `count` it reaches beyond.
    """
    if count == 0:
        return []
    usable = [i for i, size in enumerate(sizes) if size <= max(count, min(sizes))]
    largest = max(usable, key=lambda i: sizes[i])
    chunks, at = [], 0
    while count - at > 4 * sizes[largest]:
        chunks.append((at, largest))
        at += sizes[largest]
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for rest in range(1, count - at + 1):
        options = []
        for i in usable:
            size = sizes[i]
            taps, parts, picks = best[max(0, rest - size)]
            options.append((taps + size, parts + 1, [*picks, i]))
        best[rest] = min(options)
    for i in best[count - at][2]:
        chunks.append((at, i))
        at += sizes[i]
    first, last = chunks[-1]
    chunks[-1] = max(0, min(first, count - sizes[last])), last
    return chunks


def end_of(chunks: list[tuple[int, int]], sizes: tuple[int, ...]) -> int:
    """One past the last tap of chunks."""
    return max((at + sizes[i] for at, i in chunks), default=0)


def cut(length: int, count: int, multiple: int) -> list[tuple[int, int]]:
    """`length` cut into at most `count` nearly equal parts whose starts are multiples."""
    step = -(-length // count)
    step = -(-step // multiple) * multiple
    return [(a, min(length, a + step)) for a in range(0, length, step)]


def even_parts(length: int, count: int) -> list[tuple[int, int]]:
    """`length` cut into `count` parts, none empty, whose sizes differ by at most one."""
    return [(i * length // count, (i + 1) * length // count) for i in range(count)]


def phases(parts, windows):
    """Give each part of the queries a phase, so that parts of one phase share no key.

    Yields (phase, first, end, others); `others` holds the spans of keys that parts of other phases
    sum into and that overlap with the part's own, each (first, end, EARLIER or LATER).
    """
    spans = [(windows[a][0], windows[b - 1][1]) for a, b in parts]
    found: list[int] = []
    for i, (low, high) in enumerate(spans):
        taken = {found[j] for j in range(i) if spans[j][0] < high and low < spans[j][1]}
        found.append(min(set(range(len(parts))) - taken))

    for i, (a, b) in enumerate(parts):
        others = [
            (*span, EARLIER if phase < found[i] else LATER)
            for span, phase in zip(spans, found, strict=True)
            if phase != found[i] and span[0] < spans[i][1] and spans[i][0] < span[1]
        ]
        yield found[i], a, b, others


def shared(parts, windows) -> set[int]:
    """Keys that several parts of the queries see."""
    once, more = set(), set()
    for a, b in parts:
        keys = set(range(windows[a][0], windows[b - 1][1]))
        more |= once & keys
        once |= keys
    return more


def summed_when(spans: list[tuple[int, int, int]], key: int) -> int:
    """In which other phases a key is summed into: 0, EARLIER, LATER, or the sum of both."""
    found = 0
    for first, end, when in spans:
        if first <= key < end:
            found |= when
    return found
