"""Weights of few bits: near to what they stand for, and products with the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptj_dist.model.quantized import QuantizedWeight, dequantize, empty_weight, make_quantized_linear, quantize
from gptj_dist.quantization import Bits

pytestmark = pytest.mark.usefixtures("restored_threads")

MAX_ROWS = 65
CPU = torch.device("cpu")

all_bits = pytest.mark.parametrize("bits", [4, 8])


def _operands(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias, of which a product is about 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MAX_ROWS, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return x, weight, torch.randn(rows, generator=generator)


@all_bits
def test_each_number_is_the_nearest_that_its_group_can_hold(bits: Bits) -> None:
    weight = _operands(75, 192)[1]
    made = quantize(weight, bits)
    error = (dequantize(made) - weight).abs().view(75, -1, made.group)
    # With 4 bits the number opposite to a group's largest may be 8 steps off 0, where 7 are the most.
    half_a_step = made.scales.abs().unsqueeze(2) / 2
    assert bool((error <= half_a_step * (1.001 if bits == 8 else 2.05)).all())
    assert float(error.mean()) < float(half_a_step.mean()) * 0.55


@all_bits
def test_columns_share_scales_in_groups(bits: Bits) -> None:
    made = quantize(torch.randn(6, 192), bits)
    assert made.shape == (6, 192)
    assert made.group == {4: 64, 8: 192}[bits]
    assert quantize(torch.randn(6, 192), bits, group=32).scales.shape == (6, 6)
    assert made.values.nbytes == 6 * 192 * bits // 8


@all_bits
def test_nothing_but_zeros_stays_so(bits: Bits) -> None:
    assert torch.equal(dequantize(quantize(torch.zeros(3, 64), bits)), torch.zeros(3, 64))


def test_half_bytes_hold_even_columns_below_odd_ones() -> None:
    values = torch.tensor([[0x80, 0xF1]], dtype=torch.uint8)
    made = QuantizedWeight(4, values, torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 0.0]]))
    assert dequantize(made).tolist() == [[2.0 * -8 + 1, 1.0, 0.5 * -7, 0.5 * 7]]


def test_what_does_not_fit_together_is_refused() -> None:
    values, scales = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 2)
    for kind, arguments in (
        ("scales", (8, values, torch.ones(3, 2))),
        ("scales", (8, values, torch.ones(4, 3))),
        ("float32", (8, values, scales.bfloat16())),
        ("uint8", (4, values, scales)),
        ("offsets", (8, values, scales, torch.ones(4, 1))),
    ):
        with pytest.raises(ValueError, match=kind):
            QuantizedWeight(*arguments)
    with pytest.raises(ValueError, match="75 columns are no whole number of groups of 64"):
        quantize(torch.ones(4, 75), 4)
    assert quantize(torch.ones(4, 75), 8).group == 75
    assert empty_weight(4, 128, 4, 64, CPU, has_offsets=True).offsets is not None


@all_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_numbers(bits: Bits, dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.to(dtype) for tensor in _operands(173, 128))
    residual = torch.randn(MAX_ROWS, 173).to(dtype)
    made = quantize(weight, bits)
    expected = functional.linear(x.double(), dequantize(made).double(), bias.double())
    product = make_quantized_linear(made, bias, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}[dtype]
    for num_rows in (0, 1, 2, 17, MAX_ROWS):
        for actual, right in (
            (product(x[:num_rows]), expected),
            (product.gelu(x[:num_rows]), functional.gelu(expected, approximate="tanh")),
            (product.add(x[:num_rows], residual[:num_rows]), expected + residual.double()),
        ):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), right[:num_rows], atol=tolerance, rtol=tolerance)


@all_bits
@pytest.mark.parametrize(("rows", "columns"), [(300, 4096), (173, 192)])
def test_a_row_has_the_same_bits_in_any_company(bits: Bits, rows: int, columns: int) -> None:
    """Of all three products in float32, with 1 and 2 threads, as the first row of many and as the last."""
    x, weight, bias = _operands(rows, columns)
    residual = torch.randn(MAX_ROWS, rows)
    product = make_quantized_linear(quantize(weight, bits), bias, torch.float32)
    torch.set_num_threads(1)
    expected = product(x), product.gelu(x), product.add(x, residual)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in (*range(1, 20), 31, 32, 33, 63, 64, 65):
            for some in (slice(0, num_rows), slice(MAX_ROWS - num_rows, MAX_ROWS)):
                actual = product(x[some]), product.gelu(x[some]), product.add(x[some], residual[some])
                for ours, theirs in zip(actual, expected, strict=True):
                    assert torch.equal(ours, theirs[some]), f"{num_rows} rows, {num_threads} threads"
