"""A cluster by `up` and `join` alone, as a user forms one: on loopback, where nothing listens beyond it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.http.command import Command, running, wait_until_gone
from tests.http.test_local_nodes import beyond_loopback, listening
from tests.waiting import wait_until

pytestmark = pytest.mark.ray

VERB = (sys.executable, "-m", "gptj_dist")
START_LIMIT_S = 180.0


@dataclass(frozen=True)
class Joined:
    """A head and a node that has joined it.

    Args:
        environment: of programs that belong to the cluster's user.
        code: what `up` printed.
        address: of the cluster.
    """

    head: Command
    node: Command
    environment: dict[str, str]
    code: str
    address: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*VERB, *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=START_LIMIT_S, check=False
        )

    def nodes(self) -> Any:
        done = self.run("nodes", "--address", self.address, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    with running([*VERB, "up", "--interface", "lo", "--cpus", "1"], environment) as head:
        code = head.wait_for(r"gptj-dist join (\S+)", START_LIMIT_S)
        address = head.wait_for(r"head at (\S+)", START_LIMIT_S)
        with running([*VERB, "join", code.lower(), "--cpus", "1"], environment) as node:
            node.wait_for("Ctrl-C leaves", START_LIMIT_S)
            yield Joined(head, node, environment, code, address)


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
