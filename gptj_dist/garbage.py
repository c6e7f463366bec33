"""Keeps collections of garbage short. Standard library only."""

from __future__ import annotations

import gc

FULL_AFTER = 1000
"""Collections of younger objects before one of all objects. Python's 10 come within a burst of requests."""


def settle() -> None:
    """Leaves all objects that live now out of collections, and makes collections of all later ones rare.

    To be called when a process has started. A full collection holds Python's interpreter lock while it visits every
    object: 40 to 100 ms for those of Ray's modules, and 200 ms for those of 1,000 streams. Objects in circles are rare
    here, and most of them die young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], FULL_AFTER)
