"""Server-sent events: a JSON value as a frame of bytes. Does not know what the value means."""

from __future__ import annotations

import json

SSE_DONE = b"data: [DONE]\n\n"

# Escaped to ASCII, because clients that cut a stream with `str.splitlines` also cut at U+0085, U+2028 and U+2029.
_encode = json.JSONEncoder(separators=(",", ":")).encode


def sse_frame(payload: object) -> bytes:
    """One event that carries `payload`, a JSON value."""
    return f"data: {_encode(payload)}\n\n".encode("ascii")


def sse_event(name: str, payload: object) -> bytes:
    """One event with a name, an ASCII word."""
    return f"event: {name}\n".encode("ascii") + sse_frame(payload)
