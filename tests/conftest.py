"""Settings of all tests: Ray stays on loopback, and Triton interprets its kernels if there is no GPU. Both libraries
read these environment variables when they are imported.
"""

import gc
import os
import sys

import pytest
import torch

from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT

os.environ.update(LOCAL_RAY_ENVIRONMENT)
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Stops the Ray that test modules share, if it runs, and collects garbage.

    A finalizer that warns while a plugin's source is parsed, after this, would break Python 3.11's parser.
    """
    if (server := sys.modules.get("tests.http.server")) is not None:
        server.SHARED.stop()
    gc.collect()
