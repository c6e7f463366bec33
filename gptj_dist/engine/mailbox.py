"""Where a stream's tokens wait for whoever reads them. Knows no requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class Delta:
    """What a stream has to say: one or more new tokens; `finish_reason` comes with the last."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class Mailbox:
    """Holds the tokens that a stream's reader has not taken yet; a slow reader finds several at once."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._finish_reason: FinishReason | None = None
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> None:
        """Adds new tokens; `finish_reason` comes with the last."""
        self._token_ids += token_ids
        self._finish_reason = finish_reason
        self._filled.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream; tokens that are there are still taken."""
        self._error = error
        self._filled.set()

    async def take(self) -> Delta:
        """Waits for tokens, and takes all there are. Raises what the stream failed with."""
        await self._filled.wait()
        self._filled.clear()
        if self._token_ids:
            delta = Delta(tuple(self._token_ids), self._finish_reason)
            self._token_ids.clear()
            if self._error is not None:
                self._filled.set()
            return delta
        assert self._error is not None, "a mailbox is filled by tokens or by an error"
        raise self._error
