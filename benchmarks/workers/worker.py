"""What every worker is, and how those that generate tokens are timed. Stdlib only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from benchmarks.cases import case_of
from benchmarks.processes import cpu_s


class Worker(Protocol):
    """Something loaded that answers questions; both are JSON objects."""

    def about(self) -> dict[str, Any]:
        """What it is."""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Measures once."""

    def close(self) -> None:
        """Ends whatever it started."""


class Engine(Protocol):
    """Something that continues prompts."""

    def about(self) -> dict[str, Any]:
        """What it is."""

    def stage_pids(self) -> list[int]:
        """Processes of its stages, first to last, where they can be told apart."""

    def generate(self, prompts: list[list[int]], num_tokens: int) -> int:
        """Continues all prompts at once, greedily, by exactly so many tokens each; how many came in all."""

    def close(self) -> None:
        """Ends it."""


class GenerationWorker:
    """Times an engine: a case and a `seed` in, seconds out."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def about(self) -> dict[str, Any]:
        return self._engine.about()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds from the prompts to the last token, and what each stage used of the CPU meanwhile.

        Raises:
            RuntimeError: a request ended early.
        """
        case = case_of(request)
        prompts = case.prompts(request["seed"])
        cpu_before, begin = self._stage_cpu_s(), time.perf_counter()
        num_tokens = self._engine.generate(prompts, case.output_len)
        seconds = time.perf_counter() - begin
        if num_tokens != case.batch * case.output_len:
            raise RuntimeError(f"{num_tokens} tokens came for {case}")
        cpu = [after - before for after, before in zip(self._stage_cpu_s(), cpu_before, strict=True)]
        return {"seconds": seconds, "stage_cpu_s": cpu}

    def close(self) -> None:
        self._engine.close()

    def _stage_cpu_s(self) -> list[float]:
        return [cpu_s(Path(f"/proc/{pid}")) for pid in self._engine.stage_pids()]
