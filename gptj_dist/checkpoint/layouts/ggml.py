"""GGML's blocks of 32 numbers of a row: a scale, in some types a minimum, and codes.

Numbers are code * scale, or code * scale + minimum. Codes of 4 bits (0 to 15, with 8 for 0 where there is no minimum)
are the lower halves of 16 bytes, then the upper ones; in version 0 a byte held neighbours. Fifth bits of codes are a
word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gptj_dist.checkpoint.layouts.base import GroupedLayout, Matrix, Part, Piece, blocks, pack
from gptj_dist.checkpoint.layouts.ggml_file import BLOCK, BLOCK_TYPES

if TYPE_CHECKING:
    from torch import Tensor

_Q4_1, _Q5_0, _Q5_1, _Q8_0 = 3, 6, 7, 8


class GgmlLayout(GroupedLayout):
    """Blocks of one type.

    Args:
        code: of the type.
        version: of the blocks, see `GgmlFile`.
    """

    group = BLOCK

    def __init__(self, code: int, version: int, has_embedding: bool, has_head: bool) -> None:
        self._code = code
        self._version = version
        self._block_bytes = BLOCK_TYPES[code].bytes_of_version[version]
        self._has_short_scales = version == 2 or code in (_Q5_0, _Q5_1)
        self.bits = 4 if BLOCK_TYPES[code].name.startswith("q4") else 8
        self.has_offsets = code in (_Q4_1, _Q5_1)
        self.has_embedding = has_embedding
        self.has_head = has_head
        self.title = f"GGML, {BLOCK_TYPES[code].name}"

    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        return {"blocks": Part(name, (rows, -(-columns // BLOCK) * self._block_bytes), ("U8",))}

    def codes(self, matrix: Matrix) -> Iterator[Piece]:
        for first, data in self._blocks(matrix):
            yield Piece(first, 0, self._codes(data).flatten(1))

    def scales(self, matrix: Matrix) -> Tensor:
        import torch

        return torch.cat([self._float(data, 0) for _, data in self._blocks(matrix)])

    def offsets(self, matrix: Matrix) -> Tensor:
        import torch

        # Codes of 8 bits are 128 more than GGML's, so that 128 stands for 0 as 8 of 4 bits does not.
        shift = 8 if self.bits == 4 else 0
        return torch.cat([self._float(data, 1) + shift * self._float(data, 0) for _, data in self._blocks(matrix)])

    def _blocks(self, matrix: Matrix) -> Iterator[tuple[int, Tensor]]:
        """First row, and uint8 [rows, blocks of a row, bytes of a block], some rows at a time."""
        for first, last in blocks(matrix.rows, matrix.columns):
            yield first, matrix.part("blocks", first, last).view(last - first, -1, self._block_bytes)

    def _float(self, data: Tensor, index: int) -> Tensor:
        """The scales or the minima of blocks, float32 [rows, blocks]."""
        import torch

        dtype = torch.float16 if self._has_short_scales else torch.float32
        size = dtype.itemsize
        return data[:, :, index * size : (index + 1) * size].contiguous().view(dtype).squeeze(2).float()

    def _codes(self, data: Tensor) -> Tensor:
        """As `GroupedLayout.codes`, uint8 [rows, blocks, bytes]."""
        import torch

        if self._code == _Q8_0:
            return data[:, :, -BLOCK:] ^ 128
        halves = data[:, :, -BLOCK // 2 :]
        if self.bits == 4 and self._version == 0:
            return halves
        codes = torch.cat((halves & 15, halves >> 4), dim=2)
        if self.bits == 4:
            return pack(codes.flatten(0, 1)).view(halves.shape)
        fifths = data[:, :, -BLOCK // 2 - 4 : -BLOCK // 2].unsqueeze(3) >> torch.arange(8, dtype=torch.uint8) & 1
        codes = codes | fifths.flatten(2) << 4
        return codes + (128 - 16 if self._code == _Q5_0 else 128)
