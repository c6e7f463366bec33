"""The kernels compile for the GPUs that they are for and fit their shared memory: Triton can tell without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SHARED_BYTES = {75: 64 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""What one program may have, by compute capability: T4, L4, H100 and H200, RTX 50. An A100 runs the code of an L4."""

CASES = [(75, "fp16"), (89, "bf16"), (90, "bf16"), (90, "fp32"), (120, "bf16")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """What is told of the kernels of each case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.compile_kernels", *(f"{number}:{dtype}" for number, dtype in CASES)],
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("capability", "dtype"), CASES)
def test_all_kernels_compile_and_fit(
    compiled: dict[tuple[int, str], list[dict[str, Any]]], capability: int, dtype: str
) -> None:
    kernels = compiled[capability, dtype]
    assert len(kernels) == 9
    assert max(kernel["shared_bytes"] for kernel in kernels) <= SHARED_BYTES[capability]
    uses_tensor_cores = {kernel["name"] for kernel in kernels if kernel["has_tensor_cores"]}
    assert uses_tensor_cores == ({"attend_tile", "multiply_low_bit"} if capability >= 80 and dtype != "fp32" else set())
