"""Carries tokens from pipelines to an ingress: the tokens of many streams in one ZeroMQ message.

Through a Serve handle, every token of every stream would be a separate message, with a task at either end. So the
handle only starts, ends and cancels the streams of a prompt, and the feed carries their tokens. In the other
direction, an ingress sends receipts: how much has arrived, so that little waits for one that hangs, and the numbers of
streams that it no longer reads, so that their senders stop.

An inbox accepts only senders that have its keys, which are part of every `ReplyTo`; what was changed on its way is
refused, too. The parts of a stream are numbered: a part that comes again is dropped, and a stream that misses one ends
with PipelineLostError, so that it goes on elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import zmq

from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.errors import PipelineLostError, TooManyRequestsError
from gptj_dist.logs import values
from gptj_dist.stages.background import run_in_background
from gptj_dist.stages.transport.arrivals import Arrivals
from gptj_dist.stages.transport.codec import Codec, CodecError
from gptj_dist.stages.transport.frames import FrameFault
from gptj_dist.stages.transport.guard import CurveKeys, CurveLock, DropCount, GuardedSocket, show_keys

logger = logging.getLogger(__name__)

MAX_RECONNECT_MS = 10_000
"""The longest time between two attempts to connect to an ingress that has died."""

MAX_TURN_LOGPROBS = 1000
"""Once the messages of a turn of the event loop have the log probabilities of this many tokens, other parts wait for
the next turn: with the 20 likeliest tokens each they take milliseconds to write, and to read."""

BEAT_S, MAX_SILENT_BEATS = 1.0, 8
"""A pipeline sends something this often to each inbox that has streams of it. It hangs if nothing has come for this
many beats of the inbox's own clock: its event loop never stands still for a tenth of one."""

MAX_UNRECEIVED_BYTES = 64_000_000
"""Most that a pipeline keeps for an ingress that takes nothing: minutes of tokens. Then it stops the streams."""

UNNAMED = b"\0"
"""Begins the names that ZeroMQ makes."""

RECEIPT_BYTES = 1_000_000
"""An ingress sends a receipt after this many bytes."""

MAX_UNREAD_LOGPROBS = 100_000
"""Tokens with log probabilities that wait in an ingress for slow readers: those of one largest answer, or 0.2 GB."""

UNREAD_CHECK_LOGPROBS = 1000
"""An ingress counts what waits after this many more."""


@dataclass(frozen=True, slots=True)
class InboxAddress:
    """The address of an inbox and the keys to send to it."""

    endpoint: str
    keys: CurveKeys


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the tokens of a stream go.

    Args:
        stream_id: the stream's number in the inbox.
    """

    inbox: InboxAddress
    stream_id: int

    def plus(self, number: int) -> ReplyTo:
        """The stream that was opened `number` streams after this one."""
        return ReplyTo(self.inbox, self.stream_id + number)


class StreamPart(NamedTuple):
    """New tokens of one stream.

    Args:
        number: counts the parts of the stream from 0.
    """

    stream_id: int
    number: int
    delta: Delta


class Receipt(NamedTuple):
    """What has become of a sender's messages.

    Args:
        num_bytes: that have arrived since the last receipt.
        unread: streams whose tokens arrived but are not read.
    """

    num_bytes: int
    unread: tuple[int, ...]


_PARTS = Codec(tuple[StreamPart, ...])
_RECEIPT = Codec(Receipt)


@dataclass(slots=True)
class _OpenStream:
    mailbox: Mailbox
    num_parts: int = 0
    sender: bytes = b""

    def put(self, part: StreamPart) -> FrameFault | None:
        """Takes the next part. Drops one that comes again; ends the stream if one is missing."""
        if part.number < self.num_parts:
            return FrameFault.REPEATED
        if part.number > self.num_parts:
            self.mailbox.fail(PipelineLostError("some of the pipeline's tokens were lost on their way"))
            return FrameFault.MISSING
        self.num_parts += 1
        self.mailbox.put(part.delta)
        return None


class FeedInbox:
    """The ingress's end: puts arriving tokens into the mailboxes of open streams.

    Args:
        host: the address to bind; the port is a free one.
        on_end: called with the reason when the inbox can receive no more messages. It calls `fail`.

    Attributes:
        faults: counts parts of streams that did not arrive in order.
    """

    def __init__(self, host: str, on_end: Callable[[Exception], None]) -> None:
        lock = CurveLock()
        self._guarded = GuardedSocket(zmq.ROUTER, host, lock)
        self._address = InboxAddress(self._guarded.endpoint, lock.keys)
        self._streams: dict[int, _OpenStream] = {}
        self._num_opened = 0
        self._num_received: Counter[bytes] = Counter()
        self._num_new_logprobs = 0
        self._silent_beats: Counter[bytes] = Counter()
        self._guarded.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a pipeline may connect again under its name
        self.faults: Counter[FrameFault] = Counter()
        self._end: Exception | None = None
        self._arrivals = Arrivals(self._guarded.socket)
        self._reader = run_in_background("feed inbox", self._read(), on_end)

    @property
    def dropped(self) -> DropCount:
        """Counts of dropped connections and messages that did not come from a pipeline."""
        return self._guarded.dropped

    def open(self, num_streams: int) -> tuple[ReplyTo, list[Mailbox]]:
        """Opens streams; returns the first one and the mailboxes of all. Raises the error of `fail` after that."""
        self.require_open()
        first = ReplyTo(self._address, self._num_opened)
        self._num_opened += num_streams
        mailboxes = [Mailbox() for _ in range(num_streams)]
        self._streams |= {first.stream_id + number: _OpenStream(mailbox) for number, mailbox in enumerate(mailboxes)}
        return first, mailboxes

    def close(self, stream: ReplyTo) -> None:
        """Drops tokens of the stream that still arrive, and stops their sender. A second call does nothing."""
        self._streams.pop(stream.stream_id, None)

    def fail(self, error: Exception) -> None:
        """Ends all streams with the error, for good: none can be opened any more."""
        self._end = error
        for stream in self._streams.values():
            stream.mailbox.fail(error)

    def require_open(self) -> None:
        """Raises the error of `fail` after that."""
        if self._end is not None:
            raise self._end

    def beat(self) -> list[str]:
        """Returns the names of pipelines that have begun streams and hang. Call it every `BEAT_S`."""
        senders = {stream.sender for stream in self._streams.values() if stream.sender}
        self._silent_beats = Counter({sender: self._silent_beats[sender] + 1 for sender in senders})
        return [sender.decode() for sender, beats in self._silent_beats.items() if beats > MAX_SILENT_BEATS]

    def stop(self) -> None:
        """Receives no more messages."""
        self._reader.cancel()
        self._arrivals.stop()
        self._guarded.close()

    async def _read(self) -> None:
        while True:
            sender, *parts = await self._arrivals.next()
            message = b"".join(parts)
            self._silent_beats[sender] = 0
            try:
                unread = self._hand_out(_PARTS.decode(message), sender)
            except CodecError as error:
                self._guarded.dropped.num_malformed += 1
                logger.warning("malformed feed message dropped", extra=values(error=str(error)))
                continue
            self._num_received[sender] += len(message)
            if unread or self._num_received[sender] >= RECEIPT_BYTES:
                receipt = Receipt(self._num_received.pop(sender), tuple(unread))
                self._guarded.socket.send_multipart([sender, _RECEIPT.encode(receipt)], zmq.NOBLOCK)
            await asyncio.sleep(0)  # receiving takes no turn of the loop while there are messages

    def _hand_out(self, parts: Sequence[StreamPart], sender: bytes) -> list[int]:
        """Puts tokens into mailboxes; returns the ids of streams that are not open."""
        unread: list[int] = []
        for part in parts:
            if (stream := self._streams.get(part.stream_id)) is None:
                unread.append(part.stream_id)
            elif (fault := stream.put(part)) is not None:
                self._note_fault(fault, part, stream)
            else:
                stream.sender = sender if part.delta.finish_reason is None and not sender.startswith(UNNAMED) else b""
                self._num_new_logprobs += part.delta.num_logprobs
        if self._num_new_logprobs >= min(UNREAD_CHECK_LOGPROBS, MAX_UNREAD_LOGPROBS):
            self._num_new_logprobs = 0
            self._cut_slow_readers()
        return unread

    def _cut_slow_readers(self) -> None:
        """Ends the streams for which the most waits, until there is room again."""
        num_unread = sum(stream.mailbox.num_logprobs for stream in self._streams.values())
        while num_unread > MAX_UNREAD_LOGPROBS:
            stream_id, stream = max(self._streams.items(), key=lambda item: item[1].mailbox.num_logprobs)
            num_unread -= stream.mailbox.num_logprobs
            stream.mailbox.cut(TooManyRequestsError("the client reads too slowly: too much of its answer waits"))
            del self._streams[stream_id]

    def _note_fault(self, fault: FrameFault, part: StreamPart, stream: _OpenStream) -> None:
        self.faults[fault] += 1
        detail = f"number {part.number} arrived, expected {stream.num_parts}"
        logger.error("feed fault", extra=values(port=self._guarded.endpoint, fault=str(fault), detail=detail))
        if fault is FrameFault.MISSING:
            del self._streams[part.stream_id]


class FeedOutbox:
    """A pipeline's end: sends the tokens of one turn of the event loop in one message to each inbox.

    Args:
        on_unread: called with a stream that its ingress no longer reads, or whose tokens it has not taken for long; may
            be called more than once for a stream.
        name: of the pipeline; inboxes do not notice that one without a name hangs.

    Attributes:
        num_malformed: messages from ingresses that could not be decoded.
    """

    def __init__(self, on_unread: Callable[[ReplyTo], None], name: str = "") -> None:
        self._on_unread = on_unread
        self._name = name
        self._sockets: dict[InboxAddress, zmq.Socket[bytes]] = {}
        self._arrivals: dict[InboxAddress, Arrivals] = {}
        self._readers: dict[InboxAddress, asyncio.Task[None]] = {}
        self._num_unreceived: Counter[InboxAddress] = Counter()
        self._waiting: deque[tuple[InboxAddress, StreamPart]] = deque()
        self.num_malformed = 0

    def put(self, stream: ReplyTo, number: int, delta: Delta) -> None:
        """Sends a stream's new tokens soon.

        Args:
            number: counts the stream's parts from 0.
        """
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send_waiting)
        self._waiting.append((stream.inbox, StreamPart(stream.stream_id, number, delta)))

    def beat(self, inboxes: Collection[InboxAddress]) -> None:
        """Shows the inboxes that the pipeline does not hang. Call it every `BEAT_S`."""
        for inbox in inboxes:
            self._send_safely(inbox, ())

    def stop(self) -> None:
        """Drops the messages that have not been sent yet."""
        self._waiting.clear()
        for inbox in list(self._sockets):
            self._disconnect(inbox)

    def _send_waiting(self) -> None:
        """Sends one message to each inbox. If one cannot be sent, its streams fail: their inbox misses a part."""
        messages: defaultdict[InboxAddress, list[StreamPart]] = defaultdict(list)
        num_logprobs = 0
        while self._waiting and num_logprobs < MAX_TURN_LOGPROBS:
            inbox, part = self._waiting.popleft()
            messages[inbox].append(part)
            num_logprobs += part.delta.num_logprobs
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._send_waiting)
        for inbox, parts in messages.items():
            self._send_safely(inbox, parts)

    def _send_safely(self, inbox: InboxAddress, parts: Sequence[StreamPart]) -> None:
        try:
            self._send(inbox, parts)
        except Exception:
            logger.exception("tokens could not be sent", extra=values(inbox=inbox.endpoint, streams=len(parts)))

    def _send(self, inbox: InboxAddress, parts: Sequence[StreamPart]) -> None:
        if inbox not in self._sockets:
            self._sockets[inbox] = socket = _connect(inbox, self._name)
            self._arrivals[inbox] = Arrivals(socket)
            name = f"feed outbox to {inbox.endpoint}"
            self._readers[inbox] = run_in_background(name, self._read(inbox), lambda _: self._disconnect(inbox))
        message = _PARTS.encode(tuple(parts))
        if self._num_unreceived[inbox] + len(message) > MAX_UNRECEIVED_BYTES:
            self._give_up(inbox, parts)
            return
        self._sockets[inbox].send(message, zmq.NOBLOCK)
        self._arrivals[inbox].note_sent()
        self._num_unreceived[inbox] += len(message)

    def _give_up(self, inbox: InboxAddress, parts: Sequence[StreamPart]) -> None:
        """Drops all that waits for an ingress. If it comes to, it misses parts, and its streams go on elsewhere."""
        logger.error("ingress takes no tokens", extra=values(inbox=inbox.endpoint, streams=len(parts)))
        self._disconnect(inbox)
        for part in parts:
            self._on_unread(ReplyTo(inbox, part.stream_id))

    def _disconnect(self, inbox: InboxAddress) -> None:
        """The next part for the inbox connects again."""
        self._readers.pop(inbox).cancel()
        self._arrivals.pop(inbox).stop()
        self._sockets.pop(inbox).close()
        self._num_unreceived.pop(inbox, None)

    async def _read(self, inbox: InboxAddress) -> None:
        while True:
            message = await self._arrivals[inbox].next()
            try:
                receipt = _RECEIPT.decode(b"".join(message))
            except CodecError as error:
                self.num_malformed += 1
                logger.warning("malformed feed message dropped", extra=values(error=str(error)))
                continue
            self._num_unreceived[inbox] -= receipt.num_bytes
            for stream_id in receipt.unread:
                self._on_unread(ReplyTo(inbox, stream_id))


def _connect(inbox: InboxAddress, name: str = "") -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    if name:
        socket.setsockopt(zmq.IDENTITY, name.encode())
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
    show_keys(socket, inbox.keys)
    socket.connect(inbox.endpoint)
    return socket
