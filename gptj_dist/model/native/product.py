"""Products by the compiled library. For CPUs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from gptj_dist.model.native.library import NativeFunction, Product
from gptj_dist.model.native.memory import memory_of
from gptj_dist.model.native.operands import address_of

COLUMNS = 32
"""Outputs of a panel, as the library has them."""

ELEMENTS = (torch.float32, torch.bfloat16)
"""The types of rows, in the order of the library's `enum element`."""


class NativeProduct:
    """`x @ weight.T + bias`, as `model.linear.Linear`. A row has the same bits whatever rows are beside it.

    `x` is [rows, in_features] and `residual` [rows, out_features], of the type of `dtype`, both in memory of the CPU.
    The elements of a row lie side by side; rows may lie apart, as in a slice of columns. Every call raises TypeError
    for a tensor of another type or on a GPU, ValueError for another shape, stride or alignment, and MemoryError if
    there is no memory for its scratch space.

    Args:
        size_of, pack, multiply: the library's functions for this kind of weight.
        product: all about the weight but where it is.
        source: the weight's address; it is copied.
        bias: [out_features], or None for none.

    Raises:
        TypeError: the bias is of another type, or on a GPU.
        ValueError: the bias does not fit the weight.
    """

    def __init__(
        self,
        size_of: NativeFunction,
        pack: NativeFunction,
        multiply: NativeFunction,
        product: Product,
        source: int,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._dtype = dtype
        self._num_columns: int = product.num_columns
        self._depth: int = product.depth
        self._bias = None if bias is None else bias.contiguous()
        if self._bias is not None:
            product.bias = address_of("bias", self._bias, dtype, (self._num_columns,))
        self._packed = memory_of(size_of(product))
        product.weight = self._packed.data_ptr()
        product.element = ELEMENTS.index(dtype)
        pack(product, source, torch.get_num_threads())
        self._template = product
        self._multiply = multiply

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
        product = Product.from_buffer_copy(self._template)
        product.num_rows = num_rows
        product.x_stride = x.stride(0)
        rows = address_of("x", x, self._dtype, (num_rows, self._depth))
        added = None
        if residual is not None:
            product.residual_stride = residual.stride(0)
            added = address_of("residual", residual, self._dtype, (num_rows, self._num_columns))
        out = x.new_empty(num_rows, self._num_columns)
        if self._multiply(product, rows, added, has_gelu, out.data_ptr(), torch.get_num_threads()):
            raise MemoryError(f"no memory for a product of {num_rows} rows")
        return out


class NativeLinear(NativeProduct):
    """`NativeProduct` with a weight in bfloat16.

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
        super().__init__(
            library.size_of_bfloat16,
            library.pack_bfloat16,
            library.multiply_bfloat16,
            Product(num_columns=num_columns, depth=depth),
            address_of("weight", weight, torch.bfloat16, (num_columns, depth)),
            bias,
            torch.bfloat16,
        )


class NativeLowBitLinear(NativeProduct):
    """`NativeProduct` with a weight of 8 or 4 bits a number, and scales for groups of columns.

    Rows of bfloat16 are rounded to integers of 8 bits, with a scale for each 64 numbers (32 if groups are no multiple
    of 64): an error of at most 1/254 of the largest of them. Rows of float32 are rounded to 24 bits, so that the
    result is as good as that of a product in float32 with the numbers that the bits stand for.

    Args:
        bits: 8 or 4.
        values: int8 [out_features, in_features], or uint8 [out_features, in_features / 2] with the even column in the
            lower half of a byte, and 8 added. On the CPU; copied, in the library's order.
        scales: float32 [out_features, num_groups], on the CPU.
        offsets: float32 of the same shape, added to each number of a group; None for none.
        bias: [out_features], of type `dtype`, or None for none.
        dtype: of the rows and the result, float32 or bfloat16.

    Raises:
        TypeError, ValueError: as `NativeLinear` does; `has_groups` is False.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        bits: int,
        values: Tensor,
        scales: Tensor,
        offsets: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        num_columns, depth = values.shape[0], values.shape[1] * 8 // bits
        group = depth // scales.shape[1]
        if not has_groups(depth, group):
            raise ValueError(f"groups must be whole rows, or a multiple of 32 columns, got {group} of {depth} columns")
        values = values.contiguous()
        product = Product(num_columns=num_columns, depth=depth, bits=bits, group=group)
        address_of("scales", scales.contiguous(), torch.float32, (num_columns, scales.shape[1]))
        self._scales = in_panels(scales)
        product.scales = self._scales.data_ptr()
        if offsets is not None:
            address_of("offsets", offsets.contiguous(), torch.float32, tuple(scales.shape))
        self._offsets = None if offsets is None else in_panels(offsets)
        if self._offsets is not None:
            product.offsets = self._offsets.data_ptr()
        super().__init__(
            library.size_of_low_bit,
            library.pack_low_bit,
            library.multiply_low_bit,
            product,
            address_of("values", values, torch.int8 if bits == 8 else torch.uint8, (num_columns, depth * bits // 8)),
            bias,
            dtype,
        )


def has_groups(depth: int, group: int) -> bool:
    """Whether `NativeLowBitLinear` multiplies rows of `depth` numbers in groups of `group`."""
    return group == depth or (group % 32 == 0 and depth % group == 0)


def in_panels(numbers: Tensor) -> Tensor:
    """[out_features, n] as [panel, n, COLUMNS], with zeros for outputs that there are not. Copies."""
    padded = functional.pad(numbers, (0, 0, 0, -len(numbers) % COLUMNS))
    return padded.reshape(-1, COLUMNS, numbers.shape[1]).transpose(1, 2).contiguous()
