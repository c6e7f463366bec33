"""A non-default value for every field of `SamplingParams`. A new field needs no change here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import Any

from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import AdapterChoice, Grammar, Pooling, SamplingParams

_CANDIDATES = (
    "salt",
    2,
    True,
    False,
    0.5,
    ("a", "b"),
    (3, 4),
    ((3, 0.5),),
    ((3, 4), (5,)),
    Pooling("last", 1),
    (AdapterChoice("poet", 0.5),),
    Grammar("regex", "[a-z]+"),
)

FIELD_NAMES = tuple(field.name for field in fields(SamplingParams))


def changed(name: str) -> dict[str, Any]:
    """Settings that give the field another value than its default."""
    for candidate in _CANDIDATES:
        settings: dict[str, Any] = {"max_tokens": 0} if isinstance(candidate, Pooling) else {}
        settings[name] = candidate
        with suppress(InvalidRequestError):
            if getattr(SamplingParams(**settings), name) != getattr(SamplingParams(), name):
                return settings
    raise AssertionError(f"add a valid value of {name} to the candidates")
