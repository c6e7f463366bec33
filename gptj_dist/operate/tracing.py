"""`serve --trace`: collects the plans of all pipelines in one trace file while the application runs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.errors import GPTJDistError
from gptj_dist.serving.broadcast import ask_all
from gptj_dist.stages.trace import TraceFile, TracePart

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Between two visits a pipeline remembers some thousand plans."""


class TraceCollector:
    """Copies completed plans from pipelines to a file, and remembers the last plan of each pipeline."""

    def __init__(self, pipelines: DeploymentHandle, file: TraceFile) -> None:
        self._pipelines = pipelines
        self._file = file
        self._since: dict[str, int] = {}

    async def collect(self) -> None:
        """Appends new plans. If a pipeline does not answer, its plans are collected the next time.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        try:
            parts = (await ask_all(self._pipelines, TracePart, "trace_part", self._since)).given
        except (GPTJDistError, RayError, RayServeException):
            return
        self._file.append(parts)
        self._since |= {part.pipeline: part.records[-1].number + 1 for part in parts if part.records}


@contextmanager
def tracing(pipelines: DeploymentHandle, path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Collects on a thread every second, and once more at the end.

    Args:
        say: receives a line for the user if tracing ends before that.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    with TraceFile(path) as file:
        collector, is_over = TraceCollector(pipelines, file), threading.Event()

        def collect() -> None:
            try:
                while not is_over.wait(PERIOD_S):
                    asyncio.run(collector.collect())
                asyncio.run(collector.collect())
            except Exception as error:
                logger.exception("trace ended")
                say(f"Tracing has ended: {error}")

        thread = threading.Thread(target=collect, name="trace", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
