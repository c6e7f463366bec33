"""Serves HTTP in this process, because Serve's proxy would add a process to the path of every token."""

from __future__ import annotations

import functools
import logging
import resource
from dataclasses import dataclass, replace

import uvicorn
from starlette.types import ASGIApp

from gptj_dist.answers.request_limits import KEEP_ALIVE_S
from gptj_dist.errors import ConfigurationError, NotReadyError
from gptj_dist.serving.http.connection import ConnectionLimits, LimitedConnection
from gptj_dist.serving.sockets import listen_at
from gptj_dist.stages.background import run_in_background

RESERVED_FILES = 256
"""Files and sockets that this process opens for anything but clients."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen.

    Args:
        tls_cert, tls_key: files in PEM form; both or neither.
        keep_alive_s: seconds for which a connection without a request is kept.

    Raises:
        ConfigurationError: keep_alive_s is below 1.
    """

    host: str
    port: int
    tls_cert: str | None = None
    tls_key: str | None = None
    keep_alive_s: int = KEEP_ALIVE_S

    def __post_init__(self) -> None:
        if self.keep_alive_s < 1:
            raise ConfigurationError(f"keep_alive_s must be at least 1, got {self.keep_alive_s}")


class Listener:
    """An HTTP server on the running event loop.

    Args:
        drain_s: seconds that running answers may take after `close`.
        limits: of connections; the process's own limit of open files lowers their number.

    Raises:
        OSError: the server cannot listen at the address, or cannot use the certificate or its key.
    """

    def __init__(self, app: ASGIApp, address: Address, drain_s: float, limits: ConnectionLimits | None = None) -> None:
        listening = listen_at(address.host, address.port)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # errors are logged where they occur
        limits = limits or _default_limits(address.keep_alive_s)
        config = uvicorn.Config(
            app,
            http=functools.partial(LimitedConnection, limits=limits),  # type: ignore[arg-type]
            timeout_keep_alive=limits.keep_alive_s,
            ws="none",
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
        self._failure: Exception | None = None
        self._task = run_in_background("HTTP server", self._server.serve(sockets=[listening]), self._note_end)

    def check_health(self) -> None:
        """Raises NotReadyError if the server has ended without `close`."""
        if self._failure is not None and not self._server.should_exit:
            raise NotReadyError(f"the HTTP server has ended: {self._failure}")

    async def close(self) -> None:
        """Refuses new requests, and returns when running ones are answered."""
        self._server.should_exit = True
        await self._task

    def _note_end(self, error: Exception) -> None:
        self._failure = error


def _default_limits(keep_alive_s: int) -> ConnectionLimits:
    """The default `ConnectionLimits`, with fewer connections if the process may open fewer files."""
    limits = ConnectionLimits(keep_alive_s=keep_alive_s)
    most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files == resource.RLIM_INFINITY:
        return limits
    return replace(limits, connections=max(1, min(limits.connections, most_files - RESERVED_FILES)))
