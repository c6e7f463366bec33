"""What `gptj-dist nodes` shows: machines, devices, links, and which stage is where. Joins no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType

from gptj_dist.operate.cluster.store import ClusterStore, Member, NodeState
from gptj_dist.operate.tables import open_table
from gptj_dist.planning.links import Link

STAGE_NAMES = "gptj-dist/"
"""Beginning of the names of stages' actors; the application stands between `::` and `#`, the stage at the end."""

REPLICA_NAMES = "SERVE_REPLICA::"
PARTS = {"Pipeline": "coordinator", "Ingress": "ingress"}
"""Deployments of a server, which stand after the `#` of their replicas' names, and what their replicas are called."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node.

    Args:
        label: `1`, `2`, ...: the head first, then by address.
        stages: such as `gptj-dist/stage-0`; coordinators and ingresses, too.
    """

    label: str
    state: NodeState
    member: Member | None
    stages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """A cluster at one moment."""

    nodes: tuple[NodeView, ...]
    links: tuple[Link, ...]

    @property
    def slower(self) -> tuple[Link, ...]:
        """Links that have become slower than they were when the later of their nodes joined."""
        return tuple(link for link in self.links if link.is_slower)

    def as_json(self) -> dict[str, Any]:
        """For programs: units are in the names."""
        return {
            "nodes": [
                {
                    "node_id": node.state.node_id,
                    "name": node.state.name,
                    "address": node.state.address,
                    "is_draining": node.state.is_draining,
                    "cpus": node.state.resources.get("CPU", 0.0),
                    "gpus": node.state.resources.get("GPU", 0.0),
                    "devices": list(node.member.devices) if node.member else [],
                    "stages": list(node.stages),
                }
                for node in self.nodes
            ],
            "links": [
                {
                    "from": link.from_node,
                    "to": link.to_node,
                    "latency_ms": link.latency_s * 1e3,
                    "mb_s": link.bytes_per_s / 1e6,
                    "latest_latency_ms": None if link.latest_latency_s is None else link.latest_latency_s * 1e3,
                    "latest_mb_s": None if link.latest_bytes_per_s is None else link.latest_bytes_per_s / 1e6,
                    "is_slower": link.is_slower,
                }
                for link in self.links
            ],
        }


def look_at(address: str) -> Overview:
    """The cluster whose GCS is at the address."""
    store = ClusterStore(address)
    nodes, members = store.nodes(), store.members()
    stages = stages_by_node(_actors(address))
    ordered = sorted(nodes.values(), key=lambda node: ("node:__internal_head__" not in node.resources, node.address))
    views = tuple(
        NodeView(str(number), node, members.get(node.node_id), tuple(stages.get(node.node_id, ())))
        for number, node in enumerate(ordered, start=1)
    )
    return Overview(views, store.links(nodes.keys()))


def stages_by_node(actors: Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[str]]:
    """The stages, coordinators and ingresses on each node.

    Args:
        actors: rows of Ray's table of actors.
    """
    found: dict[str, list[str]] = {}
    for actor in actors:
        if actor["State"] == "ALIVE" and (part := _part_of(actor["Name"])) is not None:
            found.setdefault(actor["Address"]["NodeID"], []).append(part)
    return {node_id: sorted(stages) for node_id, stages in found.items()}


def _part_of(name: str) -> str | None:
    """`gptj-dist/stage-0`, of an actor's name; None if it is no part of a server of ours."""
    application, _, rest = name.partition("::")[2].partition("#")
    if name.startswith(STAGE_NAMES):
        return f"{application or 'gptj-dist'}/{name.rpartition('/')[2]}"
    part = PARTS.get(rest.partition("#")[0])
    return f"{application}/{part}" if name.startswith(REPLICA_NAMES) and part is not None else None


def print_overview(overview: Overview, console: Console) -> None:
    """Prints tables of nodes and links, and a line for each link that has become slower."""
    console.print(_tables(overview))
    labels = {node.state.node_id: node.label for node in overview.nodes}
    for link in overview.slower:
        console.print(
            f"The path from {labels[link.from_node]} to {labels[link.to_node]} is slower than it was: "
            f"{_hop(link.latest_latency_s, link.latest_bytes_per_s)} for a short message now, "
            f"{_hop(link.latency_s, link.best_latest_bytes_per_s)} then.",
            soft_wrap=True,
        )


def _tables(overview: Overview) -> RenderableType:
    nodes = open_table("node", "name", "address", "devices", "stages", numbers=("CPUs", "GPUs"))
    for node in overview.nodes:
        devices = "; ".join(node.member.devices) if node.member else "joined without `gptj-dist join`"
        nodes.add_row(
            node.label,
            node.state.name + " (leaving)" * node.state.is_draining,
            node.state.address,
            devices,
            ", ".join(node.stages) or "-",
            f"{node.state.resources.get('CPU', 0.0):g}",
            f"{node.state.resources.get('GPU', 0.0):g}",
        )
    if not overview.links:
        return nodes
    labels = {node.state.node_id: node.label for node in overview.nodes}
    links = open_table("from", "to", numbers=("latency ms", "MB/s", "now ms"))
    for link in sorted(overview.links, key=lambda link: (labels[link.from_node], labels[link.to_node])):
        latest_s = link.latest_latency_s
        links.add_row(
            labels[link.from_node],
            labels[link.to_node],
            f"{link.latency_s * 1e3:.2f}",
            f"{link.bytes_per_s / 1e6:,.0f}",
            "-" if latest_s is None else f"{latest_s * 1e3:.2f}" + " !" * link.is_slower,
        )
    return Group(nodes, links)


def _hop(latency_s: float | None, bytes_per_s: float | None) -> str:
    return f"{(latency_s or 0.0) * 1e3:.2f} ms and {(bytes_per_s or 0.0) / 1e6:,.0f} MB/s"


def _actors(address: str) -> list[Mapping[str, Any]]:
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]  # compiled, and without stubs

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    try:
        return list(state.actor_table(None).values())
    finally:
        state.disconnect()
