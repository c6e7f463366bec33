"""Sets of bytes of a file, as spans: the first byte, and the byte after the last. Stdlib only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same bytes in as few spans as possible, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def without(spans: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """The bytes of the first spans that are in none of the others, in order."""
    left: list[Span] = []
    taken = merged(others)
    first = 0
    for begin, end in merged(spans):
        while first < len(taken) and taken[first][1] <= begin:
            first += 1
        index = first
        while begin < end and index < len(taken) and taken[index][0] < end:
            if begin < taken[index][0]:
                left.append((begin, taken[index][0]))
            begin = max(begin, taken[index][1])
            index += 1
        if begin < end:
            left.append((begin, end))
    return left


def num_bytes(spans: Iterable[Span]) -> int:
    """Of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)
