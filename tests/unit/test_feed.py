"""Tokens on their way from pipelines to an ingress, and what becomes of a stream whose tokens do not come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq.asyncio
from ray.exceptions import RayActorError, RayTaskError

from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import GPTJDistError, NotReadyError, StageFailedError
from gptj_dist.serving import pipeline_client as pipelines
from gptj_dist.serving.feed import FeedInbox, FeedOutbox, ReplyTo

TIMEOUT_S = 10.0


def test_each_stream_gets_its_tokens_from_whichever_pipeline_makes_them() -> None:
    async def run() -> None:
        inboxes, outboxes = [FeedInbox("127.0.0.1") for _ in range(2)], [FeedOutbox(unexpected) for _ in range(2)]
        opened = [inbox.open(number) for inbox in inboxes for number in (1, 2)]
        streams = [(first.behind(i), mailbox) for first, mailboxes in opened for i, mailbox in enumerate(mailboxes)]
        for step in range(20):
            for index, (reply_to, _) in enumerate(streams):
                reason = FinishReason.LENGTH if step == 19 else None
                outboxes[index % 2].put(reply_to, Delta((100 * index + step,), reason))
            if step % 3 == 0:
                await asyncio.sleep(0)
        for index, (_, mailbox) in enumerate(streams):
            token_ids: list[int] = []
            reason = None
            while reason is None:
                delta = await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
                token_ids += delta.token_ids
                reason = delta.finish_reason
            assert token_ids == [100 * index + step for step in range(20)]
        for inbox, outbox in zip(inboxes, outboxes, strict=True):
            inbox.stop()
            outbox.stop()

    asyncio.run(run())


def unexpected(stream: ReplyTo) -> None:
    pytest.fail(f"{stream} is not read")


def test_what_comes_for_a_stream_that_was_closed_is_dropped_and_its_sender_is_told() -> None:
    async def run() -> Delta:
        inbox, told = FeedInbox("127.0.0.1"), asyncio.Queue[ReplyTo]()
        outbox, bystander = FeedOutbox(told.put_nowait), FeedOutbox(unexpected)
        closed, [_, mailbox] = inbox.open(2)
        open_ = closed.behind(1)
        bystander.put(open_, Delta((1,), None))
        assert (await asyncio.wait_for(mailbox.take(), TIMEOUT_S)).token_ids == (1,)
        inbox.close(closed)
        inbox.close(closed)
        outbox.put(closed, Delta((1,), None))
        outbox.put(open_, Delta((2, 3), FinishReason.STOP, embedding=bytes(range(256))))
        delta = await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
        assert await asyncio.wait_for(told.get(), TIMEOUT_S) == closed
        inbox.stop()
        outbox.stop()
        bystander.stop()
        return delta

    assert asyncio.run(run()) == Delta((2, 3), FinishReason.STOP, embedding=bytes(range(256)))


def _task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("generate", "a traceback", cause)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (lambda: _task_error(NotReadyError("restarting")), NotReadyError("restarting")),
        (RayActorError, StageFailedError("the pipeline's coordinator died")),
        (lambda: None, StageFailedError("the pipeline's tokens were lost on their way")),
    ],
)
def test_a_stream_without_tokens_says_why(
    monkeypatch: pytest.MonkeyPatch, failure: Callable[[], Exception | None], expected: GPTJDistError
) -> None:
    monkeypatch.setattr(pipelines, "LAST_TOKENS_S", 0.0)

    async def call() -> None:
        if (error := failure()) is not None:
            raise error

    async def run() -> None:
        mailboxes = [Mailbox(), Mailbox()]
        call_: Any = call()
        await pipelines._watch(call_, mailboxes)
        with pytest.raises(type(expected), match=str(expected)):
            await mailboxes[0].take()
        await mailboxes[1].take()

    with pytest.raises(type(expected), match=str(expected)):
        asyncio.run(run())


def test_a_message_that_is_not_one_of_tokens_ends_no_stream() -> None:
    async def run() -> Delta:
        inbox, outbox = FeedInbox("127.0.0.1"), FeedOutbox(unexpected)
        stream, [mailbox] = inbox.open(1)
        stranger = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        stranger.connect(stream.address)
        packed = msgspec.msgpack.encode
        for message in (
            [b"not msgpack"],
            [packed(7)],
            [packed([[0, "x"]])],
            [packed([[0, [[1], "no reason"]]])],
            [b"", b""],
        ):
            await stranger.send_multipart(message)
        outbox.put(stream, Delta((1,), FinishReason.STOP))
        delta = await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
        stranger.close(linger=0)
        inbox.stop()
        outbox.stop()
        return delta

    assert asyncio.run(run()).token_ids == (1,)
