"""The transport over ZeroMQ: a receiver binds a free port and its sender connects. A socket belongs to one thread.

An address is the receiver's endpoint and the password of its lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from gptj_dist.stages.transport.arrivals import Arrivals
from gptj_dist.stages.transport.frames import EdgeTraffic, Frame, FrameReader, FrameWriter
from gptj_dist.stages.transport.guard import MAX_PART_BYTES, GuardedSocket, PasswordLock, show_password

_SEPARATOR = "#"  # neither endpoints nor passwords contain it


@dataclass(frozen=True, slots=True)
class ZeroMQTransport:
    """Implements `edge.Transport`."""

    epoch: int

    def inbound(self, host: str) -> ZeroMQInbound:
        return ZeroMQInbound(host, self.epoch)

    def async_inbound(self, host: str) -> AsyncZeroMQInbound:
        return AsyncZeroMQInbound(host, self.epoch)

    def outbound(self, address: str) -> ZeroMQOutbound:
        return ZeroMQOutbound(address, self.epoch)


class _Receiver:
    """What receiving ends for threads and for event loops have in common."""

    def __init__(self, host: str, epoch: int) -> None:
        lock = PasswordLock()
        self._reader = FrameReader(epoch)
        self._frame_bytes = 0
        self._guarded = GuardedSocket(zmq.PULL, host, lock)
        self.address = f"{self._guarded.endpoint}{_SEPARATOR}{lock.password}"

    @property
    def traffic(self) -> EdgeTraffic:
        return EdgeTraffic(self._frame_bytes, self._guarded.dropped.total)

    def close(self) -> None:
        self._guarded.close()

    def _read(self, parts: Sequence[bytes]) -> Frame | None:
        self._frame_bytes = sum(map(len, parts))
        return self._reader.read(parts)


class ZeroMQInbound(_Receiver):
    """Implements `edge.Inbound`."""

    def receive(self) -> Frame:
        while (frame := self._read(self._guarded.socket.recv_multipart())) is None:
            pass
        return frame


class AsyncZeroMQInbound(_Receiver):
    """Implements `edge.AsyncInbound`."""

    def __init__(self, host: str, epoch: int) -> None:
        super().__init__(host, epoch)
        self._arrivals = Arrivals(self._guarded.socket)

    def close(self) -> None:
        self._arrivals.stop()
        super().close()

    async def receive(self) -> Frame:
        while (frame := self._read(await self._arrivals.next())) is None:
            pass
        return frame


class ZeroMQOutbound:
    """Implements `edge.Outbound`."""

    def __init__(self, address: str, epoch: int) -> None:
        endpoint, _, password = address.partition(_SEPARATOR)
        self._writer = FrameWriter(epoch)
        self._socket: zmq.Socket[Any] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        show_password(self._socket, password)
        self._socket.connect(endpoint)

    def send(self, frame: Frame) -> None:
        parts = self._writer.write(frame)
        if (longest := max(map(len, parts))) > MAX_PART_BYTES:
            raise ValueError(f"a frame has a part of {longest} bytes; receivers take at most {MAX_PART_BYTES}")
        self._socket.send_multipart(parts, flags=zmq.NOBLOCK)

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)
