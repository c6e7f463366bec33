"""The requests of one prompt compute it once: who computes, who waits, who takes over what. Over plans alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest

from gptj_dist.engine.plan import KVPrefix, Plan, PromptLogprobs, Result
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import NextPlan, SchedulerConfig
from gptj_dist.params import SamplingParams, TokenLogprobs
from tests.fakes import FakeStages
from tests.unit.test_scheduler import EOS, fill, land, make_request, make_scheduler

BLOCK_SIZE = 4


def make_family(
    num_requests: int, num_prompt_tokens: int, params: SamplingParams | None = None, first_id: int = 0
) -> list[Request]:
    """Requests of one prompt."""
    prompt = Prompt(tuple(range(1, num_prompt_tokens + 1)))
    ids = range(first_id, first_id + num_requests)
    return [Request(id_, prompt, params or SamplingParams(max_tokens=4), noise_key=id_) for id_ in ids]


def add_all(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    for request in requests:
        scheduler.add(request)


def drive(scheduler: Scheduler, num_blocks: int = 1000, max_requests: int = 64) -> list[Plan]:
    """Until nothing is left to do, as many plans in flight as there can be; stages check the plans."""
    stages, plans, in_flight = FakeStages(num_blocks, BLOCK_SIZE, max_requests), list[Plan](), deque[Plan]()
    while scheduler.has_requests:
        for plan in fill(scheduler):
            stages.apply(plan)
            plans.append(plan)
            in_flight.append(plan)
        land(scheduler, in_flight.popleft())
    return plans


def num_computed(plans: Sequence[Plan]) -> int:
    return sum(plan.num_tokens for plan in plans)


def copies(plans: Sequence[Plan]) -> list[KVPrefix | None]:
    """What each request began with, in the order of their introductions."""
    return [new.begins_with for plan in plans for new in plan.new_requests]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("max_chunk_tokens", [None, 1, 7])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 7])
def test_a_prompt_is_computed_once_and_its_last_token_by_each(
    num_stages: int, max_chunk_tokens: int | None, max_tokens: int
) -> None:
    scheduler = make_scheduler(num_stages, block_size=BLOCK_SIZE, max_chunk_tokens=max_chunk_tokens)
    add_all(scheduler, make_family(5, 50, SamplingParams(max_tokens=max_tokens)))
    plans = drive(scheduler)
    assert num_computed(plans) == 50 + 4 + 5 * max(max_tokens - 1, 0)


def test_more_requests_than_run_at_once_compute_the_prompt_once_too() -> None:
    scheduler = make_scheduler(block_size=BLOCK_SIZE, max_batch_size=3)
    add_all(scheduler, make_family(20, 50, SamplingParams(max_tokens=6)))
    assert num_computed(drive(scheduler, max_requests=3)) == 50 + 19 + 20 * 5


def test_a_prompt_of_one_token_has_nothing_to_share() -> None:
    scheduler = make_scheduler()
    add_all(scheduler, make_family(3, 1))
    [plan] = fill(scheduler)
    assert [chunk.token_ids for chunk in plan.chunks] == [(1,)] * 3
    assert copies([plan]) == [None] * 3


def test_whole_blocks_are_held_in_common_and_the_rest_is_copied() -> None:
    scheduler = make_scheduler(num_stages=1, block_size=BLOCK_SIZE)
    add_all(scheduler, make_family(3, 11))
    first, second = fill(scheduler)
    [leader] = first.chunks
    assert (leader.start, leader.token_ids) == (0, tuple(range(1, 12)))
    shared = leader.new_blocks[:2]
    assert copies([second]) == [KVPrefix(0, 10, shared)] * 2
    assert [(chunk.start, chunk.token_ids, len(chunk.new_blocks)) for chunk in second.chunks] == [(10, (11,), 1)] * 2
    assert scheduler.num_used_blocks == 3 + 2
    scheduler.abort(0)
    assert scheduler.num_used_blocks == 2 + 2
    scheduler.abort(1)
    scheduler.abort(2)
    assert scheduler.num_used_blocks == 0


def test_where_stages_have_no_blocks_everything_is_copied() -> None:
    scheduler = Scheduler(SchedulerConfig(1, 1000, BLOCK_SIZE, 64, (EOS,), can_share_blocks=False))
    add_all(scheduler, make_family(2, 11))
    _, second = fill(scheduler)
    assert copies([second]) == [KVPrefix(0, 10, ())]
    assert [len(chunk.new_blocks) for chunk in second.chunks] == [3]
    assert scheduler.num_used_blocks == 6


def test_who_waits_for_a_prompt_lets_others_overtake() -> None:
    scheduler = make_scheduler(num_stages=1, max_chunk_tokens=10)
    family, stranger = make_family(3, 15), make_request(3, 5)
    add_all(scheduler, [*family, stranger])
    first, second = fill(scheduler)
    assert [chunk.request_id for chunk in first.chunks] == [0]
    assert [chunk.request_id for chunk in second.chunks] == [0, 3]
    land(scheduler, first)
    [third] = fill(scheduler)
    assert copies([third]) == [KVPrefix(0, 14, ())] * 2


def test_a_prompt_takes_as_long_to_fill_the_pipeline_as_if_it_were_alone() -> None:
    alone, family = make_scheduler(num_stages=4), make_scheduler(num_stages=4)
    alone.add(make_request(0, 400))
    add_all(family, make_family(16, 400))
    assert [plan.num_tokens for plan in fill(family)] == pytest.approx([p.num_tokens for p in fill(alone)], abs=2)


def test_when_the_one_at_the_prompt_is_aborted_the_next_computes_it() -> None:
    scheduler = make_scheduler(num_stages=1, block_size=BLOCK_SIZE, max_chunk_tokens=10)
    add_all(scheduler, make_family(3, 25))
    first, second = fill(scheduler)
    scheduler.abort(0)
    land(scheduler, first)
    [third] = fill(scheduler)
    assert [(chunk.request_id, chunk.start) for chunk in third.chunks] == [(1, 0)]
    land(scheduler, second)
    land(scheduler, third)
    [begins_with] = copies(drive_on(scheduler))
    assert begins_with is not None
    assert (begins_with.source_id, begins_with.num_tokens, len(begins_with.blocks)) == (1, 24, 6)


def drive_on(scheduler: Scheduler) -> list[Plan]:
    """As `drive`, for a scheduler whose plans have all landed."""
    plans, in_flight = list[Plan](), deque[Plan]()
    while scheduler.has_requests:
        new = fill(scheduler)
        plans += new
        in_flight += new
        land(scheduler, in_flight.popleft())
    return plans


def test_a_request_that_comes_later_finds_whoever_still_holds_the_prompt() -> None:
    scheduler = make_scheduler(num_stages=1)
    [first, second, third] = make_family(3, 25, SamplingParams(max_tokens=2))
    scheduler.add(first)
    [plan] = fill(scheduler)
    land(scheduler, plan)
    scheduler.add(second)
    [begins_with] = copies(drive_on(scheduler))
    assert begins_with is not None
    assert begins_with.source_id == first.request_id
    scheduler.add(third)
    assert copies(drive_on(scheduler)) == [None]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_few_blocks_preempt_and_every_request_still_ends(num_stages: int) -> None:
    scheduler = make_scheduler(num_stages, num_blocks=14, block_size=BLOCK_SIZE, max_chunk_tokens=7)
    params = SamplingParams(max_tokens=20)
    add_all(scheduler, [*make_family(4, 20, params), *make_family(3, 9, params, first_id=4)])
    drive(scheduler, num_blocks=14)
    assert scheduler.num_preemptions > 0
    assert scheduler.num_used_blocks == 0


def test_blocks_are_free_when_all_who_hold_them_have_gone_and_no_sooner() -> None:
    scheduler = make_scheduler(num_stages=1, num_blocks=6, block_size=BLOCK_SIZE)
    oldest, *family = [make_request(0, 4, SamplingParams(max_tokens=20)), *make_family(2, 9, first_id=1)]
    add_all(scheduler, [oldest, *family])
    for plan in fill(scheduler):
        land(scheduler, plan)
    assert scheduler.num_used_blocks == 1 + 2 + 1 + 1
    # The youngest alone would free one, beside the free one; the other then three, two of which both hold.
    assert scheduler._make_room(4, oldest, NextPlan())
    assert [request.is_running for request in family] == [False, False]
    assert scheduler.num_used_blocks == 1
    assert not scheduler._make_room(6, oldest, NextPlan())
    scheduler.check_integrity()


def test_a_prompt_that_waits_for_its_priority_keeps_no_other_from_it() -> None:
    scheduler = make_scheduler(num_stages=1, max_batch_size=2, max_chunk_tokens=10)
    family = make_family(3, 25, SamplingParams(max_tokens=2, priority=1))
    urgent = make_request(9, 5, SamplingParams(max_tokens=2, priority=-1))
    add_all(scheduler, family)
    in_flight = fill(scheduler)
    scheduler.add(urgent)
    for plan in in_flight:
        land(scheduler, plan)
    assert [new.request_id for plan in drive_on(scheduler) for new in plan.new_requests] == [9, 1, 2]


def told(start: int, num_tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(position, -float(position), 1, ()) for position in range(start, start + num_tokens))


def test_prompt_logprobs_are_those_of_whoever_computed_the_prompt_even_if_it_is_gone() -> None:
    scheduler = make_scheduler(num_stages=2, max_chunk_tokens=10)
    [leader, follower] = make_family(2, 15, SamplingParams(max_tokens=2, prompt_logprobs=0))
    add_all(scheduler, [leader, follower])
    first, second, third = fill(scheduler)
    assert [chunk.request_id for chunk in third.chunks] == [1]
    scheduler.abort(0)
    scheduler.update(Result(first.plan_id, (), prompt_logprobs=(PromptLogprobs(0, 1, told(1, 10)),)))
    scheduler.update(Result(second.plan_id, (5,), prompt_logprobs=(PromptLogprobs(0, 11, told(11, 4)),)))
    [output] = scheduler.update(Result(third.plan_id, (6,)))
    assert output.request is follower
    assert follower.prompt.logprobs == list(told(1, 14))
