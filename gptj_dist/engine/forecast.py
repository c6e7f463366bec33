"""Estimates when the next request can run. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.request import Request


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a pipeline computes, and how requests end.

    Args:
        token_s: from one token of a request to its next.
        prompt_token_s: for each token of a prompt.
        early_share: share of the generated tokens after which a request ended before its full length.
    """

    token_s: float
    prompt_token_s: float
    early_share: float


def room_after_s(
    running: Sequence[Request], waiting: Iterable[Request], pool: BlockPool, max_batch_size: int, pace: Pace
) -> float:
    """Seconds until the first waiting request that has not run yet can run.

    That is when the prompts before it are computed, if there are blocks and a place for it, and otherwise when a
    request has ended. Requests end at their full length, or earlier after any token with the same chance. The first of
    n then ends after (1 - exp(-r D)) / r seconds on average: D is the time until one has its full length,
    r = n * early_share / token_s.
    """
    new = next((request for request in waiting if not request.has_run), None)
    returning = [request for request in waiting if request.has_run]  # they run again before it
    needed = [request for request in (*returning, new) if request is not None]
    first = [*running, *returning]
    prompts_s = [max(0, request.num_expected - 1) * pace.prompt_token_s for request in first]
    num_blocks = sum(pool.blocks_for(request.num_tokens) for request in needed)
    if not first or (len(first) < max_batch_size and num_blocks <= pool.num_free):
        return sum(prompts_s)
    length_s = min(
        (before_s + sum(prompts_s)) / 2 + num_left * pace.token_s  # about half of the later prompts comes in between
        for before_s, num_left in zip(accumulate(prompts_s), map(_num_left, first), strict=True)
    )
    rate = len(first) * pace.early_share / pace.token_s if pace.token_s else 0.0
    return -math.expm1(-rate * length_s) / rate if rate else length_s


def _num_left(request: Request) -> int:
    return max(1, request.params.max_tokens - request.num_output_tokens)
