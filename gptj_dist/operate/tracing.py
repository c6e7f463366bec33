"""`serve --trace`: collects the plans of all pipelines in one trace file while the application runs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from gptj_dist.errors import NotReadyError
from gptj_dist.serving.broadcast import ask_all
from gptj_dist.stages.trace import TraceFile, TracePart

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Between two visits a pipeline remembers some thousand plans."""


@contextmanager
def tracing(pipelines: DeploymentHandle, path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Collects on a thread every second, and once more at the end.

    Args:
        say: receives a line for the user if tracing ends before that.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    with TraceFile(path) as file:
        is_over = threading.Event()

        def collect() -> None:
            try:
                _collect(pipelines, file, is_over)
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


def _collect(pipelines: DeploymentHandle, file: TraceFile, is_over: threading.Event) -> None:
    """Appends completed plans. If a pipeline does not answer, its plans are collected the next time.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    next_plans: dict[str, int] = {}
    is_last = False
    while not is_last:
        is_last = is_over.wait(PERIOD_S)
        with suppress(NotReadyError, RayError, RayServeException):
            parts = asyncio.run(ask_all(pipelines, TracePart, "trace_part", next_plans)).given
            file.append(parts)
            next_plans |= {part.pipeline: part.records[-1].number + 1 for part in parts if part.records}
