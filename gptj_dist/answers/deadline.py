"""The time by which a request has to be answered. Knows no request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from gptj_dist.errors import TimeoutReachedError

T = TypeVar("T")


class Deadline:
    """Begins when it is made, on a running event loop.

    Args:
        timeout_s: the request's own limit in seconds; None sets none.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    async def bound(self, work: Awaitable[T]) -> T:
        """Returns what `work` does; cancels it at the deadline. Raises TimeoutReachedError then."""
        if self._end_s is None:
            return await work
        timeout = asyncio.timeout_at(self._end_s)
        try:
            async with timeout:
                return await work
        except TimeoutError:
            if not timeout.expired():
                raise
            message = f"not done after timeout_s = {self._timeout_s:g} seconds"
            raise TimeoutReachedError(message, "timeout_s") from None

    async def until(self, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The items that come before the deadline. Raises TimeoutReachedError then."""
        async with aclosing(stream):
            while True:
                try:
                    item = await self.bound(anext(stream))
                except StopAsyncIteration:
                    return
                yield item
