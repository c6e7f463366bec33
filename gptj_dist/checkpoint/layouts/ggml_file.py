"""Finds the tensors in a GGML file of a GPT-J, as ggerganov's and rustformers' tools wrote them in 2023.

Magic; in the container `ggjt` its version; seven sizes; the vocabulary; then, until the file ends, tensors: number of
dimensions, length of the name, type, dimensions last to first, name, and numbers, which `ggjt` aligns to 32 bytes. All
integers have 4 bytes. Stdlib only.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptj_dist.checkpoint.headers import TensorHeader
from gptj_dist.errors import CheckpointError

BLOCK = 32
"""Columns that share a scale."""

_CONTAINERS = {b"lmgg": "ggml", b"tjgg": "ggjt"}
_ALIGNMENT = 32
_MAX_TOKENS = 1 << 20
_MAX_TENSORS = 1 << 16
_MAX_TOKEN_BYTES = 1 << 12
_MAX_NAME_BYTES = 256
_FLOAT_TYPES = {0: "F32", 1: "F16"}
_VERSION_FACTOR = 1000
"""A file's type is a type of tensors and this many times the version of the blocks."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A form of 32 quantised numbers.

    Args:
        bytes_of_version: bytes of such a block, by the version of the blocks.
        first_version: in which it is read.
    """

    name: str
    bytes_of_version: tuple[int, int, int]
    first_version: int = 0


BLOCK_TYPES: Mapping[int, BlockType] = {
    2: BlockType("q4_0", (20, 20, 18)),
    3: BlockType("q4_1", (24, 24, 20)),
    6: BlockType("q5_0", (22, 22, 22), first_version=1),
    7: BlockType("q5_1", (24, 24, 24), first_version=1),
    8: BlockType("q8_0", (36, 36, 34)),
}


@dataclass(frozen=True, slots=True)
class GgmlFile:
    """What a GGML file holds.

    Args:
        version: of the blocks: 0 for those until May 2023, then 1, then 2.
        types: name -> type of each tensor that consists of blocks.
        tensors: by name; one of blocks is a matrix of bytes.
    """

    version: int
    types: Mapping[str, int]
    tensors: Mapping[str, TensorHeader]


def is_ggml(file: BinaryIO) -> bool:
    """Whether a file begins as those that are read here."""
    file.seek(0)
    return file.read(4) in _CONTAINERS


def read_ggml(path: Path, file: BinaryIO) -> GgmlFile:
    """Reads all but the numbers.

    Raises:
        CheckpointError: it is truncated or corrupt, or of a type that is not read.
    """
    try:
        return _read(path, file)
    except ValueError as error:
        raise CheckpointError(f"{path} is a GGML file that is truncated, corrupt or no GPT-J: {error}") from error


def _read(path: Path, file: BinaryIO) -> GgmlFile:
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    container = _CONTAINERS[file.read(4)]
    container_version = _integers(file, 1, 1, 3)[0] if container == "ggjt" else 0
    *_, file_type = _integers(file, 7, 0, 1 << 20)
    version = container_version - 1 if container == "ggjt" else file_type // _VERSION_FACTOR
    if version > 2:
        raise ValueError(f"version {version} of its blocks")
    _skip_vocabulary(file, has_scores=container == "ggjt")
    tensors: dict[str, TensorHeader] = {}
    types: dict[str, int] = {}
    while (position := file.tell()) < size_bytes:
        header, block_type = _read_tensor(path, file, version, _ALIGNMENT if container == "ggjt" else 1)
        name, end = header[0], header[1].offset_bytes + header[1].num_bytes
        if end > size_bytes or name in tensors or len(tensors) >= _MAX_TENSORS:
            raise ValueError(f"the tensor at byte {position} ends at byte {end} of {size_bytes}, or is there twice")
        tensors[name] = header[1]
        if block_type is not None:
            types[name] = block_type
        file.seek(end)
    return GgmlFile(version, types, tensors)


def _skip_vocabulary(file: BinaryIO, has_scores: bool) -> None:
    for _ in range(_integers(file, 1, 0, _MAX_TOKENS)[0]):
        num_bytes = _integers(file, 1, 0, _MAX_TOKEN_BYTES)[0] + 4 * has_scores
        if len(file.read(num_bytes)) < num_bytes:
            raise ValueError("it ends in the vocabulary")


def _read_tensor(
    path: Path, file: BinaryIO, version: int, alignment: int
) -> tuple[tuple[str, TensorHeader], int | None]:
    """Name and header, and the type of the blocks if it consists of such."""
    num_dimensions, name_bytes, code = _integers(file, 3, 0, 1 << 16)
    if not 1 <= num_dimensions <= 2 or name_bytes > _MAX_NAME_BYTES:
        raise ValueError(f"a tensor of {num_dimensions} dimensions with a name of {name_bytes} bytes")
    shape = tuple(reversed(_integers(file, num_dimensions, 1, 1 << 24)))
    name = file.read(name_bytes).decode("ascii")
    offset_bytes = -(-file.tell() // alignment) * alignment
    if code in _FLOAT_TYPES:
        dtype = _FLOAT_TYPES[code]
        num_bytes = math.prod(shape) * (4 if dtype == "F32" else 2)
        return (name, TensorHeader(path, dtype, shape, offset_bytes, num_bytes)), None
    if code not in BLOCK_TYPES or version < BLOCK_TYPES[code].first_version:
        known = ", ".join(kind.name for kind in BLOCK_TYPES.values())
        raise CheckpointError(
            f"{path} has tensors of GGML's type {code} in version {version}, and only f32, f16, {known} are read: use "
            "the original checkpoint"
        )
    if len(shape) != 2 or shape[1] % BLOCK:
        raise ValueError(f"blocks for a tensor {list(shape)}")
    shape = (shape[0], shape[1] // BLOCK * BLOCK_TYPES[code].bytes_of_version[version])
    return (name, TensorHeader(path, "U8", shape, offset_bytes, math.prod(shape))), code


def _integers(file: BinaryIO, count: int, least: int, most: int) -> tuple[int, ...]:
    """Raises a ValueError if one is not in the range, or the file ends."""
    data = file.read(4 * count)
    if len(data) < 4 * count:
        raise ValueError("it ends within a header")
    values = struct.unpack(f"<{count}i", data)
    if not all(least <= value <= most for value in values):
        raise ValueError(f"{values} where numbers from {least} to {most} belong")
    return values
