"""What holds for all tests: a Ray that is started stays on loopback, and without a GPU Triton interprets its kernels.
Both read these variables when they are imported.
"""

import os
import sys

import torch

from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT

os.environ.update(LOCAL_RAY_ENVIRONMENT)
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_sessionfinish() -> None:
    """Stops the Ray that test modules share, if one of them has started it."""
    if (server := sys.modules.get("tests.http.server")) is not None:
        server.SHARED.stop()
