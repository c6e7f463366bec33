"""Reads the body of a request within limits of size and time, whether uvicorn or Serve's proxy delivers it."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from gptj_dist.answers.error_responses import BodyTooLargeError, UnsupportedEncodingError
from gptj_dist.answers.request_limits import BODY_TIMEOUT_S, MAX_BODY_BYTES, MIN_BODY_BYTES_PER_S
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


async def read_body(request: Request, work: Work, limits: BodyLimits = BodyLimits()) -> bytes:  # frozen
    """The whole body.

    Args:
        work: unpacks a compressed body.

    Raises:
        BodyTooLargeError: it is larger than the limit, by its header or by count.
        TimeoutReachedError: it arrives too slowly.
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
    body = bytearray()
    begin_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(limits.timeout_s) as timeout:
            async for part in request.stream():
                body += part
                if len(body) > limits.most_bytes:
                    raise _too_large(limits)
                timeout.reschedule(begin_s + limits.timeout_s + len(body) / limits.min_bytes_per_s)
    except TimeoutError:
        message = f"the request's body did not arrive in time: {len(body)} bytes in {limits.timeout_s:g} seconds"
        raise TimeoutReachedError(message) from None
    if encoding == "identity":
        return bytes(body)
    cost = limits.most_bytes // UNPACKED_BYTES_PER_US
    return await work.run(cost, partial(_unpacked, bytes(body), encoding, limits))


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
