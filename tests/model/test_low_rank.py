"""Compiled low-rank products: near those in float64; a row has the same bits in any company, chunk or thread."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gptj_dist.model.native.library import load_library
from gptj_dist.model.native.low_rank import LowRankRows, LowRankTable

LIBRARY = load_library()
pytestmark = [
    pytest.mark.usefixtures("restored_threads"),
    pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler to compile the products with"),
]

NUM_ROWS = 33
NUM_GROUPS = 3
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(1, 64, 64), (3, 75, 33), (16, 76, 190), (16, 190, 1), (64, 128, 96), (5, 1, 31), (8, 2043, 47)]
"""Ranks, inputs and outputs."""
shapes = pytest.mark.parametrize(("rank", "num_in", "num_out"), SHAPES)


def _tables(rank: int, num_in: int, num_out: int, dtype: torch.dtype) -> list[LowRankTable]:
    """Tables of four places. Place 1 has matrices in all of them, 2 in none, 3 in the second one only."""
    tables = []
    for group in range(NUM_GROUPS):
        places = (1, 3) if group == 1 else (1,)
        tables.append(
            LowRankTable({place: _matrices(rank, num_in, num_out, dtype, group, place) for place in places}, 4, dtype)
        )
    return tables


def _matrices(
    rank: int, num_in: int, num_out: int, dtype: torch.dtype, group: int, place: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * group + place)
    a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
    return a.to(dtype), (torch.randn(num_out, rank, generator=generator) / rank**0.5).to(dtype)


def _operands(num_in: int, num_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and y [rows, three places of outputs], of rows that lie further apart than they are long."""
    generator = torch.Generator().manual_seed(9)
    wide_x = torch.randn(NUM_ROWS, num_in + 3, generator=generator).to(dtype)
    wide_y = torch.randn(NUM_ROWS, 3 * num_out + 5, generator=generator).to(dtype)
    return wide_x[:, 3:], wide_y[:, 5:]


def _strength(row: int) -> float:
    return (1.0, -0.7, 2.0, 1.0)[row % 4]


def _add(tables: Sequence[LowRankTable], rows: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
    """Some of the rows of y with their products, at the places 1 to 3. Every fourth row has no adapter."""
    assert LIBRARY is not None
    groups = []
    for index, table in enumerate(tables):
        own = [at for at, row in enumerate(rows) if row % 4 == index]
        if own:
            groups.append((table, own, [_strength(rows[at]) for at in own]))
    chosen = y[list(rows)]
    if groups:
        LowRankRows(LIBRARY, groups, len(rows)).add(1, 3, x[list(rows)], chosen)
    return chosen


@shapes
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_near_those_in_float64(rank: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    x, y = _operands(num_in, num_out, dtype)
    expected = y.double().reshape(NUM_ROWS, 3, num_out)
    for row in range(NUM_ROWS):
        for place in (1, 3):
            group = row % 4
            if group < NUM_GROUPS and (place == 1 or group == 1):
                a, b = (each.double() for each in _matrices(rank, num_in, num_out, dtype, group, place))
                expected[row, place - 1] += _strength(row) * (b @ (a @ x[row].double()))
    actual = _add(_tables(rank, num_in, num_out, dtype), range(NUM_ROWS), x, y).double()
    rounding = torch.finfo(dtype).eps / 2
    assert ((actual - expected.flatten(1)).abs() <= 1.01 * rounding * expected.flatten(1).abs() + 1e-5).all()


@shapes
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(rank: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    x, y = _operands(num_in, num_out, dtype)
    tables = _tables(rank, num_in, num_out, dtype)
    torch.set_num_threads(1)
    alone = torch.cat([_add(tables, [row], x, y) for row in range(NUM_ROWS)])
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_rows in (*range(1, 14), 20, 31, NUM_ROWS):
            for start, stop in pairwise((*range(0, NUM_ROWS, num_rows), NUM_ROWS)):
                rows = range(start, stop)
                assert torch.equal(_add(tables, rows, x, y), alone[start:stop]), f"{rows}, {num_threads} threads"
        mixed = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(1)).tolist()
        assert torch.equal(_add(tables, mixed, x, y), alone[mixed])
    ends = alone[3::4]
    assert torch.equal(ends, y[3::4])


def test_rows_of_a_chunk_may_be_their_own_results() -> None:
    assert LIBRARY is not None
    table = LowRankTable({0: _matrices(5, 75, 75, torch.float32, 0, 0)}, 1, torch.float32)
    x = _operands(75, 75, torch.float32)[0]
    rows = LowRankRows(LIBRARY, [(table, range(NUM_ROWS), [0.5] * NUM_ROWS)], NUM_ROWS)
    expected, both = x.clone(), x.clone()
    rows.add(0, 1, x, expected)
    rows.add(0, 1, both, both)
    assert torch.equal(both, expected)
    assert not torch.equal(both, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_that_are_not_numbers_do_not_reach_a_row(dtype: torch.dtype) -> None:
    x, y = _operands(76, 40, dtype)
    tables, rows = _tables(16, 76, 40, dtype), range(13)
    expected = _add(tables, rows, x, y)
    x[4, 5], x[8, 75] = float("nan"), float("inf")
    actual = _add(tables, rows, x, y)
    others = [row for row in rows if row not in (4, 8)]
    assert torch.equal(actual[others], expected[others])
    assert not actual[[4, 8], :40].isfinite().any()


def test_what_the_library_would_misread_is_refused() -> None:
    assert LIBRARY is not None
    x, y = torch.zeros(2, 64), torch.zeros(2, 3 * 40)
    a, b = torch.zeros(4, 64), torch.zeros(40, 4)
    table = LowRankTable({1: (a, b)}, 4, torch.float32)
    for matrices, kind, message in (
        ({1: (a.bfloat16(), b)}, TypeError, "a must be torch.float32"),
        ({1: (a, b.to("meta"))}, TypeError, "b must be torch.float32 on the CPU"),
        ({1: (a, b[:, :3])}, ValueError, "b must have the shape (40, 4)"),
        ({4: (a, b)}, IndexError, "invalid index"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            LowRankTable(matrices, 4, torch.float32)
    for indices in ([0, 2], [-1], [0, 0]):
        with pytest.raises(IndexError, match="each row must be one of 2 and in one group"):
            LowRankRows(LIBRARY, [(table, indices, [1.0] * len(indices))], 2)
    with pytest.raises(ValueError, match="of one type and length"):
        LowRankRows(LIBRARY, [(table, [0], [1.0]), (LowRankTable({}, 3, torch.float32), [1], [1.0])], 2)
    rows = LowRankRows(LIBRARY, [(table, [1, 0], [1.0, 1.0])], 2)
    for first, its_x, its_y, kind, message in (
        (2, x, y, IndexError, "places must be among 4, got 3 from 2 on"),
        (1, x.bfloat16(), y, TypeError, "x must be torch.float32"),
        (1, x, y.bfloat16(), TypeError, "y must be torch.float32"),
        (1, x[:1], y, ValueError, "x must have the shape (2, 64)"),
        (1, x, y[:1], ValueError, "y must have the shape (2, 120)"),
        (1, x[:, :63], y, ValueError, "the widths of the matrices, got 63 and 40"),
        (1, x, y[:, :117], ValueError, "the widths of the matrices, got 64 and 39"),
        (1, torch.zeros(64, 2).T, y, ValueError, "x must have rows without gaps"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            rows.add(first, 3, its_x, its_y)
