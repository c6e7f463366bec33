"""Writes safetensors files and their index, one tensor at a time.

The library's own writer takes a whole file's tensors at once (decision 0022). What is written depends on nothing
but its arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from gptj_dist.checkpoint.headers import DTYPE_CODES, ELEMENT_BYTES
from gptj_dist.config import DTypeName

CODE_OF: Mapping[DTypeName, str] = {name: code for code, name in DTYPE_CODES.items()}
"""The names that dtypes have in headers."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype as safetensors spells it, and shape; in the order of writing."""


class Writable(Protocol):
    """A file, as far as it is written to."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Takes all of the bytes."""
        ...


def write_safetensors(file: Writable, layout: Layout, tensors: Iterable[torch.Tensor]) -> None:
    """Writes a whole file.

    Args:
        tensors: those of the layout, in its order, contiguous and on the CPU; each is done with before the next is
            asked for.
    """
    file.write(encode_header(layout))
    for tensor, _ in zip(tensors, layout, strict=True):
        file.write(tensor.view(-1).view(torch.uint8).numpy().data)


def encode_header(layout: Layout) -> bytes:
    """What a file begins with: the length of the JSON, and the JSON, padded so that the numbers are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (code, shape) in layout.items():
        begin, end = end, end + tensor_bytes(code, shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def encode_index(files: Mapping[str, Layout]) -> bytes:
    """`model.safetensors.index.json` for these files."""
    total_bytes = sum(layout_bytes(layout) for layout in files.values())
    weight_map = {name: file for file, layout in files.items() for name in layout}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    return json.dumps(index, indent=2).encode() + b"\n"


def shard_names(single: str, num_files: int) -> list[str]:
    """Names of the files that the weights are spread over, as the Hugging Face libraries number them.

    Args:
        single: the name that one file for all of them would have.
    """
    stem, _, suffix = single.partition(".")
    return [f"{stem}-{i + 1:05}-of-{num_files:05}.{suffix}" for i in range(num_files)]


def layout_bytes(layout: Layout) -> int:
    """Bytes of the tensors, without the header."""
    return sum(tensor_bytes(code, shape) for code, shape in layout.values())


def tensor_bytes(code: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Args:
        code: its dtype as safetensors spells it.
    """
    return math.prod(shape) * ELEMENT_BYTES[code]
