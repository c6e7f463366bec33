"""An HTTP server with the responses that a test defines. It records the requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """A request that the server received."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(self.body)
        return fields


@dataclass(frozen=True, slots=True)
class Reply:
    """A response.

    Args:
        body: bytes, or a value to send as JSON.
        parts: pieces of a body that are sent one by one, in place of `body`.
    """

    status: int = 200
    body: object = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    parts: Iterable[bytes] | None = None


@dataclass(slots=True)
class FakeServer:
    """A running server.

    Args:
        base: its URL.
        calls: the requests that it received, in order.
        num_broken_off: responses whose client disconnected.
    """

    base: str
    calls: list[Call] = field(default_factory=list)
    num_broken_off: int = 0


def refused(status: int, message: str, param: str | None = None, **headers: str) -> Reply:
    """An error response in OpenAI's format."""
    error = {"message": message, "type": "some_error", "param": param, "code": None}
    return Reply(status, {"error": error}, {name.replace("_", "-"): value for name, value in headers.items()})


def events(*chunks: object, is_whole: bool = True) -> Reply:
    """A response that streams server-sent events; with `is_whole`, `[DONE]` ends it."""
    parts = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
    return Reply(200, parts=[*parts, *([b"data: [DONE]\n\n"] if is_whole else [])])


@contextmanager
def fake_server(answer: Callable[[Call], Reply]) -> Iterator[FakeServer]:
    """Runs a server on a free port until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            call = Call(self.command, self.path, dict(self.headers), body)
            server.calls.append(call)
            reply = answer(call)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for part in _parts(reply):
                    self.wfile.write(part)
                    self.wfile.flush()
            except (BrokenPipeError, ConnectionResetError):
                server.num_broken_off += 1

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = FakeServer(f"http://127.0.0.1:{listener.server_port}")
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def _parts(reply: Reply) -> Iterable[bytes]:
    if reply.parts is not None:
        return reply.parts
    return [reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()]
