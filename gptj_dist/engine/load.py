"""How loaded a pipeline is, for whatever decides how many pipelines there are."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gptj_dist.chunking import StepCost
from gptj_dist.engine.scheduler import Scheduler

WINDOW_S = 3.0
"""Requests that came within this time tell how many come per second."""

RECENT_S = 20.0
"""A pipeline to which a request came within this time is in use. Longer than Serve's own period of publishing, 10 s."""

HALF, BUSY, FULL = 0.5, 0.8, 0.9
"""Shares of its places or blocks, of its time, and of its places or blocks by running requests alone, that a pipeline
should give away at most. What is left is for requests that come while another one starts.
"""

DRAIN_S = 30.0
"""Seconds in which work that waits should be done."""

LEAST = 0.01
"""Pipelines that are needed for a request that takes hardly anything."""

LEAST_WINDOW_S = 1.0
"""A pipeline that has just started gets many requests at once, which have waited for it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a pipeline's requests ask of it.

    Args:
        running: the largest share that running requests take of anything: the places in its batch, its KV blocks.
        wanted: the same of running and waiting ones. Above 1 some of them wait for others.
        arriving: share of its time that requests take as they come now.
        backlog_s: seconds of computing that wait.
        is_in_use: whether a request came lately, or is there.
    """

    running: float
    wanted: float
    arriving: float
    backlog_s: float
    is_in_use: bool

    @property
    def pipelines(self) -> float:
        """How many pipelines should share these requests and those that come. Above 0 if it is in use.

        The share of places and blocks says early that there are more requests than usual. Once requests wait, it grows
        with the time that they have waited, so what they need is limited by the time that it takes to compute them.
        """
        by_time = (self.arriving + self.backlog_s / DRAIN_S) / BUSY
        needed = max(self.running / FULL, min(self.wanted / HALF, by_time))
        return max(needed, LEAST) if self.is_in_use else 0.0


@dataclass(frozen=True, slots=True)
class RequestCost:
    """Seconds of a busy pipeline's slowest stage, that requests take.

    Args:
        prompt_token_s: for each token of a prompt.
        token_s: for each generated token, when the batch is full.
        usual_tokens: that requests generate before they end early; None if they have not done so.
    """

    prompt_token_s: float
    token_s: float
    usual_tokens: float | None

    @classmethod
    def of(cls, step: StepCost, num_stages: int, num_at_once: int, early_share: float) -> RequestCost:
        """The cost by that of a step, whose overhead the requests of a micro-batch share.

        Args:
            num_at_once: requests in a full batch, which is split over as many micro-batches as there are stages.
            early_share: see `Pace`.
        """
        token_s = step.row_s + step.overhead_s * num_stages / num_at_once
        return cls(step.row_s, token_s, 1 / early_share if early_share else None)

    def seconds(self, num_prompt_tokens: int, max_tokens: int) -> float:
        """For one request."""
        num_tokens = max_tokens if self.usual_tokens is None else min(max_tokens, self.usual_tokens)
        return num_prompt_tokens * self.prompt_token_s + num_tokens * self.token_s


@dataclass(frozen=True, slots=True)
class _Arrival:
    came_s: float
    num_prompt_tokens: int
    max_tokens: int


class Arrivals:
    """The requests that came within `RECENT_S`. Times are seconds of one clock.

    Args:
        now_s: the time from which on requests can come.
    """

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._arrivals: deque[_Arrival] = deque()

    def note(self, now_s: float, num_prompt_tokens: int, max_tokens: int) -> None:
        """A request has come."""
        self._forget(now_s)
        self._arrivals.append(_Arrival(now_s, num_prompt_tokens, max_tokens))

    def has_any(self, now_s: float) -> bool:
        """Whether a request came lately."""
        self._forget(now_s)
        return bool(self._arrivals)

    def share(self, cost: RequestCost, now_s: float) -> float:
        """Share of the pipeline's time that requests take as they come now."""
        new = [arrival for arrival in self._arrivals if now_s - arrival.came_s <= WINDOW_S]
        work_s = sum(cost.seconds(arrival.num_prompt_tokens, arrival.max_tokens) for arrival in new)
        return work_s / min(WINDOW_S, max(now_s - self._began_s, LEAST_WINDOW_S))

    def load(
        self,
        scheduler: Scheduler,
        num_stages: int,
        max_batch_size: int,
        early_share: float,
        has_requests: bool,
        now_s: float,
    ) -> Load:
        """The load of the pipeline with this scheduler.

        Args:
            early_share: see `Pace`.
            has_requests: whether any request is there, besides the server's own.
        """
        num_running, num_waiting, pool = scheduler.num_running, scheduler.num_waiting, scheduler.pool
        is_full = num_running > 0 and num_waiting > 0
        num_at_once = num_running if is_full else max_batch_size  # blocks may be scarcer than places
        cost = RequestCost.of(scheduler.step_cost, num_stages, num_at_once, early_share)
        num_wanted_blocks = scheduler.num_used_blocks + pool.blocks_for(scheduler.waiting.num_tokens)
        waiting_s = sum(
            cost.seconds(request.num_tokens, request.params.max_tokens - request.num_output_tokens)
            for request in scheduler.waiting
        )
        return Load(
            running=max(num_running / max_batch_size, scheduler.num_used_blocks / pool.num_blocks),
            wanted=max((num_running + num_waiting) / max_batch_size, num_wanted_blocks / pool.num_blocks),
            arriving=self.share(cost, now_s),
            backlog_s=waiting_s,
            is_in_use=has_requests or self.has_any(now_s),
        )

    def _forget(self, now_s: float) -> None:
        while self._arrivals and now_s - self._arrivals[0].came_s > RECENT_S:
            self._arrivals.popleft()
