"""Attention on a CPU in torch, for machines without a C compiler, and the cache that it reads in place.

Untouched memory costs nothing on a CPU, so each request has a contiguous region as long as the context.

The rows of a request are computed in tiles of `EXACT_TILE_ROWS` at fixed positions: the row of position p is always row
p mod 8 of a product of the same shape over the same keys, so in float32 it has the same bits whether it comes alone or
in a chunk. The rest of the tile does not change it: later columns are masked, and other rows are other sums.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

from gptj_dist.model.attention import Attention
from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.rotary import RotaryTable, rotate_
from gptj_dist.sizes import ceil_div

EXACT_TILE_ROWS = 8

MAP_NORESERVE = 0x4000
"""Linux's flag for "do not count this memory as used until it is touched"; Python's mmap does not name it."""

Places = tuple[Tensor, Tensor]
"""Places of the keys and values of a micro-batch's rows: regions and positions, int64 [rows] each."""


class RegionCache:
    """Implements `KVCache` with a region for each request, in float32, touched only as far as tokens are written.

    float32 whatever the model's type: a CPU multiplies float32 straight out of the cache, and bfloat16 only after a
    copy (one query row, 512 tokens of 16 heads x 256: 0.39 ms against 3.9 ms).

    Args:
        num_regions: the most requests at once.
        max_tokens: the most tokens of a request. `read` may ask for up to a tile more; unwritten tokens are zeros.
    """

    def __init__(self, num_layers: int, num_regions: int, max_tokens: int, num_heads: int, head_dim: int) -> None:
        whole_tiles = ceil_div(max_tokens, EXACT_TILE_ROWS) * EXACT_TILE_ROWS
        shape = (num_regions, num_layers, 2, num_heads, whole_tiles, head_dim)
        # Zeros that take no memory until they are written. There may be more of them than the machine has memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._memory = mmap.mmap(-1, 4 * math.prod(shape), flags=flags)
        self._regions = torch.frombuffer(self._memory, dtype=torch.float32).view(shape)
        self._region_bytes = self._regions[0].nbytes
        self._layers = [(layer[:, 0], layer[:, 1]) for layer in self._regions.unbind(1)]
        self._free = list(range(num_regions - 1, -1, -1))
        self._region_of: dict[int, int] = {}
        self._views_of: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, request_id: int) -> None:
        region = self._region_of[request_id] = self._free.pop()
        self._views_of[request_id] = [(kv[0].transpose(1, 2), kv[1]) for kv in self._regions[region].unbind()]

    def extend(self, request_id: int, blocks: Iterable[int]) -> None:
        """Does nothing: a region has room for the longest request."""

    def copy(self, source_id: int, request_id: int, num_tokens: int) -> None:
        source, target = (self._regions[self._region_of[id_]] for id_ in (source_id, request_id))
        target[..., :num_tokens, :] = source[..., :num_tokens, :]

    def release(self, request_id: int) -> None:
        del self._views_of[request_id]
        region = self._region_of.pop(request_id)
        self._free.append(region)
        self._give_back(region)

    def attention(self, batch: MicroBatch, rotary: RotaryTable) -> Attention:
        return TiledAttention(self, batch, rotary)

    def locate(self, batch: MicroBatch) -> Places:
        """The places of the rows' keys and values, the same in every layer."""
        regions = torch.tensor([self._region_of[span.request_id] for span in batch.spans])
        return regions[batch.span_of_row], batch.positions

    def write(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Stores the rows' keys and values, [rows, num_heads, head_dim] each."""
        regions, positions = places
        layer_keys, layer_values = self._layers[layer]
        layer_keys[regions, :, positions] = keys
        layer_values[regions, :, positions] = values.to(layer_values.dtype)

    def read(self, layer: int, request_id: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys [num_heads, head_dim, tokens] and values [num_heads, tokens, head_dim] of the first tokens, in place."""
        keys, values = self._views_of[request_id][layer]
        return keys.narrow(2, 0, num_tokens), values.narrow(1, 0, num_tokens)

    def _give_back(self, region: int) -> None:
        """Returns the region's pages to the machine; they read as zeros afterwards.

        Without the zeros, a request's infinities could reach the next one through the masked columns of a tile.
        """
        start, stop = region * self._region_bytes, (region + 1) * self._region_bytes
        first_page, last_page = ceil_div(start, mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        flat = self._regions[region].view(-1)
        if first_page >= last_page:
            flat.zero_()
            return
        self._memory.madvise(mmap.MADV_DONTNEED, first_page, last_page - first_page)
        flat[: (first_page - start) // 4].zero_()
        flat[(last_page - start) // 4 :].zero_()


class TiledAttention:
    """Two float32 matrix products for each tile, which read the cache in place."""

    def __init__(self, cache: RegionCache, batch: MicroBatch, rotary: RotaryTable) -> None:
        self._cache = cache
        self._places = cache.locate(batch)
        self._cos, self._sin = rotary.at(batch.positions)
        self._tiles: list[tuple[int, int]] = []
        tile_of_row: list[int] = []
        for span in batch.spans:
            for first in range(span.start // EXACT_TILE_ROWS * EXACT_TILE_ROWS, span.stop, EXACT_TILE_ROWS):
                stop = first + EXACT_TILE_ROWS
                tile_of_row += [len(self._tiles)] * (min(stop, span.stop) - max(first, span.start))
                self._tiles.append((span.request_id, stop))
        self._tile_of_row = torch.tensor(tile_of_row)
        self._row_in_tile = batch.positions % EXACT_TILE_ROWS
        self._is_later = torch.ones(EXACT_TILE_ROWS, EXACT_TILE_ROWS, dtype=torch.bool).triu(1)

    def __call__(self, layer: int, heads: Tensor) -> None:
        num_heads, head_dim = heads.shape[2:]
        rotated = heads[:, :2].to(torch.float32, copy=True).flatten(1, 2)
        rotate_(rotated, self._cos, self._sin)
        self._cache.write(layer, self._places, rotated[:, num_heads:], heads[:, 2])
        queries = rotated[:, :num_heads].mul_(1.0 / math.sqrt(head_dim))
        tiles = queries.new_zeros(len(self._tiles), num_heads, EXACT_TILE_ROWS, head_dim)
        tiles[self._tile_of_row, :, self._row_in_tile] = queries
        attended = torch.empty_like(tiles)
        for (request_id, stop), tile, result in zip(self._tiles, tiles.unbind(), attended.unbind(), strict=True):
            keys, values = self._cache.read(layer, request_id, stop)
            scores = torch.bmm(tile, keys)
            scores.narrow(2, stop - EXACT_TILE_ROWS, EXACT_TILE_ROWS).masked_fill_(self._is_later, -math.inf)
            torch.bmm(torch.softmax(scores, dim=-1), values, out=result)
        heads[:, 2] = attended[self._tile_of_row, :, self._row_in_tile]
