"""The product with weights of 8 or 4 bits on a GPU, for few rows: it reads the bits, and makes numbers of them in
registers.

Importing this module needs Triton, which every CUDA build of torch for Linux includes.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from gptj_dist.model.linear import Linear
from gptj_dist.model.low_bit_kernels import multiply_low_bit
from gptj_dist.quantization import MAX_LOW_BIT_ROWS, Bits
from gptj_dist.sizes import ceil_div

MAX_TILE = 128
"""Inputs that a program reads at a time."""

COLUMNS = 32
"""Outputs of a program."""


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
    """Whether there is a kernel for groups of this number of inputs."""
    return _tile(group) >= (16 if bits == 8 else 32)  # Triton multiplies matrices of 16 columns or more


def _tile(group: int) -> int:
    """Inputs that the kernel reads at a time: the largest power of two that divides the group, up to a limit."""
    return min(group & -group, MAX_TILE)
