"""Gathers facts on every node of the Ray cluster that this process has joined."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptj_dist.operate.doctor.cluster import Cluster, Node, SilentNode
from gptj_dist.operate.doctor.facts import ModelQuestion, NodeFacts, gather_facts, installed_versions
from gptj_dist.operate.launch.cluster import applications_served, http_address
from gptj_dist.serving.sockets import why_not_reach

NODE_TIMEOUT_S = 60.0
"""A node starts a process and imports torch in a few seconds; a busy one needs more."""

DIAL_TIMEOUT_S = 3.0


class Scout:
    """Looks around on its node. A process of its own, so that what it takes on a GPU is given back when it ends."""

    def __init__(self) -> None:
        self._listener = socket.create_server((ray.util.get_node_ip_address(), 0))

    def gather(self, question: ModelQuestion | None, listen_at: tuple[str, int] | None) -> NodeFacts:
        """As `gather_facts`."""
        return gather_facts(question, listen_at)

    def port(self) -> int:
        """Where it can be reached, on its node's address; the system completes connections without its help."""
        port: int = self._listener.getsockname()[1]
        return port

    def dial(self, ip: str, port: int) -> str | None:
        """Why another scout cannot be reached, or None if it can."""
        return why_not_reach(ip, port, DIAL_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class Post:
    """A node, and the scout that was sent there."""

    name: str
    ip: str
    host: str
    resources: Mapping[str, float]
    scout: Any


def survey_cluster(
    question: ModelQuestion | None, listen_at: tuple[str, int], timeout_s: float = NODE_TIMEOUT_S
) -> Cluster:
    """Asks all nodes of the connected cluster at once.

    Args:
        listen_at: host and port to try on each machine, unless Serve runs there already.
        timeout_s: for the slowest node; one that takes longer counts as silent.
    """
    applications = applications_served()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeManagerAddress"]))
    posts = [_send_scout(f"node {i}", node) for i, node in enumerate(alive, start=1)]
    try:
        calls = [
            post.scout.gather.remote(question, listen_at if is_first and applications is None else None)
            for post, is_first in _first_on_each_host(posts)
        ]
        answers = list(zip(posts, _collect(calls, timeout_s), strict=True))
        heard = [(post, answer) for post, answer in answers if isinstance(answer, NodeFacts)]
        return Cluster(
            nodes=tuple(Node(post.name, post.ip, facts, post.resources) for post, facts in heard),
            versions_here=installed_versions(),
            is_running=True,
            free=ray.available_resources(),
            silent=tuple(SilentNode(p.name, p.ip, answer) for p, answer in answers if isinstance(answer, str)),
            broken_links=tuple(_broken_links([post for post, _ in heard], timeout_s)),
            applications=applications,
            serve_address=None if applications is None else ":".join(map(str, http_address())),
        )
    finally:
        for post in posts:
            ray.kill(post.scout)


def _send_scout(name: str, node: Mapping[str, Any]) -> Post:
    scout = ray.remote(Scout).options(
        num_cpus=0,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    )
    return Post(name, node["NodeManagerAddress"], node["NodeManagerHostname"], node["Resources"], scout.remote())


def _first_on_each_host(posts: Sequence[Post]) -> Iterator[tuple[Post, bool]]:
    """Whether a node is the first of its machine: two that try one port at once would find each other."""
    seen: set[tuple[str, str]] = set()
    for post in posts:
        yield post, (post.ip, post.host) not in seen
        seen.add((post.ip, post.host))


def _collect(calls: Sequence[Any], timeout_s: float) -> list[Any]:
    """The answers; in place of one that did not come, the reason, as a string."""
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    return [_result(call) if call in done else f"silent for {timeout_s:.0f} s" for call in calls]


def _result(call: Any) -> Any:
    try:
        return ray.get(call)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1].strip()  # the end of a traceback


def _broken_links(posts: Sequence[Post], timeout_s: float) -> Iterator[str]:
    """Each node dials the next one, the last the first."""
    if len(posts) < 2:
        return
    next_posts = [*posts[1:], posts[0]]
    ports = _collect([post.scout.port.remote() for post in next_posts], timeout_s)
    calls = [p.scout.dial.remote(q.ip, port) for p, q, port in zip(posts, next_posts, ports, strict=True)]
    for post, target, reason in zip(posts, next_posts, _collect(calls, timeout_s), strict=True):
        if reason is not None:
            yield f"{post.name} cannot reach {target.name} at {target.ip}: {reason}"
