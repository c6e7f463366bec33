"""Strangers at the ports of stages, coordinators and ingresses: no stream changes, and each is counted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import pytest

from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.plan import Plan, Result
from gptj_dist.engine.request import FinishReason
from gptj_dist.serving.feed import FeedInbox, FeedOutbox
from gptj_dist.stages.transport import open_transport
from gptj_dist.stages.transport.frames import FrameWriter, PlanFrame, ResultFrame
from gptj_dist.stages.transport.guard import CurveLock
from tests.strangers import ATTACKS, stranger

TIME_LIMIT_S = 30.0
NUM_FRAMES = 200


def forged_frame() -> list[bytes]:
    return [bytes(part) for part in FrameWriter(1).write(ResultFrame(Result(666, (6,))))]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_stage_gets_its_frames_and_no_others(attack: str) -> None:
    transport = open_transport(epoch=1)
    with contextlib.closing(transport.inbound("127.0.0.1")) as inbound:
        plan_ids: list[int] = []

        def read() -> None:
            while len(plan_ids) < NUM_FRAMES:
                frame = inbound.receive()
                plan_ids.append(frame.plan.plan_id if isinstance(frame, PlanFrame) else -1)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        with contextlib.closing(transport.outbound(inbound.address)) as outbound:
            for plan_id in range(NUM_FRAMES // 2):
                outbound.send(PlanFrame(Plan(plan_id, (), (), ()), None))
            endpoint, _, _ = inbound.address.partition("#")
            with stranger(attack, endpoint, forged_frame()):
                wait_for(lambda: inbound.traffic.num_dropped > 0)
                for plan_id in range(NUM_FRAMES // 2, NUM_FRAMES):
                    outbound.send(PlanFrame(Plan(plan_id, (), (), ()), None))
                reader.join(TIME_LIMIT_S)
    assert plan_ids == list(range(NUM_FRAMES))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_coordinator_gets_its_results_and_no_others(attack: str) -> None:
    async def run() -> list[int]:
        transport = open_transport(epoch=1)
        inbound = transport.async_inbound("127.0.0.1")
        outbound = transport.outbound(inbound.address)
        endpoint, _, _ = inbound.address.partition("#")
        plan_ids: list[int] = []
        with contextlib.closing(inbound), contextlib.closing(outbound):
            async with asyncio.timeout(TIME_LIMIT_S):
                with stranger(attack, endpoint, forged_frame()):
                    while len(plan_ids) < NUM_FRAMES or not inbound.traffic.num_dropped:
                        outbound.send(ResultFrame(Result(len(plan_ids), ())))
                        frame = await inbound.receive()
                        plan_ids.append(frame.result.plan_id if isinstance(frame, ResultFrame) else -1)
        return plan_ids

    plan_ids = asyncio.run(run())
    assert plan_ids == list(range(len(plan_ids)))


@pytest.mark.parametrize("knows_server_key", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_client_gets_the_tokens_of_its_pipeline_and_no_others(attack: str, knows_server_key: bool) -> None:
    async def run() -> list[int]:
        inbox = FeedInbox("127.0.0.1", lambda error: pytest.fail(f"the inbox ended: {error}"))
        outbox = FeedOutbox(lambda _: None)
        stream, [mailbox] = inbox.open(1)
        forged = [
            msgspec.msgpack.encode([[stream.stream_id, number, [[666], None, [], [], None]]]) for number in (0, 1)
        ]
        key = stream.inbox.keys.server if knows_server_key else None
        token_ids: list[int] = []
        async with asyncio.timeout(TIME_LIMIT_S):
            with (
                stranger(f"{attack} to a feed", stream.inbox.endpoint, forged[:1], key),
                stranger(f"{attack} to a feed", stream.inbox.endpoint, forged[1:], key),
            ):
                while not inbox.dropped.num_refused or len(token_ids) < NUM_FRAMES:
                    outbox.put(stream, len(token_ids), Delta((len(token_ids),), None))
                    token_ids += (await mailbox.take()).token_ids
                outbox.put(stream, len(token_ids), Delta((), FinishReason.STOP))
                assert (await mailbox.take()).finish_reason == FinishReason.STOP
        inbox.stop()
        outbox.stop()
        return token_ids

    token_ids = asyncio.run(run())
    assert token_ids == list(range(len(token_ids)))


def test_after_an_error_while_a_key_is_checked_strangers_are_still_refused_and_friends_get_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors: list[Exception] = [OSError(24, "Too many open files")]
    check = CurveLock.opens_for

    def fail_once(lock: CurveLock, credentials: Sequence[bytes]) -> bool:
        if errors:
            raise errors.pop()
        return check(lock, credentials)

    monkeypatch.setattr(CurveLock, "opens_for", fail_once)

    async def run() -> Delta:
        inbox = FeedInbox("127.0.0.1", lambda error: pytest.fail(f"the inbox ended: {error}"))
        outbox = FeedOutbox(lambda _: None)
        stream, [mailbox] = inbox.open(1)
        forged = [msgspec.msgpack.encode([[stream.stream_id, 0, [[666], None, [], [], None]]])]
        attack = "forged messages from a peer with keys of its own to a feed"
        async with asyncio.timeout(TIME_LIMIT_S):
            for number in (1, 2):
                with stranger(attack, stream.inbox.endpoint, forged, stream.inbox.keys.server):
                    while inbox.dropped.num_refused < number:  # noqa: ASYNC110  # a thread counts them
                        await asyncio.sleep(0.01)
            outbox.put(stream, 0, Delta((1,), FinishReason.STOP))
            delta = await mailbox.take()
        outbox.stop()
        inbox.stop()
        return delta

    assert asyncio.run(run()).token_ids == (1,)
    assert not errors


def test_friends_who_come_and_go_are_not_counted() -> None:
    async def run() -> int:
        inbox = FeedInbox("127.0.0.1", lambda error: pytest.fail(f"the inbox ended: {error}"))
        for _ in range(40):
            outbox = FeedOutbox(lambda _: None)
            stream, [mailbox] = inbox.open(1)
            outbox.put(stream, 0, Delta((1,), FinishReason.STOP))
            async with asyncio.timeout(TIME_LIMIT_S):
                await mailbox.take()
            outbox.stop()
            inbox.close(stream)
        num_dropped = inbox.dropped.total
        inbox.stop()
        return num_dropped

    assert asyncio.run(run()) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    """What is counted by a thread of libzmq's events sets no event of ours."""
    deadline = time.monotonic() + TIME_LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
