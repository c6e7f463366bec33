"""What a layout of quantised matrices has to say, and the arithmetic that most of them share.

A process that only looks at a checkpoint does without torch, so the layouts import it where they compute.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gptj_dist.quantization import WHOLE_ROW, Bits, Quantization

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32")
"""Types of scales, by their names in safetensors headers."""

BLOCK_NUMBERS = 1 << 22
"""Numbers of a matrix that are handled at a time."""

_LAYER_MATRIX = re.compile(r"transformer\.h\.\d{1,9}\.(?:attn|mlp)\.\w+\.weight")
_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a file, one of those that a matrix consists of.

    Args:
        dtypes: as safetensors spells them; it has one of these.
        is_optional: the file may lack it.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: Collection[str]
    is_optional: bool = False


class Matrix(Protocol):
    """A matrix [rows, columns], as a file holds it."""

    @property
    def name(self) -> str:
        """Of its weight, in a whole GPT-J."""
        ...

    @property
    def rows(self) -> int:
        """Outputs."""
        ...

    @property
    def columns(self) -> int:
        """Inputs."""
        ...

    def part(self, role: str, first: int = 0, last: int | None = None) -> Tensor:
        """The rows [first, last) of one of its parts, in new memory.

        Raises:
            CheckpointError: the file has become shorter.
        """
        ...

    def has(self, role: str) -> bool:
        """Whether the file holds an optional part."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What lies in the rows [row, ...) and the columns [column, ...) of a matrix."""

    row: int
    column: int
    content: Tensor


class Layout(ABC):
    """How a tool keeps the matrices of a model.

    Attributes:
        title: for users, such as `GPTQ, 4 bits, groups of 128`.
        fate: for users, what becomes of the numbers.
        has_embedding, has_head: these are quantised too.
    """

    title: str
    fate: str
    has_embedding: bool = False
    has_head: bool = False

    def covers(self, name: str) -> bool:
        """Whether the weight of that name is quantised."""
        if name in (_EMBEDDING, _HEAD):
            return self.has_embedding if name == _EMBEDDING else self.has_head
        return _LAYER_MATRIX.fullmatch(name) is not None

    @abstractmethod
    def quantization(self, num_layers: int) -> Quantization:
        """The bits that the model has after it was read."""

    @abstractmethod
    def parts(self, name: str, rows: int, columns: int) -> Mapping[str, Part]:
        """By their roles, the tensors that the weight of that name consists of.

        Raises:
            CheckpointError: no matrix of that shape can have this layout.
        """

    @abstractmethod
    def numbers(self, matrix: Matrix) -> Iterator[Piece]:
        """The numbers that the bits stand for, float32, some at a time."""


class GroupedLayout(Layout):
    """A layout in which `group` columns of a row have a scale: it is kept as it is where the groups are alike.

    With half = 2 ** (bits - 1), a number is (code - half) * scale + offset.

    Attributes:
        group: `WHOLE_ROW` or a number of columns.
        is_kept: the weights stay quantised as they are. Else they are quantised anew.
    """

    bits: Bits
    group: int
    has_offsets: bool
    is_kept: bool

    @abstractmethod
    def codes(self, matrix: Matrix) -> Iterator[Piece]:
        """Bytes of codes: one code each, or of 4 bits two, of which the even column's is in the lower half."""

    @abstractmethod
    def scales(self, matrix: Matrix) -> Tensor:
        """float32 [rows, number of groups]."""

    @abstractmethod
    def offsets(self, matrix: Matrix) -> Tensor:
        """float32 [rows, number of groups]; asked for if `has_offsets`."""

    def choose_fate(self, widths: Collection[int]) -> None:
        """Decides whether the weights are kept.

        Args:
            widths: columns of the matrices that the model has.
        """
        self.is_kept = self.group == WHOLE_ROW or not any(width % self.group for width in widths)
        self.fate = (
            "kept as they are" if self.is_kept else "quantised anew to int8, for a row is no whole number of groups"
        )

    def quantization(self, num_layers: int) -> Quantization:
        if not self.is_kept:
            return anew(num_layers, self.has_embedding, self.has_head)
        return Quantization(
            layer_bits=(self.bits,) * num_layers,
            embedding_bits=self.bits if self.has_embedding else None,
            head_bits=self.bits if self.has_head else None,
            is_stored=True,
            group=self.group,
            has_offsets=self.has_offsets,
            is_foreign=True,
        )

    def group_of(self, columns: int) -> int:
        """Columns that share a scale in a matrix of that width."""
        return columns if self.group == WHOLE_ROW else self.group

    def num_groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group_of(columns))

    def values(self, matrix: Matrix) -> Iterator[Piece]:
        """As `QuantizedWeight.values` holds them; columns of pieces count bytes."""
        import torch

        for piece in self.codes(matrix):
            if self.bits == 8:
                yield Piece(piece.row, piece.column, (piece.content ^ 128).view(torch.int8))
            else:
                yield Piece(piece.row, piece.column // 2, piece.content)

    def numbers(self, matrix: Matrix) -> Iterator[Piece]:
        import torch

        scales = self.scales(matrix)
        offsets = self.offsets(matrix) if self.has_offsets else None
        group, half = self.group_of(matrix.columns), 1 << (self.bits - 1)
        for piece in self.codes(matrix):
            codes = piece.content if self.bits == 8 else unpack(piece.content)
            rows = slice(piece.row, piece.row + len(codes))
            group_of = torch.arange(piece.column, piece.column + codes.shape[1]) // group
            numbers = (codes.float() - half) * scales[rows][:, group_of]
            if offsets is not None:
                numbers += offsets[rows][:, group_of]
            yield Piece(piece.row, piece.column, numbers)


def anew(num_layers: int, has_embedding: bool, has_head: bool) -> Quantization:
    """Of weights that become int8 while they load."""
    eight: Bits = 8
    return Quantization((eight,) * num_layers, 8 if has_embedding else None, 8 if has_head else None, is_foreign=True)


def blocks(length: int, numbers: int) -> Iterator[tuple[int, int]]:
    """Ranges of what is handled at a time.

    Args:
        numbers: of each of the `length` rows.
    """
    step = max(1, BLOCK_NUMBERS // numbers)
    return ((start, min(start + step, length)) for start in range(0, length, step))


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two to a byte, the even column's in the lower half: uint8 [rows, n] -> [rows, n / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def packed_bytes(words: Tensor) -> Tensor:
    """The bytes of words, lowest first: int32 [rows, n] -> uint8 [rows, 4 n]."""
    import torch

    return words.contiguous().view(torch.uint8)
