"""Adapters by the names that requests call them by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.params import AdapterSource, SamplingParams

MAX_LISTED = 5
"""Names of adapters in a message."""


def listing(names: Iterable[str]) -> str:
    """The first names in alphabetical order, and the number of the others: `'a', 'b' and 2 more`; or `none`."""
    first = sorted(names)
    shown = ", ".join(f"{name!r:.80}" for name in first[:MAX_LISTED]) or "none"
    return shown if len(first) <= MAX_LISTED else f"{shown} and {len(first) - MAX_LISTED} more"


def with_sources(params: SamplingParams, sources: Mapping[str, AdapterSource]) -> SamplingParams:
    """The parameters, with the sources of their adapters.

    Raises:
        InvalidRequestError: no adapter of that name is loaded.
    """
    if not params.adapters:
        return params
    for choice in params.adapters:
        if choice.name not in sources:
            message = f"no adapter {excerpt(choice.name)} is loaded; there is {listing(sources)}"
            raise InvalidRequestError(message, "adapters")
    return replace(params, adapters=tuple(replace(choice, source=sources[choice.name]) for choice in params.adapters))
