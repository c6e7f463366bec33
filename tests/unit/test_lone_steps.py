"""Which threads and cores a stage uses, when it computes alone and when others of its machine compute, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.model.native.team import Team
from gptj_dist.params import SamplingParams
from gptj_dist.stages import lone_steps
from gptj_dist.stages.cores import LoneCores
from gptj_dist.stages.lone_steps import StageThreads, stage_threads
from tests.unit.test_scheduler import land

T = TypeVar("T")


class FakeTeam(Team):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def resize(self, num_threads: int, cores: tuple[int, ...]) -> None:
        self.events.append((num_threads, cores))

    def wait_for(self, receive: Callable[[], T]) -> T:
        self.events.append("asleep")
        return receive()


@dataclass
class Stage:
    """A stage of two cores on a machine of four."""

    threads: StageThreads
    team: FakeTeam

    def step(self, is_lone: bool) -> list[object]:
        self.team.events.clear()
        self.threads.begin_step(is_lone)
        self.threads.end_layer(0)
        assert self.threads.wait_for(lambda: "frame") == "frame"
        return list(self.team.events)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    team = FakeTeam()
    monkeypatch.setattr(lone_steps, "load_library", object)
    monkeypatch.setattr(lone_steps, "Team", lambda _: team)
    lone = LoneCores(4, frozenset(range(4)), frozenset({2, 3}))
    return Stage(stage_threads(2, lone, num_layers=1), team)


def test_the_threads_of_a_lone_step_have_all_cores_and_sleep_after_it(stage: Stage) -> None:
    assert stage.step(is_lone=True) == [(4, (2, 3, 0, 1)), "asleep"]
    assert stage.step(is_lone=True) == [(4, (2, 3, 0, 1)), "asleep"]


def test_other_steps_keep_to_the_stages_own_cores(stage: Stage) -> None:
    assert stage.step(is_lone=False) == [(2, (2, 3))]
    stage.step(is_lone=True)
    assert stage.step(is_lone=False) == [(2, (2, 3))]


@pytest.mark.parametrize("has_library", [True, False])
def test_lone_steps_are_like_others_where_a_stage_has_all_cores_or_there_is_no_compiler(
    has_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(lone_steps, "load_library", lambda: object() if has_library else None)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    threads = stage_threads(2, LoneCores(2 if has_library else 4), num_layers=1)
    threads.begin_step(is_lone=True)
    assert threads.wait_for(lambda: "frame") == "frame"
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
