"""Where a stage finds the files of its model: on its own machine or the hub, or on another node of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.stages.load_progress import LoadProgress


@dataclass(frozen=True, slots=True)
class FileSource:
    """A node that has all files of a model.

    Args:
        node_id: Ray's name of the node.
        address: of the node, for people.
        directory: of the files there.
        version: of the files when the server started, see `checkpoint.manifest.version_of`.
    """

    node_id: str
    address: str
    directory: str
    version: str


class ModelFiles(Protocol):
    """The files of a model, as a stage's machine sees them."""

    def directory(self) -> Path:
        """The directory of the model. All but the tensors is there; tensors that were fetched, too.

        Raises:
            CheckpointError: it is not there, or cannot be fetched.
        """

    def fetch(self, config: ModelConfig, layers: LayerRange, on_progress: Callable[[LoadProgress], None]) -> None:
        """Brings the tensors of these layers to the directory, unless they are there.

        Args:
            on_progress: called at every step.

        Raises:
            CheckpointError: they cannot be fetched.
        """


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """A directory of this machine, or a model of the hub.

    Args:
        model, revision: as for `resolve_model`.
    """

    model: str
    revision: str | None

    def directory(self) -> Path:
        return resolve_model(self.model, self.revision)

    def fetch(self, config: ModelConfig, layers: LayerRange, on_progress: Callable[[LoadProgress], None]) -> None:
        directory = self.directory()
        fetch_weights(self.model, directory, layers, config, lambda file: on_progress(LoadProgress(f"fetching {file}")))
