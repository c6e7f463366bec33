"""What is known of the network between the nodes of a cluster: one record for each direction of each pair. Stdlib only.

`gptj-dist join` measures links and keeps them in the cluster (`operate/cluster/store.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SLOWER_LATENCY = 2.0
SLOWER_LATENCY_S = 0.002
SLOWER_RATE = 0.5
"""A path counts as slower if a hop takes this many times as long and this much longer, or brings this part of the rate.
Measurements beside a server that computes vary by less."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one node to another.

    Args:
        from_node, to_node: Ray's ids of the nodes, in hexadecimal.
        latency_s: time of a small message, one way: half of the median round trip.
        bytes_per_s: rate of a long message.
        measured_at: seconds since 1970.
        latest_latency_s, latest_bytes_per_s: the same by the newest look; None before the first one.
    """

    from_node: str
    to_node: str
    latency_s: float
    bytes_per_s: float
    measured_at: float
    latest_latency_s: float | None = None
    latest_bytes_per_s: float | None = None

    @property
    def is_slower(self) -> bool:
        """Whether the newest look found the path clearly slower than it was when the node joined."""
        latency_s, rate = self.latest_latency_s, self.latest_bytes_per_s
        has_more_latency = latency_s is not None and latency_s > max(
            SLOWER_LATENCY * self.latency_s, self.latency_s + SLOWER_LATENCY_S
        )
        return has_more_latency or (rate is not None and rate < SLOWER_RATE * self.bytes_per_s)

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds that a message takes."""
        return self.latency_s + num_bytes / self.bytes_per_s


def by_pair(links: Iterable[Link]) -> Mapping[tuple[str, str], Link]:
    """Links by their two nodes."""
    return {(link.from_node, link.to_node): link for link in links}
