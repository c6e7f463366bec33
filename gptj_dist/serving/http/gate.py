"""Refuses new requests with a 503 once the server stops, and lets running requests finish."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from gptj_dist.errors import NotReadyError
from gptj_dist.serving.http.endpoint import refusal

STOPPING = NotReadyError("this server is stopping; try again later, or ask another one")


class Gate:
    """Counts the running requests of the endpoints that it guards. Once closed, it stays closed."""

    def __init__(self) -> None:
        self._num_under_way = 0
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def guard(self, app: ASGIApp) -> ASGIApp:
        """Wraps an endpoint, so that it refuses requests while the gate is closed."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if self._is_closed:
                await refusal(STOPPING)(scope, receive, send)
                return
            self._num_under_way += 1
            self._is_idle.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._num_under_way -= 1
                if not self._num_under_way:
                    self._is_idle.set()

        return guarded

    async def close(self, timeout_s: float) -> int:
        """Refuses new requests, and waits until running ones are answered. Returns the number left at the time limit.

        May be called again; the gate stays closed.
        """
        self._is_closed = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        return self._num_under_way
