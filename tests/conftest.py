"""What holds for all tests: a Ray that is started stays on loopback, and without a GPU Triton interprets its kernels.
Both read these variables when they are imported.
"""

import os
import sys

import pytest
import torch

from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT

os.environ.update(LOCAL_RAY_ENVIRONMENT)
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps all that starts Ray on one of pytest-xdist's workers, where modules share a Ray; others go file by file."""
    for item in items:
        is_ray = item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("ray" if is_ray else str(item.path)))


def pytest_sessionfinish() -> None:
    """Stops the Ray that test modules share, if one of them has started it."""
    if (server := sys.modules.get("tests.http.server")) is not None:
        server.SHARED.stop()
