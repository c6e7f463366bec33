"""Triton kernels of attention over a cache in blocks: storing a layer's heads, attending for one row, and for a chunk.

They know pointers and shapes, no requests. A kernel is compiled once for each set of its `constexpr` arguments. All
sums are in float32. Importing this module needs Triton, which every CUDA build of torch for Linux includes.

Arguments that several kernels share; `rows`, `spans`, `tables` and `tiles` are those of `paged_attention.RowIndex`:

    queries        float32 [rows, HEADS, DIM], rotated and scaled
    keys, values   of one layer, [blocks, HEADS, BLOCK, DIM]
    positions      int32 [rows]
    spans          int32 [rows]: index of the row's table
    tables         int32 [spans, table_width]: the blocks of each span's request
    out            [rows, HEADS, DIM], rows `row_stride` elements apart
    WIDTH          DIM rounded up to a power of two, at least 16
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
"""The score of masked keys: finite, so that the difference of two of them is a number."""


@triton.jit
def _places(table, tokens, is_token, head, HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Where the keys and values of a request's tokens begin, in elements."""
    blocks = tl.load(table + tokens // BLOCK, mask=is_token, other=0).to(tl.int64)
    return ((blocks * HEADS + head) * BLOCK + tokens % BLOCK) * DIM


@triton.jit
def _rotate(source, target, cosines, sines, scale, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rotates interleaved pairs of one head, `cosines` and `sines` float32 [WIDTH / 2], and scales them."""
    evens = 2 * tl.arange(0, WIDTH // 2)
    odds = evens + 1
    x = tl.load(source + evens, mask=evens < DIM, other=0.0).to(tl.float32)
    y = tl.load(source + odds, mask=odds < DIM, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target + evens, ((x * cosines - y * sines) * scale).to(dtype), mask=evens < DIM)
    tl.store(target + odds, ((y * cosines + x * sines) * scale).to(dtype), mask=odds < DIM)


@triton.jit
def store_heads(
    heads,
    row_stride,
    queries,
    keys,
    values,
    positions,
    spans,
    tables,
    table_width,
    cos,
    sin,
    scale,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotates a head's query and key; writes the query, scaled, to `queries`, and key and value to their block.

    Grid: rows, heads.

    Args:
        heads: [rows, 3, HEADS, DIM], rows `row_stride` elements apart.
        cos, sin: float32 [positions, PAIRS].
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    table = tables + tl.load(spans + row) * table_width
    place = _places(table, position, position >= 0, head, HEADS, BLOCK, DIM)
    pairs = tl.arange(0, WIDTH // 2)
    cosines = tl.load(cos + position * PAIRS + pairs, mask=pairs < PAIRS, other=1.0)
    sines = tl.load(sin + position * PAIRS + pairs, mask=pairs < PAIRS, other=0.0)
    query = heads + row * row_stride + head * DIM
    _rotate(query, queries + (row * HEADS + head) * DIM, cosines, sines, scale, DIM, WIDTH)
    _rotate(query + HEADS * DIM, keys + place, cosines, sines, 1.0, DIM, WIDTH)
    dims = tl.arange(0, WIDTH)
    value = tl.load(query + 2 * HEADS * DIM + dims, mask=dims < DIM, other=0.0)
    tl.store(values + place + dims, value, mask=dims < DIM)


@triton.jit
def _fold(highest, weights, sums):
    """Joins softmaxes over different keys into one.

    Args:
        highest, weights: [n], the highest score of each and the sum of its weights relative to it.
        sums: [n, WIDTH], of weighted values.

    Returns:
        The same of them together: two numbers, and [WIDTH].
    """
    top = tl.max(highest, axis=0)
    shrink = tl.exp(highest - top)
    return top, tl.sum(weights * shrink, axis=0), tl.sum(sums * shrink[:, None], axis=0)


@triton.jit
def attend_row(
    queries,
    keys,
    values,
    out,
    row_stride,
    split_sums,
    split_weights,
    rows,
    positions,
    spans,
    tables,
    table_width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row's attention in one head, over one of SPLITS shares of its context. Grid: `rows`, heads, splits.

    Each of the TILE keys read at a time has its own running softmax (Milakov & Gimelshein 2018), so that warps
    wait for each other only at the end. One split writes `out`. More write, for `join_splits`, float32 `split_sums`
    [rows, HEADS, SPLITS, WIDTH] and `split_weights` [rows, HEADS, SPLITS, 2], highest score and sum of weights.
    """
    index, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + index).to(tl.int64)
    num_tokens = tl.load(positions + row) + 1
    table = tables + tl.load(spans + row) * table_width
    share = tl.cdiv(tl.cdiv(num_tokens, SPLITS), TILE) * TILE
    stop = tl.minimum((split + 1) * share, num_tokens)
    dims = tl.arange(0, WIDTH)
    query = tl.load(queries + (row * HEADS + head) * DIM + dims, mask=dims < DIM, other=0.0)
    highest = tl.full([TILE], LOWEST, tl.float32)
    weights = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(split * share, stop, TILE):
        tokens = first + tl.arange(0, TILE)
        is_token = tokens < stop
        offsets = _places(table, tokens, is_token, head, HEADS, BLOCK, DIM)[:, None] + dims[None, :]
        is_element = is_token[:, None] & (dims < DIM)[None, :]
        key = tl.load(keys + offsets, mask=is_element, other=0.0).to(tl.float32)
        value = tl.load(values + offsets, mask=is_element, other=0.0).to(tl.float32)
        scores = tl.where(is_token, tl.sum(key * query[None, :], axis=1), LOWEST)
        new_highest = tl.maximum(highest, scores)
        shrink = tl.exp(highest - new_highest)
        weight = tl.where(is_token, tl.exp(scores - new_highest), 0.0)
        sums = sums * shrink[:, None] + weight[:, None] * value
        weights = weights * shrink + weight
        highest = new_highest
    top, total, joined = _fold(highest, weights, sums)
    if SPLITS == 1:
        result = (joined / total).to(out.dtype.element_ty)
        tl.store(out + row * row_stride + head * DIM + dims, result, mask=dims < DIM)
    else:
        place = (index * HEADS + head) * SPLITS + split
        tl.store(split_sums + place * WIDTH + dims, joined)
        tl.store(split_weights + 2 * place, top)
        tl.store(split_weights + 2 * place + 1, total)


@triton.jit
def join_splits(
    out,
    row_stride,
    split_sums,
    split_weights,
    rows,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Joins the partial results of `attend_row`'s splits. Grid: rows, heads."""
    index, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + index).to(tl.int64)
    splits = (index * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    dims = tl.arange(0, WIDTH)
    highest = tl.load(split_weights + 2 * splits)
    weights = tl.load(split_weights + 2 * splits + 1)
    sums = tl.load(split_sums + splits[:, None] * WIDTH + dims[None, :])
    _, total, joined = _fold(highest, weights, sums)
    target = out + row * row_stride + head * DIM + dims
    tl.store(target, (joined / total).to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit
def attend_tile(
    queries,
    keys,
    values,
    out,
    row_stride,
    tiles,
    positions,
    spans,
    tables,
    table_width,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of up to ROWS consecutive tokens of one request in one head, TILE keys at a time (Dao 2023).

    Grid: tiles, heads.

    Args:
        tiles: int32 [tiles, 2]: the first row of each, and how many.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + 2 * tile).to(tl.int64)
    num_rows = tl.load(tiles + 2 * tile + 1)
    start = tl.load(positions + first_row)
    table = tables + tl.load(spans + first_row) * table_width
    steps, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    rows, is_dim = (first_row + steps)[:, None], (dims < DIM)[None, :]
    is_row = (steps < num_rows)[:, None] & is_dim
    query = tl.load(queries + (rows * HEADS + head) * DIM + dims[None, :], mask=is_row, other=0.0)
    query = query.to(keys.dtype.element_ty)
    highest = tl.full([ROWS], LOWEST, tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, start + num_rows, TILE):
        tokens = first + tl.arange(0, TILE)
        is_token = tokens < start + num_rows
        offsets = _places(table, tokens, is_token, head, HEADS, BLOCK, DIM)[:, None] + dims[None, :]
        key = tl.load(keys + offsets, mask=is_token[:, None] & is_dim, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(tokens[None, :] <= (start + steps)[:, None], scores, LOWEST)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp(highest - new_highest)
        weight = tl.exp(scores - new_highest[:, None])
        weights = weights * shrink + tl.sum(weight, axis=1)
        value = tl.load(values + offsets, mask=is_token[:, None] & is_dim, other=0.0)
        sums = tl.dot(weight.to(value.dtype), value, sums * shrink[:, None], input_precision="ieee")
        highest = new_highest
    target = out + rows * row_stride + head * DIM + dims[None, :]
    tl.store(target, (sums / weights[:, None]).to(out.dtype.element_ty), mask=is_row)
