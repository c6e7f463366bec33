"""Goes on with a request whose pipeline is lost: on another one, or on the one that Serve starts in its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

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

Stream = AsyncGenerator[Delta, None]


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
        try:
            async with aclosing(stream):
                async for delta in stream:
                    token_ids += delta.token_ids
                    yield delta
            return
        except PipelineLostError as error:
            record = record.moved(token_ids)
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
