"""Measures links: a small server that each member runs, and what others ask it.

A connection begins with a challenge that only holders of the cluster's key can answer. Then the client sends requests
of one byte and a length of eight: `p` has that many bytes sent back, `u` uploads up to that many, `d` downloads them.
The receiver of a long message measures its rate over the second half, when TCP has found its speed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median

LONG_BYTES = 32 << 20
SHORT_BYTES = 512 << 10
"""Sizes of the message that finds the rate, when a node joins and at later looks: 0.3 s and 4 ms of a Gbit/s."""

LONGEST_S = 1.5
"""A message that takes longer is cut; the rate is that of its part."""

NUM_PINGS = 21
PING_BYTES = 64
TIMEOUT_S = 10.0
MOST_CONNECTIONS = 8

_CHUNK_BYTES = 256 << 10
_NONCE_BYTES = 16
_REQUEST = struct.Struct("!cQ")
_RATE = struct.Struct("!d")
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Measured:
    """Of the way to a node and back.

    Args:
        latency_s: half of the median round trip.
        there_bytes_per_s, back_bytes_per_s: rates.
    """

    latency_s: float
    there_bytes_per_s: float
    back_bytes_per_s: float


class ProbeServer:
    """Answers the measurements of members, on a thread of its own. Listens at one address.

    Args:
        key: only its holders are answered.
    """

    def __init__(self, host: str, key: bytes) -> None:
        self._key = key
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._listener = socket.create_server((host, 0))
        threading.Thread(target=self._accept, name="probes", daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="probe", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError, EOFError):
                _prepare(connection)
                nonce = secrets.token_bytes(_NONCE_BYTES)
                connection.sendall(nonce)
                if hmac.compare_digest(_receive(connection, len(_answer(self._key, nonce))), _answer(self._key, nonce)):
                    while _serve_one(connection):
                        pass
        finally:
            self._room.release()


def measure(host: str, port: int, key: bytes, num_bytes: int, source: str) -> Measured:
    """Measures the way to a member's server.

    Args:
        num_bytes: of the message that finds the rate.
        source: this node's address, from which it is measured.

    Raises:
        OSError: it cannot be reached, does not hold the key, or takes too long.
    """
    with _connected(host, port, key, source) as connection:
        latency_s = median(_ping(connection) for _ in range(NUM_PINGS)) / 2
        return Measured(latency_s, _upload(connection, num_bytes), _download(connection, num_bytes))


@contextmanager
def _connected(host: str, port: int, key: bytes, source: str) -> Iterator[socket.socket]:
    with socket.create_connection((host, port), timeout=TIMEOUT_S, source_address=(source, 0)) as connection:
        try:
            _prepare(connection)
            connection.sendall(_answer(key, _receive(connection, _NONCE_BYTES)))
            yield connection
        except (EOFError, ConnectionResetError):
            raise ConnectionError("the connection was closed: the member has left, or its key is another") from None


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _answer(key: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, b"probe" + nonce, hashlib.sha256)


def _serve_one(connection: socket.socket) -> bool:
    """Serves one request. Returns whether another may follow."""
    kind, length = _REQUEST.unpack(_receive(connection, _REQUEST.size))
    if kind == b"p" and length <= _CHUNK_BYTES:
        connection.sendall(_receive(connection, length))
    elif kind == b"u" and length <= LONG_BYTES:
        connection.sendall(_RATE.pack(_receive_message(connection)))
    elif kind == b"d" and length <= LONG_BYTES:
        _send_message(connection, length)
    else:
        return False
    return True


def _ping(connection: socket.socket) -> float:
    begin_s = time.perf_counter()
    connection.sendall(_REQUEST.pack(b"p", PING_BYTES) + bytes(PING_BYTES))
    _receive(connection, PING_BYTES)
    return time.perf_counter() - begin_s


def _upload(connection: socket.socket, num_bytes: int) -> float:
    connection.sendall(_REQUEST.pack(b"u", num_bytes))
    _send_message(connection, num_bytes)
    rate: float = _RATE.unpack(_receive(connection, _RATE.size))[0]
    return rate


def _download(connection: socket.socket, num_bytes: int) -> float:
    connection.sendall(_REQUEST.pack(b"d", num_bytes))
    return _receive_message(connection)


def _send_message(connection: socket.socket, num_bytes: int) -> None:
    """Sends chunks with their lengths, fewer if they take longer than `LONGEST_S`; a length of 0 ends them."""
    begin_s = time.perf_counter()
    chunk = bytes(min(_CHUNK_BYTES, num_bytes))
    left = num_bytes
    while left > 0 and time.perf_counter() - begin_s < LONGEST_S:
        part = chunk[: min(len(chunk), left)]
        connection.sendall(_LENGTH.pack(len(part)) + part)
        left -= len(part)
    connection.sendall(_LENGTH.pack(0))


def _receive_message(connection: socket.socket) -> float:
    """Receives such chunks. Returns the bytes per second of their second half."""
    arrivals = [(time.perf_counter(), 0)]
    while (length := _LENGTH.unpack(_receive(connection, _LENGTH.size))[0]) > 0:
        if length > _CHUNK_BYTES:
            raise ConnectionError("not a measurement")
        _receive(connection, length)
        arrivals.append((time.perf_counter(), arrivals[-1][1] + length))
    end_s, num_bytes = arrivals[-1]
    half_s, half_bytes = next(arrival for arrival in arrivals if 2 * arrival[1] >= num_bytes)
    if end_s <= half_s:
        return 0.0
    return (num_bytes - half_bytes) / (end_s - half_s)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """Exactly so many bytes. Raises EOFError if the other side closes before."""
    parts, left = [], num_bytes
    while left > 0:
        part = connection.recv(min(left, _CHUNK_BYTES))
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
