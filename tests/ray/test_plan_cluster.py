"""`gptj-dist plan --devices cluster` against a Ray that runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from tests.http.server import local_ray

pytestmark = [pytest.mark.ray, pytest.mark.alone]


@pytest.mark.parametrize("name", ["cluster", "ray"])
def test_a_running_cluster_is_planned_for(name: str) -> None:
    with local_ray(num_cpus=2):
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            [sys.executable, "-m", "gptj_dist", "plan", "demo", "--devices", name, "--address", address],
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "gptj-dist serve demo --layers 28" in done.stdout
    assert "A 'cpu' is 2 cores" in done.stdout
