"""AWQ in its form "gemm", as AutoAWQ and AutoRound write it.

For a `Linear` [N, K]: `qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8] and `scales` [G, N], for G groups of
columns. The eight codes of a word belong to the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight, the first in its lowest bits.
A number is (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gptj_dist.checkpoint.layouts.base import (
    FLOATS,
    GroupedLayout,
    Matrix,
    Part,
    Piece,
    blocks,
    pack,
    packed_bytes,
    unpack,
)
from gptj_dist.errors import CheckpointError
from gptj_dist.quantization import WHOLE_ROW

if TYPE_CHECKING:
    from torch import Tensor

_PLACE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's codes is that of each output of eight."""


class AwqLayout(GroupedLayout):
    """AWQ.

    Args:
        group: `WHOLE_ROW` or a number of columns.
        has_zeros: the file has zeros; else they are all in the middle.
    """

    def __init__(self, group: int, has_zeros: bool) -> None:
        self.bits = 4
        self.group = group
        self.has_offsets = has_zeros
        self.title = f"AWQ, 4 bits, {'a scale a row' if group == WHOLE_ROW else f'groups of {group}'}"

    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        beginning, num_groups = name.removesuffix("weight"), self.num_groups(columns)
        if rows % 8 or columns % 2:
            raise CheckpointError(f"{name} is {[rows, columns]}: AWQ has matrices of multiples of 8 alone")
        return {
            "qweight": Part(f"{beginning}qweight", (columns, rows // 8), ("I32",)),
            "qzeros": Part(f"{beginning}qzeros", (num_groups, rows // 8), ("I32",), is_optional=not self.has_offsets),
            "scales": Part(f"{beginning}scales", (num_groups, rows), FLOATS),
        }

    def codes(self, matrix: Matrix) -> Iterator[Piece]:
        for first, last in blocks(matrix.columns // 2, 2 * matrix.rows):
            codes = _in_order(matrix.part("qweight", 2 * first, 2 * last))
            yield Piece(0, 2 * first, pack(codes.t()))

    def scales(self, matrix: Matrix) -> Tensor:
        return matrix.part("scales").float().t()

    def offsets(self, matrix: Matrix) -> Tensor:
        return (8 - _in_order(matrix.part("qzeros")).float().t()) * self.scales(matrix)


def _in_order(words: Tensor) -> Tensor:
    """The codes of each output: int32 [n, N / 8] -> uint8 [n, N]."""
    import torch

    codes = unpack(packed_bytes(words)).view(len(words), -1, 8)
    return torch.stack([codes[:, :, place] for place in _PLACE_OF_OUTPUT], dim=2).flatten(1)
