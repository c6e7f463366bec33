"""What a pipeline has lost: the outage that lasts, the last losses of stages, and how long recoveries took.

Knows no Ray, and replaces nothing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gptj_dist.engine.histogram import Histogram
from gptj_dist.logs import time_text, values
from gptj_dist.stages.loss import StageLoss
from gptj_dist.stages.transport.frames import FrameFaultError

logger = logging.getLogger(__name__)

MIN_BACK_IN_S = 1.0
"""Expected rest of an outage that lasts longer than the one before."""

MAX_LOSSES = 16
"""Maximum number of lost stages in a pipeline's status."""


class ServerOutage(NamedTuple):
    """No pipeline computes: for how long, and the estimate of how much longer."""

    down_s: float
    back_in_s: float


@dataclass(slots=True)
class _Outage:
    """An outage. `took_s` is None as long as it lasts."""

    error: Exception
    began_s: float
    began_at: str
    took_s: float | None = None


class Outages:
    """The outages of one pipeline.

    Args:
        usual_s: how long the first one is expected to last, if a stage is lost.
        clock: seconds, monotonic.

    Attributes:
        losses: the last stages that died, oldest first.
        recovery_time: of the outages that have ended.
    """

    def __init__(self, usual_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._usual_s = usual_s
        self._clock = clock
        self._last: _Outage | None = None
        self.losses: deque[StageLoss] = deque(maxlen=MAX_LOSSES)
        self.recovery_time = Histogram()

    @property
    def down_s(self) -> float | None:
        """How long the pipeline has been down; None while it computes."""
        return None if (outage := self._present) is None else self._clock() - outage.began_s

    @property
    def back_in_s(self) -> float:
        """Estimate of the seconds until the pipeline computes again, by its last outage; 0 while it computes."""
        if (outage := self._present) is None:
            return 0.0
        usual_s = 0.0 if _is_frame(outage.error) else self._usual_s
        return max(usual_s - (self.down_s or 0.0), MIN_BACK_IN_S)

    @property
    def problem(self) -> str | None:
        """What is down and why, as far as it is known; None while the pipeline computes."""
        if (outage := self._present) is None:
            return None
        dead = [str(loss) for loss in self.losses if loss.back_after_s is None]
        return "; ".join(dead) or str(outage.error)

    @property
    def message(self) -> str:
        """For those who want a token while the pipeline is down."""
        is_frame = self._present is not None and _is_frame(self._present.error)
        lost = "has lost a frame and joins its stages anew" if is_frame else "has lost a stage and replaces it"
        known = f"(down for {self.down_s or 0:.1f} s: {self.problem})"
        return f"the pipeline {lost}; requests wait until it is back {known}"

    def begin(self, error: Exception) -> None:
        """The pipeline computes no more."""
        self._last = _Outage(error, self._clock(), time_text(time.time()))
        lost = "frame lost, pipeline joins its stages anew" if _is_frame(error) else "stage lost, pipeline replaces it"
        logger.error(lost, extra=values(error=str(error)))

    def end(self) -> float:
        """The pipeline computes again. Returns the seconds that it was down."""
        outage = self._present
        assert outage is not None, "begin() comes before end()"
        took_s = outage.took_s = round(self._clock() - outage.began_s, 3)
        if not _is_frame(outage.error):
            self._usual_s = took_s
        self.recovery_time.observe(round(took_s * 1e9))
        for index, loss in enumerate(self.losses):
            if loss.back_after_s is None:
                self.losses[index] = replace(loss, back_after_s=took_s)
        return took_s

    def note_losses(self, losses: Sequence[StageLoss]) -> None:
        """It is known why stages died in the last outage, which may have ended."""
        assert self._last is not None, "begin() comes before note_losses()"
        at, took_s = self._last.began_at, self._last.took_s
        self.losses.extend(replace(loss, lost_at=at, back_after_s=took_s) for loss in losses)

    @property
    def _present(self) -> _Outage | None:
        return None if self._last is None or self._last.took_s is not None else self._last


def _is_frame(error: Exception) -> bool:
    return isinstance(error.__cause__, FrameFaultError)
