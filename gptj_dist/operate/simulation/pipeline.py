"""A pipeline on a virtual clock: the real scheduler, a coordinator that takes time, and simulated stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from gptj_dist.engine.plan import Plan, Result, StageTiming
from gptj_dist.engine.request import Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig, TokenOutput
from gptj_dist.operate.simulation.clock import Clock, Processor
from gptj_dist.operate.simulation.costs import CoordinatorCosts
from gptj_dist.operate.simulation.stages import Landed

VOCAB_SIZE = 50_257

Outputs = Callable[[Sequence[TokenOutput], float], None]
"""Called with the tokens of a step, and the time at which the coordinator sends them."""


class Stages(Protocol):
    """What computes plans."""

    def submit(self, plan: Plan, sent_s: float, on_landed: Landed) -> None:
        """See `SimulatedStages.submit`."""


class SimulatedPipeline:
    """A scheduler and stages. Tokens are numbers without a meaning; no text ends before its last token.

    Args:
        on_outputs: gets each step's tokens.

    Attributes:
        scheduler: the real one.
        coordinator: its thread.
        num_rows, num_plans: sent so far.
        token_s: from one token of a request to its next: the time that the last plan without prompt tokens took.
    """

    def __init__(
        self, clock: Clock, config: SchedulerConfig, stages: Stages, costs: CoordinatorCosts, on_outputs: Outputs
    ) -> None:
        self.scheduler = Scheduler(config)
        self.coordinator = Processor(clock)
        self.num_rows = 0
        self.num_plans = 0
        self.token_s = 0.0
        self._clock = clock
        self._stages = stages
        self._costs = costs
        self._on_outputs = on_outputs
        self._arrived: list[Request] = []

    def begin(self, request: Request) -> None:
        """A request arrives at the coordinator. Those that arrive together share a micro-batch."""
        self._arrived.append(request)
        if len(self._arrived) == 1:
            self._clock.after(0.0, partial(self.coordinator.when_free, self._admit))

    def _admit(self) -> None:
        self.coordinator.work(self._costs.request_s * len(self._arrived))
        for request in self._arrived:
            self.scheduler.add(request)
        self._arrived.clear()
        self._pump()

    def _pump(self) -> None:
        """Sends plans until enough are in flight or there is nothing to do, as `AsyncEngine` does."""
        costs = self._costs
        while (plan := self.scheduler.schedule()) is not None:
            running_s = costs.running_s * self.scheduler.num_running
            sent_s = self.coordinator.work(costs.plan_s + running_s + costs.row_s * len(plan.chunks))
            self.num_rows += plan.num_tokens
            self.num_plans += 1
            self._stages.submit(plan, sent_s, partial(self._land, sent_s))

    def _land(self, sent_s: float, plan: Plan, timing: StageTiming) -> None:
        self.coordinator.when_free(partial(self._take, sent_s, plan, timing))

    def _take(self, sent_s: float, plan: Plan, timing: StageTiming) -> None:
        sampled = [chunk for chunk in plan.chunks if chunk.samples]
        token_ids = tuple((chunk.request_id * 7919 + chunk.start) % VOCAB_SIZE for chunk in sampled)
        accepted = (0,) * sum(bool(chunk.num_drafts) for chunk in sampled)
        if plan.num_tokens == len(plan.chunks):
            self.token_s = self._clock.now_s - sent_s
        outputs = self.scheduler.update(Result(plan.plan_id, token_ids, timings=(timing,), num_accepted=accepted))
        self._pump()
        if outputs:
            self._on_outputs(outputs, max(self.coordinator.free_s, self._clock.now_s))
