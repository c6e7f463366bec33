"""Who chooses the pipeline of a request: the real router, on what pipelines publish, or the fewest requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import Request
from gptj_dist.engine.routing import Router, RoutingFacts
from gptj_dist.operate.simulation.clock import Clock
from gptj_dist.operate.simulation.pipeline import SimulatedPipeline

PERIOD_S = 1.0
"""How often pipelines publish."""

DELAY_S = 0.2
"""Until what they publish has arrived."""

INBOX = "inbox"


class Choice(Protocol):
    """Chooses pipelines."""

    def choose(self, request: Request) -> int:
        """The index of the pipeline that gets the request."""

    def end(self, request: Request, index: int) -> None:
        """The request has its last token."""


class FewestRequests:
    """Takes the pipeline with the fewest requests, any of several, as one who knows them all would."""

    def __init__(self, num_pipelines: int, seed: int = 0) -> None:
        self._num_requests = [0] * num_pipelines
        self._rng = random.Random(seed)

    def choose(self, request: Request) -> int:  # noqa: ARG002
        fewest = min(self._num_requests)
        index = self._rng.choice([i for i, number in enumerate(self._num_requests) if number == fewest])
        self._num_requests[index] += 1
        return index

    def end(self, request: Request, index: int) -> None:  # noqa: ARG002
        self._num_requests[index] -= 1


class RoutedChoice:
    """Asks the real router, which knows what pipelines published a moment ago, and what it has sent them since."""

    def __init__(self, clock: Clock, pipelines: Sequence[SimulatedPipeline]) -> None:
        self._clock = clock
        self._pipelines = pipelines
        self._router = Router(BLOCK_SIZE_TOKENS)
        self._published: dict[str, RoutingFacts | None] = {str(index): None for index in range(len(pipelines))}
        self._computing: list[set[int]] = [set() for _ in pipelines]
        self._newest = [-1] * len(pipelines)
        self._is_publishing = [False] * len(pipelines)
        self._router.meet(self._published)

    def choose(self, request: Request) -> int:
        number = request.request_id
        record = RequestRecord(request.prompt_ids, request.params, noise_key=0)
        now_s = self._clock.now_s
        [best, *_], _ = self._router.choose(self._published, str(number), (INBOX, number), [record], now_s)
        index = int(best)
        self._computing[index].add(number)
        self._newest[index] = number
        if not self._is_publishing[index]:
            self._is_publishing[index] = True
            self._clock.after(PERIOD_S, partial(self._publish, index))
        return index

    def end(self, request: Request, index: int) -> None:
        self._router.end(str(index), str(request.request_id))
        self._computing[index].remove(request.request_id)

    def _publish(self, index: int) -> None:
        """Publishes until a period after its last request has ended."""
        self._clock.after(DELAY_S, partial(self._arrive, index, self._facts(index)))
        self._is_publishing[index] = bool(self._computing[index])
        if self._is_publishing[index]:
            self._clock.after(PERIOD_S, partial(self._publish, index))

    def _arrive(self, index: int, facts: RoutingFacts) -> None:
        self._published[str(index)] = facts
        self._router.meet(self._published)

    def _facts(self, index: int) -> RoutingFacts:
        pipeline = self._pipelines[index]
        room_after_s = pipeline.scheduler.room_after_s(pipeline.token_s, early_share=0.0)
        facts = RoutingFacts.of(pipeline.scheduler, room_after_s, early_share=0.0)
        return replace(facts, received={INBOX: self._newest[index]}, computing={INBOX: list(self._computing[index])})
