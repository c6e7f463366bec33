"""Formulas that cut work into micro-batches by the cost of a step. Knows no requests and measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.sizes import ceil_div

MIN_CHUNK_TOKENS = 32
MAX_CHUNK_TOKENS = 512
"""Wider chunks gain no speed on any device and take more memory."""

USUAL_OVERHEAD_ROWS = 12.0
"""Rows whose arithmetic takes a CPU core as long as reading the weights, if no other core uses the memory."""

MAX_STALL_S = 0.25
MAX_STALL_OVERHEADS = 4
"""Limits of a step while other requests wait for their next token: seconds, or multiples of an empty step, whichever
is more. Shorter steps would mostly read weights."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step of the slowest stage: `overhead_s + num_rows * row_s`.

    Args:
        overhead_s: seconds of a step without rows; most of it reads the weights.
        row_s: seconds for each row.
    """

    overhead_s: float
    row_s: float


def best_chunk_tokens(num_tokens: int, num_stages: int, cost: StepCost) -> int:
    """Prompt tokens for each micro-batch, so that the last of `num_tokens` leaves the pipeline soonest.

    n chunks pass S stages in (n + S - 1) steps of overhead + row * tokens / n. That is least for
    n = sqrt((S - 1) * tokens * row / overhead): more chunks waste time on overheads, fewer on empty stages. If
    chunks would exceed the limit, there are more of them.
    """
    wanted = round(math.sqrt((num_stages - 1) * num_tokens * cost.row_s / cost.overhead_s))
    num_chunks = max(wanted, math.ceil(num_tokens / MAX_CHUNK_TOKENS))
    return max(math.ceil(num_tokens / num_chunks), MIN_CHUNK_TOKENS)


def most_chunk_tokens_beside_decodes(cost: StepCost) -> int:
    """Prompt tokens of a micro-batch while other requests wait for their next token."""
    stall_s = max(MAX_STALL_S, MAX_STALL_OVERHEADS * cost.overhead_s)
    return max(MIN_CHUNK_TOKENS, int((stall_s - cost.overhead_s) / cost.row_s))


def num_decode_groups(num_requests: int, num_stages: int, shares_memory: bool) -> int:
    """Micro-batches over which requests with one token to compute are split.

    One for each stage keeps every stage busy. But G stages at once on the memory of one machine read their weights
    G times slower, and a round of S steps takes S (G overhead + row * requests / G): least for
    G = sqrt(requests * row / overhead).
    """
    if not shares_memory:
        return num_stages
    return min(max(1, round(math.sqrt(num_requests / USUAL_OVERHEAD_ROWS))), num_stages)


def decode_share(num_requests: int, num_ready: int, groups: Sequence[int], num_stages: int, shares_memory: bool) -> int:
    """How many of the requests with one token to compute go into the next micro-batch, so that all get equal shares.

    Args:
        num_ready: those whose last token is known.
        groups: how many each micro-batch in flight has, if any.
    """
    num_groups = num_decode_groups(num_requests, num_stages, shares_memory)
    num_groups_free = num_groups - len(groups)
    if not num_ready or num_groups_free <= 0:
        return 0
    size, num_larger = divmod(num_requests, num_groups)
    is_larger = sum(group > size for group in groups) < num_larger
    return min(num_ready, max(1, min(ceil_div(num_ready, num_groups_free), size + is_larger)))
