"""The GPU's product with few bits is that with the numbers that they stand for, for any rows, groups and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from gptj_dist.model.low_bit_triton import TritonLowBitLinear, can_multiply
from gptj_dist.model.quantized import DequantizingLinear, QuantizedWeight, dequantize, quantize
from gptj_dist.quantization import MAX_LOW_BIT_ROWS, Bits
from tests.kernel_device import DEVICE, MATRIX_DTYPES

NUM_OUT = 75
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of values of about 1."""
CASES: list[tuple[Bits, int, int]] = [(8, 192, 192), (8, 96, 16), (4, 192, 64), (4, 96, 32), (4, 512, 256)]
"""Bits, inputs, and inputs that share a scale."""
cases = pytest.mark.parametrize(("bits", "num_in", "group"), CASES)


def _operands(bits: Bits, num_in: int, group: int, dtype: torch.dtype) -> tuple[Tensor, QuantizedWeight, Tensor]:
    """Rows, weight and bias, of which a product is about 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MAX_LOW_BIT_ROWS + 1, num_in, generator=generator)
    weight = torch.randn(NUM_OUT, num_in, generator=generator) / num_in**0.5
    bias = torch.randn(NUM_OUT, generator=generator)
    return x.to(DEVICE, dtype), quantize(weight.to(DEVICE), bits, group), bias.to(DEVICE, dtype)


def _linear(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> TritonLowBitLinear:
    many = DequantizingLinear(weight, bias, dtype)
    return TritonLowBitLinear(many, weight.bits, weight.values, weight.scales, weight.offsets, bias)


@cases
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_the_product_is_that_with_the_numbers(bits: Bits, num_in: int, group: int, dtype: torch.dtype) -> None:
    x, weight, bias = _operands(bits, num_in, group, dtype)
    linear = _linear(weight, bias, dtype)
    expected = functional.linear(x.float(), dequantize(weight), bias.float())
    for num_rows in (1, 2, 17, MAX_LOW_BIT_ROWS, MAX_LOW_BIT_ROWS + 1):
        result = linear(x[:num_rows])
        assert result.dtype == dtype
        assert float((result.float() - expected[:num_rows]).abs().max()) < TOLERANCES[dtype]


@cases
def test_offsets_gelu_residuals_and_rows_that_lie_apart(bits: Bits, num_in: int, group: int) -> None:
    x, plain, bias = _operands(bits, num_in, group, torch.float32)
    weight = QuantizedWeight(bits, plain.values, plain.scales, torch.randn_like(plain.scales) / num_in)
    product = functional.linear(x, dequantize(weight))
    wide = torch.cat((x, x), dim=1)[:, :num_in]
    for num_rows in (1, 5):
        apart, expected = wide[:num_rows], product[:num_rows]
        torch.testing.assert_close(_linear(weight, None, torch.float32)(apart), expected, atol=1e-5, rtol=0)
        linear = _linear(weight, bias, torch.float32)
        gelu = functional.gelu(expected + bias, approximate="tanh")
        torch.testing.assert_close(linear.gelu(apart), gelu, atol=1e-5, rtol=0)
        residual = torch.ones_like(expected)
        torch.testing.assert_close(linear.add(apart, residual), expected + bias + 1, atol=1e-5, rtol=0)


def test_groups_without_a_kernel_are_known() -> None:
    assert [can_multiply(8, group) for group in (896, 16, 24)] == [True, True, False]
    assert [can_multiply(4, group) for group in (64, 32, 48)] == [True, True, False]
    weight = quantize(torch.randn(4, 48), 4, 48)
    with pytest.raises(ValueError, match="groups of 48 numbers of 4 bits"):
        _linear(weight, None, torch.float32)
