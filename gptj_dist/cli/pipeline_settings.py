"""Gives verbs the options that set a pipeline, so that each option is declared once.

A verb with a parameter `settings` takes the options that its decorator names in its place, and gets their values as
`PipelineConfig` and `LLM` want them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from gptj_dist.cli import options
from gptj_dist.config import PipelineConfig

Settings: TypeAlias = dict[str, Any]
"""Fields of `PipelineConfig`."""

OPTIONS: dict[str, Any] = {
    "stages": options.Stages,
    "layers": options.Layers,
    "device": options.Device,
    "dtype": options.DType,
    "threads_per_stage": options.ThreadsPerStage,
    "cpus_per_stage": options.CPUsPerStage,
    "gpus_per_stage": options.GPUsPerStage,
    "max_model_len": options.MaxModelLen,
    "kv_cache_gb": options.KVCacheGB,
    "max_batch_size": options.MaxBatchSize,
    "max_queued_requests": options.MaxQueuedRequests,
    "generation_config": options.GenerationConfig,
    "revision": options.Revision,
}
"""What the command line calls the fields, by their names."""

PARSERS: dict[str, Callable[[Any], Any]] = {
    "layers": options.parse_layers,
    "kv_cache_gb": options.parse_kv_cache_gb,
}
"""For fields whose option is a text."""

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PipelineConfig)} | {"kv_cache_gb": "auto"}


def takes_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces the parameter `settings` of a verb by the options of these names."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def called(**given: Any) -> None:
            settings = {name: PARSERS.get(name, _as_given)(given.pop(name)) for name in names}
            verb(**given, settings=settings)

        called.__signature__ = _with_options(verb, names)  # type: ignore[attr-defined]
        return called

    return decorate


def _with_options(verb: Callable[..., None], names: tuple[str, ...]) -> inspect.Signature:
    """The signature that typer reads the options from."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        if parameter.name == "settings":
            parameters += [
                inspect.Parameter(name, parameter.kind, default=_DEFAULTS[name], annotation=OPTIONS[name])
                for name in names
            ]
        else:
            parameters.append(parameter)
    return inspect.Signature(parameters)


def _as_given(value: Any) -> Any:
    return value
