"""Checks the values of a dataclass's fields against their annotations. Stdlib only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from gptj_dist.errors import excerpt

Fits: TypeAlias = Callable[[object], bool]
"""Whether a value is of some type."""


def type_problems(instance: object) -> Iterator[tuple[str, str]]:
    """Name and problem of each field whose value is not of the field's type, such as `must be int, got 'x'`.

    A whole number is a float, too; true and false are no numbers.

    Args:
        instance: of a dataclass without slots, whose fields are classes, literals, tuples of them, or unions of those.
    """
    kind: Any = type(instance)
    values = vars(instance)
    for name, (words, fits) in _field_types(kind).items():
        if not fits(values[name]):
            yield name, f"must be {words}, got {excerpt(values[name])}"


@cache
def _field_types(kind: Any) -> Mapping[str, tuple[str, Fits]]:
    """Of each field, its type in words and the check."""
    hints = get_type_hints(kind)
    return {
        field.name: (_in_words(str(field.type), hints[field.name]), _fits(hints[field.name])) for field in fields(kind)
    }


def _in_words(annotation: str, hint: Any) -> str:
    return " or ".join(map(repr, get_args(hint))) if get_origin(hint) is Literal else annotation


def _fits(hint: Any) -> Fits:
    """The check for a type hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType or origin is Union:
        return _fits_union(args)
    if origin is Literal:
        return lambda value: value in args
    if origin is tuple:
        return _fits_tuple(args)
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return lambda value: isinstance(value, float | int) and not isinstance(value, bool)
    return lambda value: isinstance(value, hint)


def _fits_union(args: tuple[Any, ...]) -> Fits:
    first, *others = map(_fits, args)
    return lambda value: first(value) or any(fits(value) for fits in others)


def _fits_tuple(args: tuple[Any, ...]) -> Fits:
    """For `tuple[x, y]`, and for `tuple[x, ...]`."""
    if args[-1] is ...:
        element = _fits(args[0])
        return lambda value: isinstance(value, tuple) and all(map(element, value))
    elements = tuple(map(_fits, args))
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(elements)
        and all(fits(item) for fits, item in zip(elements, value, strict=True))
    )
