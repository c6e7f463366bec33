"""Goes on with a request whose pipeline is lost: on another one, or on the one that Serve starts in its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.errors import NotReadyError, PipelineLostError, StageFailedError
from gptj_dist.logs import values

logger = logging.getLogger(__name__)

MAX_MOVES = 4
"""A request moves this often and no more: it may be the cause of the losses."""

MOVE_TIMEOUT_S = 300.0
"""How long a request waits for its next token after a loss. Serve's next pipeline has to load its weights first."""

FIRST_DELAY_S, MAX_DELAY_S = 0.1, 1.0
"""Between attempts to move. Serve's router needs a moment to notice that a pipeline is lost."""

JOIN_S = 0.02
"""Completions of a prompt that move within this time move together."""

Stream = AsyncGenerator[Delta, None]


class Call(Protocol):
    """A call of a pipeline for completions of one prompt."""

    def stream(self, choice: int) -> Stream:
        """One of them."""


class JointMoves:
    """Opens the completions of a prompt that are lost together in one call, so that it computes the prompt once.

    Args:
        call: begins when its first completion is read.
    """

    def __init__(self, call: Callable[[Sequence[RequestRecord]], Call]) -> None:
        self._call = call
        self._records: list[RequestRecord] = []
        self._opening: asyncio.Task[Call] | None = None

    async def reopen(self, record: RequestRecord) -> Stream:
        """What is left of a completion."""
        self._records.append(record)
        choice = len(self._records) - 1
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        call = await asyncio.shield(self._opening)
        async with aclosing(call.stream(choice)) as stream:
            async for delta in stream:
                yield delta

    async def _open(self) -> Call:
        await asyncio.sleep(JOIN_S)
        records, self._records, self._opening = self._records, [], None
        return self._call(records)


async def lasting(
    stream: Stream, record: RequestRecord, reopen: Callable[[RequestRecord], Stream], on_move: Callable[[], None]
) -> Stream:
    """A stream that outlives its pipeline: it pauses, and goes on with the next token.

    Args:
        stream: what the first pipeline generates.
        record: the request as it begins.
        reopen: opens a stream of what is left of a request. May raise what ends the request for good.
        on_move: called after each loss that the stream outlives.

    Raises:
        StageFailedError: pipelines are lost again and again, or none goes on with the request in time.
    """
    while True:
        token_ids: list[int] = []
        weights = ""
        try:
            async with aclosing(stream):
                async for delta in stream:
                    token_ids += delta.token_ids
                    weights = weights or delta.weights
                    yield delta
            return
        except PipelineLostError as error:
            record = record.moved(token_ids, weights)
            _note_loss(record, error)
            on_move()
        stream = _elsewhere(record, reopen)


def _note_loss(record: RequestRecord, error: PipelineLostError) -> None:
    """Raises StageFailedError if the request may not move again."""
    if record.num_moves > MAX_MOVES:
        raise StageFailedError(f"{record.num_moves} pipelines in a row were lost; the last one: {error}") from error
    known = {"request_id": record.log_id, "generation_tokens": len(record.token_ids)}
    logger.warning("pipeline lost, request moves", extra=values(**known, error=str(error)))


async def _elsewhere(record: RequestRecord, reopen: Callable[[RequestRecord], Stream]) -> Stream:
    """What the next pipeline generates."""
    try:
        async with asyncio.timeout(MOVE_TIMEOUT_S):
            stream, delta = await _begin(record, reopen)
    except TimeoutError:
        message = f"the pipeline was lost, and no other one went on with the request within {MOVE_TIMEOUT_S:g} s"
        raise StageFailedError(message) from None
    async with aclosing(stream):
        yield delta
        async for delta in stream:
            yield delta


async def _begin(record: RequestRecord, reopen: Callable[[RequestRecord], Stream]) -> tuple[Stream, Delta]:
    """Returns when a pipeline has gone on with the request. Tries again while none is ready."""
    delay_s = FIRST_DELAY_S
    while True:
        await asyncio.sleep(delay_s)
        stream = reopen(record)
        try:
            return stream, await anext(stream)
        except NotReadyError:
            delay_s = min(2 * delay_s, MAX_DELAY_S)
