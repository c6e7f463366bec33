"""What an ingress counts. `metrics.py` shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gptj_dist.engine.histogram import Histogram
from gptj_dist.engine.request import FinishReason
from gptj_dist.stages.transport.frames import FrameFault
from gptj_dist.stages.transport.guard import DropCount

FINISH_REASONS = (*FinishReason, "abort")


@dataclass(slots=True)
class IngressMetrics:
    """Counters of one ingress since it started.

    Args:
        name: the replica's.

    Attributes:
        feed_dropped: connections and messages that the port for pipelines' tokens has dropped.
        feed_faults: parts of streams that did not arrive there in order.
        num_responses: by method, path of the route, and status.
        num_in_flight: HTTP requests that are being answered.
        num_finished: completions, by how they ended.
        num_moves: how often a completion moved to another pipeline because its own was lost.
        loop_lag: see `LoopWatch`.
    """

    name: str
    feed_dropped: DropCount = field(default_factory=DropCount)
    feed_faults: Counter[FrameFault] = field(default_factory=Counter)
    num_responses: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    num_in_flight: int = 0
    num_finished: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(FINISH_REASONS, 0)))
    num_moves: int = 0
    loop_lag: Histogram = field(default_factory=Histogram)

    def note_end(self, reason: str) -> None:
        """Counts a completion that has ended."""
        self.num_finished[reason] += 1

    def note_move(self) -> None:
        """Counts a completion that moves to another pipeline."""
        self.num_moves += 1
