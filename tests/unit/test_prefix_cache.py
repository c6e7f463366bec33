"""Requests begin with the whole blocks that earlier ones have left: which blocks, until when, for whom. Over plans."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.plan import KVPrefix, Plan, Result
from gptj_dist.engine.request import FinishReason, Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import BROKEN_TOKEN, AdapterChoice, AdapterSource, Pooling, SamplingParams
from tests.fakes import FakeStages
from tests.unit.test_scheduler import EOS, fill, land

BLOCK_SIZE = 4
TEXT = tuple(range(1, 100))


class Server:
    """A scheduler with stages that check its plans."""

    def __init__(
        self,
        num_blocks: int = 1000,
        max_batch_size: int = 8,
        keeps_prefixes: bool = True,
        max_chunk_tokens: int | None = None,
    ) -> None:
        config = SchedulerConfig(1, num_blocks, BLOCK_SIZE, max_batch_size, (EOS,), max_chunk_tokens)
        self.scheduler = Scheduler(replace(config, keeps_prefixes=keeps_prefixes))
        self.stages = FakeStages(num_blocks, BLOCK_SIZE, max_batch_size)
        self.num_requests = 0

    def begin(self, tokens: Sequence[int], params: SamplingParams | None = None) -> Request:
        """Adds a request of one token."""
        request = Request(self.num_requests, Prompt(tuple(tokens)), params or SamplingParams(max_tokens=1), 0)
        self.num_requests += 1
        self.scheduler.add(request)
        return request

    def finish(self) -> list[KVPrefix | None]:
        """Runs until nothing is left. Returns what requests began with, in the order in which they began."""
        begun, in_flight = [], deque[Plan]()
        while self.scheduler.has_requests:
            for plan in fill(self.scheduler):
                self.stages.apply(plan)
                self.scheduler.check_integrity()
                begun += [new.begins_with for new in plan.new_requests]
                in_flight.append(plan)
            land(self.scheduler, in_flight.popleft())
            self.scheduler.check_integrity()
        return begun

    def run(self, tokens: Sequence[int], params: SamplingParams | None = None) -> int:
        """Runs one request; returns how many of its tokens were cached."""
        request = self.begin(tokens, params)
        self.finish()
        return request.num_cached_tokens


def test_whole_blocks_are_found_and_the_last_token_is_always_computed() -> None:
    server = Server()
    assert server.run(TEXT[:10]) == 0
    assert [server.run(TEXT[:length]) for length in (4, 5, 8, 9, 10, 30)] == [0, 4, 4, 8, 8, 8]
    assert server.run(TEXT[:30]) == 28
    assert server.run((0, *TEXT[1:30])) == 0, "another first token, and all blocks are others"
    assert server.run((*TEXT[:12], 0, *TEXT[13:30])) == 12
    assert server.scheduler.num_used_blocks == 0


def test_tokens_that_were_generated_are_found_too() -> None:
    server = Server()
    request = server.begin(TEXT[:6], SamplingParams(max_tokens=9, ignore_eos=True))
    server.finish()
    assert server.run((*request.token_ids, 7, 7)) == 12, "all whole blocks but that of the last token, not computed"


def test_what_running_requests_have_computed_is_shared_with_them() -> None:
    server = Server()
    one = server.begin(TEXT[:40], SamplingParams(max_tokens=5))
    [plan] = fill(server.scheduler)
    land(server.scheduler, plan)
    other = server.begin((*TEXT[:20], 0, 0))
    fill(server.scheduler)
    assert other.blocks[:5] == one.blocks[:5]
    assert other.num_cached_tokens == 20
    server.scheduler.check_integrity()
    server.scheduler.abort(one.request_id)
    server.scheduler.check_integrity()
    assert server.scheduler.num_used_blocks == 6


def test_the_least_recently_used_blocks_go_first_and_of_a_request_the_last_ones() -> None:
    server = Server(num_blocks=12)
    server.run(TEXT[:16])
    server.run(range(200, 216))
    assert server.run(TEXT[:17]) == 16  # used again
    assert server.scheduler.pool.num_kept == 8
    server.run(range(300, 320))  # one more than is empty
    assert server.scheduler.pool.num_evicted == 1
    assert server.run((*TEXT[:16], 5)) == 16
    assert server.run(range(200, 217)) == 8, "the last block was taken, and then the one before it"


def test_cached_blocks_keep_no_request_waiting() -> None:
    server = Server(num_blocks=8)
    for first in range(0, 600, 100):
        server.run(range(first + 1, first + 30))
    assert server.scheduler.num_used_blocks == 0
    whole = server.begin(TEXT[:31])
    assert server.finish() == [None]
    assert whole.num_cached_tokens == 0


def test_found_blocks_are_not_counted_as_room() -> None:
    """Five of eight blocks are cached, three are used: a request that begins with the five has room for no others."""
    server = Server(num_blocks=8)
    server.run(TEXT[:20])
    running = server.begin(range(200, 212), SamplingParams(max_tokens=1))
    server.scheduler.schedule()
    waiting = server.begin(TEXT[:22])
    assert server.scheduler.schedule() is None
    assert not waiting.is_running
    server.scheduler.check_integrity()
    assert running.is_running


def _adapted(name: str, strength: float = 1.0) -> SamplingParams:
    return SamplingParams(max_tokens=1, adapters=(AdapterChoice(name, strength, AdapterSource(f"/{name}", name)),))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (None, SamplingParams(max_tokens=1, cache_salt="mine")),
        (SamplingParams(max_tokens=1, cache_salt="yours"), SamplingParams(max_tokens=1, cache_salt="mine")),
        (None, _adapted("poet")),
        (_adapted("poet"), _adapted("cook")),
        (_adapted("poet"), _adapted("poet", 0.5)),
    ],
)
def test_other_salts_and_adapters_have_other_blocks(one: SamplingParams | None, other: SamplingParams) -> None:
    server = Server()
    assert [server.run(TEXT, params) for params in (one, other, one, other)] == [0, 0, 96, 96]


def test_sampling_makes_no_difference() -> None:
    server = Server()
    server.run(TEXT)
    assert server.run(TEXT, SamplingParams(max_tokens=1, temperature=0, seed=3, logprobs=2)) == 96


@pytest.mark.parametrize("wanted", [{"prompt_logprobs": 0}, {"pooling": Pooling()}])
def test_what_needs_the_hidden_states_of_all_tokens_begins_anew(
    wanted: dict[str, object],
) -> None:
    server = Server()
    server.run(TEXT)
    params = SamplingParams(max_tokens=0, **wanted)  # type: ignore[arg-type]
    request = server.begin(TEXT, params)
    plans = fill(server.scheduler)
    assert [new.begins_with for plan in plans for new in plan.new_requests] == [None]
    server.scheduler.abort(request.request_id)
    assert server.scheduler.num_used_blocks == 0


def test_requests_of_one_prompt_begin_with_it_once_and_then_with_each_other() -> None:
    server = Server()
    server.run(TEXT[:20])
    prompt = Prompt(TEXT[:30])
    for request_id in range(1, 4):
        server.scheduler.add(Request(request_id, prompt, SamplingParams(max_tokens=3), request_id))
    first, *others = server.finish()
    assert first is not None
    assert (first.source_id, first.num_tokens) == (None, 20)
    assert [other and (other.source_id, other.num_tokens) for other in others] == [(1, 29), (1, 29)]


def test_requests_that_begin_alike_and_arrive_together_compute_it_once() -> None:
    server = Server()
    one, other = server.begin((*TEXT[:40], 1, 1)), server.begin((*TEXT[:40], 2, 2))
    unlike = server.begin(range(200, 210))
    first, second = fill(server.scheduler)
    assert [chunk.request_id for chunk in first.chunks] == [one.request_id, unlike.request_id]
    assert [(chunk.request_id, chunk.start) for chunk in second.chunks] == [(other.request_id, 40)]
    server.scheduler.check_integrity()


def test_a_request_waits_for_all_that_is_alike_also_over_several_plans() -> None:
    server = Server(max_chunk_tokens=20)
    server.begin(TEXT)
    other = server.begin((*TEXT[:50], *range(200, 210)))
    server.finish()
    assert other.num_cached_tokens == 48


def test_a_request_does_not_wait_for_less_than_a_step_costs_nor_for_one_that_is_gone() -> None:
    server = Server()
    server.begin(TEXT[:40])
    short, long = server.begin((*TEXT[:12], 0, 0)), server.begin((*TEXT[:16], 0, 0))
    next_plan = server.scheduler.schedule()
    assert next_plan is not None
    assert [short.is_running, long.is_running] == [True, False]
    server = Server(max_chunk_tokens=8)
    gone, left = server.begin(TEXT[:40]), server.begin(TEXT[:41])
    server.scheduler.schedule()
    server.scheduler.abort(gone.request_id)
    server.scheduler.schedule()
    assert left.is_running


def test_what_wants_logprobs_of_its_prompt_does_not_wait() -> None:
    server = Server()
    server.begin(TEXT)
    scored = server.begin(TEXT, SamplingParams(max_tokens=1, prompt_logprobs=0))
    server.scheduler.schedule()
    assert scored.is_running


def test_a_request_that_was_preempted_begins_with_its_own_blocks_again() -> None:
    server = Server(num_blocks=13, max_batch_size=2)
    for first in (1, 200):
        server.begin(range(first, first + 20), SamplingParams(max_tokens=20, ignore_eos=True))
    begun = server.finish()
    assert server.scheduler.num_preemptions > 0
    assert any(prefix is not None and prefix.num_tokens >= 4 for prefix in begun[2:])


@pytest.mark.parametrize("is_preempted", [False, True])
def test_blocks_of_a_request_that_computed_nan_are_forgotten(is_preempted: bool) -> None:
    server = Server()
    request = server.begin(TEXT)
    [plan] = fill(server.scheduler)
    if is_preempted:
        server.scheduler._preempt(request)
        assert server.scheduler.pool.num_kept == len(TEXT) // BLOCK_SIZE
    [output] = server.scheduler.update(Result(plan.plan_id, (BROKEN_TOKEN,)))
    assert (output.request, output.finish_reason) == (request, FinishReason.ERROR)
    assert server.scheduler.pool.num_kept == 0


def test_blocks_of_lost_stages_are_forgotten() -> None:
    server = Server()
    server.run(TEXT)
    server.scheduler.drain()
    assert server.scheduler.pool.num_kept == 0
    server.scheduler.check_integrity()


def test_it_can_be_turned_off() -> None:
    server = Server(keeps_prefixes=False)
    assert [server.run(TEXT), server.run(TEXT)] == [0, 0]
    assert server.scheduler.pool.num_kept == 0


class TestPool:
    def test_two_blocks_with_the_same_content_have_one_key(self) -> None:
        pool = BlockPool(4, BLOCK_SIZE)
        one, other = pool.take(2)
        pool.keep(one, b"key")
        pool.keep(other, b"key")
        pool.give_back([one, other])
        assert (pool.find([b"key"]), pool.num_kept, pool.num_free) == ([one], 1, 4)

    def test_a_search_ends_at_the_first_gap(self) -> None:
        pool = BlockPool(4, BLOCK_SIZE)
        blocks = pool.take(3)
        for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
            pool.keep(block, key)
        assert pool.find([b"a", b"b", b"c"]) == blocks
        pool.forget(blocks[1:2])
        assert pool.find([b"a", b"b", b"c"]) == blocks[:1]
        assert pool.find([b"x", b"a"]) == []
