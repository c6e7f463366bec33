"""Hidden states as bytes of a frame and back, in the type of the stages or in a shorter one.

A shorter type halves or quarters what crosses a link, and rounds: to 8 or 11 bits of a number in 16 bit, to 8 bits of a
row's largest number in int8, whose rows carry their scale. `docs/decisions/0047-wire.md` has the errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptj_dist.config import DTypeName, WireChoice, WireDType
from gptj_dist.stages.runner import TORCH_DTYPES
from gptj_dist.stages.transport.frames import SCALE_BYTES, HiddenStates

INT8_MAX = 127


def encode_hidden(hidden: Tensor, wire: WireChoice = "same") -> HiddenStates:
    """A tensor [rows, d_model] on the wire.

    Args:
        wire: the type there; `same` is the tensor's.
    """
    rows, d_model = hidden.shape
    name: WireDType = wire if wire != "same" else _name(hidden.dtype)
    if name == "int8":
        packed = _quantised(hidden.cpu())
    else:
        limit = torch.finfo(TORCH_DTYPES[name]).max
        is_narrower = limit < torch.finfo(hidden.dtype).max
        packed = (hidden.clamp(-limit, limit) if is_narrower else hidden).to(TORCH_DTYPES[name]).cpu().contiguous()
    return HiddenStates(name, (rows, d_model), packed.view(torch.uint8).numpy().data)


def decode_hidden(hidden: HiddenStates, dtype: DTypeName | None = None) -> Tensor:
    """The tensor [rows, d_model] of what was on the wire.

    Args:
        dtype: of the tensor; None for that on the wire, which is then not int8.
    """
    data = bytearray(hidden.data)
    if hidden.dtype == "int8":
        assert dtype is not None, "int8 is no type to compute in"
        return _numbers(data, hidden.shape).to(TORCH_DTYPES[dtype])
    tensor = torch.frombuffer(data, dtype=TORCH_DTYPES[hidden.dtype]).view(hidden.shape)
    return tensor if dtype is None else tensor.to(TORCH_DTYPES[dtype])


def _name(dtype: torch.dtype) -> DTypeName:
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)


def _quantised(hidden: Tensor) -> Tensor:
    """Rows of bytes: the row's scale, a float32, and then its numbers."""
    numbers = hidden.float()
    scales = numbers.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
    whole = (numbers / scales).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return torch.cat([scales.view(torch.uint8), whole.view(torch.uint8)], 1)


def _numbers(data: bytearray, shape: tuple[int, int]) -> Tensor:
    rows, d_model = shape
    packed = torch.frombuffer(data, dtype=torch.uint8).view(rows, SCALE_BYTES + d_model)
    scales = packed[:, :SCALE_BYTES].contiguous().view(torch.float32)
    return packed[:, SCALE_BYTES:].contiguous().view(torch.int8).float() * scales
