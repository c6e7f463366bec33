"""`gptj-dist plan --devices cluster` against a Ray that runs."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest
import ray

from gptj_dist.operate.launch.processes import command_lines
from tests.http.command import running
from tests.http.server import free_port, local_ray
from tests.verbs import run_verb

pytestmark = pytest.mark.ray


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_verb("plan", "demo", "--devices", *arguments, COLUMNS="100")


@pytest.mark.parametrize("name", ["cluster", "ray"])
def test_a_running_cluster_is_planned_for(name: str) -> None:
    with local_ray(num_cpus=2):
        done = plan(name, "--address", ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    assert "gptj-dist serve demo --layers 28" in done.stdout
    assert "A 'cpu' is 2 cores" in done.stdout


def test_the_ray_of_a_server_of_ours_is_planned_for_while_it_serves() -> None:
    with running([sys.executable, "-m", "gptj_dist", "serve", "demo", "--port", str(free_port())]) as server:
        base = server.wait_for(r"Ready after [\d.]+ s: demo at (http://\S+)")
        lines = command_lines()
        (address,) = {
            argument.removeprefix("--gcs-address=")
            for pid in server.family()
            for argument in lines.get(pid, ())
            if argument.startswith("--gcs-address=")
        }
        done = plan("cluster", "--address", address)
        assert done.returncode == 0, done.stderr
        assert "gptj-dist serve demo --layers 28" in done.stdout
        assert httpx.get(f"{base}/ready").status_code == 200
