"""The adapters of an application that runs: what each ingress knows, and how a change reaches all processes.

Every ingress and every pipeline has the whole table; a change is sent to all of them. An ingress that starts later asks
the pipelines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ray.serve.handle import DeploymentHandle

from gptj_dist.answers.error_responses import UnknownModelError
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError, InvalidRequestError, excerpt
from gptj_dist.logs import values
from gptj_dist.params import AdapterSource
from gptj_dist.serving.adapters import AdapterTable, Loaded, open_adapter
from gptj_dist.serving.broadcast import ask_all

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 60.0
MAX_NAME_CHARS = 256


def _entries(directory: str) -> frozenset[str]:
    """The names in a directory; none if it cannot be read."""
    try:
        return frozenset(path.name for path in Path(directory).iterdir())
    except OSError:
        return frozenset()


class AdapterRegistry:
    """An ingress's table, and the changes that its clients ask for.

    Args:
        config: of the pipelines.
        model_names: which no adapter may have.
        pipelines, ingresses: handles to all of them.
        require_ready: raises NotReadyError while there is no pipeline.
        directory: adapters in it are loaded when a request names them; None for none.

    Attributes:
        sources: the present table.
    """

    def __init__(
        self,
        table: AdapterTable,
        config: PipelineConfig,
        model_names: tuple[str, ...],
        pipelines: DeploymentHandle,
        ingresses: DeploymentHandle,
        require_ready: Callable[[], object],
        directory: str | None = None,
    ) -> None:
        self._directory = directory
        self._config = config
        self._model_names = model_names
        self._pipelines = pipelines
        self._ingresses = ingresses
        self._require_ready = require_ready
        self._changing = asyncio.Lock()
        self._number = table.number
        self.sources: dict[str, AdapterSource] = dict(table.sources)

    def adopt(self, table: AdapterTable) -> None:
        """Takes over a table that is newer."""
        if table.number > self._number:
            self._number = table.number
            self.sources.clear()
            self.sources.update(table.sources)

    async def catch_up(self) -> None:
        """Takes over the newest table that a pipeline has, from an ingress before this one."""
        replies = await ask_all(self._pipelines, AdapterTable, "adapters")
        for table in replies.given:
            self.adopt(table)

    async def find(self, names: Iterable[str | None]) -> None:
        """Loads adapters of these names that lie in the directory and are not loaded yet.

        Raises:
            InvalidRequestError: one cannot be read, or does not fit the model.
        """
        for name in dict.fromkeys(names):
            if self._directory is None or name is None or name in self.sources or name in self._model_names:
                continue
            if name not in await asyncio.to_thread(_entries, self._directory):
                continue
            try:
                await self.load(name, str(Path(self._directory, name)), replaces=False)
            except InvalidRequestError:
                if name not in self.sources:  # another request may have loaded it meanwhile
                    raise

    async def load(self, name: str, path: str, replaces: bool) -> None:
        """Loads an adapter on all stages.

        Raises:
            InvalidRequestError: it cannot be read, does not fit the model, or its name is taken.
            NotReadyError: no pipeline is there yet.
        """
        self._require_ready()
        if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise InvalidRequestError(f"lora_name must have 1 to {MAX_NAME_CHARS} printable characters", "lora_name")
        if name in self._model_names:
            raise InvalidRequestError(f"{excerpt(name)} is the name of the model", "lora_name")
        async with self._changing:
            if name in self.sources and not replaces:
                message = f"the adapter {excerpt(name)} is loaded already; load_inplace replaces it"
                raise InvalidRequestError(message, "lora_name")
            try:
                source = await asyncio.to_thread(open_adapter, path, self._config)
            except ConfigurationError as error:
                raise InvalidRequestError(str(error), "lora_path") from error
            await self._change({**self.sources, name: source})
        logger.info("adapter loaded", extra=values(name=name, path=source.path, version=source.version))

    async def unload(self, name: str) -> None:
        """Forgets an adapter. Raises UnknownModelError if there is none of that name."""
        self._require_ready()
        async with self._changing:
            if name not in self.sources:
                raise UnknownModelError(f"no adapter {excerpt(name)} is loaded", "lora_name")
            await self._change({other: source for other, source in self.sources.items() if other != name})
        logger.info("adapter unloaded", extra=values(name=name))

    async def _change(self, sources: Mapping[str, AdapterSource]) -> None:
        table = AdapterTable(self._number + 1, tuple(sources.items()))
        replies = await ask_all(self._pipelines, Loaded, "take_adapters", table, timeout_s=LOAD_TIMEOUT_S)
        if problem := next((reply.problem for reply in replies.given if reply.problem is not None), None):
            raise InvalidRequestError(problem, "lora_path")
        self.adopt(table)
        await ask_all(self._ingresses, AdapterTable, "take_adapters", table)
