"""Runs functions off the event loop, in threads that do not keep the process alive when they hang. Stdlib only."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """A pool of daemon threads; `concurrent.futures` waits for its own when the interpreter exits.

    Args:
        max_threads: more calls wait for one of them.
        name: of the threads.
    """

    def __init__(self, max_threads: int, name: str) -> None:
        self._max_threads = max_threads
        self._name = name
        self._num_threads = 0
        self._idle = threading.Semaphore(0)
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()

    async def run(self, function: Callable[[], T]) -> T:
        """Returns or raises what the function does. A call that is cancelled before it has begun does not begin."""
        future: Future[T] = Future()
        if not self._idle.acquire(blocking=False) and self._num_threads < self._max_threads:
            self._add_thread()
        self._calls.put((function, future))
        try:
            return await asyncio.wrap_future(future)
        finally:
            del future  # with its error, the traceback and this frame it would be a circle

    def _add_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:  # the system gives none now: the call waits for one of those there are
            if not self._num_threads:
                raise
        else:
            self._num_threads += 1

    def _work(self) -> None:
        while True:
            _carry_out(*self._calls.get())
            self._idle.release()


def _carry_out(function: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # the caller gets it, whatever it is
        future.set_exception(error)
        del future  # as in `Threads.run`
