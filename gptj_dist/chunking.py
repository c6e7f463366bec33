"""How work is cut into micro-batches: from what a step costs, by formulas. Knows neither whose work it is nor who
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_CHUNK_TOKENS = 32
MAX_CHUNK_TOKENS = 512
"""Wider chunks would gain no device anything, and take more memory."""

USUAL_OVERHEAD_ROWS = 12.0
"""Rows whose arithmetic takes a CPU's core as long as reading the weights from a memory that it has to itself."""

MAX_STALL_S = 0.25
MAX_STALL_OVERHEADS = 4
"""While other requests wait for their next token a step takes so many seconds, or so many times what an empty one would
take, whichever is more: shorter steps would mostly read weights."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step of the slowest stage takes: `overhead_s + num_rows * row_s`.

    Args:
        overhead_s: whatever the number of rows: most of it goes into reading the weights.
    """

    overhead_s: float
    row_s: float


def best_chunk_tokens(num_tokens: int, num_stages: int, cost: StepCost) -> int:
    """Prompt tokens to put into each micro-batch, for the last of `num_tokens` to leave the pipeline soonest.

    n chunks pass S stages in (n + S - 1) steps of overhead + row * tokens / n. That is least for
    n = sqrt((S - 1) * tokens * row / overhead): more chunks waste time on overheads, fewer on empty stages. Chunks
    beyond the limit become more of them, equal ones.
    """
    wanted = round(math.sqrt((num_stages - 1) * num_tokens * cost.row_s / cost.overhead_s))
    num_chunks = max(wanted, math.ceil(num_tokens / MAX_CHUNK_TOKENS))
    return max(math.ceil(num_tokens / num_chunks), MIN_CHUNK_TOKENS)


def most_chunk_tokens_beside_decodes(cost: StepCost) -> int:
    """Prompt tokens of a micro-batch that must not keep other requests waiting for long."""
    stall_s = max(MAX_STALL_S, MAX_STALL_OVERHEADS * cost.overhead_s)
    return max(MIN_CHUNK_TOKENS, int((stall_s - cost.overhead_s) / cost.row_s))


def num_decode_groups(num_requests: int, num_stages: int, shares_memory: bool) -> int:
    """Micro-batches to share out requests to that have one token to compute.

    One a stage, so that each stage always has one. But G stages at once on the memory of one machine read their weights
    G times slower, and a round of S steps takes S (G overhead + row * requests / G): least for
    G = sqrt(requests * row / overhead).
    """
    if not shares_memory:
        return num_stages
    return min(max(1, round(math.sqrt(num_requests / USUAL_OVERHEAD_ROWS))), num_stages)
