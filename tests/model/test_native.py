"""The compiled attention: its numbers are the formula's; in float32 nothing but a request's own tokens moves a bit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from gptj_dist.config import BLOCK_SIZE_TOKENS
from gptj_dist.model.inputs import MicroBatch, Span
from gptj_dist.model.native.attention import LANES, NativeCache
from gptj_dist.model.native.library import load_library
from gptj_dist.model.native.memory import HUGE_PAGE_BYTES
from gptj_dist.model.rotary import RotaryTable

LIBRARY = load_library()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler to compile the attention with"),
]

NUM_LAYERS = 2
MAX_REQUESTS = 6


@dataclass(frozen=True)
class Shape:
    """Of a model's attention; requests have at most `max_tokens`."""

    num_heads: int
    head_dim: int
    rotary_dim: int
    max_tokens: int = 75


SHAPES = (
    Shape(5, 5, 4),
    Shape(3, 15, 6),
    Shape(17, 16, 16),
    Shape(4, 64, 32),
    Shape(2, 80, 80),
    Shape(2, 256, 64),
)
"""Heads that are padded and not, rotated in part and whole, more than an item takes and fewer."""


@cache
def rotary(shape: Shape) -> RotaryTable:
    return RotaryTable(shape.max_tokens, shape.rotary_dim, torch.device("cpu"))


@cache
def tokens_of(shape: Shape, request_id: int, layer: int) -> Tensor:
    """What the weights made of a request's tokens: float32 [tokens, 3, heads, head_dim], exact in 16 bit, too."""
    seed = torch.Generator().manual_seed(NUM_LAYERS * request_id + layer)
    heads = torch.randn(shape.max_tokens, 3, shape.num_heads, shape.head_dim, generator=seed)
    return heads.bfloat16().half().float()


def formula(shape: Shape, heads: Tensor) -> Tensor:
    """Causal attention in float64 of a whole sequence [tokens, 3, heads, head_dim]: [tokens, heads, head_dim]."""
    cos, sin = (table[: len(heads), None, None].double() for table in rotary(shape).tables)
    rotated = heads[:, :2].double()
    even, odd = (rotated[..., i : shape.rotary_dim : 2].clone() for i in (0, 1))
    rotated[..., 0 : shape.rotary_dim : 2] = even * cos - odd * sin
    rotated[..., 1 : shape.rotary_dim : 2] = odd * cos + even * sin
    scores = torch.einsum("qhd,khd->hqk", rotated[:, 0], rotated[:, 1]) / math.sqrt(shape.head_dim)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, heads[:, 2].double())


class Stage:
    """A cache with poisoned memory, and who has which of its blocks.

    Args:
        dtype: of the heads; the cache keeps float16 in float32.
        extra_columns: numbers that lie between the heads of one row and those of the next.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0, extra_columns: int = 0) -> None:
        assert LIBRARY is not None
        self.shape, self.dtype, self.extra_columns = shape, dtype, extra_columns
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        num_blocks = MAX_REQUESTS * -(-shape.max_tokens // LANES)
        self.cache = NativeCache(
            LIBRARY, NUM_LAYERS, num_blocks, shape.max_tokens, shape.num_heads, shape.head_dim, kept
        )
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.poison(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.num_tokens: dict[int, int] = {}

    def poison(self, blocks: Sequence[int]) -> None:
        for layer in range(NUM_LAYERS):
            for part in self.cache.layer(layer):
                part[blocks] = math.nan

    def add(self, request_id: int) -> None:
        self.cache.add(request_id)
        self.blocks[request_id], self.num_tokens[request_id] = [], 0

    def release(self, request_id: int) -> None:
        self.cache.release(request_id)
        del self.num_tokens[request_id]
        freed = self.blocks.pop(request_id)
        self.poison(freed)
        self.free[:0] = freed

    def compute(self, chunks: Mapping[int, int]) -> dict[int, Tensor]:
        """Computes the next tokens of requests, so many of each, as one micro-batch in every layer.

        Returns:
            By request what its rows attended to, [layers, rows, heads, head_dim].
        """
        spans, row = [], 0
        for request_id, num_tokens in chunks.items():
            spans.append(Span(request_id, row, self.num_tokens[request_id], num_tokens))
            row += num_tokens
            num_new = -(-spans[-1].stop // LANES) - len(self.blocks[request_id])
            new, self.free = self.free[:num_new], self.free[num_new:]
            self.blocks[request_id] += new
            self.cache.extend(request_id, new)
            self.num_tokens[request_id] = spans[-1].stop
        batch = MicroBatch(tuple(spans), torch.cat([torch.arange(span.start, span.stop) for span in spans]))
        attend = self.cache.attention(batch, rotary(self.shape))
        results = []
        for layer in range(NUM_LAYERS):
            heads = self.heads(layer, spans)
            attend(layer, heads)
            results.append(heads[:, 2].clone())
        return {span.request_id: torch.stack([result[span.rows] for result in results]) for span in spans}

    def heads(self, layer: int, spans: Sequence[Span]) -> Tensor:
        """[rows, 3, heads, head_dim], of rows that lie further apart than they are long if there are extra columns."""
        rows = torch.cat([tokens_of(self.shape, span.request_id, layer)[span.start : span.stop] for span in spans])
        wide = torch.full((len(rows), rows[0].numel() + self.extra_columns), math.nan, dtype=self.dtype)
        wide[:, : rows[0].numel()] = rows.flatten(1)
        return wide[:, : rows[0].numel()].view(rows.shape)


@cache
def alone(shape: Shape, request_id: int) -> Tensor:
    """A request by itself in float32, a row at a time: [layers, tokens, heads, head_dim]."""
    stage = Stage(shape, torch.float32)
    stage.add(request_id)
    return torch.cat([stage.compute({request_id: 1})[request_id] for _ in range(shape.max_tokens)], 1)


@cache
def expected(shape: Shape, request_id: int) -> Tensor:
    return torch.stack([formula(shape, tokens_of(shape, request_id, layer)) for layer in range(NUM_LAYERS)])


def walk(stage: Stage, seed: int, num_steps: int) -> Iterator[tuple[int, int, Tensor]]:
    """Requests come, grow by chunks and go. Yields a request, a position and what rows from there on attended to."""
    chooser = random.Random(seed)
    next_id = 0
    for _ in range(num_steps):
        while len(stage.num_tokens) < MAX_REQUESTS and chooser.random() < 0.6:
            stage.add(next_id := next_id + 1)
        for id_ in [id_ for id_, num in stage.num_tokens.items() if num == stage.shape.max_tokens]:
            stage.release(id_)
        ids = [id_ for id_ in stage.num_tokens if chooser.random() < 0.7]
        chooser.shuffle(ids)
        starts = {id_: stage.num_tokens[id_] for id_ in ids}
        sizes = {id_: chooser.choice((1, 1, chooser.randint(1, 40))) for id_ in ids}
        if not ids:
            continue
        rows = stage.compute({id_: min(sizes[id_], stage.shape.max_tokens - starts[id_]) for id_ in ids})
        yield from ((id_, starts[id_], rows[id_]) for id_ in ids)
        if chooser.random() < 0.1:
            stage.release(chooser.choice(ids))


def test_a_block_is_what_the_scheduler_counts_in() -> None:
    assert LANES == BLOCK_SIZE_TOKENS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float32_a_lone_row_is_the_formulas(shape: Shape) -> None:
    torch.testing.assert_close(alone(shape, 1).double(), expected(shape, 1), atol=5e-6, rtol=0)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_float32_chunks_company_order_and_threads_change_no_bit(shape: Shape, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    stage = Stage(shape, torch.float32, seed=num_threads)
    for request_id, start, rows in walk(stage, seed=num_threads, num_steps=20):
        assert torch.equal(rows, alone(shape, request_id)[:, start : start + rows.shape[1]])


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.02), (torch.float16, 0.002)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_16_bit_every_row_of_a_walk_is_near_the_formulas(shape: Shape, dtype: torch.dtype, error: float) -> None:
    stage = Stage(shape, dtype)
    for request_id, start, rows in walk(stage, seed=1, num_steps=20):
        assert rows.dtype == dtype
        near = expected(shape, request_id)[:, start : start + rows.shape[1]]
        torch.testing.assert_close(rows.double(), near, atol=error, rtol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_lie_apart_and_what_is_between_stays(dtype: torch.dtype) -> None:
    shape = SHAPES[3]
    close, apart = Stage(shape, dtype), Stage(shape, dtype, extra_columns=7)
    for stage in (close, apart):
        stage.add(1)
    for num_tokens in (20, 1):
        assert torch.equal(apart.compute({1: num_tokens})[1], close.compute({1: num_tokens})[1])


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 74])
def test_a_row_after_a_chunk_that_ends_at_a_border_has_the_same_bits(num_tokens: int) -> None:
    shape = SHAPES[3]
    stage = Stage(shape, torch.float32)
    stage.add(1)
    rows = torch.cat([stage.compute({1: count})[1] for count in (num_tokens, 1)], 1)
    assert torch.equal(rows, alone(shape, 1)[:, : num_tokens + 1])


def test_a_context_of_2048_tokens_is_the_formulas_to_its_end() -> None:
    shape = Shape(2, 64, 64, max_tokens=2048)
    stage = Stage(shape, torch.float32)
    stage.add(1)
    rows = torch.cat([stage.compute({1: count})[1] for count in (512, 512, 1000, 23, 1)], 1)
    torch.testing.assert_close(rows[0].double(), formula(shape, tokens_of(shape, 1, 0)), atol=5e-6, rtol=0)


@dataclass(frozen=True)
class Given:
    """Heads of one request for a stage without rotation of any consequence: position 0 is not rotated."""

    rows: Tensor

    def attend(self, dtype: torch.dtype, chunk: int) -> Tensor:
        """All rows by chunks of this size: [rows, heads, head_dim]."""
        stage = Stage(Shape(1, 16, 2, max_tokens=64), dtype)
        stage.add(1)
        results = []
        for start in range(0, len(self.rows), chunk):
            rows = self.rows[start : start + chunk].to(dtype)
            span = Span(1, 0, start, len(rows))
            if start % LANES == 0:
                new = [stage.free.pop() for _ in range(-(-chunk // LANES))]
                stage.cache.extend(1, new)
            batch = MicroBatch((span,), torch.arange(span.start, span.stop))
            stage.cache.attention(batch, rotary(stage.shape))(0, rows)
            results.append(rows[:, 2])
        return torch.cat(results)


@pytest.mark.parametrize("chunk", [1, 32])
def test_scores_thousands_apart_give_all_weight_to_the_largest(chunk: int) -> None:
    rows = torch.zeros(32, 3, 1, 16)
    rows[:, :2, 0, 5] = 100.0
    rows[9, 1, 0, 5] = 1000.0
    rows[:, 2, 0, 0] = torch.arange(32.0)
    attended = Given(rows).attend(torch.float32, chunk)[:, 0, 0]
    before = torch.arange(9.0).cumsum(0) / torch.arange(1.0, 10.0)
    torch.testing.assert_close(attended, torch.cat([before, torch.full((23,), 9.0)]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_nan_is_not_hidden_from_any_row_that_it_concerns(dtype: torch.dtype, chunk: int, part: int) -> None:
    """A query concerns its row alone, a key or value all rows behind it as well."""
    rows = torch.ones(32, 3, 1, 16)
    rows[9, part, 0, 5] = math.nan
    is_nan = Given(rows).attend(dtype, chunk).isnan().any(-1)[:, 0]
    assert is_nan[9:].tolist() == [part > 0 or row == 0 for row in range(23)]
    assert not is_nan[:8].any()  # row 8 is in the tile of row 9


def test_tokens_without_a_block_and_blocks_that_are_not_there_are_refused_before_anything_is_written() -> None:
    stage = Stage(SHAPES[3], torch.float32)
    stage.add(1)
    with pytest.raises(IndexError, match="of a cache of 30"):
        stage.cache.extend(1, [30])
    stage.cache.extend(1, [3])
    batch = MicroBatch((Span(1, 0, 0, LANES + 1),), torch.arange(LANES + 1))
    with pytest.raises(IndexError, match="request 1 has no block for position 16"):
        stage.cache.attention(batch, rotary(stage.shape))


def test_heads_that_the_library_would_misread_are_refused() -> None:
    stage = Stage(SHAPES[3], torch.float32)
    stage.add(1)
    stage.cache.extend(1, [3])
    batch = MicroBatch((Span(1, 0, 0, 2),), torch.arange(2))
    attend = stage.cache.attention(batch, rotary(stage.shape))
    heads = torch.zeros(2, 3, 4, 64)
    attend(0, heads)
    for wrong in (heads[:1], heads[:, :2], heads[..., :32], heads.flatten(1), heads.mT.contiguous().mT):
        with pytest.raises(ValueError, match=r"heads must have (the shape \(2, 3, 4, 64\)|rows without gaps)"):
            attend(0, wrong)


def test_memory_that_cannot_be_had_is_an_error() -> None:
    shape = SHAPES[3]
    stage = Stage(shape, torch.float32)
    stage.add(1)
    stage.cache.extend(1, [0])
    attend = stage.cache.attention(MicroBatch((Span(1, 0, 0, 1),), torch.arange(1)), rotary(shape))
    attend._batch.max_tokens = 2**55
    with pytest.raises(MemoryError, match="attention of 1 rows"):
        attend(0, stage.heads(0, [Span(1, 0, 0, 1)]))


def test_a_large_cache_begins_at_a_huge_page() -> None:
    assert LIBRARY is not None
    cache = NativeCache(LIBRARY, NUM_LAYERS, 256, 75, 4, 64, torch.bfloat16)
    assert [part.data_ptr() % HUGE_PAGE_BYTES for part in cache.layer(NUM_LAYERS - 1)] == [0, 0]


def test_a_copy_fills_the_blocks_that_are_not_held_in_common_and_no_others() -> None:
    assert LIBRARY is not None
    cache = NativeCache(LIBRARY, NUM_LAYERS, 12, 75, 3, 5, torch.float32)
    parts = [part for layer in range(NUM_LAYERS) for part in cache.layer(layer)]
    for seed, part in enumerate(parts):
        part.normal_(generator=torch.Generator().manual_seed(seed))
    before = [part.clone() for part in parts]
    cache.add(0)
    cache.extend(0, (7, 3, 11, 2))
    cache.add(1)
    cache.extend(1, (7, 3))
    cache.extend(1, (5, 9))
    cache.copy(0, 1, 2 * LANES + 1)
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part[5], was[11])
        others = [block for block in range(12) if block != 5]
        assert torch.equal(part[others], was[others])
