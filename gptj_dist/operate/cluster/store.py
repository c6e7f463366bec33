"""What nodes say of themselves and of their links, kept in the key-value store of the cluster's GCS.

It lives as long as the cluster's head.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptj_dist.planning.links import Link

NAMESPACE = b"gptj-dist"
TIMEOUT_S = 10.0

_MEMBER, _LINK, _VERSIONS = "member/", "link/", "versions"
_ALIVE = 0
"""Ray's number for the state of a node that lives."""

_EXPECTED_ENDS = (1, 3, 4)
"""Ray's numbers for the ends of a node: it was told to, or drained before its machine is taken or as it is idle."""


@dataclass(frozen=True, slots=True)
class Member:
    """A node that joined by `up` or `join`.

    Args:
        node_id: Ray's, in hexadecimal.
        name: the machine's host name.
        address: its IP address in the cluster.
        port: where it answers other members' measurements, at that address.
        pid: of `up` or `join`, on that machine.
        joined_at: seconds since 1970.
        devices: for people, such as `cpu: AMD EPYC, 2 cores, 24.0 GB`.
    """

    node_id: str
    name: str
    address: str
    port: int
    pid: int
    joined_at: float
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeState:
    """A living node, as Ray knows it.

    Args:
        resources: in all.
        ends_at: seconds since 1970; infinity if it does not drain, or without a deadline.
    """

    node_id: str
    name: str
    address: str
    resources: Mapping[str, float]
    is_draining: bool
    ends_at: float = math.inf


class ClusterStore:
    """The records of one cluster. Methods raise an error of Ray's if the GCS does not answer.

    Args:
        address: of the GCS, `host:port`. A connected process finds it in
            `ray.get_runtime_context().gcs_address`. The token, if the cluster has one, is in the environment.
    """

    def __init__(self, address: str) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, and without stubs

        self._gcs = GcsClient(address=address)

    def nodes(self) -> Mapping[str, NodeState]:
        """The living nodes by id, those that did not join by `up` or `join` included."""
        draining = self._gcs.get_draining_nodes(timeout=TIMEOUT_S)
        found = (info for info in self._gcs.get_all_node_info(timeout=TIMEOUT_S).values() if info.state == _ALIVE)
        return {
            info.node_id.hex(): NodeState(
                info.node_id.hex(),
                info.node_manager_hostname,
                info.node_manager_address,
                dict(info.resources_total),
                info.node_id.hex() in draining,
                draining.get(info.node_id.hex(), 0) / 1000 or math.inf,
            )
            for info in found
        }

    def has_ended_as_told(self, node_id: str) -> bool:
        """Whether a node has ended because it was drained or shut down, not because it failed."""
        infos = self._gcs.get_all_node_info(timeout=TIMEOUT_S).values()
        found = next((info for info in infos if info.node_id.hex() == node_id), None)
        return found is not None and found.death_info.reason in _EXPECTED_ENDS

    def drain(self, node_id: str, message: str, within_s: float) -> None:
        """Tells the cluster that a node will end after this time: nothing new is placed there, and stages move away."""
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        deadline_ms = round((time.time() + within_s) * 1000)
        reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        self._gcs.drain_node(node_id, reason, message, deadline_ms, timeout=TIMEOUT_S)

    def versions(self) -> Mapping[str, str] | None:
        """Those of the head; None if `up` has not written them."""
        value = self._gcs.internal_kv_get(_VERSIONS.encode(), NAMESPACE, timeout=TIMEOUT_S)
        return None if value is None else json.loads(value)

    def write_versions(self, versions: Mapping[str, str]) -> None:
        self._write(_VERSIONS, versions)

    def members(self) -> Mapping[str, Member]:
        """All that have written themselves, by node id, those that have gone without a word included."""
        found = [Member(**{**record, "devices": tuple(record["devices"])}) for record in self._read(_MEMBER)]
        return {member.node_id: member for member in found}

    def write_member(self, member: Member) -> None:
        self._write(f"{_MEMBER}{member.node_id}", asdict(member))

    def links(self, node_ids: Collection[str] | None = None) -> tuple[Link, ...]:
        """Measured links.

        Args:
            node_ids: only those between these nodes; None gives all, those of nodes that have gone included.
        """
        links = (Link(**record) for record in self._read(_LINK))
        return tuple(
            link for link in links if node_ids is None or (link.from_node in node_ids and link.to_node in node_ids)
        )

    def write_link(self, link: Link) -> None:
        """Replaces what was known of this direction of the pair."""
        self._write(f"{_LINK}{link.from_node}/{link.to_node}", asdict(link))

    def forget(self, node_id: str) -> None:
        """Removes a node and its links."""
        self._delete(f"{_MEMBER}{node_id}")
        for link in self.links():
            if node_id in (link.from_node, link.to_node):
                self._delete(f"{_LINK}{link.from_node}/{link.to_node}")

    def _read(self, prefix: str) -> list[dict[str, Any]]:
        keys = sorted(self._gcs.internal_kv_keys(prefix.encode(), NAMESPACE, timeout=TIMEOUT_S))
        values = self._gcs.internal_kv_multi_get(keys, NAMESPACE, timeout=TIMEOUT_S) if keys else {}
        return [json.loads(values[key]) for key in keys if key in values]

    def _write(self, key: str, record: Mapping[str, Any]) -> None:
        self._gcs.internal_kv_put(key.encode(), json.dumps(record).encode(), True, NAMESPACE, timeout=TIMEOUT_S)

    def _delete(self, key: str) -> None:
        self._gcs.internal_kv_del(key.encode(), False, NAMESPACE, timeout=TIMEOUT_S)


def measured_links() -> tuple[Link, ...]:
    """The links of the cluster that this process is connected to."""
    import ray

    return ClusterStore(ray.get_runtime_context().gcs_address).links()
