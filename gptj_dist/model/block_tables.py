"""Which blocks each request has, for caches that keep keys and values in blocks of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptj_dist.model.inputs import Span
from gptj_dist.sizes import ceil_div


class BlockTables(ABC):
    """Implements what caches in blocks share of `KVCache`: a table for each request, of its blocks in order.

    A request holds only the blocks that its tokens need. The scheduler decides which request gets which block.

    Args:
        num_blocks, block_size: blocks in all, and tokens in each.
        max_tokens: the most tokens of a request.
    """

    def __init__(self, num_blocks: int, block_size: int, max_tokens: int) -> None:
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._table_width = ceil_div(max_tokens, block_size)
        self._tables: dict[int, Tensor] = {}
        self._num_blocks_of: dict[int, int] = {}

    def add(self, request_id: int) -> None:
        self._tables[request_id] = torch.zeros(self._table_width, dtype=torch.int32)
        self._num_blocks_of[request_id] = 0

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Raises IndexError if there is no such block."""
        numbers = tuple(blocks)
        if not all(0 <= number < self._num_blocks for number in numbers):
            raise IndexError(f"request {request_id} is given blocks {numbers} of a cache of {self._num_blocks}")
        first = self._num_blocks_of[request_id]
        stop = self._num_blocks_of[request_id] = first + len(numbers)
        self._tables[request_id][first:stop] = torch.tensor(numbers, dtype=torch.int32)

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        num_blocks = ceil_div(num_tokens, self.block_size)
        sources, targets = (self._tables[id_][:num_blocks].tolist() for id_ in (source_id, request_id))
        for block_from, block_to in zip(sources, targets, strict=True):
            if block_from != block_to:
                self._copy_block(block_from, block_to)

    def release(self, request_id: int) -> None:
        del self._tables[request_id], self._num_blocks_of[request_id]

    def tables(self, spans: Sequence[Span]) -> Tensor:
        """The block tables of the spans' requests, int32 [spans, most blocks of a request] on the host.

        Raises:
            IndexError: a request has no block for a token, which would be written to another request's block.
        """
        for span in spans:
            if span.stop > self.block_size * self._num_blocks_of[span.request_id]:
                raise IndexError(f"request {span.request_id} has no block for position {span.stop - 1}")
        return torch.stack([self._tables[span.request_id] for span in spans])

    @abstractmethod
    def _copy_block(self, block_from: int, block_to: int) -> None:
        """Copies the keys and values of a block, in every layer."""
