"""Attention by the compiled library over a paged cache in the model's type. For CPUs."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from gptj_dist.model.block_tables import BlockTables, LayerKV
from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.native.library import NativeBatch
from gptj_dist.model.native.memory import memory_of
from gptj_dist.model.native.operands import address_of
from gptj_dist.model.rotary import RotaryTable
from gptj_dist.sizes import ceil_div

LANES = 16
"""Tokens in a block, and float32 numbers in the widest vector of a CPU."""
TILE_ROWS = 8
"""Rows of a chunk that are computed together."""


class NativeCache(BlockTables):
    """Implements `KVCache` with blocks of `LANES` tokens. The system provides memory when a block is first written.

    Args:
        num_blocks: blocks in all.
        max_tokens: the most tokens of a request.
        dtype: float32 or bfloat16.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_layers: int,
        num_blocks: int,
        max_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        padded_dim = ceil_div(head_dim, LANES) * LANES
        shapes = (num_blocks, num_heads, head_dim, LANES), (num_blocks, num_heads, LANES, padded_dim)

        def new_layer() -> LayerKV:
            return LayerKV(*(memory_of(math.prod(shape) * dtype.itemsize).view(dtype).view(shape) for shape in shapes))

        super().__init__(num_layers, num_blocks, LANES, max_tokens, new_layer)
        self._library = library
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.padded_dim = padded_dim
        self.dtype = dtype

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> NativeAttention:
        return NativeAttention(self._library, self, batch, rotary)


class NativeAttention:
    """Implements `Attention`: calls the library once for each layer.

    In float32 a row has the same bits whatever rows are beside it.
    """

    def __init__(self, library: ctypes.CDLL, cache: NativeCache, batch: MicroBatch, rotary: RotaryTable) -> None:
        self._attend = library.attend_float32 if cache.dtype == torch.float32 else library.attend_bfloat16
        self._cache = cache
        cos, sin = rotary.tables
        spans, positions = batch.span_of_row, batch.positions.to(torch.int32)
        tables = cache.tables(batch.spans)
        tiles = torch.tensor([tile for span in batch.spans for tile in span.tiles(TILE_ROWS)], dtype=torch.int32)
        # Kept alive, because the library reads them by their addresses.
        self._read_by_library = (positions, spans, tables, tiles, cos, sin)
        self._batch = NativeBatch(
            num_rows=len(positions),
            num_tiles=len(tiles),
            num_heads=cache.num_heads,
            head_dim=cache.head_dim,
            padded_dim=cache.padded_dim,
            rotary_dim=2 * cos.shape[1],
            table_stride=tables.shape[1],
            max_tokens=max(span.stop for span in batch.spans),
            positions=positions.data_ptr(),
            spans=spans.data_ptr(),
            tables=tables.data_ptr(),
            tiles=tiles.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )

    def __call__(self, layer: int, heads: Tensor) -> None:
        """Attends in place.

        Raises:
            TypeError: the heads are on a GPU.
            ValueError: the heads have another shape, or gaps within a row; rows may lie apart.
            MemoryError: there is no memory for the library's scratch space.
        """
        cast = heads if heads.dtype == self._cache.dtype else heads.to(self._cache.dtype)
        shape = (self._batch.num_rows, 3, self._batch.num_heads, self._batch.head_dim)
        address = address_of("heads", cast, self._cache.dtype, shape)
        self._batch.row_stride = cast.stride(0)
        kv = self._cache.layer(layer)
        if self._attend(self._batch, address, kv.keys.data_ptr(), kv.values.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for the attention of {len(heads)} rows")
        if cast is not heads:
            heads[:, 2] = cast[:, 2]
