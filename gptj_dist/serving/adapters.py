"""The adapters of an application, by name.

A stage reads an adapter when it is loaded, or else when the first request arrives that has it: requests carry its
source. Imports no Ray, as the launcher reads the settings before it sets Ray's environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptj_dist.checkpoint.adapter_formats import open_fitting
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import PipelineConfig
from gptj_dist.params import AdapterSource


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """The adapters by name.

    Args:
        number: of the change that made the table; the larger one is the newer.
    """

    number: int = 0
    sources: tuple[tuple[str, AdapterSource], ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline's reply to a table: why it cannot load an adapter, or None."""

    problem: str | None = None


def given_adapters(paths: Mapping[str, str], config: PipelineConfig) -> AdapterTable:
    """The table of an application that starts.

    Raises:
        CheckpointError: an adapter cannot be read, or does not fit the model.
    """
    return AdapterTable(0, tuple((name, open_adapter(path, config)) for name, path in paths.items()))


def open_adapter(path: str, config: PipelineConfig) -> AdapterSource:
    """Raises CheckpointError if the adapter cannot be read, or does not fit the model."""
    model = read_model_config(resolve_model(config.model, config.revision))
    return open_fitting(Path(path).absolute(), model).source()
