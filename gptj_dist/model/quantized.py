"""Weights of 8 or 4 bits a number: how they are made, what they stand for, and the product with them.

Each row of a matrix is cut into groups of columns, and each group has its own scale. Numbers are `values * scale`, or
`values * scale + offset`. With 8 bits a row is one group, so that a scale belongs to an output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptj_dist.model.linear import Linear, make_linear
from gptj_dist.model.native.library import load_low_bit_library
from gptj_dist.model.native.product import ELEMENTS, NativeLowBitLinear, has_groups
from gptj_dist.quantization import Bits, default_group

_ZERO_OF_INT4 = 8
"""What stands for 0 in a half byte: -8 to 7 are stored as 0 to 15."""

_RANGE_OF: Mapping[Bits, tuple[int, int]] = {8: (-127, 127), 4: (-8, 7)}

_BLOCK_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Numbers that are made of their bits at a time, by the kind of device: what a core's cache holds as float32, or about
as much as a layer's largest matrix has."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [out_features, in_features] of few bits.

    Args:
        values: int8 [out_features, in_features] for 8 bits. For 4 bits uint8 [out_features, in_features / 2]: the lower
            half of a byte is the even column, and a half byte h stands for h - 8.
        scales: float32 [out_features, num_groups]; the groups are equally long.
        offsets: float32 of the same shape, added to each number of a group; None for none.

    Raises:
        ValueError: shapes or types do not fit each other.
    """

    bits: Bits
    values: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        dtype = torch.int8 if self.bits == 8 else torch.uint8
        if self.values.dtype != dtype or self.scales.dtype != torch.float32:
            raise ValueError(f"{self.bits} bits are {dtype} with float32 scales, not {self.values.dtype}")
        if self.scales.dim() != 2 or len(self.scales) != rows or columns % self.scales.shape[1]:
            raise ValueError(f"scales {list(self.scales.shape)} do not fit a matrix {[rows, columns]}")
        if self.offsets is not None and (self.offsets.shape, self.offsets.dtype) != (self.scales.shape, torch.float32):
            raise ValueError("offsets must be as the scales are")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of the matrix."""
        rows, columns = self.values.shape
        return rows, columns if self.bits == 8 else 2 * columns

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The rows [start, stop), in the same memory."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return QuantizedWeight(self.bits, self.values[start:stop], self.scales[start:stop], offsets)


def empty_weight(
    rows: int, columns: int, bits: Bits, group: int, device: torch.device, has_offsets: bool = False
) -> QuantizedWeight:
    """Memory for a matrix, to be filled.

    Args:
        group: columns that share a scale.

    Raises:
        ValueError: the columns are no whole number of groups.
    """
    if columns % group:
        raise ValueError(f"{columns} columns are no whole number of groups of {group}")
    values = torch.empty(rows, columns * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device=device)
    scales = torch.empty(rows, columns // group, device=device)
    return QuantizedWeight(bits, values, scales, torch.empty_like(scales) if has_offsets else None)


def quantize(weight: Tensor, bits: Bits, group: int | None = None) -> QuantizedWeight:
    """The matrix in few bits: each number is the nearest that its group can hold. Needs little memory beside that.

    Args:
        weight: [out_features, in_features], of any floating-point type.
        group: columns that share a scale; None means a row for 8 bits and 64 columns for 4.

    Raises:
        ValueError: the columns are no whole number of groups.
    """
    rows, columns = weight.shape
    group = group or default_group(columns, bits)
    made = empty_weight(rows, columns, bits, group, weight.device)
    for start, stop in _blocks(rows, columns, weight.device):
        numbers = weight[start:stop].float().reshape(-1, columns // group, group)
        scales = _scales(numbers, bits)
        steps = (numbers / scales.unsqueeze(2)).nan_to_num_(0.0).round_().clamp_(*_RANGE_OF[bits])
        made.scales[start:stop] = scales
        steps = steps.flatten(1)
        if bits == 8:
            made.values[start:stop] = steps
        else:
            halves = steps.add_(_ZERO_OF_INT4).to(torch.uint8)
            made.values[start:stop] = halves[:, ::2] | halves[:, 1::2] << 4
    return made


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The matrix that the bits stand for: float32 [out_features, in_features]."""
    values = weight.values
    if weight.bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=2).flatten(1)
    numbers = values.to(torch.float32).view(*weight.scales.shape, weight.group)
    if weight.bits == 4:
        numbers -= _ZERO_OF_INT4
    numbers *= weight.scales.unsqueeze(2)
    if weight.offsets is not None:
        numbers += weight.offsets.unsqueeze(2)
    return numbers.view(weight.shape)


def make_quantized_linear(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The fastest product on the weight's device.

    Args:
        bias: [out_features], of the type of `dtype`, or None for none.
        dtype: of the rows that it is given, and of the result.
    """
    parts = (weight.bits, weight.values, weight.scales, weight.offsets, bias)
    if weight.values.is_cuda:
        from gptj_dist.model.low_bit_triton import TritonLowBitLinear, can_multiply

        many = DequantizingLinear(weight, bias, dtype)
        return TritonLowBitLinear(many, *parts) if can_multiply(weight.bits, weight.group) else many
    library = load_low_bit_library() if dtype in ELEMENTS else None
    if library is None or not has_groups(weight.shape[1], weight.group):
        return DequantizingLinear(weight, bias, dtype)
    return NativeLowBitLinear(library, *parts, dtype)


class DequantizingLinear:
    """Makes numbers of some outputs' bits, multiplies with them, and goes on with the next outputs. For any device.

    Each block is the product of `make_linear`, so a row has the same bits whatever rows are beside it where those
    have.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight
        self._bias = bias
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product, _ in self._products()], dim=1)

    def gelu(self, x: Tensor) -> Tensor:
        return torch.cat([product.gelu(x) for product, _ in self._products()], dim=1)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.cat([product.add(x, residual[:, columns]) for product, columns in self._products()], dim=1)

    def _products(self) -> Iterator[tuple[Linear, slice]]:
        """The product of each block, and its outputs."""
        for start, stop in _blocks(*self._weight.shape, self._weight.values.device):
            numbers = dequantize(self._weight.rows(start, stop)).to(self._dtype)
            yield make_linear(numbers, None if self._bias is None else self._bias[start:stop]), slice(start, stop)


class QuantizedEmbedding:
    """Rows of a matrix of few bits.

    Args:
        dtype: of the rows that it returns.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self._weight = weight
        self._dtype = dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [rows] -> [rows, in_features]."""
        weight = self._weight
        offsets = None if weight.offsets is None else weight.offsets[token_ids]
        rows = QuantizedWeight(weight.bits, weight.values[token_ids], weight.scales[token_ids], offsets)
        return dequantize(rows).to(self._dtype)


def _scales(numbers: Tensor, bits: Bits) -> Tensor:
    """The scale of each group of numbers [rows, num_groups, group].

    The largest number of a group is stored as -127 or 127 of 8 bits. With 4 bits it is stored as -8, whatever its sign:
    the scale has the other sign. Such a scale is rounded to bfloat16, so that it can be kept in two bytes.
    """
    if bits == 8:
        return numbers.abs().amax(2) / 127
    largest = numbers.gather(2, numbers.abs().argmax(2, keepdim=True)).squeeze(2)
    return (largest / -8).bfloat16().float()


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are handled at a time."""
    step = max(1, _BLOCK_NUMBERS.get(device.type, _BLOCK_NUMBERS["cpu"]) // columns)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
