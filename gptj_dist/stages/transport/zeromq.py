"""The transport over ZeroMQ: a receiver binds a free port and its sender connects. A socket belongs to one thread.

An address is the receiver's endpoint and the password of its lock.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import zmq
import zmq.asyncio

from gptj_dist.logs import values
from gptj_dist.stages.transport.codec import CodecError
from gptj_dist.stages.transport.frames import EdgeTraffic, Frame, decode, encode
from gptj_dist.stages.transport.guard import MAX_PART_BYTES, GuardedSocket, PasswordLock, S, show_password

logger = logging.getLogger(__name__)

_SEPARATOR = "#"  # neither endpoints nor passwords contain it


@dataclass(frozen=True, slots=True)
class ZeroMQTransport:
    """Implements `edge.Transport`."""

    epoch: int

    def inbound(self, host: str) -> ZeroMQInbound:
        return ZeroMQInbound(zmq.Context(), host, self.epoch)

    def async_inbound(self, host: str) -> AsyncZeroMQInbound:
        return AsyncZeroMQInbound(zmq.asyncio.Context(), host, self.epoch)

    def outbound(self, address: str) -> ZeroMQOutbound:
        return ZeroMQOutbound(address, self.epoch)


class _Receiver(Generic[S]):
    """What receiving ends for threads and for event loops have in common.

    Args:
        context: of this socket alone.
    """

    def __init__(self, context: zmq.Context[S], host: str, epoch: int) -> None:
        lock = PasswordLock()
        self._epoch = epoch
        self._frame_bytes = 0
        self._guarded = GuardedSocket(context, zmq.PULL, host, lock)
        self.address = f"{self._guarded.endpoint}{_SEPARATOR}{lock.password}"

    @property
    def traffic(self) -> EdgeTraffic:
        return EdgeTraffic(self._frame_bytes, self._guarded.dropped.total)

    def close(self) -> None:
        self._guarded.close()

    def _decode(self, parts: Sequence[bytes]) -> Frame | None:
        """The frame of a message; None for one that is malformed or of another epoch."""
        self._frame_bytes = sum(map(len, parts))
        try:
            return decode(parts, self._epoch)
        except CodecError as error:
            self._guarded.dropped.num_malformed += 1
            logger.warning("malformed frame dropped", extra=values(error=str(error)))
            return None


class ZeroMQInbound(_Receiver["zmq.Socket[bytes]"]):
    """Implements `edge.Inbound`."""

    def receive(self) -> Frame:
        while (frame := self._decode(self._guarded.socket.recv_multipart())) is None:
            pass
        return frame


class AsyncZeroMQInbound(_Receiver[zmq.asyncio.Socket]):
    """Implements `edge.AsyncInbound`."""

    async def receive(self) -> Frame:
        while (frame := self._decode(await self._guarded.socket.recv_multipart())) is None:
            pass
        return frame


class ZeroMQOutbound:
    """Implements `edge.Outbound`."""

    def __init__(self, address: str, epoch: int) -> None:
        endpoint, _, password = address.partition(_SEPARATOR)
        self._epoch = epoch
        self._socket: zmq.Socket[Any] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        show_password(self._socket, password)
        self._socket.connect(endpoint)

    def send(self, frame: Frame) -> None:
        parts = encode(self._epoch, frame)
        if (longest := max(map(len, parts))) > MAX_PART_BYTES:
            raise ValueError(f"a frame has a part of {longest} bytes; receivers take at most {MAX_PART_BYTES}")
        self._socket.send_multipart(parts, flags=zmq.NOBLOCK)

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)
