"""The way of tokens from pipelines to an ingress: those of many streams in one ZeroMQ message.

Through a Serve handle every token of every stream would be a message of its own, with a task at either end. The handle
starts the streams of a prompt, ends them and cancels them; what lies between comes this way. Back goes only that a
stream is not read any more, by itself, while others of its prompt are: to whoever sends tokens for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import zmq
import zmq.asyncio

from gptj_dist.engine.mailbox import Delta, Mailbox
from gptj_dist.logs import values
from gptj_dist.stages.transport.codec import Codec, CodecError
from gptj_dist.stages.transport.zeromq import bind_free_port

logger = logging.getLogger(__name__)

MAX_RECONNECT_MS = 10_000
"""An ingress that has died is not looked for more often than that."""


class StreamDelta(NamedTuple):
    """New tokens of one stream of an inbox."""

    stream_id: int
    delta: Delta


_TOKENS = Codec(tuple[StreamDelta, ...])
_UNREAD = Codec(tuple[int, ...])


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the tokens of a stream go.

    Args:
        address: an inbox's.
        stream_id: the stream's number there.
    """

    address: str
    stream_id: int

    def behind(self, number: int) -> ReplyTo:
        """The stream that was opened so many behind this one."""
        return ReplyTo(self.address, self.stream_id + number)


class FeedInbox:
    """The ingress's end: hands tokens to the streams that are open.

    Args:
        host: the address to bind; the port is a free one.
    """

    def __init__(self, host: str) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._address = bind_free_port(self._socket, host)
        self._mailboxes: dict[int, Mailbox] = {}
        self._num_opened = 0
        self._reader = asyncio.create_task(self._read())

    def open(self, num_streams: int) -> tuple[ReplyTo, list[Mailbox]]:
        """The first of so many new streams, and where the tokens of each will be."""
        first = ReplyTo(self._address, self._num_opened)
        self._num_opened += num_streams
        mailboxes = [Mailbox() for _ in range(num_streams)]
        self._mailboxes |= {first.stream_id + number: mailbox for number, mailbox in enumerate(mailboxes)}
        return first, mailboxes

    def close(self, stream: ReplyTo) -> None:
        """Drops what still comes for the stream, and has its sender stop. A second call does nothing."""
        self._mailboxes.pop(stream.stream_id, None)

    def stop(self) -> None:
        """Takes no more messages."""
        self._reader.cancel()
        self._socket.close(linger=0)

    async def _read(self) -> None:
        while True:
            sender, *parts = await self._socket.recv_multipart()
            try:
                unread = self._hand_out(b"".join(parts))
            except CodecError as error:
                logger.warning("malformed feed message dropped", extra=values(error=str(error)))
                continue
            if unread:
                await self._socket.send_multipart([sender, _UNREAD.encode(tuple(unread))])

    def _hand_out(self, deltas: bytes) -> list[int]:
        """Puts tokens where they are read; gives the streams that nobody reads."""
        unread: list[int] = []
        for stream_id, delta in _TOKENS.decode(deltas):
            if (mailbox := self._mailboxes.get(stream_id)) is not None:
                mailbox.put(delta)
            else:
                unread.append(stream_id)
        return unread


class FeedOutbox:
    """A pipeline's end: what is put in the same turn of the event loop leaves in one message an inbox.

    Args:
        on_unread: called with a stream, perhaps several times, for which tokens came that nobody reads.
    """

    def __init__(self, on_unread: Callable[[ReplyTo], None]) -> None:
        self._on_unread = on_unread
        self._sockets: dict[str, zmq.asyncio.Socket] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._waiting: defaultdict[str, list[StreamDelta]] = defaultdict(list)

    def put(self, stream: ReplyTo, delta: Delta) -> None:
        """Sends a stream's new tokens, soon."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting[stream.address].append(StreamDelta(stream.stream_id, delta))

    def stop(self) -> None:
        """Drops what has not left yet."""
        for reader in self._readers:
            reader.cancel()
        for socket in self._sockets.values():
            socket.close()

    def _send(self) -> None:
        for address, deltas in self._waiting.items():
            if address not in self._sockets:
                self._sockets[address] = _connect(address)
                self._readers.append(asyncio.create_task(self._read(address)))
            self._sockets[address].send(_TOKENS.encode(tuple(deltas)), flags=zmq.NOBLOCK)
        self._waiting.clear()

    async def _read(self, address: str) -> None:
        while True:
            for stream_id in _UNREAD.decode(await self._sockets[address].recv()):
                self._on_unread(ReplyTo(address, stream_id))


def _connect(address: str) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
    socket.connect(address)
    return socket
