"""Keys and values in blocks of tokens, with a table of blocks for each request. For GPUs.

A request holds only the blocks that its tokens need. The scheduler decides which request gets which block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptj_dist.model.attention import Attention
from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.rotary import RotaryTable
from gptj_dist.sizes import ceil_div

SCRATCH_REQUEST = -1
"""A request that is always in the cache, for padding rows of a micro-batch. Its one block is not the scheduler's."""


class BlockCache:
    """Blocks in the model's type on the device. The tables are on the host and are sent with each micro-batch.

    Args:
        num_blocks, block_size: blocks in all, and tokens in each. `SCRATCH_REQUEST` has one more block.
        max_tokens: the most tokens of a request.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_blocks + 1, num_heads, block_size, head_dim)
        self._memory = torch.empty(shape, dtype=dtype, device=device)
        self._layers = [(layer[0], layer[1]) for layer in self._memory.unbind()]
        self._table_width = ceil_div(max_tokens, block_size)
        self._tables: dict[int, Tensor] = {}
        self._num_blocks_of: dict[int, int] = {}
        self.device = device
        self.dtype = dtype
        self.block_size = block_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.add(SCRATCH_REQUEST)
        self.extend(SCRATCH_REQUEST, [num_blocks])

    def add(self, request_id: int) -> None:
        """Implements `KVCache`."""
        self._tables[request_id] = torch.zeros(self._table_width, dtype=torch.int32)
        self._num_blocks_of[request_id] = 0

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Implements `KVCache`."""
        new = torch.tensor(tuple(blocks), dtype=torch.int32)
        num_blocks = self._num_blocks_of[request_id]
        self._tables[request_id][num_blocks : num_blocks + len(new)] = new
        self._num_blocks_of[request_id] = num_blocks + len(new)

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        """Implements `KVCache`."""
        num_blocks = ceil_div(num_tokens, self.block_size)
        sources, targets = self._tables[source_id][:num_blocks], self._tables[request_id][:num_blocks]
        for block_from, block_to in zip(sources.tolist(), targets.tolist(), strict=True):
            if block_from != block_to:
                self._memory[:, :, block_to] = self._memory[:, :, block_from]

    def release(self, request_id: int) -> None:
        """Implements `KVCache`."""
        del self._tables[request_id], self._num_blocks_of[request_id]

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        """Implements `KVCache`."""
        from gptj_dist.model.paged_attention import attend_in_blocks  # needs Triton, which only a GPU's torch has

        return attend_in_blocks(self, batch, rotary)

    def tables(self, request_ids: Sequence[int]) -> Tensor:
        """The requests' block tables, int32 [requests, most blocks of a request] on the host, padded with zeros."""
        return torch.stack([self._tables[request_id] for request_id in request_ids])

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [blocks, num_heads, block_size, head_dim] each."""
        return self._layers[index]
