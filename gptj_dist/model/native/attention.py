"""Attention by the compiled library over a paged cache in the model's type. For CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.native.library import NativeBatch
from gptj_dist.model.native.operands import address_of
from gptj_dist.model.rotary import RotaryTable
from gptj_dist.sizes import ceil_div

LANES = 16
"""Tokens in a block, and float32 numbers in the widest vector of a CPU."""
TILE_ROWS = 8
"""Rows of a chunk that are computed together."""


class NativeCache:
    """Blocks of `LANES` tokens and a block table for each request.

    The system provides memory when a block is first written.

    Args:
        num_blocks: blocks in all.
        max_requests: the most at once.
        max_tokens: the most tokens of a request.
        dtype: float32 or bfloat16.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        num_layers: int,
        num_blocks: int,
        max_requests: int,
        max_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._library = library
        self.padded_dim = ceil_div(head_dim, LANES) * LANES
        self.dtype = dtype
        self.keys = torch.empty(num_layers, num_blocks, num_heads, head_dim, LANES, dtype=dtype)
        self.values = torch.empty(num_layers, num_blocks, num_heads, LANES, self.padded_dim, dtype=dtype)
        self.tables = torch.zeros(max_requests, ceil_div(max_tokens, LANES), dtype=torch.int32)
        self._free_slots = list(range(max_requests - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._num_blocks_of: dict[int, int] = {}

    def add(self, request_id: int) -> None:
        """Implements `KVCache`."""
        self._slot_of[request_id] = self._free_slots.pop()
        self._num_blocks_of[request_id] = 0

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Implements `KVCache`.

        Raises:
            IndexError: there is no such block.
        """
        numbers = tuple(blocks)
        if not all(0 <= number < self.keys.shape[1] for number in numbers):
            raise IndexError(f"request {request_id} is given blocks {numbers} of a cache of {self.keys.shape[1]}")
        new = torch.tensor(numbers, dtype=torch.int32)
        first = self._num_blocks_of[request_id]
        self.tables[self._slot_of[request_id], first : first + len(new)] = new
        self._num_blocks_of[request_id] = first + len(new)

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        """Implements `KVCache`."""
        num_blocks = ceil_div(num_tokens, LANES)
        sources, targets = (self.tables[self._slot_of[id_], :num_blocks].tolist() for id_ in (source_id, request_id))
        for block_from, block_to in zip(sources, targets, strict=True):
            if block_from != block_to:
                self.keys[:, block_to] = self.keys[:, block_from]
                self.values[:, block_to] = self.values[:, block_from]

    def release(self, request_id: int) -> None:
        """Implements `KVCache`."""
        self._free_slots.append(self._slot_of.pop(request_id))
        del self._num_blocks_of[request_id]

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> NativeAttention:
        """Implements `KVCache`."""
        return NativeAttention(self._library, self, batch, rotary)

    def slots(self, spans: Sequence[Span]) -> Tensor:
        """Each row's block table: int32 [rows].

        Raises:
            IndexError: a request has no block for a token; the library would write to other requests' blocks.
        """
        for span in spans:
            if span.stop > LANES * self._num_blocks_of[span.request_id]:
                raise IndexError(f"request {span.request_id} has no block for position {span.stop - 1}")
        return torch.tensor(
            [slot for span in spans for slot in (self._slot_of[span.request_id],) * span.num_tokens], dtype=torch.int32
        )


class NativeAttention:
    """An `Attention` that calls the library once for each layer.

    In float32 a row has the same bits whatever rows are beside it.
    """

    def __init__(self, library: ctypes.CDLL, cache: NativeCache, batch: MicroBatch, rotary: RotaryTable) -> None:
        self._attend = library.attend_float32 if cache.dtype == torch.float32 else library.attend_bfloat16
        self._cache = cache
        cos, sin = rotary.tables
        positions, slots = batch.positions.to(torch.int32), cache.slots(batch.spans)
        tiles = torch.tensor(_tiles(batch.spans), dtype=torch.int32)
        # Kept alive, because the library reads them by their addresses.
        self._read_by_library = (positions, slots, tiles, cos, sin)
        self._batch = NativeBatch(
            num_rows=len(positions),
            num_tiles=len(tiles),
            num_heads=cache.keys.shape[2],
            head_dim=cache.keys.shape[3],
            padded_dim=cache.padded_dim,
            rotary_dim=2 * cos.shape[1],
            table_stride=cache.tables.shape[1],
            max_tokens=max(span.stop for span in batch.spans),
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            tables=cache.tables.data_ptr(),
            tiles=tiles.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )

    def __call__(self, layer: int, heads: Tensor) -> None:
        """Implements `Attention`.

        Raises:
            TypeError: the heads are on a GPU.
            ValueError: the heads have another shape, or gaps within a row; rows may lie apart.
            MemoryError: there is no memory for the library's scratch space.
        """
        cast = heads if heads.dtype == self._cache.dtype else heads.to(self._cache.dtype)
        shape = (self._batch.num_rows, 3, self._batch.num_heads, self._batch.head_dim)
        address = address_of("heads", cast, self._cache.dtype, shape)
        self._batch.row_stride = cast.stride(0)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        pointers = address, keys.data_ptr(), values.data_ptr()
        has_failed = self._attend(self._batch, *pointers, torch.get_num_threads())
        if has_failed:
            raise MemoryError(f"no memory for the attention of {len(heads)} rows")
        if cast is not heads:
            heads[:, 2] = cast[:, 2]


def _tiles(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """First row and number of rows of each tile."""
    return [
        (row, min(TILE_ROWS, span.rows.stop - row))
        for span in spans
        for row in range(span.row, span.rows.stop, TILE_ROWS)
    ]
