"""The clock that plans are timed by, on the coordinator and on every stage."""

from __future__ import annotations

import time


class SteadyClock:
    """Nanoseconds since 1970 that never go back: the wall clock when the clock was made, and monotonic time since.

    Readings of one process differ by what really passed. Those of several machines can be compared as far as their wall
    clocks agreed when the clocks were made: with NTP to some milliseconds, without it not at all.
    """

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def __call__(self) -> int:
        return time.monotonic_ns() + self._offset_ns
