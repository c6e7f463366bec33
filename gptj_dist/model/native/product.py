"""Products in bfloat16 by the compiled library. For CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gptj_dist.model.native.library import Product


class NativeLinear:
    """As `model.linear.Linear`, of a bfloat16 weight that the library packs. Rows have the same bits in any company."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> None:
        num_columns, depth = weight.shape
        weight = weight.contiguous()
        self._packed = torch.empty(library.packed_size(num_columns, depth), dtype=torch.bfloat16)
        library.pack_bfloat16(weight.data_ptr(), self._packed.data_ptr(), num_columns, depth, torch.get_num_threads())
        self._bias = bias
        self._num_columns = num_columns
        self._depth = depth
        self._multiply = library.multiply_bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def gelu(self, x: Tensor) -> Tensor:
        return self._product(x, has_gelu=True)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._product(x, residual)

    def _product(self, x: Tensor, residual: Tensor | None = None, has_gelu: bool = False) -> Tensor:
        """Raises ValueError if a shape does not fit: the library would read what is not there."""
        rows, depth = x.shape
        if depth != self._depth or (residual is not None and residual.shape != (rows, self._num_columns)):
            raise ValueError(
                f"rows {tuple(x.shape)} or their residual do not fit a weight of {self._num_columns} x {self._depth}"
            )
        out = x.new_empty(rows, self._num_columns)
        product = Product(
            num_rows=rows,
            num_columns=self._num_columns,
            depth=depth,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            weight=self._packed.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
        )
        others = None if residual is None else residual.data_ptr()
        if self._multiply(product, x.data_ptr(), others, has_gelu, out.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for a product of {rows} rows")
        return out
