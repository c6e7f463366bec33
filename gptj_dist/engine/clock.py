"""The clock of the coordinator and of every stage."""

from __future__ import annotations

import time


class SteadyClock:
    """Nanoseconds since 1970 that never go back: the wall clock when the clock was made, and monotonic time since.

    Differences between readings of one process are exact. Readings of different machines are off by as much as their
    wall clocks were when the clocks were made: some milliseconds with NTP, anything without it.
    """

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def __call__(self) -> int:
        return time.monotonic_ns() + self._offset_ns
