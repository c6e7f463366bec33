"""The Triton kernel of products with weights of 8 or 4 bits. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(x, weight, ROWS: tl.constexpr):
    """x [ROWS, n] times weight [COLUMNS, n], float32 [ROWS, COLUMNS]."""
    if ROWS == 1:
        return tl.sum(x.to(tl.float32) * weight.to(tl.float32), axis=1)[None, :]
    return tl.dot(x, tl.trans(weight.to(x.dtype)), input_precision="ieee")


@triton.jit
def multiply_low_bit(
    x,
    row_stride,
    values,
    scales,
    offsets,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes x @ weight.T + bias. Grid: one, blocks of COLUMNS outputs. Sums are in float32.

    Args:
        x: [num_rows, depth], rows `row_stride` elements apart.
        values, scales, offsets: those of a `QuantizedWeight` of BITS bits [num_columns, depth].
        bias: [num_columns].
        out: [num_rows, num_columns].
        TILES: tiles of TILE inputs in a group.
        ROWS: `num_rows` or more: 1, or a power of two of at least 16.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < num_columns
    num_groups = depth // (TILES * TILE)
    bytes_a_row = depth * BITS // 8
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(0, depth // TILE):
        steps = tl.arange(0, TILE * BITS // 8)
        inputs = x + rows[:, None] * row_stride + tile * TILE
        places = columns[:, None] * bytes_a_row + tile * (TILE * BITS // 8) + steps[None, :]
        bits = tl.load(values + places, mask=is_column[:, None], other=0)
        if BITS == 8:
            some = tl.load(inputs + steps[None, :], mask=is_row[:, None], other=0.0)
            part = _dot(some, bits, ROWS)
            total = tl.sum(some.to(tl.float32), axis=1)
        else:
            evens = tl.load(inputs + 2 * steps[None, :], mask=is_row[:, None], other=0.0)
            odds = tl.load(inputs + 2 * steps[None, :] + 1, mask=is_row[:, None], other=0.0)
            low, high = (bits & 15).to(tl.int8) - 8, (bits >> 4).to(tl.int8) - 8
            part = _dot(evens, low, ROWS) + _dot(odds, high, ROWS)
            total = tl.sum(evens.to(tl.float32) + odds.to(tl.float32), axis=1)
        place = columns * num_groups + tile // TILES
        sums += part * tl.load(scales + place, mask=is_column, other=0.0)[None, :]
        if HAS_OFFSETS:
            sums += total[:, None] * tl.load(offsets + place, mask=is_column, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = out + rows[:, None] * num_columns + columns[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
