"""The adapters of an application that runs: how an ingress changes the list, and how all processes come to know it.

Every ingress and every pipeline has the whole list. A change is sent to all of them. What one has missed, such as a
pipeline that has just started, it learns from an ingress, which compares the lists each time that it looks at the
pipelines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.answers.error_responses import UnknownModelError
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError, InvalidRequestError, NotReadyError, excerpt
from gptj_dist.logs import values
from gptj_dist.params import AdapterSource
from gptj_dist.serving.adapters import AdapterChanges, AdapterList, GivenAdapters, Loaded, open_adapter
from gptj_dist.serving.broadcast import ask_all
from gptj_dist.serving.pipeline import PipelineStatus

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 60.0
MAX_NAME_CHARS = 256

_Files = tuple[tuple[str, int, int, int], ...]
"""Name, inode, time of the last change and size of each file."""


class AdapterRegistry:
    """An ingress's list, and the changes that its clients ask for.

    Args:
        name: of the ingress.
        config: of the pipelines.
        model_names: which no adapter may have.
        pipelines, ingresses: handles to all of them.
        require_ready: raises NotReadyError while there is no pipeline.
        directory: adapters in it are loaded when a request names them; None for none.
    """

    def __init__(
        self,
        name: str,
        given: GivenAdapters,
        config: PipelineConfig,
        model_names: tuple[str, ...],
        pipelines: DeploymentHandle,
        ingresses: DeploymentHandle,
        require_ready: Callable[[], object],
        directory: str | None = None,
    ) -> None:
        self._name = name
        self._list = AdapterList(given)
        self._directory = None if directory is None else Path(directory).absolute()
        self._config = config
        self._model_names = model_names
        self._pipelines = pipelines
        self._ingresses = ingresses
        self._require_ready = require_ready
        self._changing = asyncio.Lock()
        self._meeting: asyncio.Task[None] | None = None
        self._files: dict[str, _Files] = {}

    @property
    def sources(self) -> dict[str, AdapterSource]:
        """The adapters by name; the same dict all the time."""
        return self._list.sources

    def take(self, changes: AdapterChanges) -> None:
        """Takes over what another process knows."""
        self._list.merge(changes)

    async def exchange(self) -> None:
        """Tells all pipelines what this ingress knows, and learns what they know. Raises NotReadyError."""
        replies = await ask_all(self._pipelines, dict, "take_adapters", self._list.changes)
        for changes in replies.given:
            self.take(changes)

    def meet(self, pipelines: Sequence[PipelineStatus]) -> None:
        """Has lists exchanged, in the background, if a pipeline's differs from this one."""
        is_equal = all(pipeline.adapter_digest == self._list.digest for pipeline in pipelines)
        if not is_equal and (self._meeting is None or self._meeting.done()):
            self._meeting = asyncio.create_task(self._meet())

    async def find(self, names: Iterable[str | None]) -> None:
        """Loads adapters of these names that lie in the directory, if they are not loaded, or their files have changed.

        Those that are gone from there are unloaded.

        Raises:
            InvalidRequestError: one cannot be read, or does not fit the model.
        """
        for name in dict.fromkeys(names):
            if self._directory is not None and name is not None and name not in self._model_names:
                await self._find(name, self._directory)

    async def load(self, name: str, path: str, replaces: bool) -> None:
        """Loads an adapter on all stages.

        Raises:
            InvalidRequestError: it cannot be read, does not fit the model, or its name is taken.
            NotReadyError: no pipeline is there yet.
        """
        async with self._changing:
            await self._load(name, path, replaces)

    async def unload(self, name: str) -> None:
        """Forgets an adapter. Raises UnknownModelError if there is none of that name."""
        async with self._changing:
            await self._unload(name)

    async def _meet(self) -> None:
        try:
            await self.exchange()
        except (NotReadyError, RayError, RayServeException) as error:  # the next look tries again
            logger.warning("lists of adapters differ", extra=values(error=repr(error)))

    async def _find(self, name: str, directory: Path) -> None:
        path = str(directory / name)
        if name in self.sources and self.sources[name].path != path:
            return
        try:
            files = await asyncio.to_thread(_files, directory, name)
        except OSError:
            return
        if name in self.sources and self._files.get(name) == files:
            return
        async with self._changing:
            if files is None:
                if name in self.sources:
                    await self._unload(name)
            elif name not in self.sources or self._files.get(name) != files:
                await self._load(name, path, replaces=True)
                self._files[name] = files

    async def _load(self, name: str, path: str, replaces: bool) -> None:
        self._require_ready()
        if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise InvalidRequestError(f"lora_name must have 1 to {MAX_NAME_CHARS} printable characters", "lora_name")
        if name in self._model_names:
            raise InvalidRequestError(f"{excerpt(name)} is the name of the model", "lora_name")
        await self.exchange()
        if name in self.sources and not replaces:
            message = f"the adapter {excerpt(name)} is loaded already; load_inplace replaces it"
            raise InvalidRequestError(message, "lora_name")
        try:
            source = await asyncio.to_thread(open_adapter, path, self._config)
        except ConfigurationError as error:
            raise InvalidRequestError(str(error), "lora_path") from error
        replies = await ask_all(self._pipelines, Loaded, "load_adapter", source, timeout_s=LOAD_TIMEOUT_S)
        if problem := next((reply.problem for reply in replies.given if reply.problem is not None), None):
            raise InvalidRequestError(problem, "lora_path")
        if self.sources.get(name) != source:
            await self._change(name, source)
            logger.info("adapter loaded", extra=values(name=name, path=source.path, version=source.version))

    async def _unload(self, name: str) -> None:
        self._require_ready()
        await self.exchange()
        if name not in self.sources:
            raise UnknownModelError(f"no adapter {excerpt(name)} is loaded", "lora_name")
        await self._change(name, None)
        logger.info("adapter unloaded", extra=values(name=name))

    async def _change(self, name: str, source: AdapterSource | None) -> None:
        change = self._list.change(name, source, self._name)
        await self.exchange()
        await ask_all(self._ingresses, dict, "take_adapters", self._list.changes)
        if self._list.changes.get(name) not in (None, change):
            message = f"another request has changed the adapter {excerpt(name)} at the same time"
            raise InvalidRequestError(message, "lora_name")


def _files(directory: Path, name: str) -> _Files | None:
    """The files of an entry of the directory; None if it has none of that name. Raises OSError."""
    if name not in {path.name for path in directory.iterdir()}:  # a name is no path
        return None
    path = directory / name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((file, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in stats)
