"""Products with a weight matrix, which is packed once on a CPU and plain on other devices.

A CPU's product reorders the weight on every call unless it is packed: packing makes one row 2.4 times as fast. Packed
products also apply GELU or add a residual while the result is still in registers. Each row of their result has the same
bits whatever rows are beside it (with oneDNN in float32, if there are two rows or more). The exact mode relies on that.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_dist.model.native.library import load_product_library
from gptj_dist.model.native.product import NativeLinear

PACKING_ROWS_HINT = 32
"""The number of rows that oneDNN chooses its layout for. The layout decides the order of sums, so it is a constant."""


class Linear(Protocol):
    """`x @ weight.T + bias` for x of shape [rows, in_features]."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out_features]."""

    def gelu(self, x: Tensor) -> Tensor:
        """GELU of the product, in its tanh form; Hendrycks & Gimpel 2016."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The product plus `residual` [rows, out_features]."""


def make_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest product on the weight's device.

    Args:
        weight: [out_features, in_features]. If `can_pack`, it is copied, and the caller may reuse its memory.
        bias: [out_features], or None for none.
    """
    if not can_pack(weight.device, weight.dtype):
        return PlainLinear(weight, bias)
    library = load_product_library() if weight.dtype == torch.bfloat16 else None
    return PackedLinear(weight, bias) if library is None else NativeLinear(library, weight, bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `make_linear` packs weights of this type on this device, that is, copies them."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16 and load_product_library() is not None:
        return True
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PlainLinear:
    """Torch's product with a plain weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(self(x), approximate="tanh")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self(x)


class PackedLinear:
    """OneDNN's product with a packed weight.

    Torch's operators for it are private (its compiler uses them), so all uses are in this file. `_op` is the operator
    without its Python wrapper, which takes a twentieth of a small product's time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS_HINT)
        self._bias = bias
        self._needs_two_rows = weight.dtype == torch.float32
        self._product = torch.ops.mkldnn._linear_pointwise.default._op
        self._sum = torch.ops.mkldnn._linear_pointwise.binary._op

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return self._multiply(x, "gelu")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._needs_two_rows and x.shape[0] == 1:
            return self._multiply_add(_twice(x), _twice(residual))[:1]
        return self._multiply_add(x, residual)

    def _multiply(self, x: Tensor, then: str) -> Tensor:
        if self._needs_two_rows and x.shape[0] == 1:
            return self._multiply(_twice(x), then)[:1]
        product: Tensor = self._product(x, self._weight, self._bias, then, [], "tanh")
        return product

    def _multiply_add(self, x: Tensor, residual: Tensor) -> Tensor:
        product: Tensor = self._sum(x, residual, self._weight, self._bias, "add")
        return product


def _twice(x: Tensor) -> Tensor:
    return torch.cat((x, x))
