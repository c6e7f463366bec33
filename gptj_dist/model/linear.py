"""One weight matrix, ready to multiply: packed once for the CPU's matrix library, plain elsewhere.

oneDNN reorders a weight on every call unless it is packed beforehand; packing makes one row 2.4 times as fast. It also
applies GELU or adds a residual while a product is still in registers. The packed product has a further virtue: in
float32 each row of the result has the same bits whatever rows are beside it, as long as there are at least two. That
is what the exact mode is built on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PACKING_ROWS_HINT = 32
"""The number of rows the packed layout is made for; one value for all, because the layout decides the order of sums."""


class Linear:
    """`x @ weight.T + bias` for x of shape [rows, in_features].

    Args:
        weight: [out_features, in_features]; where it is packed, the caller may reuse its memory afterwards.
        bias: [out_features], or None for none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._bias = bias
        self._is_packed = can_pack(weight.device, weight.dtype)
        self._weight = _pack(weight) if self._is_packed else weight
        self._needs_two_rows = self._is_packed and weight.dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, "none") if self._is_packed else F.linear(x, self._weight, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product, in its tanh form; Hendrycks & Gimpel 2016."""
        return self._multiply(x, "gelu") if self._is_packed else F.gelu(self(x), approximate="tanh")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual` [rows, out_features]."""
        if not self._is_packed:
            return residual + self(x)
        if self._needs_two_rows and len(x) == 1:
            return self._multiply_add(_twice(x), _twice(residual))[:1]
        return self._multiply_add(x, residual)

    def _multiply(self, x: Tensor, then: str) -> Tensor:
        if self._needs_two_rows and len(x) == 1:
            return self._multiply(_twice(x), then)[:1]
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, then, [], "tanh")
        return product

    def _multiply_add(self, x: Tensor, residual: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return product


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine's matrix library packs weights of this device and type, into memory of their own.

    The operators are private to torch (its compiler emits them), so every use of them is in this file.
    """
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS_HINT)
    return packed


def _twice(x: Tensor) -> Tensor:
    return x.expand(2, -1).contiguous()
