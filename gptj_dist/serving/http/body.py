"""Reads the body of a request within limits of size and time, whether uvicorn or Serve's proxy delivers it."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from gptj_dist.answers.error_responses import BodyTooLargeError, UnsupportedEncodingError
from gptj_dist.answers.request_limits import (
    BODY_TIMEOUT_S,
    MAX_BODIES_BYTES,
    MAX_BODY_BYTES,
    MIN_BODY_BYTES_PER_S,
)
from gptj_dist.answers.work import Work
from gptj_dist.errors import InvalidRequestError, TimeoutReachedError, excerpt

ENCODINGS = ("identity", "gzip", "x-gzip", "deflate")

UNPACKED_BYTES_PER_US = 200
"""Bytes that are unpacked in a microsecond."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What is read of a body. `answers.request_limits` says what the values mean."""

    most_bytes: int = MAX_BODY_BYTES
    timeout_s: float = BODY_TIMEOUT_S
    min_bytes_per_s: int = MIN_BODY_BYTES_PER_S


class BodyRoom:
    """Memory for the bodies that are being read.

    When they exceed it, the largest of them is given up: else bodies that never end would keep all others out.

    Args:
        most_bytes: of all together.
    """

    def __init__(self, most_bytes: int = MAX_BODIES_BYTES) -> None:
        self._most_bytes = most_bytes
        self._sizes: dict[asyncio.Timeout, int] = {}
        self._num_bytes = 0

    def __contains__(self, timeout: asyncio.Timeout) -> bool:
        return timeout in self._sizes

    def note(self, timeout: asyncio.Timeout, size: int) -> None:
        """Notes the bytes that a body has by now. The timeout ends its reading if it is given up."""
        self._num_bytes += size - self._sizes.get(timeout, 0)
        self._sizes[timeout] = size
        while self._num_bytes > self._most_bytes:
            largest = max(self._sizes, key=self._sizes.__getitem__)
            self.leave(largest)
            largest.reschedule(0.0)

    def leave(self, timeout: asyncio.Timeout) -> None:
        """A body is no longer read. A second call does nothing."""
        self._num_bytes -= self._sizes.pop(timeout, 0)


async def read_body(
    request: Request,
    work: Work,
    limits: BodyLimits = BodyLimits(),  # frozen
    room: BodyRoom | None = None,
) -> bytes:
    """The whole body.

    Args:
        work: unpacks a compressed body.
        room: that this body shares with others.

    Raises:
        BodyTooLargeError: it is larger than the limit, by its header or by count.
        TimeoutReachedError: it arrives too slowly, or is the largest when there is no room for all.
        UnsupportedEncodingError, InvalidRequestError: it is compressed in an unknown way, or not as its header says.
        ClientDisconnect: the client has gone.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ENCODINGS:
        raise UnsupportedEncodingError(
            f"content-encoding {excerpt(encoding)} is not supported: send the body as it is, or with gzip or deflate"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.most_bytes:
        raise _too_large(limits)
    body = await _received(request, limits, room or BodyRoom())
    if encoding == "identity":
        return bytes(body)
    cost = limits.most_bytes // UNPACKED_BYTES_PER_US
    return await work.run(cost, partial(_unpacked, bytes(body), encoding, limits))


async def _received(request: Request, limits: BodyLimits, room: BodyRoom) -> bytearray:
    body = bytearray()
    begin_s = asyncio.get_running_loop().time()
    timeout = asyncio.timeout(limits.timeout_s)
    room.note(timeout, 0)
    try:
        async with timeout:
            async for part in request.stream():
                body += part
                if len(body) > limits.most_bytes:
                    raise _too_large(limits)
                if timeout in room:
                    timeout.reschedule(begin_s + limits.timeout_s + len(body) / limits.min_bytes_per_s)
                    room.note(timeout, len(body))
    except TimeoutError:
        if timeout not in room:
            raise TimeoutReachedError(f"the server has no room for a body that is slow: {len(body)} bytes") from None
        message = f"the request's body did not arrive in time: {len(body)} bytes in {limits.timeout_s:g} seconds"
        raise TimeoutReachedError(message) from None
    finally:
        room.leave(timeout)
    return body


def _unpacked(body: bytes, encoding: str, limits: BodyLimits) -> bytes:
    """A compressed body in full; a small one that unpacks into a large one is not unpacked beyond the limit."""
    is_raw = encoding == "deflate" and body[:1] and body[0] & 0x0F != zlib.DEFLATED  # without zlib's header
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS if is_raw else zlib.MAX_WBITS | 32)
    try:
        unpacked = unpacker.decompress(body, limits.most_bytes + 1)
    except zlib.error:
        raise InvalidRequestError(f"the request's body is not {encoding}, as its content-encoding says") from None
    if len(unpacked) > limits.most_bytes:
        raise _too_large(limits)
    if not unpacker.eof or unpacker.unused_data:
        raise InvalidRequestError(f"the request's body is not whole {encoding} data, as its content-encoding says")
    return unpacked


def _too_large(limits: BodyLimits) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request's body has more than {limits.most_bytes} bytes")
