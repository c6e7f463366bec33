"""Adapters by the names that requests call them by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptj_dist.errors import InvalidRequestError, excerpt
from gptj_dist.params import AdapterSource, SamplingParams


def with_sources(params: SamplingParams, sources: Mapping[str, AdapterSource]) -> SamplingParams:
    """The parameters, with the sources of their adapters.

    Raises:
        InvalidRequestError: no adapter of that name is loaded.
    """
    if not params.adapters:
        return params
    for choice in params.adapters:
        if choice.name not in sources:
            loaded = ", ".join(map(repr, sorted(sources))) or "none"
            raise InvalidRequestError(
                f"no adapter {excerpt(choice.name)} is loaded; there is {loaded}"[:2000], "adapters"
            )
    return replace(params, adapters=tuple(replace(choice, source=sources[choice.name]) for choice in params.adapters))
