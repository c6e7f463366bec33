"""Reads edits of facts: ROME's and MEMIT's deltas, as `NAME.left` and `NAME.right` for the weight of that name.

The change of a weight is `left @ right`, transposed if the weight is stored that way. The file is a safetensors or an
uncompressed `.npz`. Stdlib only.
"""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptj_dist.checkpoint.adapters import AdapterPart, Place, StoredAdapter
from gptj_dist.checkpoint.headers import (
    ELEMENT_BYTES,
    MAX_DIMENSIONS,
    TensorHeader,
    listing,
    one_line,
    printable,
    read_safetensors,
)
from gptj_dist.errors import CheckpointError

SUFFIXES = (".safetensors", ".npz")

WEIGHT_NAME = (
    r"(?:transformer\.)?h\.(?P<layer>\d{1,4})\.(?:attn\.(?P<proj>q|k|v|out)_proj|mlp\.(?P<mlp>fc_in|fc_out))\.weight"
)
"""Of a weight that edits change, as a regular expression."""
_WEIGHT = re.compile(rf"^{WEIGHT_NAME}\.(?P<side>left|right)$")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_NUMPY_DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}
_MAX_NUMPY_HEADER = 4096


def read_edits(path: Path) -> StoredAdapter:
    """The edits in a file.

    Raises:
        CheckpointError: it is broken, or holds other tensors.
    """
    try:
        with path.open("rb") as file:
            stored = _read_npz(path, file) if path.suffix == ".npz" else read_safetensors(path, file)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    sides: dict[tuple[Place, int], dict[str, TensorHeader]] = {}
    unknown = []
    for name, header in stored.items():
        if (found := _WEIGHT.match(name)) is None:
            unknown.append(name)
        else:
            place = cast(Place, found["proj"] or found["mlp"])
            sides.setdefault((place, int(found["layer"])), {})[found["side"]] = header
    if unknown or not sides:
        raise CheckpointError(
            f"{path} holds no edits: its tensors must be NAME.left and NAME.right for weights of layers"
            + (f", and not {listing(unknown)}" if unknown else "")
        )
    return StoredAdapter(path, "edit", None, tuple(_part(path, *spot, two) for spot, two in sides.items()), (path,))


def _part(path: Path, place: Place, layer: int, sides: Mapping[str, TensorHeader]) -> AdapterPart:
    name = f"{place} of layer {layer}"
    if sides.keys() != {"left", "right"}:
        raise CheckpointError(f"{path}: {name} has no {'right' if 'left' in sides else 'left'}")
    left, right = _as_matrix(sides["left"]), _as_matrix(sides["right"])
    if left is None or right is None:
        raise CheckpointError(f"{path}: {name} must be of vectors or matrices")
    rank = left.shape[1]
    if right.shape == (rank, rank) or rank not in right.shape:
        raise CheckpointError(f"{path}: {name} has left {list(left.shape)} and right {list(right.shape)}")
    b = right if right.shape[1] == rank else _transposed(right)
    return AdapterPart(place, layer, name, 1.0, _transposed(left), b)


def _as_matrix(header: TensorHeader) -> TensorHeader | None:
    """A vector as one column; None for what is neither a vector nor a matrix."""
    if len(header.shape) == 2:
        return header
    if len(header.shape) != 1:
        return None
    (step,) = header.strides or (1,)
    return _with_layout(header, (header.shape[0], 1), (step, 1))


def _transposed(header: TensorHeader) -> TensorHeader:
    rows, columns = header.shape
    down, right = header.strides or (columns, 1)
    return _with_layout(header, (columns, rows), (right, down))


def _with_layout(header: TensorHeader, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorHeader:
    return TensorHeader(header.path, header.dtype, shape, header.offset_bytes, header.num_bytes, strides)


def _read_npz(path: Path, file: BinaryIO) -> dict[str, TensorHeader]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        return {entry.filename.removesuffix(".npy"): _read_array(path, file, entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as an uncompressed .npz: {one_line(error)}") from error


def _read_array(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> TensorHeader:
    """The header of an array; format of NumPy's `numpy/lib/format.py`."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{printable(entry.filename)} is compressed: save it by numpy.savez")
    file.seek(entry.header_offset)
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    file.seek(start)
    prefix = file.read(8)
    if magic != b"PK\x03\x04" or prefix[:6] != b"\x93NUMPY":
        raise ValueError(f"{printable(entry.filename)} is no array")
    size_bytes = 2 if prefix[6] == 1 else 4
    num_header_bytes = int.from_bytes(file.read(size_bytes), "little")
    if num_header_bytes > _MAX_NUMPY_HEADER:
        raise ValueError(f"{printable(entry.filename)} has a header of {num_header_bytes} bytes")
    fields = _literal(file.read(num_header_bytes))
    shape, dtype = fields["shape"], _NUMPY_DTYPES.get(fields["descr"])
    is_shape = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS
    if dtype is None or not is_shape or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise ValueError(f"{printable(entry.filename)} has a type or shape that no edit has")
    offset = start + 8 + size_bytes + num_header_bytes
    num_bytes = math.prod(shape) * ELEMENT_BYTES[dtype]
    if offset + num_bytes > start + entry.file_size:
        raise ValueError(f"{printable(entry.filename)} is truncated")
    strides = None
    if fields["fortran_order"]:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return TensorHeader(path, dtype, shape, offset, num_bytes, strides)


def _literal(text: bytes) -> dict[str, Any]:
    """A header's dict of Python literals. Raises ValueError."""
    try:
        fields = ast.literal_eval(text.decode("latin-1").strip())
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"an array's header is malformed: {type(error).__name__}") from None
    if not isinstance(fields, dict) or not fields.keys() >= {"descr", "fortran_order", "shape"}:
        raise ValueError("an array's header lacks fields")
    if not isinstance(fields["descr"], str):
        raise ValueError("an array has named columns")
    return fields
