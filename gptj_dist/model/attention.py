"""Causal attention of a micro-batch's rows over their requests' keys and values. Knows no weights.

On a CPU in the exact mode the rows of a request are computed in tiles of `EXACT_TILE_ROWS` at fixed positions: the row
of position p is always row p mod 8 of a product of the same shape over the same keys, so it has the same bits whether
it comes alone or in a chunk. What else is in the tile cannot reach it: later columns are masked, other rows are other
sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptj_dist.model.inputs import Span
from gptj_dist.model.kv_cache import KVCache

EXACT_TILE_ROWS = 8


class TiledAttention:
    """Two matrix products a tile, in float32, straight out of a `RegionCache`.

    Args:
        is_exact: tiles at fixed positions; otherwise a span is one tile, which is faster and good to rounding.
    """

    def __init__(self, head_dim: int, is_exact: bool) -> None:
        self._scale = 1.0 / math.sqrt(head_dim)
        self._is_exact = is_exact

    def __call__(self, layer: int, cache: KVCache, spans: Sequence[Span], queries: Tensor, out: Tensor) -> None:
        """Attends for every row.

        Args:
            queries: float32 [rows, num_heads, head_dim].
            out: [rows, num_heads, head_dim], written.
        """
        for span in spans:
            for first, stop in self._tiles(span):
                keys, values = cache.read(layer, span.request_id, stop)
                self._attend(span, first, stop, keys, values, queries, out)

    def _tiles(self, span: Span) -> Iterator[tuple[int, int]]:
        """First and last position of each tile that the span has rows in."""
        if not self._is_exact:
            yield span.start, span.stop
            return
        for first in range(span.start // EXACT_TILE_ROWS * EXACT_TILE_ROWS, span.stop, EXACT_TILE_ROWS):
            yield first, first + EXACT_TILE_ROWS

    def _attend(
        self, span: Span, first: int, stop: int, keys: Tensor, values: Tensor, queries: Tensor, out: Tensor
    ) -> None:
        begin, end = max(first, span.start), min(stop, span.stop)
        rows = slice(span.row + begin - span.start, span.row + end - span.start)
        in_tile = slice(begin - first, end - first)
        tile = queries.new_zeros(queries.shape[1], stop - first, queries.shape[2])
        tile[:, in_tile] = queries[rows].transpose(0, 1)
        scores = torch.bmm(tile, keys.transpose(1, 2)).mul_(self._scale)
        if stop - first > 1:
            scores[:, :, first:].masked_fill_(_above_diagonal(stop - first, scores.device), -math.inf)
        attended = torch.bmm(torch.softmax(scores, dim=-1), values)
        out[rows] = attended[:, in_tile].transpose(0, 1)


class GatheredAttention:
    """torch's fused attention over keys and values gathered from a `BlockCache`, a request at a time."""

    def __call__(self, layer: int, cache: KVCache, spans: Sequence[Span], queries: Tensor, out: Tensor) -> None:
        """As `TiledAttention`."""
        for span in spans:
            keys, values = cache.read(layer, span.request_id, span.stop)
            visible = torch.ones(span.num_tokens, span.stop, dtype=torch.bool, device=queries.device).tril(span.start)
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries[span.rows].transpose(0, 1)[None].to(keys.dtype), keys[None], values[None], attn_mask=visible
            )
            out[span.rows] = attended[0].transpose(0, 1)


def _above_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
