"""Histograms of durations. Plain data, so that they can cross process borders."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_NS = (
    *(round(mantissa * 10**exponent * 1e9) for exponent in range(-3, 3) for mantissa in (1, 1.5, 2, 3, 5, 7)),
    1000 * 10**9,
)
"""Upper bounds of the buckets, from a millisecond to 1,000 seconds; each is at most 1.7 times the one before."""


@dataclass(slots=True)
class Histogram:
    """Durations, counted by size.

    Attributes:
        counts: durations in each bucket, not cumulative; the last bucket has those above all bounds.
        sum_ns: the sum of all durations.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NS) + 1))
    sum_ns: int = 0

    def observe(self, duration_ns: int) -> None:
        self.counts[bisect_left(BOUNDS_NS, duration_ns)] += 1
        self.sum_ns += duration_ns
