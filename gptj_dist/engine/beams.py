"""Selects the beams of a beam search. Pure: knows no requests, no KV cache and no model.

The rules are those of transformers' `generate(num_beams=...)`, in float32 like there. A tie goes to the earlier beam,
and within a beam to the likelier token, and then to the lower id.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from gptj_dist.params import Continuation, TokenLogprobs


class Beam(NamedTuple):
    """A text that is being continued, or that has ended.

    Args:
        token_ids: without the prompt.
        score: the sum of the tokens' log probabilities; of a text that has ended, divided by its length to the power of
            `length_penalty`. Minus infinity if the beam has no continuation.
        parent: index of the beam that it continues, among those of the step before.
        has_stopped: whether a token ended it, before or at the largest length.
        logprobs: of each token, if they are requested.
    """

    token_ids: tuple[int, ...]
    score: float
    parent: int = 0
    has_stopped: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """The state of a search, and its rules. A step makes a new state.

    Args:
        width: number of beams.
        max_tokens: the largest length of a text.
        length_penalty: more than 0 favours long texts, less than 0 short ones.
        early_stopping: True ends the search when there are `width` texts; False when the best beam, at its present
            length, is worse than they are; `never` when no beam can become better, as far as its length tells.
        ending_ids: tokens that end a text.
        running: `width` beams, the best first; one before the first step; none when the search is over.
        ended: at most `width` texts, the best first.
    """

    width: int
    max_tokens: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    ending_ids: Collection[int]
    running: tuple[Beam, ...] = (Beam((), 0.0),)
    ended: tuple[Beam, ...] = field(default=())

    def step(self, continuations: Sequence[Sequence[Continuation]]) -> BeamSearch:
        """The search with one more token in each beam.

        Args:
            continuations: of each running beam, the likeliest first: the `width` likeliest of all, and the `width`
                likeliest of those that end no text. Those with a probability of 0 are left out.
        """
        candidates = [
            (_float32(beam.score + continuation.logprob), parent, continuation)
            for parent, (beam, several) in enumerate(zip(self.running, continuations, strict=True))
            for continuation in several
            if beam.score > -math.inf
        ]
        candidates.sort(key=lambda candidate: -candidate[0])  # stable
        length = len(self.running[0].token_ids) + 1
        is_last = length == self.max_tokens
        new = [
            self._continued(score / self._norm(length), parent, continuation)
            for score, parent, continuation in candidates[: self.width]
            if is_last or continuation.token_id in self.ending_ids
        ]
        ended = tuple(sorted([*self.ended, *new], key=lambda beam: -beam.score)[: self.width])
        running: tuple[Beam, ...] = ()
        if not is_last:
            going_on = (one for one in candidates if one[2].token_id not in self.ending_ids)
            running = tuple(self._continued(*one) for one in islice(going_on, self.width))
        if not running or self._is_over(running[0].score, ended, length):
            running = ()
        elif len(running) < self.width:  # too few tokens are allowed
            running += (running[0]._replace(score=-math.inf),) * (self.width - len(running))
        return BeamSearch(
            self.width, self.max_tokens, self.length_penalty, self.early_stopping, self.ending_ids, running, ended
        )

    def _continued(self, score: float, parent: int, continuation: Continuation) -> Beam:
        token_id, _, shown = continuation
        before = self.running[parent]
        return Beam(
            (*before.token_ids, token_id),
            _float32(score),
            parent,
            token_id in self.ending_ids,
            before.logprobs if shown is None else (*before.logprobs, shown),
        )

    def _is_over(self, best_score: float, ended: Sequence[Beam], length: int) -> bool:
        """Whether no running beam is expected to displace a text that has ended."""
        if len(ended) < self.width:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens
        return _float32(best_score / self._norm(length)) <= ended[-1].score

    def _norm(self, length: int) -> float:
        return _float32(length**self.length_penalty)


def _float32(number: float) -> float:
    """The nearest float32. Sums and quotients of two float32 are rounded as if they had been computed in float32."""
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded
