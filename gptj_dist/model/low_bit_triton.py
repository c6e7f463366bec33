"""The product with weights of 8 or 4 bits on a GPU, for few rows: it reads the bits, and makes numbers of them in
registers.

Importing this module needs Triton, which every CUDA build of torch for Linux includes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gptj_dist.model.linear import Linear
from gptj_dist.quantization import MAX_LOW_BIT_ROWS, Bits
from gptj_dist.sizes import ceil_div

MAX_TILE = 128
"""Inputs that a program reads at a time."""

COLUMNS = 32
"""Outputs of a program."""


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


class TritonLowBitLinear:
    """A product with a weight of 8 or 4 bits, as in `QuantizedWeight`, for few rows.

    Args:
        many: the product for more than `MAX_LOW_BIT_ROWS` rows.
        bias: [out_features], or None for none.

    Raises:
        ValueError: the groups are not `can_multiply`.
    """

    def __init__(
        self, many: Linear, bits: Bits, values: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None
    ) -> None:
        self._depth = values.shape[1] * 8 // bits
        group = self._depth // scales.shape[1]
        if not can_multiply(bits, group):
            raise ValueError(f"groups of {group} numbers of {bits} bits have no kernel")
        self._many = many
        self._operands = (values, scales, scales if offsets is None else offsets, values if bias is None else bias)
        tile = _tile(group)
        self._constants = {
            "BITS": bits,
            "HAS_OFFSETS": offsets is not None,
            "HAS_BIAS": bias is not None,
            "TILES": group // tile,
            "TILE": tile,
            "COLUMNS": COLUMNS,
        }

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = len(x)
        if num_rows > MAX_LOW_BIT_ROWS:
            return self._many(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        num_columns = len(self._operands[0])
        out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
        rows = 1 if num_rows == 1 else max(16, triton.next_power_of_2(num_rows))
        multiply_low_bit[1, ceil_div(num_columns, COLUMNS)](
            x, x.stride(0), *self._operands, out, num_rows, num_columns, self._depth, ROWS=rows, **self._constants
        )
        return out

    def gelu(self, x: Tensor) -> Tensor:
        return self._many.gelu(x) if len(x) > MAX_LOW_BIT_ROWS else F.gelu(self(x), approximate="tanh")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._many.add(x, residual) if len(x) > MAX_LOW_BIT_ROWS else residual + self(x)


def can_multiply(bits: Bits, group: int) -> bool:
    """Whether there is a kernel for groups of so many numbers that share a scale."""
    return _tile(group) >= (16 if bits == 8 else 32)  # Triton multiplies matrices of 16 columns or more


def _tile(group: int) -> int:
    """Inputs that the kernel reads at a time: the largest power of two that divides the group, up to a limit."""
    return min(group & -group, MAX_TILE)
