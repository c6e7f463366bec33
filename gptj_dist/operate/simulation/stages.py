"""Simulated stages of a pipeline: when each begins and ends each plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from gptj_dist.engine.plan import Plan, StageTiming
from gptj_dist.operate.simulation.clock import Clock
from gptj_dist.operate.simulation.times import Edge, StepTimes

Landed = Callable[[Plan, StageTiming], None]
"""Called with a plan that has passed all stages, and the timing of the stage that took longest."""


class SimulatedStages:
    """Stages with a device each. Plans stay in order, so a plan's way through all stages is known when it is sent.

    Args:
        times: of each stage for a plan.
        edges: one more than stages, see `times.edges`.

    Attributes:
        busy_s, sent_s: seconds for which each stage computes, and each edge sends.
    """

    def __init__(self, clock: Clock, times: StepTimes, edges: Sequence[Edge]) -> None:
        if len(edges) != times.num_stages + 1:
            raise ValueError(f"{times.num_stages} stages have {times.num_stages + 1} edges, got {len(edges)}")
        self._clock = clock
        self._times = times
        self._edges = edges
        self._free_s = [0.0] * times.num_stages
        self._sent_until_s = [0.0] * len(edges)
        self.busy_s = [0.0] * times.num_stages
        self.sent_s = [0.0] * len(edges)

    @property
    def num_stages(self) -> int:
        return self._times.num_stages

    def submit(self, plan: Plan, sent_s: float, on_landed: Landed) -> None:
        """Sends a plan at a time that is not before those of earlier plans."""
        taken = self._times.seconds(plan)
        rows = plan.num_tokens
        longest_s = 0.0
        now_s = self._passed(0, sent_s, rows)
        for stage, seconds in enumerate(taken):
            now_s = max(now_s, self._free_s[stage]) + seconds
            self._free_s[stage] = now_s
            self.busy_s[stage] += seconds
            longest_s = max(longest_s, seconds)
            now_s = self._passed(stage + 1, now_s, rows)
        self._clock.at(now_s, partial(on_landed, plan, StageTiming(0, round(1e9 * longest_s))))

    def _passed(self, index: int, ready_s: float, rows: int) -> float:
        """When an edge has brought the hidden states of a plan's rows."""
        edge = self._edges[index]
        seconds = rows * edge.row_bytes / edge.bytes_s
        self._sent_until_s[index] = max(ready_s, self._sent_until_s[index]) + seconds
        self.sent_s[index] += seconds
        return self._sent_until_s[index] + edge.latency_s
