"""Reads server-sent events off a wire, however its bytes arrive. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gptj_dist.errors import ServerError

MAX_EVENT_BYTES = 1 << 26
"""The last event of a response repeats its text and all log probabilities."""


def read_events(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each event that is complete; comments and other fields are skipped.

    Lines end in LF or CRLF. They are split before they are decoded, so that a character may arrive in two parts, and so
    that the line separators of Unicode count as text. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        ServerError: an event is too large.
    """
    line_parts: list[bytes] = []
    data: list[bytes] = []
    num_bytes = 0
    for part in parts:
        line_parts.append(part)
        num_bytes += len(part)
        if num_bytes > MAX_EVENT_BYTES:
            raise ServerError(f"the server streams an event of more than {MAX_EVENT_BYTES} bytes")
        if b"\n" not in part:
            continue
        *lines, rest = b"".join(line_parts).split(b"\n")
        line_parts = [rest]
        for line in lines:
            field, _, value = line.removesuffix(b"\r").partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif not field and not value and data:
                yield b"\n".join(data).decode(errors="replace")
                data = []
        num_bytes = len(rest) + sum(map(len, data))
