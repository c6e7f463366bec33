"""Compiled products with weights of 8 and 4 bits: within the stated error; a row has the same bits in any company."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptj_dist.model import quantized
from gptj_dist.model.native.library import load_low_bit_library
from gptj_dist.model.native.product import NativeLowBitLinear, NativeProduct
from gptj_dist.model.quantized import DequantizingLinear, QuantizedWeight, dequantize, make_quantized_linear
from gptj_dist.quantization import Bits

NUM_ROWS = 150
CASES: list[tuple[Bits, int, int, int]] = [
    (8, 96, 128, 128), (8, 75, 173, 173), (8, 7, 1, 1), (8, 40, 96, 32), (8, 33, 2100, 2100), (8, 64, 256, 128),
    (4, 96, 128, 64), (4, 75, 192, 32), (4, 33, 70, 70), (4, 40, 512, 256), (4, 64, 4160, 64), (4, 32, 96, 96),
]  # fmt: skip
"""Bits, outputs, inputs, and inputs that share a scale."""
DTYPES = (torch.float32, torch.bfloat16)

pytestmark = [
    pytest.mark.usefixtures("restored_threads"),
    pytest.mark.skipif(load_low_bit_library() is None, reason="this CPU has no such product"),
]
cases = pytest.mark.parametrize(("bits", "num_out", "num_in", "group"), CASES)


def _weight(bits: Bits, num_out: int, num_in: int, group: int, has_offsets: bool = False) -> QuantizedWeight:
    """Any bits there can be, so that a product is about 1."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (num_out, num_in * bits // 8), generator=generator, dtype=torch.uint8)
    scales = torch.randn(num_out, num_in // group, generator=generator) / (num_in**0.5 * (64 if bits == 8 else 4))
    offsets = torch.randn(scales.shape, generator=generator) / num_in**0.5 if has_offsets else None
    return QuantizedWeight(bits, values.view(torch.int8) if bits == 8 else values, scales, offsets)


def _rows(num_in: int, dtype: torch.dtype) -> Tensor:
    """Rows with a few large numbers."""
    rows = torch.randn(NUM_ROWS, num_in, generator=torch.Generator().manual_seed(1))
    return rows.mul_(torch.where(rows > 2.5, 30.0, 1.0)).to(dtype)


def _product(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> NativeProduct:
    product = make_quantized_linear(weight, bias, dtype)
    assert isinstance(product, NativeLowBitLinear)
    return product


def _largest_errors(x: Tensor, matrix: Tensor, group: int) -> Tensor:
    """What a product may be off by before its last rounding: by that of `x`, and by sums in float32."""
    num_in = x.shape[1]
    fold = 32 if group % 64 and group < num_in else 64
    padded = functional.pad(x.double().abs(), (0, -num_in % fold)).view(len(x), -1, fold)
    steps = (padded.amax(2, keepdim=True) / (254 if x.dtype == torch.bfloat16 else 2 * 8355000)).expand(padded.shape)
    return 1.01 * steps.flatten(1)[:, :num_in] @ matrix.abs().T + 2**-21 * x.double().abs() @ matrix.abs().T


@cases
@pytest.mark.parametrize("has_offsets", [False, True])
def test_products_are_within_the_stated_error(
    bits: Bits, num_out: int, num_in: int, group: int, has_offsets: bool
) -> None:
    weight = _weight(bits, num_out, num_in, group, has_offsets)
    matrix = dequantize(weight).double()
    for dtype in DTYPES:
        x = _rows(num_in, dtype)
        bias = torch.randn(num_out, generator=torch.Generator().manual_seed(2)).to(dtype)
        residual = torch.randn(NUM_ROWS, num_out + 3, generator=torch.Generator().manual_seed(3)).to(dtype)[:, 3:]
        expected = x.double() @ matrix.T + bias.double()
        errors = _largest_errors(x, matrix, group)
        product = _product(weight, bias, dtype)
        rounding = torch.finfo(dtype).eps
        for num_rows in (1, 2, 3, 8, 9, 17, NUM_ROWS):
            rows = slice(0, num_rows)
            for actual, right in (
                (product(x[rows]), expected[rows]),
                (product.gelu(x[rows]), functional.gelu(expected[rows], approximate="tanh")),
                (product.add(x[rows], residual[rows]), expected[rows] + residual[rows].double()),
            ):
                assert actual.dtype == dtype
                off = (actual.double() - right).abs() - 1.13 * errors[rows] - rounding * right.abs()  # GELU's slope
                assert off.max() < 4e-6


@cases
def test_a_row_has_the_same_bits_in_any_company(bits: Bits, num_out: int, num_in: int, group: int) -> None:
    weight = _weight(bits, num_out, num_in, group, has_offsets=True)
    for dtype in DTYPES:
        x = _rows(num_in, dtype)
        product = _product(weight, None, dtype)
        torch.set_num_threads(1)
        expected = product(x)
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for num_rows in (*range(1, 20), 31, 70, 144, 145):
                first = 37 * num_rows % (NUM_ROWS + 1 - num_rows)
                rows = slice(first, first + num_rows)
                assert torch.equal(product(x[rows]), expected[rows]), f"{num_rows} rows, {num_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_cut_out_of_a_wider_tensor_have_the_same_bits(dtype: torch.dtype) -> None:
    x = _rows(192, dtype)
    wide = torch.zeros(NUM_ROWS, 300, dtype=dtype)
    wide[:, 100:292] = x
    product = _product(_weight(4, 75, 192, 64), None, dtype)
    for num_rows in (1, 2, 9, NUM_ROWS):
        assert torch.equal(product(wide[:num_rows, 100:292]), product(x)[:num_rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_neighbours_that_are_not_numbers_do_not_reach_a_row(bits: Bits, dtype: torch.dtype) -> None:
    product = _product(_weight(bits, 96, 128, 64), None, dtype)
    x = _rows(128, dtype)[:4]
    expected = product(x)
    x[2, 5] = float("nan")
    x[3, 100] = float("inf")
    actual = product(x)
    assert torch.equal(actual[:2], expected[:2])
    assert not actual[2:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_the_smallest_numbers_are_nothing(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 128, dtype=dtype)
    x[1] = 1e-38
    x[2] = 1e-45
    assert _product(_weight(4, 96, 128, 64), None, dtype)(x).abs().max() < 1e-36


def test_what_the_library_would_misread_is_refused() -> None:
    library = load_low_bit_library()
    assert library is not None
    weight = _weight(4, 8, 64, 32)
    bias = torch.zeros(8)
    for values, scales, its_bias, kind, message in (
        (weight.values.int(), weight.scales, bias, TypeError, "values must be torch.uint8"),
        (weight.values.to("meta"), weight.scales, bias, TypeError, "values must be torch.uint8 on the CPU"),
        (weight.values, weight.scales.double(), bias, TypeError, "scales must be torch.float32"),
        (weight.values, weight.scales[:7], bias, ValueError, "scales must have the shape (8, 2)"),
        (weight.values, weight.scales.repeat(1, 2), bias, ValueError, "or a multiple of 32 columns, got 16 of 64"),
        (weight.values, weight.scales, bias.double(), TypeError, "bias must be torch.float32"),
        (weight.values, weight.scales, bias[:7], ValueError, "bias must have the shape (8,)"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            NativeLowBitLinear(library, 4, values, scales, None, its_bias, torch.float32)
    product = NativeLowBitLinear(library, 4, weight.values, weight.scales, None, bias, torch.float32)
    good = torch.zeros(3, 64)
    for x, residual, kind, message in (
        (good.bfloat16(), good[:, :8], TypeError, "x must be torch.float32"),
        (good[:, :63], good[:, :8], ValueError, "x must have the shape (3, 64)"),
        (good, good[:, :7], ValueError, "residual must have the shape (3, 8)"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            product.add(x, residual)


def test_a_weight_with_gaps_and_no_rows_are_right() -> None:
    weight = _weight(8, 40, 96, 32)
    apart = QuantizedWeight(8, weight.values.T.contiguous().T, weight.scales.T.contiguous().T)
    x = _rows(96, torch.float32)
    assert torch.equal(_product(apart, None, torch.float32)(x), _product(weight, None, torch.float32)(x))
    assert _product(weight, None, torch.float32)(x[:0]).shape == (0, 40)


def test_it_is_chosen_where_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(4, 32, 96, 48)
    assert isinstance(make_quantized_linear(weight, None, torch.float32), DequantizingLinear)
    weight = _weight(4, 32, 96, 32)
    assert isinstance(make_quantized_linear(weight, None, torch.float16), DequantizingLinear)
    monkeypatch.setattr(quantized, "load_low_bit_library", lambda: None)
    assert isinstance(make_quantized_linear(weight, None, torch.float32), DequantizingLinear)
