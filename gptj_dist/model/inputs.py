"""What one micro-batch is, in the words of the model: rows of tokens, and which of them belong together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rows that are consecutive tokens of one request.

    Args:
        request_id: whose tokens; the KV cache knows it.
        row: index of the first row in the micro-batch.
        start: position of the first token in its sequence.
        num_tokens: rows and positions covered.
    """

    request_id: int
    row: int
    start: int
    num_tokens: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.num_tokens)

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one plan.

    Args:
        spans: in order, covering all rows.
        positions: int64 [rows].
    """

    spans: tuple[Span, ...]
    positions: Tensor
