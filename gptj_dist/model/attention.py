"""The interfaces of attention and of the KV cache. Each kind of cache has its own attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.rotary import RotaryTable


class Attention(Protocol):
    """Attends for all rows of one micro-batch, layer after layer."""

    def __call__(self, layer: int, heads: Tensor) -> None:
        """Rotates queries and keys, stores keys and values, and attends for every row in one layer.

        Args:
            heads: [rows, 3, num_heads, head_dim]: queries, keys and values as the weights made them. The values are
                overwritten with the result.
        """


class KVCache(Protocol):
    """The keys and values of a stage. The scheduler decides which request gets which blocks."""

    def add(self, request_id: int) -> None:
        """Registers a request that has no tokens yet."""

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Appends blocks to those of the request."""

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        """Copies the keys and values of a request's first tokens to a request without tokens, in every layer.

        Both requests have their blocks. Blocks that they share need no copy.
        """

    def release(self, request_id: int) -> None:
        """Removes the request. Its memory may be reused at once."""

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        """Makes the attention of one micro-batch. Computes here what does not depend on the layer."""
