"""Finds the tensors in a file of `torch.save` and their positions, without unpickling it.

`torch.save` writes an uncompressed zip: a pickle, and one entry a storage (`torch/serialization.py`). The numbers of a
tensor are one range of bytes, so that a stage can read its own and no others. Stdlib only.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from gptj_dist.checkpoint.headers import ELEMENT_BYTES, TensorHeader, one_line, row_major
from gptj_dist.checkpoint.unpickle import (
    MAX_PICKLE_BYTES,
    MalformedPickleError,
    PickledTensor,
    Storage,
    UnsafePickleError,
    read_state_dict,
)
from gptj_dist.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A zip entry's own header: magic, lengths of its name and of its extra field."""

_BROKEN_ZIP = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError)
"""What `zipfile` raises for a broken directory."""

_Located = tuple[dict[str, PickledTensor], dict[str, int]]
"""Tensors by name, and the offset in bytes of each storage by its key."""


def is_torch_file(file: BinaryIO) -> bool:
    """Whether a file begins as those of `torch.save` do."""
    file.seek(0)
    return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def read_torch_file(path: Path, file: BinaryIO) -> dict[str, TensorHeader]:
    """The tensors of a pickled state dict, by name.

    Raises:
        CheckpointError: it is truncated, corrupt or no zip, or would run code if it were unpickled.
    """
    size_bytes = file.seek(0, io.SEEK_END)
    try:
        tensors, begins = _read_zip(file, size_bytes)
        headers = {name: _place(path, tensor, begins[tensor.storage.key]) for name, tensor in tensors.items()}
    except UnsafePickleError as error:
        raise CheckpointError(
            f"{path} is refused: unpickling it would run code, it asks for {error}; load it where you trust it and "
            "save its tensors as safetensors"
        ) from error
    except KeyError as error:
        raise CheckpointError(f"{path} is corrupt: it lacks the storage {one_line(error)}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt: {one_line(error)}; it has {size_bytes} bytes"
        ) from error
    needed_bytes = max((t.offset_bytes + t.num_bytes for t in headers.values()), default=0)
    if needed_bytes > size_bytes:
        raise CheckpointError(f"{path} is truncated: its tensors need {needed_bytes} bytes, it has {size_bytes}")
    return headers


def _read_zip(file: BinaryIO, size_bytes: int) -> _Located:
    if not is_torch_file(file):
        raise MalformedPickleError("it does not begin as a file of torch.save")
    try:
        with zipfile.ZipFile(_BoundedReads(file)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except _BROKEN_ZIP as error:
        _raise_if_cut_off(file, size_bytes)
        raise MalformedPickleError(f"it has no zip directory at its end ({one_line(error)})") from error
    if any(name.endswith("/constants.pkl") for name in entries):
        raise MalformedPickleError(
            "it is a TorchScript archive, a program and not weights: use the original checkpoint, in safetensors or "
            "PyTorch's form"
        )
    (pickle_name, *others) = [name for name in entries if name.endswith("/data.pkl")] or [""]
    if others or not pickle_name:
        raise MalformedPickleError("it is a zip, but not one of PyTorch's: unpack it")
    prefix = pickle_name.removesuffix("data.pkl")
    if f"{prefix}byteorder" in entries and _content(file, entries[f"{prefix}byteorder"], 16) != b"little":
        raise MalformedPickleError("its numbers are big-endian, which is not supported")
    tensors = read_state_dict(_content(file, entries[pickle_name], MAX_PICKLE_BYTES))
    begins = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        entry = entries[f"{prefix}data/{storage.key}"]
        if entry.file_size < _num_bytes(storage):
            raise MalformedPickleError(f"a storage of {_num_bytes(storage)} bytes has only {entry.file_size}")
        begins[storage.key] = _data_offset(file, entry)
    return tensors, begins


class _BoundedReads:
    """A file that reads at most `MAX_PICKLE_BYTES` at a time, because a corrupt zip may ask for any number."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, num_bytes: int = -1, /) -> bytes:
        return self._file.read(MAX_PICKLE_BYTES if num_bytes < 0 else min(num_bytes, MAX_PICKLE_BYTES))


def _raise_if_cut_off(file: BinaryIO, size_bytes: int) -> None:
    """A download that was cut off has lost its directory, but the pickle, the first entry, says what should follow.

    Raises:
        MalformedPickleError: with the number of bytes that are missing.
    """
    file.seek(0)
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size))
    file.seek(name_bytes + extra_bytes, io.SEEK_CUR)
    tensors = read_state_dict(file.read(MAX_PICKLE_BYTES))
    needed_bytes = sum(map(_num_bytes, {tensor.storage for tensor in tensors.values()}))
    if needed_bytes > size_bytes:
        raise MalformedPickleError(f"its tensors alone take {needed_bytes} bytes")


def _content(file: BinaryIO, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """A small entry's bytes."""
    if entry.file_size > limit:
        raise MalformedPickleError(f"{entry.filename[-20:]!r} has {entry.file_size} bytes")
    return _read_at(file, _data_offset(file, entry), entry.file_size)


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: after its own header, whose lengths may differ from the directory's."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise MalformedPickleError("it is compressed or encrypted, as PyTorch's files never are")
    header = _read_at(file, entry.header_offset, _LOCAL_HEADER.size)
    if not header.startswith(_ZIP_MAGIC) or len(header) < _LOCAL_HEADER.size:
        raise MalformedPickleError("its zip directory points to nowhere")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    return entry.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


def _read_at(file: BinaryIO, offset: int, num_bytes: int) -> bytes:
    """The bytes there, or fewer if the file ends before. Some files refuse to seek to an impossible offset."""
    if not 0 <= offset < file.seek(0, io.SEEK_END):
        return b""
    file.seek(offset)
    return file.read(num_bytes)


def _place(path: Path, tensor: PickledTensor, begin: int) -> TensorHeader:
    """Raises a ValueError if the tensor reaches out of its storage."""
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if len(shape) != len(strides):
        raise MalformedPickleError(f"a tensor has shape {shape}, but strides {strides}")
    num_spanned = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    num_elements = num_spanned if math.prod(shape) else 0
    if tensor.offset + num_elements > storage.num_elements:
        raise MalformedPickleError(f"a tensor of shape {shape} reaches out of its {storage.num_elements} elements")
    # Otherwise a file of some bytes could describe a model of terabytes.
    if math.prod(shape) > num_elements:
        raise MalformedPickleError(f"a tensor of shape {shape} uses its {num_elements} numbers several times")
    size = ELEMENT_BYTES[storage.dtype]
    is_contiguous = all(
        n == 1 or stride == expected for n, stride, expected in zip(shape, strides, row_major(shape), strict=True)
    )
    return TensorHeader(
        path,
        storage.dtype,
        shape,
        begin + tensor.offset * size,
        num_elements * size,
        None if is_contiguous or not num_elements else strides,
    )


def _num_bytes(storage: Storage) -> int:
    return storage.num_elements * ELEMENT_BYTES[storage.dtype]
