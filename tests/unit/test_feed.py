"""Tokens on their way from pipelines to an ingress, and what becomes of a stream whose tokens do not come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import zmq
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import GPTJDistError, NotReadyError, PipelineLostError, StageFailedError, TooManyRequestsError
from gptj_dist.params import TokenLogprobs
from gptj_dist.serving import feed
from gptj_dist.serving import pipeline_call as pipelines
from gptj_dist.serving.feed import MAX_SILENT_BEATS, FeedInbox, FeedOutbox, InboxAddress, ReplyTo, StreamPart, _connect
from gptj_dist.stages.transport.arrivals import Arrivals
from gptj_dist.stages.transport.frames import FrameFault
from gptj_dist.stages.transport.guard import CurveLock, GuardedSocket
from tests.unit.test_async_engine import until

TIMEOUT_S = 10.0


def test_each_stream_gets_its_tokens_from_whichever_pipeline_makes_them() -> None:
    async def run() -> None:
        inboxes, outboxes = [inbox_of_test() for _ in range(2)], [FeedOutbox(unexpected) for _ in range(2)]
        opened = [inbox.open(number) for inbox in inboxes for number in (1, 2)]
        streams = [(first.plus(i), mailbox) for first, mailboxes in opened for i, mailbox in enumerate(mailboxes)]
        for step in range(20):
            for index, (reply_to, _) in enumerate(streams):
                reason = FinishReason.LENGTH if step == 19 else None
                outboxes[index % 2].put(reply_to, step, Delta((100 * index + step,), reason))
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


def inbox_of_test() -> FeedInbox:
    return FeedInbox("127.0.0.1", lambda error: pytest.fail(f"the inbox ended: {error}"))


def unexpected(stream: ReplyTo) -> None:
    pytest.fail(f"{stream} is not read")


def test_what_comes_for_a_stream_that_was_closed_is_dropped_and_its_sender_is_told() -> None:
    async def run() -> Delta:
        inbox, told = inbox_of_test(), asyncio.Queue[ReplyTo]()
        outbox, bystander = FeedOutbox(told.put_nowait), FeedOutbox(unexpected)
        closed, [_, mailbox] = inbox.open(2)
        open_ = closed.plus(1)
        bystander.put(open_, 0, Delta((1,), None))
        assert (await asyncio.wait_for(mailbox.take(), TIMEOUT_S)).token_ids == (1,)
        inbox.close(closed)
        inbox.close(closed)
        outbox.put(closed, 0, Delta((1,), None))
        outbox.put(open_, 1, Delta((2, 3), FinishReason.STOP, embedding=bytes(range(256))))
        delta = await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
        assert await asyncio.wait_for(told.get(), TIMEOUT_S) == closed
        inbox.stop()
        outbox.stop()
        bystander.stop()
        return delta

    assert asyncio.run(run()) == Delta((2, 3), FinishReason.STOP, embedding=bytes(range(256)))


def test_many_log_probabilities_are_spread_over_turns_and_each_stream_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    num_streams, logprob = 5, TokenLogprobs(1, -0.5, 1, ((1, -0.5),))
    of_prompt = (logprob,) * (feed.MAX_TURN_LOGPROBS * 3 // 5)
    sent: list[int] = []
    send = FeedOutbox._send

    def recording(self: FeedOutbox, inbox: InboxAddress, parts: Sequence[StreamPart]) -> None:
        sent.append(len(parts))
        send(self, inbox, parts)

    async def run() -> None:
        inbox, outbox = inbox_of_test(), FeedOutbox(unexpected)
        first, mailboxes = inbox.open(num_streams)
        for number, reason in enumerate((None, FinishReason.LENGTH)):
            for choice in range(num_streams):
                outbox.put(
                    first.plus(choice), number, Delta((number,), reason, (logprob,), () if number else of_prompt)
                )
        for mailbox in mailboxes:
            deltas = [await mailbox.take()]
            while deltas[-1].finish_reason is None:
                deltas.append(await mailbox.take())
            assert [token_id for delta in deltas for token_id in delta.token_ids] == [0, 1]
            assert deltas[0].prompt_logprobs == of_prompt
        inbox.stop()
        outbox.stop()

    monkeypatch.setattr(FeedOutbox, "_send", recording)
    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
    assert sent == [2, 2, 1 + num_streams]


def _task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("generate", "a traceback", cause)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (lambda: _task_error(NotReadyError("restarting")), NotReadyError("restarting")),
        (RayActorError, PipelineLostError("the pipeline's coordinator died")),
        (
            lambda: DeploymentUnavailableError(DeploymentID("Pipeline")),
            NotReadyError("no pipeline takes requests right now"),
        ),
        (lambda: None, PipelineLostError("the pipeline's tokens were lost on their way")),
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


def test_a_stream_that_misses_a_part_is_lost_and_one_whose_parts_come_again_goes_on() -> None:
    async def run() -> None:
        inbox, unread = inbox_of_test(), asyncio.Queue[ReplyTo]()
        outbox = FeedOutbox(unread.put_nowait)
        first, [mailbox, other] = inbox.open(2)
        for number in (0, 2, 1):
            outbox.put(first, number, Delta((number,), None))
        for number in (0, 1, 0, 1, 2):
            outbox.put(first.plus(1), number, Delta((number,), FinishReason.STOP if number == 2 else None))
        async with asyncio.timeout(TIMEOUT_S):
            assert (await other.take()).token_ids == (0, 1, 2)
            assert (await mailbox.take()).token_ids == (0,)
            with pytest.raises(PipelineLostError, match="lost on their way"):
                await mailbox.take()
            assert await unread.get() == first
        assert inbox.faults == {FrameFault.MISSING: 1, FrameFault.REPEATED: 2}
        inbox.stop()
        outbox.stop()

    asyncio.run(run())


@pytest.mark.parametrize("has_connected", [True, False])
def test_an_error_while_sending_fails_the_streams_of_that_message_and_no_others(has_connected: bool) -> None:
    async def run(monkeypatch: pytest.MonkeyPatch) -> None:
        inboxes, outbox = [inbox_of_test(), inbox_of_test()], FeedOutbox(lambda _: None)
        (broken, [lost]), (whole, [kept]) = (inbox.open(1) for inbox in inboxes)
        num_before = 1 if has_connected else 0
        async with asyncio.timeout(TIMEOUT_S):
            if has_connected:
                outbox.put(broken, 0, Delta((1,), None))
                assert (await lost.take()).token_ids == (1,)
            real, failing = FeedOutbox._send, [broken.inbox]

            def fail_once(self: FeedOutbox, inbox: InboxAddress, parts: Sequence[StreamPart]) -> None:
                if inbox in failing:
                    failing.remove(inbox)
                    raise OSError("Too many open files")
                real(self, inbox, parts)

            monkeypatch.setattr(FeedOutbox, "_send", fail_once)
            outbox.put(broken, num_before, Delta((2,), None))
            outbox.put(whole, 0, Delta((5,), None))
            assert (await kept.take()).token_ids == (5,)
            outbox.put(broken, num_before + 1, Delta((3,), FinishReason.STOP))
            outbox.put(whole, 1, Delta((6,), FinishReason.STOP))
            assert (await kept.take()).token_ids == (6,)
            with pytest.raises(StageFailedError, match="lost on their way"):
                await lost.take()
        for inbox in inboxes:
            inbox.stop()
        outbox.stop()

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(run(monkeypatch))


def test_a_sender_with_the_key_that_sends_malformed_messages_ends_no_stream_and_is_counted() -> None:
    async def run() -> Delta:
        inbox, outbox = inbox_of_test(), FeedOutbox(unexpected)
        stream, [mailbox] = inbox.open(1)
        insider = _connect(stream.inbox)
        packed = msgspec.msgpack.encode
        wrong_reason = packed([[0, 0, [[1], "no reason", [], [], None]]])
        malformed = [[b"not msgpack"], [packed(7)], [packed([[0, "x"]])], [wrong_reason], [b"", b""]]
        for message in malformed:
            insider.send_multipart(message)
        outbox.put(stream, 0, Delta((1,), FinishReason.STOP))
        async with asyncio.timeout(TIMEOUT_S):
            delta = await mailbox.take()
            while inbox.dropped.num_malformed < len(malformed):  # noqa: ASYNC110  # counting sets no event
                await asyncio.sleep(0.001)
        insider.close(linger=0)
        inbox.stop()
        outbox.stop()
        return delta

    assert asyncio.run(run()).token_ids == (1,)


def test_an_outbox_drops_malformed_messages_and_still_hears_of_unread_streams() -> None:
    async def run() -> None:
        lock, unread = CurveLock(), asyncio.Queue[ReplyTo]()
        inbox = GuardedSocket(zmq.ROUTER, "127.0.0.1", lock)
        stream = ReplyTo(InboxAddress(inbox.endpoint, lock.keys), 7)
        outbox = FeedOutbox(unread.put_nowait)
        async with asyncio.timeout(TIMEOUT_S):
            outbox.put(stream, 0, Delta((1,), None))
            sender, _ = await Arrivals(inbox.socket).next()
            malformed = [b"", b"\xff", msgspec.msgpack.encode("text"), msgspec.msgpack.encode([9, ["x"]])]
            for message in (*malformed, msgspec.msgpack.encode([9, [7]])):
                inbox.socket.send_multipart([sender, message])
            assert await unread.get() == stream
        assert outbox.num_malformed == len(malformed)
        outbox.stop()
        inbox.close()

    asyncio.run(run())


def test_a_pipeline_keeps_little_for_an_ingress_that_hangs_and_stops_its_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "MAX_UNRECEIVED_BYTES", 2000)

    async def run() -> None:
        lock, unread = CurveLock(), asyncio.Queue[ReplyTo]()
        hung = GuardedSocket(zmq.ROUTER, "127.0.0.1", lock)
        stream = ReplyTo(InboxAddress(hung.endpoint, lock.keys), 7)
        outbox, num_parts = FeedOutbox(unread.put_nowait), 0
        while unread.empty():
            outbox.put(stream, num_parts, Delta((1,) * 100, None))
            num_parts += 1
            await asyncio.sleep(0)
        assert unread.get_nowait() == stream
        assert 2000 / 200 <= num_parts <= 2000 / 100 + 1
        assert not outbox._sockets
        assert not outbox._num_unreceived
        outbox.stop()
        hung.close()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_an_ingress_that_takes_its_tokens_gets_them_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_UNRECEIVED_BYTES", 2000)
    monkeypatch.setattr(feed, "RECEIPT_BYTES", 500)

    async def run() -> None:
        inbox, outbox = inbox_of_test(), FeedOutbox(unexpected)
        stream, [mailbox] = inbox.open(1)
        for number in range(200):
            outbox.put(stream, number, Delta((1,) * 100, None))
            assert len((await mailbox.take()).token_ids) == 100
            while outbox._num_unreceived[stream.inbox] > 1000:  # noqa: ASYNC110  # receipts set no event
                await asyncio.sleep(0.001)
        inbox.stop()
        outbox.stop()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_when_too_much_waits_for_readers_the_stream_with_the_most_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_UNREAD_LOGPROBS", 100)
    logprobs = (TokenLogprobs(1, -0.5, 1, ()),) * 5

    async def run() -> None:
        inbox, unread = inbox_of_test(), asyncio.Queue[ReplyTo]()
        outbox = FeedOutbox(unread.put_nowait)
        first, [slow, brisk, idle] = inbox.open(3)
        outbox.put(first.plus(2), 0, Delta((7,), None, logprobs))
        for number in range(30):
            outbox.put(first, number, Delta((1,) * 5, None, logprobs))
            outbox.put(first.plus(1), number, Delta((2,) * 5, None, logprobs))
            assert (await brisk.take()).token_ids == (2,) * 5
        with pytest.raises(TooManyRequestsError, match="reads too slowly"):
            await slow.take()
        assert await unread.get() == first
        assert (await idle.take()).token_ids == (7,)
        inbox.stop()
        outbox.stop()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_when_the_reader_of_an_inbox_ends_its_owner_hears_why() -> None:
    async def run() -> None:
        ends: list[Exception] = []
        inbox = FeedInbox("127.0.0.1", ends.append)
        await asyncio.sleep(0)
        inbox._arrivals.stop()
        async with asyncio.timeout(TIMEOUT_S):
            await until(lambda: bool(ends))
        assert "feed inbox" in str(ends[0])
        inbox.stop()

    asyncio.run(run())


def test_an_inbox_whose_streams_have_failed_opens_no_more() -> None:
    async def run() -> None:
        inbox = inbox_of_test()
        _, [mailbox] = inbox.open(1)
        inbox.require_open()
        inbox.fail(StageFailedError("for good"))
        with pytest.raises(StageFailedError, match="for good"):
            await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
        for refuses in (inbox.require_open, lambda: inbox.open(1)):
            with pytest.raises(StageFailedError, match="for good"):
                refuses()
        inbox.stop()

    asyncio.run(run())


def test_a_pipeline_that_has_begun_streams_and_sends_nothing_hangs_unless_it_has_sent_all() -> None:
    async def run() -> None:
        inbox, outbox, idle = inbox_of_test(), FeedOutbox(unexpected, "busy"), FeedOutbox(unexpected, "idle")
        first, mailboxes = inbox.open(3)
        outbox.put(first, 0, Delta((1,), None))
        idle.put(first.plus(1), 0, Delta((2,), FinishReason.STOP))
        for mailbox in mailboxes[:2]:
            await asyncio.wait_for(mailbox.take(), TIMEOUT_S)
        for _ in range(2 * MAX_SILENT_BEATS):
            outbox.beat({first.inbox})
            await until(lambda: not inbox._silent_beats[b"busy"])
            assert inbox.beat() == []
        for _ in range(MAX_SILENT_BEATS - 1):
            assert inbox.beat() == []
        assert inbox.beat() == ["busy"]
        inbox.close(first)
        assert inbox.beat() == []
        for end in (inbox, outbox, idle):
            end.stop()

    asyncio.run(run())
