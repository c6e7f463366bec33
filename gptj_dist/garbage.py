"""Keeps collections of garbage short, and memory small. Standard library only."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

FULL_AFTER = 1000
"""Collections of younger objects before one of all objects. Python's 10 come within a burst of requests."""


PERIOD_S = 10.0
MAX_BUSY = 64
"""Requests whose objects a collection visits in a few milliseconds."""


def settle() -> None:
    """Leaves all objects that live now out of collections, and makes collections of all later ones rare.

    To be called when a process has started. A full collection holds Python's interpreter lock while it visits every
    object: 40 to 100 ms for those of Ray's modules, and 200 ms for those of 1,000 streams. Objects in circles are rare
    here, and most of them die young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_AFTER)


def collect_when_quiet(num_requests: Callable[[], int]) -> None:
    """Collects all garbage again and again on the running event loop, while the process has few requests.

    Connections leave objects in circles. Those of one that lived for some seconds are found only by full collections,
    and would pile up between the rare ones.
    """
    loop = asyncio.get_running_loop()

    def collect() -> None:
        if num_requests() <= MAX_BUSY:
            gc.collect()
        loop.call_later(PERIOD_S, collect)

    loop.call_later(PERIOD_S, collect)
