"""`gptj-dist doctor` on a cluster: every node is asked, one that is silent is told, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from benchmarks.servers import free_port
from tests.http.test_deployments import ROOT, SERVE
from tests.http.test_local_nodes import Nodes, descendants, local_nodes
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

PLAN = ["demo", "--stages", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes without a dashboard."""
    log = tmp_path_factory.mktemp("nodes") / "log"
    with local_nodes(log, "2", "--cpus-per-node", "2", "--no-dashboard") as nodes:
        yield nodes


def python(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**environment, "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def doctor(nodes: Nodes, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "gptj_dist", "doctor", *arguments, environment=nodes.environment)


def test_all_nodes_are_reported_and_nothing_stays_on_them(nodes: Nodes) -> None:
    port = str(free_port())
    done = doctor(nodes, *PLAN, "--port", port)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line.split()[1:3] for line in lines[:2]] == [["node", "1"], ["node", "2"]]
    assert "agree on all nodes" in done.stdout
    assert "each node reaches the next" in done.stdout
    assert lines[-1].startswith("Serving would work")
    assert done.stderr == ""
    wait_until(lambda: not any(map(is_scout, descendants(nodes.process.pid))), "no scout is left", timeout_s=20)


def is_scout(pid: int) -> bool:
    path = Path(f"/proc/{pid}/cmdline")
    return path.exists() and b"Scout" in path.read_bytes()


def test_a_plan_that_the_cluster_cannot_take_is_exit_code_1(nodes: Nodes) -> None:
    done = doctor(nodes, *PLAN, "--cpus-per-stage", "3", "--port", str(free_port()))
    assert done.returncode == 1
    assert "the nodes have 4 CPUs" in done.stdout
    assert "cure: try --cpus-per-stage" in done.stdout


def test_where_serve_runs_already_its_address_counts(nodes: Nodes) -> None:
    port = str(free_port())
    subprocess.run([SERVE, "start", "--http-port", port], env=nodes.environment, check=True, timeout=60)
    try:
        done = doctor(nodes, *PLAN, "--port", port)
    finally:
        subprocess.run([SERVE, "shutdown", "--yes"], env=nodes.environment, check=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Serve runs already: its address, 127.0.0.1:{port}, counts" in done.stdout


def test_an_address_where_no_ray_answers_is_one_line(nodes: Nodes) -> None:
    done = doctor(nodes, *PLAN, "--address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gptj-dist: no Ray answers at 127.0.0.1:")


def test_a_node_that_does_not_answer_is_a_finding_and_no_hang(nodes: Nodes) -> None:
    code = """
import os
from gptj_dist.operate.launch.cluster import connected
with connected(os.environ["RAY_ADDRESS"]):
    from gptj_dist.operate.doctor.survey import survey_cluster
    cluster = survey_cluster(None, ("127.0.0.1", 0), timeout_s=30)
    print(len(cluster.nodes), len(cluster.silent))
"""
    (raylet,) = [pid for pid in descendants(nodes.process.pid) if is_raylet_of_a_worker_node(pid)]
    os.kill(raylet, signal.SIGSTOP)
    try:
        done = python("-c", code, environment=nodes.environment)
    finally:
        os.kill(raylet, signal.SIGCONT)
    assert done.stdout.split() == ["1", "1"], done.stderr


def is_raylet_of_a_worker_node(pid: int) -> bool:
    path = Path(f"/proc/{pid}/cmdline")
    arguments = path.read_bytes().split(b"\0") if path.exists() else []
    return arguments[:1] != [] and arguments[0].endswith(b"/raylet") and b"--head" not in arguments
