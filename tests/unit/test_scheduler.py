"""The scheduler: long random walks against a model of what stages hold, then its promises one by one."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import pytest

from gptj_dist.chunking import MAX_CHUNK_TOKENS, StepCost, best_chunk_tokens, most_chunk_tokens_beside_decodes
from gptj_dist.engine.chunk_sizes import UNKNOWN_COST
from gptj_dist.engine.plan import Chunk, Embedding, NewRequest, Plan, Result, StageTiming
from gptj_dist.engine.request import FinishReason, Prompt, Request, run_order
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import NextPlan, SchedulerConfig, TokenOutput
from gptj_dist.errors import RequestTooLongError
from gptj_dist.params import AdapterChoice, Pooling, SamplingParams, TokenLogprobs
from tests.fakes import FakeStages

EOS = 0
VOCAB_SIZE = 50
STAGE_COUNTS = (1, 2, 3, 4, 7)


class Walk:
    """Drives a scheduler at random; after each step compares it with stages and with a record of every request.

    Args:
        longest_tokens: the most tokens that a request of the walk needs room for, but for those that are too long.
    """

    def __init__(self, config: SchedulerConfig, longest_tokens: int, rng: random.Random) -> None:
        self.config, self.longest_tokens, self.rng = config, longest_tokens, rng
        self.next_request_id = 0
        self.num_drafts = self.num_accepted = 0
        self.num_preemptions = self.num_drains = self.num_copies = self.num_cached = 0
        self.beginnings = [tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(longest_tokens)) for _ in range(3)]
        self.latest: list[tuple[Prompt, SamplingParams]] = []
        self.tokens: dict[int, list[int]] = {}
        self.requests: dict[int, Request] = {}
        self.start_pipeline()

    def start_pipeline(self) -> None:
        config = self.config
        self.scheduler = Scheduler(config)
        self.stages = FakeStages(config.num_blocks, config.block_size, config.max_batch_size)
        self.in_flight: deque[tuple[Plan, list[int]]] = deque()
        self.computed: set[tuple[str | None, tuple[int, ...]]] = set()

    def go(self, num_steps: int) -> None:
        steps: list[Callable[[], object]] = [self.add, self.schedule, self.update, self.abort, self.drain]
        for step in self.rng.choices(steps, weights=[20, 45, 40, 2, 0.5], k=num_steps):
            step()
            self.scheduler.check_integrity()

    def finish(self) -> None:
        """All requests end, without more coming, and leave nothing behind."""
        for _ in range(5000):
            while self.schedule():
                self.scheduler.check_integrity()
            if not self.in_flight:
                break
            self.update()
            self.scheduler.check_integrity()
        assert not self.requests, f"requests {sorted(self.requests)} never end"
        assert not self.scheduler.has_requests
        assert self.scheduler.num_used_blocks == self.scheduler.num_running == self.scheduler.num_waiting == 0

    def add(self) -> None:
        rng = self.rng
        max_tokens = rng.randint(1, 12)
        is_too_long = rng.random() < 0.03
        room = self.config.num_blocks * self.config.block_size if is_too_long else self.longest_tokens
        num_prompt = room - max_tokens + 2 if is_too_long else rng.randint(1, max(1, room - max_tokens + 1))
        num_prompt = num_prompt if is_too_long or rng.random() < 0.3 else rng.randint(1, min(num_prompt, 12))
        max_tokens = max_tokens if is_too_long else min(max_tokens, room)
        prompt = tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(max(1, num_prompt)))
        num_common = rng.randint(0, len(prompt)) if not is_too_long else 0
        prompt = rng.choice(self.beginnings)[:num_common] + prompt[num_common:]
        params = SamplingParams(
            max_tokens=max_tokens,
            cache_salt=rng.choice((None, None, "salt")),
            ignore_eos=rng.random() < 0.3,
            min_tokens=rng.randint(0, 1),
            priority=rng.choice((0, 0, 0, -3, 7)),
        )
        if not is_too_long and rng.random() < 0.1:
            params = SamplingParams(max_tokens=0, pooling=Pooling(), priority=params.priority)
        shared = Prompt(prompt, can_share=params.pooling is None)
        if self.latest and not is_too_long and rng.random() < 0.5:
            shared, params = rng.choice(self.latest)
        elif not is_too_long:
            self.latest = [*self.latest[-2:], (shared, params)]
        request = Request(self.next_request_id, shared, params, rng.getrandbits(64))
        self.next_request_id += 1
        if is_too_long and num_prompt >= 1:
            with pytest.raises(RequestTooLongError):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        self.tokens[request.request_id] = list(shared.token_ids)
        self.requests[request.request_id] = request

    def schedule(self) -> bool:
        awaited = {id_ for plan, sampled in self.in_flight for id_ in (*sampled, *pooled_ids(plan))}
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.in_flight or not self.requests, "there is work, nothing is in flight, and nothing is planned"
            return False
        self.check_released(plan)
        self.stages.apply(plan)
        self.check_new_requests(plan)
        self.check_chunks(plan, awaited)
        for chunk in plan.chunks:
            self.note_computed(chunk, chunk.num_known)
        self.in_flight.append((plan, [chunk.request_id for chunk in plan.chunks if chunk.samples]))
        assert self.scheduler.num_in_flight == len(self.in_flight) <= self.config.num_stages + 1
        return True

    def note_computed(self, chunk: Chunk, num_tokens: int) -> None:
        tokens, salt = self.tokens[chunk.request_id], self.requests[chunk.request_id].params.cache_salt
        computed = [*tokens[: chunk.start], *chunk.token_ids[:num_tokens]]
        self.computed |= {(salt, tuple(computed[:end])) for end in range(self.config.block_size, len(computed) + 1)}

    def check_released(self, plan: Plan) -> None:
        preempted = [id_ for id_ in plan.released if id_ in self.requests]
        self.num_preemptions += len(preempted)
        first = min(self.requests.values(), key=run_order, default=None)
        assert first is None or first.request_id not in preempted, "the first was preempted"

    def check_new_requests(self, plan: Plan) -> None:
        for new in plan.new_requests:
            request, params = self.requests[new.request_id], self.requests[new.request_id].params
            settings = (new.request_id, params, request.noise_key, len(request.prompt_ids))
            assert new == NewRequest(*settings, begins_with=new.begins_with)
            if new.begins_with is None:
                continue
            if new.begins_with.source_id is None:
                assert (params.cache_salt, new.begins_with.token_ids) in self.computed, (
                    "another salt, or never computed"
                )
                self.num_cached += 1
                continue
            source = self.requests[new.begins_with.source_id]
            assert (source.prompt, new.begins_with.num_tokens) == (request.prompt, len(request.prompt_ids) - 1)
            self.num_copies += 1

    def check_chunks(self, plan: Plan, awaited: set[int]) -> None:
        for chunk in plan.chunks:
            assert chunk.request_id in self.requests, "a chunk of a request that is gone"
            assert chunk.request_id not in awaited, "a chunk of a request whose next token is not known yet"
            tokens, stop = self.tokens[chunk.request_id], chunk.start + chunk.num_known
            assert list(chunk.token_ids[: chunk.num_known]) == tokens[chunk.start : stop], "wrong tokens"
            assert chunk.num_drafts <= self.config.max_drafts
            assert not chunk.num_drafts or (chunk.samples and chunk.num_known == 1), "drafts beside other work"
            self.num_drafts += chunk.num_drafts
            is_due = chunk.ends_embedding if self.pools(chunk.request_id) else chunk.samples
            assert is_due == (stop == len(tokens)), "samples too early, or not at all"
            assert not (chunk.samples and chunk.ends_embedding)
        num_prompt_tokens = sum(chunk.num_known for chunk in plan.chunks if chunk.num_known > 1)
        assert num_prompt_tokens <= (self.config.max_chunk_tokens or MAX_CHUNK_TOKENS)

    def update(self) -> None:
        if not self.in_flight:
            return
        plan, _ = self.in_flight.popleft()
        tokens, num_accepted = list[tuple[int, int, bool]](), list[int]()
        for chunk in (chunk for chunk in plan.chunks if chunk.samples):
            accepted = chunk.drafts[: self.rng.randint(0, chunk.num_drafts)]
            if chunk.request_id in self.requests:
                self.note_computed(chunk, chunk.num_known + len(accepted))
            token = EOS if self.rng.random() < 0.05 else self.rng.randrange(1, self.rng.choice((3, VOCAB_SIZE)))
            tokens += [(chunk.request_id, each, True) for each in accepted]
            tokens.append((chunk.request_id, token, False))
            num_accepted += [len(accepted)] if chunk.num_drafts else []
        self.num_accepted += sum(num_accepted)
        embeddings = tuple(Embedding(id_, str(id_).encode()) for id_ in pooled_ids(plan))
        token_ids, timings = tuple(token for _, token, _ in tokens), self.timings()
        result = Result(plan.plan_id, token_ids, timings, embeddings=embeddings, num_accepted=tuple(num_accepted))
        outputs = self.scheduler.update(result)
        expected = list(self.take_tokens(tokens))
        for id_ in pooled_ids(plan):
            if (request := self.requests.pop(id_, None)) is not None:
                del self.tokens[id_]
                expected.append(TokenOutput(request, None, FinishReason.LENGTH, embedding=str(id_).encode()))
        assert outputs == expected

    def pools(self, request_id: int) -> bool:
        return self.requests[request_id].params.pooling is not None

    def timings(self) -> tuple[StageTiming, ...]:
        """Anything that clocks may say, whatever was computed; at times nothing."""
        num_stages = self.config.num_stages if self.rng.random() < 0.8 else 0
        return tuple(StageTiming(7, 7 + self.rng.choice((0, 1, 10**5, 10**9))) for _ in range(num_stages))

    def take_tokens(self, tokens: Iterable[tuple[int, int, bool]]) -> Iterator[TokenOutput]:
        for request_id, token, is_draft in tokens:
            if request_id in self.requests:
                request = self.requests[request_id]
                self.tokens[request_id].append(token)
                assert request.token_ids[: len(self.tokens[request_id])] == self.tokens[request_id]
                is_full = len(self.tokens[request_id]) == len(request.prompt_ids) + request.params.max_tokens
                reason = FinishReason.LENGTH if is_full else None
                reason = FinishReason.STOP if token == EOS and not request.params.ignore_eos else reason
                if reason is not None:
                    del self.requests[request_id], self.tokens[request_id]
                yield TokenOutput(request, token, reason, is_draft=is_draft)

    def abort(self) -> None:
        request_id = self.rng.randrange(self.next_request_id + 1)
        num_used = self.scheduler.num_used_blocks
        aborted = self.requests.pop(request_id, None)
        elsewhere = {block for request in self.requests.values() for block in request.blocks}
        num_freed = 0 if aborted is None else len(set(aborted.blocks) - elsewhere)
        self.scheduler.abort(request_id)
        assert self.scheduler.num_used_blocks == num_used - num_freed
        self.tokens.pop(request_id, None)

    def drain(self) -> None:
        """The pipeline dies. Its requests go on in a new one, behind the same scheduler or a fresh one."""
        drained, emptied = self.scheduler.drain(), self.scheduler
        emptied.check_integrity()
        assert drained == sorted(self.requests.values(), key=run_order), "not in their order"
        assert all(request.token_ids == self.tokens[request.request_id] for request in drained)
        assert emptied.num_used_blocks == emptied.num_in_flight == 0
        assert not emptied.has_requests
        self.num_drains += 1
        self.start_pipeline()
        if self.rng.random() < 0.5:
            self.scheduler = emptied
        for request in drained:
            self.scheduler.add(request)


def pooled_ids(plan: Plan) -> list[int]:
    """Whose embeddings come back with it."""
    return [chunk.request_id for chunk in plan.chunks if chunk.ends_embedding]


@pytest.mark.parametrize("max_chunk_tokens", [None, 1, 7, 64])
@pytest.mark.parametrize("num_stages", STAGE_COUNTS)
def test_random_walks_keep_every_promise_and_end(num_stages: int, max_chunk_tokens: int | None) -> None:
    rng = random.Random(f"{max_chunk_tokens} {num_stages}")
    num_preemptions = num_drains = num_copies = num_cached = num_drafts = num_accepted = 0
    for block_size in (1, 4, 16):
        for slack in (1, 1.3, 3, 12):
            longest_tokens = rng.choice((16, 40, 100))
            num_blocks = max(1, int(-(-longest_tokens // block_size) * slack))
            max_batch_size = rng.choice((1, 2, 5, 16) if slack < 3 else (3, 8, 16))
            limits = (num_stages, num_blocks, block_size, max_batch_size, (EOS,), max_chunk_tokens)
            shares_memory, can_share_blocks = rng.random() < 0.5, rng.random() < 0.75
            config = SchedulerConfig(*limits, shares_memory, can_share_blocks, max_drafts=rng.choice((0, 3, 16)))
            walk = Walk(config, longest_tokens, rng)
            try:
                walk.go(num_steps=400)
                walk.finish()
            except AssertionError as error:
                error.add_note(f"{config}, longest_tokens={longest_tokens}")
                raise
            num_preemptions += walk.num_preemptions
            num_drains += walk.num_drains
            num_copies += walk.num_copies
            num_cached += walk.num_cached
            num_drafts += walk.num_drafts
            num_accepted += walk.num_accepted
    assert num_preemptions > 0
    assert num_drains > 0
    assert num_copies > 0
    assert num_cached > 0
    assert num_drafts > num_accepted > 0


def make_scheduler(
    num_stages: int = 2,
    num_blocks: int = 1000,
    block_size: int = 16,
    max_batch_size: int = 64,
    max_chunk_tokens: int | None = None,
) -> Scheduler:
    """Without cached prefixes, as most prompts of these tests are alike."""
    limits = (num_stages, num_blocks, block_size, max_batch_size, (EOS,), max_chunk_tokens)
    return Scheduler(SchedulerConfig(*limits, keeps_prefixes=False))


def make_request(request_id: int, num_prompt_tokens: int, params: SamplingParams | None = None) -> Request:
    prompt = tuple(1 + position % (VOCAB_SIZE - 1) for position in range(num_prompt_tokens))
    return Request(request_id, Prompt(prompt), params or SamplingParams(max_tokens=100), noise_key=request_id)


def fill(scheduler: Scheduler) -> list[Plan]:
    """Schedules until no more goes; returns the plans."""
    return list(iter(scheduler.schedule, None))


def land(scheduler: Scheduler, plan: Plan, token: int = 1) -> list[TokenOutput]:
    """Takes back a plan whose sampled tokens are all `token`."""
    outputs = scheduler.update(Result(plan.plan_id, (token,) * sum(chunk.samples for chunk in plan.chunks)))
    scheduler.check_integrity()
    return outputs


def plans_until_idle(scheduler: Scheduler, in_flight: Iterable[Plan] = ()) -> list[Plan]:
    """Drives the scheduler until nothing is left to do; returns all plans, those in flight first."""
    waiting, landed = deque(in_flight), list[Plan]()
    waiting.extend(fill(scheduler))
    while waiting:
        landed.append(waiting.popleft())
        land(scheduler, landed[-1])
        waiting.extend(fill(scheduler))
    assert not scheduler.has_requests
    return landed


def chunk_sizes(plans: list[Plan]) -> list[int]:
    return [plan.num_tokens for plan in plans]


@pytest.mark.parametrize("num_stages", STAGE_COUNTS)
@pytest.mark.parametrize("surplus", [0, 1, 5, 16])
def test_decodes_are_split_evenly_and_keep_every_stage_busy(num_stages: int, surplus: int) -> None:
    scheduler = make_scheduler(num_stages)
    for request_id in range(num_stages + surplus):
        scheduler.add(make_request(request_id, num_prompt_tokens=5))
    in_flight = deque(fill(scheduler))
    for turn in range(10 * num_stages):
        if turn == 5 * num_stages:
            scheduler.add(make_request(1000, num_prompt_tokens=1))
        has_settled = 3 * num_stages <= turn < 5 * num_stages or turn >= 8 * num_stages
        sizes = [len(plan.chunks) for plan in in_flight]
        if has_settled:
            assert len(sizes) >= num_stages
            assert max(sizes) - min(sizes) <= 1
        land(scheduler, in_flight.popleft())
        in_flight.extend(fill(scheduler))


@pytest.mark.parametrize("num_stages", STAGE_COUNTS)
def test_decodes_are_even_again_after_some_have_ended(num_stages: int) -> None:
    scheduler = make_scheduler(num_stages)
    for request_id in range(3 * num_stages):
        scheduler.add(make_request(request_id, num_prompt_tokens=1))
    in_flight = deque(fill(scheduler))
    for turn in range(12 * num_stages):
        if turn == 3 * num_stages:
            for chunk in in_flight[-1].chunks[1:]:
                scheduler.abort(chunk.request_id)
        land(scheduler, in_flight.popleft())
        in_flight.extend(fill(scheduler))
    sizes = [len(plan.chunks) for plan in in_flight]
    assert len(sizes) == num_stages
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("num_requests", "num_groups"), [(2, 1), (12, 1), (63, 2)])
def test_few_decodes_of_stages_on_one_memory_share_a_micro_batch(num_requests: int, num_groups: int) -> None:
    scheduler = Scheduler(SchedulerConfig(4, 1000, 16, 64, (EOS,), shares_memory=True))
    for request_id in range(num_requests):
        scheduler.add(make_request(request_id, num_prompt_tokens=5))
    in_flight = deque(fill(scheduler))
    for _ in range(20):
        land(scheduler, in_flight.popleft())
        in_flight.extend(fill(scheduler))
    sizes = [len(plan.chunks) for plan in in_flight]
    assert (len(sizes), sum(sizes)) == (num_groups, num_requests)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_stages", STAGE_COUNTS[1:])
def test_one_long_prompt_is_cut_into_equal_chunks_that_keep_every_stage_busy(num_stages: int) -> None:
    scheduler = make_scheduler(num_stages)
    scheduler.add(make_request(0, 1000, SamplingParams(max_tokens=1)))
    in_flight = fill(scheduler)
    assert len(in_flight) == num_stages + 1
    sizes = chunk_sizes(plans_until_idle(scheduler, in_flight))
    assert sum(sizes) == 1000
    assert len(set(sizes[:-1])) == 1
    assert sizes[-1] <= sizes[0]


def test_one_stage_takes_prompts_whole_up_to_the_largest_chunk_and_halves_those_beyond() -> None:
    scheduler = make_scheduler(num_stages=1)
    scheduler.add(make_request(0, MAX_CHUNK_TOKENS, SamplingParams(max_tokens=1)))
    assert chunk_sizes(plans_until_idle(scheduler)) == [MAX_CHUNK_TOKENS]
    scheduler.add(make_request(1, MAX_CHUNK_TOKENS + 9, SamplingParams(max_tokens=1)))
    assert chunk_sizes(plans_until_idle(scheduler)) == [MAX_CHUNK_TOKENS // 2 + 5, MAX_CHUNK_TOKENS // 2 + 4]


def test_a_chunk_size_holds_until_the_backlog_is_gone_and_is_chosen_afresh_then() -> None:
    scheduler = make_scheduler(num_stages=4)
    large, small = (best_chunk_tokens(num_tokens, 4, UNKNOWN_COST) for num_tokens in (1600, 320))
    assert small < large
    scheduler.add(make_request(0, 1600, SamplingParams(max_tokens=1)))
    in_flight = fill(scheduler)
    scheduler.add(make_request(1, 50, SamplingParams(max_tokens=1)))
    assert set(chunk_sizes(plans_until_idle(scheduler, in_flight))[:-1]) == {large}
    scheduler.add(make_request(2, 320, SamplingParams(max_tokens=1)))
    assert set(chunk_sizes(plans_until_idle(scheduler))[:-1]) == {small}


def test_a_larger_backlog_makes_larger_chunks_at_once() -> None:
    scheduler = make_scheduler(num_stages=2)
    scheduler.add(make_request(0, 800))
    assert chunk_sizes(fill(scheduler)) == [best_chunk_tokens(800, 2, UNKNOWN_COST)] * 3
    scheduler.abort(0)
    scheduler.add(make_request(1, 1600))
    land(scheduler, Plan(0, (), (), ()))
    assert chunk_sizes(fill(scheduler)) == [best_chunk_tokens(1600, 2, UNKNOWN_COST)]


@pytest.mark.parametrize("end", ["abort", "drain"])
def test_a_backlog_that_went_away_no_longer_sizes_chunks(end: str) -> None:
    scheduler = make_scheduler(num_stages=4)
    scheduler.add(make_request(0, 8000))
    if end == "abort":
        scheduler.abort(0)
    else:
        scheduler.drain()
    scheduler.add(make_request(1, 800))
    assert chunk_sizes(fill(scheduler)) == [best_chunk_tokens(800, 4, UNKNOWN_COST)] * 5


def land_timed(scheduler: Scheduler, plan: Plan, cost: StepCost) -> None:
    """As `land`; the slowest of two stages took what a step costs."""
    slowest_ns = int((cost.overhead_s + plan.num_tokens * cost.row_s) * 1e9)
    timings = (StageTiming(5, 5 + slowest_ns // 2), StageTiming(3, 3 + slowest_ns))
    scheduler.update(Result(plan.plan_id, (1,) * sum(chunk.samples for chunk in plan.chunks), timings))
    scheduler.check_integrity()


def scheduler_that_knows(cost: StepCost) -> Scheduler:
    """Idle, of two stages, after two prompts of unlike length."""
    scheduler = make_scheduler(num_stages=2)
    for request_id, num_tokens in ((0, 20), (1, 900)):
        scheduler.add(make_request(request_id, num_tokens, SamplingParams(max_tokens=1)))
        in_flight = deque(fill(scheduler))
        while in_flight:
            land_timed(scheduler, in_flight.popleft(), cost)
            in_flight.extend(fill(scheduler))
    assert not scheduler.has_requests
    return scheduler


@pytest.mark.parametrize("cost", [StepCost(0.1, 1e-3), StepCost(0.001, 1e-3), StepCost(0.02, 1e-5)], ids=str)
def test_chunk_sizes_follow_what_steps_took(cost: StepCost) -> None:
    scheduler = scheduler_that_knows(cost)
    scheduler.add(make_request(2, 1000))
    [first, *_] = fill(scheduler)
    assert first.num_tokens == pytest.approx(best_chunk_tokens(1000, 2, cost), abs=1)


def test_beside_decodes_a_chunk_is_no_longer_than_the_stall_rule_lets_it() -> None:
    cost = StepCost(0.02, 4e-3)
    most = most_chunk_tokens_beside_decodes(cost)
    assert most < best_chunk_tokens(1000, 2, cost)
    scheduler = scheduler_that_knows(cost)
    scheduler.add(make_request(2, 1))
    [prefill] = fill(scheduler)
    land_timed(scheduler, prefill, cost)
    scheduler.add(make_request(3, 1000))
    beside, *others = fill(scheduler)
    assert [len(chunk.token_ids) for chunk in beside.chunks] == [1, pytest.approx(most, abs=1)]
    sizes = chunk_sizes(others)
    assert sizes == [pytest.approx(best_chunk_tokens(1000, 2, cost), abs=1)] * len(sizes)


def test_a_chunk_limit_holds_for_all_prompts_of_a_micro_batch_together() -> None:
    scheduler = make_scheduler(max_chunk_tokens=10)
    for request_id in range(3):
        scheduler.add(make_request(request_id, 6))
    first, second, *_ = fill(scheduler)
    assert [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in first.chunks] == [(0, 0, 6), (1, 0, 4)]
    assert [(chunk.request_id, chunk.start, len(chunk.token_ids)) for chunk in second.chunks] == [(1, 4, 2), (2, 0, 6)]
    assert [chunk.samples for chunk in (*first.chunks, *second.chunks)] == [True, False, True, True]


def test_no_more_requests_run_than_the_batch_may_hold_and_none_overtakes() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    for request_id in range(5):
        scheduler.add(make_request(request_id, 4, SamplingParams(max_tokens=3)))
    introduced: list[int] = []
    for plan in plans_until_idle(scheduler):
        introduced += [new.request_id for new in plan.new_requests]
        assert len({chunk.request_id for chunk in plan.chunks}) <= 2
    assert introduced == [0, 1, 2, 3, 4]


def test_a_lower_priority_runs_first_and_among_equals_the_earlier() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    for request_id, priority in enumerate((0, 5, -1, 5, 0, -(2**31))):
        scheduler.add(make_request(request_id, 4, SamplingParams(max_tokens=1, priority=priority)))
    introduced = [new.request_id for plan in plans_until_idle(scheduler) for new in plan.new_requests]
    assert introduced == [5, 2, 0, 4, 1, 3]


def test_the_lowest_priority_is_preempted_first_even_if_it_is_the_oldest() -> None:
    scheduler = make_scheduler(num_stages=1, num_blocks=8, block_size=1)
    for request_id, priority in enumerate((3, 1, 2)):
        scheduler.add(make_request(request_id, 2, SamplingParams(max_tokens=6, priority=priority)))
    plans = plans_until_idle(scheduler)
    released = [request_id for plan in plans for request_id in plan.released]
    introduced = [new.request_id for plan in plans for new in plan.new_requests]
    assert released[0] == 0
    assert introduced.count(1) == 1


def test_a_request_that_runs_is_not_preempted_for_one_that_waits() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.add(make_request(0, 4, SamplingParams(max_tokens=3, priority=9)))
    in_flight = fill(scheduler)
    scheduler.add(make_request(1, 4, SamplingParams(max_tokens=3, priority=-9)))
    introduced = [new.request_id for plan in plans_until_idle(scheduler, in_flight) for new in plan.new_requests]
    assert (introduced, scheduler.num_preemptions) == ([0, 1], 0)


def test_a_request_that_could_never_fit_is_refused_and_one_that_just_fits_is_served() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    with pytest.raises(RequestTooLongError, match="16") as refusal:
        scheduler.add(make_request(0, 10, SamplingParams(max_tokens=8)))
    assert refusal.value.param == "max_tokens"
    assert not scheduler.has_requests
    scheduler.add(make_request(1, 10, SamplingParams(max_tokens=7)))
    assert sum(chunk.samples for plan in plans_until_idle(scheduler) for chunk in plan.chunks) == 7


def test_a_result_out_of_order_is_refused() -> None:
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match="expected None"):
        scheduler.update(Result(0, ()))
    scheduler.add(make_request(0, 500))
    first, second, *_ = fill(scheduler)
    with pytest.raises(ValueError, match=f"result of plan {second.plan_id} arrived, expected {first.plan_id}"):
        scheduler.update(Result(second.plan_id, ()))
    assert scheduler.update(Result(first.plan_id, ())) == []


def test_abort_frees_blocks_at_once_and_drops_the_token_on_its_way() -> None:
    scheduler = make_scheduler(num_blocks=10, block_size=4)
    scheduler.add(make_request(0, 10, SamplingParams(max_tokens=9)))
    scheduler.add(make_request(1, 10, SamplingParams(max_tokens=9)))
    [plan] = fill(scheduler)
    assert scheduler.num_used_blocks == 6
    scheduler.abort(0)
    assert scheduler.num_used_blocks == 3
    scheduler.check_integrity()
    assert [output.request.request_id for output in land(scheduler, plan)] == [1]
    assert fill(scheduler)[0].released == (0,)
    scheduler.abort(1)
    assert scheduler.num_used_blocks == 0
    assert not scheduler.has_requests


def test_a_request_does_not_wait_for_the_plan_of_one_that_was_aborted() -> None:
    scheduler = make_scheduler(num_stages=2)
    scheduler.add(make_request(0, 4))
    scheduler.add(make_request(1, 4))
    [prefill] = fill(scheduler)
    land(scheduler, prefill)
    first, _second = fill(scheduler)
    land(scheduler, first)
    scheduler.abort(1)
    [plan] = fill(scheduler)
    assert [chunk.request_id for chunk in plan.chunks] == [0]


def test_aborting_a_request_that_waits_or_is_unknown_tells_stages_nothing() -> None:
    scheduler = make_scheduler(max_batch_size=1)
    scheduler.add(make_request(0, 4))
    scheduler.add(make_request(1, 4))
    [plan] = fill(scheduler)
    scheduler.abort(1)
    scheduler.abort(7)
    land(scheduler, plan)
    [plan] = fill(scheduler)
    assert plan.released == ()
    assert [chunk.request_id for chunk in plan.chunks] == [0]


def test_a_preempted_requests_token_on_its_way_is_kept_and_not_sampled_twice() -> None:
    scheduler = make_scheduler(num_stages=2, num_blocks=10, block_size=1)
    old, young = (make_request(request_id, 4, SamplingParams(max_tokens=5)) for request_id in range(2))
    scheduler.add(old)
    scheduler.add(young)
    [prefill] = fill(scheduler)
    land(scheduler, prefill, token=11)
    old_decode, young_decode = fill(scheduler)
    land(scheduler, old_decode, token=12)
    [old_decode] = fill(scheduler)
    assert old_decode.released == (young.request_id,)
    assert (scheduler.num_preemptions, scheduler.num_waiting, young.is_awaiting_token) == (1, 1, True)
    [output] = land(scheduler, young_decode, token=13)
    assert (output.request, output.token_id) == (young, 13)
    scheduler.abort(old.request_id)
    [again] = fill(scheduler)
    assert again.new_requests == (young.introduction(),)
    [chunk] = again.chunks
    assert (chunk.start, chunk.token_ids, chunk.samples) == (0, (*young.prompt_ids, 11, 13), True)
    plans = plans_until_idle(scheduler, [old_decode, again])
    assert young.token_ids[len(young.prompt_ids) :] == [11, 13, 1, 1, 1]
    assert sum(chunk.samples for plan in plans[1:] for chunk in plan.chunks) == 3


def test_the_oldest_request_is_never_preempted() -> None:
    scheduler = make_scheduler(num_blocks=12, block_size=1, max_batch_size=4)
    for request_id in range(6):
        scheduler.add(make_request(request_id, 3, SamplingParams(max_tokens=9)))
    plans = plans_until_idle(scheduler)
    introduced = [new.request_id for plan in plans for new in plan.new_requests]
    assert scheduler.num_preemptions > 0
    assert introduced.count(0) == 1
    assert len(introduced) == 6 + scheduler.num_preemptions


@pytest.mark.parametrize(
    ("sampled", "ignore_eos", "expected"),
    [
        ([5, EOS], False, [None, FinishReason.STOP]),
        ([5, 5, 5], False, [None, None, FinishReason.LENGTH]),
        ([5, 5, EOS], False, [None, None, FinishReason.STOP]),
        ([EOS, 5, EOS], True, [None, None, FinishReason.LENGTH]),
    ],
)
def test_a_request_ends_at_end_of_text_or_at_its_length(
    sampled: list[int], ignore_eos: bool, expected: list[FinishReason | None]
) -> None:
    scheduler = make_scheduler()
    request = make_request(0, 4, SamplingParams(max_tokens=3, ignore_eos=ignore_eos))
    scheduler.add(request)
    for token, reason in zip(sampled, expected, strict=True):
        [plan] = fill(scheduler)
        assert land(scheduler, plan, token) == [TokenOutput(request, token, reason)]
    assert fill(scheduler) == []
    assert not scheduler.has_requests
    assert scheduler.num_used_blocks == 0


def test_an_introduction_carries_the_sampling_params_unchanged() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, min_tokens=3)
    scheduler = make_scheduler()
    scheduler.add(Request(3, Prompt((1, 2, 3, 4)), params, noise_key=99))
    [plan] = fill(scheduler)
    assert plan.new_requests == (NewRequest(3, params, noise_key=99, num_prompt_tokens=4),)
    assert plan.new_requests[0].params is params


def test_a_request_that_generates_no_token_gets_no_log_probabilities_of_one() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0, 4, SamplingParams(max_tokens=0, logprobs=0)))
    [plan] = fill(scheduler)
    [output] = scheduler.update(Result(plan.plan_id, (7,), logprobs=(TokenLogprobs(7, -1.0, 1, ()),)))
    assert (output.token_id, output.logprobs, output.finish_reason) == (None, None, FinishReason.LENGTH)


def test_drained_requests_go_on_in_a_fresh_scheduler_with_their_tokens() -> None:
    dead = make_scheduler(max_batch_size=1)
    begun, queued = (make_request(request_id, 4, SamplingParams(max_tokens=4)) for request_id in range(2))
    dead.add(begun)
    dead.add(queued)
    for token in (11, 12):
        [plan] = fill(dead)
        land(dead, plan, token)
    fill(dead)
    assert dead.drain() == [begun, queued]
    dead.check_integrity()
    assert (dead.num_in_flight, dead.num_used_blocks, dead.has_requests) == (0, 0, False)
    fresh = make_scheduler(max_batch_size=1)
    fresh.add(begun)
    fresh.add(queued)
    [plan] = fill(fresh)
    assert plan.chunks[0].token_ids == (*begun.prompt_ids, 11, 12)
    plans_until_idle(fresh, [plan])
    assert begun.token_ids == [*begun.prompt_ids, 11, 12, 1, 1]
    assert queued.num_output_tokens == 4


def fill_stages(scheduler: Scheduler, stages: FakeStages, in_flight: deque[Plan]) -> None:
    """As `fill`, and the stages check the plans."""
    for plan in fill(scheduler):
        stages.apply(plan)
        in_flight.append(plan)


def scheduler_where_an_older_request_waits(stages: FakeStages, in_flight: deque[Plan]) -> Scheduler:
    """Requests 2 and 4 run, 3 waits: it was preempted for a plan that had 4 in it already. Walks hardly get there."""
    scheduler = make_scheduler(num_blocks=89, block_size=1, max_batch_size=16, max_chunk_tokens=40)
    params = SamplingParams(max_tokens=7)
    for turn in range(14):
        fill_stages(scheduler, stages, in_flight)
        if turn == 0:
            scheduler.add(make_request(0, 4, params))
            scheduler.add(make_request(1, 2, params))
        if turn == 2:  # there is no room for the second chunk of 2, so 3 and 4 run, too
            scheduler.add(make_request(2, 80, params))
            scheduler.add(make_request(3, 1, params))
            scheduler.add(make_request(4, 1, params))
        if turn == 11:  # now there is room for that chunk, if 3 gives up its blocks
            scheduler.abort(1)
        fill_stages(scheduler, stages, in_flight)
        land(scheduler, in_flight.popleft())
    fill_stages(scheduler, stages, in_flight)
    assert scheduler.num_preemptions == 1
    assert sorted(stages.requests) == [2, 4]
    return scheduler


def test_drained_requests_come_in_order_of_arrival_even_where_an_older_one_waits() -> None:
    scheduler = scheduler_where_an_older_request_waits(FakeStages(89, 1, 16), deque())
    drained = scheduler.drain()
    assert [request.request_id for request in drained] == [2, 3, 4]
    fresh = make_scheduler(num_blocks=89, block_size=1)
    for request in drained:
        fresh.add(request)
    fresh.check_integrity()


def test_an_older_request_that_waits_runs_again_before_any_newcomer() -> None:
    stages, in_flight = FakeStages(89, 1, 16), deque[Plan]()
    scheduler = scheduler_where_an_older_request_waits(stages, in_flight)
    scheduler.add(make_request(5, 1, SamplingParams(max_tokens=7)))
    scheduler.abort(2)
    plans = list(in_flight)
    while scheduler.has_requests:
        fill_stages(scheduler, stages, in_flight)
        plans.append(in_flight[0])
        land(scheduler, in_flight.popleft())
    assert [new.request_id for plan in plans for new in plan.new_requests] == [3, 5]


def busy_scheduler() -> Scheduler:
    """Two requests run, one of them with a token on its way, and two wait."""
    scheduler = make_scheduler(num_blocks=30, block_size=4, max_batch_size=2)
    for request_id in range(4):
        scheduler.add(make_request(request_id, 9))
    [plan] = fill(scheduler)
    land(scheduler, plan)
    assert scheduler.schedule() is not None
    scheduler.check_integrity()
    return scheduler


def corrupt_two_holders(scheduler: Scheduler) -> None:
    scheduler._running.requests[1].blocks[0] = scheduler._running.requests[0].blocks[0]


def corrupt_held_block_is_free(scheduler: Scheduler) -> None:
    scheduler._pool.give_back(scheduler._running.requests[0].blocks[:1])


def corrupt_lost_block(scheduler: Scheduler) -> None:
    scheduler._pool.take(1)


def corrupt_block_free_twice(scheduler: Scheduler) -> None:
    scheduler._pool._empty[0] = scheduler._pool._empty[1]


def corrupt_running_order(scheduler: Scheduler) -> None:
    scheduler._running.requests.reverse()


def corrupt_waiting_order(scheduler: Scheduler) -> None:
    scheduler._waiting._requests.reverse()


def corrupt_lost_request(scheduler: Scheduler) -> None:
    scheduler._waiting.remove(scheduler._waiting[0])


def corrupt_batch_size(scheduler: Scheduler) -> None:
    for request in list(scheduler._waiting):
        scheduler._admit(NextPlan(), request, None)


def corrupt_too_many_in_flight(scheduler: Scheduler) -> None:
    scheduler._in_flight.extend([scheduler._in_flight[0]] * 3)


def corrupt_two_samplings(scheduler: Scheduler) -> None:
    scheduler._in_flight.append(scheduler._in_flight[0])


def corrupt_awaited_in_vain(scheduler: Scheduler) -> None:
    scheduler._running.requests[1].is_awaiting_token = True


def corrupt_too_much_computed(scheduler: Scheduler) -> None:
    scheduler._running.requests[0].num_computed += 1


def corrupt_missing_block(scheduler: Scheduler) -> None:
    scheduler._pool.give_back([scheduler._running.requests[0].blocks.pop()])


def corrupt_waiting_request_holds(scheduler: Scheduler) -> None:
    scheduler._waiting[0].num_computed = 1
    scheduler._waiting[0].blocks = scheduler._running.requests[0].blocks[:1]


def corrupt_waiting_tokens(scheduler: Scheduler) -> None:
    scheduler._waiting.num_tokens += 1


def corrupt_holders(scheduler: Scheduler) -> None:
    scheduler._running.requests[0].prompt.holders.clear()


def corrupt_holder_is_gone(scheduler: Scheduler) -> None:
    scheduler._running.requests[0].prompt.holders.append(make_request(99, 9))


def corrupt_shared_by_strangers(scheduler: Scheduler) -> None:
    one, other = scheduler._running.requests
    other.token_ids[0] += 1
    scheduler._pool.give_back(other.blocks[:1])
    scheduler._pool.share(one.blocks[:1])
    other.blocks[0] = one.blocks[0]


def corrupt_shared_block_is_written(scheduler: Scheduler) -> None:
    one, other = scheduler._running.requests
    scheduler._pool.give_back(other.blocks)
    scheduler._pool.share(one.blocks)
    other.blocks = list(one.blocks)
    one.prompt.holders.append(other)
    other.prompt = one.prompt


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_two_holders, "miscounts the holders"),
        (corrupt_held_block_is_free, "held block is free"),
        (corrupt_lost_block, "block is lost"),
        (corrupt_block_free_twice, "free twice"),
        (corrupt_running_order, "running requests are out of order"),
        (corrupt_waiting_order, "waiting requests are out of order"),
        (corrupt_lost_request, "request is lost"),
        (corrupt_batch_size, "too many requests run"),
        (corrupt_too_many_in_flight, "too many plans in flight"),
        (corrupt_two_samplings, "two plans in flight sample"),
        (corrupt_awaited_in_vain, "awaits a token that no plan samples"),
        (corrupt_too_much_computed, "more tokens computed"),
        (corrupt_missing_block, "blocks do not match"),
        (corrupt_waiting_request_holds, "waiting request holds"),
        (corrupt_waiting_tokens, "waiting tokens are miscounted"),
        (corrupt_holders, "holders are wrong"),
        (corrupt_holder_is_gone, "a holder that does not run"),
        (corrupt_shared_by_strangers, "requests of different prompts share a block"),
        (corrupt_shared_block_is_written, "shared block is written"),
    ],
)
def test_check_integrity_catches_corruption(corrupt: Callable[[Scheduler], None], message: str) -> None:
    scheduler = busy_scheduler()
    corrupt(scheduler)
    with pytest.raises(AssertionError, match=message):
        scheduler.check_integrity()


def test_running_and_waiting_requests_are_counted_by_their_adapters() -> None:
    scheduler = make_scheduler(max_batch_size=2)
    for request_id, names in enumerate(("", "a", "ab")):
        adapters = tuple(map(AdapterChoice, names))
        scheduler.add(make_request(request_id, 5, SamplingParams(max_tokens=1, adapters=adapters)))
    fill(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert scheduler.num_of_adapters() == {"a": 2, "b": 1}
