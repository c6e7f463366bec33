"""Writes large JSON documents in pieces, because the encoder holds Python's interpreter lock for a whole piece.

An iterator in a document is written as a list. Each of its elements is freed before the next one is made: to free a
million objects at once holds the lock, too.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    return b"".join(_pieces(value))  # once, as only this call lets other threads run while it copies


def _pieces(value: Any) -> Iterator[bytes]:
    match value:
        case dict():
            yield b"{"
            for number, (name, field) in enumerate(value.items()):
                yield (b"," if number else b"") + pydantic_core.to_json(name) + b":"
                yield from _pieces(field)
            yield b"}"
        case list():
            size = 1 if value and isinstance(value[0], dict) else PIECE_ELEMENTS
            yield b"["
            for begin in range(0, len(value), size):
                yield (b"," if begin else b"") + pydantic_core.to_json(value[begin : begin + size])[1:-1]
            yield b"]"
        case str():
            yield b'"'
            for begin in range(0, len(value), PIECE_CHARS):
                yield pydantic_core.to_json(value[begin : begin + PIECE_CHARS])[1:-1]
            yield b'"'
        case Iterator():
            yield b"["
            for number, element in enumerate(value):
                yield b"," if number else b""
                yield from _pieces(element)
            yield b"]"
        case _:
            yield pydantic_core.to_json(value)


def writing_cost(document: JsonObject) -> int:
    """An estimate of the microseconds that writing takes, for `Work`."""
    lists = sum(len(value) for value in document.values() if isinstance(value, list))
    return lists + sum(len(value) for value in document.values() if isinstance(value, str)) // CHARS_PER_US
