"""Products: right to rounding; packed ones with the same bits for a row whatever rows are beside it."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gptj_dist.model import linear
from gptj_dist.model.linear import Linear, PackedLinear, PlainLinear, can_pack, make_linear
from gptj_dist.model.native.library import load_product_library
from gptj_dist.model.native.product import NativeLinear

pytestmark = pytest.mark.usefixtures("restored_threads")

NUM_ROWS = 130
SHAPES = [(896, 128), (128, 640), (75, 173), (173, 75), (4128, 128), (50257, 16), (1, 5), (7, 1), (1024, 2048)]
"""Outputs and inputs; the first two and the fifth are the demo's."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}

Kind = Callable[[Tensor, Tensor], Linear]
"""Makes a product of weight and bias."""


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
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        for num_rows in _row_counts(shape):
            first = 37 * num_rows % (NUM_ROWS + 1 - num_rows)
            for rows in (slice(0, num_rows), slice(first, first + num_rows)):
                assert torch.equal(packed(x[rows]), expected[rows]), f"{num_rows} rows, {num_threads} threads"


def _row_counts(shape: tuple[int, int]) -> range:
    """Every number of rows; some of products that take long."""
    step = 1 if math.prod(shape) < 100_000 else 9 if math.prod(shape) < 1_000_000 else 43
    return range(1, NUM_ROWS + 1, step)


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


def _misaligned(*shape: int) -> Tensor:
    memory = bytearray(2 * math.prod(shape) + 1)
    return torch.frombuffer(memory, dtype=torch.bfloat16, offset=1).view(shape)


def test_the_compiled_product_refuses_tensors_that_it_would_misread() -> None:
    """With another type, shape, stride or alignment it would take other bytes for numbers, or read past the end."""
    library = load_product_library()
    if library is None:
        pytest.skip("this CPU has no compiled product")
    x, weight, bias = _operands((8, 16), torch.bfloat16)
    product = NativeLinear(library, weight, bias)
    good, transposed = x[:, :8], torch.ones(16, NUM_ROWS, dtype=torch.bfloat16).T
    for rows, residual, kind, message in (
        (x.float(), good, TypeError, "x must be torch.bfloat16 on the CPU, got torch.float32 on cpu"),
        (x.half(), good, TypeError, "x must be torch.bfloat16"),
        (x.to("meta"), good, TypeError, "x must be torch.bfloat16 on the CPU, got torch.bfloat16 on meta"),
        (x, good.float(), TypeError, "residual must be torch.bfloat16"),
        (x[:, :15], good, ValueError, "x must have the shape (130, 16), got (130, 15)"),
        (x[:, None], good, ValueError, "x must have the shape"),
        (x, x[:, :7], ValueError, "residual must have the shape"),
        (x, x[:1, :8], ValueError, "residual must have the shape"),
        (transposed, good, ValueError, "x must have rows without gaps, got the strides (1, 130)"),
        (x, x[:, ::2], ValueError, "residual must have rows without gaps"),
        (_misaligned(NUM_ROWS, 16), good, ValueError, "x must be aligned to 2 bytes"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            product.add(rows, residual)


def test_a_weight_or_bias_that_the_library_would_misread_is_refused() -> None:
    library = load_product_library()
    if library is None:
        pytest.skip("this CPU has no compiled product")
    _, weight, bias = _operands((8, 16), torch.bfloat16)
    for its_weight, its_bias, kind, message in (
        (weight.float(), bias, TypeError, "weight must be torch.bfloat16"),
        (weight[0], bias, ValueError, "weight must be a matrix, got the shape (16,)"),
        (weight, bias.float(), TypeError, "bias must be torch.bfloat16"),
        (weight, bias[:7], ValueError, "bias must have the shape (8,), got (7,)"),
        (weight, weight[:, :1], ValueError, "bias must have the shape"),
        (_misaligned(8, 16), bias, ValueError, "weight must be aligned"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            NativeLinear(library, its_weight, its_bias)


def test_a_weight_and_a_bias_with_gaps_are_right() -> None:
    library = load_product_library()
    if library is None:
        pytest.skip("this CPU has no compiled product")
    x, weight, bias = _operands((8, 16), torch.bfloat16)
    expected = NativeLinear(library, weight, bias)(x)
    apart = torch.stack([bias, -bias], dim=1)[:, 0]
    assert torch.equal(NativeLinear(library, weight.T.contiguous().T, apart)(x), expected)


def test_packed_weights_ask_for_huge_pages() -> None:
    """Whether the system has any is another question: its memory may be in pieces."""
    library = load_product_library()
    if library is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this machine has no huge pages, or another product")
    weight = NativeLinear(library, torch.zeros(4096, 4096, dtype=torch.bfloat16), None)
    assert _asks_for_huge_pages(weight._packed.data_ptr())
    assert not _asks_for_huge_pages(torch.zeros(1 << 20).data_ptr())


def test_small_packed_weights_share_huge_pages() -> None:
    library = load_product_library()
    if library is None or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this machine has no huge pages, or another product")
    weights = [NativeLinear(library, torch.zeros(1000, 768, dtype=torch.bfloat16), None) for _ in range(16)]
    places = sorted((weight._packed.data_ptr(), weight._packed.numel()) for weight in weights)
    assert all(_asks_for_huge_pages(first) for first, _ in places)
    for (first, num_bytes), (second, _) in itertools.pairwise(places):
        assert first + num_bytes <= second
    pages = {page for first, num_bytes in places for page in range(first >> 21, (first + num_bytes - 1 >> 21) + 1)}
    assert len(pages) * 2**21 < 1.5 * sum(num_bytes for _, num_bytes in places)


def _asks_for_huge_pages(address: int) -> bool:
    """Whether the memory at an address was advised to be in huge pages."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no memory is at {address:x}")


def test_no_rows_are_a_product_of_no_rows() -> None:
    for kind, dtype in _kinds():
        x, weight, bias = _operands((8, 16), dtype)
        assert kind(weight, bias)(x[:0]).shape == (0, 8)


def test_what_cannot_be_packed_is_not() -> None:
    assert not can_pack(torch.device("cpu"), torch.float16)
    assert not can_pack(torch.device("meta"), torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)
