"""Hostile texts, numbers, JSON values and bytes, for the cases of all targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

TEXTS = (
    "",
    "a",
    "a\nb\r\nc\rd",
    "\0",
    "\u2028\u2029\u0085\x0b\x0c\x1c",
    "\ud800",
    "\udfff\ud800",
    "\ufeff\ufffe",
    "\U0001f600é\u0301",
    "data: x\n\ndata: [DONE]\n\n",
    ": x\nevent: y\nid: \0\nretry: 1\n",
    "\x1b]0;x\x07\x1b[2J",
    "../../x",
    "{{ 7 * 7 }}{% raw %}",
    "<|endoftext|>",
    "a" * 5000,
    "\u202e" * 300,
)
INTEGERS = (0, 1, 2, -1, 7, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, 2**64, -(2**64), 10**400)
MANY_DIGITS = 5000
FLOATS = (0.5, 1.0, -0.0, 1e-308, 1e308, float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True, slots=True)
class Target:
    """A part of the program, and what is done to it.

    Args:
        cases: one of them is an argument of `check`.
        check: raises an error if the part does something else than its description allows.
        share: of all cases, relative to the other targets.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    share: int


@cache
def texts() -> SearchStrategy[str]:
    """With lone surrogates."""
    return st.sampled_from(TEXTS) | st.text(st.characters(), max_size=8)


@cache
def numbers() -> SearchStrategy[int | float]:
    """Also one of so many digits that Python does not write it."""
    endless = st.just(MANY_DIGITS).map(lambda digits: int(10**digits))
    return st.sampled_from(INTEGERS) | st.sampled_from(FLOATS) | st.integers(-3, 300) | endless


@cache
def values() -> SearchStrategy[Any]:
    """JSON, with NaN and infinity, now and then nested hundreds of levels deep."""
    leaves = st.none() | st.booleans() | numbers() | texts()
    trees = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(), inner, max_size=3), max_leaves=6
    )
    deep = st.tuples(st.sampled_from((90, 900, 3000)), st.booleans()).map(lambda form: _nested(*form))
    return st.one_of(trees, trees, trees, trees, trees, trees, deep)


def _nested(depth: int, is_list: bool) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if is_list else {"a": value}
    return value


def to_json(value: Any) -> bytes:
    """Also of what `json` refuses: numbers of thousands of digits, and depths beyond Python's."""
    match value:
        case bool() | None | float() | str():
            return json.dumps(value).encode()
        case int():
            return _digits(value)
    opened = bytearray()
    closed = bytearray()
    while isinstance(value, list) and len(value) == 1:
        opened += b"["
        closed += b"]"
        value = value[0]
    while isinstance(value, dict) and list(value) == ["a"]:
        opened += b'{"a":'
        closed += b"}"
        value = value["a"]
    if isinstance(value, list):
        inner = b"[" + b",".join(map(to_json, value)) + b"]"
    elif isinstance(value, dict):
        inner = b"{" + b",".join(to_json(name) + b":" + to_json(each) for name, each in value.items()) + b"}"
    else:
        inner = to_json(value)
    return bytes(opened) + inner + bytes(closed[::-1])


def _digits(value: int) -> bytes:
    return b"1" + b"0" * MANY_DIGITS if value == 10**MANY_DIGITS else str(value).encode()


def change(draw: DrawFn, good: Mapping[str, Any], names: Sequence[str], others: SearchStrategy[Any]) -> dict[str, Any]:
    """A good object with up to four fields set, replaced or removed.

    Args:
        names: of fields that mean something.
        others: their values, besides hostile ones.
    """
    fields = dict(good)
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(names) | st.sampled_from(names) | texts())
        if draw(st.integers(0, 7)) == 0:
            fields.pop(name, None)
        else:
            fields[name] = draw(others | others | values())
    return fields


def damage(draw: DrawFn, data: bytes) -> bytes:
    """The bytes as they are, in three of four cases; else cut, repeated or with bytes inserted."""
    if draw(st.integers(0, 3)):
        return data
    at = draw(st.integers(0, len(data)))
    match draw(st.integers(0, 2)):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + draw(st.binary(max_size=8)) + data[at:]
        case _:
            return data[:at] + data[draw(st.integers(0, len(data))) :]


changed = st.composite(change)


def cut(data: bytes, size: int) -> list[bytes]:
    """The data in pieces of `size` bytes."""
    return [data[i : i + size] for i in range(0, len(data), size)]
