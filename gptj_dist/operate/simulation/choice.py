"""Who chooses the pipeline of a request: the real router, on what pipelines publish, or the fewest requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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


class Choice(Protocol):
    """Chooses pipelines."""

    def choose(self, request: Request, ingress: int) -> int:
        """The index of the pipeline that gets the request, as this ingress chooses it."""

    def end(self, request: Request, index: int, ingress: int) -> None:
        """The request has its last token."""


class FewestRequests:
    """Takes the pipeline with the fewest requests, any of several, as one who knows them all would."""

    def __init__(self, num_pipelines: int, seed: int = 0) -> None:
        self._num_requests = [0] * num_pipelines
        self._rng = random.Random(seed)  # nosec B311  # keeps no secret

    def choose(self, request: Request, ingress: int) -> int:  # noqa: ARG002
        fewest = min(self._num_requests)
        index = self._rng.choice([i for i, number in enumerate(self._num_requests) if number == fewest])
        self._num_requests[index] += 1
        return index

    def end(self, request: Request, index: int, ingress: int) -> None:  # noqa: ARG002
        self._num_requests[index] -= 1


class RoutedChoice:
    """Each ingress asks a real router, which knows what pipelines published a moment ago, and what it has sent since.

    Args:
        num_ingresses: each has a router, and knows nothing of what the others send before it is published.
        session_of: the session of a request; None if it has none.
    """

    def __init__(
        self,
        clock: Clock,
        pipelines: Sequence[SimulatedPipeline],
        num_ingresses: int = 1,
        session_of: Callable[[Request], str | None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._pipelines = pipelines
        self._session_of = session_of
        self._routers = [Router(BLOCK_SIZE_TOKENS) for _ in range(num_ingresses)]
        self._published: dict[str, RoutingFacts | None] = {str(index): None for index in range(len(pipelines))}
        self._computing: list[dict[str, set[int]]] = [{} for _ in pipelines]
        self._newest: list[dict[str, int]] = [{} for _ in pipelines]
        self._is_publishing = [False] * len(pipelines)
        self._meet()

    def choose(self, request: Request, ingress: int) -> int:
        number, inbox = request.request_id, str(ingress)
        record = RequestRecord(request.prompt_ids, request.params, noise_key=0, session=self._session_of(request))
        now_s = self._clock.now_s
        [best, *_], _ = self._routers[ingress].choose(self._published, str(number), (inbox, number), [record], now_s)
        index = int(best)
        self._computing[index].setdefault(inbox, set()).add(number)
        self._newest[index][inbox] = number
        if not self._is_publishing[index]:
            self._is_publishing[index] = True
            self._clock.after(PERIOD_S, partial(self._publish, index))
        return index

    def end(self, request: Request, index: int, ingress: int) -> None:
        self._routers[ingress].end(str(index), str(request.request_id))
        self._computing[index][str(ingress)].remove(request.request_id)

    def _publish(self, index: int) -> None:
        """Publishes until a period after its last request has ended."""
        self._clock.after(DELAY_S, partial(self._arrive, index, self._facts(index)))
        self._is_publishing[index] = any(self._computing[index].values())
        if self._is_publishing[index]:
            self._clock.after(PERIOD_S, partial(self._publish, index))

    def _arrive(self, index: int, facts: RoutingFacts) -> None:
        self._published[str(index)] = facts
        self._meet()

    def _meet(self) -> None:
        for router in self._routers:
            router.meet(self._published)

    def _facts(self, index: int) -> RoutingFacts:
        pipeline = self._pipelines[index]
        room_after_s = pipeline.scheduler.room_after_s(pipeline.token_s, early_share=0.0)
        facts = RoutingFacts.of(pipeline.scheduler, room_after_s, early_share=0.0)
        computing = {inbox: list(numbers) for inbox, numbers in self._computing[index].items()}
        return replace(facts, received=dict(self._newest[index]), computing=computing)
