"""Where the tensors of a safetensors file lie, and what they are.

A safetensors file begins with 8 bytes of little-endian length and a JSON header
(https://github.com/huggingface/safetensors). It is parsed here, because the library gives no byte ranges, and with
limits, so that no file, whatever it holds, takes much memory or time (decision 0022). Stdlib only.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gptj_dist.config import DTypeName
from gptj_dist.errors import CheckpointError
from gptj_dist.file_kinds import kind_of_file

DTYPE_CODES: Mapping[str, DTypeName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes that a model computes in, by their names in safetensors headers."""

STORED_DTYPES: Mapping[str, str] = {**DTYPE_CODES, "F64": "float64"}
"""The dtypes that weights may be stored in, by their names in safetensors headers."""

ELEMENT_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element of each type that is known, those of weights and others."""

MAX_JSON_BYTES = 16 << 20
"""Of a header or an index. GPT-J's has 40 kB; parsed JSON takes up to 24 times its bytes in memory."""

MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 62
"""Of a dimension, an offset or a stride."""

_MAX_NAME_LENGTH = 120


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Position, shape and type of a tensor in a file.

    Args:
        dtype: as safetensors spells it, a key of `STORED_DTYPES` for weights.
        offset_bytes: from the start of the file.
        num_bytes: from there to the end of its last element.
        strides: in elements; None for a contiguous tensor. Only pickles hold other ones.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int
    strides: tuple[int, ...] | None = None


def read_safetensors(path: Path, file: BinaryIO) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: it is truncated or corrupt.
    """
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    header_bytes = int.from_bytes(file.read(8), "little")
    data_start = 8 + header_bytes
    if data_start > size_bytes or header_bytes > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} is truncated, or not a safetensors file: its header should take {data_start} bytes, "
            f"it has {size_bytes} in all"
        )
    try:
        tensors = {
            name: _parse_entry(path, data_start, entry)
            for name, entry in json.loads(file.read(header_bytes)).items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header: {one_line(error)}") from error
    described_bytes = max((t.offset_bytes + t.num_bytes for t in tensors.values()), default=data_start)
    if described_bytes != size_bytes:
        raise CheckpointError(
            f"{path} is truncated or corrupt: its header describes {described_bytes} bytes, it has {size_bytes}"
        )
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes, far more than any GPT-J needs")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        kind = kind_of_file(path)
        reason = f"is {kind}" if kind else f"cannot be read: {one_line(error)}"
        raise CheckpointError(f"{path} {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _parse_entry(path: Path, data_start: int, entry: Mapping[str, Any]) -> TensorHeader:
    begin, end = _sizes(entry["data_offsets"])
    shape, dtype = _sizes(entry["shape"]), str(entry["dtype"])
    if begin > end:
        raise ValueError(f"data_offsets {begin}, {end}")
    if dtype in ELEMENT_BYTES and math.prod(shape) * ELEMENT_BYTES[dtype] != end - begin:
        raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
    return TensorHeader(path, dtype[:16], shape, data_start + begin, end - begin)


def _sizes(values: Any) -> tuple[int, ...]:
    is_valid = isinstance(values, list) and len(values) <= MAX_DIMENSIONS
    if not is_valid or not all(type(value) is int and 0 <= value <= MAX_SIZE for value in values):
        raise ValueError("sizes that no tensor has")
    return tuple(values)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1][: len(shape)]


def printable(text: str) -> str:
    """A name from a file, shortened, and without characters that a terminal would interpret."""
    return repr(text[:_MAX_NAME_LENGTH])[1:-1][:_MAX_NAME_LENGTH]


def listing(names: Iterable[str], most: int = 8) -> str:
    """The first names from a file, `printable`, and how many more there are."""
    shown = [*map(printable, names)]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def one_line(error: Exception) -> str:
    """An error's text on one line; its class name if it has no text."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
