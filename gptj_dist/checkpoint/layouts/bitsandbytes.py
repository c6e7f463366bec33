"""The 8-bit forms of bitsandbytes.

That of 2021, by hivemind's `gpt-j-6B-8bit`: `weight` uint8 [N, K] are indices of a book `code` of 256 numbers, and each
4096 consecutive ones have a factor in `absmax`. That of transformers' `load_in_8bit`: `weight` int8 [N, K], and `SCB`
[N] are the largest magnitudes of the rows, which 127 stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gptj_dist.checkpoint.layouts.base import FLOATS, GroupedLayout, Layout, Matrix, Part, Piece, anew, blocks
from gptj_dist.quantization import WHOLE_ROW, Quantization

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR_NUMBERS = 4096


class CodeBookLayout(Layout):
    """The form of 2021. Its 256 numbers are not equally far from each other, so they are quantised anew."""

    title = "bitsandbytes of 2021, 8 bits by a code book"
    fate = "quantised anew to int8, for a code book's numbers are not equally far from each other"
    has_embedding = True
    has_head = True

    def quantization(self, num_layers: int) -> Quantization:
        return anew(num_layers, True, True)

    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        beginning = name.removesuffix("weight")
        return {
            "weight": Part(name, (rows, columns), ("U8",)),
            "absmax": Part(f"{beginning}absmax", (-(-rows * columns // _FACTOR_NUMBERS),), FLOATS),
            "code": Part(f"{beginning}code", (256,), FLOATS),
        }

    def numbers(self, matrix: Matrix) -> Iterator[Piece]:
        import torch

        book, factors = matrix.part("code").float(), matrix.part("absmax").float()
        for first, last in blocks(matrix.rows, matrix.columns):
            places = torch.arange(first * matrix.columns, last * matrix.columns)
            numbers = book[matrix.part("weight", first, last).flatten().int()] * factors[places // _FACTOR_NUMBERS]
            yield Piece(first, 0, numbers.view(last - first, matrix.columns))


class RowInt8Layout(GroupedLayout):
    """That of `load_in_8bit`."""

    title = "bitsandbytes, 8 bits, a scale a row"
    bits = 8
    group = WHOLE_ROW
    has_offsets = False

    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        beginning = name.removesuffix("weight")
        return {
            "weight": Part(name, (rows, columns), ("I8",)),
            "SCB": Part(f"{beginning}SCB", (rows,), FLOATS),
            "format": Part(f"{name}_format", (), ("U8",), is_optional=True),
        }

    def codes(self, matrix: Matrix) -> Iterator[Piece]:
        import torch

        for first, last in blocks(matrix.rows, matrix.columns):
            yield Piece(first, 0, matrix.part("weight", first, last).view(torch.uint8) ^ 128)

    def scales(self, matrix: Matrix) -> Tensor:
        return matrix.part("SCB").float().unsqueeze(1) / 127

    def offsets(self, matrix: Matrix) -> Tensor:
        raise NotImplementedError
