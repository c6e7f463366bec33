"""Reads server-sent events off a wire, however its bytes arrive. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def read_events(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each event that is complete; comments and other fields are skipped.

    Lines end in LF or CRLF. They are split before they are decoded, so that a character may arrive in two parts, and so
    that the line separators of Unicode count as text. Bytes that are not UTF-8 become U+FFFD.
    """
    buffer = b""
    data: list[bytes] = []
    for part in parts:
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            field, _, value = line.removesuffix(b"\r").partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif not field and not value and data:
                yield b"\n".join(data).decode(errors="replace")
                data = []
