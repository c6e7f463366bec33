"""Products in bfloat16 by the compiled library. For CPUs."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from gptj_dist.model.native.library import Product
from gptj_dist.model.native.operands import address_of

HUGE_PAGE_BYTES = 2 << 20


class NativeLinear:
    """`x @ weight.T + bias` in bfloat16, as `model.linear.Linear`. A row has the same bits whatever rows are beside it.

    `x` is bfloat16 [rows, in_features] and `residual` bfloat16 [rows, out_features], both in memory of the CPU. The
    elements of a row lie side by side; rows may lie apart, as in a slice of columns. Every call raises TypeError for a
    tensor of another type or on a GPU, ValueError for another shape, stride or alignment, and MemoryError if there is
    no memory for its scratch space.

    Args:
        weight: bfloat16 [out_features, in_features], on the CPU; copied, in the library's order.
        bias: bfloat16 [out_features], on the CPU, or None for none.

    Raises:
        TypeError: the weight or the bias is of another type, or on a GPU.
        ValueError: the weight is not a matrix, or the bias does not fit it.
    """

    def __init__(self, library: ctypes.CDLL, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2:
            raise ValueError(f"weight must be a matrix, got the shape {tuple(weight.shape)}")
        num_columns, depth = weight.shape
        weight = weight.contiguous()
        source = address_of("weight", weight, torch.bfloat16, (num_columns, depth))
        self._packed = _memory_of(library.packed_size(num_columns, depth))
        library.pack_bfloat16(source, self._packed.data_ptr(), num_columns, depth, torch.get_num_threads())
        self._bias = None if bias is None else bias.contiguous()
        self._bias_address = None
        if self._bias is not None:
            self._bias_address = address_of("bias", self._bias, torch.bfloat16, (num_columns,))
        self._num_columns = num_columns
        self._depth = depth
        self._multiply = library.multiply_bfloat16

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out_features]."""
        return self._product(x)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product, in its tanh form."""
        return self._product(x, has_gelu=True)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual`."""
        return self._product(x, residual)

    def _product(self, x: Tensor, residual: Tensor | None = None, has_gelu: bool = False) -> Tensor:
        num_rows = x.shape[0]
        rows = address_of("x", x, torch.bfloat16, (num_rows, self._depth))
        added = None
        if residual is not None:
            added = address_of("residual", residual, torch.bfloat16, (num_rows, self._num_columns))
        out = x.new_empty(num_rows, self._num_columns)
        product = Product(
            num_rows=num_rows,
            num_columns=self._num_columns,
            depth=self._depth,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            weight=self._packed.data_ptr(),
            bias=self._bias_address,
        )
        if self._multiply(product, rows, added, has_gelu, out.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for a product of {num_rows} rows")
        return out


def _memory_of(num_elements: int) -> Tensor:
    """bfloat16 memory, [num_elements], at a multiple of 64 bytes. In pages of 2 MB if it fills one and there are any.

    A decode step reads all weights once. In pages of 4 KB it waits for their addresses for a sixth of its time or more.
    """
    element_bytes = torch.bfloat16.itemsize
    if num_elements * element_bytes < HUGE_PAGE_BYTES:
        return torch.empty(num_elements, dtype=torch.bfloat16)
    memory = mmap.mmap(-1, num_elements * element_bytes + HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    elements = torch.frombuffer(memory, dtype=torch.bfloat16)
    begin = -elements.data_ptr() % HUGE_PAGE_BYTES // element_bytes
    return elements[begin : begin + num_elements]
