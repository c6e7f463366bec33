"""Parts of a cluster that need no Ray: beacon, measurements, versions, interfaces, abandoned and failed starts, and
what `nodes` prints."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptj_dist.errors import ConfigurationError
from gptj_dist.interfaces import address_of
from gptj_dist.operate.cluster import ray_node
from gptj_dist.operate.cluster.beacon import Beacon, discover, read_answer
from gptj_dist.operate.cluster.code import Place
from gptj_dist.operate.cluster.overview import NodeView, Overview, print_overview, stages_by_node
from gptj_dist.operate.cluster.probe import ProbeServer, measure
from gptj_dist.operate.cluster.ray_node import NodeOptions, NodeStart, RayNode
from gptj_dist.operate.cluster.run import require_versions
from gptj_dist.operate.cluster.store import Member, NodeState
from gptj_dist.operate.launch.processes import is_running
from gptj_dist.operate.launch.session_room import SessionRoom
from gptj_dist.planning.links import Link

LOOPBACK = "127.0.0.1"
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
PLACE = Place("10.0.0.7", 6379)
VERSIONS = {"Python": "3.11.4", "Ray": "2.60.0", "gptj-dist": "1.0"}


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


ABANDONED_START = """
import os, subprocess, sys
from pathlib import Path
from gptj_dist.operate.cluster.ray_node import NODE_VARIABLE, NodeStart

def session(name, pid):
    (ray / f"session_{name}_{pid}" / "logs").mkdir(parents=True)

ray = Path(os.environ["RAY_TMPDIR"], "ray")
session("earlier", os.getpid())
start = NodeStart()
os.environ[NODE_VARIABLE] = "1:2"  # a child that has lost its parent is found by it
lost = ["setsid", "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
pids = [subprocess.Popen(["sleep", "60"]).pid, int(subprocess.run(lost, capture_output=True, check=True).stdout)]
session("own", os.getpid())
session("others", os.getppid())
start.sessions.noise.touch()
start.abandon(is_session_kept=sys.argv[1] == "True")
print(*pids)
print(*sorted(path.name.split("_")[-2] for path in ray.iterdir()))
"""


def test_a_head_is_found_by_its_beacon() -> None:
    port = free_udp_port()
    beacon = Beacon(PLACE, KEY, port)
    try:
        assert discover(KEY, 60.0, LOOPBACK, port) == PLACE
    finally:
        beacon.close()


def test_the_beacon_is_silent_to_strangers() -> None:
    beacon = Beacon(PLACE, KEY, free_udp_port())
    try:
        for question in (b"", b"hello", b"gptj-dist 1 " + bytes(48)):
            assert beacon.answer(question) is None
    finally:
        beacon.close()


def test_an_answer_of_a_stranger_or_to_another_question_is_not_taken() -> None:
    port = free_udp_port()
    beacon = Beacon(PLACE, OTHER_KEY, port)
    try:
        with pytest.raises(ConfigurationError, match="no cluster with this code"):
            discover(KEY, 0.01, LOOPBACK, port)
    finally:
        beacon.close()
    assert read_answer(KEY, b"n" * 16, b"gptj-dist 1 " + bytes(38)) is None
    assert read_answer(KEY, b"n" * 16, b"") is None


def test_a_link_is_measured_in_both_directions() -> None:
    server = ProbeServer(LOOPBACK, KEY)
    try:
        found = measure(LOOPBACK, server.port, KEY, 4 << 20, source=LOOPBACK)
    finally:
        server.close()
    assert 0 < found.latency_s < 10
    assert found.there_bytes_per_s > 1e6
    assert found.back_bytes_per_s > 1e6


def test_measurements_are_for_holders_of_the_key_only() -> None:
    server = ProbeServer(LOOPBACK, KEY)
    try:
        with pytest.raises(OSError, match="closed"):
            measure(LOOPBACK, server.port, OTHER_KEY, 1 << 20, source=LOOPBACK)
        assert measure(LOOPBACK, server.port, KEY, 1 << 20, source=LOOPBACK).latency_s > 0
    finally:
        server.close()


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_node_whose_start_is_abandoned_leaves_no_process_and_no_file(is_kept: bool) -> None:
    command = [sys.executable, "-c", ABANDONED_START, str(is_kept)]
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory:  # short: Ray puts sockets there
        environment = {**os.environ, "RAY_TMPDIR": directory}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    children, sessions = done.stdout.splitlines()
    assert not any(map(is_running, map(int, children.split())))
    assert sessions == ("earlier others own" if is_kept else "earlier others")


@pytest.fixture
def failing_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str | None]:
    """Sessions of the nodes that do not start, one after the other; None fails before it has one."""
    sessions: list[str | None] = []

    class FailingNode:
        """As Ray's."""

        def __init__(self, *_: Any, **__: Any) -> None:
            name = sessions.pop(0)
            if not sessions:
                monkeypatch.setattr(ray_node, "START_LIMIT_S", 0.0)
            print("printed by Ray", file=sys.stderr)
            if name is not None:
                self._logs = tmp_path / name / "logs"
                self._logs.mkdir(parents=True, exist_ok=True)
            raise Exception("The current node timed out\nduring startup.")

        def get_logs_dir_path(self) -> str:
            return str(self._logs)

    monkeypatch.setattr("ray._private.node.Node", FailingNode)
    monkeypatch.setattr(ray_node, "find_room", lambda: SessionRoom(tmp_path))
    monkeypatch.setattr(ray_node, "_prepare", lambda _: None)
    monkeypatch.setattr(ray_node, "_end_own_processes", lambda: None)
    return sessions


def failure_of_start(is_head: bool) -> str:
    options = NodeOptions(LOOPBACK, f"{LOOPBACK}:6379", "token")
    with pytest.raises(ConfigurationError, match=r"^Ray cannot start: The current node timed out during") as raised:
        RayNode.start(NodeStart(), options, is_head)
    return str(raised.value)


@pytest.mark.parametrize("is_head", [True, False])
def test_a_node_that_does_not_start_says_where_its_logs_are_and_keeps_those_of_no_earlier_attempt(
    failing_nodes: list[str | None], tmp_path: Path, is_head: bool
) -> None:
    of_head = "session_0_1"  # of another process, on this machine
    (tmp_path / of_head).mkdir()
    failing_nodes += [f"session_{number}_{os.getpid()}" if is_head else of_head for number in (1, 2)]
    last = tmp_path / str(failing_nodes[-1])
    assert failure_of_start(is_head).endswith(f"startup.; its logs are in {last / 'logs'}")
    assert (last / "logs" / f"node_{os.getpid()}.err").read_text() == "printed by Ray\n"
    assert {path.name for path in tmp_path.iterdir()} == {of_head, last.name}


def test_a_node_that_fails_before_it_has_logs_names_none(failing_nodes: list[str | None], tmp_path: Path) -> None:
    failing_nodes += [None]
    assert failure_of_start(is_head=True).endswith("startup.")
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_differs_is_one_line_that_says_both() -> None:
    require_versions(VERSIONS, VERSIONS | {"Python": "3.11.9"})
    with pytest.raises(ConfigurationError, match=r"Ray 2\.60\.0 there and 2\.55\.1 here$"):
        require_versions(VERSIONS, VERSIONS | {"Ray": "2.55.1"})
    with pytest.raises(ConfigurationError, match=r"Python 3\.11\.4 there and 3\.12\.0 here"):
        require_versions(VERSIONS, VERSIONS | {"Python": "3.12.0"})


def test_an_interface_is_named_by_itself_by_its_address_or_by_where_it_leads() -> None:
    assert address_of("lo") == address_of(LOOPBACK) == address_of(None, towards="127.0.0.2") == LOOPBACK


@pytest.mark.parametrize(("interface", "told"), [("nosuch0", "has lo"), ("203.0.113.9", "does not have the address")])
def test_an_interface_that_is_not_there_is_refused(interface: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        address_of(interface)


def an_overview(link: Link) -> Overview:
    def view(label: str, node_id: str, stages: tuple[str, ...]) -> NodeView:
        state = NodeState(node_id, f"host-{node_id}", f"10.0.0.{label}", {"CPU": 2.0}, is_draining=node_id == "b")
        member = Member(node_id, state.name, state.address, 1, 1, 0.0, ("cpu: EPYC, 2 cores",))
        return NodeView(label, state, member, stages)

    return Overview((view("1", "a", ()), view("2", "b", ("gptj-dist/stage-0",))), (link,))


def printed(overview: Overview) -> str:
    text = io.StringIO()
    print_overview(overview, Console(file=text, width=200))
    return text.getvalue()


def test_nodes_shows_machines_devices_links_and_stages() -> None:
    text = printed(an_overview(Link("a", "b", 0.001, 1.18e8, 0.0, 0.0012, 1e8)))
    for part in ("host-a", "10.0.0.2", "cpu: EPYC, 2 cores", "gptj-dist/stage-0", "host-b (leaving)", "1.00", "118"):
        assert part in text
    assert "slower" not in text


def test_nodes_names_a_path_that_has_become_slower() -> None:
    link = Link("a", "b", 0.001, 1.18e8, 0.0)
    for latency_s in (0.001, 0.011, 0.011, 0.011):
        link = link.looked_at(latency_s, 2e7)
    slower = an_overview(link)
    expected = "slower than it was: 11.00 ms and 20 MB/s for a short message now, 1.00 ms and 20 MB/s then"
    assert expected in printed(slower)
    assert slower.as_json()["links"][0]["is_slower"] is True
    assert replace(slower, links=()).slower == ()


def test_stages_are_found_by_the_names_of_their_actors() -> None:
    def actor(name: str, node: str, state: str = "ALIVE") -> dict[str, object]:
        return {"Name": name, "State": state, "Address": {"NodeID": node}}

    actors = [
        actor("gptj-dist/SERVE_REPLICA::poet#Pipeline#x1/1/stage-1", "a"),
        actor("gptj-dist/SERVE_REPLICA::poet#Pipeline#x1/1/stage-0", "b"),
        actor("gptj-dist/SERVE_REPLICA::poet#Pipeline#x1/0/stage-0", "b", "DEAD"),
        actor("SERVE_REPLICA::poet#Pipeline#x1", "a"),
        actor("SERVE_REPLICA::poet#Ingress#x2", "b"),
        actor("SERVE_REPLICA::other#Thing#x3", "b"),
        actor("SERVE_CONTROLLER_ACTOR", "a"),
    ]
    assert stages_by_node(actors) == {
        "a": ["poet/coordinator", "poet/stage-1"],
        "b": ["poet/ingress", "poet/stage-0"],
    }
