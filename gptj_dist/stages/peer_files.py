"""The files of a model that another node of the cluster has: brings what this node needs of them to its disk.

The node with the files runs a `FileServer` for as long as something is fetched. Bytes travel as parcels, to a port of
the fetching process that only the holder of its password may send to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptj_dist.checkpoint.hub import DEMO, fetch_weights, local_directory, resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.local_copy import LocalCopy, SourceLostError
from gptj_dist.checkpoint.manifest import Manifest, is_same_model, read_manifest, sample, stage_spans, version_of
from gptj_dist.checkpoint.pieces import Piece, PieceReader
from gptj_dist.config import LayerRange, ModelConfig, PipelineConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.logs import values
from gptj_dist.own_directory import own_directory
from gptj_dist.sizes import bytes_text
from gptj_dist.stages.files import FileSource
from gptj_dist.stages.load_progress import LoadProgress
from gptj_dist.stages.ray_errors import own_error, summary
from gptj_dist.stages.transport.files import PieceInbound, send_pieces
from gptj_dist.stages.transport.frames import FrameFaultError
from gptj_dist.stages.transport.parcels import AbandonedError, ParcelOutbound

logger = logging.getLogger(__name__)

RETRY_DELAY_S = 1.0
SILENCE_S = 20.0
"""How long nothing may arrive after everything was sent."""


def share_files(config: PipelineConfig) -> FileSource | None:
    """Makes this node the source of a model's files for the others; None if each has its own.

    With `peer_files` of a hub model, downloads all of it first.

    Raises:
        CheckpointError: the files are not there, or the download failed.
    """
    is_local = local_directory(config.model) is not None
    wants = is_local if config.peer_files is None else config.peer_files
    if not wants or config.model == DEMO or not ray.is_initialized():
        return None
    directory = resolve_model(config.model, config.revision)
    if not is_local:
        model = read_model_config(directory)
        fetch_weights(config.model, directory, LayerRange.whole(model.num_layers), model)
    node_id = ray.get_runtime_context().get_node_id()
    return FileSource(node_id, ray.util.get_node_ip_address(), str(directory), version_of(directory))


def files_here(config: PipelineConfig, source: FileSource | None, host: str) -> tuple[PipelineConfig, PeerFiles | None]:
    """The settings with a directory of this node in which the model is, but for its tensors. Keep the files alive.

    Args:
        source: None if the model is where the settings say.
        host: see `PeerFiles`.

    Raises:
        CheckpointError: see `PeerFiles.directory`.
    """
    if source is None:
        return config, None
    files = PeerFiles(source, host)
    return replace(config, model=str(files.directory()), revision=None), files


class PeerFiles:
    """A model that another node has all files of; `stages.files.ModelFiles`.

    This node reads its own directory where it is the source, or has the same files at the same path.

    Args:
        host: the address of this node at which others can reach it.
    """

    def __init__(self, source: FileSource, host: str) -> None:
        self._source = source
        self._peer = PeerSource(source, host)
        self._directory: Path | None = None
        self._copy: LocalCopy | None = None

    def directory(self) -> Path:
        """The directory of the model on this node.

        Raises:
            CheckpointError: the files cannot be fetched, or have changed since the server started.
        """
        if self._directory is None:
            self._directory = self._find_own()
        if self._directory is None:
            self._copy = self._open_copy()
            self._directory = self._copy.directory
        return self._directory

    def fetch(self, config: ModelConfig, layers: LayerRange, on_progress: Callable[[LoadProgress], None]) -> None:
        directory = self.directory()
        if self._copy is None:
            return
        begin_s = time.monotonic()
        num_bytes = self._copy.fill(
            self._peer,
            lambda place: stage_spans(place, config, layers),
            lambda num_bytes, all_bytes: on_progress(self._progress(num_bytes, all_bytes)),
        )
        took_s = round(time.monotonic() - begin_s, 3)
        known = values(source=self._source.address, directory=str(directory), bytes=num_bytes, seconds=took_s)
        logger.info("model files fetched" if num_bytes else "model files were there", extra=known)

    def _progress(self, num_bytes: int, all_bytes: int) -> LoadProgress:
        if not all_bytes:
            return LoadProgress("waiting for a stage that fetches files")
        address = self._source.address
        activity = f"fetching from {address}, {bytes_text(num_bytes)} of {bytes_text(all_bytes)}"
        return LoadProgress(activity, num_bytes, all_bytes, address)

    def _find_own(self) -> Path | None:
        directory = Path(self._source.directory)
        if self._source.node_id == ray.get_runtime_context().get_node_id():
            return directory
        is_same = is_same_model(directory, self._source.version, self._peer.sample)
        if is_same is None:
            return None
        if is_same:
            return directory
        logger.warning(
            "this node has other files than the model's source at the same path, and fetches those",
            extra=values(directory=str(directory), source=self._source.address),
        )
        return None

    def _open_copy(self) -> LocalCopy:
        try:
            place = own_directory()
            if place is None:
                raise OSError("the user has no directory to write to")
            root = place / "models"
            root.mkdir(mode=0o700, exist_ok=True)
            copy = LocalCopy(root, Path(self._source.directory).name or "model", self._source.version)
        except OSError as error:
            raise CheckpointError(
                f"this node has no place for the model's files: {error}; XDG_CACHE_HOME names another one"
            ) from error
        copy.fill(self._peer)
        return copy


class FileServer:
    """On the node with the files, an actor that sends parts of them. Imports no torch.

    Args:
        source: this node.
    """

    def __init__(self, source: FileSource) -> None:
        self._source = source
        self._directory = Path(source.directory)
        self._outbounds: list[ParcelOutbound[Piece]] = []

    def manifest(self) -> Manifest:
        """The files. Raises CheckpointError if they have changed."""
        manifest = read_manifest(self._directory)
        self._require(manifest.version)
        return manifest

    def sample(self) -> str:
        """See `checkpoint.manifest.sample`. Raises CheckpointError, also if the files have changed."""
        self._require(version_of(self._directory))
        return sample(self._directory)

    def send(self, pieces: Sequence[Piece], address: str) -> None:
        """Sends parts of the files. What is on its way arrives as long as the actor lives.

        Raises:
            CheckpointError: they cannot be read, or have changed meanwhile.
        """
        outbound: ParcelOutbound[Piece] = ParcelOutbound(address, Piece, lambda: False)
        self._outbounds.append(outbound)
        with PieceReader(self._directory, [file.name for file in self.manifest().files]) as reader:
            send_pieces(reader, pieces, outbound)
        self._require(version_of(self._directory))

    def _require(self, version: str) -> None:
        if version != self._source.version:
            raise CheckpointError(
                f"the model's files in {self._directory} of {self._source.address} have changed since the server "
                "started: restart it"
            )


class PeerSource:
    """The other node; `checkpoint.local_copy.Source`.

    Args:
        host: see `PeerFiles`.
    """

    def __init__(self, source: FileSource, host: str) -> None:
        self._source = source
        self._host = host
        self.name = source.address
        self.directory = source.directory

    def manifest(self) -> Manifest:
        server = self._serve()
        try:
            manifest: Manifest = _result(server.manifest.remote())
        finally:
            ray.kill(server)
        return manifest

    def sample(self) -> str:
        server = self._serve()
        try:
            found: str = _result(server.sample.remote())
        except SourceLostError as error:
            raise CheckpointError(f"{self.name}, which has the model's files, cannot be asked: {error}") from error
        finally:
            ray.kill(server)
        return found

    def read(self, pieces: Sequence[Piece]) -> Generator[bytes, None, None]:
        server = self._serve()
        sending = _Sending()
        inbound = PieceInbound(self._host, sending.is_over)
        try:
            sending.call = server.send.remote(list(pieces), inbound.address)
            for data in inbound.receive(pieces):
                sending.last_s = time.monotonic()
                yield data
            _result(sending.call)
        except AbandonedError:
            _result(sending.call)
            raise SourceLostError(f"nothing arrived for {SILENCE_S:.0f} s") from None
        except FrameFaultError as error:
            raise SourceLostError(str(error)) from error
        finally:
            inbound.close()
            ray.kill(server)

    def _serve(self) -> Any:
        there = NodeAffinitySchedulingStrategy(self._source.node_id, soft=False)
        actor = ray.remote(FileServer).options(num_cpus=0, max_restarts=0, scheduling_strategy=there)
        return actor.remote(self._source)


class _Sending:
    """A call of `FileServer.send`.

    Attributes:
        call: its reference.
        last_s: when something arrived last.
    """

    def __init__(self) -> None:
        self.call: Any = None
        self.last_s = time.monotonic()

    def is_over(self) -> bool:
        """Whether nothing more will arrive: the sender has failed, or has sent everything long ago."""
        ready, _ = ray.wait([self.call], timeout=0)
        if not ready:
            return False
        with suppress(ray.exceptions.RayError):
            ray.get(self.call)
            return time.monotonic() - self.last_s > SILENCE_S
        return True


def _result(call: Any) -> Any:
    """What a call to the server returns.

    Raises:
        CheckpointError: its own.
        SourceLostError: the server or its node has died.
    """
    try:
        return ray.get(call)
    except ray.exceptions.RayError as error:
        if (own := own_error(error)) is not None:
            raise own from None
        time.sleep(RETRY_DELAY_S)
        raise SourceLostError(f"the process that sends them {summary(error)}") from error
