"""The device for tests of Triton's kernels: the GPU if there is one, else Triton's interpreter (set by `conftest`).

The interpreter takes about a millisecond per program, cannot multiply bfloat16 matrices, and truncates to bfloat16
instead of rounding.
"""

from __future__ import annotations

import torch

IS_INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
MATRIX_DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""Types in which chunks can be tested."""
