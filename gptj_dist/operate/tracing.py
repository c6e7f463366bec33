"""`serve --trace`: collects from all pipelines of the application, as long as it runs, into one file."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.errors import GPTJDistError
from gptj_dist.serving.broadcast import trace_parts
from gptj_dist.stages.trace import TraceFile

PERIOD_S = 1.0
"""Between two visits a pipeline remembers some thousand plans."""


class TraceCollector:
    """Carries what pipelines have to tell to a file, and remembers how far each has got."""

    def __init__(self, pipelines: DeploymentHandle, file: TraceFile) -> None:
        self._pipelines = pipelines
        self._file = file
        self._since: dict[str, int] = {}

    async def collect(self) -> None:
        """Appends what is new. A pipeline that cannot be asked now is asked the next time."""
        with suppress(GPTJDistError, RayError, RayServeException):
            parts = (await trace_parts(self._pipelines, self._since)).given
            self._file.append(parts)
            self._since |= {part.pipeline: part.records[-1].number + 1 for part in parts if part.records}


@contextmanager
def tracing(pipelines: DeploymentHandle, path: Path) -> Iterator[None]:
    """Collects on a thread every second, and once more in the end.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    with TraceFile(path) as file:
        collector, is_over = TraceCollector(pipelines, file), threading.Event()
        thread = threading.Thread(target=_collect_until, args=(collector, is_over), name="trace", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def _collect_until(collector: TraceCollector, is_over: threading.Event) -> None:
    while not is_over.wait(PERIOD_S):
        asyncio.run(collector.collect())
    asyncio.run(collector.collect())
