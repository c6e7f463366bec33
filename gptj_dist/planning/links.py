"""What is known of the network between the nodes of a cluster: one record for each direction of each pair. Stdlib only.

`gptj-dist join` measures links and keeps them in the cluster (`operate/cluster/store.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

SLOWER_LATENCY = 2.0
SLOWER_LATENCY_S = 0.002
SLOWER_RATE = 0.5
SLOWER_LOOKS = 3
"""A path counts as slower if a hop takes this many times as long and this much longer, or brings this part of the rate,
so many times in a row: single looks beside a server that computes are disturbed."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way from one node to another.

    Args:
        from_node, to_node: Ray's ids of the nodes, in hexadecimal.
        latency_s: time of a small message, one way: half of the median round trip.
        bytes_per_s: rate of a long message.
        measured_at: seconds since 1970.
        latest_latency_s, latest_bytes_per_s: the same by the newest look; None before the first one. A look's message
            is shorter, so its rate is lower, the more so the longer the latency.
        best_latest_bytes_per_s: the highest rate that a look has found.
        num_slow_looks: the newest looks, in a row, that found the path slower than it was.
    """

    from_node: str
    to_node: str
    latency_s: float
    bytes_per_s: float
    measured_at: float
    latest_latency_s: float | None = None
    latest_bytes_per_s: float | None = None
    best_latest_bytes_per_s: float = 0.0
    num_slow_looks: int = 0

    @property
    def is_slower(self) -> bool:
        """Whether the path has been clearly slower than it was for some time."""
        return self.num_slow_looks >= SLOWER_LOOKS

    def looked_at(self, latency_s: float, bytes_per_s: float) -> Link:
        """The link after another look. A first measurement that other work had disturbed is corrected."""
        best = max(self.best_latest_bytes_per_s, bytes_per_s)
        has_more_latency = latency_s > max(SLOWER_LATENCY * self.latency_s, self.latency_s + SLOWER_LATENCY_S)
        is_slow = has_more_latency or bytes_per_s < SLOWER_RATE * best
        return replace(
            self,
            latency_s=min(self.latency_s, latency_s),
            latest_latency_s=latency_s,
            latest_bytes_per_s=bytes_per_s,
            best_latest_bytes_per_s=best,
            num_slow_looks=self.num_slow_looks + 1 if is_slow else 0,
        )

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds that a message takes."""
        return self.latency_s + num_bytes / self.bytes_per_s


def by_pair(links: Iterable[Link]) -> Mapping[tuple[str, str], Link]:
    """Links by their two nodes."""
    return {(link.from_node, link.to_node): link for link in links}
