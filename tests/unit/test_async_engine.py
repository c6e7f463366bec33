"""The engine: streams, their ends of every kind, and what happens when the pipeline dies. Over a fake executor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

from gptj_dist.engine.async_engine import AsyncEngine
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.plan import PromptLogprobs, Result
from gptj_dist.engine.record import new_records, noise_key
from gptj_dist.engine.request import FinishReason
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, RequestTooLongError, StageFailedError
from gptj_dist.params import (
    BROKEN_TOKEN,
    NO_TOKEN,
    AdapterChoice,
    AdapterSource,
    Pooling,
    SamplingParams,
    TokenLogprobs,
)
from gptj_dist.token_rules import TokenRules
from tests.fakes import FAKE_EOS_TOKEN_ID, FAKE_VOCAB_SIZE, FakeExecutor, FakeStages, fake_token

TIMEOUT_S = 20
MAX_MODEL_LEN = 64
NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_SIZE = 12, 4, 4
PROMPT = (5, 6, 7)

Stream = AsyncGenerator[Delta, None]


@dataclass(slots=True)
class Rig:
    """An engine and all that its tests hold on to."""

    engine: AsyncEngine
    executor: FakeExecutor
    driver: asyncio.Task[None]

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    async def submitted(self, num_plans: int) -> None:
        """Returns when the engine has submitted so many plans in all."""
        await until(lambda: len(self.executor.plans) >= num_plans)


LIMITS = EngineLimits(TokenRules(FAKE_VOCAB_SIZE), MAX_MODEL_LEN, kv_tokens=NUM_BLOCKS * BLOCK_SIZE, num_layers=4)


def make_executor(is_paused: bool = False, end_positions: frozenset[int] = frozenset()) -> FakeExecutor:
    return FakeExecutor(FakeStages(NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_SIZE), is_paused, end_positions)


def make_engine(executor: FakeExecutor, clock: Callable[[], float] = lambda: 0.0) -> AsyncEngine:
    return AsyncEngine(make_scheduler(), executor, LIMITS, clock)


def make_scheduler() -> Scheduler:
    return Scheduler(SchedulerConfig(2, NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_SIZE, (FAKE_EOS_TOKEN_ID,)))


@asynccontextmanager
async def running(
    is_paused: bool = False, end_positions: frozenset[int] = frozenset(), clock: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[Rig]:
    """A running engine; what it leaves behind is checked."""
    executor = make_executor(is_paused, end_positions)
    engine = make_engine(executor, clock)
    rig = Rig(engine, executor, asyncio.create_task(engine.run()))
    async with asyncio.timeout(TIMEOUT_S):
        yield rig
    rig.driver.cancel()
    with suppress(asyncio.CancelledError, GPTJDistError):
        await rig.driver
    engine.scheduler.check_integrity()
    assert not engine.scheduler.has_requests
    assert engine.scheduler.num_used_blocks == 0


async def until(is_reached: Callable[[], bool]) -> None:
    """Gives the loop turns until a state is reached; the rig's timeout limits it."""
    while not is_reached():  # noqa: ASYNC110  # what is looked at sets no events
        await asyncio.sleep(0)


async def turns(num_turns: int = 20) -> None:
    """Lets the loop do all that it can do by itself."""
    for _ in range(num_turns):
        await asyncio.sleep(0)


async def collect(stream: Stream) -> list[int]:
    """All tokens of a stream, which must end properly."""
    deltas = [delta async for delta in stream]
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert all(delta.token_ids for delta in deltas)
    return [token_id for delta in deltas for token_id in delta.token_ids]


async def tokens_until_failure(stream: Stream) -> list[int]:
    """The tokens of a stream that must fail."""
    token_ids: list[int] = []
    try:
        async for delta in stream:
            token_ids += delta.token_ids
            assert delta.finish_reason is None
    except StageFailedError:
        return token_ids
    pytest.fail("the stream ended as if nothing had happened")


def expected_tokens(prompt: Sequence[int], params: SamplingParams, choice: int = 0) -> list[int]:
    """What fake stages make of a seeded request."""
    key = noise_key(params.seed, choice)
    return [fake_token(key, len(prompt) + index) for index in range(params.max_tokens)]


def run(coroutine: Coroutine[None, None, None]) -> None:
    asyncio.run(coroutine)


def test_every_stream_gets_its_own_tokens_in_order_though_requests_wait_and_are_preempted() -> None:
    async def scenario() -> None:
        async with running() as rig:
            wanted = [(PROMPT * n, SamplingParams(max_tokens=20, seed=n)) for n in range(1, 10)]
            streams = [rig.engine.generate(prompt, params) for prompt, params in wanted]
            token_ids = await asyncio.gather(*map(collect, streams))
            assert token_ids == [expected_tokens(prompt, params) for prompt, params in wanted]
            assert rig.scheduler.num_preemptions > 0

    run(scenario())


def test_the_choices_of_a_prompt_compute_it_once_and_have_tokens_of_their_own() -> None:
    async def scenario() -> None:
        async with running() as rig:
            params = SamplingParams(max_tokens=5, seed=8)
            streams = rig.engine.generate_all(new_records(PROMPT * 5, params, 4))
            token_ids = await asyncio.gather(*map(collect, streams))
            assert token_ids == [expected_tokens(PROMPT * 5, params, choice) for choice in range(4)]
            assert sum(plan.num_tokens for plan in rig.executor.plans) == 15 + 3 + 4 * 4

    run(scenario())


def test_an_embedding_comes_as_the_one_delta_of_its_stream() -> None:
    async def scenario() -> None:
        async with running() as rig:
            params = SamplingParams(max_tokens=0, pooling=Pooling("last", 4))
            completing = asyncio.ensure_future(collect(rig.engine.generate(PROMPT, SamplingParams(max_tokens=5))))
            streams = [rig.engine.generate(PROMPT * n, params) for n in (1, 5)]
            deltas = [[delta async for delta in stream] for stream in streams]
            assert deltas == [[Delta((), FinishReason.LENGTH, embedding=f"{n} tokens".encode())] for n in (3, 15)]
            assert len(await completing) == 5
            with pytest.raises(InvalidRequestError, match="layer must be from 0 to 4"):
                await anext(rig.engine.generate(PROMPT, SamplingParams(max_tokens=0, pooling=Pooling("last", 5))))

    run(scenario())


def test_a_stream_ends_at_end_of_text_or_at_its_length_with_the_reason_on_its_last_delta() -> None:
    async def scenario() -> None:
        async with running(end_positions=frozenset({6})) as rig:
            [short] = [delta async for delta in rig.engine.generate(PROMPT, SamplingParams(max_tokens=1, seed=1))]
            assert short == Delta((fake_token(noise_key(1, 0), 3),), FinishReason.LENGTH)
            deltas = [delta async for delta in rig.engine.generate(PROMPT, SamplingParams(max_tokens=9, seed=1))]
            assert (deltas[-1].token_ids[-1], deltas[-1].finish_reason) == (FAKE_EOS_TOKEN_ID, FinishReason.STOP)
            assert sum(len(delta.token_ids) for delta in deltas) == 4

    run(scenario())


def test_closing_a_stream_frees_its_blocks_at_once_and_the_others_go_on() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            params = SamplingParams(max_tokens=10, seed=3)
            closed, other = rig.engine.generate(PROMPT, params), rig.engine.generate(PROMPT, params, choice=1)
            first, task = asyncio.create_task(anext(closed)), asyncio.create_task(collect(other))
            await rig.submitted(1)
            rig.executor.step()
            await first
            assert rig.scheduler.num_used_blocks == 2
            await closed.aclose()
            assert rig.scheduler.num_used_blocks == 1
            rig.executor.go_on()
            assert await task == expected_tokens(PROMPT, params, choice=1)

    run(scenario())


def test_cancelling_a_reader_that_waits_for_its_first_token_frees_the_blocks() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            reader = asyncio.create_task(collect(rig.engine.generate(PROMPT, SamplingParams())))
            await rig.submitted(1)
            assert rig.scheduler.num_used_blocks == 1
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            assert rig.scheduler.num_used_blocks == 0
            rig.executor.go_on()
            assert len(await collect(rig.engine.generate(PROMPT, SamplingParams(max_tokens=5)))) == 5

    run(scenario())


def test_closing_a_request_that_still_waits_lets_the_next_one_run() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            params = SamplingParams(max_tokens=40, seed=0)
            readers = [asyncio.create_task(collect(rig.engine.generate(PROMPT * 3, params))) for _ in range(6)]
            await until(lambda: rig.scheduler.num_waiting == 2)
            readers[4].cancel()
            await asyncio.gather(readers[4], return_exceptions=True)
            assert rig.scheduler.num_waiting == 1
            rig.executor.go_on()
            finished = await asyncio.gather(*readers[:4], readers[5])
            assert finished == [expected_tokens(PROMPT * 3, params)] * 5

    run(scenario())


def test_a_generator_that_was_never_started_queues_nothing() -> None:
    async def scenario() -> None:
        async with running() as rig:
            await rig.engine.generate(PROMPT, SamplingParams()).aclose()
            await turns()
            assert rig.executor.plans == []

    run(scenario())


def test_a_slow_reader_gets_all_that_came_meanwhile_in_one_delta() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            params = SamplingParams(max_tokens=10, seed=3)
            async with aclosing(rig.engine.generate(PROMPT, params)) as stream:
                first = asyncio.create_task(anext(stream))
                await rig.submitted(1)
                rig.executor.step()
                expected = expected_tokens(PROMPT, params)
                assert await first == Delta((expected[0],), None)
                rig.executor.go_on()
                await until(lambda: not rig.scheduler.has_requests)
                assert await anext(stream) == Delta(tuple(expected[1:]), FinishReason.LENGTH)
                with pytest.raises(StopAsyncIteration):
                    await anext(stream)

    run(scenario())


def test_requests_that_arrive_in_one_turn_of_the_loop_share_a_micro_batch() -> None:
    async def scenario() -> None:
        async with running() as rig:
            streams = [rig.engine.generate(PROMPT, SamplingParams(max_tokens=2)) for _ in range(MAX_BATCH_SIZE)]
            await asyncio.gather(*map(collect, streams))
            assert len(rig.executor.plans[0].chunks) == MAX_BATCH_SIZE

    run(scenario())


def test_streams_go_on_after_a_failure_as_if_nothing_had_happened() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            params = SamplingParams(max_tokens=20, seed=1)
            readers = [asyncio.create_task(collect(rig.engine.generate(PROMPT, params, choice))) for choice in range(6)]
            await until(lambda: rig.scheduler.num_waiting == 2)
            rig.executor.step()
            await turns()
            rig.executor.fail()
            with pytest.raises(StageFailedError, match="stage 1 died"):
                await rig.driver
            assert not rig.engine.is_up
            assert rig.scheduler.num_used_blocks == 0
            assert rig.engine.journal.totals.num_recomputed_tokens == rig.executor.plans[0].num_tokens
            with pytest.raises(NotReadyError):
                await rig.engine.run()
            readers.append(asyncio.create_task(collect(rig.engine.generate(PROMPT, params, 6))))
            await turns()
            assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (0, 7)
            rig.engine.resume(make_scheduler(), make_executor(), LIMITS)
            rig.driver = asyncio.create_task(rig.engine.run())
            assert await asyncio.gather(*readers) == [expected_tokens(PROMPT, params, choice) for choice in range(7)]

    run(scenario())


def test_tokens_of_requests_that_share_a_prompt_are_lost_once() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            records = new_records(PROMPT, SamplingParams(max_tokens=20, seed=1), 3)
            readers = [asyncio.create_task(collect(stream)) for stream in rig.engine.generate_all(records)]
            await turns()
            for _ in range(9):
                rig.executor.step()
                await turns()
            rig.executor.fail()
            await asyncio.gather(rig.driver, return_exceptions=True)
            landed = rig.executor.plans[:9]
            totals = rig.engine.journal.totals
            assert totals.num_recomputed_tokens == sum(plan.num_tokens for plan in landed)
            rig.engine.resume(make_scheduler(), make_executor(), LIMITS)
            rig.driver = asyncio.create_task(rig.engine.run())
            await asyncio.gather(*readers)
            moved = records[0].moved((5, 6, 7), "")
            before = totals.num_recomputed_tokens
            [stream] = rig.engine.generate_all([moved])
            await collect(stream)
            assert totals.num_recomputed_tokens == before + len(PROMPT) + 3

    run(scenario())


def test_after_failures_again_and_again_streams_have_the_same_tokens() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            wanted = [(PROMPT * n, SamplingParams(max_tokens=12, seed=n)) for n in range(1, 9)]
            readers = [asyncio.create_task(collect(rig.engine.generate(*one))) for one in wanted]
            for num_steps in (0, 1, 2, 5, 9):
                for _ in range(num_steps):
                    await turns()
                    rig.executor.step()
                await turns()
                rig.executor.fail()
                await asyncio.gather(rig.driver, return_exceptions=True)
                rig.executor = make_executor(is_paused=True)
                rig.engine.resume(make_scheduler(), rig.executor, LIMITS)
                rig.driver = asyncio.create_task(rig.engine.run())
            rig.executor.go_on()
            assert await asyncio.gather(*readers) == [expected_tokens(*one) for one in wanted]

    run(scenario())


def test_a_stream_that_is_closed_while_the_engine_is_down_is_forgotten() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            stream = rig.engine.generate(PROMPT, SamplingParams(max_tokens=20, seed=1))
            first = asyncio.create_task(anext(stream))
            await rig.submitted(1)
            rig.executor.step()
            await first
            rig.executor.fail()
            await asyncio.gather(rig.driver, return_exceptions=True)
            await stream.aclose()
            assert not rig.scheduler.has_requests

    run(scenario())


def test_a_request_that_does_not_fit_the_cache_of_the_new_stages_fails_and_the_others_go_on() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            short, long = SamplingParams(max_tokens=2, seed=1), SamplingParams(max_tokens=20, seed=1)
            fits = asyncio.create_task(collect(rig.engine.generate(PROMPT, short)))
            fits_not = asyncio.create_task(collect(rig.engine.generate(PROMPT, long)))
            await rig.submitted(1)
            rig.executor.fail()
            await asyncio.gather(rig.driver, return_exceptions=True)
            num_blocks = (len(PROMPT) + 2) // BLOCK_SIZE + 1
            config = SchedulerConfig(2, num_blocks, BLOCK_SIZE, MAX_BATCH_SIZE, (FAKE_EOS_TOKEN_ID,))
            rig.engine.resume(Scheduler(config), make_executor(), LIMITS)
            rig.driver = asyncio.create_task(rig.engine.run())
            assert await fits == expected_tokens(PROMPT, short)
            with pytest.raises(RequestTooLongError):
                await fits_not

    run(scenario())


def test_tokens_not_yet_read_when_the_pipeline_dies_are_read_before_the_failure() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            params = SamplingParams(max_tokens=20, seed=1)
            stream = rig.engine.generate(PROMPT, params)
            first = asyncio.create_task(anext(stream))
            await rig.submitted(1)
            rig.executor.step()
            await first
            for num_plans in (2, 3):
                await rig.submitted(num_plans)
                rig.executor.step()
            await turns()
            rig.executor.fail()
            await asyncio.gather(rig.driver, return_exceptions=True)
            rig.engine.fail(StageFailedError("the stages could not be restarted"))
            assert await tokens_until_failure(stream) == expected_tokens(PROMPT, params)[1:3]

    run(scenario())


def test_a_stream_that_has_all_its_tokens_is_not_told_of_a_later_failure() -> None:
    async def scenario() -> None:
        async with running() as rig:
            params = SamplingParams(max_tokens=5, seed=1)
            stream = rig.engine.generate(PROMPT, params)
            got = list((await anext(stream)).token_ids)
            await until(lambda: not rig.scheduler.has_requests)
            rig.executor.fail()
            await asyncio.gather(rig.driver, return_exceptions=True)
            rig.engine.fail(StageFailedError("the stages could not be restarted"))
            assert got + await collect(stream) == expected_tokens(PROMPT, params)

    run(scenario())


def test_a_result_that_answers_no_plan_fails_the_streams_instead_of_leaving_them_waiting() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            reader = asyncio.create_task(tokens_until_failure(rig.engine.generate(PROMPT, SamplingParams())))
            await rig.submitted(1)
            rig.executor.inject(Result(plan_id=7, token_ids=()))
            with pytest.raises(StageFailedError, match="the coordinator failed"):
                await rig.driver
            assert await reader == []
            with pytest.raises(NotReadyError, match="the coordinator failed"):
                await collect(rig.engine.generate(PROMPT, SamplingParams()))

    run(scenario())


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "param"),
    [
        ((), 4, InvalidRequestError, "prompt"),
        ((5, FAKE_VOCAB_SIZE), 4, InvalidRequestError, "prompt"),
        ((5, -1), 4, InvalidRequestError, "prompt"),
        ((5,) * 60, 5, RequestTooLongError, "max_tokens"),
        ((5,) * 64, 1, RequestTooLongError, "prompt"),
        ((5,) * 40, 10, RequestTooLongError, "max_tokens"),
    ],
    ids=["empty", "above vocabulary", "negative", "above context", "prompt fills context", "above KV cache"],
)
def test_a_request_that_can_never_be_served_is_refused_by_the_name_of_its_param_and_nothing_is_queued(
    prompt: tuple[int, ...], max_tokens: int, error: type[InvalidRequestError], param: str
) -> None:
    async def scenario() -> None:
        async with running() as rig:
            params = SamplingParams(max_tokens=max_tokens)
            with pytest.raises(InvalidRequestError) as refusal:
                rig.engine.generate(prompt, params)
            assert type(refusal.value) is error
            assert refusal.value.param == param
            await turns()
            assert not rig.scheduler.has_requests
            assert rig.executor.plans == []

    run(scenario())


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(1, 48), (48, 1), (24, 25)])
def test_a_request_that_just_fits_the_kv_cache_is_served(num_prompt: int, max_tokens: int) -> None:
    async def scenario() -> None:
        async with running() as rig:
            stream = rig.engine.generate((5,) * num_prompt, SamplingParams(max_tokens=max_tokens))
            assert len(await collect(stream)) == max_tokens

    run(scenario())


def test_a_request_that_just_fits_the_context_passes_the_limits_and_one_token_more_does_not() -> None:
    limits = EngineLimits(TokenRules(FAKE_VOCAB_SIZE), 64, kv_tokens=1000, num_layers=4)
    limits.check((5,) * 60, SamplingParams(max_tokens=4))
    with pytest.raises(RequestTooLongError, match="exceed the context window of 64 tokens"):
        limits.check((5,) * 61, SamplingParams(max_tokens=4))


TOO_MANY = (5,) * 1025


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_token_ids", TOO_MANY),
        ("allowed_token_ids", TOO_MANY),
        ("logit_bias", ((5, 1.0),) * 1025),
        ("bad_words", (TOO_MANY,)),
        ("bad_words", ((5,),) * 1025),
        ("bad_words", ((5, FAKE_VOCAB_SIZE),)),
    ],
)
def test_a_list_of_tokens_that_is_too_long_or_unknown_is_refused_by_the_name_of_its_field(
    name: str, value: object
) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(InvalidRequestError, match=f"^{name} ") as raised:
        LIMITS.check(PROMPT, SamplingParams(**settings))
    assert raised.value.param == name


def test_noise_is_the_same_for_the_same_seed_and_choice_and_differs_for_others() -> None:
    seeds: list[int] = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 2]
    keys = [noise_key(seed, choice) for seed in seeds for choice in range(20)]
    assert keys == [noise_key(seed, choice) for seed in seeds for choice in range(20)]
    unseeded = [noise_key(None, 0) for _ in range(20)]
    assert len({*keys, *unseeded}) == len(keys) + len(unseeded)
    assert all(0 <= key < 2**64 for key in keys + unseeded)


def test_noise_of_a_seed_does_not_change_with_versions() -> None:
    """Texts of a seed are promised to stay: these numbers must never be updated."""
    assert noise_key(-7, 1) == 17345090033720684070
    assert noise_key(2**64 - 7, 1) == 17345090033720684070
    assert noise_key(42, 0) == 255354015614420610


def test_a_requests_noise_reaches_the_stages() -> None:
    async def scenario() -> None:
        async with running() as rig:
            params = SamplingParams(max_tokens=1, seed=42)
            for choice in (0, 1, 0):
                await collect(rig.engine.generate(PROMPT, params, choice))
            keys = [new.noise_key for plan in rig.executor.plans for new in plan.new_requests]
            assert keys == [noise_key(42, 0), noise_key(42, 1), noise_key(42, 0)]

    run(scenario())


def test_every_plan_that_comes_back_is_recorded_and_numbers_go_on_after_a_failure() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            reader = asyncio.create_task(tokens_until_failure(rig.engine.generate(PROMPT, SamplingParams())))
            await rig.submitted(1)
            rig.executor.step()
            await rig.submitted(2)
            was_up = rig.engine.is_up
            rig.executor.fail()
            await asyncio.gather(rig.driver, return_exceptions=True)
            rig.engine.fail(StageFailedError("the stages could not be restarted"))
            await reader
            assert (was_up, rig.engine.is_up) == (True, False)
            rig.engine.resume(make_scheduler(), make_executor(), LIMITS)
            rig.driver = asyncio.create_task(rig.engine.run())
            await collect(rig.engine.generate(PROMPT, SamplingParams(max_tokens=2)))
            records = rig.engine.stats.records()
            assert [(record.number, record.plan_id) for record in records] == [(0, 0), (1, 0), (2, 1)]
            assert [record.num_prefill_tokens for record in records] == [len(PROMPT), len(PROMPT), 0]
            assert [record.num_decodes for record in records] == [0, 0, 1]

    run(scenario())


def test_log_probabilities_of_the_prompt_come_with_the_first_tokens_alone() -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            of_prompt = tuple(TokenLogprobs(token_id, -1.0, 1, ()) for token_id in PROMPT[1:])
            stream = rig.engine.generate(PROMPT, SamplingParams(prompt_logprobs=0))
            reader = asyncio.create_task(anext(stream))
            await rig.submitted(1)
            rig.executor.inject(Result(0, (5,), prompt_logprobs=(PromptLogprobs(0, 1, of_prompt),)))
            assert await reader == Delta((5,), None, prompt_logprobs=of_prompt)
            await rig.submitted(2)
            rig.executor.inject(Result(1, (NO_TOKEN,)))
            assert [delta async for delta in stream] == [Delta((), FinishReason.CONTENT_FILTER)]

    run(scenario())


POET = AdapterChoice("poet", source=AdapterSource("/poet", "1"))


@pytest.mark.parametrize(
    ("adapters", "told"), [((), "[^;]*$"), ((POET,), ".*; files of the request's adapters may be gone")]
)
def test_a_request_whose_logits_are_nan_fails_alone(adapters: tuple[AdapterChoice, ...], told: str) -> None:
    async def scenario() -> None:
        async with running(is_paused=True) as rig:
            both = (SamplingParams(max_tokens=1, adapters=adapters), SamplingParams(max_tokens=1))
            broken, whole = (rig.engine.generate([5 + id], params, log_id="r") for id, params in enumerate(both))
            readers = [asyncio.create_task(anext(stream)) for stream in (broken, whole)]
            await rig.submitted(1)
            rig.executor.inject(Result(0, (BROKEN_TOKEN, 9)))
            with pytest.raises(StageFailedError, match=f"NaN {told}"):
                await readers[0]
            assert await readers[1] == Delta((9,), FinishReason.LENGTH)
            assert not rig.engine.scheduler.has_requests
            assert rig.engine.journal.totals.num_generation_tokens == 1

    run(scenario())


def test_an_error_in_scheduling_is_logged_by_the_loop_while_the_engine_does_not_run() -> None:
    async def scenario() -> None:
        engine, logged = make_engine(make_executor()), list[dict[str, Any]]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        engine.scheduler._running.released.append(99)
        reader = asyncio.create_task(collect(engine.generate(PROMPT, SamplingParams())))
        await turns()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert "request 99 is released" in str(logged[0]["exception"])

    run(scenario())


def test_the_time_of_the_last_token_is_read_from_the_clock() -> None:
    async def scenario() -> None:
        now = 100.0
        async with running(clock=lambda: now) as rig:
            times = [rig.engine.last_token_s]
            await collect(rig.engine.generate(PROMPT, SamplingParams(max_tokens=2)))
            times.append(rig.engine.last_token_s)
            now = 250.0
            await collect(rig.engine.generate(PROMPT, SamplingParams(max_tokens=2)))
            assert [*times, rig.engine.last_token_s] == [None, 100.0, 250.0]

    run(scenario())
