"""Keys and values in blocks of tokens, and for each request a table of its blocks. For GPUs, which give out memory when
it is asked for; so nothing is reserved for what a request may become. Who gets which block is the scheduler's business.
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
"""A request that is always there, for rows that fill up a micro-batch: its only block belongs to nobody."""


class BlockCache:
    """Blocks in the model's type, and tables on the host, to be sent with each micro-batch.

    Args:
        num_blocks, block_size: blocks in all, and tokens in each. One more block is held for `SCRATCH_REQUEST`.
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
        """Meets a request that has no tokens yet."""
        self._tables[request_id] = torch.zeros(self._table_width, dtype=torch.int32)
        self._num_blocks_of[request_id] = 0

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Gives the request more blocks, behind those it has."""
        new = torch.tensor(tuple(blocks), dtype=torch.int32)
        num_blocks = self._num_blocks_of[request_id]
        self._tables[request_id][num_blocks : num_blocks + len(new)] = new
        self._num_blocks_of[request_id] = num_blocks + len(new)

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        """As `KVCache` has it."""
        num_blocks = ceil_div(num_tokens, self.block_size)
        theirs, ours = self._tables[source_id][:num_blocks], self._tables[request_id][:num_blocks]
        for block_from, block_to in zip(theirs.tolist(), ours.tolist(), strict=True):
            if block_from != block_to:
                self._memory[:, :, block_to] = self._memory[:, :, block_from]

    def release(self, request_id: int) -> None:
        """Forgets the request; its blocks may be given to the next one at once."""
        del self._tables[request_id], self._num_blocks_of[request_id]

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        """As `KVCache` has it."""
        from gptj_dist.model.paged_attention import attend_in_blocks  # Triton comes with torch for GPUs alone

        return attend_in_blocks(self, batch, rotary)

    def tables(self, request_ids: Sequence[int]) -> Tensor:
        """The requests' blocks, int32 [requests, most blocks of one] on the host; zeros behind those there are."""
        return torch.stack([self._tables[request_id] for request_id in request_ids])

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [blocks, num_heads, block_size, head_dim] each."""
        return self._layers[index]
