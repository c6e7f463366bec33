"""What nodes tell of themselves and of their links, kept in the key-value store of the cluster's GCS.

It lives as long as the cluster's head. Records of nodes that have gone stay until a reader finds them gone.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptj_dist.planning.links import Link

NAMESPACE = b"gptj-dist"
TIMEOUT_S = 10.0

_MEMBER, _LINK = "member/", "link/"


@dataclass(frozen=True, slots=True)
class Member:
    """A node that joined by `up` or `join`.

    Args:
        node_id: Ray's, in hexadecimal.
        name: the machine's host name.
        address: its IP address in the cluster.
        port: where it answers other members' measurements, at that address.
        pid: of `up` or `join`, on that machine.
        devices: for people, such as `cpu: AMD EPYC, 2 cores, 24.0 GB`.
    """

    node_id: str
    name: str
    address: str
    port: int
    pid: int
    devices: tuple[str, ...]


class ClusterStore:
    """The records of one cluster.

    Args:
        address: of the GCS, `host:port`. A connected process finds it in
            `ray.get_runtime_context().gcs_address`. The token, if the cluster has one, is in the environment.
    """

    def __init__(self, address: str) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, and without stubs

        self._gcs = GcsClient(address=address)

    def members(self) -> Mapping[str, Member]:
        """All that have written themselves, by node id, those that have gone included."""
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
        self._gcs.internal_kv_del(f"{_MEMBER}{node_id}".encode(), False, NAMESPACE, timeout=TIMEOUT_S)
        for link in self.links():
            if node_id in (link.from_node, link.to_node):
                key = f"{_LINK}{link.from_node}/{link.to_node}"
                self._gcs.internal_kv_del(key.encode(), False, NAMESPACE, timeout=TIMEOUT_S)

    def _read(self, prefix: str) -> list[dict[str, Any]]:
        keys = self._gcs.internal_kv_keys(prefix.encode(), NAMESPACE, timeout=TIMEOUT_S)
        values = (self._gcs.internal_kv_get(key, NAMESPACE, timeout=TIMEOUT_S) for key in sorted(keys))
        return [json.loads(value) for value in values if value is not None]

    def _write(self, key: str, record: Mapping[str, Any]) -> None:
        self._gcs.internal_kv_put(key.encode(), json.dumps(record).encode(), True, NAMESPACE, timeout=TIMEOUT_S)
