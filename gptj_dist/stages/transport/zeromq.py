"""Edges of the ring over ZeroMQ: a receiver binds a free port, its sender connects. A socket belongs to one thread."""

from __future__ import annotations

from typing import Any

import zmq
import zmq.asyncio

from gptj_dist.stages.transport.codec import Frame, decode, encode


class Inbound:
    """The receiving end of an edge, for a thread that waits.

    Args:
        host: the address to bind; the port is a free one.

    Attributes:
        frame_bytes: of the frame that came last.
    """

    def __init__(self, host: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self.address = bind_free_port(self._socket, host)
        self.frame_bytes = 0

    def receive(self) -> Frame:
        """Waits for the next frame of this epoch."""
        while (frame := decode(parts := self._socket.recv_multipart(), self._epoch)) is None:
            pass
        self.frame_bytes = sum(map(len, parts))
        return frame

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncInbound:
    """The receiving end of an edge, for an event loop; otherwise as `Inbound`."""

    def __init__(self, host: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self.address = bind_free_port(self._socket, host)
        self.frame_bytes = 0

    async def receive(self) -> Frame:
        """Waits for the next frame of this epoch."""
        while (frame := decode(parts := await self._socket.recv_multipart(), self._epoch)) is None:
            pass
        self.frame_bytes = sum(map(len, parts))
        return frame

    def close(self) -> None:
        self._socket.close(linger=0)


class Outbound:
    """The sending end of an edge; frames queue while the other end is slow or not there yet."""

    def __init__(self, address: str, epoch: int) -> None:
        self._epoch = epoch
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)

    def send(self, frame: Frame) -> None:
        """Hands the frame over; never blocks."""
        self._socket.send_multipart(encode(self._epoch, frame), flags=zmq.NOBLOCK)

    def close(self, linger_ms: int = 0) -> None:
        """Gives frames not yet on their way `linger_ms` to leave."""
        self._socket.close(linger=linger_ms)


def bind_free_port(socket: zmq.Socket[Any], host: str) -> str:
    """Binds a free port; the address to connect to."""
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    socket.bind(f"tcp://{host}:0")
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
