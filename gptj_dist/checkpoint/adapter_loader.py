"""Loads the tensors of adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from gptj_dist.checkpoint.headers import TensorHeader, row_major
from gptj_dist.checkpoint.loader import TORCH_DTYPES
from gptj_dist.errors import CheckpointError

_CHECKED_AT_ONCE = 16_384
"""Numbers; torch uses no threads for so few. It may run beside the thread that computes."""


def read_tensor(header: TensorHeader) -> Tensor:
    """A tensor of an adapter, as it is stored, on the CPU.

    Raises:
        CheckpointError: the file cannot be read or was truncated, or a number is NaN or infinite.
    """
    try:
        with header.path.open("rb") as file:
            file.seek(header.offset_bytes)
            data = bytearray(file.read(header.num_bytes))
    except OSError as error:
        raise CheckpointError(f"{header.path} cannot be read: {error.strerror}") from error
    if len(data) < header.num_bytes:
        raise CheckpointError(f"{header.path} was truncated while it was being read")
    flat = torch.frombuffer(data, dtype=TORCH_DTYPES[header.dtype])
    if not all(bool(piece.isfinite().all()) for piece in torch.split(flat, _CHECKED_AT_ONCE)):
        raise CheckpointError(f"{header.path} holds NaN or infinity: the adapter is damaged, or its training diverged")
    return flat.as_strided(header.shape, header.strides or row_major(header.shape))
