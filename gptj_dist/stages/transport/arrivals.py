"""Waits on an event loop for the messages of a ZeroMQ socket. `zmq.asyncio` does the same in twice the CPU time."""

from __future__ import annotations

import asyncio

import zmq


class Arrivals:
    """The messages of a socket, for one reader on the running event loop.

    libzmq's file descriptor becomes readable when something has happened to the socket, and stays so until a call finds
    that no message is left.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._file: int = socket.FD
        self._is_watched = False
        self._waiting: asyncio.Future[None] | None = None

    async def next(self) -> list[bytes]:
        """The parts of the next message."""
        while True:
            try:
                return self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await self._wait()

    def note_sent(self) -> None:
        """Call after each message that was sent on this socket: sending can take away the sign of one that arrived."""
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._wake()

    def stop(self) -> None:
        """Waits no more. Call it before the socket is closed. A second call does nothing."""
        if self._is_watched:
            self._loop.remove_reader(self._file)
            self._is_watched = False
        if self._waiting is not None:
            self._waiting.cancel()

    async def _wait(self) -> None:
        if not self._is_watched:
            self._loop.add_reader(self._file, self._note_event)
            self._is_watched = True
        self._waiting = self._loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _note_event(self) -> None:
        if self._waiting is None:  # the reader does something else: it would be called again and again
            self._loop.remove_reader(self._file)
            self._is_watched = False
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
