"""The adapters of an application, by name.

A stage reads an adapter when it is loaded, or else when the first request arrives that has it: requests carry its
source. Imports no Ray, as the launcher reads the settings before it sets Ray's environment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from gptj_dist.checkpoint.adapter_formats import open_fitting
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import PipelineConfig
from gptj_dist.params import AdapterSource

MAX_UNLOADED = 1000
"""The most names that are remembered as unloaded; the others are forgotten."""

GivenAdapters: TypeAlias = tuple[tuple[str, AdapterSource], ...]
"""Adapters that are there from the start, with their names."""


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """The last change of a name.

    Args:
        number: larger than those of all changes that its ingress knew.
        ingress: that made it. Of two changes with the same number, the one with the larger name is the later.
        source: None if the adapter was unloaded.
    """

    number: int
    ingress: str
    source: AdapterSource | None


AdapterChanges: TypeAlias = dict[str, AdapterChange]
"""The last changes by name."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline's reply: why it cannot load an adapter, or None."""

    problem: str | None = None


class AdapterList:
    """The adapters of an application as one process knows them.

    Lists that know the same changes are equal, whichever order they came in.

    Attributes:
        sources: the adapters by name; the same dict all the time.
        changes: since the start.
        digest: differs between lists that know different changes.
    """

    def __init__(self, given: GivenAdapters = ()) -> None:
        self._given = frozenset(name for name, _ in given)
        self.sources: dict[str, AdapterSource] = dict(given)
        self.changes: AdapterChanges = {}
        self.digest = self._digest()

    def change(self, name: str, source: AdapterSource | None, ingress: str) -> AdapterChange:
        """Makes a change, later than all that are known."""
        number = 1 + max((change.number for change in self.changes.values()), default=0)
        self.merge({name: AdapterChange(number, ingress, source)})
        return self.changes[name]

    def merge(self, changes: AdapterChanges) -> list[AdapterSource]:
        """Takes over what is later than the list's own. Returns the sources that are new in it."""
        before = set(self.sources.values())
        for name, change in changes.items():
            own = self.changes.get(name)
            if own is not None and (own.number, own.ingress) >= (change.number, change.ingress):
                continue
            self.changes[name] = change
            if change.source is None:
                self.sources.pop(name, None)
            else:
                self.sources[name] = change.source
        self._forget_unloaded()
        self.digest = self._digest()
        return [source for source in dict.fromkeys(self.sources.values()) if source not in before]

    def _digest(self) -> str:
        return hashlib.blake2b(repr(sorted(self.changes.items())).encode(), digest_size=8).hexdigest()

    def _forget_unloaded(self) -> None:
        unloaded = [name for name in self.changes if name not in self.sources and name not in self._given]
        unloaded.sort(key=lambda name: (self.changes[name].number, self.changes[name].ingress))
        for name in unloaded[:-MAX_UNLOADED]:
            del self.changes[name]


def given_adapters(paths: Mapping[str, str], config: PipelineConfig) -> GivenAdapters:
    """The adapters of an application that starts.

    Raises:
        CheckpointError: an adapter cannot be read, or does not fit the model.
    """
    return tuple((name, open_adapter(path, config)) for name, path in paths.items())


def open_adapter(path: str, config: PipelineConfig) -> AdapterSource:
    """Raises CheckpointError if the adapter cannot be read, or does not fit the model."""
    model = read_model_config(resolve_model(config.model, config.revision))
    return open_fitting(Path(path).absolute(), model).source()
