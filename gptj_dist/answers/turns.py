"""Spreads what is ready at the same time over turns of the event loop. Stdlib only."""

from __future__ import annotations

import asyncio


class Turns:
    """Lets one caller go on in a turn of the loop, first come, first served."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def next(self) -> None:
        """Returns in a later turn of the loop."""
        async with self._lock:
            await asyncio.sleep(0)
