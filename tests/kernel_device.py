"""Where the tests of Triton's kernels run: on the GPU, or in Triton's interpreter, which `conftest` has chosen then.

The interpreter takes about a millisecond for a program, multiplies no matrices of bfloat16, and cuts bfloat16 off
instead of rounding it.
"""

from __future__ import annotations

import torch

IS_INTERPRETED = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
MATRIX_DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
"""Types that chunks can be tested in."""
