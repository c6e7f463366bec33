"""Keeps a stream's tokens until they are read. Knows no requests."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from gptj_dist.engine.beams import Beam
from gptj_dist.engine.request import FinishReason
from gptj_dist.params import TokenLogprobs


class Delta(NamedTuple):
    """New tokens of a stream.

    Args:
        token_ids: one or more; none if the request generates none.
        finish_reason: comes with the last tokens; None before.
        logprobs: one for each token, if requested.
        prompt_logprobs: one for each token of the prompt from the second on, if requested; come with the first tokens.
        embedding: float32 numbers as bytes, if requested.
        num_cached_tokens: of the prompt, whose KV was there before; come with the first tokens.
        beams: the texts that a beam search has found, in place of tokens.
        num_drafted: tokens that were guessed, and so took no steps of their own.
        weights: see `serving.weights`; come with the first tokens of a server's pipeline.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: bytes | None = None
    num_cached_tokens: int = 0
    beams: tuple[Beam, ...] = ()
    num_drafted: int = 0
    weights: str = ""

    @property
    def num_logprobs(self) -> int:
        """Tokens with their log probabilities."""
        return len(self.logprobs) + len(self.prompt_logprobs) + sum(len(beam.logprobs) for beam in self.beams)


class Mailbox:
    """Holds the tokens that a stream's reader has not taken yet. A slow reader gets several deltas joined into one.

    Attributes:
        num_logprobs: tokens that wait with their log probabilities.
    """

    def __init__(self) -> None:
        self.num_logprobs = 0
        self._delta: Delta | None = None
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Adds new tokens."""
        self._delta = delta if self._delta is None else joined(self._delta, delta)
        self.num_logprobs += delta.num_logprobs
        self._filled.set()

    def cut(self, error: Exception) -> None:
        """Ends the stream with an error in place of the tokens that are here."""
        self._delta, self.num_logprobs = None, 0
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error, after the tokens that are already here."""
        self._error = error
        self._filled.set()

    async def take(self) -> Delta:
        """Waits for tokens, and takes all there are. Raises the error of `fail` when there are none left."""
        await self._filled.wait()
        delta, self._delta, self.num_logprobs = self._delta, None, 0
        if delta is None:
            assert self._error is not None, "a mailbox is filled by tokens or by an error"
            raise self._error
        if self._error is None:
            self._filled.clear()
        return delta


def joined(one: Delta, next_: Delta) -> Delta:
    """Two deltas of a stream that follow each other, as one."""
    return Delta(
        one.token_ids + next_.token_ids,
        next_.finish_reason,
        one.logprobs + next_.logprobs,
        one.prompt_logprobs,
        num_cached_tokens=one.num_cached_tokens,
        num_drafted=one.num_drafted + next_.num_drafted,
        weights=one.weights,
    )
