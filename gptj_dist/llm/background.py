"""An event loop on a thread, which other threads give coroutines to. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from gptj_dist.errors import NotReadyError

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines on a separate thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._is_open = True
        self.thread = threading.Thread(target=_run_loop, args=[self._loop], name=name, daemon=True)
        self.thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins to run a coroutine.

        Raises:
            NotReadyError: the loop has ended, or runs in the process that this one was forked from.
        """
        if os.getpid() != self._pid:  # without the lock, which another thread may have held while the process forked
            coroutine.close()
            raise NotReadyError(
                f"this LLM works only in process {self._pid}, not in a fork of it: make one in each process"
            )
        with self._lock:
            if self._is_open:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise NotReadyError("the LLM has been closed")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and returns its result. An interrupt cancels it.

        Raises:
            NotReadyError: as `submit`; and whatever the coroutine raises.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self, last: Callable[[], Awaitable[None]]) -> None:
        """Ends the loop and its thread; the tasks that `last` leaves are waited for. Does nothing in a fork.

        Args:
            last: called on the loop's thread, and awaited.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            asyncio.run_coroutine_threadsafe(self._end(last), self._loop)
        if threading.current_thread() is not self.thread:  # garbage may be collected on any thread
            self.thread.join()

    async def _end(self, last: Callable[[], Awaitable[None]]) -> None:
        try:
            await last()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)
        finally:
            self._loop.stop()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
