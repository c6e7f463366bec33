"""The record of a request: an engine goes on from it as if it had made the tokens so far itself."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.plan import PromptLogprobs, Result
from gptj_dist.engine.record import RequestRecord, new_records, noise_key
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import Pooling, SamplingParams, TokenLogprobs
from gptj_dist.stages.transport.codec import Codec
from tests.settings import FIELD_NAMES, changed
from tests.unit.test_async_engine import PROMPT, collect, expected_tokens, run, running, turns

MAX_TOKENS = 9
PARAMS = SamplingParams(max_tokens=MAX_TOKENS, seed=4)
PREFIX = PROMPT * 3
CODEC = Codec(RequestRecord)


def record_at(num_tokens: int, choice: int = 0, num_moves: int = 1) -> RequestRecord:
    """The record of a completion that has so many tokens."""
    tokens = expected_tokens(PREFIX, PARAMS, choice)[:num_tokens]
    return RequestRecord(PREFIX, PARAMS, noise_key(PARAMS.seed, choice), "r", tuple(tokens), num_moves)


@pytest.mark.parametrize("num_tokens", range(MAX_TOKENS))
def test_an_engine_goes_on_from_every_token_to_the_same_ones(num_tokens: int) -> None:
    async def scenario() -> None:
        async with running() as rig:
            [stream] = rig.engine.generate_all([record_at(num_tokens)])
            assert await collect(stream) == expected_tokens(PREFIX, PARAMS)[num_tokens:]
            totals = rig.engine.journal.totals
            assert totals.num_generation_tokens == MAX_TOKENS - num_tokens
            assert not any(totals.time_to_first_token.counts), "it began elsewhere"

    run(scenario())


def test_completions_of_a_prompt_that_were_cut_at_different_tokens_compute_it_once_and_go_on() -> None:
    async def scenario() -> None:
        async with running() as rig:
            cuts = (3, 0, MAX_TOKENS - 1)
            streams = rig.engine.generate_all([record_at(cut, choice) for choice, cut in enumerate(cuts)])
            tokens = await asyncio.gather(*map(collect, streams))
            assert tokens == [expected_tokens(PREFIX, PARAMS, choice)[cut:] for choice, cut in enumerate(cuts)]
            computed = sum(plan.num_tokens for plan in rig.executor.plans)
            assert computed == len(PREFIX) + len(cuts) - 1 + len(cuts) * (MAX_TOKENS - 1)

    run(scenario())


def test_log_probabilities_of_the_prompt_are_returned_once() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            of_prompt = tuple(TokenLogprobs(token_id, -1.0, 1, ()) for token_id in PROMPT[1:])
            params = SamplingParams(max_tokens=3, prompt_logprobs=0)
            fresh, begun = RequestRecord(PROMPT, params, 1), RequestRecord(PROMPT, params, 2, token_ids=(8,))
            streams = [*rig.engine.generate_all([fresh]), *rig.engine.generate_all([begun])]
            readers = [asyncio.create_task(anext(stream)) for stream in streams]
            await rig.submitted(1)
            told = tuple(PromptLogprobs(request_id, 1, of_prompt) for request_id in (0, 1))
            rig.executor.inject(Result(0, (5, 6), prompt_logprobs=told))
            assert await asyncio.gather(*readers) == [Delta((5,), None, prompt_logprobs=of_prompt), Delta((6,), None)]
            for stream in streams:
                await stream.aclose()

    run(scenario())


@pytest.mark.parametrize(
    "record", [record_at(2), record_at(0, num_moves=0).resumed(record_at(2).token_ids, "")], ids=["moved", "resumed"]
)
def test_requests_that_were_accepted_before_run_before_those_that_wait(record: RequestRecord) -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            long = SamplingParams(max_tokens=40, seed=1)
            readers = [asyncio.create_task(collect(rig.engine.generate(PROMPT, long))) for _ in range(9)]
            await turns()
            num_waiting = rig.scheduler.num_waiting
            [moved] = rig.engine.generate_all([record])
            reader = asyncio.create_task(collect(moved))
            await turns()
            assert rig.scheduler.num_waiting == num_waiting + 1
            assert rig.scheduler._waiting[0].is_moved
            rig.executor.go_on()
            assert await reader == expected_tokens(PREFIX, PARAMS)[2:]
            await asyncio.gather(*readers)

    run(scenario())


def test_an_embedding_begins_anew() -> None:
    async def scenario() -> None:
        async with running() as rig:
            [record] = new_records(PROMPT, SamplingParams(max_tokens=0, pooling=Pooling()), 1)
            [stream] = rig.engine.generate_all([record.moved((), "")])
            deltas = [delta async for delta in stream]
            assert deltas == [Delta((), FinishReason.LENGTH, embedding=b"3 tokens")]

    run(scenario())


def test_a_record_that_has_all_its_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="9 of 9 tokens"):
        record_at(MAX_TOKENS)


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_a_record_survives_the_codec_and_a_serve_call(name: str) -> None:
    for seed in (None, 7, 2**64 - 1):
        settings = {"seed": seed, **changed(name)}
        for record in new_records(PROMPT, SamplingParams(**settings), 2, "r"):
            moved = record.moved((5,) if record.params.max_tokens > 1 else (), "")
            assert CODEC.decode(CODEC.encode(moved)) == pickle.loads(pickle.dumps(moved)) == moved


def test_a_request_without_a_seed_keeps_its_noise_when_it_is_moved() -> None:
    records = new_records(PROMPT, SamplingParams(max_tokens=4), 3)
    assert len({record.noise_key for record in records}) == 3
    moved = [record.moved((1,), "those").moved((2, 3), "") for record in records]
    assert [record.noise_key for record in moved] == [record.noise_key for record in records]
    assert (moved[0].token_ids, moved[0].num_moves, moved[0].weights) == ((1, 2, 3), 2, "those")
    resumed = records[0].resumed((1, 2), "those").moved((3,), "those")
    assert (resumed.token_ids, resumed.num_moves, resumed.weights) == ((1, 2, 3), 1, "those")
