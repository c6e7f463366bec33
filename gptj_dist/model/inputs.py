"""A micro-batch as the model sees it: rows of tokens, and the request of each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rows that are consecutive tokens of one request.

    Args:
        request_id: the request, as the KV cache knows it.
        row: index of the first row in the micro-batch.
        start: position of the first token in its sequence.
        num_tokens: number of rows, and of positions.
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

    def last(self, num_tokens: int) -> Span:
        """Its last rows."""
        num_before = self.num_tokens - num_tokens
        return Span(self.request_id, self.row + num_before, self.start + num_before, num_tokens)

    def tiles(self, most_rows: int) -> list[tuple[int, int]]:
        """First row and number of rows of each piece, of at most `most_rows` rows."""
        stop = self.row + self.num_tokens
        return [(first, min(most_rows, stop - first)) for first in range(self.row, stop, most_rows)]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The rows of one plan.

    Args:
        spans: in order, covering all rows.
        positions: int64 [rows].
    """

    spans: tuple[Span, ...]
    positions: Tensor

    def row_by_row(self) -> MicroBatch:
        """The same with a span for each row. Rows see those before them, as keys and values are stored first."""
        spans = [
            Span(span.request_id, span.row + offset, span.start + offset, 1)
            for span in self.spans
            for offset in range(span.num_tokens)
        ]
        return MicroBatch(tuple(spans), self.positions)

    @property
    def span_of_row(self) -> Tensor:
        """Index of each row's span: int32 [rows]."""
        indices = [index for index, span in enumerate(self.spans) for _ in range(span.num_tokens)]
        return torch.tensor(indices, dtype=torch.int32)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The host does not wait for a copy to a GPU, which reads from pinned memory."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
