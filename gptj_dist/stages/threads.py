"""Chooses how many threads compute a stage's layers: one a core on a quiet machine, fewer while others use the cores.

The threads of an operator wait for each other, and an operator takes between 20 us and some ms. A thread whose core is
taken by another program for a few ms holds up the others at every operator: on two cores beside one busy process, two
threads are several times slower than one thread alone. The number of threads changes no bit of a float32 result.
`docs/decisions/0021-busy-machines.md` has the measurements and the alternatives.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

LOST_SHARE = 0.25
"""Share of the layers' time in which the calling thread did not compute, from which on fewer threads are tried."""

WINDOW_S = 0.05
"""Layers' time over which that share is measured."""

SIDE_S = 0.03
"""Layers' time with each of two numbers of threads after which a trial is decided."""

CLEAR_SIDE_S = 0.01
CLEAR_RATIO = 1.5
"""A trial is decided after this time with each if one is slower by this ratio."""

LEAST_GAIN = 0.05
"""Share of the time that another number of threads must save to be chosen."""

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 4.0
"""Time from a trial that changed nothing to the next one; it doubles each time."""


class ThreadChooser:
    """Sets the number of threads while a stage goes through its layers. Call it from the thread that computes.

    The calling thread loses time when it has no core, and when it waits for a thread that has none. On a quiet machine
    it loses little, and all threads are used. When it loses more, a trial compares the number of threads with a
    smaller one; while fewer are used than could be and little is lost, it compares it with the next larger one.

    Args:
        most: the number of threads on a quiet machine.
        num_layers: of the stage.
        set_threads: sets the number of threads of the operators that follow.
        wall_s, cpu_s: clocks: the time, and the time for which the calling thread has computed, in seconds.
    """

    def __init__(
        self,
        most: int,
        num_layers: int,
        set_threads: Callable[[int], None],
        wall_s: Callable[[], float] = time.perf_counter,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._counts = thread_counts(most)
        self._num_threads = most
        self._num_layers = num_layers
        self._set_threads = set_threads
        self._wall_s, self._cpu_s = wall_s, cpu_s
        self._begin = (0.0, 0.0)
        self._window = (0.0, 0.0)
        self._trial: Trial | None = None
        self._wait_s = FIRST_WAIT_S
        self._next_trial_s = 0.0
        self._rungs_down = 1

    @property
    def num_threads(self) -> int:
        """The number in use between trials."""
        return self._num_threads

    def resize(self, num_layers: int) -> None:
        """The stage has another number of layers from its next step on. A trial under way is dropped."""
        self._num_layers = num_layers
        self._trial = None

    def begin_step(self) -> None:
        """Call before the stage's first layer."""
        self._begin = (self._wall_s(), self._cpu_s())
        if self._trial is None and (other := self._worth_trying(self._begin[0])) is not None:
            self._trial = Trial(self._num_threads, other, self._num_layers)
        if self._trial is None:
            self._set_threads(self._num_threads)
        else:
            self._trial.begin_step(self._begin[0])
            self._set_threads(self._trial.num_threads_of(0))

    def end_layer(self, layer: int) -> None:
        """Call after each layer; `layer` counts from 0 within the stage."""
        if self._trial is None:
            if layer == self._num_layers - 1:
                self._add_to_window(self._wall_s() - self._begin[0], self._cpu_s() - self._begin[1])
            return
        now_s = self._wall_s()
        self._trial.end_layer(layer, now_s)
        if self._trial.is_decided:
            self._conclude(self._trial, now_s)
        else:  # what follows the last layer does not belong to the trial
            is_last = layer == self._num_layers - 1
            self._set_threads(self._num_threads if is_last else self._trial.num_threads_of(layer + 1))

    def _add_to_window(self, wall_s: float, cpu_s: float) -> None:
        """Adds a step; a full window gives way to a new one."""
        if self._window[0] >= WINDOW_S:
            self._window = (0.0, 0.0)
        self._window = (self._window[0] + wall_s, self._window[1] + cpu_s)

    def _worth_trying(self, now_s: float) -> int | None:
        """A number of threads that may be better than the present one; None while there is no reason to think so."""
        wall_s, cpu_s = self._window
        if wall_s < WINDOW_S or now_s < self._next_trial_s:
            return None
        rung = self._counts.index(self._num_threads)
        if 1 - cpu_s / wall_s >= LOST_SHARE:
            return self._counts[max(0, rung - self._rungs_down)] if rung else None
        return self._counts[rung + 1] if rung + 1 < len(self._counts) else None

    def _conclude(self, trial: Trial, now_s: float) -> None:
        """Keeps the better number of threads, and decides when the next trial may be."""
        if trial.is_other_better:
            self._num_threads = trial.other
            self._wait_s, self._rungs_down = FIRST_WAIT_S, 1
            self._next_trial_s = now_s
        else:
            if trial.other < trial.present:  # one thread less may gain nothing where several less do
                self._rungs_down = self._rungs_down % (len(self._counts) - 1) + 1
            self._next_trial_s = now_s + self._wait_s
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self._trial = None
        self._window = (0.0, 0.0)
        self._set_threads(self._num_threads)


class Trial:
    """Compares two numbers of threads over pairs of layers of the same step, so that both do the same work.

    Each computes one half of a step's layers, and the other half of the next step's. The layers of the two halves are
    paired in order, and the last one of an odd number of layers does not count. A stage of one layer pairs its steps.

    Args:
        present, other: the numbers of threads.
        num_layers: of the stage.
    """

    def __init__(self, present: int, other: int, num_layers: int) -> None:
        self.present, self.other = present, other
        self._half = max(1, num_layers // 2)
        self._num_compared = 0
        self._last_s = 0.0
        self._unpaired: deque[tuple[int, float]] = deque()
        self._seconds = {present: 0.0, other: 0.0}

    def num_threads_of(self, layer: int) -> int:
        """The number of threads for the next layer. The halves go to present, other, other, present and so on."""
        is_others = (self._num_compared // self._half + 1) // 2 % 2 == 1
        return self.other if is_others and self._is_compared(layer) else self.present

    def begin_step(self, now_s: float) -> None:
        """Call before the first layer of each step."""
        self._last_s = now_s

    def end_layer(self, layer: int, now_s: float) -> None:
        """Call after each layer."""
        timed, self._last_s = (self.num_threads_of(layer), now_s - self._last_s), now_s
        if not self._is_compared(layer):
            return
        if self._num_compared // self._half % 2 == 0:
            self._unpaired.append(timed)
        else:
            for num_threads, seconds in (self._unpaired.popleft(), timed):
                self._seconds[num_threads] += seconds
        self._num_compared += 1

    @property
    def is_decided(self) -> bool:
        faster_s, slower_s = sorted(self._seconds.values())
        return faster_s >= SIDE_S or (faster_s >= CLEAR_SIDE_S and slower_s >= CLEAR_RATIO * faster_s)

    @property
    def is_other_better(self) -> bool:
        return self._seconds[self.other] < (1 - LEAST_GAIN) * self._seconds[self.present]

    def _is_compared(self, layer: int) -> bool:
        return layer < 2 * self._half


def thread_counts(most: int) -> tuple[int, ...]:
    """The numbers to choose from, ascending: 1, a quarter, half and three quarters of `most`, one less, and `most`."""
    return tuple(sorted({max(1, n) for n in (1, most // 4, most // 2, 3 * most // 4, most - 1, most)}))
