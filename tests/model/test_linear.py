"""Products: right to rounding; packed ones with the same bits for a row whatever rows are beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptj_dist.model import linear
from gptj_dist.model.linear import Linear, PackedLinear, PlainLinear, can_pack, make_linear
from gptj_dist.model.native.library import load_product_library
from gptj_dist.model.native.product import NativeLinear

NUM_ROWS = 130
SHAPES = [(896, 128), (128, 640), (75, 173), (173, 75), (4128, 128), (50257, 16), (1, 5), (7, 1), (1024, 2048)]
"""Outputs and inputs; the first two and the fifth are the demo's."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}

Kind = Callable[[Tensor, Tensor], Linear]
"""Makes a product of weight and bias."""


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


def _kinds() -> list[tuple[Kind, torch.dtype]]:
    """Every product there is on this machine, with each type that it takes."""
    cpu, library = torch.device("cpu"), load_product_library()
    kinds: list[tuple[Kind, torch.dtype]] = [
        (PlainLinear, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    if can_pack(cpu, torch.float32):
        kinds.append((PackedLinear, torch.float32))
    if torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kinds.append((PackedLinear, torch.bfloat16))
    if library is not None:
        kinds.append((partial(NativeLinear, library), torch.bfloat16))
    return kinds


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right_to_rounding(shape: tuple[int, int]) -> None:
    for kind, dtype in _kinds():
        x, weight, bias = _operands(shape, dtype)
        residual = torch.randn(NUM_ROWS, shape[0] + 3, generator=torch.Generator().manual_seed(1)).to(dtype)[:, 3:]
        expected = x.double() @ weight.double().T + bias.double()
        product = kind(weight.clone(), bias)
        for num_rows in (1, 2, 3, 14, 15, 31, NUM_ROWS):
            rows = slice(0, num_rows)
            for actual, right in (
                (product(x[rows]), expected[rows]),
                (product.gelu(x[rows]), functional.gelu(expected[rows], approximate="tanh")),
                (product.add(x[rows], residual[rows]), expected[rows] + residual[rows].double()),
            ):
                assert actual.dtype == dtype
                tolerance = 4 * TOLERANCES[dtype]
                torch.testing.assert_close(actual.double(), right, atol=tolerance, rtol=tolerance)


def test_the_fastest_product_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, weight, bias = _operands((8, 16), dtype)
        kinds = [getattr(kind, "func", kind) for kind, its_dtype in _kinds() if its_dtype == dtype]
        assert type(make_linear(weight, bias)) is kinds[-1]
    monkeypatch.setattr(linear, "load_product_library", lambda: None)
    if can_pack(torch.device("cpu"), torch.bfloat16):
        _, weight, bias = _operands((8, 16), torch.bfloat16)
        assert isinstance(make_linear(weight, bias), PackedLinear)


EXACT_KINDS = [
    (kind, dtype)
    for kind, dtype in _kinds()
    if (kind is PackedLinear and dtype == torch.float32) or isinstance(kind, partial)
]
"""Those that give a row the same bits in any company."""

exact = pytest.mark.parametrize(("kind", "dtype"), EXACT_KINDS)


@exact
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(kind: Kind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight, bias = _operands(shape, dtype)
    packed = kind(weight, bias)
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


@exact
def test_the_same_weights_packed_again_give_the_same_bits(kind: Kind, dtype: torch.dtype) -> None:
    x, weight, bias = _operands((173, 75), dtype)
    assert torch.equal(kind(weight, bias)(x), kind(weight.clone(), bias)(x.clone()))


@exact
def test_rows_cut_out_of_a_wider_tensor_have_the_same_bits(kind: Kind, dtype: torch.dtype) -> None:
    x, weight, bias = _operands((75, 173), dtype)
    wide = torch.zeros(NUM_ROWS, 300, dtype=dtype)
    wide[:, 100:273] = x
    packed = kind(weight, bias)
    for num_rows in (1, 2, 9, NUM_ROWS):
        assert torch.equal(packed(wide[:num_rows, 100:273]), packed(x)[:num_rows])


@exact
def test_neighbours_that_are_not_numbers_do_not_reach_a_row(kind: Kind, dtype: torch.dtype) -> None:
    x, weight, bias = _operands((128, 640), dtype)
    packed = kind(weight, bias)
    expected = packed(x[:4])
    x[2] = float("nan")
    x[3] = float("inf")
    product = packed(x[:4])
    assert torch.equal(product[:2], expected[:2])
    assert not product[2:].isfinite().any()


def _native_operands() -> tuple[NativeLinear, Tensor, Tensor]:
    """A compiled product of a weight [8, 16], and rows and a residual that fit it."""
    library = load_product_library()
    if library is None:
        pytest.skip("this CPU has no compiled product")
    x, weight, bias = _operands((8, 16), torch.bfloat16)
    return NativeLinear(library, weight, bias), x, torch.zeros(len(x), 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[:, :15],
        lambda x: x.float(),
        lambda x: x.half(),
        lambda x: x.to("meta"),
        lambda x: x.T.contiguous().T,
        lambda x: x[0],
    ],
    ids=["narrow", "float32", "float16", "elsewhere", "columns in one piece", "no rows"],
)
def test_the_compiled_product_refuses_rows_that_it_would_read_wrongly(spoil: Callable[[Tensor], Tensor]) -> None:
    product, x, _ = _native_operands()
    with pytest.raises(ValueError, match=r"rows: must be bfloat16 \[\d+, 16\]"):
        product(spoil(x))


@pytest.mark.parametrize(
    "spoil", [lambda r: r[:, :7], lambda r: r[:1], lambda r: r.float(), lambda r: r.T.contiguous().T]
)
def test_the_compiled_product_refuses_a_residual_that_it_would_read_wrongly(spoil: Callable[[Tensor], Tensor]) -> None:
    product, x, residual = _native_operands()
    with pytest.raises(ValueError, match=r"residual: must be bfloat16 \[\d+, 8\]"):
        product.add(x, spoil(residual))


def test_the_compiled_product_refuses_a_weight_and_a_bias_that_it_would_read_wrongly() -> None:
    _native_operands()
    library = load_product_library()
    assert library is not None
    _, weight, bias = _operands((8, 16), torch.bfloat16)
    with pytest.raises(ValueError, match="weight: must be bfloat16"):
        NativeLinear(library, weight.float(), bias)
    for wrong in (bias.float(), bias[:7]):
        with pytest.raises(ValueError, match="bias: must be bfloat16"):
            NativeLinear(library, weight, wrong)


def test_what_cannot_be_packed_is_not() -> None:
    assert not can_pack(torch.device("cpu"), torch.float16)
    assert not can_pack(torch.device("meta"), torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)
