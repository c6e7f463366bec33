"""What attention is to a layer, and a cache of keys and values to a stage. Each kind of cache brings its attention."""

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
    """Where a stage keeps keys and values. Who gets how much of it is the scheduler's business."""

    def add(self, request_id: int) -> None:
        """Meets a request that has no tokens yet."""

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Gives the request more blocks, behind those it has."""

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        """Gives a request that has no tokens yet the keys and values of another's first tokens, in every layer.

        Both have their blocks; those that they have in common already hold what they should.
        """

    def release(self, request_id: int) -> None:
        """Forgets the request; its memory may be given to the next one at once."""

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        """An attention for one micro-batch: what does not depend on the layer is worked out here."""
