"""The protocol of workers, and the timing of engines that generate tokens. Stdlib only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from benchmarks.cases import case_of
from benchmarks.processes import cpu_s


class Worker(Protocol):
    """A loaded engine or library that answers requests. Requests and answers are JSON objects."""

    def about(self) -> dict[str, Any]:
        """Its description, for the document."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measures once."""

    def close(self) -> None:
        """Ends everything that it started."""


class Engine(Protocol):
    """An engine that continues prompts."""

    def about(self) -> dict[str, Any]:
        """Its description, for the document."""

    def stage_pids(self) -> list[int]:
        """The process of each stage, first to last; empty if they are unknown."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Continues all prompts at once, greedily, by `num_tokens` each. Returns the number of tokens generated."""

    def close(self) -> None:
        """Ends everything that it started."""


class GenerationWorker:
    """Times an engine. A request is a case with a `seed`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def about(self) -> dict[str, Any]:
        return self._engine.about()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds from the prompts to the last token, and CPU seconds of each stage.

        Raises:
            RuntimeError: a request ended early.
        """
        case = case_of(request)
        prompts = case.prompts(request["seed"])
        cpu_before, begin = self._stage_cpu_s(), time.perf_counter()
        num_tokens = self._engine.generate(prompts, case.output_len)
        seconds = time.perf_counter() - begin
        if num_tokens != case.batch * case.output_len:
            raise RuntimeError(f"the engine generated {num_tokens} tokens for {case}")
        cpu = [after - before for after, before in zip(self._stage_cpu_s(), cpu_before, strict=True)]
        return {"seconds": seconds, "stage_cpu_s": cpu}

    def close(self) -> None:
        self._engine.close()

    def _stage_cpu_s(self) -> list[float]:
        return [cpu_s(Path(f"/proc/{pid}")) for pid in self._engine.stage_pids()]
