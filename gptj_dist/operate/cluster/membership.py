"""A node's part in its cluster while it is there: it says who it is, measures its links, and looks around."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from gptj_dist.operate.cluster.probe import LONG_BYTES, SHORT_BYTES, Measured, ProbeServer, measure
from gptj_dist.operate.cluster.store import ClusterStore, Member
from gptj_dist.planning.links import Link, by_pair

LINKS_PERIOD_S = 15.0
"""Time between two looks at the links."""


class Membership:
    """One node's. Made by `enter`.

    Of each pair of nodes the one that joined later measures the link, in both directions.
    """

    def __init__(self, store: ClusterStore, member: Member, key: bytes, server: ProbeServer) -> None:
        self.member = member
        self._store = store
        self._key = key
        self._server = server
        self._next_look_s = 0.0

    @classmethod
    def enter(
        cls, store: ClusterStore, node_id: str, name: str, address: str, pid: int, devices: tuple[str, ...], key: bytes
    ) -> Membership:
        """Writes the node into the store, and answers measurements from now on."""
        server = ProbeServer(address, key)
        member = Member(node_id, name, address, server.port, pid, time.time(), devices)
        store.write_member(member)
        return cls(store, member, key, server)

    def measure_all(self, say: Callable[[str], None]) -> None:
        """Measures the links to all nodes that were there before, and keeps them.

        Args:
            say: receives a line for each.
        """
        for other in self._earlier().values():
            try:
                found = self._measure(other, LONG_BYTES)
            except OSError as error:
                say(f"  {other.name} ({other.address}): cannot be measured: {error}")
                continue
            for link in self._links(other, found):
                self._store.write_link(link)
            say(f"  {other.name} ({other.address}): {measured_text(found)}")
        self._next_look_s = time.monotonic() + LINKS_PERIOD_S

    def look(self) -> None:
        """Looks at the links again, if it is time for that: a short message each."""
        if time.monotonic() < self._next_look_s:
            return
        self._next_look_s = time.monotonic() + LINKS_PERIOD_S
        known = by_pair(self._store.links())
        for other in self._earlier().values():
            try:
                found = self._measure(other, SHORT_BYTES)
            except OSError:
                continue  # whether the node is there is Ray's to say
            for link in self._links(other, found):
                before = known.get((link.from_node, link.to_node), link)
                self._store.write_link(before.looked_at(link.latency_s, link.bytes_per_s))

    def leave(self) -> None:
        """Removes the node from the store."""
        self._server.close()
        self._store.forget(self.member.node_id)

    def _earlier(self) -> Mapping[str, Member]:
        """The living members that joined before this one."""
        mine = (self.member.joined_at, self.member.node_id)
        living = self._store.nodes()
        members = self._store.members()
        for gone in members.keys() - living.keys():
            self._store.forget(gone)
        return {
            node_id: other
            for node_id, other in members.items()
            if node_id in living and (other.joined_at, other.node_id) < mine
        }

    def _measure(self, other: Member, num_bytes: int) -> Measured:
        return measure(other.address, other.port, self._key, num_bytes, source=self.member.address)

    def _links(self, other: Member, found: Measured) -> tuple[Link, Link]:
        mine, theirs = self.member.node_id, other.node_id
        now = time.time()
        return (
            Link(mine, theirs, found.latency_s, found.there_bytes_per_s, now),
            Link(theirs, mine, found.latency_s, found.back_bytes_per_s, now),
        )


def measured_text(found: Measured) -> str:
    """`1.02 ms, 118 MB/s there, 117 MB/s back`."""
    there, back = (f"{rate / 1e6:,.0f} MB/s" for rate in (found.there_bytes_per_s, found.back_bytes_per_s))
    return f"{found.latency_s * 1e3:.2f} ms, {there} there, {back} back"
