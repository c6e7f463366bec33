"""GPTQ, as AutoGPTQ, GPTQModel, AutoRound and GPTQ-for-LLaMa write it.

For a `Linear` [N, K]: `qweight` int32 [K * bits / 32, N], `qzeros` int32 [G, N * bits / 32] and `scales` [G, N], for G
groups of columns. A word holds the codes of consecutive columns (of `qzeros`: outputs), the first in its lowest bits.
A number is (code - zero) * scale, and files of the first version hold zero - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gptj_dist.checkpoint.layouts.base import FLOATS, GroupedLayout, Matrix, Part, Piece, blocks, packed_bytes, unpack
from gptj_dist.errors import CheckpointError
from gptj_dist.quantization import WHOLE_ROW, Bits

if TYPE_CHECKING:
    from torch import Tensor


class GptqLayout(GroupedLayout):
    """GPTQ.

    Args:
        group: `WHOLE_ROW` or a number of columns.
        is_symmetric: the zero of all groups is in the middle.
        zero_shift: what is added to a zero of the file: 1 in the first version of the format.
    """

    def __init__(
        self, bits: Bits, group: int, is_symmetric: bool = False, zero_shift: int = 1, has_head: bool = False
    ) -> None:
        self.bits = bits
        self.group = group
        self.has_offsets = not is_symmetric
        self.has_head = has_head
        self._zero_shift = zero_shift
        self.title = f"GPTQ, {bits} bits, {'a scale a row' if group == WHOLE_ROW else f'groups of {group}'}"

    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        beginning, per_word, num_groups = name.removesuffix("weight"), 32 // self.bits, self.num_groups(columns)
        if rows % per_word or columns % per_word:
            raise CheckpointError(f"{name} is {[rows, columns]}: GPTQ has matrices of multiples of {per_word} alone")
        return {
            "qweight": Part(f"{beginning}qweight", (columns // per_word, rows), ("I32",)),
            "qzeros": Part(f"{beginning}qzeros", (num_groups, rows // per_word), ("I32",)),
            "scales": Part(f"{beginning}scales", (num_groups, rows), FLOATS),
            "g_idx": Part(f"{beginning}g_idx", (columns,), ("I32",), is_optional=True),
        }

    def codes(self, matrix: Matrix) -> Iterator[Piece]:
        self._check_order(matrix)
        per_word = 32 // self.bits
        for first, last in blocks(matrix.columns // per_word, matrix.rows * per_word):
            words = packed_bytes(matrix.part("qweight", first, last)).view(last - first, matrix.rows, 4)
            yield Piece(0, first * per_word, words.transpose(0, 1).flatten(1))

    def scales(self, matrix: Matrix) -> Tensor:
        if not self.has_offsets and bool((self._zeros(matrix) != 1 << (self.bits - 1)).any()):
            raise CheckpointError(f"{matrix.name} has zeros of its own, but the configuration says sym")
        return matrix.part("scales").float().t()

    def offsets(self, matrix: Matrix) -> Tensor:
        return ((1 << (self.bits - 1)) - self._zeros(matrix)) * matrix.part("scales").float().t()

    def _zeros(self, matrix: Matrix) -> Tensor:
        """float32 [rows, number of groups]."""
        packed = packed_bytes(matrix.part("qzeros"))
        zeros = packed if self.bits == 8 else unpack(packed)
        return zeros.float().t() + self._zero_shift

    def _check_order(self, matrix: Matrix) -> None:
        """Raises a CheckpointError if the columns are in another order."""
        if not matrix.has("g_idx"):
            return
        import torch

        in_order = torch.arange(matrix.columns) // self.group_of(matrix.columns)
        if not torch.equal(matrix.part("g_idx").long(), in_order):
            raise CheckpointError(f"{matrix.name} {ORDERED}")


ORDERED = (
    "was quantised with its columns in another order (desc_act, --act-order), which gptj-dist does not read: use a "
    "checkpoint without that, or the original one with --quantize int4"
)
