"""`cluster/local_nodes.py` starts nodes that work as several machines would, and ends what it started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.servers import free_port
from tests.http.server import Server
from tests.http.test_deployments import REQUEST, ROOT, SERVE, model, on_logical_resources, read
from tests.waiting import wait_until

__all__ = ["model"]  # a fixture

pytestmark = pytest.mark.ray

RUNS = re.compile(r"gptj_dist_num_requests_running\{[^}]*\} 1")
RAY = str(Path(sys.executable).with_name("ray"))
NUM_LONG = 4

ORPHANS_END_S = 5
"""Stages whose coordinator has died end by themselves within this time."""


@dataclass(frozen=True)
class Nodes:
    """Running nodes.

    Args:
        environment: this process's, with what the script says to export.
        directory: where the nodes keep logs and sockets.
    """

    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    directory: Path

    def actors(self, part: str) -> list[dict[str, Any]]:
        """The living actors with a part of a name, as Ray's state API shows them."""
        answer = wait_until(self._actors, "Ray's state API answers")
        found = answer["data"]["result"]["result"]
        return [actor for actor in found if part in actor["name"] and actor["state"] == "ALIVE"]

    def stages(self) -> list[dict[str, Any]]:
        return self.actors("/stage-")

    def machine(self, actor: dict[str, Any]) -> str:
        """The number of the node on which an actor is."""
        url = f"{self.environment['RAY_DASHBOARD_ADDRESS']}/api/v0/nodes"
        found = httpx.get(url, timeout=30).raise_for_status().json()["data"]["result"]["result"]
        (node,) = [node for node in found if node["node_id"] == actor["node_id"]]
        return str(node["labels"]["machine"])

    def _actors(self) -> dict[str, Any] | None:
        """What the state API says, or None while it is too busy to say it in JSON."""
        url = f"{self.environment['RAY_DASHBOARD_ADDRESS']}/api/v0/actors"
        try:
            answer: dict[str, Any] = httpx.get(url, params={"limit": 100}, timeout=30).raise_for_status().json()
        except (httpx.HTTPError, ValueError):
            return None
        return answer

    def stop(self, number: signal.Signals) -> None:
        """Ends the nodes; checks that nothing of theirs is left."""
        started = descendants(self.process.pid)
        assert len(started) > 2
        self.process.send_signal(number)
        assert self.process.wait(timeout=30) == 0
        wait_until(lambda: not started & running(), "the nodes' processes have ended", timeout_s=10)
        assert not self.directory.exists()


@contextmanager
def local_nodes(log: Path, *args: str) -> Iterator[Nodes]:
    """The script, once it has said that the nodes are up."""
    command = [sys.executable, str(ROOT / "cluster" / "local_nodes.py"), *args]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            wait_until(lambda: "Ctrl-C stops them." in log.read_text() or process.poll(), "the nodes are up")
            said = log.read_text()
            directory = re.search(r"logs in (\S+) until", said)
            assert directory is not None, said
            yield Nodes(process, os.environ | dict(re.findall(r"export (\w+)=(\S+)", said)), Path(directory[1]))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes, each with room for a whole pipeline of two stages."""
    log = tmp_path_factory.mktemp("nodes") / "log"
    with local_nodes(log, "2", "--cpus-per-node", "4", "--gpus-per-node", "2") as nodes:
        yield nodes
        nodes.stop(signal.SIGINT)


def stage_number(actor: dict[str, Any]) -> int:
    """Of an actor that is a stage."""
    return int(actor["name"].rpartition("-")[2])


def processes() -> list[list[str]]:
    """Process id, parent's id and state of every process."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in lines.splitlines()]


def running() -> set[int]:
    """The ids of processes that have not ended; those that nobody has waited for yet have."""
    return {int(pid) for pid, _, state in processes() if not state.startswith("Z")}


def descendants(root: int) -> set[int]:
    """The ids of a process and all below it."""
    found, parents = {root}, [(int(pid), int(parent)) for pid, parent, _ in processes()]
    while more := {pid for pid, parent in parents if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> list[str]:
    """The addresses at which these processes listen."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[3] for line in lines if {int(pid) for pid in re.findall(r"pid=(\d+)", line)} & pids]


def beyond_loopback(addresses: Sequence[str]) -> list[str]:
    return [address for address in addresses if not address.startswith(("127.", "[::1]", "[::ffff:127."))]


def answers_from_each_node(base: str) -> bool:
    """Each node has a proxy, all at one port here; new connections land on one or another."""
    return all(httpx.get(f"{base}/ready", timeout=30).status_code == 200 for _ in range(12))


def test_the_two_node_config_puts_a_stage_on_each_node_and_answers(nodes: Nodes, model: str, tmp_path: Path) -> None:
    config, port = on_logical_resources(read(ROOT / "deployments" / "two-node.yaml"), model), free_port()
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["stage_nodes"] = ["machine=1", "machine=0"]
    path = tmp_path / "two-node.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([SERVE, "deploy", str(path)], env=nodes.environment, check=True, timeout=60)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        server = Server(f"http://127.0.0.1:{port}", client)
        wait_until(server.is_ready, "the pipeline is ready")
        assert server.complete(**REQUEST)["usage"]["completion_tokens"] == 5
        stages = nodes.stages()
        assert [nodes.machine(stage) for stage in sorted(stages, key=stage_number)] == ["1", "0"]
        addresses = listening(descendants(nodes.process.pid))
    assert f"127.0.0.1:{port}" in addresses
    assert beyond_loopback(addresses) == []
    (coordinator,) = [actor for actor in nodes.actors("#Pipeline#") if "/stage-" not in actor["name"]]
    os.kill(coordinator["pid"], signal.SIGKILL)
    pids = {stage["pid"] for stage in stages}
    wait_until(lambda: not pids & running(), "orphaned stages of both nodes have ended", timeout_s=ORPHANS_END_S)
    subprocess.run([SERVE, "shutdown", "--yes"], env=nodes.environment, check=True, timeout=60)
    wait_until(lambda: not nodes.stages(), "the stages are gone")


def test_gptj_dist_serve_joins_the_nodes_and_leaves_them_as_they_were(nodes: Nodes, tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    program = str(Path(sys.executable).with_name("gptj-dist"))
    options = ["--plan", "auto", "--stages", "2", "--device", "cpu", "--no-speculation", "--port", str(port)]
    options += ["--max-batch-size", "1", "--drain-s", "0"]  # the requests of the last check take their time
    command = [program, "serve", "demo", *options]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=nodes.environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=150) as client,
    ):
        try:
            wait_until(lambda: "Ctrl-C stops." in log.read_text() or process.poll() is not None, "it serves")
            server = Server(f"http://127.0.0.1:{port}", client)
            assert process.poll() is None, log.read_text()
            wait_until(lambda: answers_from_each_node(server.base), "each proxy knows the way")
            assert server.complete(**REQUEST)["usage"]["completion_tokens"] == 5
            assert beyond_loopback(listening(descendants(process.pid))) == []
            planned = re.findall(r"stage \d: \d+ layers? on cpu of .* \(machine=(\d)\)", log.read_text())
            assert sorted(planned) == ["0", "1"], log.read_text()
            assert [nodes.machine(stage) for stage in sorted(nodes.stages(), key=stage_number)] == planned
            check_that_a_node_drains_and_loses_nothing(nodes, server)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0, log.read_text()
        finally:
            process.kill()
    wait_until(lambda: not nodes.stages(), "the stages are gone")
    assert nodes.process.poll() is None


def check_that_a_node_drains_and_loses_nothing(nodes: Nodes, server: Server) -> None:
    """Its stages move while it lives. Its ingress stays until the requests are answered, whatever `--drain-s` says."""
    (ingress,) = nodes.actors("#Ingress#")
    request = {"prompt": "Call me", "max_tokens": 900, "temperature": 0.8, "seed": 7, "ignore_eos": True}
    drain = ["drain-node", "--address", nodes.environment["RAY_ADDRESS"], "--node-id", ingress["node_id"]]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    drain += ["--deadline-remaining-seconds", "600"]
    with ThreadPoolExecutor(NUM_LONG) as pool:
        answers = [pool.submit(server.complete, **request, cache_salt=str(number)) for number in range(NUM_LONG)]
        wait_until(lambda: RUNS.search(server.client.get("/metrics").text), "a request runs")
        subprocess.run([RAY, *drain], env=nodes.environment, check=True, timeout=60, capture_output=True)

        def have_moved() -> bool:
            stages = nodes.stages()
            return len(stages) == 2 and ingress["node_id"] not in {stage["node_id"] for stage in stages}

        wait_until(have_moved, "both stages are on the node that stays", 120)
        (text,) = {answer.result(timeout=150)["choices"][0]["text"] for answer in answers}
    assert text
    wait_until(lambda: ingress["pid"] not in running(), "the ingress has ended", 60)
    assert server.complete(**REQUEST)["usage"]["completion_tokens"] == 5


def test_sigterm_ends_the_nodes_and_everything_below_them(tmp_path: Path) -> None:
    with local_nodes(tmp_path / "log", "1", "--no-dashboard") as nodes:
        nodes.stop(signal.SIGTERM)
