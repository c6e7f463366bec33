"""The transport over ZeroMQ: a receiver binds a free port and its sender connects. A socket belongs to one thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from gptj_dist.stages.transport.frames import Frame, decode, encode


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


class ZeroMQInbound:
    """Implements `edge.Inbound`."""

    def __init__(self, host: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.address = bind_free_port(self._socket, host)
        self.frame_bytes = 0

    def receive(self) -> Frame:
        while (frame := decode(parts := self._socket.recv_multipart(), self._epoch)) is None:
            pass
        self.frame_bytes = sum(map(len, parts))
        return frame

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncZeroMQInbound:
    """Implements `edge.AsyncInbound`."""

    def __init__(self, host: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self.address = bind_free_port(self._socket, host)
        self.frame_bytes = 0

    async def receive(self) -> Frame:
        while (frame := decode(parts := await self._socket.recv_multipart(), self._epoch)) is None:
            pass
        self.frame_bytes = sum(map(len, parts))
        return frame

    def close(self) -> None:
        self._socket.close(linger=0)


class ZeroMQOutbound:
    """Implements `edge.Outbound`."""

    def __init__(self, address: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)

    def send(self, frame: Frame) -> None:
        self._socket.send_multipart(encode(self._epoch, frame), flags=zmq.NOBLOCK)

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger=linger_ms)


def bind_free_port(socket: zmq.Socket[Any], host: str) -> str:
    """Binds a free port of the host; returns the address to connect to."""
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    socket.bind(f"tcp://{host}:0")
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
