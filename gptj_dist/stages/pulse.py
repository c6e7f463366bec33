"""Tells a stage that hangs from one that is slow. Knows neither Ray nor sockets.

A stage that computes goes from layer to layer, however slow it is. One whose process stands still no longer answers.
One whose device is stuck answers, but stays at its layer. One whose node cannot be reached is given time: a network
that comes back brings its frames along (`docs/decisions/0043-cut-networks.md`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

PERIOD_S = 0.5
"""Time between two looks at the stages, while no result arrives."""

BASE_LIMIT_S = 2.0
STEPS_LIMIT = 3.0
"""A stage hangs after `BASE_LIMIT_S`, and this many of the longest recent steps, without a sign of life."""

FIRST_LIMIT_S = 10.0
"""The same before the first result: a new process's first step is slow, and nothing is known of the usual ones."""

LOST_FRAME_LIMIT_S = 5.0
"""Time without a result after which a frame is lost, if all stages live and none has a frame."""

SUSPECT_S = 1.5
"""Time without a sign of life after which it is asked whether the stage's node can be reached at all."""

MAX_CUT_LOOKS = 20
"""Looks at an unreachable node, each of `PERIOD_S` and a second at most, after which its stages count as lost. Usually
Ray gives the node up before."""

NUM_RECENT_STEPS = 64


class Pulse(NamedTuple):
    """A stage's answer.

    Args:
        num_beats: layers that it has begun or computed since it was loaded.
        is_computing: whether it has a frame.
        num_frames: frames that it has received in the present ring.
    """

    num_beats: int
    is_computing: bool
    num_frames: int


class StageHungError(Exception):
    """A stage gave no sign of life for too long; the message continues its name."""


class Pulses:
    """The signs of life of a ring's stages, while plans are in flight."""

    def __init__(self, num_stages: int) -> None:
        self._last: list[Pulse | None] = [None] * num_stages
        self._silent_s = [0.0] * num_stages
        self._num_cut_looks = [0] * num_stages
        self._waits_s = 0.0
        self._steps_s: deque[float] = deque(maxlen=NUM_RECENT_STEPS)

    @property
    def limit_s(self) -> float:
        """Time without a sign of life after which a stage hangs."""
        return BASE_LIMIT_S + STEPS_LIMIT * max(self._steps_s) if self._steps_s else FIRST_LIMIT_S

    def note_result(self, step_s: Sequence[float]) -> None:
        """A result has passed all stages.

        Args:
            step_s: each stage's seconds.
        """
        self._steps_s.extend(step_s)
        self.restart()

    def restart(self) -> None:
        """Begins anew: nothing is in flight, or all stages have shown that they live."""
        self._silent_s = [0.0] * len(self._silent_s)
        self._num_cut_looks = [0] * len(self._silent_s)
        self._waits_s = 0.0

    def note_answer(self, index: int, pulse: Pulse) -> None:
        """A stage has answered."""
        self._num_cut_looks[index] = 0
        if pulse != self._last[index] or not pulse.is_computing:
            self._silent_s[index] = 0.0
        if pulse.is_computing:
            self._waits_s = 0.0
        self._last[index] = pulse

    def suspects(self) -> list[int]:
        """Stages without a sign of life for long enough that their nodes may be cut off."""
        return [index for index, silent_s in enumerate(self._silent_s) if silent_s >= SUSPECT_S]

    def note_cut_off(self, index: int) -> None:
        """A suspect's node cannot be reached. Its silence proves nothing: the network may come back."""
        self._num_cut_looks[index] += 1
        if self._num_cut_looks[index] <= MAX_CUT_LOOKS:
            self._silent_s[index] = SUSPECT_S
            self._waits_s = 0.0

    def pass_time(self) -> None:
        """Counts one period. It counts as `PERIOD_S` however long it took: on a busy machine stages are late, too."""
        self._waits_s += PERIOD_S
        for index in range(len(self._silent_s)):
            self._silent_s[index] += PERIOD_S

    def hung(self) -> dict[int, StageHungError]:
        """The stages that hang, and why they count as such."""
        return {
            index: StageHungError(f"hung: it made no progress for {silent_s:g} s, and was killed")
            for index, silent_s in enumerate(self._silent_s)
            if silent_s > self.limit_s
        }

    def silent_edge(self, num_sent: int, num_landed: int) -> int | None:
        """The edge whose last frame must be lost, because no stage has had a frame for so long; None for none.

        Args:
            num_sent: frames that the coordinator has sent, and `num_landed` those that it has received.
        """
        if self._waits_s <= max(LOST_FRAME_LIMIT_S, self.limit_s):
            return None
        passed = [num_sent, *(0 if pulse is None else pulse.num_frames for pulse in self._last), num_landed]
        return next((edge for edge, (sent, received) in enumerate(pairwise(passed)) if received < sent), None)
