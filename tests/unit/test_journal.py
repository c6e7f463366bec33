"""Requests are counted as they happened: against histograms that were worked out on paper."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest

from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.histogram import BOUNDS_NS, Histogram
from gptj_dist.engine.journal import Journal, RequestTotals
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.plan import Plan
from gptj_dist.engine.request import FinishReason, Prompt, Request
from gptj_dist.engine.scheduling import TokenOutput
from gptj_dist.engine.stats import PipelineStats
from gptj_dist.errors import StageFailedError
from gptj_dist.params import SamplingParams
from tests.unit.test_async_engine import LIMITS, PROMPT, make_executor, make_scheduler, turns
from tests.unit.test_stats import Desk

MS = 1_000_000


def make_request(number: int, num_prompt_tokens: int = 3, log_id: str | None = "r") -> Request:
    return Request(number, Prompt((5,) * num_prompt_tokens), SamplingParams(max_tokens=9), 0, log_id)


def plan_of(*requests: Request) -> Plan:
    return Plan(0, (), tuple(request.introduction() for request in requests), ())


def buckets(histogram: Histogram) -> dict[int, int]:
    """Counts by the upper bounds of their buckets in ms, those above all bounds under -1."""
    bounds = [*(bound // MS for bound in BOUNDS_NS), -1]
    return {bound: count for bound, count in zip(bounds, histogram.counts, strict=True) if count}


def test_bounds_grow_by_at_most_1_7_from_a_millisecond_to_1000_seconds() -> None:
    assert (BOUNDS_NS[0], BOUNDS_NS[-1]) == (MS, 1_000_000 * MS)
    ratios = [above / below for below, above in pairwise(BOUNDS_NS)]
    assert 1.3 < min(ratios) <= max(ratios) < 1.7


def test_a_bound_belongs_to_its_bucket_and_what_is_above_all_is_counted_last() -> None:
    histogram = Histogram()
    durations_ns = (0, MS, MS + 1, 10 * MS, 2_000_000 * MS)
    for duration_ns in durations_ns:
        histogram.observe(duration_ns)
    assert histogram.counts[:2] == [2, 1]
    assert buckets(histogram)[10] == 1
    assert histogram.counts[-1] == 1
    assert histogram.sum_ns == sum(durations_ns)


def test_a_request_that_runs_to_its_length_is_counted_by_hand() -> None:
    journal, request = Journal(), make_request(0, num_prompt_tokens=7)
    journal.note_arrival(request, 100 * MS)
    journal.note_plan(plan_of(request), 103 * MS)
    journal.note_output(TokenOutput(request, 5, None), 115 * MS)
    journal.note_output(TokenOutput(request, 6, None), 119 * MS)
    journal.note_output(TokenOutput(request, 7, FinishReason.LENGTH), 149 * MS)
    journal.note_closed(request, 500 * MS)
    totals = journal.totals
    assert (totals.num_prompt_tokens, totals.num_generation_tokens) == (7, 3)
    assert (buckets(totals.queue_time), totals.queue_time.sum_ns) == ({3: 1}, 3 * MS)
    assert (buckets(totals.time_to_first_token), totals.time_to_first_token.sum_ns) == ({15: 1}, 15 * MS)
    assert (buckets(totals.inter_token_latency), totals.inter_token_latency.sum_ns) == ({5: 1, 30: 1}, 34 * MS)
    assert (buckets(totals.e2e_latency), totals.e2e_latency.sum_ns) == ({50: 1}, 49 * MS)


def test_a_request_that_is_closed_ends_then_and_one_that_fails_has_no_end() -> None:
    journal, closed, failed = Journal(), make_request(0), make_request(1)
    for request in (closed, failed):
        journal.note_arrival(request, 0)
        journal.note_output(TokenOutput(request, 5, None), 2 * MS)
    journal.note_closed(closed, 10 * MS)
    journal.note_failed(failed, StageFailedError("stage 1 died"))
    journal.note_closed(failed, 20 * MS)
    assert buckets(journal.totals.e2e_latency) == {10: 1}
    assert journal.totals.num_generation_tokens == 2


def test_a_request_waits_once_though_a_preemption_makes_it_new_to_the_stages_again() -> None:
    journal, request = Journal(), make_request(0)
    journal.note_arrival(request, 0)
    journal.note_plan(plan_of(request), 1 * MS)
    journal.note_plan(plan_of(request), 700 * MS)
    assert buckets(journal.totals.queue_time) == {1: 1}


def test_a_request_that_is_to_generate_nothing_has_a_prompt_and_an_end_but_no_first_token() -> None:
    journal, request = Journal(), make_request(0)
    journal.note_arrival(request, 0)
    journal.note_output(TokenOutput(request, None, FinishReason.LENGTH), 5 * MS)
    totals = journal.totals
    assert (totals.num_prompt_tokens, totals.num_generation_tokens) == (3, 0)
    assert (buckets(totals.time_to_first_token), buckets(totals.e2e_latency)) == ({}, {5: 1})


def test_a_request_without_a_log_id_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gptj_dist")
    journal, request = Journal(), make_request(0, log_id=None)
    journal.note_arrival(request, 0)
    journal.note_plan(plan_of(request), MS)
    journal.note_output(TokenOutput(request, 5, FinishReason.STOP), 2 * MS)
    journal.note_closed(request, 3 * MS)
    assert journal.totals == RequestTotals()
    assert caplog.records == []


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_a_request_is_one_line_at_its_end_and_at_debug_level_one_at_its_arrival(
    caplog: pytest.LogCaptureFixture, level: int
) -> None:
    caplog.set_level(level, logger="gptj_dist")
    journal, request = Journal(), make_request(4, log_id="req-1")
    journal.note_arrival(request, 0)
    journal.note_plan(plan_of(request), 1 * MS)
    request.append(5, eos_token_ids=(0,))
    journal.note_output(TokenOutput(request, 5, None), 2 * MS)
    journal.note_closed(request, 3 * MS)
    told = [(record.getMessage(), vars(record)["values"]) for record in caplog.records]
    request_: dict[str, Any] = {
        "request_id": "req-1",
        "number": 4,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "max_tokens": 9,
    }
    queued = ("request queued", {**request_, "generation_tokens": 0})
    times = {"queue_s": 0.001, "first_token_s": 0.002, "total_s": 0.003}
    ended = ("request ended", {**request_, "generation_tokens": 1, "reason": "closed", **times})
    assert told == ([queued, ended] if level == logging.DEBUG else [ended])


def test_the_engine_tells_its_journal_of_every_stream_however_it_ends() -> None:
    now_ns = 0

    async def scenario() -> None:
        nonlocal now_ns
        executor = make_executor(is_paused=True)
        engine = AsyncEngine(make_scheduler(), executor, LIMITS, stats=PipelineStats(lambda: now_ns))
        driver = asyncio.create_task(engine.run())
        params = SamplingParams(max_tokens=2, seed=1)
        whole, closed, failed = (engine.generate(PROMPT, params, choice, "r") for choice in range(3))
        reader = asyncio.create_task(read(whole))
        await turns()
        now_ns = 8 * MS
        executor.step()
        await turns()
        now_ns = 15 * MS
        executor.step()
        await reader
        others = [asyncio.create_task(anext(closed)), asyncio.create_task(read(failed))]
        await turns()
        now_ns = 22 * MS
        executor.step()
        await others[0]
        now_ns = 30 * MS
        await closed.aclose()
        executor.fail()
        await asyncio.gather(driver, return_exceptions=True)
        engine.fail(StageFailedError("the stages could not be restarted"))
        await asyncio.gather(*others)
        totals = engine.journal.totals
        assert totals.num_prompt_tokens == 3 * len(PROMPT)
        assert totals.num_generation_tokens == 4
        assert buckets(totals.queue_time) == {1: 3}
        assert buckets(totals.time_to_first_token) == {10: 1, 7: 2}
        assert buckets(totals.inter_token_latency) == {7: 1}
        assert buckets(totals.e2e_latency) == {15: 2}

    async def read(stream: AsyncGenerator[Delta, None]) -> None:
        with suppress(StageFailedError):
            async for _ in stream:
                pass

    asyncio.run(scenario())


def test_steps_of_each_stage_are_counted_by_their_length() -> None:
    assert Desk().stats.stages == ()
    desk = Desk()
    desk.submit(0.0)
    desk.submit(0.0)
    desk.land(5.0, (0.0, 0.002), (2.0, 2.030))
    desk.land(8.0, (2.0, 2.002), (3.0, 3.007))
    assert [buckets(stage.step_time) for stage in desk.stats.stages] == [{2: 2}, {7: 1, 30: 1}]


def test_a_bubble_is_a_gap_between_steps_in_which_plans_were_in_flight() -> None:
    desk = Desk()
    desk.submit(1.0)
    desk.submit(2.0)
    desk.land(6.0, (1.0, 3.0), (3.0, 6.0))
    desk.land(9.0, (3.0, 4.0), (7.0, 9.0))
    assert [stage.bubble_ns for stage in desk.stats.stages] == [0, 1000 * MS]
    desk.submit(20.0)  # nothing was in flight from 9 to 20
    desk.land(25.0, (20.5, 21.0), (21.5, 25.0))
    assert [stage.bubble_ns for stage in desk.stats.stages] == [5500 * MS, 2500 * MS]
    desk.submit(30.0)
    desk.stats.note_lost()
    desk.submit(90.0)
    desk.land(91.0, (90.0, 90.5), (90.5, 91.0))
    assert [stage.bubble_ns for stage in desk.stats.stages] == [5500 * MS, 2500 * MS]


def test_the_coordinators_own_time_is_added_up() -> None:
    desk = Desk()
    desk.submit(1.0, begin_s=0.75)
    desk.land(2.0, (1.0, 2.0), end_s=2.5)
    assert desk.stats.coordinator_ns == 750 * MS
