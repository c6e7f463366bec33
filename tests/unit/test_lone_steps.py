"""Which threads and cores a stage uses, when it computes alone and when others of its machine compute, too."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest

from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import SamplingParams
from gptj_dist.stages.lone_steps import StageThreads
from gptj_dist.stages.threads import ThreadChooser
from tests.unit.test_scheduler import land


@dataclass
class Stage:
    """A stage of two cores on a machine of eight."""

    events: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.threads = StageThreads(
            ThreadChooser(2, 1, self.events.append),
            ThreadChooser(8, 1, self.events.append),
            frozenset({2, 3}),
            frozenset(range(8)),
            lambda: self.events.append("end"),
        )

    def step(self, is_lone: bool) -> list[object]:
        self.events.clear()
        self.threads.begin_step(is_lone)
        self.threads.end_layer(0)
        self.threads.end_step()
        return list(self.events)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: made.events.append(cores))
    return made


def test_the_threads_of_a_lone_step_have_all_cores_and_end_with_it(stage: Stage) -> None:
    assert stage.step(is_lone=True) == ["end", frozenset(range(8)), 8, "end"]
    assert stage.step(is_lone=True) == [8, "end"]


def test_other_steps_keep_to_the_stages_own_cores_and_keep_their_threads(stage: Stage) -> None:
    assert stage.step(is_lone=False) == [2]
    stage.step(is_lone=True)
    assert stage.step(is_lone=False) == ["end", frozenset({2, 3}), 2]
    assert stage.step(is_lone=False) == [2]


def test_a_stage_that_has_its_machine_for_itself_computes_lone_steps_like_others() -> None:
    counts: list[int] = []
    threads = StageThreads(ThreadChooser(2, 1, counts.append))
    threads.begin_step(is_lone=True)
    threads.end_step()
    assert counts == [2]


def test_a_plan_is_lone_while_nothing_else_is_in_flight_or_can_follow() -> None:
    scheduler = Scheduler(SchedulerConfig(2, 64, 16, 8, (), max_chunk_tokens=8))
    scheduler.add(Request(0, Prompt(tuple(range(12))), SamplingParams(max_tokens=4), 0))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert not first.is_lone, "the rest of the prompt follows"
    assert not second.is_lone, "the first plan is in flight"
    land(scheduler, first)
    land(scheduler, second)
    third = scheduler.schedule()
    assert third is not None
    assert third.is_lone
    scheduler.add(Request(1, Prompt((1, 2)), SamplingParams(max_tokens=4), 0))
    newcomer = scheduler.schedule()
    assert newcomer is not None
    assert not newcomer.is_lone
