"""Tells a stage that its coordinator is gone, even if the network says nothing, as when its machine loses power.

libzmq's threads exchange heartbeats, so that a coordinator whose Python is busy is not taken for lost.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from gptj_dist.stages.transport.guard import DropCount, GuardedSocket, PasswordLock, show_password

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 2000
"""Time between heartbeats, and after one without an answer until the connection counts as broken."""

PERIOD_MS, MAX_LOST_PERIODS = 250, 6
"""A coordinator whose machine refuses connections is lost after this number of periods: in all less than 5 s."""

MAX_CUT_PERIODS = 60
"""One that cannot be reached is lost after so many, 15 s: a network may come back. Ray gives a node up by then."""

CONNECT_TIMEOUT_MS = 1000
DIAL_TIMEOUT_S = 0.5

_SEPARATOR = "#"  # neither endpoints nor passwords contain it
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class LeashPost:
    """The coordinator's end. It is there as long as the process lives and can be reached.

    Args:
        host: the address to bind; the port is a free one.

    Attributes:
        address: for `watch_post`. It contains a secret: do not log it.
    """

    def __init__(self, host: str) -> None:
        lock = PasswordLock()
        self._guarded = GuardedSocket(zmq.PULL, host, lock)
        self.address = f"{self._guarded.endpoint}{_SEPARATOR}{lock.password}"

    @property
    def dropped(self) -> DropCount:
        """Connections that were refused."""
        return self._guarded.dropped

    def close(self) -> None:
        """Frees the port. Watchers find the post lost."""
        self._guarded.close()


def watch_post(address: str, on_loss: Callable[[], None]) -> None:
    """Starts a thread that calls `on_loss` once the post has been connected to and is lost."""
    threading.Thread(target=_watch, args=(address, on_loss), name="leash", daemon=True).start()


def _watch(address: str, on_loss: Callable[[], None]) -> None:
    endpoint, _, password = address.partition(_SEPARATOR)
    context: zmq.Context[zmq.Socket[Any]] = zmq.Context()
    watcher = context.socket(zmq.PUSH)
    watcher.setsockopt(zmq.LINGER, 0)
    watcher.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    watcher.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    watcher.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS)  # else the system may not try for seconds
    show_password(watcher, password)
    with closing(watcher), closing(watcher.get_monitor_socket(_EVENTS)) as events:
        watcher.connect(endpoint)
        has_connected = is_connected = False
        num_lost_periods = 0
        while not _is_lost(endpoint, num_lost_periods):
            if events.poll(PERIOD_MS):
                event = parse_monitor_message(events.recv_multipart())
                is_connected = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
                has_connected |= is_connected
                num_lost_periods = 0 if is_connected else num_lost_periods
            elif has_connected and not is_connected:
                num_lost_periods += 1
    on_loss()


def _is_lost(endpoint: str, num_lost_periods: int) -> bool:
    """Whether a coordinator is lost that has not been connected to for so long."""
    if num_lost_periods < MAX_LOST_PERIODS:
        return False
    return num_lost_periods >= MAX_CUT_PERIODS or _refuses(endpoint)


def _refuses(endpoint: str) -> bool:
    """Whether the machine of the endpoint can be reached, and nothing listens there any more."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), DIAL_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
