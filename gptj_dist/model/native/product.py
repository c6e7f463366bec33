"""Products in bfloat16 by the compiled library. For CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gptj_dist.model.native.library import Product

CACHE_LINE = 64
"""Bytes."""


class NativeLinear:
    """A `model.linear.Linear` of a bfloat16 weight that the library packs. A row's bits depend on no other row.

    Raises:
        ValueError: the weight or the bias is not bfloat16 on a CPU, or their shapes do not fit.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> None:
        num_columns, depth = weight.shape
        _require_rows("weight", weight, num_columns, depth)
        if bias is not None:
            _require_rows("bias", bias[None], 1, num_columns)
        weight = weight.contiguous()
        self._packed = _aligned(library.packed_size(num_columns, depth))
        library.pack_bfloat16(weight.data_ptr(), self._packed.data_ptr(), num_columns, depth, torch.get_num_threads())
        self._bias = None if bias is None else bias.contiguous()
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
        """[rows, depth] -> [rows, num_columns].

        Raises:
            ValueError: the library would read what is not there, or read it as another type.
            MemoryError: there is no memory for the rows.
        """
        rows = len(x)
        _require_rows("rows", x, rows, self._depth)
        if residual is not None:
            _require_rows("residual", residual, rows, self._num_columns)
        out = x.new_empty(rows, self._num_columns)
        product = Product(
            num_rows=rows,
            num_columns=self._num_columns,
            depth=self._depth,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            weight=self._packed.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
        )
        others = None if residual is None else residual.data_ptr()
        if self._multiply(product, x.data_ptr(), others, has_gelu, out.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for a product of {rows} rows")
        return out


def _aligned(num_elements: int) -> Tensor:
    """bfloat16 memory that begins at a cache line, as the library's loads need."""
    memory = torch.empty(num_elements + CACHE_LINE // 2, dtype=torch.bfloat16)
    begin = -memory.data_ptr() % CACHE_LINE // 2
    return memory[begin : begin + num_elements]


def _require_rows(name: str, tensor: Tensor, rows: int, columns: int) -> None:
    """Raises ValueError unless it is bfloat16 [rows, columns] on a CPU, each row without gaps."""
    is_bfloat16 = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
    if not is_bfloat16 or tensor.shape != (rows, columns) or (columns > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name}: must be bfloat16 [{rows}, {columns}] on a CPU with rows in one piece, got {tensor.dtype} "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
