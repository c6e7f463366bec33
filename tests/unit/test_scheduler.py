"""The scheduler: long random walks against a model of what stages hold, then its promises one by one."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from fakes import FakeStages

from gptj_dist.engine.plan import NewRequest, Plan, Result
from gptj_dist.engine.request import FinishReason, Request
from gptj_dist.engine.scheduler import MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS, Scheduler, SchedulerConfig, TokenOutput
from gptj_dist.errors import RequestTooLongError
from gptj_dist.params import SamplingParams

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
        self.num_preemptions = self.num_drains = 0
        self.tokens: dict[int, list[int]] = {}
        self.requests: dict[int, Request] = {}
        self.start_pipeline()

    def start_pipeline(self) -> None:
        config = self.config
        self.scheduler = Scheduler(config)
        self.stages = FakeStages(config.num_blocks, config.block_size, config.max_batch_size)
        self.in_flight: deque[tuple[Plan, list[int]]] = deque()

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
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=rng.random() < 0.3, min_tokens=rng.randint(0, 1))
        request = Request(self.next_request_id, prompt, params, rng.getrandbits(64))
        self.next_request_id += 1
        if is_too_long and num_prompt >= 1:
            with pytest.raises(RequestTooLongError):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        self.tokens[request.request_id] = list(prompt)
        self.requests[request.request_id] = request

    def schedule(self) -> bool:
        awaited = {id_ for _, sampled in self.in_flight for id_ in sampled}
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.in_flight or not self.requests, "there is work, nothing is in flight, and nothing is planned"
            return False
        self.check_released(plan)
        self.stages.apply(plan)
        self.check_new_requests(plan)
        self.check_chunks(plan, awaited)
        self.in_flight.append((plan, [chunk.request_id for chunk in plan.chunks if chunk.samples]))
        assert self.scheduler.num_in_flight == len(self.in_flight) <= self.config.num_stages + 1
        return True

    def check_released(self, plan: Plan) -> None:
        preempted = [id_ for id_ in plan.released if id_ in self.requests]
        self.num_preemptions += len(preempted)
        assert not self.requests or min(self.requests) not in preempted, "the oldest was preempted"

    def check_new_requests(self, plan: Plan) -> None:
        for new in plan.new_requests:
            request, params = self.requests[new.request_id], self.requests[new.request_id].params
            min_position = len(request.prompt_ids) + params.min_tokens
            assert new == NewRequest(new.request_id, 1.0, 1.0, 0, 0.0, request.noise_key, min_position)

    def check_chunks(self, plan: Plan, awaited: set[int]) -> None:
        for chunk in plan.chunks:
            assert chunk.request_id in self.requests, "a chunk of a request that is gone"
            assert chunk.request_id not in awaited, "a chunk of a request whose next token is not known yet"
            tokens, stop = self.tokens[chunk.request_id], chunk.start + len(chunk.token_ids)
            assert list(chunk.token_ids) == tokens[chunk.start : stop], "wrong tokens"
            assert chunk.samples == (stop == len(tokens)), "samples too early, or not at all"
        num_prompt_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1)
        assert num_prompt_tokens <= (self.config.max_chunk_tokens or MAX_CHUNK_TOKENS)

    def update(self) -> None:
        if not self.in_flight:
            return
        plan, sampled = self.in_flight.popleft()
        tokens = tuple(EOS if self.rng.random() < 0.05 else self.rng.randrange(1, VOCAB_SIZE) for _ in sampled)
        outputs = self.scheduler.update(Result(plan.plan_id, tokens))
        assert outputs == list(self.take_tokens(zip(sampled, tokens, strict=True)))

    def take_tokens(self, pairs: Iterator[tuple[int, int]]) -> Iterator[TokenOutput]:
        for request_id, token in pairs:
            if request_id in self.requests:
                request = self.requests[request_id]
                self.tokens[request_id].append(token)
                assert request.token_ids == self.tokens[request_id]
                is_full = len(self.tokens[request_id]) == len(request.prompt_ids) + request.params.max_tokens
                reason = FinishReason.LENGTH if is_full else None
                reason = FinishReason.STOP if token == EOS and not request.params.ignore_eos else reason
                if reason is not None:
                    del self.requests[request_id], self.tokens[request_id]
                yield TokenOutput(request, token, reason)

    def abort(self) -> None:
        request_id = self.rng.randrange(self.next_request_id + 1)
        num_held = len(self.requests[request_id].blocks) if request_id in self.requests else 0
        num_used = self.scheduler.num_used_blocks
        self.scheduler.abort(request_id)
        assert self.scheduler.num_used_blocks == num_used - num_held
        self.requests.pop(request_id, None)
        self.tokens.pop(request_id, None)

    def drain(self) -> None:
        """The pipeline dies. Its requests go on in a new one, behind the same scheduler or a fresh one."""
        drained, emptied = self.scheduler.drain(), self.scheduler
        emptied.check_integrity()
        assert [request.request_id for request in drained] == sorted(self.requests), "not in order of arrival"
        assert [request.token_ids for request in drained] == [self.tokens[id_] for id_ in sorted(self.tokens)]
        assert emptied.num_used_blocks == emptied.num_in_flight == 0
        assert not emptied.has_requests
        self.num_drains += 1
        self.start_pipeline()
        if self.rng.random() < 0.5:
            self.scheduler = emptied
        for request in drained:
            self.scheduler.add(request)


@pytest.mark.parametrize("max_chunk_tokens", [None, 1, 7, 64])
@pytest.mark.parametrize("num_stages", STAGE_COUNTS)
def test_random_walks_keep_every_promise_and_end(num_stages: int, max_chunk_tokens: int | None) -> None:
    rng = random.Random(f"{num_stages} {max_chunk_tokens}")
    num_preemptions = num_drains = 0
    for block_size in (1, 4, 16):
        for slack in (1, 1.3, 3, 12):
            longest_tokens = rng.choice((16, 40, 100))
            num_blocks = max(1, int(-(-longest_tokens // block_size) * slack))
            max_batch_size = rng.choice((1, 2, 5, 16) if slack < 3 else (3, 8, 16))
            config = SchedulerConfig(num_stages, num_blocks, block_size, max_batch_size, EOS, max_chunk_tokens)
            walk = Walk(config, longest_tokens, rng)
            try:
                walk.go(num_steps=400)
                walk.finish()
            except AssertionError as error:
                error.add_note(f"{config}, longest_tokens={longest_tokens}")
                raise
            num_preemptions += walk.num_preemptions
            num_drains += walk.num_drains
    assert num_preemptions > 0
    assert num_drains > 0


def make_scheduler(
    num_stages: int = 2,
    num_blocks: int = 1000,
    block_size: int = 16,
    max_batch_size: int = 64,
    max_chunk_tokens: int | None = None,
) -> Scheduler:
    return Scheduler(SchedulerConfig(num_stages, num_blocks, block_size, max_batch_size, EOS, max_chunk_tokens))


def make_request(request_id: int, num_prompt_tokens: int, params: SamplingParams | None = None) -> Request:
    prompt = tuple(1 + position % (VOCAB_SIZE - 1) for position in range(num_prompt_tokens))
    return Request(request_id, prompt, params or SamplingParams(max_tokens=100), noise_key=request_id)


def fill(scheduler: Scheduler) -> list[Plan]:
    """Schedules until no more goes; returns the plans."""
    return list(iter(scheduler.schedule, None))


def land(scheduler: Scheduler, plan: Plan, token: int = 1) -> list[TokenOutput]:
    """Takes back a plan whose sampled tokens are all `token`."""
    outputs = scheduler.update(Result(plan.plan_id, (token,) * sum(chunk.samples for chunk in plan.chunks)))
    scheduler.check_integrity()
    return outputs


def plans_until_idle(scheduler: Scheduler) -> list[Plan]:
    """Drives the scheduler until nothing is left to do; returns all plans, in order."""
    plans: list[Plan] = []
    in_flight = deque(fill(scheduler))
    while in_flight:
        plans.append(in_flight.popleft())
        land(scheduler, plans[-1])
        in_flight.extend(fill(scheduler))
    assert not scheduler.has_requests
    return plans


def chunk_sizes(plans: list[Plan]) -> list[int]:
    return [plan.num_tokens for plan in plans]


@pytest.mark.parametrize("num_stages", STAGE_COUNTS)
@pytest.mark.parametrize("surplus", [0, 1, 5, 16])
def test_decodes_are_split_evenly_and_keep_every_stage_busy(num_stages: int, surplus: int) -> None:
    scheduler = make_scheduler(num_stages)
    for request_id in range(num_stages + surplus):
        scheduler.add(make_request(request_id, num_prompt_tokens=5))
    in_flight = deque(fill(scheduler))
    for turn in range(9 * num_stages):
        if turn == 3 * num_stages:
            scheduler.add(make_request(1000, num_prompt_tokens=1))
        if turn > 6 * num_stages or 2 * num_stages <= turn < 3 * num_stages:
            sizes = [len(plan.chunks) for plan in in_flight]
            assert len(sizes) >= num_stages
            assert max(sizes) - min(sizes) <= 1
        land(scheduler, in_flight.popleft())
        in_flight.extend(fill(scheduler))


@pytest.mark.parametrize("num_stages", STAGE_COUNTS[1:])
def test_one_long_prompt_is_cut_into_equal_chunks_that_keep_every_stage_busy(num_stages: int) -> None:
    scheduler = make_scheduler(num_stages)
    scheduler.add(make_request(0, 1000, SamplingParams(max_tokens=1)))
    plans = fill(scheduler)
    assert len(plans) == num_stages + 1
    land(scheduler, plans[0])
    sizes = chunk_sizes(plans + [plan for plan in fill(scheduler)])
    for plan in plans[1:]:
        land(scheduler, plan)
    sizes += chunk_sizes(plans_until_idle_after(scheduler, num_landed=num_stages + 1))
    assert sum(sizes) == 1000
    assert len(set(sizes[:-1])) == 1
    assert 0 < sizes[-1] <= sizes[0]


def plans_until_idle_after(scheduler: Scheduler, num_landed: int) -> list[Plan]:
    raise NotImplementedError
