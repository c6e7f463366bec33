"""The kernels attend as the formula says: over any lengths, chunks and scattered blocks, in any company and any cut."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gptj_dist.model.block_cache import SCRATCH_REQUEST, BlockCache
from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.paged_attention import Grain, PagedAttention, RowIndex
from gptj_dist.model.rotary import RotaryTable, rotate_
from tests.kernel_device import DEVICE, IS_INTERPRETED, MATRIX_DTYPES

BLOCK_SIZE = 16
MAX_TOKENS = 150
NUM_REQUESTS = 4
NUM_BLOCKS = 40
GRAIN = Grain(1, 16, 16, 16, 4, 1) if IS_INTERPRETED else Grain.of_gpu(1, 7, torch.float32, 256)
"""Of one split and small tiles."""
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of values of about 1: some units in the last place."""
Steps = Sequence[Sequence[tuple[int, int]]]
"""Micro-batches: of requests and how many tokens each goes on by."""


class Attending:
    """Requests that go on, by the kernels; and all that was given to them, to do the same by the formula.

    Args:
        width: elements between rows of what attention is given, beyond the heads.
    """

    def __init__(
        self, dtype: torch.dtype, num_heads: int, head_dim: int, rotary_dim: int, grain: Grain = GRAIN, width: int = 5
    ) -> None:
        self._dtype, self._num_heads, self._head_dim = dtype, num_heads, head_dim
        self._grain, self._width = grain, width
        self.cache = BlockCache(2, NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS, num_heads, head_dim, dtype, DEVICE)
        for part in self.cache.layer(1):
            part.fill_(math.nan)  # what nobody wrote must not matter
        self._rotary = RotaryTable(MAX_TOKENS, rotary_dim, DEVICE)
        self._generators = [torch.Generator().manual_seed(request_id) for request_id in range(NUM_REQUESTS)]
        blocks = list(range(NUM_BLOCKS))
        random.Random(0).shuffle(blocks)
        for request_id in range(NUM_REQUESTS):
            self.cache.add(request_id)
            self.cache.extend(request_id, [blocks.pop() for _ in range(-(-MAX_TOKENS // BLOCK_SIZE))])
        self._given = {request_id: torch.empty(0, 3, num_heads, head_dim) for request_id in range(NUM_REQUESTS)}

    def go_on(self, *parts: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One layer of one micro-batch. Returns its result, and what it should be: [rows, num_heads, head_dim]."""
        spans, row = [], 0
        for request_id, num_tokens in parts:
            spans.append(Span(request_id, row, len(self._given[request_id]), num_tokens))
            row += num_tokens
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        heads = self._random_heads(spans)
        expected = torch.cat([self._formula(span, heads[span.rows].cpu().float()) for span in spans])
        index = RowIndex.draw(MicroBatch(tuple(spans), positions), self.cache, self._grain.tile_rows).to(DEVICE)
        PagedAttention(self.cache, index, self._rotary, self._grain)(1, heads)
        return heads[:, 2].cpu().float(), expected

    def _random_heads(self, spans: Sequence[Span]) -> Tensor:
        """A request's are the same in any micro-batch."""
        num_elements = 3 * self._num_heads * self._head_dim
        rows = [
            torch.randn(num_elements + self._width, generator=self._generators[span.request_id])
            for span in spans
            for _ in range(span.num_tokens)
        ]
        joined = torch.stack(rows).to(self._dtype).to(DEVICE)
        return joined[:, :num_elements].view(len(rows), 3, self._num_heads, -1)

    def _formula(self, span: Span, heads: Tensor) -> Tensor:
        given = self._given[span.request_id] = torch.cat([self._given[span.request_id], heads])
        rotated = given[:, :2].flatten(1, 2).clone()
        cos, sin = (part.cpu() for part in self._rotary.at(torch.arange(len(given))))
        rotate_(rotated, cos, sin)
        queries, keys = rotated.view(len(given), 2, self._num_heads, -1).unbind(1)
        queries, keys = queries[span.start :].to(self._dtype).float(), keys.to(self._dtype).float()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(self._head_dim)
        hidden = torch.ones(span.num_tokens, span.stop, dtype=torch.bool).triu(span.start + 1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), given[:, 2])


def _assert_close(result: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    ours, expected = result
    assert float((ours - expected).abs().max()) < TOLERANCES[dtype] * (1 + float(expected.abs().max()))


BORDERS: Steps = [
    [(0, 15), (1, 16), (2, 17), (3, 1)],
    [(0, 1), (1, 1), (2, 1), (3, 1)],
    [(0, 1), (1, 15), (2, 14), (3, 30)],
    [(0, 47), (1, 1), (2, 1), (3, 2)],
    [(0, 1), (3, 33)],
]
"""Before, on and behind the borders of blocks and tiles, rows alone and chunks in turn."""


@pytest.mark.parametrize(("head_dim", "dtype"), [*((16, dtype) for dtype in MATRIX_DTYPES), (64, MATRIX_DTYPES[-1])])
def test_lone_rows_and_chunks_at_the_borders_of_blocks(head_dim: int, dtype: torch.dtype) -> None:
    attending = Attending(dtype, 2, head_dim, head_dim // 4)
    for parts in BORDERS:
        _assert_close(attending.go_on(*parts), dtype)


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_heads_of_gptj(dtype: torch.dtype) -> None:
    attending = Attending(dtype, 2, 256, 64, replace(GRAIN, tile_rows=64, tile_keys=32) if IS_INTERPRETED else GRAIN)
    for parts in ([(0, 70), (1, 1)], [(0, 1), (1, 1)], [(0, 40), (1, 20)], [(0, 1), (1, 1)]):
        _assert_close(attending.go_on(*parts), dtype)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(5, 4), (15, 6), (12, 12), (2, 2), (33, 2)])
def test_heads_that_are_no_power_of_two(head_dim: int, rotary_dim: int) -> None:
    attending = Attending(torch.float32, 3, head_dim, rotary_dim)
    for parts in ([(0, 21), (1, 1)], [(0, 1), (1, 3)], [(0, 1), (1, 1)]):
        _assert_close(attending.go_on(*parts), torch.float32)


@pytest.mark.parametrize("wanted_programs", [1, 12, 1000] if IS_INTERPRETED else [1, 5, 12, 64, 1000])
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_any_number_of_splits(dtype: torch.dtype, wanted_programs: int) -> None:
    """More splits than tiles, and than tokens, too."""
    attending = Attending(dtype, 1, 16, 4, replace(GRAIN, wanted_programs=wanted_programs))
    for parts in ([(0, 120), (1, 33), (2, 16)], [(0, 1), (1, 1), (2, 1), (3, 1)], [(3, 1), (0, 1)]):
        _assert_close(attending.go_on(*parts), dtype)


@pytest.mark.parametrize("wanted_programs", [1, 8])
def test_lone_rows_in_bfloat16(wanted_programs: int) -> None:
    attending = Attending(torch.bfloat16, 2, 16, 4, replace(GRAIN, wanted_programs=wanted_programs))
    for _ in range(20):
        _assert_close(attending.go_on((2, 1)), torch.bfloat16)


@pytest.mark.parametrize("seed", range(1 if IS_INTERPRETED else 2))
def test_a_random_walk(seed: int) -> None:
    chooser = random.Random(seed)
    attending = Attending(torch.float32, 1, 16, 8, replace(GRAIN, wanted_programs=4))
    num_tokens = [0] * NUM_REQUESTS
    for _ in range(12):
        parts = []
        for request_id in chooser.sample(range(NUM_REQUESTS), chooser.randint(1, NUM_REQUESTS)):
            if wanted := min(chooser.choice((1, 1, 1, 2, 15, 16, 17, 40)), MAX_TOKENS - num_tokens[request_id]):
                parts.append((request_id, wanted))
                num_tokens[request_id] += wanted
        if parts:
            _assert_close(attending.go_on(*parts), torch.float32)


def test_no_row_changes_a_bit_by_the_company_it_is_in() -> None:
    """As long as the number of splits is the same."""
    alone, together = Attending(torch.float32, 2, 16, 4), Attending(torch.float32, 2, 16, 4)
    prompt = alone.go_on((0, 40))[0]
    assert torch.equal(together.go_on((0, 40), (1, 3), (2, 1))[0][:40], prompt)


def test_rows_of_nobody_touch_no_request() -> None:
    attending = Attending(torch.float32, 1, 16, 4)
    attending.go_on((0, 20), (1, 5))
    before = [part[:NUM_BLOCKS].clone() for part in attending.cache.layer(1)]
    heads = torch.randn(3, 3, 1, 16, device=DEVICE)
    spans = tuple(Span(SCRATCH_REQUEST, row, 0, 1) for row in range(3))
    index = RowIndex.draw(MicroBatch(spans, torch.zeros(3, dtype=torch.int64)), attending.cache, 16).to(DEVICE)
    PagedAttention(attending.cache, index, RotaryTable(4, 4, DEVICE), GRAIN)(1, heads)
    for part, old in zip(attending.cache.layer(1), before, strict=True):
        assert torch.equal(part[:NUM_BLOCKS].nan_to_num(7), old.nan_to_num(7))


def test_contexts_are_split_only_where_programs_are_few() -> None:
    grain = Grain.of_gpu(132, 9, torch.bfloat16, 256)
    assert [grain.num_splits(rows * 16) for rows in (0, 1, 8, 16, 64)] == [1, 32, 4, 2, 1]
    assert grain.num_splits(1) == 32
