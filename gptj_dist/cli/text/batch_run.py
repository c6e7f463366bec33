"""Sends a batch's requests, a limited number at a time, until each has an answer. Independent of HTTP and files.

A request that cannot be answered now, such as while the server is busy or restarts, is sent again. If no request is
answered for long, the batch ends with an error, and no request is recorded as failed.
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
    """A request could not be answered now.

    Args:
        after_s: when to try again, if the server said so.
    """

    reason: str
    after_s: float | None = None


class Answerer(Protocol):
    """The interface of what answers a batch's requests."""

    async def answer(self, request: BatchRequest) -> BatchAnswer | TryAgain:
        """One attempt.

        Raises:
            GPTJDistError: no request of the batch will be answered.
        """


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a batch waits for a server that answers nothing.

    Args:
        wait_s: since the last answer to any request.
        clock: seconds.
    """

    wait_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class BatchRun:
    """A running batch.

    Args:
        take: called with each answer, in the order of arrival.
        note: called with the reason why requests are sent again, once for each reason.
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
        """Answers all requests.

        Raises:
            GPTJDistError: the batch cannot continue; running requests were cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._answer_all(requests))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer_all(self, requests: Iterator[BatchRequest]) -> None:
        """Answers the remaining requests, concurrently with other callers."""
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
            self._note_once(outcome.reason)
            await self._patience.sleep(pause_s if outcome.after_s is None else outcome.after_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _note_once(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._note(f"{reason}; it is asked again")
