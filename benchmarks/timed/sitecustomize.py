"""Makes the stages of a server take a given time in place of computing. Python imports this module when it starts.

It does so where this directory is on `PYTHONPATH` and `TIMED_STAGES` is set: `OVERHEAD_S,ROW_S`. A stage then loads its
weights as always, but a step sleeps for the overhead and for each row; hidden states are zeros, and tokens letters.
Each stage reports a memory of its own, as if it were on another machine. All else is the real
server. See `benchmarks.simulation_check`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

VARIABLE = "TIMED_STAGES"
RUNNER = "gptj_dist.stages.runner"
FIRST_LETTER, NUM_LETTERS = 64, 26
"""Tokens with a text of their own, so that clients see each."""


class TimedLoader(Loader):
    """Loads the module of `StageRunner`, and then puts one in its place that sleeps."""

    def __init__(self, loader: Loader, overhead_s: float, row_s: float) -> None:
        self._loader = loader
        self._overhead_s = overhead_s
        self._row_s = row_s

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        overhead_s, row_s = self._overhead_s, self._row_s
        original: Any = module.StageRunner

        class TimedRunner(original):  # type: ignore[misc]
            def __init__(self, spec: Any, files: Any = None) -> None:
                super().__init__(spec, files)
                self.timed_spec = spec

            def describe_device(self) -> Any:
                device = super().describe_device()
                return replace(device, memory_pool=f"{device.memory_pool}/{self.timed_spec.layers.stage}")

            def step(self, plan: Any, before: Any) -> Any:  # noqa: ARG002
                end_s = time.perf_counter() + overhead_s + row_s * plan.num_tokens
                self.num_beats += 1
                output = self._output(plan)
                time.sleep(max(0.0, end_s - time.perf_counter()))
                return output

            def _output(self, plan: Any) -> Any:
                if not self.timed_spec.layers.is_last:
                    return module.StageOutput(module.torch.zeros(plan.num_tokens, self.timed_spec.config.d_model))
                sampled = [chunk for chunk in plan.chunks if chunk.samples]
                token_ids = tuple(FIRST_LETTER + chunk.start % NUM_LETTERS for chunk in sampled)
                return module.Result(
                    plan.plan_id, token_ids, num_accepted=(0,) * sum(bool(c.num_drafts) for c in sampled)
                )

        vars(module)["StageRunner"] = TimedRunner


class TimedFinder(MetaPathFinder):
    """Finds the module of `StageRunner`."""

    def __init__(self, overhead_s: float, row_s: float) -> None:
        self._times = overhead_s, row_s

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != RUNNER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = TimedLoader(spec.loader, *self._times)
        return spec


if VARIABLE in os.environ:
    sys.meta_path.insert(0, TimedFinder(*map(float, os.environ[VARIABLE].split(","))))
