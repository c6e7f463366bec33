"""Reads LM-Steer's steers: low-rank projections, or vectors, at the output of the last LayerNorm or at the logits.

Han et al. 2024. A file holds several steers; each is an adapter, `FILE#0` the first. Its strength is LM-Steer's epsilon
times the steer value. `FILE#no-bias` takes away the bias of `lm_head`, which LM-Steer leaves out. It is an adapter of
its own because the bias goes once, however many steers there are. Stdlib only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gptj_dist.checkpoint.adapters import AdapterPart, StoredAdapter
from gptj_dist.checkpoint.headers import ELEMENT_BYTES, STORED_DTYPES, TensorHeader, listing
from gptj_dist.checkpoint.index import read_stored_header
from gptj_dist.errors import CheckpointError

SUFFIXES = (".safetensors", ".bin", ".pt")

_NO_BIAS = "no-bias"
_KINDS = ({"projector1", "projector2"}, {"add_vec"}, {"offset_vec"})


def split_steer(path: Path) -> tuple[Path, int | None]:
    """The file, and the number behind `#`, or 0; None for that which takes the bias away."""
    name, _, number = path.name.partition("#")
    if name and number == _NO_BIAS:
        return path.with_name(name), None
    is_numbered = name and number.isascii() and number.isdigit() and len(number) < 6
    return (path.with_name(name), int(number)) if is_numbered else (path, 0)


def is_steer(path: Path) -> bool:
    """Whether a file holds steers, by the names of its tensors."""
    if path.suffix not in SUFFIXES:
        return False
    try:
        return set(read_stored_header(path)) in _KINDS
    except CheckpointError:
        return False


def read_steer(path: Path) -> StoredAdapter:
    """One steer of a file.

    Args:
        path: of the file, with `#` and the steer's number, or `#no-bias`.

    Raises:
        CheckpointError: the file is broken, or has no such steer.
    """
    file, number = split_steer(path)
    if number is None:
        part = AdapterPart("lm_head", None, "lm_head.bias", 1.0, replaces_bias=True)
        return StoredAdapter(path, "LM-Steer without lm_head's bias", None, (part,), (file,))
    tensors = {name: _at(path, name, header, number) for name, header in read_stored_header(file).items()}
    return StoredAdapter(path, "LM-Steer", None, (_part(path, tensors),), (file,))


def _part(path: Path, tensors: Mapping[str, TensorHeader]) -> AdapterPart:
    if "add_vec" in tensors:
        return AdapterPart("final", None, "add_vec", 1.0, vector=tensors["add_vec"])
    if "offset_vec" in tensors:
        return AdapterPart("lm_head", None, "offset_vec", 1.0, vector=tensors["offset_vec"])
    first, second = tensors["projector1"], tensors["projector2"]
    if len(first.shape) != 2 or len(second.shape) != 2:
        raise CheckpointError(f"{path}: {listing(tensors)} must be [steers, d_model, rank]")
    rows, columns = first.shape
    down, right = first.strides or (columns, 1)
    a = replace(first, shape=(columns, rows), strides=(right, down))
    return AdapterPart("final", None, "projector1, projector2", 1.0, a, second)


def _at(path: Path, name: str, header: TensorHeader, number: int) -> TensorHeader:
    """The part of a tensor that belongs to one steer."""
    if header.dtype not in STORED_DTYPES or header.strides is not None or not header.shape:
        raise CheckpointError(f"{path}: {name} is no plain tensor of numbers")
    if number >= header.shape[0]:
        raise CheckpointError(f"{path}: there are {header.shape[0]} steers, from #0 on")
    num_bytes = header.num_bytes // header.shape[0]
    if num_bytes % ELEMENT_BYTES[header.dtype]:
        raise CheckpointError(f"{path}: {name} is malformed")
    return replace(
        header, shape=header.shape[1:], offset_bytes=header.offset_bytes + number * num_bytes, num_bytes=num_bytes
    )
