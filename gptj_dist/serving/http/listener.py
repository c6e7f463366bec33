"""HTTP straight to this process: Serve's proxy would be one more process on the way of every token."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from gptj_dist.serving.sockets import listen_at


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    Args:
        tls_cert, tls_key: files in PEM form; both or neither.
    """

    host: str
    port: int
    tls_cert: str | None = None
    tls_key: str | None = None


class Listener:
    """An HTTP server on the running event loop.

    Args:
        drain_s: how long answers under way may take after `close`.

    Raises:
        OSError: nobody can listen there, or the certificate or its key cannot be used.
    """

    def __init__(self, app: ASGIApp, address: Address, drain_s: float) -> None:
        listening = listen_at(address.host, address.port)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # whatever goes wrong is logged where it does
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(drain_s),
            ssl_certfile=address.tls_cert,
            ssl_keyfile=address.tls_key,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))

    async def close(self) -> None:
        """Takes no more requests, and returns when those under way are answered."""
        self._server.should_exit = True
        await self._task
