"""Attention over a cache in blocks, by Triton kernels. For GPUs; on any device through Triton's interpreter.

One launch computes the rows that are the only ones of their request. Another computes the rows of chunks, in tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
from torch import Tensor

from gptj_dist.model import kernels
from gptj_dist.model.inputs import MicroBatch, Span, to_device
from gptj_dist.model.rotary import RotaryTable
from gptj_dist.sizes import ceil_div

MAX_SPLITS = 32
PROGRAMS_PER_MULTIPROCESSOR = 2
"""The fewest programs for single rows; contexts are split to reach this number."""


class Blocks(Protocol):
    """The part of `BlockCache` that attention reads."""

    device: torch.device
    dtype: torch.dtype
    block_size: int
    num_heads: int
    head_dim: int

    def tables(self, spans: Sequence[Span]) -> Tensor:
        """The block tables of the spans' requests, int32 [spans, blocks]."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [blocks, num_heads, block_size, head_dim] each."""


@dataclass(frozen=True, slots=True)
class Grain:
    """The sizes of attention's units of work on a device.

    Args:
        wanted_programs: the fewest programs for single rows.
        lone_tile_keys: keys that `attend_row` reads at a time.
        tile_rows, tile_keys: rows of a tile of a chunk, and keys that `attend_tile` reads at a time.
        tile_warps, tile_stages: of a program of `attend_tile`.
    """

    wanted_programs: int
    lone_tile_keys: int
    tile_rows: int
    tile_keys: int
    tile_warps: int
    tile_stages: int

    @classmethod
    def of(cls, cache: Blocks) -> Grain:
        """The sizes for the cache's device and type."""
        if cache.device.type != "cuda":
            return cls(1, 16, 64, 32, 1, 1)
        properties = torch.cuda.get_device_properties(cache.device)
        return cls.of_gpu(properties.multi_processor_count, properties.major, cache.dtype, cache.head_dim)

    @classmethod
    def of_gpu(cls, num_multiprocessors: int, major: int, dtype: torch.dtype, head_dim: int) -> Grain:
        """The sizes for an NVIDIA GPU of compute capability `major`.x.

        By the registers and shared memory that the compiled kernels take at 256 dimensions: 16 keys of a single row
        leave room for six programs of 80 registers a thread on a multiprocessor. Large tiles take 70 KB (96 KB on
        Hopper) and no register spills in 16 bit; small ones 33 KB. Triton multiplies by tensor cores from compute
        capability 8.0 on, and float32 without.
        """
        programs = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
        if major >= 8 and dtype != torch.float32 and head_dim <= 256:
            return cls(programs, 16, 64, 32, 8, 2)
        return cls(programs, 16, 16, 16, 4, 1)

    def num_splits(self, num_programs: int) -> int:
        """Number of shares, a power of two, that each row's context is split into.

        Args:
            num_programs: number of rows times heads.
        """
        if num_programs == 0:
            return 1
        return min(int(triton.next_power_of_2(ceil_div(self.wanted_programs, num_programs))), MAX_SPLITS)


class RowIndex:
    """The position and request of each row of a micro-batch, as the kernels read them: int32, in one tensor.

    Its parts are `positions` [rows], `spans` [rows], `tables` [spans, blocks], `lone_rows` (those of spans of one row)
    and `tiles` [tiles, 2] (the first row of each piece of the other spans, and how many).

    Args:
        flat: all parts, in this order, each aligned to 16 bytes: Triton compiles other kernels for other alignments.
        shapes: the shapes of the parts.
    """

    def __init__(self, flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        self._flat = flat
        self._shapes = shapes
        parts = torch.split(flat, [_aligned_size(math.prod(shape)) for shape in shapes])
        self.positions, self.spans, self.tables, self.lone_rows, self.tiles = (
            part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)
        )

    @classmethod
    def draw(cls, batch: MicroBatch, cache: Blocks, tile_rows: int) -> RowIndex:
        """The index of a micro-batch, on the host; tiles have up to `tile_rows` rows."""
        lone_rows = [span.row for span in batch.spans if span.num_tokens == 1]
        tiles = [tile for span in batch.spans if span.num_tokens > 1 for tile in span.tiles(tile_rows)]
        parts = (
            batch.positions,
            batch.span_of_row,
            cache.tables(batch.spans),
            torch.tensor(lone_rows),
            torch.tensor(tiles).view(-1, 2),
        )
        flat = torch.zeros(sum(_aligned_size(part.numel()) for part in parts), dtype=torch.int32)
        index = cls(flat, [tuple(part.shape) for part in parts])
        for target, part in zip(index._parts(), parts, strict=True):
            target.copy_(part)
        return index

    def to(self, device: torch.device) -> RowIndex:
        """A copy on the device. The host does not wait for it."""
        return RowIndex(to_device(self._flat, device), self._shapes)

    def overwrite(self, other: RowIndex) -> None:
        """Copies another index of the same sizes into this one. The host does not wait for it."""
        self._flat.copy_(to_device(other._flat, self._flat.device))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.positions, self.spans, self.tables, self.lone_rows, self.tiles


class PagedAttention:
    """Implements `Attention`.

    Args:
        index: the index of the micro-batch, on the cache's device, with tiles of this grain.
    """

    def __init__(self, cache: Blocks, index: RowIndex, rotary: RotaryTable, grain: Grain) -> None:
        heads, dim = cache.num_heads, cache.head_dim
        num_lone_rows = len(index.lone_rows)
        self._cache, self._index, self._grain = cache, index, grain
        self._cos, self._sin = rotary.tables
        self._width = max(triton.next_power_of_2(dim), 16)
        self._shape = {"HEADS": heads, "DIM": dim, "WIDTH": self._width}
        self._num_splits = grain.num_splits(num_lone_rows * heads)
        self._queries = self._floats(len(index.positions), heads, dim)
        num_parts = num_lone_rows * heads * self._num_splits if self._num_splits > 1 else 0
        self._split_sums, self._split_weights = self._floats(num_parts, self._width), self._floats(num_parts, 2)

    def __call__(self, layer: int, heads: Tensor) -> None:
        keys, values = self._cache.layer(layer)
        self._store(heads, keys, values)
        out = heads[:, 2]
        if len(self._index.lone_rows):
            self._attend_lone_rows(keys, values, out)
        if len(self._index.tiles):
            self._attend_tiles(keys, values, out)

    def _store(self, heads: Tensor, keys: Tensor, values: Tensor) -> None:
        kernels.store_heads[len(heads), self._cache.num_heads](
            heads,
            heads.stride(0),
            self._queries,
            keys,
            values,
            *self._places(),
            self._cos,
            self._sin,
            1.0 / math.sqrt(self._cache.head_dim),
            **self._shape,
            PAIRS=self._cos.shape[1],
            BLOCK=self._cache.block_size,
            num_warps=1,
        )

    def _attend_lone_rows(self, keys: Tensor, values: Tensor, out: Tensor) -> None:
        rows = self._index.lone_rows
        target = (out, out.stride(0), self._split_sums, self._split_weights, rows)
        kernels.attend_row[len(rows), self._cache.num_heads, self._num_splits](
            self._queries,
            keys,
            values,
            *target,
            *self._places(),
            **self._shape,
            BLOCK=self._cache.block_size,
            SPLITS=self._num_splits,
            TILE=self._grain.lone_tile_keys,
        )
        if self._num_splits > 1:
            kernels.join_splits[len(rows), self._cache.num_heads](*target, **self._shape, SPLITS=self._num_splits)

    def _attend_tiles(self, keys: Tensor, values: Tensor, out: Tensor) -> None:
        kernels.attend_tile[len(self._index.tiles), self._cache.num_heads](
            self._queries,
            keys,
            values,
            out,
            out.stride(0),
            self._index.tiles,
            *self._places(),
            **self._shape,
            BLOCK=self._cache.block_size,
            ROWS=self._grain.tile_rows,
            TILE=self._grain.tile_keys,
            num_warps=self._grain.tile_warps,
            num_stages=self._grain.tile_stages,
        )

    def _places(self) -> tuple[Tensor, Tensor, Tensor, int]:
        index = self._index
        return index.positions, index.spans, index.tables, index.tables.stride(0)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._cache.device)


def attend_in_blocks(cache: Blocks, batch: MicroBatch, rotary: RotaryTable) -> PagedAttention:
    """The attention of a micro-batch, which is on the host."""
    grain = Grain.of(cache)
    return PagedAttention(cache, RowIndex.draw(batch, cache, grain.tile_rows).to(cache.device), rotary, grain)


def _aligned_size(num_elements: int) -> int:
    """Number of 4-byte elements, rounded up to a multiple of 16 bytes."""
    return ceil_div(num_elements, 4) * 4
