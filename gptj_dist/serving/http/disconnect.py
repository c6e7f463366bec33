"""Ends the work for a client that has left. Starlette does so only for a response that is being streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499
"""Status of such a request in logs and metrics, the same as nginx uses. No client receives it."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Returns the result of `work`. If the client disconnects first, cancels `work` and waits for its end.

    Args:
        request: its body has been read.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    working, going = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, going), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        going.cancel()
        await asyncio.gather(working, going, return_exceptions=True)
        del working, going  # a failed task, its error, the traceback and this frame would be a circle


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
