"""The form `pack-quantized` of compressed-tensors, as llm-compressor and AutoRound write it.

For a `Linear` [N, K]: `weight_packed` int32 [N, K * bits / 32], `weight_scale` [N, G] for G groups of columns and, if
they have zeros, `weight_zero_point` int32 [N * bits / 32, G]. A word holds the codes of consecutive columns (zeros:
outputs), the first in its lowest bits. A number is (code - zero) * scale; without zeros, zero is in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gptj_dist.checkpoint.layouts.base import FLOATS, GroupedLayout, Matrix, Part, Piece, blocks, packed_bytes, unpack
from gptj_dist.errors import CheckpointError
from gptj_dist.quantization import WHOLE_ROW, Bits

if TYPE_CHECKING:
    from torch import Tensor


class CompressedLayout(GroupedLayout):
    """`pack-quantized`.

    Args:
        group: `WHOLE_ROW` or a number of columns.
    """

    def __init__(self, bits: Bits, group: int, has_zeros: bool, has_head: bool) -> None:
        self.bits = bits
        self.group = group
        self.has_offsets = has_zeros
        self.has_head = has_head
        groups = "a scale a row" if group == WHOLE_ROW else f"groups of {group}"
        self.title = f"compressed-tensors, {bits} bits, {groups}"

    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        per_word, num_groups = 32 // self.bits, self.num_groups(columns)
        if columns % per_word or (self.has_offsets and rows % per_word):
            raise CheckpointError(
                f"{name} is {[rows, columns]}: only matrices of multiples of {per_word} are read of compressed-tensors"
            )
        parts = {
            "packed": Part(f"{name}_packed", (rows, columns // per_word), ("I32",)),
            "scale": Part(f"{name}_scale", (rows, num_groups), FLOATS),
            "shape": Part(f"{name}_shape", (2,), ("I64", "I32"), is_optional=True),
        }
        if self.has_offsets:
            parts["zero"] = Part(f"{name}_zero_point", (rows // per_word, num_groups), ("I32",))
        return parts

    def codes(self, matrix: Matrix) -> Iterator[Piece]:
        for first, last in blocks(matrix.rows, matrix.columns):
            yield Piece(first, 0, packed_bytes(matrix.part("packed", first, last)))

    def scales(self, matrix: Matrix) -> Tensor:
        return matrix.part("scale").float()

    def offsets(self, matrix: Matrix) -> Tensor:
        packed = packed_bytes(matrix.part("zero").t())
        zeros = packed if self.bits == 8 else unpack(packed)
        return ((1 << (self.bits - 1)) - zeros.float().t()) * self.scales(matrix)
