"""Refuses JSON that takes long to parse, by counting bytes. Knows no fields.

A parser holds Python's interpreter lock until it is done: half a second for a body of 4 MB. Counting takes a few
milliseconds. The parser itself limits the depth.
"""

from __future__ import annotations

import pydantic_core

from gptj_dist.answers.request_limits import MAX_JSON_CONTAINERS, MAX_JSON_STRINGS, MAX_JSON_VALUES
from gptj_dist.errors import InvalidRequestError

UNCHECKED_BYTES = 16_384
"""A shorter body parses in a few milliseconds, whatever it holds."""

_BEGINNING_BYTES = 4096
_NAME_CHARS = 80


def check_json(body: bytes) -> None:
    """Checks how many strings, lists, objects and elements of them a body has. Text within strings does not count.

    Args:
        body: UTF-8, valid JSON or not.

    Raises:
        InvalidRequestError: there are too many; `param` is the field that holds them, if that is known.
    """
    if len(body) <= UNCHECKED_BYTES:
        return
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    _check(unescaped.count(b'"') // 2, MAX_JSON_STRINGS, "strings", body)
    structure = b"".join(unescaped.split(b'"')[::2])
    _check(structure.count(b"[") + structure.count(b"{"), MAX_JSON_CONTAINERS, "lists and objects", body)
    _check(structure.count(b","), MAX_JSON_VALUES, "elements", body)


def _check(number: int, most: int, what: str, body: bytes) -> None:
    if number > most:
        field = _field_at_end(body[:_BEGINNING_BYTES])
        holder = "the body" if field is None else field
        message = f"{holder} is too long: the body has {number} {what}, and may have {most}"
        raise InvalidRequestError(message, field)


def _field_at_end(beginning: bytes) -> str | None:
    """The field whose value the beginning of a body breaks off in."""
    try:
        fields = pydantic_core.from_json(beginning, allow_partial=True)
    except ValueError:
        return None
    return list(fields)[-1][:_NAME_CHARS] if isinstance(fields, dict) and fields else None
