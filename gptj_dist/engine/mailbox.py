"""Where a stream's tokens wait for whoever reads them. Knows no requests."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from gptj_dist.engine.request import FinishReason
from gptj_dist.params import TokenLogprobs


class Delta(NamedTuple):
    """What a stream has to say: new tokens; `finish_reason` comes with the last.

    Args:
        token_ids: one or more; none if the request was to generate none.
        logprobs: one for each token, if they are asked for.
        prompt_logprobs: of the prompt's tokens from the second on, with the first tokens, if they are asked for.
        embedding: float32 numbers, byte by byte, if it is asked for.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: bytes | None = None


class Mailbox:
    """Holds what a stream's reader has not taken yet; a slow reader finds several deltas as one."""

    def __init__(self) -> None:
        self._delta: Delta | None = None
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Adds new tokens."""
        self._delta = delta if self._delta is None else _joined(self._delta, delta)
        self._filled.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream; tokens that are there are still taken."""
        self._error = error
        self._filled.set()

    async def take(self) -> Delta:
        """Waits for tokens, and takes all there are. Raises what the stream failed with."""
        await self._filled.wait()
        delta, self._delta = self._delta, None
        if delta is None:
            assert self._error is not None, "a mailbox is filled by tokens or by an error"
            raise self._error
        if self._error is None:
            self._filled.clear()
        return delta


def _joined(one: Delta, next_: Delta) -> Delta:
    return Delta(
        one.token_ids + next_.token_ids, next_.finish_reason, one.logprobs + next_.logprobs, one.prompt_logprobs
    )
