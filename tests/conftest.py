"""Settings of all tests: Ray stays on loopback, and Triton interprets its kernels if there is no GPU. Both libraries
read these environment variables when they are imported.
"""

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

from gptj_dist.operate.launch.environment import LOCAL_RAY_ENVIRONMENT

os.environ.update(LOCAL_RAY_ENVIRONMENT | {"HF_HUB_OFFLINE": "1"})
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; what tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_MODULES = (
    "test_scaling",
    "test_actors",
    "test_benchmarks",
    "test_cli_serve",
    "test_stop",
    "test_local_nodes",
    "test_moving_actors",
    "test_readme",
    "test_deployments",
    "test_cluster",
    "test_failures",
    "test_faults",
    "test_live",
    "test_coordinator_death",
    "test_fields",
    "test_access",
    "test_soak",
    "test_metrics",
    "test_doctor",
    "test_many_requests",
    "test_openai_client",
    "test_verbs",
    "test_completions",
    "test_against_transformers",
    "test_exact",
    "test_reader_fuzz",
    "test_embeddings",
    "test_linear",
    "test_fuzzing",
    "test_exit_codes",
    "test_streams",
    "test_kernels",
    "test_library",
    "test_llm_calls",
    "test_shared_prompt",
    "test_plan_command",
    "test_hub_protocol",
)
"""Those that start Ray, then the others; the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the modules that take longest first, so that no worker is left with one of them at the end."""
    rank = {name: number for number, name in enumerate(LONGEST_MODULES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """Commands that a test runs in this process change what Ctrl-C does (`main`) or block it (`serve`)."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Stops the Ray that test modules share, if it runs, and collects garbage.

    A finalizer that warns while a plugin's source is parsed, after this, would break Python 3.11's parser.
    """
    if (server := sys.modules.get("tests.http.server")) is not None:
        server.SHARED.stop()
    gc.collect()
