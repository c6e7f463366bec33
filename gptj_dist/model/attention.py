"""Protocols of attention and of the cache of keys and values. Each kind of cache has its own attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.rotary import RotaryTable


class Attention(Protocol):
    """Computes attention for all rows of one micro-batch, layer after layer."""

    def __call__(self, layer: int, heads: Tensor) -> None:
        """Rotates queries and keys, stores keys and values, and attends for every row in one layer.

        Args:
            heads: [rows, 3, num_heads, head_dim]: queries, keys and values, not rotated yet. The result overwrites the
                values.
        """


class KVCache(Protocol):
    """A stage's keys and values. The scheduler decides which request gets which blocks."""

    def add(self, request_id: int) -> None:
        """Adds a request, which has no tokens yet."""

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Appends blocks to the request's."""

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        """Copies the keys and values of another request's first tokens, in every layer.

        Args:
            source_id: the other request.
            request_id: the request that gets them; it has no tokens yet, but has its blocks. Blocks that both requests
                hold are not copied.
            num_tokens: number of tokens, from position 0 on.
        """

    def release(self, request_id: int) -> None:
        """Frees the request's memory for other requests at once."""

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        """The attention of one micro-batch. Everything that does not depend on the layer is computed here."""
