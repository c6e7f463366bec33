"""Keys and values in blocks of tokens, for GPUs."""

from __future__ import annotations

import torch

from gptj_dist.model.attention import Attention
from gptj_dist.model.block_tables import BlockTables, LayerKV
from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.rotary import RotaryTable

SCRATCH_REQUEST = -1
"""A request that is always in the cache, for padding rows of a micro-batch. Its one block is not the scheduler's."""


class BlockCache(BlockTables):
    """Implements `KVCache` with blocks in the model's type on the device.

    The tables are on the host and are sent with each micro-batch.

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
        shape = (2, num_blocks + 1, num_heads, block_size, head_dim)

        def new_layer() -> LayerKV:
            return LayerKV(*torch.empty(shape, dtype=dtype, device=device).unbind())

        super().__init__(num_layers, num_blocks + 1, block_size, max_tokens, new_layer)
        self.device = device
        self.dtype = dtype
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.add(SCRATCH_REQUEST)
        self.extend(SCRATCH_REQUEST, [num_blocks])

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        from gptj_dist.model.paged_attention import attend_in_blocks  # needs Triton, which only a GPU's torch has

        return attend_in_blocks(self, batch, rotary)
