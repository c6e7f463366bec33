"""Lets requests through until the server stops: then new ones get a 503, and those under way may finish."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gptj_dist.answers.error_responses import error_response, response_headers
from gptj_dist.errors import NotReadyError

STOPPING = NotReadyError("this server is stopping; try again later, or ask another one")


class Gate:
    """Counts the requests under way at the endpoints that it guards, and closes once."""

    def __init__(self) -> None:
        self._num_under_way = 0
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def guard(self, app: ASGIApp) -> ASGIApp:
        """The endpoint, behind the gate."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if self._is_closed:
                status, body = error_response(STOPPING)
                await JSONResponse(body, status, response_headers(STOPPING))(scope, receive, send)
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
        """Refuses new requests. Returns when those under way are answered, or after the time: how many are left.

        May be called again; the gate stays closed.
        """
        self._is_closed = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            pass
        return self._num_under_way
