"""Runs functions off the event loop, in threads that do not keep the process alive when they hang. Stdlib only."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
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
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()

    async def run(self, function: Callable[[], T]) -> T:
        """Returns or raises what the function does. A call that is cancelled before it has begun does not begin."""
        loop = asyncio.get_running_loop()
        call = _Call(function, loop, loop.create_future())
        if not self._idle.acquire(blocking=False) and self._num_threads < self._max_threads:
            self._add_thread()
        self._calls.put(call)
        result: T = await call.future
        return result

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
            self._calls.get().carry_out()
            self._idle.release()


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def carry_out(self) -> None:
        if self.future.cancelled():
            return
        result, error = None, None
        try:
            result = self.function()
        except BaseException as raised:  # the caller gets it, whatever it is
            error = raised
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)
