"""Lets a stage use all cores of its machine while the other stages on it have nothing to compute.

Stages of one machine share its cores, so that all can compute at once. With a single micro-batch in flight only one of
them computes at a time. Its step is a lone one, and the cores of the others are free.

OpenMP's threads spin for some ms when a step has ended, and would take the cores from the stage that computes next. So
they sleep from the end of a lone step to the stage's next one (`docs/decisions/0035-lone-steps.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from gptj_dist.model.native.library import load_library
from gptj_dist.model.native.team import Team
from gptj_dist.stages.cores import LoneCores
from gptj_dist.stages.threads import ThreadChooser

T = TypeVar("T")


class StageThreads:
    """The threads of a stage's steps. Call it from the thread that computes.

    Args:
        own: chooses the number of threads.
        lone: chooses it for lone steps; None if they are like others.
        team: the threads, which sleep after a lone step; None lets them spin.
    """

    def __init__(self, own: ThreadChooser, lone: ThreadChooser | None = None, team: Team | None = None) -> None:
        self._own, self._lone, self._team = own, lone, team
        self._chooser = own

    def resize(self, num_layers: int) -> None:
        """The stage has another number of layers from its next step on."""
        for chooser in (self._own, self._lone):
            if chooser is not None:
                chooser.resize(num_layers)

    def begin_step(self, is_lone: bool) -> None:
        """Call before the stage's first layer."""
        self._chooser = self._lone if is_lone and self._lone is not None else self._own
        self._chooser.begin_step()

    def end_layer(self, layer: int) -> None:
        """Call after each layer; `layer` counts from 0 within the stage."""
        self._chooser.end_layer(layer)

    def wait_for(self, receive: Callable[[], T]) -> T:
        """The result of `receive`, which waits for the stage's next work."""
        if self._team is None or self._chooser is self._own:
            return receive()
        return self._team.wait_for(receive)


def stage_threads(num_threads: int, lone: LoneCores | None, num_layers: int) -> StageThreads:
    """The threads of a CPU stage. Its lone steps are like others if it has all cores, or without a C compiler."""
    if lone is None or lone.num_threads <= num_threads or (library := load_library()) is None:
        return StageThreads(ThreadChooser(num_threads, num_layers, torch.set_num_threads))
    team = Team(library)
    own, others = sorted(lone.own), sorted(lone.cores - lone.own)
    return StageThreads(
        ThreadChooser(num_threads, num_layers, partial(team.resize, cores=tuple(own))),
        ThreadChooser(lone.num_threads, num_layers, partial(team.resize, cores=(*own, *others))),
        team,
    )
