"""Writes matrices of 4 bits as AutoGPTQ's readers read them; `layouts/gptq.py` says how they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptj_dist.checkpoint.writer import Layout
from gptj_dist.quantization import INT4_GROUP, scale_name

_WORD = 8
"""Codes of 4 bits in a word."""

_ZEROS = 0x77777777
"""Of eight outputs, less 1 each: 8 stands for 0."""

CONFIG: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": INT4_GROUP,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
"""What `config.json` says of it."""


def quantize_config() -> bytes:
    """`quantize_config.json`, in which old readers look."""
    return json.dumps(CONFIG, indent=2).encode() + b"\n"


def gptq_layout(layout: Layout) -> Layout:
    """The same tensors, where each matrix of 4 bits and its scales are four others."""
    made: Layout = {}
    scales = {scale_name(name) for name, (code, _) in layout.items() if code == "U8"}
    for name, (code, shape) in layout.items():
        if code == "U8":
            rows, columns = shape[0], 2 * shape[1]
            beginning, num_groups = name.removesuffix("weight"), columns // INT4_GROUP
            made[f"{beginning}qweight"] = ("I32", (columns // _WORD, rows))
            made[f"{beginning}qzeros"] = ("I32", (num_groups, rows // _WORD))
            made[f"{beginning}scales"] = ("F16", (num_groups, rows))
            made[f"{beginning}g_idx"] = ("I32", (columns,))
        elif name not in scales:
            made[name] = (code, shape)
    return made


def matrix_name(name: str) -> str | None:
    """The weight that the first of the four tensors belongs to; None for any other tensor."""
    return f"{name.removesuffix('qweight')}weight" if name.endswith(".qweight") else None


def gptq_tensors(name: str, values: Tensor, scales: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The four tensors of a weight, in the order of `gptq_layout`.

    Args:
        values: uint8 [rows, columns / 2], two codes to a byte.
        scales: float32 [rows, num_groups].
    """
    beginning, (rows, num_groups) = name.removesuffix("weight"), scales.shape
    yield f"{beginning}qweight", values.view(torch.int32).t().contiguous()
    yield f"{beginning}qzeros", torch.full((num_groups, rows // _WORD), _ZEROS, dtype=torch.int32)
    yield f"{beginning}scales", scales.t().half().contiguous()
    yield f"{beginning}g_idx", torch.arange(num_groups, dtype=torch.int32).repeat_interleave(INT4_GROUP)
