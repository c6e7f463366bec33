"""The types that stages compute in, by their names in the settings and on the wire."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gptj_dist.config import DTypeName

TORCH_DTYPES: Mapping[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
