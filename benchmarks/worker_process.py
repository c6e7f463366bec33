"""The benchmark's side of a worker: a process that stays loaded and is sent requests as JSON lines. Stdlib only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import Family

ROOT = Path(__file__).parent.parent
STOP_TIMEOUT_S = 30
LOG_TAIL_BYTES = 4000


class WorkerError(Exception):
    """A worker died. The message has its last output."""


class WorkerProcess:
    """A worker of `benchmarks.workers`. The constructor returns when it is ready.

    Args:
        settings: settings of the worker's kind.
        python: the interpreter that runs it.
        package: the checkout whose `gptj_dist` it imports.

    Raises:
        WorkerError: it died before it was ready.
    """

    def __init__(
        self, kind: str, settings: Mapping[str, Any], python: str = sys.executable, package: Path = ROOT
    ) -> None:
        self.family = Family()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-P", "-m", "benchmarks.workers", kind, json.dumps(settings)],
            cwd=package,
            env={**self.family.environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about: dict[str, Any] = self._receive()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            WorkerError: the worker died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error() from None
        return self._receive()

    def close(self) -> None:
        """Ends the worker and all its processes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.family.kill()
        self._log.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._error()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _error(self) -> WorkerError:
        self.family.kill()
        self._process.kill()
        self._process.wait()
        size = self._log.seek(0, 2)
        self._log.seek(max(0, size - LOG_TAIL_BYTES))
        return WorkerError(f"a worker died:\n{self._log.read().decode(errors='replace')}")
