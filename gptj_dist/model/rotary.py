"""GPT-J's rotary position embedding: on the first dimensions of each head, in interleaved pairs (2i, 2i + 1).

Su et al. 2021, "RoFormer", with base 10000. Computed in float32 with separate products and sums, so that a row has the
same bits at every place in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


class RotaryTable:
    """Cosines and sines of every position.

    Args:
        num_positions: positions 0 .. num_positions - 1.
        rotary_dim: leading dimensions of a head that are rotated; even.
    """

    def __init__(self, num_positions: int, rotary_dim: int, device: torch.device) -> None:
        frequencies = 1.0 / BASE ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
        self._cos = angles.cos().to(device)
        self._sin = angles.sin().to(device)
        self._rotary_dim = rotary_dim

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [positions, rotary_dim / 2] each."""
        return self._cos, self._sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for rows at these positions, each [rows, 1, rotary_dim / 2]."""
        positions = positions.to(self._cos.device)
        return self._cos[positions][:, None], self._sin[positions][:, None]


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates float32 `heads` [rows, num_heads, head_dim] in place, by `RotaryTable.at` of the rows' positions."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = heads[..., 0:rotary_dim:2], heads[..., 1:rotary_dim:2]
    rotated_even = even * cos - odd * sin
    rotated_odd = odd * cos + even * sin
    even.copy_(rotated_even)
    odd.copy_(rotated_odd)
