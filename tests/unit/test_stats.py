"""Shares, queues and rates, by the hand-made times of plans whose figures can be worked out on paper."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gptj_dist.engine.plan import Chunk, Plan, Result, StageTiming
from gptj_dist.engine.stats import PipelineStats, StageSnapshot

S = 1_000_000_000
"""A second."""


class Desk:
    """Statistics, and a clock that stands until it is set; times are seconds."""

    def __init__(self, window_s: float = 10.0, max_records: int = 100) -> None:
        self.now_s = 0.0
        self.stats = PipelineStats(lambda: round(self.now_s * S), window_s, max_records)
        self._num_plans = 0

    def submit(self, at_s: float, num_tokens: Sequence[int] = (1,), begin_s: float | None = None) -> None:
        """A plan of one chunk for each of `num_tokens`, all of which start at position 100."""
        self.now_s = at_s
        chunks = tuple(Chunk(i, 100, (7,) * number, (), True) for i, number in enumerate(num_tokens))
        begin_ns = round((at_s if begin_s is None else begin_s) * S)
        assert self.stats.note_submitted(Plan(self._num_plans, (), (), chunks), begin_ns) == round(at_s * S)
        self._num_plans += 1

    def land(self, at_s: float, *stages: tuple[float, float], num_tokens: int = 1, end_s: float | None = None) -> None:
        """The oldest plan in flight comes back; when each stage began and ended it."""
        self.now_s = at_s if end_s is None else end_s
        timings = tuple(StageTiming(round(begin * S), round(end * S)) for begin, end in stages)
        self.stats.note_landed(Result(0, (7,) * num_tokens, timings), round(at_s * S))

    def stages(self, at_s: float) -> tuple[StageSnapshot, ...]:
        self.now_s = at_s
        return self.stats.snapshot().stages


def test_a_plan_alone_leaves_each_stage_idle_while_it_is_elsewhere() -> None:
    desk = Desk()
    desk.submit(1.0)
    desk.land(4.0, (1.0, 2.0), (2.5, 3.5))
    first, second = desk.stages(10.0)
    assert first == StageSnapshot(busy_share=0.1, bubble_share=0.2, step_ms=1000, queue=0.0, wait_ms=0.0)
    assert second == StageSnapshot(busy_share=0.1, bubble_share=0.2, step_ms=1000, queue=0.05, wait_ms=500)


def test_two_plans_at_once_fill_bubbles_and_queue_up() -> None:
    desk = Desk()
    desk.submit(0.0)
    desk.submit(0.0)
    desk.land(5.0, (0.0, 2.0), (2.0, 5.0))
    desk.land(8.0, (2.0, 4.0), (5.0, 8.0))
    first, second = desk.stages(10.0)
    assert first == StageSnapshot(busy_share=0.4, bubble_share=0.4, step_ms=2000, queue=0.2, wait_ms=1000)
    assert second == StageSnapshot(busy_share=0.6, bubble_share=0.2, step_ms=3000, queue=0.1, wait_ms=500)


def test_with_plans_in_flight_a_stage_is_judged_by_the_time_of_which_all_is_known() -> None:
    desk = Desk()
    desk.submit(0.0)
    desk.submit(0.0)
    desk.land(5.0, (0.0, 2.0), (2.0, 5.0))
    first, second = desk.stages(7.0)
    assert (first.busy_share, first.bubble_share) == (1.0, 0.0)
    assert (second.busy_share, second.bubble_share) == (0.6, 0.4)


def test_a_long_rest_counts_as_idle_even_when_the_first_plan_after_it_is_still_on_its_way() -> None:
    desk = Desk()
    desk.submit(0.0)
    desk.land(5.0, (0.0, 2.0), (2.0, 5.0))
    desk.submit(100.0)
    for stage in desk.stages(101.0):
        assert stage == StageSnapshot(busy_share=0.0, bubble_share=0.0, step_ms=None, queue=0.0, wait_ms=None)


def test_work_across_the_windows_edge_counts_by_the_part_within() -> None:
    desk = Desk(window_s=4.0)
    desk.submit(0.0)
    desk.land(8.0, (0.0, 8.0))
    (stage,) = desk.stages(10.0)
    assert (stage.busy_share, stage.bubble_share, stage.step_ms) == (0.5, 0.0, 8000)


def test_clocks_that_disagree_give_no_share_or_wait_below_zero() -> None:
    desk = Desk()
    desk.submit(5.0)
    desk.land(6.0, (4.0, 5.0), (4.5, 6.5))
    first, second = desk.stages(10.0)
    assert (first.queue, first.wait_ms, first.bubble_share) == (0.0, 0.0, 0.0)
    assert (second.queue, second.wait_ms, second.bubble_share) == (0.0, 0.0, 0.0)


def test_rates_are_over_the_window_or_over_the_life_of_a_young_pipeline() -> None:
    desk = Desk()
    desk.submit(1.0, [1, 1, 30], begin_s=0.75)
    desk.land(2.0, (1.0, 2.0), num_tokens=3, end_s=2.25)
    desk.submit(2.25, [1])
    desk.land(3.0, (2.25, 3.0))
    desk.now_s = 5.0
    young = desk.stats.snapshot()
    assert young.window_s == 5.0
    assert (young.plans_per_s, young.prompt_tokens_per_s, young.output_tokens_per_s) == (0.4, 6.0, 0.8)
    assert young.coordinator_share == 0.1
    desk.now_s = 100.0
    later = desk.stats.snapshot()
    assert (later.window_s, later.plans_per_s, later.coordinator_share) == (10.0, 0.0, 0.0)


def test_a_record_tells_what_the_plan_computed() -> None:
    desk = Desk()
    desk.submit(1.0, [1, 1, 30])
    desk.land(2.0, (1.0, 2.0), num_tokens=3)
    (record,) = desk.stats.records()
    assert (record.num_decodes, record.num_prefill_tokens, record.num_sampled_tokens) == (2, 30, 3)
    assert record.num_context_tokens == 101 + 101 + 130


def test_a_pipeline_too_quick_for_the_memory_is_judged_by_what_is_remembered() -> None:
    desk = Desk(max_records=4)
    for second in range(9):
        desk.submit(float(second))
        desk.land(second + 0.5, (second, second + 0.5))
    desk.now_s = 8.5
    snapshot = desk.stats.snapshot()
    assert snapshot.window_s == pytest.approx(4.0)  # since plan 4 came back
    assert snapshot.plans_per_s == 1.0
    assert snapshot.stages[0].busy_share == 0.5
    assert [record.number for record in desk.stats.records()] == [5, 6, 7, 8]


def test_a_reader_gets_what_is_new_since_its_last_visit() -> None:
    desk = Desk(max_records=4)
    for second in range(6):
        desk.submit(float(second))
        desk.land(second + 0.5, (second, second + 0.5))
    assert [record.number for record in desk.stats.records(since=4)] == [4, 5]
    assert desk.stats.records(since=6) == ()
    assert [record.number for record in desk.stats.records(since=1)] == [2, 3, 4, 5]


def test_what_was_in_flight_when_the_stages_died_is_forgotten() -> None:
    desk = Desk()
    desk.submit(0.0)
    desk.land(1.0, (0.0, 1.0))
    desk.submit(1.0)
    desk.stats.note_lost()
    (stage,) = desk.stages(10.0)
    assert (stage.busy_share, stage.bubble_share) == (0.1, 0.0)
    desk.submit(10.0)
    desk.land(11.0, (10.0, 11.0))
    assert [record.number for record in desk.stats.records()] == [0, 1]


def test_before_any_plan_there_is_nothing_to_say_of_stages() -> None:
    desk = Desk()
    assert desk.stages(1.0) == ()
    desk.submit(1.0)
    assert desk.stages(2.0) == ()
