"""A cluster by `up` and `join` alone, as a user forms one: on loopback, where nothing listens beyond it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.servers import free_port
from gptj_dist import LLM, SamplingParams
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.manifest import stage_spans
from gptj_dist.checkpoint.spans import num_bytes
from gptj_dist.config import LayerRange
from tests.http.command import Command, running, wait_until_gone
from tests.http.test_local_nodes import beyond_loopback, listening
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

VERB = (sys.executable, "-m", "gptj_dist")
START_LIMIT_S = 180.0
PROMPT = "Call me Ishmael."
KEY = "an-admins-key"


@dataclass(frozen=True)
class Joined:
    """A head and a node that has joined it.

    Args:
        environment: of programs that belong to the cluster's user.
        code: what `up` printed.
        address: of the cluster.
        hidden: a directory that the node sees empty, where the system allows mount namespaces.
    """

    head: Command
    node: Command
    environment: dict[str, str]
    code: str
    address: str
    hidden: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*VERB, *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=START_LIMIT_S, check=False
        )

    def nodes(self) -> Any:
        done = self.run("nodes", "--address", self.address, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def without_directory(path: Path) -> list[str]:
    """A command before another one, which sees this directory empty: it has a mount namespace of its own."""
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{path}" && exec "$@"', "sh"]


def has_namespaces(path: Path) -> bool:
    """Whether the system allows that."""
    try:
        return subprocess.run([*without_directory(path), "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "200"}
    hidden = tmp_path_factory.mktemp("hidden")
    elsewhere = without_directory(hidden) if has_namespaces(hidden) else []
    environment.pop("RAY_ADDRESS", None)
    with running([*VERB, "up", "--interface", "lo", "--cpus", "1"], environment) as head:
        code = head.wait_for(r"gptj-dist join (\S+)", START_LIMIT_S)
        address = head.wait_for(r"head at (\S+)", START_LIMIT_S)
        join = [*elsewhere, *VERB, "join", code.lower(), "--cpus", "1", "--drain-s", "5"]  # Serve stays on the node
        with running(join, environment) as node:
            node.wait_for("Ctrl-C leaves", START_LIMIT_S)
            yield Joined(head, node, environment, code, address, hidden)


def _complete(url: str, **fields: str) -> str:
    """The text after `PROMPT`."""
    body = {"model": "fine-tuned", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **fields}
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=START_LIMIT_S)
    answer = response.raise_for_status().json()
    return str(answer["choices"][0]["text"])


def _said(logs: Path) -> str:
    return "".join(path.read_text() for path in logs.glob("*.log"))


def _fetched(logs: Path) -> int:
    """Bytes of the model's files."""
    return sum(map(int, re.findall(r"model files fetched.* bytes=(\d+)", _said(logs))))


def test_a_cluster_forms_by_up_and_join_and_shows_its_nodes_and_links(cluster: Joined) -> None:
    shown = cluster.nodes()
    assert [node["cpus"] for node in shown["nodes"]] == [1.0, 1.0]
    assert all("cores" in node["devices"][0] for node in shown["nodes"])
    pairs = {(link["from"], link["to"]) for link in shown["links"]}
    head, node = (node["node_id"] for node in shown["nodes"])
    assert pairs == {(head, node), (node, head)}
    assert all(link["latency_ms"] > 0 and link["mb_s"] > 1 for link in shown["links"])
    assert re.search(r"127\.0\.0\.1\): \d+\.\d\d ms, [\d,]+ MB/s there", cluster.node.output())


def test_nothing_listens_beyond_loopback(cluster: Joined) -> None:
    found = listening({*cluster.head.family(), *cluster.node.family()})
    assert len(found) > 5
    assert beyond_loopback(found) == []


def test_another_secret_is_refused_in_a_line(cluster: Joined) -> None:
    from gptj_dist.operate.cluster.code import JoinCode

    wrong = JoinCode.new(JoinCode.parse(cluster.code).place or pytest.fail("the code has no address"))
    done = cluster.run("join", str(wrong))
    assert done.returncode == 2
    assert "does not accept" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_node_without_the_model_gets_its_stages_part_from_the_head_and_keeps_it(cluster: Joined) -> None:
    """Its stage is killed, too: the one that takes its place finds the files there. Then it gets more layers."""
    if not has_namespaces(cluster.hidden):
        pytest.skip("the system allows no mount namespaces")
    model = shutil.copytree(resolve_model("demo"), cluster.hidden / "fine-tuned")
    nodes = [f"ray.io/node-id={node['node_id']}" for node in cluster.nodes()["nodes"]]
    settings = ["--dtype", "float32", "--cpus-per-stage", "0.4", "--stage-nodes", ",".join(nodes)]
    settings += ["--device", "cpu", "--port", str(free_port()), "--api-key", KEY]
    serve = [*VERB, "serve", str(model), "--address", cluster.address, *settings]
    with running(serve, cluster.environment) as server:
        url = server.wait_for(r"fine-tuned at (\S+)", START_LIMIT_S)
        logs = Path(server.wait_for(r"Logs: (\S+)"))
        first = _complete(url)
        spans = stage_spans(model, read_model_config(model), LayerRange(1, 2, 14, 28))
        assert _fetched(logs) == sum(map(num_bytes, spans.values()))
        (copy,) = Path(cluster.environment["XDG_CACHE_HOME"], "gptj-dist", "models").glob("*/fine-tuned")
        assert (copy / "model.safetensors").stat().st_blocks * 512 < 0.8 * (model / "model.safetensors").stat().st_size
        os.kill(int(re.findall(r"stage-1 stage loads.* pid=(\d+)", _said(logs))[-1]), signal.SIGKILL)
        assert _complete(url, cache_salt="again") == first
        wait_until(lambda: "model files were there" in _said(logs), "the next stage finds the files")
        moved = cluster.run("repartition", "--layers", "10,18", "--url", url, "--api-key", KEY)
        assert moved.returncode == 0, moved.stderr
        assert _complete(url, cache_salt="moved") == first
        spans = stage_spans(model, read_model_config(model), LayerRange(1, 2, 10, 28))
        wait_until(lambda: _fetched(logs) == sum(map(num_bytes, spans.values())), "the layers were fetched that moved")
        server.interrupt()
        wait_until_gone(server)
    with LLM("demo", dtype="float32") as alone:
        assert alone.generate(PROMPT, SamplingParams(max_tokens=24, temperature=0))[0].text == first


def test_a_node_leaves_by_a_command_and_the_head_ends_by_ctrl_c(cluster: Joined) -> None:
    """Last, as it takes the cluster apart."""
    done = cluster.run("leave", "--pid", str(cluster.node.process.pid))
    assert done.returncode == 0, done.stderr
    wait_until_gone(cluster.node)
    assert "Left the cluster." in cluster.node.output()
    wait_until(lambda: len(cluster.nodes()["nodes"]) == 1, "the node is gone", timeout_s=60)
    assert cluster.nodes()["links"] == []
    cluster.head.interrupt()
    wait_until_gone(cluster.head)
    assert cluster.head.process.returncode == 0
