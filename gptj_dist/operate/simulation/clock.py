"""A virtual clock, and a processor that does one thing after the other on it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count


class Clock:
    """Runs what is due, in the order of time; what is due at the same time, in the order in which it was asked for.

    Attributes:
        now_s: seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, due_s: float, action: Callable[[], None]) -> None:
        """Has `action` called at a time that is not past."""
        heapq.heappush(self._due, (max(due_s, self.now_s), next(self._numbers), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Has `action` called after a delay."""
        self.at(self.now_s + delay_s, action)

    def run(self, until_s: float = float("inf")) -> None:
        """Runs what is due before a time; returns when nothing is left."""
        while self._due and self._due[0][0] < until_s:
            self.now_s, _, action = heapq.heappop(self._due)
            action()


class Processor:
    """One thread of a process: it does what comes in the order in which it comes.

    Attributes:
        busy_s: seconds for which it has worked, or will.
        free_s: time from which it has nothing more to do.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: deque[Callable[[], None]] = deque()
        self.busy_s = 0.0
        self.free_s = 0.0

    def when_free(self, action: Callable[[], None]) -> None:
        """Calls `action` as soon as all earlier work is done: now, or at a later time.

        The action adds what it takes with `work`.
        """
        if self._waiting or self.free_s > self._clock.now_s:
            self._waiting.append(action)
            if len(self._waiting) == 1:
                self._clock.at(self.free_s, self._go_on)
        else:
            action()

    def work(self, seconds: float) -> float:
        """Adds work; returns the time at which it is done."""
        self.busy_s += seconds
        self.free_s = max(self.free_s, self._clock.now_s) + seconds
        return self.free_s

    def _go_on(self) -> None:
        while self._waiting and self.free_s <= self._clock.now_s:
            action = self._waiting[0]
            action()
            self._waiting.popleft()
        if self._waiting:
            self._clock.at(self.free_s, self._go_on)
