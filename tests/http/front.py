"""A server that refuses its first requests and then forwards to another server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from gptj_dist.answers.error_responses import error_response, response_headers
from gptj_dist.errors import NotReadyError


@dataclass
class Front:
    """Answers `num_refusals` requests like a server whose model loads, and forwards later ones.

    Attributes:
        num_calls: requests received.
    """

    backend: str
    num_refusals: int
    num_calls: int = 0
    base: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        with self.lock:
            self.num_calls += 1
            is_refused = self.num_calls <= self.num_refusals
        if is_refused:
            error = NotReadyError("the model is still loading; try again shortly")
            status, refusal = error_response(error)
            retry_soon = dict.fromkeys(response_headers(error), "0.01")
            return status, json.dumps(refusal).encode(), retry_soon
        response = httpx.post(self.backend + path, content=body, headers=headers, timeout=60)
        kept = {name: value for name, value in response.headers.items() if name in ("x-should-retry", "retry-after")}
        return response.status_code, response.content, kept


@contextmanager
def fronted(backend: str, num_refusals: int) -> Iterator[Front]:
    """Runs a `Front` on a free port until the context ends."""
    front = Front(backend, num_refusals)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status, answer, headers = front.answer(
                self.path, body, {"authorization": self.headers["authorization"], "content-type": "application/json"}
            )
            self.send_response(status)
            for name, value in {**headers, "content-type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        front.base = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield front
        http.shutdown()
        thread.join()
