"""Chooses how many prompt tokens go into a micro-batch, from the measured times of steps. Knows no requests."""

from __future__ import annotations

from gptj_dist.chunking import (
    USUAL_OVERHEAD_ROWS,
    StepCost,
    best_chunk_tokens,
    most_chunk_tokens_beside_decodes,
)
from gptj_dist.engine.step_cost import StepCostEstimate

UNKNOWN_COST = StepCost(USUAL_OVERHEAD_ROWS, 1.0)
"""The cost before the first step is measured; only the ratio of its parts matters."""


class ChunkSizes:
    """Keeps the chunk size of a backlog of prompts until it is done.

    Args:
        most_tokens: the most prompt tokens in a micro-batch; None chooses.
    """

    def __init__(self, num_stages: int, most_tokens: int | None) -> None:
        self._num_stages = num_stages
        self._most_tokens = most_tokens
        self._chunk_tokens = 0
        self._step_cost = StepCostEstimate()

    @property
    def cost(self) -> StepCost | None:
        """What a step costs; None before the first one is measured."""
        return self._step_cost.cost

    def observe(self, num_rows: int, seconds: float) -> None:
        """Adds the time of a step."""
        self._step_cost.observe(num_rows, seconds)

    def forget_backlog(self) -> None:
        """Call when requests are gone."""
        self._chunk_tokens = 0

    def room(self, num_tokens: int, has_decodes: bool) -> int:
        """The most prompt tokens for the next micro-batch.

        Args:
            num_tokens: prompt tokens that are to be computed.
        """
        if self._most_tokens is not None:
            return self._most_tokens
        if not num_tokens:
            self._chunk_tokens = 0
            return 0
        cost = self._step_cost.cost
        best = best_chunk_tokens(num_tokens, self._num_stages, cost or UNKNOWN_COST)
        self._chunk_tokens = max(self._chunk_tokens, best)
        if has_decodes and cost is not None:
            return min(self._chunk_tokens, most_chunk_tokens_beside_decodes(cost))
        return self._chunk_tokens
