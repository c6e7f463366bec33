"""A client's connection: limits on a request's head, which uvicorn's parser does not have. Knows no endpoint.

httptools joins the pieces of a header as they arrive, so an endless header takes time that grows with its square. These
limits hold before a request reaches the application, and so before a key is asked for. The application limits bodies as
it reads them, see `serving.http.body`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gptj_dist.answers.error_responses import error_body
from gptj_dist.answers.request_limits import (
    HEAD_TIMEOUT_S,
    KEEP_ALIVE_S,
    LINGER_S,
    MAX_CONNECTIONS,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED_REQUESTS,
    UNREAD_TIMEOUT_S,
)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a server takes of its clients. `answers.request_limits` says what the values mean."""

    connections: int = MAX_CONNECTIONS
    head_bytes: int = MAX_HEAD_BYTES
    headers: int = MAX_HEADERS
    pipelined_requests: int = MAX_PIPELINED_REQUESTS
    head_s: float = HEAD_TIMEOUT_S
    unread_s: float = UNREAD_TIMEOUT_S
    linger_s: float = LINGER_S
    keep_alive_s: int = KEEP_ALIVE_S


class LimitedConnection(HttpToolsProtocol):
    """uvicorn's protocol on httptools, which answers and closes a connection that exceeds a limit."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._is_in_head = True
        self._num_headers = 0
        # Bytes of the request that are not its body; in a chunked body each byte pays for one byte of framing.
        self._num_overhead_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(503, f"this server has {self._limits.connections} connections, its most; try again later")
        else:
            self._set_timer(self.timeout_keep_alive, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The client has sent bytes."""
        if self._is_in_head and not self._num_overhead_bytes and not self._is_refused:
            self._set_timer(self._limits.head_s, self._end_late_head)
        while data and not self._is_refused and not self.transport.is_closing():
            size = self._limits.head_bytes - self._num_overhead_bytes + 1 if self._is_in_head else len(data)
            self._num_overhead_bytes += len(data[:size])
            super().data_received(data[:size])
            data = data[size:]
            if self._num_overhead_bytes > self._limits.head_bytes:
                self._refuse(431, f"the request's headers have more than {self._limits.head_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser has read a header."""
        self._num_headers += 1
        if self._num_headers > self._limits.headers:
            self._refuse(431, f"the request has more than {self._limits.headers} headers")
            raise ValueError("too many headers")  # stops the parser
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The parser has read a head."""
        if len(self.pipeline) >= self._limits.pipelined_requests:
            self.transport.abort()
            raise ValueError("too many pipelined requests")
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0" and self.cycle is not None:
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[method-assign, assignment]

    def on_body(self, body: bytes) -> None:
        """The parser has read a part of a body."""
        self._num_overhead_bytes -= 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The parser has read a request."""
        self._is_in_head = True
        self._num_headers = self._num_overhead_bytes = 0
        self._stop_timer()
        if not self._is_answering:  # it refused the request before the end of the body
            self._set_timer(self.timeout_keep_alive, self.transport.close)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """The application has answered, perhaps without reading the body."""
        super().on_response_complete()
        if not self._is_in_head:
            self._set_timer(self._limits.linger_s, self.transport.close)

    def pause_writing(self) -> None:
        """The client does not read as fast as the application answers."""
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self._limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # uvicorn's words are for its log
        """The parser has failed: at bytes that are not HTTP, or because this class stopped it."""
        if not self._is_refused:
            self._refuse(400, "the bytes received are not a valid HTTP request")

    def _end_late_head(self) -> None:
        if self._is_answering:
            self._set_timer(self._limits.head_s, self._end_late_head)
        else:
            self._refuse(408, f"the request's headers did not arrive within {self._limits.head_s:g} seconds")

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str) -> None:
        """Answers in place of the application, and closes the connection once the client can have read the answer."""
        self._is_refused = True
        if self._is_answering:
            self.transport.abort()
            return
        self.transport.write(_response(status, message))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer(self._limits.linger_s, self.transport.close)

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _without_chunks(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """The sender of a response to HTTP/1.0, which has no chunks: a body of unknown length ends with the connection.

    uvicorn would send it in chunks. It compares a body without chunks to the length that it knows, so each part of the
    body is made the length before it is sent.
    """
    has_length = True

    async def send(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)

    return send


def _response(status: int, message: str) -> bytes:
    kind = "service_unavailable" if status == 503 else "invalid_request_error"
    body = json.dumps(error_body(message, kind)).encode()
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *(["retry-after: 5"] if status == 503 else []),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
