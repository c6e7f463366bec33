"""Sends a batch's requests, so many at a time, until each has an answer. Knows neither HTTP nor files.

A request that cannot be answered right now, such as while the server is busy or restarts, is asked again; when that
goes on without any answer, the batch ends with an error, and no line says that the request failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gptj_dist.cli.text.batch_answers import BatchAnswer
from gptj_dist.cli.text.batch_requests import BatchRequest
from gptj_dist.errors import ServerError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class TryAgain:
    """A request found nobody to answer it.

    Args:
        after_s: when to try again, if the server said so.
    """

    reason: str
    after_s: float | None = None


class Answerer(Protocol):
    """Whoever answers requests."""

    async def answer(self, request: BatchRequest) -> BatchAnswer | TryAgain:
        """One attempt.

        Raises:
            GPTJDistError: no request of the batch will be answered.
        """


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a batch puts up with a server that answers nothing.

    Args:
        wait_s: since the last answer to any request.
        clock: seconds.
    """

    wait_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class BatchRun:
    """A batch under way.

    Args:
        take: is given each answer, in the order that they come.
        note: is told why requests are asked again, once a reason.
    """

    def __init__(
        self, answerer: Answerer, take: Callable[[BatchAnswer], None], note: Callable[[str], None], patience: Patience
    ) -> None:
        self._answerer = answerer
        self._take = take
        self._note = note
        self._patience = patience
        self._last_answer_s = patience.clock()
        self._reasons: set[str] = set()

    async def run(self, requests: Iterator[BatchRequest], concurrency: int) -> None:
        """Has all requests answered.

        Raises:
            GPTJDistError: it makes no sense to go on; requests under way were cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._answer_all(requests))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer_all(self, requests: Iterator[BatchRequest]) -> None:
        """Answers what is left of the requests, beside others that do so."""
        for request in requests:
            self._take(await self._answer(request))

    async def _answer(self, request: BatchRequest) -> BatchAnswer:
        first_refusal_s: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            outcome = await self._answerer.answer(request)
            now_s = self._patience.clock()
            if isinstance(outcome, BatchAnswer):
                self._last_answer_s = now_s
                return outcome
            first_refusal_s = now_s if first_refusal_s is None else first_refusal_s
            if now_s - max(first_refusal_s, self._last_answer_s) >= self._patience.wait_s:
                raise ServerError(f"no answer for {self._patience.wait_s:g} s: {outcome.reason}")
            self._tell(outcome.reason)
            await self._patience.sleep(pause_s if outcome.after_s is None else outcome.after_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _tell(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._note(f"{reason}; it is asked again")
