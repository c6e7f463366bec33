"""Checks tensors before the compiled library gets their addresses: the library itself reads whatever lies there."""

from __future__ import annotations

import torch
from torch import Tensor


def address_of(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a tensor in memory of the CPU. The elements of a row must lie side by side; rows may lie apart.

    Args:
        name: of the tensor, for errors.
        shape: the shape that the library assumes; the first dimension counts the rows.

    Raises:
        TypeError: the tensor is of another type, or on a GPU.
        ValueError: the tensor has another shape, a row with gaps, or an address between two elements.
    """
    if tensor.dtype is not dtype or not tensor.is_cpu:
        raise TypeError(f"{name} must be {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous() and not _has_dense_rows(tensor):
        raise ValueError(f"{name} must have rows without gaps, got the strides {tensor.stride()}")
    address = tensor.data_ptr()
    if address % dtype.itemsize:
        raise ValueError(f"{name} must be aligned to {dtype.itemsize} bytes, got the address {address:#x}")
    return address


def _has_dense_rows(tensor: Tensor) -> bool:
    """Whether the elements of each row lie side by side."""
    dense = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()), strict=False):
        if size > 1 and stride != dense:
            return False
        dense *= size
    return True
