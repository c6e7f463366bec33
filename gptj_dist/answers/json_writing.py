"""Writes large JSON documents in pieces, because the encoder holds Python's interpreter lock for a whole piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pydantic_core

from gptj_dist.json_types import JsonObject

PIECE_ELEMENTS = 4096
"""Numbers or strings of a list that are written at a time; objects are written one by one."""


def json_bytes(document: JsonObject) -> bytes:
    """The document as UTF-8, without spaces."""
    fields = (pydantic_core.to_json(name) + b":" + _value(value) for name, value in document.items())
    return b"{" + b",".join(fields) + b"}"


def writing_cost(document: JsonObject) -> int:
    """An estimate of the microseconds that writing takes, for `Work`."""
    return sum(len(value) for value in document.values() if isinstance(value, list))


def _value(value: Any) -> bytes:
    if not isinstance(value, list):
        return pydantic_core.to_json(value)
    return b"[" + b",".join(_pieces(value)) + b"]"


def _pieces(elements: Sequence[Any]) -> Iterator[bytes]:
    size = 1 if elements and isinstance(elements[0], dict) else PIECE_ELEMENTS
    for begin in range(0, len(elements), size):
        yield pydantic_core.to_json(elements[begin : begin + size])[1:-1]
