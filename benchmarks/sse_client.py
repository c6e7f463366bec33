"""One streamed completion over a bare socket. A client library would take CPU time from the server under measurement.

All frames are counted and timed, but only the last one with data is parsed: it has the number of tokens, as a frame can
carry several.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

READ_BYTES = 65536
COMPLETIONS = "/v1/completions"


class StreamError(Exception):
    """A completion was refused or broke off."""


@dataclass(slots=True)
class StreamRecord:
    """Arrival times of one completion's frames, on the clock of `time.perf_counter`.

    Args:
        begin_s: time before the connection is made.
        frame_s: arrival of each frame with text, in order.
        num_tokens: output tokens, counted by the server.
        error: reason of a failure; None without one.
    """

    begin_s: float
    num_input_tokens: int
    frame_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None


class ChunkedBody:
    """Decodes a body in HTTP's chunked encoding (RFC 9112, section 7.1), in pieces of any length."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> bytes:
        """Takes received bytes; returns the part of the body that they complete."""
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
    """Splits a body into the data of its server-sent events."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, received: bytes) -> list[bytes]:
        """Takes a part of the body; returns the data of the events that it completes."""
        *frames, self._buffer = (self._buffer + received).split(b"\n\n")
        return [frame.partition(b"data:")[2].strip() for frame in frames if b"data:" in frame]


def completion_body(model: str, prompt_ids: list[int], max_tokens: int) -> bytes:
    """The body of a greedy streamed completion that does not end early."""
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


async def stream_completion(
    base: str,
    body: bytes,
    num_input_tokens: int,
    path: str = COMPLETIONS,
    take: Callable[[bytes], None] | None = None,
) -> StreamRecord:
    """Runs one completion to its end. Reports a failure in the record.

    Args:
        take: receives the data of each frame.
    """
    record = StreamRecord(time.perf_counter(), num_input_tokens)
    try:
        await _stream(base + path, body, record, take)
    except (OSError, EOFError, ValueError, StreamError) as error:
        record.error = f"{type(error).__name__}: {error}"
    return record


async def _stream(address: str, body: bytes, record: StreamRecord, take: Callable[[bytes], None] | None) -> None:
    url = urlsplit(address)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    try:
        await _read_frames(reader, record, take)
    finally:
        writer.close()


async def _read_frames(
    reader: asyncio.StreamReader, record: StreamRecord, take: Callable[[bytes], None] | None
) -> None:
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
            if take is not None:
                take(frame)
    raise StreamError("the stream ended without [DONE]")


def _take_usage(frame: dict[str, Any], record: StreamRecord) -> None:
    """Takes the number of tokens from the last frame before [DONE], and drops its arrival, as it has no text."""
    if not frame.get("usage"):
        raise StreamError("the server reported no number of tokens")
    record.num_tokens = frame["usage"]["completion_tokens"]
    record.frame_s.pop()
