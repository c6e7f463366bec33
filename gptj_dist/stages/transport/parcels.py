"""A connection that brings the KV of a layer from one stage to another. The receiver binds a port with a key.

A parcel is a header and raw bytes. Parcels are numbered and have checksums, as frames have. The sender waits while the
receiver is slow, so that no memory fills with parcels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import zmq

from gptj_dist.stages.transport.codec import Codec, CodecError
from gptj_dist.stages.transport.frames import FrameFault, FrameFaultError
from gptj_dist.stages.transport.guard import GuardedSocket, PasswordLock, show_password

HIGH_WATER_PARCELS = 4
"""Parcels that may wait at each end."""

LOOK_MS = 50
"""Time between two looks whether the other end is still wanted."""

_SEPARATOR = "#"
_CHECKSUM_BYTES = 4

T = TypeVar("T")


class AbandonedError(Exception):
    """The connection is not wanted any more."""

    def __str__(self) -> str:
        return "gave up a move of a layer, because its ring ended"


class _Envelope(NamedTuple):
    number: int
    header: bytes


_ENVELOPES: Codec[Any] = Codec(_Envelope)


@dataclass(frozen=True, slots=True)
class Parcel(Generic[T]):
    """What arrives.

    Args:
        header: of the type that both ends agree on.
        data: raw bytes.
    """

    header: T
    data: Sequence[bytes]

    @property
    def num_bytes(self) -> int:
        """Of the data."""
        return sum(map(len, self.data))


class ParcelInbound(Generic[T]):
    """The receiving end. One thread at a time may use it.

    Args:
        host: the address to bind; the port is a free one.
        kind: of the headers.
        is_abandoned: asked again and again while nothing arrives.

    Attributes:
        address: what `ParcelOutbound` needs. It holds a secret: do not log it.
    """

    def __init__(self, host: str, kind: type[T], is_abandoned: Callable[[], bool]) -> None:
        lock = PasswordLock()
        self._headers = Codec(kind)
        self._is_abandoned = is_abandoned
        self._guarded = GuardedSocket(zmq.PULL, host, lock, HIGH_WATER_PARCELS)
        self._num_parcels = 0
        self.address = f"{self._guarded.endpoint}{_SEPARATOR}{lock.password}"

    def receive(self) -> Parcel[T]:
        """Waits for the next parcel.

        Raises:
            AbandonedError: none is wanted any more.
            FrameFaultError: it is not the next one as it was sent.
        """
        while not self._guarded.socket.poll(LOOK_MS):
            if self._is_abandoned():
                raise AbandonedError
        head, *data = self._guarded.socket.recv_multipart()
        packed = memoryview(head)[_CHECKSUM_BYTES:]
        if head[:_CHECKSUM_BYTES] != _checksum([packed, *data]):
            raise FrameFaultError(FrameFault.CORRUPTED, "a parcel has a wrong checksum")
        try:
            envelope: _Envelope = _ENVELOPES.decode(packed)
            header = self._headers.decode(envelope.header)
        except CodecError as error:
            raise FrameFaultError(FrameFault.CORRUPTED, str(error)) from error
        if envelope.number != self._num_parcels:
            fault = FrameFault.MISSING if envelope.number > self._num_parcels else FrameFault.REPEATED
            raise FrameFaultError(fault, f"parcel {envelope.number} arrived, expected {self._num_parcels}")
        self._num_parcels += 1
        return Parcel(header, data)

    def close(self) -> None:
        """Frees the port."""
        self._guarded.close()


class ParcelOutbound(Generic[T]):
    """The sending end. One thread at a time may use it.

    Args:
        address: of the receiving end.
        kind: of the headers.
        is_abandoned: asked again and again while the receiver is slow.
    """

    def __init__(self, address: str, kind: type[T], is_abandoned: Callable[[], bool]) -> None:
        endpoint, _, password = address.partition(_SEPARATOR)
        self._headers = Codec(kind)
        self._is_abandoned = is_abandoned
        self._num_parcels = 0
        self._socket: zmq.Socket[Any] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_PARCELS)
        show_password(self._socket, password)
        self._socket.connect(endpoint)

    def send(self, header: T, data: Sequence[memoryview] = ()) -> None:
        """Sends a parcel, or waits until the receiver has taken others.

        Raises:
            AbandonedError: none is wanted any more.
        """
        packed = _ENVELOPES.encode(_Envelope(self._num_parcels, self._headers.encode(header)))
        while not self._socket.poll(LOOK_MS, zmq.POLLOUT):
            if self._is_abandoned():
                raise AbandonedError
        self._num_parcels += 1
        self._socket.send_multipart([_checksum([packed, *data]) + packed, *data])

    def close(self) -> None:
        """Drops what was not sent."""
        self._socket.close(linger=0)


def _checksum(parts: Sequence[bytes | memoryview]) -> bytes:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(_CHECKSUM_BYTES, "big")
