"""Packed products: right to rounding, and in float32 the same bits for a row whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptj_dist.model import linear
from gptj_dist.model.linear import Linear, can_pack

NUM_ROWS = 130
SHAPES = [(896, 128), (128, 640), (75, 173), (173, 75), (4128, 128), (50257, 16), (1, 5), (7, 1), (1024, 2048)]
"""Outputs and inputs; the first two and the fifth are the demo's."""

has_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="this CPU's torch packs no weights"
)


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def _operands(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias, of which a product is about 1."""
    generator = torch.Generator().manual_seed(0)
    num_out, num_in = shape
    x = torch.randn(NUM_ROWS, num_in, generator=generator)
    weight = torch.randn(num_out, num_in, generator=generator) / num_in**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(num_out, generator=generator).to(dtype)


def _exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.double() @ weight.double().T + bias.double()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right_to_rounding(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    x, weight, bias = _operands(shape, dtype)
    expected = _exact(x, weight, bias)
    for num_rows in (1, 2, 3, 31, NUM_ROWS):
        product = Linear(weight, bias)(x[:num_rows])
        assert product.dtype == dtype
        torch.testing.assert_close(product.double(), expected[:num_rows], atol=2 * tolerance, rtol=2 * tolerance)


@has_packing
def test_float32_and_fast_bfloat16_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the plain product was used")

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, bias = _operands((8, 16), dtype)
        if can_pack(weight.device, weight.dtype):
            assert torch.isfinite(Linear(weight, bias)(x)).all()


@has_packing
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(shape: tuple[int, int]) -> None:
    x, weight, bias = _operands(shape)
    packed = Linear(weight, bias)
    torch.set_num_threads(1)
    expected = packed(x)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for num_rows in _row_counts(shape):
            first = 37 * num_rows % (NUM_ROWS + 1 - num_rows)
            for rows in (slice(0, num_rows), slice(first, first + num_rows)):
                assert torch.equal(packed(x[rows]), expected[rows]), f"{num_rows} rows, {num_threads} threads"


def _row_counts(shape: tuple[int, int]) -> range:
    """Every number of rows; every fifth or so of products that take long."""
    return range(1, NUM_ROWS + 1, 1 if shape[0] * shape[1] < 100_000 else 6)


@has_packing
def test_the_same_weights_packed_again_give_the_same_bits() -> None:
    x, weight, bias = _operands((173, 75))
    assert torch.equal(Linear(weight, bias)(x), Linear(weight.clone(), bias)(x.clone()))


@has_packing
def test_rows_cut_out_of_a_wider_tensor_have_the_same_bits() -> None:
    x, weight, bias = _operands((75, 173))
    wide = torch.zeros(NUM_ROWS, 300)
    wide[:, 100:273] = x
    packed = Linear(weight, bias)
    for num_rows in (1, 2, 9, NUM_ROWS):
        assert torch.equal(packed(wide[:num_rows, 100:273]), packed(x)[:num_rows])


@has_packing
def test_neighbours_that_are_not_numbers_do_not_reach_a_row() -> None:
    x, weight, bias = _operands((128, 640))
    packed = Linear(weight, bias)
    expected = packed(x[:4])
    x[2] = float("nan")
    x[3] = float("inf")
    assert torch.equal(packed(x[:4])[:2], expected[:2])


def test_without_packing_the_plain_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "can_pack", lambda *_: False)
    monkeypatch.setattr(linear, "_pack", lambda _: pytest.fail("packed all the same"))
    x, weight, bias = _operands((75, 173))
    assert torch.equal(Linear(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))


def test_what_cannot_be_packed_is_not() -> None:
    assert not can_pack(torch.device("cpu"), torch.float16)
    assert not can_pack(torch.device("meta"), torch.float32)
