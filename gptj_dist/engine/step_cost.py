"""Estimates the cost of a step by a line through the (rows, seconds) of past steps; recent ones weigh more."""

from __future__ import annotations

from gptj_dist.chunking import USUAL_OVERHEAD_ROWS, StepCost

MEMORY = 0.99
"""Weight of a step relative to the next one: about the last hundred steps count."""

MAX_OVERHEAD_ROWS = 512.0

_LEAST_SPREAD = 4.0
"""Standard deviation of the numbers of rows below which they say nothing about the slope."""


class StepCostEstimate:
    """Least squares with forgetting, over (rows, seconds) of the slowest stage."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def observe(self, num_rows: int, seconds: float) -> None:
        """Adds one step."""
        self._weight = MEMORY * self._weight + 1
        self._rows = MEMORY * self._rows + num_rows
        self._seconds = MEMORY * self._seconds + seconds
        self._rows_rows = MEMORY * self._rows_rows + num_rows * num_rows
        self._rows_seconds = MEMORY * self._rows_seconds + num_rows * seconds

    @property
    def cost(self) -> StepCost | None:
        """The estimate; None before the first step. Both of its parts are above zero, whatever was measured."""
        if not self._seconds:
            return None
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        overhead_rows = USUAL_OVERHEAD_ROWS
        variance = self._rows_rows / self._weight - rows * rows
        if variance > _LEAST_SPREAD**2:
            row_s = (self._rows_seconds / self._weight - rows * seconds) / variance
            overhead_rows = (seconds - rows * row_s) / row_s if row_s > 0 else MAX_OVERHEAD_ROWS
        overhead_rows = min(max(overhead_rows, 1.0), MAX_OVERHEAD_ROWS)
        row_s = seconds / (rows + overhead_rows)
        return StepCost(overhead_rows * row_s, row_s)
