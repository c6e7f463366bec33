"""Causal attention of a micro-batch's rows: rotates their queries and keys, stores their keys and values, and attends
over their requests' cache. Knows no weights.

In the exact mode on a CPU the rows of a request are computed in tiles of `EXACT_TILE_ROWS` at fixed positions: the row
of position p is always row p mod 8 of a product of the same shape over the same keys, so it has the same bits whether
it comes alone or in a chunk. What else is in the tile cannot reach it: later columns are masked, other rows are other
sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from gptj_dist.model.inputs import MicroBatch
from gptj_dist.model.kv_cache import RegionCache
from gptj_dist.model.rotary import RotaryTable, rotate_

EXACT_TILE_ROWS = 8


class Attention(Protocol):
    """Attends for all rows of one micro-batch, layer after layer."""

    def __call__(self, layer: int, heads: Tensor) -> None:
        """Attends for every row in one layer.

        Args:
            heads: [rows, 3, num_heads, head_dim]: queries, keys and values as the weights made them. The values are
                overwritten with the result.
        """


MakeAttention = Callable[[Any, MicroBatch, RotaryTable], Attention]
"""An attention for one micro-batch: what does not depend on the layer is worked out here. Each takes its own cache."""


class _Intake:
    """What comes before attention in plain torch: queries and keys are rotated, keys and values go to the cache."""

    def __init__(self, cache: RegionCache, batch: MicroBatch, rotary: RotaryTable) -> None:
        self._cache = cache
        self._places = cache.locate(batch)
        self._cos, self._sin = rotary.at(batch.positions)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        """The queries, float32 [rows, num_heads, head_dim], scaled by 1 / sqrt(head_dim)."""
        num_heads, head_dim = heads.shape[2:]
        rotated = heads[:, :2].to(torch.float32, copy=True).flatten(1, 2)
        rotate_(rotated, self._cos, self._sin)
        self._cache.write(layer, self._places, rotated[:, num_heads:], heads[:, 2])
        return rotated[:, :num_heads].mul_(1.0 / math.sqrt(head_dim))


class TiledAttention:
    """The exact mode on a CPU: two matrix products a tile, in float32, straight out of the cache."""

    def __init__(self, cache: RegionCache, batch: MicroBatch, rotary: RotaryTable) -> None:
        self._cache = cache
        self._take_in = _Intake(cache, batch, rotary)
        self._tiles: list[tuple[int, int]] = []
        tile_of_row: list[int] = []
        for span in batch.spans:
            for first in range(span.start // EXACT_TILE_ROWS * EXACT_TILE_ROWS, span.stop, EXACT_TILE_ROWS):
                stop = first + EXACT_TILE_ROWS
                tile_of_row += [len(self._tiles)] * (min(stop, span.stop) - max(first, span.start))
                self._tiles.append((span.request_id, stop))
        self._tile_of_row = torch.tensor(tile_of_row)
        self._row_in_tile = batch.positions % EXACT_TILE_ROWS
        self._hidden = _above_diagonal(EXACT_TILE_ROWS)

    def __call__(self, layer: int, heads: Tensor) -> None:
        queries = self._take_in(layer, heads)
        _, num_heads, head_dim = queries.shape
        tiles = queries.new_zeros(len(self._tiles), num_heads, EXACT_TILE_ROWS, head_dim)
        tiles[self._tile_of_row, :, self._row_in_tile] = queries
        attended = torch.empty_like(tiles)
        for (request_id, stop), tile, result in zip(self._tiles, tiles.unbind(), attended.unbind(), strict=True):
            keys, values = self._cache.read(layer, request_id, stop)
            scores = torch.bmm(tile, keys)
            scores.narrow(2, stop - EXACT_TILE_ROWS, EXACT_TILE_ROWS).masked_fill_(self._hidden, -math.inf)
            torch.bmm(torch.softmax(scores, dim=-1), values, out=result)
        heads[:, 2] = attended[self._tile_of_row, :, self._row_in_tile]


class SpanAttention:
    """The fast mode on a CPU: as `TiledAttention`, but each span is one tile; good to rounding."""

    def __init__(self, cache: RegionCache, batch: MicroBatch, rotary: RotaryTable) -> None:
        self._cache = cache
        self._take_in = _Intake(cache, batch, rotary)
        self._spans = [(span, _above_diagonal(span.num_tokens)) for span in batch.spans]

    def __call__(self, layer: int, heads: Tensor) -> None:
        queries, out = self._take_in(layer, heads), heads[:, 2]
        for span, hidden in self._spans:
            keys, values = self._cache.read(layer, span.request_id, span.stop)
            scores = torch.bmm(queries[span.rows].transpose(0, 1), keys)
            if span.num_tokens > 1:
                scores[:, :, span.start :].masked_fill_(hidden, -math.inf)
            out[span.rows] = torch.bmm(torch.softmax(scores, dim=-1), values).transpose(0, 1)


def choose_attention(device: torch.device, is_exact: bool) -> MakeAttention:
    """The attention for a device's kind of cache (see `kv_cache` and `block_cache`)."""
    if device.type != "cpu":
        from gptj_dist.model.paged_attention import attend_in_blocks  # Triton comes with torch for GPUs alone

        return attend_in_blocks
    return TiledAttention if is_exact else SpanAttention


def _above_diagonal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)
