"""From the ingress to a pipeline's engine and back: a call a prompt, and what becomes of choices that nobody reads.

The handle calls the pipeline in this process; feed, engine and what lies between are the real ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from gptj_dist.config import DEFAULT_MAX_QUEUED_TOKENS
from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.record import new_records
from gptj_dist.errors import InvalidRequestError, NotReadyError, StageFailedError, TooManyRequestsError
from gptj_dist.params import Pooling, SamplingParams
from gptj_dist.serving import pipeline_client
from gptj_dist.serving.feed import FeedInbox
from gptj_dist.serving.outages import Outages
from gptj_dist.serving.pipeline import Pipeline
from gptj_dist.serving.pipeline_call import PipelineCall
from gptj_dist.serving.pipeline_client import PipelineClient
from gptj_dist.serving.queue_room import QueueRoom
from gptj_dist.serving.sending import StreamSender
from tests.unit.test_async_engine import LIMITS, PROMPT, Rig, collect, expected_tokens, running, turns, until

PARAMS = SamplingParams(max_tokens=9, seed=6)
NUM_CHOICES = 3
MOST_WAITING = 2
WEIGHTS = "those"
TIMEOUT_S = 20

Streams = list[AsyncGenerator[Delta, None]]


class Response:
    """As Serve's: what waits for it is told of its cancellation by an error of Serve's own."""

    def __init__(self, call: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.ensure_future(call)
        self.cancel = self._task.cancel
        self.cancelled = self._task.cancelled
        self.done = self._task.done

    def __await__(self) -> Generator[Any, None, None]:
        try:
            yield from self._task
        except asyncio.CancelledError:
            raise RequestCancelledError("of the test") from None


@dataclass
class Handle:
    """As Serve's, to one replica."""

    pipeline: Pipeline
    calls: list[Response] = field(default_factory=list)

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Response:
        self.calls.append(Response(self.pipeline.generate(*arguments)))
        return self.calls[-1]


class Replica(Pipeline):
    """A pipeline over an engine at hand, without Ray."""

    def __init__(self, rig: Rig) -> None:
        self._engine = rig.engine
        self._outages = Outages(1.0)
        self._room = QueueRoom(MOST_WAITING, DEFAULT_MAX_QUEUED_TOKENS, self._engine, self._outages)
        self._weights = WEIGHTS
        self._sender = StreamSender(weights=WEIGHTS)
        self._group: Any = SimpleNamespace(kill=lambda: None)

    def __del__(self) -> None:  # type: ignore[override]
        """Nothing was started."""


@asynccontextmanager
async def serving(is_paused: bool = False) -> AsyncIterator[tuple[Rig, Handle, Callable[..., Streams]]]:
    """An engine, a handle to it, and what asks it for all choices of `PROMPT`, or for their rest after first tokens."""
    async with running(is_paused) as rig:
        replica, inbox = Replica(rig), FeedInbox("127.0.0.1", lambda error: pytest.fail(str(error)))
        handle: Any = Handle(replica)

        def ask(params: SamplingParams, first: Sequence[int] = (), weights: str = "") -> Streams:
            records = new_records(PROMPT, params, NUM_CHOICES, "a request")
            if first:
                records = [record.moved(first, weights) for record in records]
            call = PipelineCall(handle, inbox, Mailbox.take, records)
            return [call.stream(choice) for choice in range(NUM_CHOICES)]

        yield rig, handle, ask
        assert all(call.done() for call in handle.calls)
        assert not replica._sender.computing()
        assert not inbox._streams
        replica._sender.stop()
        inbox.stop()


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


async def polled(condition: Callable[[], bool], rig: Rig) -> None:
    """Waits for what comes over sockets; the rig's timeout limits it."""
    while not condition():  # noqa: ASYNC110  # what is looked at sets no events
        await asyncio.sleep(0.001)
    rig.scheduler.check_integrity()


def test_all_choices_of_a_prompt_are_one_call_and_the_prompt_is_computed_once() -> None:
    async def scenario() -> None:
        async with serving() as (rig, handle, ask):
            token_ids = await asyncio.gather(*map(collect, ask(PARAMS)))
            assert token_ids == [expected_tokens(PROMPT, PARAMS, choice) for choice in range(NUM_CHOICES)]
            assert len(handle.calls) == 1
            assert sum(plan.num_tokens for plan in rig.executor.plans) == len(PROMPT) + 2 + NUM_CHOICES * 8
            await polled(handle.calls[0].done, rig)

    run(scenario())


def test_a_completion_goes_on_with_the_weights_that_it_began_with_and_no_others() -> None:
    async def scenario() -> None:
        async with serving() as (rig, handle, ask):
            first = [expected_tokens(PROMPT, PARAMS, choice)[0] for choice in range(NUM_CHOICES)]
            deltas = await asyncio.gather(*map(anext, streams := ask(PARAMS)))
            assert {delta.weights for delta in deltas} == {WEIGHTS}
            await asyncio.gather(*(stream.aclose() for stream in streams))
            for weights in ("others", ""):
                ends = await asyncio.gather(*map(collect, ask(PARAMS, first[:1], weights)), return_exceptions=True)
                assert [type(end) for end in ends] == [StageFailedError] * NUM_CHOICES
                assert all("an update replaced the model" in str(end) for end in ends)
            [rest, *_] = await asyncio.gather(*map(collect, ask(PARAMS, first[:1], WEIGHTS)))
            assert first[:1] + rest == expected_tokens(PROMPT, PARAMS)
            await polled(lambda: all(call.done() for call in handle.calls), rig)

    run(scenario())


def test_a_choice_that_is_closed_frees_its_blocks_with_its_next_token_and_the_others_go_on() -> None:
    async def scenario() -> None:
        async with serving(is_paused=True) as (rig, handle, ask):
            closed, *others = ask(PARAMS)
            rest = [asyncio.ensure_future(collect(stream)) for stream in others]
            reading = asyncio.ensure_future(anext(closed))
            await polled(lambda: rig.scheduler.num_running == NUM_CHOICES, rig)
            rig.executor.step()
            await reading
            await closed.aclose()
            assert rig.scheduler.num_running == NUM_CHOICES
            rig.executor.step()
            rig.executor.step()
            await polled(lambda: rig.scheduler.num_running == NUM_CHOICES - 1, rig)
            rig.executor.go_on()
            assert [await task for task in rest] == [expected_tokens(PROMPT, PARAMS, choice) for choice in (1, 2)]
            await polled(handle.calls[0].done, rig)

    run(scenario())


def test_when_no_choice_is_read_any_more_the_call_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving(is_paused=True) as (rig, handle, ask):
            reading = [asyncio.ensure_future(collect(stream)) for stream in ask(PARAMS)]
            await polled(lambda: rig.scheduler.num_running == NUM_CHOICES, rig)
            for task in reading:
                task.cancel()
            await polled(handle.calls[0].done, rig)
            assert handle.calls[0].cancelled()
            assert not rig.scheduler.has_requests

    run(scenario())
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_choices_that_are_read_one_after_the_other_are_whole_too() -> None:
    async def scenario() -> None:
        async with serving() as (rig, handle, ask):
            token_ids = [await collect(stream) for stream in ask(PARAMS)]
            assert token_ids == [expected_tokens(PROMPT, PARAMS, choice) for choice in range(NUM_CHOICES)]
            await polled(lambda: all(call.done() for call in handle.calls), rig)

    run(scenario())


def test_every_choice_is_told_of_a_failure() -> None:
    async def scenario() -> None:
        async with serving(is_paused=True) as (rig, _, ask):
            reading = [asyncio.ensure_future(collect(stream)) for stream in ask(PARAMS)]
            await polled(lambda: rig.scheduler.num_running == NUM_CHOICES, rig)
            rig.engine.fail(StageFailedError("the stages could not be restarted"))
            ends = await asyncio.gather(*reading, return_exceptions=True)
            assert [type(end) for end in ends] == [StageFailedError] * NUM_CHOICES

    run(scenario())


def test_a_request_that_cannot_be_served_says_so_to_every_choice() -> None:
    async def scenario() -> None:
        async with serving() as (_, _, ask):
            reading = [collect(stream) for stream in ask(SamplingParams(max_tokens=1000))]
            ends = await asyncio.gather(*reading, return_exceptions=True)
            assert all(isinstance(end, InvalidRequestError) for end in ends)

    run(scenario())


def test_an_embedding_comes_the_same_way() -> None:
    async def scenario() -> None:
        async with serving() as (rig, handle, ask):
            first, *_ = ask(SamplingParams(max_tokens=0, pooling=Pooling()))
            [delta] = [delta async for delta in first]
            assert delta.embedding == f"{len(PROMPT)} tokens".encode()
            await polled(lambda: all(call.done() for call in handle.calls), rig)

    run(scenario())


def test_a_prompt_is_refused_while_too_many_wait_and_told_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(is_paused=True) as (rig, handle, ask):
            first: list[asyncio.Task[list[int]]] = []

            def all_are_there() -> bool:
                return rig.scheduler.num_waiting + rig.scheduler.num_running == len(first)

            while rig.scheduler.num_waiting < MOST_WAITING:
                first += [asyncio.create_task(collect(stream)) for stream in ask(PARAMS)]
                await polled(all_are_there, rig)
            monkeypatch.setattr(rig.engine, "room_after_s", lambda: 44.2)
            with pytest.raises(TooManyRequestsError, match="are waiting already") as raised:
                await anext(ask(PARAMS)[0])
            assert raised.value.retry_after_s == 45
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            await polled(lambda: all(call.done() for call in handle.calls), rig)

    run(scenario())


def test_a_prompt_is_refused_while_too_many_tokens_wait_unless_they_are_those_of_another_key() -> None:
    async def scenario() -> None:
        async with serving(is_paused=True) as (rig, handle, ask):
            replica = handle.pipeline
            replica._room = QueueRoom(1000, len(PROMPT) + 1, replica._engine, replica._outages)
            waiting = [asyncio.create_task(collect(stream)) for stream in ask(PARAMS)]
            await polled(lambda: rig.scheduler.num_running == NUM_CHOICES, rig)

            def all_are_there() -> bool:
                return len(waiting) == rig.scheduler.num_waiting + rig.scheduler.num_running

            while sum(rig.scheduler.waiting.num_tokens_of_keys.values()) <= len(PROMPT):
                waiting += [asyncio.create_task(collect(stream)) for stream in ask(PARAMS)]
                await polled(all_are_there, rig)
            with pytest.raises(TooManyRequestsError, match=r"requests of \d+ tokens are waiting already"):
                await anext(ask(PARAMS)[0])
            replica._room.require("another key")
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await polled(lambda: all(call.done() for call in handle.calls), rig)
            assert not rig.scheduler.waiting.num_tokens_of_keys

    run(scenario())


class FirstPipeline:
    """A handle to pipelines of which the first one answers, or fails, as told."""

    def __init__(self, answer: SimpleNamespace | BaseException) -> None:
        self._answer = answer

    @property
    def status(self) -> FirstPipeline:
        return self

    async def remote(self) -> SimpleNamespace:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer


NO_PIPELINE = DeploymentUnavailableError(DeploymentID("Pipeline"))


class Unassigned:
    """As Serve's response to a call that no replica takes: cancelling it raises the same error."""

    def __await__(self) -> Generator[Any, None, None]:
        yield
        raise NO_PIPELINE

    def cancel(self) -> None:
        raise NO_PIPELINE


def test_a_request_that_no_pipeline_takes_as_all_are_deleted_is_told_so() -> None:
    async def ask() -> None:
        inbox = FeedInbox("127.0.0.1", lambda error: pytest.fail(str(error)))
        handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=lambda *_: Unassigned()))
        call = PipelineCall(handle, inbox, Mailbox.take, new_records(PROMPT, PARAMS, 1, "a request"))
        with pytest.raises(NotReadyError, match="no pipeline takes requests right now"):
            await asyncio.wait_for(anext(call.stream(0)), TIMEOUT_S)
        inbox.stop()

    asyncio.run(ask())


class ReadyHandle(FirstPipeline):
    """A handle to a pipeline whose proofs end as told; the last one hangs. `NO_PIPELINE`: there is none then."""

    def __init__(self, *proofs: Exception | None) -> None:
        super().__init__(SimpleNamespace(limits=LIMITS))
        self.proofs = list(proofs)

    def broadcast(self, method: str) -> SimpleNamespace:
        async def ask() -> list[SimpleNamespace]:
            if method != "prove_ready" or self.proofs[:1] == [NO_PIPELINE]:
                del self.proofs[: method == "prove_ready"]
                raise NO_PIPELINE
            return [SimpleNamespace(get_async=self._prove)]

        return SimpleNamespace(_fetch_replica_results_async=ask)

    async def _prove(self) -> None:
        if not self.proofs:
            await asyncio.Event().wait()
        if (error := self.proofs.pop(0)) is not None:
            raise error


@pytest.fixture
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")


@pytest.mark.usefixtures("on_loopback")
def test_when_the_first_pipeline_answers_its_limits_are_known_and_the_ingress_is_healthy() -> None:
    async def scenario() -> None:
        handle: Any = FirstPipeline(SimpleNamespace(limits=LIMITS))
        client = PipelineClient(handle)
        with pytest.raises(NotReadyError, match="still loading"):
            client.limits()
        async with asyncio.timeout(TIMEOUT_S):
            await until(client._limits_task.done)
        assert client.limits() == LIMITS
        client.check_health()
        client.close()

    run(scenario())


@pytest.mark.usefixtures("on_loopback")
def test_if_the_wait_for_the_first_pipeline_ends_the_health_check_fails() -> None:
    async def scenario() -> None:
        handle: Any = FirstPipeline(asyncio.CancelledError("by Ray"))
        client = PipelineClient(handle)
        client.check_health()
        async with asyncio.timeout(TIMEOUT_S):
            await until(client._limits_task.done)
        with pytest.raises(StageFailedError, match="does not find the pipelines"):
            client.check_health()
        client.close()

    run(scenario())


@pytest.mark.usefixtures("on_loopback")
def test_streams_fail_at_once_if_tokens_can_no_longer_be_received() -> None:
    async def scenario() -> None:
        handle: Any = FirstPipeline(SimpleNamespace(limits=LIMITS))
        client = PipelineClient(handle)
        _, (mailbox,) = client._feed.open(1)
        await turns()
        client._feed._arrivals.stop()
        with pytest.raises(StageFailedError, match="no longer receive tokens: feed inbox was cancelled"):
            await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
        for refuses in (client.check_health, lambda: client.streams(new_records(PROMPT, PARAMS, 1, "a request"))):
            with pytest.raises(StageFailedError, match="no longer receive tokens"):
                refuses()
        client.close()

    run(scenario())


@asynccontextmanager
async def asked_if_ready(*proofs: Exception | None) -> AsyncIterator[PipelineClient]:
    handle: Any = ReadyHandle(*proofs)
    client = PipelineClient(handle)
    async with asyncio.timeout(TIMEOUT_S):
        await until(client._limits_task.done)
        yield client
    client.close()


@pytest.mark.usefixtures("on_loopback")
def test_a_pipeline_that_dies_while_it_proves_that_it_is_ready_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_client, "PROVE_AGAIN_S", 0.0)

    async def scenario() -> None:
        async with asked_if_ready(ActorDiedError(), None) as client:
            assert await client.prove_ready()
        async with asked_if_ready(NO_PIPELINE, None) as client:
            assert await client.prove_ready()
        why = RayTaskError("prove_ready", "", NotReadyError("has lost a stage")).as_instanceof_cause()
        async with asked_if_ready(why) as client:
            with pytest.raises(NotReadyError) as raised:
                await client.prove_ready()
            assert str(raised.value.args[0]) == "has lost a stage"

    run(scenario())


@pytest.mark.usefixtures("on_loopback")
@pytest.mark.parametrize("is_known_before", [True, False])
def test_while_no_coordinator_answers_the_reason_is_told_at_once(is_known_before: bool) -> None:
    async def scenario() -> None:
        async with asked_if_ready(ActorDiedError()) as client:
            if is_known_before:
                client._pipelines.none_is_up.set()
            asking = asyncio.create_task(client.prove_ready())
            await turns()
            assert asking.done() == is_known_before
            client._pipelines.none_is_up.set()
            with pytest.raises(NotReadyError, match="no pipeline is up: Ray Serve has to start one"):
                await asking

    run(scenario())


@pytest.mark.usefixtures("on_loopback")
def test_a_server_without_a_pipeline_is_ready_if_none_is_needed() -> None:
    async def scenario() -> None:
        async with asked_if_ready(NO_PIPELINE) as client:
            asking = asyncio.create_task(client.prove_ready())
            await turns()
            client._pipelines.is_asleep = True
            client._pipelines.none_is_up.set()
            assert not await asking
            assert not await client.prove_ready()  # none is asked, as that would start one

    run(scenario())


@pytest.mark.usefixtures("on_loopback")
def test_a_proof_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_client, "READY_TIMEOUT_S", 0.0)

    async def scenario() -> None:
        async with asked_if_ready() as client:
            with pytest.raises(NotReadyError, match="no pipeline makes a token right now"):
                await client.prove_ready()

    run(scenario())
