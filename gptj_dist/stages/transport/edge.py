"""The ends of the connections between coordinator and stages. A transport is a module that implements these protocols.

Frames of an edge arrive as they were sent and in order; otherwise the receiving end raises FrameFaultError. An end
belongs to one thread.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

from gptj_dist.stages.transport.frames import EdgeTraffic, Frame


class ReceivingEnd(Protocol):
    """What the receiving ends of an edge have in common."""

    address: str
    """What `Transport.outbound` needs. It may contain a secret: do not log it."""

    @property
    def traffic(self) -> EdgeTraffic:
        """What this end has received and dropped."""

    def close(self) -> None:
        """Frees the address; frames that were not received are lost."""


class Inbound(ReceivingEnd, Protocol):
    """The receiving end of an edge, for a thread."""

    def receive(self) -> Frame:
        """Waits for the next frame. Frames of other epochs are dropped. Raises FrameFaultError."""


class AsyncInbound(ReceivingEnd, Protocol):
    """The receiving end of an edge, for an event loop."""

    async def receive(self) -> Frame:
        """Waits for the next frame. Frames of other epochs are dropped. Raises FrameFaultError."""


class Outbound(Protocol):
    """The sending end of an edge. Frames queue while the other end is slow or not there yet."""

    def send(self, frame: Frame) -> None:
        """Queues the frame; never blocks."""

    def close(self, linger_ms: int = 0) -> None:
        """Waits at most `linger_ms` for queued frames to leave."""


class Transport(Protocol):
    """Opens the ends of one pipeline's edges."""

    def inbound(self, host: str) -> Inbound:
        """A receiving end on a free port of the host."""

    def async_inbound(self, host: str) -> AsyncInbound:
        """A receiving end on a free port of the host, for the running event loop."""

    def outbound(self, address: str) -> Outbound:
        """A sending end, connected to the receiving end at the address."""


def edge_names(num_stages: int) -> list[str]:
    """The edges of a ring: `coordinator->0`, `0->1`, ..., `1->coordinator`."""
    stops = ["coordinator", *map(str, range(num_stages)), "coordinator"]
    return [f"{begin}->{end}" for begin, end in pairwise(stops)]
