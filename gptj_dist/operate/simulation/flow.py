"""Very many pipelines: requests are simulated, steps are not. Coarser than `fleet`, and checked against it in tests.

Between two events, the requests of a pipeline that have their prompt get tokens at one rate, and the prompt at the head
of the queue is computed at another. Both follow from the time of a micro-batch with an equal share of the requests,
and, while there are prompts, a chunk of them:

    period = the slowest stage's step, or the coordinator's time for a plan if that is more
    round  = max(stages * period, the way of one micro-batch through all stages)

A request has a token in each round; prompts advance by a chunk in each period. Pipelines are chosen by the fewest
requests, as each ingress knows them: as they were published last, and what it has sent since.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

from gptj_dist.chunking import MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS, StepCost, best_chunk_tokens
from gptj_dist.config import DTYPE_BYTES
from gptj_dist.operate.simulation.choice import PERIOD_S
from gptj_dist.operate.simulation.clock import Clock, Processor
from gptj_dist.operate.simulation.costs import ServerCosts
from gptj_dist.operate.simulation.load import OpenLoop, lengths_of
from gptj_dist.operate.simulation.outcome import Outcome, Trip, summed_up
from gptj_dist.planning.cost import Chunks
from gptj_dist.planning.forecast import PlannedPipeline, Workload

EDGE_SHARE = 0.2
"""Of the load's time, the first and the last part, which do not count for rates."""


class FlowTimes:
    """Period and round of a pipeline, by the requests that have a token each and the prompt tokens beside them.

    Args:
        context_tokens: of each request, on average.
    """

    def __init__(self, workload: Workload, stages: PlannedPipeline, costs: ServerCosts, context_tokens: int) -> None:
        self.num_stages = len(stages)
        self._workload = workload
        self._stages = stages
        self._costs = costs.coordinator
        self._context_tokens = max(2, context_tokens)
        self.of = lru_cache(None)(self._of)
        small, large = (self._slowest_s(0, tokens) for tokens in (MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS))
        row_s = (large - small) / (MAX_CHUNK_TOKENS - MIN_CHUNK_TOKENS)
        self.cost = StepCost(max(small - MIN_CHUNK_TOKENS * row_s, row_s), row_s)

    def chunk_tokens(self, num_tokens: int) -> int:
        """Prompt tokens of a micro-batch when this many are to be computed, as the scheduler chooses."""
        return min(num_tokens, best_chunk_tokens(num_tokens, self.num_stages, self.cost))

    def _of(self, num_requests: int, chunk_tokens: int) -> tuple[float, float]:
        """Seconds of a period and of a round."""
        each = -(-num_requests // self.num_stages)
        taken = self._steps_s(each, chunk_tokens)
        costs = self._costs
        plan_s = costs.plan_s + costs.running_s * num_requests + costs.row_s * (each + bool(chunk_tokens))
        period_s = max(*taken, plan_s)
        groups = min(self.num_stages, num_requests) if not chunk_tokens else self.num_stages
        way_s = sum(taken) + self._edges_s(each + chunk_tokens) + plan_s
        return period_s, max(groups * period_s, way_s)

    def _slowest_s(self, num_requests: int, chunk_tokens: int) -> float:
        return max(self._steps_s(num_requests, chunk_tokens))

    def _steps_s(self, num_requests: int, chunk_tokens: int) -> list[float]:
        step = [Chunks(num_requests, 1, self._context_tokens)] if num_requests else []
        if chunk_tokens:
            step.append(Chunks(1, chunk_tokens, max(chunk_tokens, self._context_tokens // 2), has_samples=False))
        return [stage.step_s(self._workload, step) for stage in self._stages] if step else [0.0]

    def _edges_s(self, num_rows: int) -> float:
        """Of a frame on all edges, without those of a lone stage."""
        if self.num_stages == 1:
            return 0.0
        devices = [stage.device for stage in self._stages]
        frame_bytes = num_rows * self._workload.model.d_model * DTYPE_BYTES[self._workload.dtype]
        latency_s = sum(device.link_latency_s for device in devices) + devices[-1].link_latency_s
        return latency_s + sum(frame_bytes / device.link_bytes_s for device in devices[:-1])


@dataclass(slots=True)
class _Work:
    """A request in a pipeline."""

    trip: Trip
    prompt_left: float
    on_end: Callable[[], None]


@dataclass(slots=True)
class _Flow:
    """The state of a pipeline: what advances, and at which rate, since `since_s`."""

    times: FlowTimes
    max_batch: int
    clock: Clock
    since_s: float = 0.0
    given: float = 0.0
    version: int = 0
    busy_s: float = 0.0
    prompts: deque[_Work] = field(default_factory=deque)
    decoding: list[tuple[float, int, _Work]] = field(default_factory=list)
    number: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.prompts) + len(self.decoding)

    def add(self, work: _Work) -> None:
        self.advance()
        self.prompts.append(work)
        self.plan_next()

    def _rates(self) -> tuple[float, int, float, float]:
        """Period, chunk, tokens a second of each request, and prompt tokens a second."""
        running = len(self.decoding)
        has_room = bool(self.prompts) and running < self.max_batch
        chunk = self.times.chunk_tokens(round(sum(work.prompt_left for work in self.prompts)) or 1) if has_room else 0
        period_s, round_s = self.times.of(running, chunk)
        return period_s, chunk, 1 / round_s if running else 0.0, chunk / period_s if chunk else 0.0

    def advance(self) -> None:
        """Up to now."""
        seconds = self.clock.now_s - self.since_s
        self.since_s = self.clock.now_s
        if not self.num_requests:
            return
        period_s, chunk, token_rate, prompt_rate = self._rates()
        groups = min(self.times.num_stages, len(self.decoding)) if not chunk else self.times.num_stages
        round_s = 1 / token_rate if token_rate else self.times.num_stages * period_s
        self.busy_s += seconds * min(1.0, groups * period_s / round_s)
        self.given += seconds * token_rate
        if prompt_rate:
            self.prompts[0].prompt_left = max(0.0, self.prompts[0].prompt_left - seconds * prompt_rate)

    def plan_next(self) -> None:
        """Has the next event called."""
        self.version += 1
        if not self.num_requests:
            return
        _, _, token_rate, prompt_rate = self._rates()
        waits = []
        if prompt_rate:
            waits.append(self.prompts[0].prompt_left / prompt_rate)
        if token_rate:
            waits.append(max(0.0, self.decoding[0][0] - self.given) / token_rate)
        self.clock.after(min(waits), partial(self._happen, self.version))

    def _happen(self, version: int) -> None:
        if version != self.version:
            return
        self.advance()
        if self.prompts and self.prompts[0].prompt_left < 1e-6 and len(self.decoding) < self.max_batch:
            work = self.prompts.popleft()
            _, way_s = self.times.of(1, 0)
            work.trip.first_s = self.clock.now_s + way_s
            self.number += 1
            heapq.heappush(self.decoding, (self.given + work.trip.num_tokens, self.number, work))
        while self.decoding and self.decoding[0][0] - self.given < 1e-6:
            _, _, work = heapq.heappop(self.decoding)
            work.trip.last_s = max(work.trip.first_s, self.clock.now_s)
            work.on_end()
        self.plan_next()


class FlowFleet:
    """Equal pipelines, and ingresses.

    Args:
        num_ingresses: requests go to them in turn.
    """

    def __init__(
        self, times: FlowTimes, num_pipelines: int, max_batch: int, num_ingresses: int, costs: ServerCosts
    ) -> None:
        self._clock = Clock()
        self._costs = costs
        self._flows = [_Flow(times, max_batch, self._clock) for _ in range(num_pipelines)]
        self._ingresses = [Processor(self._clock) for _ in range(num_ingresses)]
        self._known = [[0.0] * num_pipelines for _ in range(num_ingresses)]
        self._rng = random.Random(0)  # nosec B311  # keeps no secret
        self._num_left = 0

    def run(self, load: OpenLoop) -> Outcome:
        """Runs a load until its last request has ended. Call it once."""
        arrivals = load.arrivals()
        trips = []
        self._num_left = len(arrivals)
        for number, (came_s, (prompt, output)) in enumerate(zip(arrivals, lengths_of(load), strict=True)):
            trip = Trip(came_s, output)
            trips.append(trip)
            self._clock.at(came_s, partial(self._ask, number % len(self._ingresses), trip, prompt))
        self._publish()
        begin_s, end_s = EDGE_SHARE * arrivals[-1], (1 - EDGE_SHARE) * arrivals[-1]
        self._clock.run(until_s=begin_s)
        before = self._busy_s()
        self._clock.run(until_s=end_s)
        after = self._busy_s()
        self._clock.run()
        shares = [(b - a) / (end_s - begin_s) for a, b in zip(before, after, strict=True)]
        busy = {"stages": max(shares)}
        outcome = summed_up(trips, busy, begin_s, end_s)
        busy["ingress"] = self._ingress_share(load.rate, outcome)
        return summed_up(trips, busy, begin_s, end_s)

    def _ingress_share(self, rate: float, outcome: Outcome) -> float:
        """Share of the time for which an ingress is busy; above 1 if it cannot do so much.

        The tokens of a step travel in one message to each ingress that has one of them.
        """
        costs, num_ingresses, num_pipelines = self._costs.ingress, len(self._ingresses), len(self._flows)
        running = max(1.0, outcome.mean_requests / num_pipelines)
        in_step = running / min(running, self._flows[0].times.num_stages)
        messages = num_ingresses * (1 - math.pow(1 - 1 / num_ingresses, in_step))
        token_s = costs.token_s + costs.message_s * messages / in_step
        request_s = costs.request_s + costs.choice_s * num_pipelines
        facts_share = costs.facts_s * num_pipelines / PERIOD_S
        return (rate * request_s + outcome.tokens_per_s * token_s) / num_ingresses + facts_share

    def _busy_s(self) -> list[float]:
        for flow in self._flows:
            flow.advance()
            flow.plan_next()
        return [flow.busy_s for flow in self._flows]

    def _publish(self) -> None:
        """All ingresses learn what all pipelines have; ties are broken by chance."""
        counts = [flow.num_requests for flow in self._flows]
        self._known = [[number + self._rng.random() / 2 for number in counts] for _ in self._ingresses]
        if self._num_left:
            self._clock.after(PERIOD_S, self._publish)

    def _ask(self, ingress: int, trip: Trip, prompt: int) -> None:
        costs = self._costs.ingress
        called_s = self._ingresses[ingress].work(costs.request_s + costs.choice_s * len(self._flows))
        known = self._known[ingress]
        index = known.index(min(known))
        known[index] += 1
        work = _Work(trip, prompt, partial(self._end, ingress, index))
        self._clock.at(called_s + costs.call_delay_s, partial(self._flows[index].add, work))

    def _end(self, ingress: int, index: int) -> None:
        self._known[ingress][index] -= 1
        self._num_left -= 1


def mean_context(prompt_tokens: float, output_tokens: float) -> int:
    """Tokens that a request has on average while it has its tokens computed."""
    return round(prompt_tokens + output_tokens / 2)
