"""How a node leaves its cluster, and an application is removed: what they wait for, and for how long."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
from ray import serve

from gptj_dist.errors import StageFailedError
from gptj_dist.operate.cluster import run
from gptj_dist.operate.cluster.leaving import leave_cluster
from gptj_dist.operate.cluster.ray_node import RayNode
from gptj_dist.operate.cluster.run import wait_to_leave
from gptj_dist.operate.cluster.store import ClusterStore, NodeState
from gptj_dist.operate.launch import application
from gptj_dist.operate.launch.application import remove

DRAIN_S = 60.0
APP = "poet"

JOIN = """
import os, signal, subprocess, sys
from gptj_dist.operate.cluster.ray_node import NODE_VARIABLE
from gptj_dist.operate.launch.processes import start_tick

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.environ[NODE_VARIABLE] = f"{os.getpid()}:{start_tick(os.getpid())}"
child = subprocess.Popen(["sleep", "60"])
for step in "joined", "told":
    print(step, flush=True)
    signal.sigwait({signal.SIGTERM})
child.kill()
"""


class Store(ClusterStore):
    """Knows one node, `a`.

    Args:
        ends_at: of the node at each look: None while it does not drain. It is gone after the last one.
        error: raised instead, after the last one.
    """

    def __init__(self, ends_at: list[float | None], error: Exception | None = None) -> None:
        self.drained_s: list[float] = []
        self._ends_at = iter(ends_at)
        self._error = error

    def nodes(self) -> Mapping[str, NodeState]:
        for ends_at in self._ends_at:
            is_draining = ends_at is not None
            return {"a": NodeState("a", "host", "10.0.0.1", {}, is_draining, math.inf if ends_at is None else ends_at)}
        if self._error is not None:
            raise self._error
        return {}

    def drain(self, node_id: str, message: str, within_s: float) -> None:
        assert (node_id, message) == ("a", "the node leaves")
        self.drained_s.append(within_s)


class Node(RayNode):
    """The node `a`, whose raylet ends after some looks."""

    def __init__(self, num_looks: int = 1000) -> None:
        self._num_looks = num_looks

    @property
    def node_id(self) -> str:
        return "a"

    def lost_process(self) -> str | None:
        self._num_looks -= 1
        return "raylet" if self._num_looks < 0 else None


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOOK_PERIOD_S", 0.0)
    monkeypatch.setattr(application, "REMOVAL_POLL_S", 0.0)


def left(store: Store, node: Node, num_movable: Callable[[], int] | None = None) -> list[str]:
    """What is said meanwhile. Fails if that takes more than 20 looks.

    Args:
        num_movable: None stands for 2 processes that never end.
    """
    lines: list[str] = []
    num_movable = num_movable or iter([2] * 20).__next__
    wait_to_leave(store, node, DRAIN_S, num_movable, lines.append)
    return lines


def test_a_node_drains_when_it_leaves_and_ends_when_its_processes_have() -> None:
    numbers = iter([2, 2, 1, 0])
    store = Store([None, *[math.inf] * 9])
    said = left(store, Node(), lambda: next(numbers))
    assert store.drained_s == [DRAIN_S]
    assert [line.partition(" of a server")[0] for line in said] == ["2 processes", "1 processes"]


def test_a_node_that_was_drained_from_outside_keeps_its_deadline() -> None:
    store = Store([math.inf, math.inf, math.inf, 1.0])
    said = left(store, Node())
    assert store.drained_s == []
    assert said[-1] == "2 processes had not moved or finished; answers that were not complete are cut."


def test_a_node_whose_head_is_silent_waits_for_nothing() -> None:
    store = Store([None, math.inf, math.inf], ConnectionError("the head is gone"))
    with pytest.raises(ConnectionError):
        left(store, Node())


def test_a_node_whose_raylet_has_ended_waits_for_nothing() -> None:
    assert len(left(Store([math.inf] * 99), Node(num_looks=3))) == 1


def test_a_node_that_the_head_has_given_up_waits_for_nothing() -> None:
    assert len(left(Store([None, math.inf]), Node())) == 1


def test_leave_waits_as_long_as_the_node_does_unless_it_has_less_time() -> None:
    """The node is a process that ends when it is told for the second time."""
    command = [sys.executable, "-c", JOIN, "join"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as join:
        try:
            assert join.stdout is not None
            assert join.stdout.readline() == "joined\n"
            with pytest.raises(StageFailedError, match="has not left within 0 s"):
                leave_cluster(join.pid, 0.0)
            assert join.stdout.readline() == "told\n"
            assert leave_cluster(join.pid, None) == join.pid
        finally:
            join.kill()


class Cluster:
    """Serves an application, which is gone after some looks once it is deleted."""

    def __init__(self, num_looks: int) -> None:
        self.num_looks = num_looks
        self.is_deleted = False

    def served(self) -> tuple[str, ...]:
        self.num_looks -= self.is_deleted
        return (APP,) if self.num_looks > 0 else ()

    def delete(self, name: str, _blocking: bool = True) -> None:
        assert name == APP
        self.is_deleted = True
        if _blocking:
            raise TimeoutError("Serve itself waits a minute")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(num_looks=20)
    monkeypatch.setattr(serve, "delete", cluster.delete)
    monkeypatch.setattr(application, "applications_served", cluster.served)
    return cluster


def test_an_application_is_removed_when_the_last_requests_have_ended(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "stop_limit_s", lambda _: 35.0)
    remove(APP)
    assert cluster.is_deleted
    assert cluster.served() == ()


def test_an_application_whose_requests_take_longer_is_not_called_a_ray_that_is_silent(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "stop_limit_s", lambda _: -application.ANSWER_MARGIN_S * 2)
    with pytest.raises(StageFailedError, match="requests of the application 'poet' still run after 0 s"):
        remove(APP)
    assert cluster.is_deleted


def test_an_application_that_is_gone_is_removed(cluster: Cluster) -> None:
    cluster.num_looks = 0
    remove(APP)
    assert not cluster.is_deleted
