"""Reads the tensors of one stage, each directly into its final memory.

Plain reads rather than a memory map: pages of a mapped file cannot be given back, and a checkpoint in the page cache
beside its packed weights does not fit a machine that the model itself fits.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gptj_dist.checkpoint.headers import ELEMENT_BYTES, TensorHeader, listing, row_major
from gptj_dist.checkpoint.index import (
    CheckpointIndex,
    expected_tensors,
    extra_tensors,
    plain_tensors,
    read_layout,
    stage_headers,
)
from gptj_dist.checkpoint.layouts.base import GroupedLayout, Layout, Part, Piece
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError
from gptj_dist.quantization import offset_name, scale_name

logger = logging.getLogger(__name__)

STAGING_BYTES = 32 << 20
"""What is read at once where numbers are cast, moved to a GPU or put between others."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8,
    "U8": torch.uint8, "I32": torch.int32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _FileMatrix:
    """A matrix that another tool has quantised."""

    load: Callable[[TensorHeader, int, int], Tensor]
    headers: Mapping[str, TensorHeader]
    name: str
    rows: int
    columns: int
    parts: Mapping[str, Part]

    def part(self, role: str, first: int = 0, last: int | None = None) -> Tensor:
        header = self.headers[self.parts[role].name]
        return self.load(header, first, header.shape[0] if last is None else last)

    def has(self, role: str) -> bool:
        return self.parts[role].name in self.headers


class StageTensors(AbstractContextManager["StageTensors"]):
    """The tensors of one stage. Use it in a `with` statement.

    Args:
        directory: the checkpoint. Only the files that hold the stage's tensors need to be there, and are opened.
        config: the whole model's.
        layers: the stage's.

    Attributes:
        num_bytes: of the stage's tensors in their files.
        num_read_bytes: that have been read so far.

    Raises:
        CheckpointError: a tensor of the stage is missing or has another shape, or a file is broken.
    """

    def __init__(self, directory: Path, config: ModelConfig, layers: LayerRange) -> None:
        self._shapes = expected_tensors(config, layers)
        index = CheckpointIndex(directory)
        self._headers = stage_headers(index, config, layers)
        self._layout = read_layout(directory, config)
        self._is_kept = config.quantization is not None and config.quantization.is_stored
        self._matrices = {} if self._layout is None else self._foreign_matrices(self._layout, config, layers)
        if layers.is_first and (extras := extra_tensors(index, config)):  # one stage speaks for all
            logger.warning("%s: tensors skipped that GPT-J does not have: %s", directory, listing(extras, most=4))
        paths = {header.path for header in self._headers.values()}
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}
        self._staging = torch.empty(STAGING_BYTES, dtype=torch.uint8)
        self.num_bytes = sum(header.num_bytes for header in self._headers.values())
        self.num_read_bytes = 0

    def _foreign_matrices(self, layout: Layout, config: ModelConfig, layers: LayerRange) -> dict[str, _FileMatrix]:
        """By the names of `expected_tensors`, the matrices of another tool that they follow from."""
        if layers.is_first and config.quantization == layout.quantization(config.num_layers):
            is_kept = config.quantization.is_stored
            logger.log(logging.INFO if is_kept else logging.WARNING, "weights of %s: %s", layout.title, layout.fate)
        matrices: dict[str, _FileMatrix] = {}
        for name, shape in plain_tensors(config, layers).items():
            if layout.covers(name):
                rows, columns = shape
                parts = layout.parts(name, rows, columns)
                matrix = _FileMatrix(self._load, self._headers, name, rows, columns, parts)
                matrices |= dict.fromkeys((name, scale_name(name), offset_name(name)), matrix)
        return matrices

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, name: str, out: Tensor) -> None:
        """Fills `out` with a tensor, cast to its type and moved to its device. Holds `STAGING_BYTES` beside it at most.

        Args:
            name: a key of `expected_tensors`; `lm_head.bias` is zeros if a tied checkpoint lacks it.
            out: of the tensor's shape; may be a view.

        Raises:
            CheckpointError: the tensor holds NaN or infinity, or numbers that the type of `out` cannot hold; the file
                has become shorter since its header was read; or a row of the tensor is scattered over more than
                `STAGING_BYTES` of it.
            KeyError: the tensor is not this stage's.
        """
        if self._layout is not None and (matrix := self._matrices.get(name)) is not None:
            self._read_foreign(self._layout, matrix, name, out)
            return
        stored = self._headers.get(name)
        if stored is not None and TORCH_DTYPES[stored.dtype].is_floating_point != out.is_floating_point():
            raise CheckpointError(f"{stored.path} holds {name} quantised: take the checkpoint that it was made of")
        if out.shape != self._shapes[name]:
            raise ValueError(f"{name} is {list(self._shapes[name])}, not {list(out.shape)}")
        if name not in self._headers:
            out.zero_()
            return
        header = self._headers[name]
        is_alike = header.strides is None and out.dtype == TORCH_DTYPES[header.dtype]
        if is_alike and out.is_contiguous() and out.device.type == "cpu":
            self._fill(header, header.offset_bytes, out.view(-1).view(torch.uint8))
            _refuse_non_finite(name, out, out.dtype)
        else:
            for part, values in self._pieces(header, out):
                _refuse_non_finite(name, values, out.dtype)
                part.copy_(values)

    def _read_foreign(self, layout: Layout, matrix: _FileMatrix, name: str, out: Tensor) -> None:
        """As `read`, of what follows from a matrix that another tool has quantised."""
        if out.shape != self._shapes[name]:
            raise ValueError(f"{name} is {list(self._shapes[name])}, not {list(out.shape)}")
        if name == matrix.name:
            pieces = _grouped(layout).values(matrix) if self._is_kept else layout.numbers(matrix)
        else:
            layout = _grouped(layout)
            of_groups = layout.scales if name == scale_name(matrix.name) else layout.offsets
            pieces = iter((Piece(0, 0, of_groups(matrix)),))
        for piece in pieces:
            _refuse_non_finite(name, piece.content, out.dtype)
            rows, columns = piece.content.shape
            out[piece.row : piece.row + rows, piece.column : piece.column + columns].copy_(piece.content)

    def _load(self, header: TensorHeader, first: int, last: int) -> Tensor:
        """The rows [first, last) of a file's tensor, as they are."""
        out = torch.empty(last - first, *header.shape[1:], dtype=TORCH_DTYPES[header.dtype])
        row = (header.strides or row_major(header.shape))[0] * ELEMENT_BYTES[header.dtype]
        part = replace(header, shape=tuple(out.shape), offset_bytes=header.offset_bytes + first * row)
        for rows, values in self._pieces(part, out):
            rows.copy_(values)
        return out

    def _pieces(self, header: TensorHeader, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of `out`, some rows each, and the numbers that belong there, which last until the next part."""
        strides = header.strides or row_major(header.shape)
        # As they lie in the file: the rows of a tensor that was transposed before it was saved are its columns.
        order = sorted(range(out.dim()), key=lambda dim: strides[dim], reverse=True)
        rows, (stride, *inner) = out.permute(order), [strides[dim] for dim in order]
        size = ELEMENT_BYTES[header.dtype]
        row_numbers = 1 + sum((n - 1) * step for n, step in zip(rows.shape[1:], inner, strict=True))
        if row_numbers * size > STAGING_BYTES:
            raise CheckpointError(f"{header.path} holds a tensor {list(header.shape)} whose numbers lie too far apart")
        num_rows = 1 + (STAGING_BYTES // size - row_numbers) // stride
        for first in range(0, len(rows), num_rows):
            part = rows[first : first + num_rows]
            data = self._staging[: ((len(part) - 1) * stride + row_numbers) * size]
            self._fill(header, header.offset_bytes + first * stride * size, data)
            yield part, data.view(TORCH_DTYPES[header.dtype]).as_strided(part.shape, (stride, *inner))

    def _fill(self, header: TensorHeader, offset_bytes: int, out: Tensor) -> None:
        """Fills `out` (uint8, contiguous, on the CPU) from the file, and drops the file's pages from the page cache."""
        file, view, num_read = self._files[header.path], out.numpy().data, 0
        while num_read < len(view):
            num_bytes = os.preadv(file, [view[num_read : num_read + STAGING_BYTES]], offset_bytes + num_read)
            if num_bytes == 0:
                raise CheckpointError(f"{header.path} was truncated while it was being read")
            if sys.platform == "linux":
                # Of this tensor only: another stage on this machine may be about to read the rest.
                os.posix_fadvise(file, offset_bytes + num_read, num_bytes, os.POSIX_FADV_DONTNEED)
            num_read += num_bytes
        self.num_read_bytes += num_read


def _grouped(layout: Layout) -> GroupedLayout:
    """Only such layouts are kept."""
    assert isinstance(layout, GroupedLayout)
    return layout


def _refuse_non_finite(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raises a CheckpointError if a number is not finite, or would not be in `dtype`. One pass, as fast as a copy."""
    if not values.is_floating_point():
        return
    ends = torch.stack(values.aminmax())
    if not ends.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its training diverged")
    if not ends.to(dtype).isfinite().all():
        type_ = str(dtype).removeprefix("torch.")
        wider = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        raise CheckpointError(
            f"{name} holds numbers beyond {torch.finfo(dtype).max:.5g}, which {type_} cannot hold: choose {wider}"
        )
