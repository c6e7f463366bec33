"""One streamed completion over a bare socket: on a machine of two cores a client library would be measured too.

Frames are counted and timed, but only the last with data is parsed: it says how many tokens came, as several can share
a frame.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

READ_BYTES = 65536


class StreamError(Exception):
    """A completion was refused or broke off; says how."""


@dataclass(slots=True)
class StreamRecord:
    """When the frames of one completion came.

    Args:
        begin_s: when it was sent, connecting included, on the clock of `time.perf_counter`.
        frame_s: when each frame with text came, first to last.
        num_tokens: of the output, as the server counts them.
        error: why it failed; None if it did not.
    """

    begin_s: float
    num_input_tokens: int
    frame_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


class ChunkedBody:
    """Takes a body of HTTP's chunked encoding apart (RFC 9112, section 7.1), however its bytes arrive."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> bytes:
        """What the bytes add to the body."""
        self._buffer += received
        return b"".join(self._whole_chunks())

    def _whole_chunks(self) -> Iterator[bytes]:
        while (end := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:end].partition(b";")[0], 16)
            begin = end + 2
            if len(self._buffer) < begin + size + 2:
                return
            yield self._buffer[begin : begin + size]
            self._buffer = self._buffer[begin + size + 2 :]


class FrameSplitter:
    """Cuts a body into the data of its server-sent events."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> list[bytes]:
        """The events that are complete with these bytes."""
        *frames, self._buffer = (self._buffer + received).split(b"\n\n")
        return [frame.partition(b"data:")[2].strip() for frame in frames if b"data:" in frame]


def completion_body(model: str, prompt_ids: list[int], max_tokens: int) -> bytes:
    """A greedy streamed completion that does not end early."""
    fields = {
        "model": model,
        "prompt": prompt_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(fields, separators=(",", ":")).encode()


async def stream_completion(base: str, body: bytes, num_input_tokens: int) -> StreamRecord:
    """Runs one completion to its end. A failure is in the record, as it is a figure of the load."""
    record = StreamRecord(time.perf_counter(), num_input_tokens)
    try:
        await _stream(base, body, record)
    except (OSError, EOFError, ValueError, StreamError) as error:
        record.error = f"{type(error).__name__}: {error}"
    return record


async def _stream(base: str, body: bytes, record: StreamRecord) -> None:
    url = urlsplit(base)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    try:
        await _read_frames(reader, record)
    finally:
        writer.close()


async def _read_frames(reader: asyncio.StreamReader, record: StreamRecord) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = head.partition(b"\r\n")[0].decode("latin-1")
    if " 200 " not in status:
        refusal = await reader.read(READ_BYTES)
        raise StreamError(f"{status}: {refusal[:200]!r}")
    chunked = ChunkedBody() if b"transfer-encoding: chunked" in head else None
    splitter = FrameSplitter()
    last = b""
    while received := await reader.read(READ_BYTES):
        now_s = time.perf_counter()
        for frame in splitter.feed(chunked.feed(received) if chunked else received):
            if frame == b"[DONE]":
                _take_usage(json.loads(last), record)
                return
            record.frame_s.append(now_s)
            last = frame
    raise StreamError("the stream ended without [DONE]")


def _take_usage(frame: dict[str, Any], record: StreamRecord) -> None:
    """The frame before the last has the number of tokens and no text, so it is no arrival of any."""
    if not frame.get("usage"):
        raise StreamError("the server did not say how many tokens there were")
    record.num_tokens = frame["usage"]["completion_tokens"]
    record.frame_s.pop()
