"""Counts requests for metrics and logs when they are queued, end or fail. Decides nothing.

Requests without a `log_id` are left out: they are the server's own, by which it tests that the pipeline makes tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from gptj_dist.engine.histogram import Histogram
from gptj_dist.engine.plan import Plan
from gptj_dist.engine.request import FinishReason, Request
from gptj_dist.engine.scheduling import TokenOutput
from gptj_dist.logs import values

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestTotals:
    """Totals over all requests since the coordinator started.

    Attributes:
        num_prompt_tokens: tokens of the prompts that have been computed, with those that were cached.
        num_cached_tokens: those of them whose KV earlier requests had left.
        num_generation_tokens: tokens that were sampled, including those after a stop string.
        num_early_ends: requests that ended before their full length.
        num_recomputed_tokens: tokens of prompts and of texts that were lost with stages or a pipeline.
        queue_time: from a request's arrival to its first plan.
        time_to_first_token: from a request's arrival to its first token.
        inter_token_latency: from one token of a request to the next.
        e2e_latency: from a request's arrival to its last token or to its cancellation; failed requests do not count.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    num_early_ends: int = 0
    num_recomputed_tokens: int = 0
    queue_time: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=Histogram)
    e2e_latency: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class _Life:
    """The times of a request that has not ended. None stands for what has not happened yet."""

    request: Request
    arrived_ns: int
    planned_ns: int | None = None
    first_ns: int | None = None
    last_ns: int = 0


class Journal:
    """The engine calls it for every event of a request. Times are nanoseconds of one clock."""

    def __init__(self) -> None:
        self.totals = RequestTotals()
        self._lives: dict[int, _Life] = {}

    @property
    def num_open(self) -> int:
        """Requests that have come and not ended."""
        return len(self._lives)

    def note_arrival(self, request: Request, now_ns: int) -> None:
        """The request has joined the queue."""
        if request.log_id is None:
            return
        self._lives[request.request_id] = _Life(request, now_ns)
        _log(logging.DEBUG, "request queued", request)

    def note_plan(self, plan: Plan, now_ns: int) -> None:
        """The plan was submitted. A request that returns after a preemption is new in it but does not count again."""
        for new in plan.new_requests:
            life = self._lives.get(new.request_id)
            if life is not None and life.planned_ns is None:
                life.planned_ns = now_ns
                self.totals.queue_time.observe(now_ns - life.arrived_ns)

    def note_output(self, output: TokenOutput, now_ns: int) -> None:
        """A token has arrived, or the end of a request that generates none."""
        life, totals = self._lives.get(output.request.request_id), self.totals
        if life is None:
            return
        totals.num_generation_tokens += sum(len(beam.token_ids) for beam in output.beams) or output.token_id is not None
        if life.first_ns is not None:
            totals.inter_token_latency.observe(now_ns - life.last_ns)
        else:
            life.first_ns = now_ns
            if life.request.prompt.first is life.request:  # the other requests of the prompt took over its KV
                totals.num_prompt_tokens += len(life.request.prompt_ids)
                totals.num_cached_tokens += life.request.num_cached_tokens
            if output.token_id is not None and not life.request.is_moved:
                totals.time_to_first_token.observe(now_ns - life.arrived_ns)
        life.last_ns = now_ns
        if output.finish_reason is not None:
            self._end(life, output.finish_reason, now_ns)

    def note_closed(self, request: Request, now_ns: int) -> None:
        """The stream was closed: after the request's end, or earlier by a stop string or by the client."""
        life = self._lives.get(request.request_id)
        if life is not None:
            self._end(life, "closed", now_ns)

    def note_failed(self, request: Request, error: Exception) -> None:
        """Call when the request has failed with its pipeline."""
        if self._lives.pop(request.request_id, None) is not None:
            _log(logging.INFO, "request failed", request, error=str(error))

    def _end(self, life: _Life, reason: str, now_ns: int) -> None:
        del self._lives[life.request.request_id]
        self.totals.e2e_latency.observe(now_ns - life.arrived_ns)
        self.totals.num_early_ends += reason != FinishReason.LENGTH
        _log(
            logging.INFO,
            "request ended",
            life.request,
            reason=reason,
            queue_s=_seconds(life.arrived_ns, life.planned_ns),
            first_token_s=_seconds(life.arrived_ns, life.first_ns),
            total_s=_seconds(life.arrived_ns, now_ns),
        )


def _log(level: int, event: str, request: Request, **of_event: object) -> None:
    of_request = {
        "request_id": request.log_id,
        "number": request.request_id,
        "prompt_tokens": len(request.prompt_ids),
        "cached_tokens": request.num_cached_tokens,
        "max_tokens": request.params.max_tokens,
        "generation_tokens": request.num_output_tokens,
    }
    logger.log(level, event, extra=values(**of_request, **of_event))


def _seconds(begin_ns: int, end_ns: int | None) -> float | None:
    return None if end_ns is None else round((end_ns - begin_ns) / 1e9, 6)
