"""Attacks on a ZeroMQ port of ours without its key. Each makes at least one connection that is counted as refused."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import zmq

NUM_HALF_OPEN = 200


@contextmanager
def stranger(attack: str, endpoint: str, forged: Sequence[bytes], server_key: bytes | None = None) -> Iterator[None]:
    """Attacks the endpoint until the context ends.

    Args:
        forged: the parts of a well-formed message.
        server_key: the port's public key, for an attacker who has learnt it.
    """
    if (name := attack.removesuffix(" to a feed")) in BYTES or name == "half-open connections":
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        connections = [
            socket.create_connection((host, int(port))) for _ in range(1 if name in BYTES else NUM_HALF_OPEN)
        ]
        connections[0].sendall(BYTES.get(name, b""))
        for connection in connections:
            connection.close()
        yield
        return
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = context.socket(zmq.DEALER if attack.endswith("to a feed") else zmq.PUSH)
    PEERS[name](peer, server_key)
    peer.connect(endpoint)
    for _ in range(20):
        peer.send_multipart(forged)
    yield
    peer.close(linger=0)
    context.term()


def _null(peer: zmq.Socket[bytes], _: bytes | None) -> None:
    """ZMTP without any credentials."""


def _wrong_password(peer: zmq.Socket[bytes], _: bytes | None) -> None:
    peer.plain_username, peer.plain_password = b"gptj-dist", b"guess"


def _own_keys(peer: zmq.Socket[bytes], server_key: bytes | None) -> None:
    peer.curve_publickey, peer.curve_secretkey = zmq.curve_keypair()
    peer.curve_serverkey = server_key or zmq.curve_keypair()[0]


BYTES = {
    "random bytes": random.Random(0).randbytes(5000),
    "random bytes after a ZMTP signature": b"\xff" + random.Random(1).randbytes(5000),
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.Random(2).randbytes(508),
    "a part of 2^62 bytes": b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48) + b"\x02" + (2**62).to_bytes(8, "big"),
    "zeros": bytes(5000),
}

PEERS: dict[str, Callable[[zmq.Socket[bytes], bytes | None], None]] = {
    "forged messages from a NULL peer": _null,
    "forged messages from a peer with a wrong password": _wrong_password,
    "forged messages from a peer with keys of its own": _own_keys,
}

ATTACKS = [*BYTES, "half-open connections", *PEERS]


def zeromq_endpoints(pid: int) -> list[str]:
    """The addresses at which a local process listens and sends ZeroMQ's greeting."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[9] in sockets]
    return [endpoint for endpoint in map(_endpoint, listening) if _greets(endpoint)]


def _endpoint(address: str) -> str:
    """The endpoint of an IPv4 address in /proc/net/tcp: hexadecimal, the host little-endian."""
    host, port = address.split(":")
    return f"tcp://{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}"


def _greets(endpoint: str) -> bool:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        connection.settimeout(0.5)
        with suppress(OSError):
            return connection.recv(1) == b"\xff"
    return False
