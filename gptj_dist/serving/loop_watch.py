"""Measures how late an event loop does what is due, and finds the code that held it up. Knows no requests."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import gptj_dist
from gptj_dist.engine.histogram import Histogram
from gptj_dist.logs import values

logger = logging.getLogger(__name__)

BEAT_S = 0.05
"""Time between two beats of the loop. A beat and the look of a thread at its time cost 0.2 ms together, at most."""

LATE_S = 0.05
"""A beat that is later than this is a stall."""

LOOK_S = 0.03
"""How late a beat is when the thread looks what the loop does, and the time until it looks again."""

REPORT_S = 10.0
"""Most seconds for which a stall is kept to be reported: of all in that time, only the longest is."""

HANG_S = 45.0
"""A loop hangs if it has had no beat for this long. Time in which the whole process stood still does not count."""

TELL_S = 1.0
"""How long a hang's line in the log may take. What the loop waits for may be the log's disk."""

PACKAGE = Path(gptj_dist.__file__).parent


@dataclass(frozen=True, slots=True)
class Stall:
    """A time in which the loop did nothing that was due.

    Args:
        cpu_s: CPU time of the loop's thread since the beat before. Much less than `lag_s` if other threads or programs
            had the core.
        place: what the thread did in most of the looks; None if it was not looked at.
    """

    lag_s: float
    cpu_s: float
    place: str | None


class LoopWatch:
    """Watches the running event loop: the loop notes how late its beats are, a thread what it does when one is late.

    Args:
        root: directory of the code that is named as the cause.
        report_s: see `REPORT_S`.
        on_hang: called on the thread if the loop hangs.
        hang_s: see `HANG_S`.

    Attributes:
        lag: of all beats.
    """

    def __init__(
        self,
        root: Path = PACKAGE,
        report_s: float = REPORT_S,
        on_hang: Callable[[], None] = lambda: None,
        hang_s: float = HANG_S,
    ) -> None:
        self.lag = Histogram()
        self._root = root
        self._report_s = report_s
        self._on_hang = on_hang
        self._most_looks = hang_s / LOOK_S
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._places: Counter[str] = Counter()
        self._num_stalls = 0
        self._worst: Stall | None = None
        self._reported_s = -report_s
        self._is_stopped = False
        self._plan_beat(time.monotonic(), time.thread_time())
        threading.Thread(target=self._look, name="event loop watch", daemon=True).start()

    def stop(self) -> None:
        """Watches no more, and reports what is left to report."""
        self._is_stopped = True
        self._timer.cancel()
        if self._worst is not None:
            self._report(self._worst)

    def _plan_beat(self, now_s: float, cpu_s: float) -> None:
        self._due_s, self._cpu_s = now_s + BEAT_S, cpu_s
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        now_s, cpu_s = time.monotonic(), time.thread_time()
        lag_s = max(0.0, now_s - self._due_s)
        self.lag.observe(round(1e9 * lag_s))
        places, self._places = self._places, Counter()
        if lag_s > LATE_S:
            self._note_stall(Stall(lag_s, cpu_s - self._cpu_s, _commonest(places)))
        if self._worst is not None and now_s - self._reported_s >= self._report_s:
            self._report(self._worst)
            self._reported_s = now_s
        self._plan_beat(now_s, cpu_s)

    def _note_stall(self, stall: Stall) -> None:
        self._num_stalls += 1
        if self._worst is None or stall.lag_s > self._worst.lag_s:
            self._worst = stall

    def _report(self, worst: Stall) -> None:
        known = {"lag_s": round(worst.lag_s, 3), "cpu_s": round(worst.cpu_s, 3), "place": worst.place}
        logger.warning("event loop was late", extra=values(**known, num_stalls=self._num_stalls))
        self._num_stalls, self._worst = 0, None

    def _look(self) -> None:
        """The thread. It names the loop's function while the loop is late; else it only reads the clock."""
        num_looks, due_s = 0, self._due_s  # looks are counted, as the whole process may have stood still
        while not self._is_stopped:
            num_looks, due_s = (num_looks + 1 if due_s == self._due_s else 0), self._due_s
            lag_s = time.monotonic() - due_s
            if lag_s >= LOOK_S and (frame := sys._current_frames().get(self._thread_id)) is not None:
                self._places[_place(frame, self._root)] += 1
            if num_looks > self._most_looks:
                self._tell_of_hang()
                num_looks = 0
            time.sleep(LOOK_S - lag_s if lag_s < LOOK_S else LOOK_S)

    def _tell_of_hang(self) -> None:
        """Calls `on_hang`, even if the log cannot be written: then the line is written later or not at all."""
        tell = partial(logger.error, "event loop hangs", extra=values(place=_commonest(self._places)))
        telling = threading.Thread(target=tell, name="event loop hangs", daemon=True)
        telling.start()
        telling.join(TELL_S)
        self._on_hang()


def _commonest(places: Counter[str]) -> str | None:
    return next((place for place, _ in places.most_common(1)), None)


def _place(frame: FrameType, root: Path) -> str:
    """The innermost function of the code in `root`, and the one that it has called, if that is others' code."""
    leaf, ours = frame, frame
    while not ours.f_code.co_filename.startswith(str(root)):
        if ours.f_back is None:
            return _name(leaf)
        ours = ours.f_back
    return _name(ours) if ours is leaf else f"{_name(ours)} > {_name(leaf)}"


def _name(frame: FrameType) -> str:
    """Such as `serving/feed.py:155 _send_waiting`."""
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_qualname}"
