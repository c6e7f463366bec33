"""Keeps collections of garbage short, and memory small. Standard library only."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FULL_AFTER = 1000
"""Collections of younger objects before one of all objects. Python's 10 come within a burst of requests."""

PERIOD_S, MAX_PERIOD_S = 10.0, 300.0
"""Time between collections of all garbage, and at most, while they would hold up requests."""

MAX_BUSY, MAX_OBJECTS = 64, 30_000
"""Requests, and old objects, which take 2 ms to visit, and 60 ms to free if all are garbage. A stream has 440."""


@contextmanager
def paused() -> Iterator[None]:
    """Collects nothing within the context. For large imports: they make many objects, and hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
    """Collects all garbage again and again on the running event loop, but not while that would hold up requests.

    Connections leave objects in circles. Those of one that lived for some seconds are found only by full collections,
    and would pile up between the rare ones. To free those of 700 clients that left together takes 100 ms.
    """
    loop = asyncio.get_running_loop()
    last_s = loop.time()

    def collect() -> None:
        nonlocal last_s
        num, is_overdue = num_requests(), loop.time() - last_s >= MAX_PERIOD_S
        is_short = num <= MAX_BUSY and (is_overdue or len(gc.get_objects(generation=2)) <= MAX_OBJECTS)
        if not num or is_short:
            gc.collect()
            last_s = loop.time()
        loop.call_later(PERIOD_S, collect)

    loop.call_later(PERIOD_S, collect)
