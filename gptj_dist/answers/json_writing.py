"""Writes large JSON documents in pieces, because the encoder holds Python's interpreter lock for a whole piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pydantic_core

from gptj_dist.json_types import JsonObject

PIECE_ELEMENTS = 4096
"""Numbers or strings of a list that are written at a time; objects are written one by one."""

PIECE_CHARS = 1 << 20
"""Characters of a text that are written at a time."""

CHARS_PER_US = 256
"""Characters that are written in a microsecond."""


def json_bytes(value: Any) -> bytes:
    """A JSON value as UTF-8, without spaces."""
    if isinstance(value, dict):
        fields = (pydantic_core.to_json(name) + b":" + json_bytes(field) for name, field in value.items())
        return b"{" + b",".join(fields) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(_elements(value)) + b"]"
    if isinstance(value, str):
        pieces = (value[begin : begin + PIECE_CHARS] for begin in range(0, len(value), PIECE_CHARS))
        return b'"' + b"".join(pydantic_core.to_json(piece)[1:-1] for piece in pieces) + b'"'
    return pydantic_core.to_json(value)


def writing_cost(document: JsonObject) -> int:
    """An estimate of the microseconds that writing takes, for `Work`."""
    lists = sum(len(value) for value in document.values() if isinstance(value, list))
    return lists + sum(len(value) for value in document.values() if isinstance(value, str)) // CHARS_PER_US


def _elements(elements: Sequence[Any]) -> Iterator[bytes]:
    size = 1 if elements and isinstance(elements[0], dict) else PIECE_ELEMENTS
    for begin in range(0, len(elements), size):
        yield pydantic_core.to_json(elements[begin : begin + size])[1:-1]
