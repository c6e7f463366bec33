"""Reads the tensors of one stage from safetensors files. Knows names, not what layers do with them.

Plain reads rather than a memory map: pages of a mapped file cannot be given back, and a checkpoint in the page cache
beside its packed weights does not fit a machine that the model itself fits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from gptj_dist.checkpoint.index import WTE, CheckpointIndex, TensorHeader, check_tensors, expected_tensors
from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import CheckpointError

_TORCH_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StageTensors:
    """The tensors of one stage, one at a time; to be used in a `with` statement.

    Args:
        directory: the checkpoint. Only the files that hold the stage's tensors need to be there, and are opened.
        config: the whole model's.
        layers: the stage's.

    Raises:
        CheckpointError: the stage's tensors are not all there in their shapes, or a file is broken.
    """

    def __init__(self, directory: Path, config: ModelConfig, layers: LayerRange) -> None:
        self._shapes = expected_tensors(config, layers)
        self._headers = CheckpointIndex(directory).headers(self._shapes)
        check_tensors(directory, config, layers, self._headers)
        self._files = {path: path.open("rb") for path in {header.path for header in self._headers.values()}}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def get(self, name: str) -> torch.Tensor:
        """Reads a tensor: a private copy on the CPU in the checkpoint's own dtype, which nothing here keeps alive.

        Args:
            name: a key of `expected_tensors`; `lm_head.bias` is zeros if a tied checkpoint lacks it.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
            KeyError: the tensor is not this stage's.
        """
        shape = self._shapes[name]
        if name not in self._headers:
            return torch.zeros(shape, dtype=_TORCH_DTYPES[self._headers[WTE].dtype])
        header = self._headers[name]
        return _read(self._files[header.path], header)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def _read(file: BufferedReader, header: TensorHeader) -> torch.Tensor:
    tensor = torch.empty(header.shape, dtype=_TORCH_DTYPES[header.dtype])
    file.seek(header.offset_bytes)
    num_bytes = file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
    if num_bytes != header.num_bytes:
        raise CheckpointError(f"{header.path} was truncated while it was being read")
    if sys.platform == "linux":
        # Of this tensor only: another stage on this machine may be about to read the rest.
        os.posix_fadvise(file.fileno(), header.offset_bytes, header.num_bytes, os.POSIX_FADV_DONTNEED)
    return tensor
