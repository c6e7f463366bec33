"""The facts of all nodes, and the form of a finding. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gptj_dist.operate.doctor.facts import NodeFacts

Severity = Literal["ok", "warning", "failure"]

RAY_OBJECT_STORE_SHARE = 0.3
RAY_OBJECT_STORE_MOST_BYTES = 10**10
"""A Ray that is started here gives its object store this part of the free memory, more than that only in /dev/shm."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        severity: `failure` if serving would fail for it.
        subject: what was looked at, in a word or two.
        what: what was found.
        cure: what to do about it; None if nothing need be done.
    """

    severity: Severity
    subject: str
    what: str
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A node that answered.

    Args:
        name: for people, such as `node 2`.
        ip: its address in the cluster.
        resources: what Ray counts, or would count, on it.
    """

    name: str
    ip: str
    facts: NodeFacts
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SilentNode:
    """A node of the cluster that gave no facts."""

    name: str
    ip: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that serving would run on.

    Args:
        nodes: those that answered: at least this machine, where there is no cluster.
        versions_here: of this process, which must agree with the nodes'.
        is_running: Ray runs already; if not, `nodes` is this machine, on which serving would start one.
        free: unused resources of the whole cluster.
        broken_links: between nodes, for people.
        applications: what its Serve serves; None if it runs none.
        serve_address: where Serve listens, if it runs.
    """

    nodes: tuple[Node, ...]
    versions_here: Mapping[str, str | None]
    is_running: bool
    free: Mapping[str, float]
    silent: tuple[SilentNode, ...] = ()
    broken_links: tuple[str, ...] = ()
    applications: tuple[str, ...] | None = None
    serve_address: str | None = None

    @property
    def resources(self) -> Mapping[str, float]:
        """What the nodes that answered have in all."""
        names = {name for node in self.nodes for name in node.resources}
        return {name: sum(node.resources.get(name, 0.0) for node in self.nodes) for name in names}


def this_machine(facts: NodeFacts) -> Cluster:
    """The cluster that serving would start here: what Ray would count, were it started."""
    free_bytes = facts.cpu.free_bytes if facts.cpu else 0
    resources = {
        "CPU": facts.num_cpus,
        "GPU": float(len(facts.gpus) or facts.num_gpus),
        "object_store_memory": min(RAY_OBJECT_STORE_SHARE * free_bytes, RAY_OBJECT_STORE_MOST_BYTES),
    }
    return Cluster(
        (Node("this machine", "127.0.0.1", facts, resources),), facts.versions, is_running=False, free=resources
    )
