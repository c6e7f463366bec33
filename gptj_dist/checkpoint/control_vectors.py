"""Reads control vectors: directions that are added behind layers.

They are in the gguf form of repeng and llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), or in
safetensors with the same names, which may also hold one direction for each of a sequence's first positions, as
activation addition has them (Turner et al. 2023). Stdlib only.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from gptj_dist.checkpoint.adapters import AdapterPart, StoredAdapter
from gptj_dist.checkpoint.headers import ELEMENT_BYTES, MAX_DIMENSIONS, TensorHeader, listing, one_line, printable
from gptj_dist.checkpoint.index import read_stored_header
from gptj_dist.errors import CheckpointError, excerpt

MAGIC = b"GGUF"
ARCHITECTURE = "controlvector"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values by their numbers in the file, as `struct` names them."""
_STRING, _ARRAY = 8, 9
_DTYPES = {0: "F32", 1: "F16", 30: "BF16"}
_MAX_ENTRIES, _MAX_TEXT_BYTES, _MAX_ALIGNMENT = 4096, 1 << 16, 1 << 16
_MAX_POSITIONS = 128
_DIRECTION = re.compile(r"^direction\.(\d{1,4})$")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a gguf."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def is_directions(path: Path) -> bool:
    """Whether a file is a safetensors of directions alone."""
    if path.suffix != ".safetensors":
        return False
    try:
        names = read_stored_header(path)
    except CheckpointError:
        return False
    return bool(names) and all(map(_DIRECTION.match, names))


def read_directions(path: Path) -> StoredAdapter:
    """The directions in a safetensors file: [d_model] for all positions, or [positions, d_model] for the first ones.

    Raises:
        CheckpointError: it is broken, or has too many positions.
    """
    parts: list[AdapterPart] = []
    for name, header in read_stored_header(path).items():
        layer = int(name.removeprefix("direction."))
        if len(header.shape) != 2:
            parts.append(AdapterPart("hidden", layer, name, 1.0, vector=header))
            continue
        num_positions, width = header.shape
        if num_positions > _MAX_POSITIONS:
            raise CheckpointError(f"{path}: {name} has {num_positions} positions, {_MAX_POSITIONS} are served")
        num_bytes = header.num_bytes // max(num_positions, 1)
        for position in range(num_positions):
            offset = header.offset_bytes + position * num_bytes
            row = replace(header, shape=(width,), offset_bytes=offset, num_bytes=num_bytes)
            parts.append(AdapterPart("hidden", layer, name, 1.0, vector=row, position=position))
    if not parts:
        raise CheckpointError(f"{path} holds no directions")
    return StoredAdapter(path, "control vector", None, tuple(parts), (path,))


def read_control_vector(path: Path) -> StoredAdapter:
    """The control vector in a file.

    Raises:
        CheckpointError: it is truncated or corrupt, or holds something else.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {one_line(error)}") from error


def _read(path: Path, file: BinaryIO) -> StoredAdapter:
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(len(MAGIC))
    version, num_tensors, num_fields = _unpack(file, "IQQ")
    if version not in (2, 3) or max(num_tensors, num_fields) > _MAX_ENTRIES:
        raise ValueError(f"version {version}, {num_tensors} tensors and {num_fields} fields")
    fields = {_text(file): _value(file) for _ in range(num_fields)}
    if (kind := fields.get("general.architecture")) != ARCHITECTURE:
        raise CheckpointError(f"{path} is a GGUF of {excerpt(kind)}; only a control vector of it is read")
    entries = [_entry(file) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT:
        raise ValueError(f"alignment {excerpt(alignment)}")
    start = -(-file.tell() // alignment) * alignment
    parts = []
    for name, shape, type_number, offset in entries:
        found, dtype = _DIRECTION.match(name), _DTYPES.get(type_number)
        if found is None or dtype is None or len(shape) != 1:
            raise CheckpointError(f"{path} holds what is no direction of a layer: {listing([name])}")
        num_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
        if start + offset + num_bytes > size_bytes:
            raise ValueError(f"{printable(name)} ends behind the file")
        header = TensorHeader(path, dtype, shape, start + offset, num_bytes)
        parts.append(AdapterPart("hidden", int(found[1]), name, 1.0, vector=header))
    if not parts:
        raise CheckpointError(f"{path} holds no directions")
    hint = fields.get("controlvector.model_hint")
    return StoredAdapter(path, "control vector", hint if isinstance(hint, str) else None, tuple(parts), (path,))


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _text(file)
    (num_dimensions,) = _unpack(file, "I")
    if num_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"{num_dimensions} dimensions")
    shape = _unpack(file, f"{num_dimensions}Q")
    type_number, offset = _unpack(file, "IQ")
    return name, shape, type_number, offset


def _value(file: BinaryIO) -> object:
    (kind,) = _unpack(file, "I")
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        element, number = _unpack(file, "IQ")
        if number > _MAX_ENTRIES:
            raise ValueError(f"a list of {number} values")
        if element == _STRING:
            return [_text(file) for _ in range(number)]
        return list(_unpack(file, f"{number}{_scalar(element)}"))
    return _unpack(file, _scalar(kind))[0]


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")
    return _SCALARS[kind]


def _text(file: BinaryIO) -> str:
    (num_bytes,) = _unpack(file, "Q")
    if num_bytes > _MAX_TEXT_BYTES:
        raise ValueError(f"a text of {num_bytes} bytes")
    return file.read(num_bytes).decode("utf-8", "replace")


def _unpack(file: BinaryIO, form: str) -> tuple[int, ...]:
    layout = struct.Struct("<" + form)
    return layout.unpack(file.read(layout.size))
