"""Requests whose pipelines are lost: the client gets every token once, wherever the pipeline dies, or a clear error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord, new_records
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import (
    InvalidRequestError,
    NotReadyError,
    PipelineLostError,
    StageFailedError,
    TooManyRequestsError,
)
from gptj_dist.params import SamplingParams
from gptj_dist.serving import moves, pipeline_call
from gptj_dist.serving.feed import ReplyTo
from gptj_dist.serving.keys import CALLER
from gptj_dist.serving.moves import MAX_MOVES, lasting
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.stages.transport.frames import FrameFault
from tests.unit.test_async_engine import LIMITS, MAX_BATCH_SIZE, PROMPT, Rig, collect, expected_tokens, running, turns
from tests.unit.test_pipeline_client import MOST_WAITING, NUM_CHOICES, Replica, polled

PARAMS = SamplingParams(max_tokens=6, seed=6)
TOKENS = expected_tokens(PROMPT, PARAMS)
SEARCH = SamplingParams(max_tokens=5, n=3, use_beam_search=True, ignore_eos=True)
LOST = PipelineLostError("the pipeline's coordinator died")
NOT_READY = NotReadyError("no pipeline takes requests right now")
TIMEOUT_S = 20
WEIGHTS = "those"

Stream = AsyncGenerator[Delta, None]


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(moves, "MAX_DELAY_S", 0.0)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


@dataclass
class Pipelines:
    """Pipelines that generate `TOKENS`.

    Args:
        lives: of each, the number of tokens that it generates, and its error.

    Attributes:
        records: with which their streams were opened.
    """

    lives: list[tuple[int, Exception | None]]
    records: list[RequestRecord] = field(default_factory=list)
    num_open: int = 0
    num_moves: int = 0

    def stream(self) -> Stream:
        [record] = new_records(PROMPT, PARAMS, 1, "r")
        return lasting(self.open(record), record, self.open, self._note_move)

    def _note_move(self) -> None:
        self.num_moves += 1

    async def open(self, record: RequestRecord) -> Stream:
        self.records.append(record)
        num_tokens, error = self.lives[len(self.records) - 1]
        first = len(record.token_ids)
        self.num_open += 1
        try:
            for place in range(first, first + num_tokens):
                is_last = place == PARAMS.max_tokens - 1
                weights = WEIGHTS if place == first else ""
                yield Delta((TOKENS[place],), FinishReason.LENGTH if is_last else None, weights=weights)
            if error is not None:
                raise error
            if first + num_tokens < PARAMS.max_tokens:
                await asyncio.Event().wait()
        finally:
            self.num_open -= 1


@pytest.mark.parametrize("second", range(PARAMS.max_tokens))
@pytest.mark.parametrize("first", range(PARAMS.max_tokens))
def test_wherever_two_pipelines_are_lost_the_tokens_are_those_of_one(first: int, second: int) -> None:
    async def scenario() -> None:
        second_life = min(second, PARAMS.max_tokens - 1 - first)
        rest = PARAMS.max_tokens - first - second_life
        pipelines = Pipelines([(first, LOST), (second_life, LOST), (rest, None)])
        assert await collect(pipelines.stream()) == TOKENS
        assert [len(record.token_ids) for record in pipelines.records] == [0, first, first + second_life]
        assert [record.num_moves for record in pipelines.records] == [0, 1, 2]
        assert len({record.noise_key for record in pipelines.records}) == 1
        assert all(record.weights == (WEIGHTS if record.token_ids else "") for record in pipelines.records)
        assert (pipelines.num_open, pipelines.num_moves) == (0, 2)

    run(scenario())


def test_a_request_under_which_pipelines_are_lost_again_and_again_fails() -> None:
    async def scenario() -> None:
        pipelines = Pipelines([(1, LOST)] * (MAX_MOVES + 1))
        with pytest.raises(StageFailedError, match=f"{MAX_MOVES + 1} pipelines in a row .* coordinator died") as raised:
            await collect(pipelines.stream())
        assert type(raised.value) is StageFailedError
        assert len(pipelines.records) == MAX_MOVES + 1

    run(scenario())


@pytest.mark.parametrize(
    "error", [TooManyRequestsError("full", 3), InvalidRequestError("no"), StageFailedError("5 times"), NOT_READY]
)
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_what_a_request_is_refused_with_or_fails_with_is_not_tried_again(num_tokens: int, error: Exception) -> None:
    async def scenario() -> None:
        pipelines = Pipelines([(num_tokens, error)])
        with pytest.raises(type(error)):
            await collect(pipelines.stream())
        assert len(pipelines.records) == 1

    run(scenario())


def test_a_request_waits_while_no_pipeline_is_ready() -> None:
    async def scenario() -> None:
        pipelines = Pipelines([(2, LOST), (0, NOT_READY), (0, NOT_READY), (1, LOST), (0, NOT_READY), (3, None)])
        assert await collect(pipelines.stream()) == TOKENS
        assert [record.num_moves for record in pipelines.records] == [0, 1, 1, 1, 2, 2]

    run(scenario())


@pytest.mark.parametrize("end", [(0, None), (0, NOT_READY)], ids=["silent", "not ready"])
def test_a_request_that_no_pipeline_goes_on_with_fails_in_time(
    monkeypatch: pytest.MonkeyPatch, end: tuple[int, Exception | None]
) -> None:
    monkeypatch.setattr(moves, "MOVE_TIMEOUT_S", 0.02)

    async def scenario() -> None:
        pipelines = Pipelines([(2, LOST), *[end] * 100_000])
        with pytest.raises(StageFailedError, match=r"no other one went on with the request within 0\.02 s"):
            await collect(pipelines.stream())
        assert pipelines.num_open == 0

    run(scenario())


def test_a_request_whose_client_leaves_in_the_pause_is_not_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "FIRST_DELAY_S", 1000.0)

    async def scenario() -> None:
        pipelines = Pipelines([(2, LOST), (4, None)])
        reader = asyncio.create_task(collect(pipelines.stream()))
        await turns()
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert (len(pipelines.records), pipelines.num_open) == (1, 0)

    run(scenario())


class Serve:
    """As a handle of Serve's: calls go to the present replica, and fail if it dies."""

    def __init__(self, rig: Rig) -> None:
        self.status = SimpleNamespace(remote=self._status)
        self.generate = SimpleNamespace(remote=self._generate)
        self.calls: list[asyncio.Task[None]] = []
        self.put(rig)

    def put(self, rig: Rig) -> None:
        """Puts a replica over the engine in place."""
        self.replica = Replica(rig)
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def kill(self) -> None:
        """Ends the replica with its calls."""
        self.replica._sender.stop()
        self._death.set_result(None)

    async def _status(self) -> SimpleNamespace:
        return SimpleNamespace(limits=LIMITS)

    def _generate(self, *arguments: Any) -> asyncio.Task[None]:
        work = asyncio.ensure_future(self.replica.generate(*arguments))
        self.calls.append(asyncio.ensure_future(self._call(work, self._death)))
        return self.calls[-1]

    async def _call(self, work: asyncio.Task[None], death: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait((work, death), return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise RayActorError
            try:
                work.result()
            except Exception as error:
                raise RayTaskError("generate", "a traceback", error) from error
        finally:
            work.cancel()


@asynccontextmanager
async def served(*, is_paused: bool) -> AsyncIterator[tuple[Rig, Serve, PipelineClient]]:
    """An ingress's client of one replica."""
    async with running(is_paused) as rig:
        serve = Serve(rig)
        handle: Any = serve
        client = PipelineClient(handle)
        yield rig, serve, client
        await polled(lambda: all(call.done() for call in serve.calls), rig)
        assert not client._feed._streams
        serve.replica._sender.stop()
        client.close()


@pytest.mark.parametrize("num_tokens", range(PARAMS.max_tokens))
def test_all_completions_of_a_prompt_outlive_the_coordinator_wherever_it_dies(num_tokens: int) -> None:
    async def scenario() -> None:
        async with served(is_paused=True) as (rig, serve, client), running() as other:
            got: list[list[int]] = [[] for _ in range(NUM_CHOICES)]

            async def read(choice: int, stream: Stream) -> None:
                async for delta in stream:
                    got[choice] += delta.token_ids

            streams = client.streams(new_records(PROMPT, PARAMS, NUM_CHOICES, "r"))
            reading = [asyncio.create_task(read(choice, stream)) for choice, stream in enumerate(streams)]
            while len(got[0]) < num_tokens:
                num_made = max((request.num_output_tokens for request in rig.scheduler._running.requests), default=0)
                if rig.executor._computed and num_made < num_tokens:  # tokens take their time to the client
                    rig.executor.step()
                await asyncio.sleep(0.001)
            serve.kill()
            serve.put(other)
            await asyncio.gather(*reading)
            assert got == [expected_tokens(PROMPT, PARAMS, choice) for choice in range(NUM_CHOICES)]
            assert len(serve.calls) == (2 if num_tokens else 1)
            computed = sum(plan.num_tokens for plan in other.executor.plans)
            assert computed == len(PROMPT) + (NUM_CHOICES - 1) + NUM_CHOICES * (PARAMS.max_tokens - 1)
            await polled(lambda: not rig.scheduler.has_requests, rig)

    run(scenario())


@pytest.mark.parametrize("num_steps", range(SEARCH.max_tokens))
def test_a_beam_search_outlives_the_coordinator_wherever_it_dies(num_steps: int) -> None:
    async def scenario() -> None:
        async with served(is_paused=True) as (rig, serve, client), running() as other:
            [expected] = [delta async for delta in other.engine.generate(PROMPT, SEARCH)]
            [stream] = client.streams(new_records(PROMPT, SEARCH, SEARCH.n, "r"))
            reading = asyncio.create_task(anext(stream))
            for number in range(1, num_steps + 1):
                await rig.submitted(number)
                rig.executor.step()
            await rig.submitted(num_steps + 1)
            serve.kill()
            serve.put(other)
            assert (await reading)._replace(weights="") == expected
            assert len(expected.beams) == SEARCH.n
            await stream.aclose()

    run(scenario())


def test_a_pipeline_that_has_ended_hands_its_requests_on() -> None:
    async def scenario() -> None:
        async with served(is_paused=True) as (rig, serve, client), running() as other:
            [stream] = client.streams(new_records(PROMPT, PARAMS, 1, "r"))
            reading = asyncio.create_task(collect(stream))
            await rig.submitted(1)
            rig.executor.step()
            await rig.submitted(2)
            ended = serve.replica
            serve.put(other)
            ended._note_end(StageFailedError("the stages could not be restarted in 3 attempts"))
            assert await reading == TOKENS

    run(scenario())


def test_a_moved_request_is_accepted_though_too_many_wait_already() -> None:
    async def scenario() -> None:
        async with served(is_paused=True) as (rig, serve, client), running(is_paused=True) as full:
            [stream] = client.streams(new_records(PROMPT, PARAMS, 1, "r"))
            reading = asyncio.create_task(collect(stream))
            await rig.submitted(1)
            others = [asyncio.create_task(collect(full.engine.generate(PROMPT, PARAMS))) for _ in range(12)]
            await turns()
            assert full.scheduler.num_waiting > 2
            serve.kill()
            serve.put(full)
            await polled(lambda: any(request.is_moved for request in full.scheduler._by_id.values()), rig)
            full.executor.go_on()
            assert await reading == TOKENS
            await asyncio.gather(*others)

    run(scenario())


def test_a_queue_full_of_one_keys_requests_takes_anothers_and_runs_it_next() -> None:
    async def scenario() -> None:
        async with served(is_paused=True) as (rig, _, client):
            reading: dict[str, list[asyncio.Task[list[int]]]] = {"a": [], "b": []}
            for key in ("a",) * (MAX_BATCH_SIZE + MOST_WAITING + 3) + ("b",):
                CALLER.set(key)
                [stream] = client.streams(new_records(PROMPT, PARAMS, 1, "r"))
                reading[key].append(asyncio.create_task(collect(stream)))
                await turns()
                await rig.submitted(1)
            assert rig.scheduler.waiting.num_of_keys == {"a": MOST_WAITING, "b": 1}
            assert [request.key for request in rig.scheduler.waiting][:2] == ["a", "b"]
            num_running = rig.scheduler.num_running
            rig.executor.go_on()
            assert await reading["b"][0] == TOKENS
            ends = await asyncio.gather(*reading["a"], return_exceptions=True)
            assert all(end == TOKENS or isinstance(end, TooManyRequestsError) for end in ends)
            assert sum(end == TOKENS for end in ends) == MOST_WAITING + num_running

    run(scenario())


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda client: client.fail_streams(NotReadyError("the server stopped")), "the server stopped"),
        (lambda client: client._note_failure(OSError("no socket")), "can no longer receive tokens: no socket"),
    ],
    ids=["server stops", "no tokens arrive"],
)
def test_requests_that_wait_for_another_pipeline_fail_when_the_ingress_ends(
    monkeypatch: pytest.MonkeyPatch, end: Callable[[PipelineClient], None], reason: str
) -> None:
    async def scenario() -> None:
        async with served(is_paused=True) as (rig, serve, client):
            streams = client.streams(new_records(PROMPT, PARAMS, 2, "r"))
            reading = [asyncio.create_task(collect(stream)) for stream in streams]
            await rig.submitted(1)
            monkeypatch.setattr(moves, "FIRST_DELAY_S", 0.05)
            serve.kill()
            await turns()
            end(client)
            ends = await asyncio.gather(*reading, return_exceptions=True)
            assert [reason in str(error) for error in ends] == [True, True], ends

    run(scenario())


def test_requests_that_begin_when_the_ingress_has_ended_all_streams_fail_at_once() -> None:
    async def scenario() -> None:
        async with served(is_paused=False) as (_, serve, client):
            [begun] = client.streams(new_records(PROMPT, PARAMS, 1, "r"))
            client.fail_streams(NotReadyError("the server stopped"))
            with pytest.raises(NotReadyError, match="the server stopped"):
                await anext(begun)
            with pytest.raises(NotReadyError, match="the server stopped"):
                client.streams(new_records(PROMPT, PARAMS, 1, "r"))
            assert serve.calls == []

    run(scenario())


def test_tokens_that_were_lost_behind_their_call_come_from_another_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_call, "LAST_TOKENS_S", 0.01)

    async def scenario() -> None:
        async with served(is_paused=False) as (rig, serve, client):
            silent, put = serve.replica._sender._outbox, serve.replica._sender._outbox.put
            monkeypatch.setattr(silent, "put", lambda to, number, delta: put(to, number, delta) if not number else None)
            [stream] = client.streams(new_records(PROMPT, PARAMS, 1, "r"))
            first = await anext(stream)
            serve.put(rig)
            assert [*first.token_ids, *await collect(stream)] == TOKENS

    run(scenario())


@pytest.mark.parametrize(
    ("order", "fault", "num_moves"),
    [
        ((0, 1, 3, 4, 5), FrameFault.MISSING, 1),
        ((1, 2, 3, 4, 5), FrameFault.MISSING, 1),
        ((0, 2, 1, 3, 4, 5), FrameFault.MISSING, 1),
        ((0, 1, 1, 0, 2, 3, 4, 5, 5), FrameFault.REPEATED, 0),
    ],
    ids=["lost", "first lost", "swapped", "doubled"],
)
def test_streams_whose_tokens_are_lost_swapped_or_doubled_on_their_way_are_whole(
    order: tuple[int, ...], fault: FrameFault, num_moves: int
) -> None:
    async def scenario() -> None:
        async with served(is_paused=False) as (_, serve, client):
            outbox, put = serve.replica._sender._outbox, serve.replica._sender._outbox.put
            deltas: dict[int, list[Delta]] = {}

            def disturbed(to: ReplyTo, number: int, delta: Delta) -> None:
                """Puts the parts of the first streams in the disturbed order, once all are there."""
                if to.stream_id >= NUM_CHOICES:
                    put(to, number, delta)
                    return
                deltas.setdefault(to.stream_id, []).append(delta)
                for one in order if delta.finish_reason is not None else ():
                    put(to, one, deltas[to.stream_id][one])

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(outbox, "put", disturbed)
                streams = client.streams(new_records(PROMPT, PARAMS, NUM_CHOICES, "r"))
                got = await asyncio.gather(*map(collect, streams))
            assert got == [expected_tokens(PROMPT, PARAMS, choice) for choice in range(NUM_CHOICES)]
            assert set(client.feed_faults) == {fault}
            assert len(serve.calls) == 1 + num_moves

    run(scenario())
