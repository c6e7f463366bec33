"""The model's view of a micro-batch: rows of tokens, and which of them belong to the same request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """A run of rows that are consecutive tokens of one request.

    Args:
        request_id: the request, as registered in the KV cache.
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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies the tensor to the device. The host does not wait for a copy to a GPU, which reads from pinned memory."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
