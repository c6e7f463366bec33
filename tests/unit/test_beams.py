"""Beam search without a model: the selection of beams, and random walks of searches through the scheduler."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import pytest

from gptj_dist.engine.beams import Beam, BeamSearch
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.plan import Continuations, Plan, Result
from gptj_dist.engine.request import FinishReason, Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig, TokenOutput
from gptj_dist.errors import InvalidRequestError, RequestTooLongError
from gptj_dist.params import BROKEN_TOKEN, Continuation, Grammar, SamplingParams
from gptj_dist.token_rules import TokenRules
from tests.fakes import FakeStages

EOS, VOCAB_SIZE, BLOCK_SIZE = 0, 12, 4


def likeliest(token_ids: Sequence[int], width: int, num_allowed: int = VOCAB_SIZE) -> tuple[Continuation, ...]:
    """What a model would say after these tokens, the first of which decide it, too."""
    chance = random.Random(str(list(token_ids)))
    scores = [(-chance.expovariate(0.5), token_id) for token_id in range(num_allowed)]
    scores.sort(key=lambda pair: (-pair[0], pair[1]))
    others = [pair for pair in scores if pair[1] != EOS][:width]
    return tuple(
        Continuation(token_id, score) for score, token_id in scores if token_id == EOS or (score, token_id) in others
    )


def search_of(params: SamplingParams) -> BeamSearch:
    width, most = params.num_beams, params.max_tokens
    return BeamSearch(width, most, params.length_penalty, params.early_stopping, {EOS})


def found(prompt: Sequence[int], params: SamplingParams) -> tuple[Beam, ...]:
    """The texts of a search that runs alone."""
    search = search_of(params)
    while search.running:
        search = search.step([likeliest((*prompt, *beam.token_ids), params.num_beams) for beam in search.running])
    return search.ended


class Walk:
    """Searches and ordinary requests that come, end, are preempted and lose their pipeline."""

    def __init__(self, rng: random.Random, num_stages: int, num_blocks: int, can_share_blocks: bool) -> None:
        self.rng = rng
        limits = (num_stages, num_blocks, BLOCK_SIZE, 12, (EOS,), rng.choice((None, 3)))
        self.config = SchedulerConfig(*limits, can_share_blocks=can_share_blocks)
        self.scheduler = Scheduler(self.config)
        self.stages = FakeStages(num_blocks, BLOCK_SIZE, self.config.max_batch_size)
        self.in_flight: deque[tuple[Plan, Result]] = deque()
        self.requests: dict[int, Request] = {}
        self.next_id = self.num_found = self.num_copied = 0

    def add(self) -> None:
        rng = self.rng
        prompt = tuple(range(1, rng.randint(2, 11)))
        params = SamplingParams(max_tokens=rng.randint(1, 9), priority=rng.choice((0, 0, 1)))
        if rng.random() < 0.6:
            params = SamplingParams(
                max_tokens=rng.randint(1, 9),
                use_beam_search=True,
                n=rng.randint(1, 4),
                length_penalty=rng.choice((-1.0, 0.0, 1.0, 2.0)),
                early_stopping=rng.choice((True, False, "never")),
                priority=rng.choice((0, 0, 1)),
            )
        request = Request(self.next_id, Prompt(prompt), params, noise_key=0)
        self.next_id += params.num_beams
        try:
            self.scheduler.add(request)
        except RequestTooLongError:
            return
        self.requests[request.request_id] = request

    def schedule(self) -> None:
        if (plan := self.scheduler.schedule()) is None:
            assert self.in_flight or not self.requests, "there is work, nothing is in flight, and nothing is planned"
            return
        self.stages.apply(plan)
        sampled = [self.stages.requests[chunk.request_id] for chunk in plan.chunks if chunk.samples]
        searching = [held for held in sampled if held.introduction.params.use_beam_search]
        continuations = tuple(
            Continuations(held.introduction.request_id, likeliest(held.token_ids, held.introduction.params.num_beams))
            for held in searching
        )
        self.num_copied += sum(
            new.begins_with is not None and new.begins_with.source_id is not None for new in plan.new_requests
        )
        self.in_flight.append((plan, Result(plan.plan_id, (1,) * len(sampled), continuations=continuations)))

    def update(self) -> None:
        if self.in_flight:
            _, result = self.in_flight.popleft()
            for output in self.scheduler.update(result):
                self.take(output)

    def take(self, output: TokenOutput) -> None:
        request = output.request
        assert self.requests[request.request_id] is request
        if request.params.use_beam_search:
            assert output.beams == found(request.prompt_ids, request.params)
            assert output.finish_reason == (FinishReason.STOP if output.beams[0].has_stopped else FinishReason.LENGTH)
            self.num_found += 1
        if output.finish_reason is not None:
            del self.requests[request.request_id]

    def abort(self) -> None:
        if self.requests:
            request_id = self.rng.choice(list(self.requests))
            del self.requests[request_id]
            self.scheduler.abort(request_id)

    def drain(self) -> None:
        drained = self.scheduler.drain()
        assert {request.request_id for request in drained} == self.requests.keys()
        self.scheduler = Scheduler(self.config)
        self.stages = FakeStages(self.config.num_blocks, BLOCK_SIZE, self.config.max_batch_size)
        self.in_flight.clear()
        for request in drained:
            self.scheduler.add(request)

    def go(self, num_steps: int) -> None:
        steps = [self.add, self.schedule, self.update, self.abort, self.drain]
        for step in self.rng.choices(steps, weights=[12, 45, 40, 1, 0.3], k=num_steps):
            step()
            self.scheduler.check_integrity()
        while self.requests:
            self.schedule()
            self.update()
            self.scheduler.check_integrity()
        assert self.scheduler.num_used_blocks == 0


@pytest.mark.parametrize("can_share_blocks", [True, False])
@pytest.mark.parametrize("num_blocks", [12, 40, 200])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_search_finds_what_it_finds_alone(num_stages: int, num_blocks: int, can_share_blocks: bool) -> None:
    """Whatever else runs, however often it is preempted, and whether or not its pipeline is lost."""
    rng = random.Random(f"{num_stages} {num_blocks} {can_share_blocks}")
    walk = Walk(rng, num_stages, num_blocks, can_share_blocks)
    walk.go(1200)
    assert walk.num_found > 30
    assert walk.num_copied > 30
    assert num_blocks > 12 or walk.scheduler.num_preemptions > 0


def test_a_prompt_is_computed_once_for_all_beams() -> None:
    walk = Walk(random.Random(0), 2, 100, True)
    params = SamplingParams(max_tokens=5, n=4, use_beam_search=True, ignore_eos=True)
    walk.requests[0] = Request(0, Prompt(tuple(range(1, 40))), params, 0)
    walk.scheduler.add(walk.requests[0])
    num_rows = 0
    while walk.scheduler.has_requests:
        walk.schedule()
        num_rows += walk.in_flight[-1][0].num_tokens
        walk.scheduler.update(walk.in_flight.popleft()[1])
    assert num_rows == 39 + 4 * 4


def test_a_search_fails_if_one_beam_is_broken() -> None:
    walk = Walk(random.Random(0), 1, 100, True)
    request = Request(0, Prompt((1, 2, 3)), SamplingParams(max_tokens=5, n=3, use_beam_search=True), 0)
    walk.scheduler.add(request)
    walk.schedule()
    walk.scheduler.update(walk.in_flight.popleft()[1])
    walk.schedule()
    plan, result = walk.in_flight.popleft()
    broken = Result(plan.plan_id, (1, BROKEN_TOKEN, 1), continuations=result.continuations)
    [output] = walk.scheduler.update(broken)
    assert (output.request, output.finish_reason) == (request, FinishReason.ERROR)
    assert not walk.scheduler.has_requests
    walk.scheduler.check_integrity()


def test_a_search_needs_room_for_all_its_beams() -> None:
    """3 blocks of 4 for the prompt, 2 of which can be shared; each beam ends in its fourth block."""
    params = SamplingParams(max_tokens=6, n=4, use_beam_search=True)
    for num_blocks, can_share_blocks, fits in (
        (10, True, True),
        (9, True, False),
        (16, False, True),
        (15, False, False),
    ):
        scheduler = Scheduler(SchedulerConfig(1, num_blocks, 4, 8, (EOS,), can_share_blocks=can_share_blocks))
        add = partial(scheduler.add, Request(0, Prompt(tuple(range(1, 11))), params, 0))
        if fits:
            add()
        else:
            with pytest.raises(RequestTooLongError, match="in 4 beams"):
                add()


class TestSelection:
    def test_the_first_step_makes_beams_of_the_only_one(self) -> None:
        search = search_of(SamplingParams(max_tokens=9, n=2, use_beam_search=True))
        search = search.step([[Continuation(5, -1.0), Continuation(3, -2.0), Continuation(4, -3.0)]])
        assert [(beam.token_ids, beam.score, beam.parent) for beam in search.running] == [
            ((5,), -1.0, 0),
            ((3,), -2.0, 0),
        ]

    def test_a_tie_goes_to_the_earlier_beam_and_then_to_the_likelier_token(self) -> None:
        search = search_of(SamplingParams(max_tokens=9, n=2, use_beam_search=True))
        search = search.step([[Continuation(5, -1.0), Continuation(3, -2.0)]])
        search = search.step(
            [[Continuation(7, -2.0), Continuation(8, -2.0)], [Continuation(1, -1.0), Continuation(2, -1.0)]]
        )
        assert [beam.token_ids for beam in search.running] == [(5, 7), (5, 8)]

    def test_a_text_ends_only_among_the_likeliest(self) -> None:
        search = search_of(SamplingParams(max_tokens=9, n=2, use_beam_search=True, length_penalty=0))
        search = search.step([[Continuation(5, -1.0), Continuation(3, -2.0), Continuation(EOS, -3.0)]])
        assert search.ended == ()
        search = search.step(
            [[Continuation(EOS, -1.0), Continuation(4, -9.0)], [Continuation(6, -1.0), Continuation(7, -5.0)]]
        )
        assert search.ended == (Beam((5, EOS), -2.0, 0, True),)
        assert [beam.token_ids for beam in search.running] == [(3, 6), (3, 7)]

    def test_the_last_token_ends_every_text(self) -> None:
        search = search_of(SamplingParams(max_tokens=1, n=2, use_beam_search=True))
        search = search.step([[Continuation(5, -1.0), Continuation(EOS, -2.0), Continuation(3, -3.0)]])
        assert not search.running
        assert search.ended == (Beam((5,), -1.0), Beam((EOS,), -2.0, has_stopped=True))

    def test_a_search_goes_on_with_fewer_texts_than_beams(self) -> None:
        """Where few tokens are allowed. Nothing follows the beams that fill the rest."""
        search = search_of(SamplingParams(max_tokens=3, n=3, use_beam_search=True))
        search = search.step([[Continuation(5, -1.0)]])
        assert [beam.score for beam in search.running] == [-1.0, -math.inf, -math.inf]
        search = search.step([[Continuation(5, -1.0)]] * 3)
        search = search.step([[Continuation(5, -1.0)]] * 3)
        assert [beam.token_ids for beam in search.ended] == [(5, 5, 5)]

    def test_a_search_ends_when_nothing_may_follow(self) -> None:
        search = search_of(SamplingParams(max_tokens=3, n=3, use_beam_search=True)).step([[]])
        assert search.running == search.ended == ()

    @pytest.mark.parametrize(
        ("early_stopping", "logprob", "is_over"),
        [(True, -0.1, True), (False, -0.5, False), (False, -2, True), ("never", -2, False), ("never", -8, True)],
    )
    def test_when_it_ends(self, early_stopping: Literal[True, False, "never"], logprob: float, is_over: bool) -> None:
        """One text has -1. The other beam has -2 and `logprob` after three tokens, and may have nine."""
        beams = (Beam((5, 5), -2.0),), (Beam((EOS,), -1.0, has_stopped=True),)
        search = BeamSearch(1, 9, 1.0, early_stopping, {EOS}, *beams)
        assert search.step([[Continuation(5, logprob)]]).running == (
            () if is_over else (Beam((5, 5, 5), -2.0 + logprob),)
        )


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_k": 4}, "top_k"),
        ({"n": 4, "best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": 6.0}, "length_penalty"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"structured_outputs": Grammar("regex", "[0-9]"), "ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_settings_that_no_search_can_have_are_refused(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(use_beam_search=True, **settings)
    assert refused.value.param == param


@pytest.mark.parametrize("settings", [{"length_penalty": 2.0}, {"early_stopping": True}, {"best_of": 2}], ids=str)
def test_settings_that_only_a_search_has_are_refused_without_one(settings: dict[str, Any]) -> None:
    limits = EngineLimits(TokenRules(50), 100, 400, 4, max_batch_size=3)
    limits.check([1], SamplingParams(use_beam_search=True, **settings))
    with pytest.raises(InvalidRequestError, match="needs use_beam_search"):
        limits.check([1], SamplingParams(**settings))
    with pytest.raises(InvalidRequestError, match="at most 3 beams"):
        limits.check([1], SamplingParams(use_beam_search=True, n=4))
