"""Lets a stage use all cores of its machine while the other stages on it have nothing to compute.

Stages of one machine share its cores, so that all can compute at once. With a single micro-batch in flight only one of
them computes at a time. Its step is a lone one, and the cores of the others are free.

OpenMP's threads spin for some ms when a step has ended, and would take the cores from the stage that computes next. So
the threads of a lone step end with it, and the next one starts them again (`docs/decisions/0035-lone-steps.md`).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

from gptj_dist.stages.threads import ThreadChooser

_PAUSE_SOFT = 1
"""`omp_pause_soft` of OpenMP 5.0, section 3.2.44: the library's settings stay."""


@dataclass(frozen=True, slots=True)
class LoneCores:
    """What a stage may use in a lone step.

    Args:
        num_threads: maximum number of torch threads.
        cores: those that its threads may run on; None if the stage is not bound to any.
    """

    num_threads: int
    cores: frozenset[int] | None


class StageThreads:
    """The threads of a stage's steps. Call it from the thread that computes.

    Args:
        own: chooses among the threads on the stage's own cores.
        lone: chooses for lone steps; None if they are like others.
        own_cores, lone_cores: cores for the threads of each kind of step; None leaves them as they are.
        end_team: ends the OpenMP threads of the calling thread.
    """

    def __init__(
        self,
        own: ThreadChooser,
        lone: ThreadChooser | None = None,
        own_cores: frozenset[int] | None = None,
        lone_cores: frozenset[int] | None = None,
        end_team: Callable[[], None] = lambda: None,
    ) -> None:
        self._own, self._lone = own, lone
        self._own_cores, self._lone_cores = own_cores, lone_cores
        self._end_team = end_team
        self._chooser = own

    def begin_step(self, is_lone: bool) -> None:
        """Call before the stage's first layer."""
        chooser = self._lone if is_lone and self._lone is not None else self._own
        if chooser is not self._chooser:
            self._end_team()  # its threads are bound to the cores on which they were started
            cores = self._own_cores if chooser is self._own else self._lone_cores
            if cores is not None:
                os.sched_setaffinity(0, cores)
            self._chooser = chooser
        chooser.begin_step()

    def end_layer(self, layer: int) -> None:
        """Call after each layer; `layer` counts from 0 within the stage."""
        self._chooser.end_layer(layer)

    def end_step(self) -> None:
        """Call when nothing of the step is left to compute."""
        if self._chooser is self._lone:
            self._end_team()


def find_end_of_team() -> Callable[[], None] | None:
    """A function that ends the OpenMP threads of its calling thread; None if torch's library has none or is another."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        pause = library.omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    pause.argtypes, pause.restype = (ctypes.c_int,), ctypes.c_int
    return lambda: pause(_PAUSE_SOFT) and None
