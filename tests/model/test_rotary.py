"""Rotary embedding against its formula, written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptj_dist.model.rotary import RotaryTable, rotate_

CPU = torch.device("cpu")


def _heads(num_rows: int, num_heads: int, head_dim: int) -> Tensor:
    return torch.randn(num_rows, num_heads, head_dim, generator=torch.Generator().manual_seed(0))


def _rotated(heads: Tensor, positions: list[int], rotary_dim: int, num_positions: int = 2048) -> Tensor:
    heads = heads.clone()
    rotate_(heads, *RotaryTable(num_positions, rotary_dim, CPU).at(torch.tensor(positions)))
    return heads


def _by_formula(heads: Tensor, positions: list[int], rotary_dim: int) -> Tensor:
    """Su et al. 2021, equation 34, in float64: pair (2i, 2i + 1) turns by position / 10000 ** (2i / rotary_dim)."""
    turned = heads.double()
    for row, position in enumerate(positions):
        for i in range(rotary_dim // 2):
            angle = position / 10000 ** (2 * i / rotary_dim)
            x, y = heads[row, :, 2 * i].double(), heads[row, :, 2 * i + 1].double()
            turned[row, :, 2 * i] = x * math.cos(angle) - y * math.sin(angle)
            turned[row, :, 2 * i + 1] = y * math.cos(angle) + x * math.sin(angle)
    return turned


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(256, 64), (32, 32), (15, 6), (12, 2), (7, 6)])
def test_pairs_turn_as_the_formula_says(head_dim: int, rotary_dim: int) -> None:
    positions = [0, 1, 2, 17, 500, 2047, 3]
    heads = _heads(len(positions), 3, head_dim)
    # At position 2047 the angle itself is good to 2047 * 2**-24 in float32.
    expected = _by_formula(heads, positions, rotary_dim)
    torch.testing.assert_close(_rotated(heads, positions, rotary_dim).double(), expected, atol=2e-3, rtol=0)
    near = _rotated(heads, [0, 1, 2, 3, 4, 5, 6], rotary_dim).double()
    torch.testing.assert_close(near, _by_formula(heads, [0, 1, 2, 3, 4, 5, 6], rotary_dim), atol=5e-6, rtol=0)


def test_dimensions_behind_the_rotary_ones_and_position_0_stay() -> None:
    heads = _heads(3, 2, 16)
    rotated = _rotated(heads, [0, 5, 9], 6)
    assert torch.equal(rotated[..., 6:], heads[..., 6:])
    assert torch.equal(rotated[0], heads[0])
    assert not torch.equal(rotated[1:, :, :6], heads[1:, :, :6])


def test_products_depend_on_distance_alone() -> None:
    query, key = _heads(2, 1, 32)
    scores = []
    for position in (0, 40, 1000):
        rows = _rotated(torch.stack([query, key]), [position + 7, position], 32)
        scores.append((rows[0] * rows[1]).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), atol=2e-3, rtol=0)


def test_a_row_has_the_same_bits_anywhere_in_a_batch() -> None:
    positions = [(37 * i) % 2048 for i in range(70)]
    heads = _heads(70, 5, 15)
    together = _rotated(heads, positions, 14)
    for first, stop in ((0, 1), (3, 4), (69, 70), (10, 25), (5, 69)):
        assert torch.equal(_rotated(heads[first:stop], positions[first:stop], 14), together[first:stop])
