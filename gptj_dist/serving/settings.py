"""The arguments of the Serve application, checked before anything is placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gptj_dist.config import PipelineConfig, refuse_unknown_keys
from gptj_dist.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What one Serve application serves.

    Args:
        pipeline: the settings of each of its pipelines.
        served_model_name: what clients call the model; None takes the model's own name.
    """

    pipeline: PipelineConfig
    served_model_name: str | None = None

    @property
    def model_name(self) -> str:
        """The name that clients see."""
        return self.served_model_name or self.pipeline.model


_PIPELINE_ADAPTER = TypeAdapter(PipelineConfig)


def parse_settings(args: Mapping[str, Any]) -> AppConfig:
    """Reads the `args` of a Serve config: fields of `PipelineConfig`, and `served_model_name`.

    Raises:
        ConfigurationError: an unknown name, with the nearest known one, or a value that will not do.
    """
    names = [field.name for field in fields(PipelineConfig)]
    refuse_unknown_keys(args, [*names, "served_model_name"])
    settings = dict(args)
    served_model_name = settings.pop("served_model_name", None)
    if settings.get("kv_cache_gb") == "auto":
        settings["kv_cache_gb"] = None
    if not isinstance(served_model_name, str | None):
        raise ConfigurationError(f"served_model_name must be a string, got {served_model_name!r}")
    try:
        return AppConfig(_PIPELINE_ADAPTER.validate_python(settings), served_model_name)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise ConfigurationError(f"{name}: {problem['msg']}, got {problem['input']!r}") from None
