"""Pipelines, ingresses and a load on one virtual clock. Every step of every pipeline is simulated."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduling import SchedulerConfig, TokenOutput
from gptj_dist.operate.simulation.choice import Choice, FewestRequests, RoutedChoice
from gptj_dist.operate.simulation.clock import Clock, Processor
from gptj_dist.operate.simulation.costs import FREE, ServerCosts
from gptj_dist.operate.simulation.load import ClosedLoop, Load, OpenLoop, lengths_of
from gptj_dist.operate.simulation.outcome import Outcome, Trip, summed_up
from gptj_dist.operate.simulation.pipeline import VOCAB_SIZE, SimulatedPipeline
from gptj_dist.operate.simulation.stages import SimulatedStages
from gptj_dist.operate.simulation.times import Edge, StepTimes
from gptj_dist.params import SamplingParams

EDGE_SHARE = 0.2
"""Of an open loop's time, the first and the last part, which do not count for rates."""


NUM_WARM_UP = 4
WARM_UP_LENGTHS = 100, 20
"""Requests that a pipeline computes before a load: their number, and tokens of prompt and output."""


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A pipeline to simulate: its limits, the times of its stages, and its edges."""

    config: SchedulerConfig
    times: StepTimes
    edges: Sequence[Edge]


@dataclass(slots=True)
class _Open:
    """A request that has not ended: its trip, its ingress and its pipeline."""

    trip: Trip
    ingress: int
    pipeline: int = -1


class Fleet:
    """A server.

    Args:
        specs: of its pipelines.
        num_ingresses: requests go to them in turn, as from a load balancer.
        costs: processor time of coordinators and ingresses.
        has_router: whether the real router chooses among several pipelines, in place of the fewest requests.

    Attributes:
        pipelines, ingresses, stages: its parts; for their counts.
    """

    def __init__(
        self,
        specs: Sequence[PipelineSpec],
        num_ingresses: int = 1,
        costs: ServerCosts = FREE,
        has_router: bool = True,
    ) -> None:
        self._clock = Clock()
        self._costs = costs.ingress
        self.stages = [SimulatedStages(self._clock, spec.times, spec.edges) for spec in specs]
        self.pipelines = [
            SimulatedPipeline(self._clock, spec.config, stages, costs.coordinator, self._send)
            for spec, stages in zip(specs, self.stages, strict=True)
        ]
        self.ingresses = [Processor(self._clock) for _ in range(num_ingresses)]
        is_routed = has_router and len(specs) > 1
        self._choice: Choice = (
            RoutedChoice(self._clock, self.pipelines, num_ingresses)
            if is_routed
            else FewestRequests(len(self.pipelines))
        )
        self._open: dict[int, _Open] = {}
        self._trips: list[Trip] = []
        self._numbers = count()
        self._on_end: Callable[[], None] = lambda: None

    def run(self, load: Load) -> Outcome:
        """Runs a load until its last request has ended, after each pipeline has served a few. Call it once."""
        self._warm_up()
        rng = random.Random(f"tokens {load.seed}")  # nosec B311  # keeps no secret
        requests = iter([_request(number, lengths, rng) for number, lengths in enumerate(lengths_of(load))])
        if isinstance(load, OpenLoop):
            return self._run_open(load, requests)
        return self._run_closed(load, requests)

    def _run_open(self, load: OpenLoop, requests: Iterator[Request]) -> Outcome:
        begin_s = self._clock.now_s
        arrivals = [begin_s + came_s for came_s in load.arrivals()]
        for came_s, request in zip(arrivals, requests, strict=True):
            self._clock.at(came_s, partial(self._ask, request))
        edge_s = EDGE_SHARE * (arrivals[-1] - begin_s)
        self._clock.run(until_s=begin_s + edge_s)
        before = self._busy_s()
        self._clock.run(until_s=arrivals[-1] - edge_s)
        after = self._busy_s()
        self._clock.run()
        return self._sum_up(before, after, begin_s + edge_s, arrivals[-1] - edge_s)

    def _run_closed(self, load: ClosedLoop, requests: Iterator[Request]) -> Outcome:
        def next_one() -> None:
            if (request := next(requests, None)) is not None:
                self._ask(request)

        begin_s = self._clock.now_s
        self._on_end = next_one
        for _ in range(load.num_streams):
            next_one()
        before = self._busy_s()
        self._clock.run()
        return self._sum_up(before, self._busy_s(), begin_s, max(trip.last_s for trip in self._trips))

    def _warm_up(self) -> None:
        """Has each pipeline compute a few requests, so that its scheduler knows what steps cost."""
        rng = random.Random("warm-up")  # nosec B311  # keeps no secret
        for index, pipeline in enumerate(self.pipelines):
            for number in range(NUM_WARM_UP):
                pipeline.begin(_request(-1 - NUM_WARM_UP * index - number, WARM_UP_LENGTHS, rng))
        self._clock.run()

    def _ask(self, request: Request) -> None:
        """A client sends a request."""
        ingress = request.request_id % len(self.ingresses)
        trip = Trip(self._clock.now_s, request.params.max_tokens)
        self._trips.append(trip)
        self._open[request.request_id] = _Open(trip, ingress)
        self.ingresses[ingress].when_free(partial(self._take, request))

    def _take(self, request: Request) -> None:
        """An ingress reads the request and calls a pipeline."""
        costs, opened = self._costs, self._open[request.request_id]
        choice_s = costs.choice_s * len(self.pipelines) if len(self.pipelines) > 1 else 0.0
        called_s = self.ingresses[opened.ingress].work(costs.request_s + choice_s)
        opened.pipeline = self._choice.choose(request, opened.ingress)
        pipeline = self.pipelines[opened.pipeline]
        self._clock.at(called_s + costs.call_delay_s, partial(pipeline.begin, request))

    def _send(self, outputs: Sequence[TokenOutput], sent_s: float) -> None:
        """A pipeline sends the tokens of a step: a message to each ingress that has some of the requests."""
        by_ingress: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            if (opened := self._open.get(output.request.request_id)) is not None:  # None during the warm-up
                by_ingress.setdefault(opened.ingress, []).append(output)
        for index, some in by_ingress.items():
            ingress = self.ingresses[index]
            self._clock.at(sent_s, partial(ingress.when_free, partial(self._pass_on, ingress, some)))

    def _pass_on(self, ingress: Processor, outputs: Sequence[TokenOutput]) -> None:
        """An ingress sends tokens to their clients."""
        ingress.work(self._costs.message_s)
        ended = []
        for output in outputs:
            now_s = ingress.work(self._costs.token_s)
            request = output.request
            trip = self._open[request.request_id].trip
            trip.first_s = trip.first_s or now_s
            trip.last_s = now_s
            if output.finish_reason is not None:
                ended.append(request)
        for request in ended:
            opened = self._open.pop(request.request_id)
            self._choice.end(request, opened.pipeline, opened.ingress)
            self._clock.at(opened.trip.last_s, self._on_end)

    def _busy_s(self) -> dict[str, list[float]]:
        """Seconds for which each part of the server has been busy, by its kind."""
        return {
            "stages": [busy_s for stages in self.stages for busy_s in stages.busy_s],
            "links": [sent_s for stages in self.stages for sent_s in stages.sent_s],
            "coordinator": [pipeline.coordinator.busy_s for pipeline in self.pipelines],
            "ingress": [ingress.busy_s for ingress in self.ingresses],
        }

    def _sum_up(
        self, before: dict[str, list[float]], after: dict[str, list[float]], begin_s: float, end_s: float
    ) -> Outcome:
        busy = {
            kind: max(b - a for a, b in zip(before[kind], after[kind], strict=True)) / (end_s - begin_s)
            for kind in after
        }
        return summed_up(self._trips, busy, begin_s, end_s)


def _request(number: int, lengths: tuple[int, int], rng: random.Random) -> Request:
    """A request whose prompt has nothing in common with others."""
    prompt_tokens, output_tokens = lengths
    prompt = (rng.randrange(VOCAB_SIZE), rng.randrange(VOCAB_SIZE), *(0,) * max(0, prompt_tokens - 2))
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    return Request(number, Prompt(prompt[:prompt_tokens]), params, noise_key=number)
