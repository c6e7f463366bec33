"""HTTP straight to this process: Serve's proxy would be one more process on the way of every token."""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from starlette.types import ASGIApp


class Listener:
    """An HTTP server on the running event loop.

    Args:
        drain_s: how long answers under way may take after `close`.

    Raises:
        OSError: nobody can listen there.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, drain_s: float) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # whatever goes wrong is logged where it does
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=round(drain_s),
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))

    async def close(self) -> None:
        """Takes no more requests, and returns when those under way are answered."""
        self._server.should_exit = True
        await self._task
