"""Where the CPU time of requests is spent, so that none holds up the others. Knows no requests.

Every stream of an ingress shares one event loop. Short work runs on it, one request in a turn of the loop; work that
takes longer than handing it to a thread runs in threads. What runs there must release Python's interpreter lock every
few milliseconds: Python code does, a call of a C function only if it says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from gptj_dist.answers.threads import Threads

T = TypeVar("T")

INLINE_COST = 4096
"""Work of a higher cost runs in a thread. A cost is about the microseconds that the work takes."""

NUM_THREADS = 2


class Turns:
    """Lets one caller go on in a turn of the event loop, first come, first served."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def next(self) -> None:
        """Returns in a later turn of the loop."""
        async with self._lock:
            await asyncio.sleep(0)


class Work:
    """Runs functions on the event loop, or in a thread if their cost is high.

    Attributes:
        turns: in which requests begin.
    """

    def __init__(self) -> None:
        self._threads = Threads(NUM_THREADS, "work")
        self.turns = Turns()

    async def run(self, cost: int, function: Callable[[], T]) -> T:
        """Returns or raises what the function does.

        Args:
            cost: an estimate of its microseconds.
        """
        return function() if cost <= INLINE_COST else await self._threads.run(function)
