"""Sockets that only our own processes can send to. libzmq refuses a peer without the key before it reads a message.

A receiving socket has a lock. Its key is part of the socket's address, which Ray calls carry to the sending processes.
`docs/decisions/0018-keys-of-sockets.md` says why there are two kinds of lock.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from gptj_dist.logs import values

logger = logging.getLogger(__name__)

MAX_PART_BYTES = 2**30
"""libzmq cuts off a peer that announces a larger part of a message. Hidden states of 65,536 tokens have this size."""

HANDSHAKE_TIMEOUT_MS = 10_000
"""libzmq cuts off a peer that has not shown a key after this time."""

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_MONITOR_ENDPOINT = "inproc://monitor"
_ZAP_DOMAIN = b"gptj-dist"  # libzmq asks for the credentials of peers only where a domain is set
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


@dataclass(slots=True)
class DropCount:
    """What a receiving socket has dropped since it was opened.

    Attributes:
        num_refused: connections of peers without the key.
        num_malformed: messages from other peers that could not be decoded.
    """

    num_refused: int = 0
    num_malformed: int = 0

    @property
    def total(self) -> int:
        return self.num_refused + self.num_malformed


class PasswordLock:
    """Admits peers that know a random password: ZMTP's PLAIN mechanism, without encryption or cost per message.

    Attributes:
        password: for `show_password`.
    """

    def __init__(self) -> None:
        self.password = secrets.token_urlsafe(32)

    def install(self, socket: zmq.Socket[Any]) -> None:
        """Makes the socket ask its peers for credentials."""
        socket.plain_server = True

    def opens_for(self, credentials: Sequence[bytes]) -> bool:
        """Whether a peer with these credentials may send."""
        return secrets.compare_digest(credentials[-1], self.password.encode())


def show_password(socket: zmq.Socket[Any], password: str) -> None:
    """Sets the password that a sending socket presents to a `PasswordLock`."""
    socket.plain_username = b"gptj-dist"
    socket.plain_password = password.encode()


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """The keys of a client of a `CurveLock`.

    Args:
        server: the lock's public key.
        client: the only secret key that the lock accepts from a client.
    """

    server: bytes
    client: bytes

    def __repr__(self) -> str:
        return "CurveKeys(...)"  # addresses are logged, secrets are not


class CurveLock:
    """Admits peers with one given client key, and encrypts: ZMTP's CURVE mechanism.

    Attributes:
        keys: for `show_keys`.
    """

    def __init__(self) -> None:
        server_public, self._server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        self._client_public = z85.decode(client_public)
        self.keys = CurveKeys(server_public, client_secret)

    def install(self, socket: zmq.Socket[Any]) -> None:
        """Makes the socket ask its peers for credentials."""
        socket.curve_server = True
        socket.curve_secretkey = self._server_secret

    def opens_for(self, credentials: Sequence[bytes]) -> bool:
        """Whether a peer with these credentials may send."""
        return credentials[-1] == self._client_public


def show_keys(socket: zmq.Socket[Any], keys: CurveKeys) -> None:
    """Sets the keys that a sending socket presents to a `CurveLock`."""
    socket.curve_serverkey = keys.server
    socket.curve_publickey = zmq.curve_public(keys.client)
    socket.curve_secretkey = keys.client


class GuardedSocket:
    """A bound socket with a lock, and a thread that answers libzmq's requests to authenticate peers (RFC 27, ZAP).

    Args:
        kind: such as `zmq.PULL`.
        host: the address to bind; the port is a free one.
        high_water: messages that may wait to be received, after which senders wait; None for libzmq's own limit.

    Attributes:
        endpoint: the address to connect to.
        dropped: what the socket has dropped. The thread counts refused connections, the reader malformed messages.
    """

    def __init__(self, kind: int, host: str, lock: PasswordLock | CurveLock, high_water: int | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # libzmq asks one handler a context
        self._lock = lock
        self._unproven: set[int] = set()
        self._num_proofs = 0
        self.dropped = DropCount()
        self.socket = self._context.socket(kind)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        self.socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without the thread's answer every peer is refused
        if high_water is not None:
            self.socket.setsockopt(zmq.RCVHWM, high_water)
        lock.install(self.socket)
        self._start_thread()
        self.endpoint = bind_free_port(self.socket, host)

    def close(self) -> None:
        """Frees the port; messages that were not received are lost."""
        self.socket.close(linger=0)
        self._context.term()  # ends the thread, too

    def _start_thread(self) -> None:
        questions = self._context.socket(zmq.REP)
        questions.bind(_ZAP_ENDPOINT)
        self.socket.monitor(_MONITOR_ENDPOINT, _EVENTS)
        events = self._context.socket(zmq.PAIR)
        events.connect(_MONITOR_ENDPOINT)
        threading.Thread(target=self._serve, args=(questions, events), name="gate", daemon=True).start()

    def _serve(self, questions: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(questions, zmq.POLLIN)
        poller.register(events, zmq.POLLIN)
        with suppress(zmq.ContextTerminated), closing(questions), closing(events):
            while True:
                for socket, _ in poller.poll():
                    if socket is questions:
                        questions.send_multipart(self._answer(*questions.recv_multipart()))
                    else:
                        event = parse_monitor_message(events.recv_multipart())
                        self._note(event["event"], event["value"])

    def _answer(self, version: bytes, question_id: bytes, *question: bytes) -> list[bytes]:
        """The reply to a question: domain, address, identity and mechanism, then the peer's credentials."""
        _, _, _, _, *credentials = question
        try:
            opens = self._lock.opens_for(credentials)
        except Exception:  # a refusal, and not the end of the thread: no other peer could connect after that
            logger.exception("credentials could not be checked", extra=values(port=self.endpoint))
            opens = False
        return [version, question_id, b"200" if opens else b"400", b"", b"", b""]

    def _note(self, event: int, connection: int) -> None:
        """Counts a connection as refused if it ends before its handshake has succeeded.

        Args:
            connection: its file descriptor. libzmq does not say which handshake has succeeded. While several are
                under way, the connection that ends counts as the refused one.
        """
        if event == zmq.EVENT_ACCEPTED:
            self._unproven.add(connection)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_proofs += 1
        elif connection in self._unproven:
            self._unproven.remove(connection)
            if self._num_proofs <= len(self._unproven):
                self._count_refused()
        if self._num_proofs >= len(self._unproven):
            self._unproven.clear()
            self._num_proofs = 0

    def _count_refused(self) -> None:
        self.dropped.num_refused += 1
        if self.dropped.num_refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...: a flood must not fill the disk
            known = values(port=self.endpoint, num_refused=self.dropped.num_refused)
            logger.warning("connection without the key refused", extra=known)


def bind_free_port(socket: zmq.Socket[Any], host: str) -> str:
    """Binds a free port of the host; returns the address to connect to."""
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
        host = f"[{host}]"
    socket.bind(f"tcp://{host}:0")
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
