"""Finds a cluster's head in the local network without its address: a question by broadcast, an answer by the head.

Both carry an HMAC by the cluster's key, so the head is silent to strangers, and a stranger cannot answer for it. Nobody
learns the secret; who listens learns that there is a cluster, and where, which its traffic shows anyway.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress

from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.cluster.code import Place

PORT = 6380
DISCOVER_LIMIT_S = 10.0
ASK_PERIOD_S = 1.0
EVERYBODY = "255.255.255.255"

_MAGIC = b"gptj-dist 1 "
_NONCE_BYTES = 16
_MAC_BYTES = 32
_PLACE = struct.Struct("!4sH")
_QUESTION_BYTES = len(_MAGIC) + _NONCE_BYTES + _MAC_BYTES


class Beacon:
    """The head's end: answers questions for the place of its cluster.

    Args:
        key: only its holders are answered.
        interface: the address of the head; questions that arrive elsewhere are answered all the same, as a broadcast
            has no address of ours.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, place: Place, key: bytes, port: int = PORT) -> None:
        self._place, self._key = place, key
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", port))
        threading.Thread(target=self._answer_all, name="beacon", daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _answer_all(self) -> None:
        while True:
            try:
                question, sender = self._socket.recvfrom(1024)
            except OSError:  # it was closed
                return
            if (answer := self.answer(question)) is not None:
                with suppress(OSError):
                    self._socket.sendto(answer, sender)

    def answer(self, question: bytes) -> bytes | None:
        """The answer to a datagram; None to one that does not come from a holder of the key."""
        nonce = question[len(_MAGIC) : len(_MAGIC) + _NONCE_BYTES]
        if len(question) != _QUESTION_BYTES or not hmac.compare_digest(question, _question(self._key, nonce)):
            return None
        return _answer(self._key, nonce, self._place)


def discover(key: bytes, limit_s: float = DISCOVER_LIMIT_S, target: str = EVERYBODY, port: int = PORT) -> Place:
    """Asks the local network where the cluster with this key is.

    Args:
        target: an address to ask, by default every machine.

    Raises:
        ConfigurationError: no head answers in time.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        asking.settimeout(ASK_PERIOD_S)
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            with suppress(OSError):
                asking.sendto(_question(key, nonce), (target, port))
            with suppress(TimeoutError):
                if (place := read_answer(key, nonce, asking.recv(1024))) is not None:
                    return place
    raise ConfigurationError(
        f"no cluster with this code answered within {limit_s:g} s: does `gptj-dist up --discover` run in this network, "
        "and does no firewall block UDP? Otherwise take the longer code, which has the address"
    )


def read_answer(key: bytes, nonce: bytes, answer: bytes) -> Place | None:
    """The place in an answer to the question with this nonce; None if a stranger sent it."""
    if len(answer) != len(_MAGIC) + _PLACE.size + _MAC_BYTES:
        return None
    host, port = _PLACE.unpack(answer[len(_MAGIC) : len(_MAGIC) + _PLACE.size])
    place = Place(str(ipaddress.IPv4Address(host)), port)
    return place if hmac.compare_digest(answer, _answer(key, nonce, place)) else None


def _question(key: bytes, nonce: bytes) -> bytes:
    return _MAGIC + nonce + hmac.digest(key, b"question" + nonce, hashlib.sha256)


def _answer(key: bytes, nonce: bytes, place: Place) -> bytes:
    packed = _PLACE.pack(ipaddress.IPv4Address(place.host).packed, place.port)
    return _MAGIC + packed + hmac.digest(key, b"answer" + nonce + packed, hashlib.sha256)
