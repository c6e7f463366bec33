"""A coordinator that dies or hangs: what is told of it, why and since when, until another one takes its place."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gptj_dist.answers.error_responses import retry_after_s
from gptj_dist.errors import NotReadyError
from gptj_dist.serving.outages import ServerOutage
from gptj_dist.serving.pipeline import PipelineStatus
from gptj_dist.serving.pipeline_watch import MAX_DOWN, PipelineWatch, ScalePlan
from gptj_dist.stages.loss import LastWords
from tests.unit.test_async_engine import turns
from tests.unit.test_loss import KILLED
from tests.unit.test_metrics import pipeline

TIMEOUT_S = 20
LIVES, RESTARTS, HANGS, STOPS = "lives", "restarts", "hangs", "stops"
WHO = "its coordinator (pid 7 on alpha)"


@dataclass
class Coordinators:
    """As told.

    Args:
        states: by pipeline: `LIVES`, `RESTARTS` (replaces a stage), `HANGS`, `STOPS`, or what Ray says of its death.
        words: what dead ones have written; None if their node is gone.
        may_read: set when the words can be read.
        plans: what Serve does about the number.
    """

    states: dict[str, str]
    words: LastWords | None = field(default_factory=lambda: LastWords("step 12 begins"))
    may_read: asyncio.Event = field(default_factory=asyncio.Event)
    plans: ScalePlan = ScalePlan.UNKNOWN

    def __post_init__(self) -> None:
        self.may_read.set()

    async def statuses(self) -> Sequence[PipelineStatus]:
        restarting = {"state": "restarting", "down_s": 2.0, "back_in_s": 5.0}
        changes: dict[str, dict[str, Any]] = {LIVES: {}, RESTARTS: restarting}
        return [replace(pipeline(name), **changes[state]) for name, state in self.states.items() if state in changes]

    async def death_report(self, status: PipelineStatus) -> str | None:
        state = self.states[status.name]
        if state == HANGS:
            raise TimeoutError
        return None if state in (LIVES, STOPS) else state

    async def plan(self) -> ScalePlan:
        return self.plans

    async def last_words(self, status: PipelineStatus) -> LastWords | None:
        assert status.process.pid == 7
        await self.may_read.wait()
        return self.words


class Rig:
    """A watch of coordinators, on a clock that stands."""

    def __init__(self, **states: str) -> None:
        self.now_s = 100.0
        self.coordinators = Coordinators(states)
        self.watch = PipelineWatch(self.coordinators, lambda: self.now_s)

    async def look(self, **states: str) -> None:
        self.coordinators.states |= states
        await self.watch.look()
        await turns()

    @property
    def problems(self) -> dict[str, str]:
        return {down.name: down.problem for down in self.watch.down}

    def outage(self) -> ServerOutage | None:
        return self.watch.server_outage

    @property
    def none_is_up(self) -> bool:
        return self.watch.none_is_up.is_set()


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


def test_a_dead_coordinator_is_told_with_its_cause_its_last_line_and_the_time_until_another_is_there() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        await rig.look()
        assert (rig.problems, rig.none_is_up) == ({}, False)
        rig.coordinators.may_read.clear()
        await rig.look(a=KILLED)
        (down,) = rig.watch.down
        assert down.problem.startswith(f"{WHO} was killed by SIGKILL")
        assert "log line" not in down.problem
        rig.coordinators.may_read.set()
        rig.now_s += 2.5
        await turns()
        (down,) = rig.watch.down
        assert down.problem.endswith("; its last log line: step 12 begins")
        assert (rig.none_is_up, down.down_s) == (True, 2.5)
        assert rig.watch.problem == f"pipeline a is down since {down.since} (2.5 s): {down.problem}"
        await rig.look()
        assert rig.watch.down == (down,)
        await rig.look(b=LIVES)
        assert (rig.problems, rig.none_is_up) == ({}, False)

    run(scenario())


@pytest.mark.parametrize(
    ("words", "report", "cause"),
    [
        (LastWords(None, "Segmentation fault"), KILLED, "crashed: Segmentation fault"),
        (LastWords(None, None, saw_oom_kill=True), KILLED, "was killed by SIGKILL, it seems by the kernel, which has"),
        (LastWords(), "Worker exits with an exit code 3.", "exited with code 3"),
        (LastWords(), "", "ended"),
        (None, "The node died.", "was lost; its node does not answer, so it is gone or overloaded"),
    ],
)
def test_the_cause_is_found_as_for_stages(words: LastWords | None, report: str, cause: str) -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        rig.coordinators.words = words
        await rig.look()
        await rig.look(a=report)
        assert rig.problems["a"].startswith(f"{WHO} {cause}")

    run(scenario())


def test_a_coordinator_that_hangs_is_told_until_it_answers_and_its_death_is_since_then() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        await rig.look()
        await rig.look(a=HANGS)
        assert (rig.problems, rig.none_is_up) == ({"a": f"{WHO} does not answer"}, True)
        await rig.look(a=LIVES)
        assert (rig.problems, rig.none_is_up) == ({}, False)
        await rig.look(a=HANGS)
        (silent,) = rig.watch.down
        rig.now_s += 8
        await rig.look(a=KILLED)
        (dead,) = rig.watch.down
        assert (dead.down_s, dead.since) == (8, silent.since)
        assert "SIGKILL" in dead.problem

    run(scenario())


def test_while_another_pipeline_is_up_the_server_is_and_the_dead_one_is_told_all_the_same() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES, b=LIVES)
        await rig.look()
        await rig.look(b=KILLED)
        assert (list(rig.problems), rig.none_is_up) == (["b"], False)
        await rig.look(a=HANGS)
        assert (list(rig.problems), rig.none_is_up) == (["b", "a"], True)
        await rig.look(c=LIVES)
        assert (list(rig.problems), rig.none_is_up) == (["a"], False)

    run(scenario())


def test_a_pipeline_that_serve_stops_is_no_loss() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        await rig.look()
        await rig.look(a=STOPS)
        await rig.look(a=KILLED)
        assert (rig.problems, rig.none_is_up) == ({}, True)
        assert rig.watch.problem == "no pipeline is up: Ray Serve has to start one"
        await rig.look(a=LIVES)
        assert not rig.none_is_up

    run(scenario())


def test_before_the_first_pipeline_nothing_is_told_and_many_losses_are_bounded() -> None:
    async def scenario() -> None:
        rig = Rig()
        await rig.look()
        assert (rig.problems, rig.none_is_up) == ({}, False)
        names = [f"p{number}" for number in range(MAX_DOWN + 4)]
        await rig.look(**dict.fromkeys(names, LIVES))
        await rig.look(**dict.fromkeys(names, KILLED))
        assert list(rig.problems) == names[4:]

    run(scenario())


def test_an_outage_of_the_server_lasts_as_long_as_that_of_the_pipeline_that_is_back_first() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES, b=LIVES)
        assert rig.outage() is None
        await rig.look(a=RESTARTS)
        assert rig.outage() is None
        await rig.look(b=RESTARTS)
        rig.now_s += 0.5
        assert rig.outage() == (2.5, 4.5)
        await rig.look(b=KILLED)
        rig.now_s += 1
        assert rig.outage() == (1, 3)
        rig.now_s += 9
        assert rig.outage() == (10, 1)
        await rig.look(a=LIVES)
        assert rig.outage() is None

    run(scenario())


def test_no_pipeline_that_is_not_needed_is_no_outage() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        rig.coordinators.plans = ScalePlan.NONE
        await rig.look()
        assert (rig.watch.is_asleep, rig.watch.none_up_for_s) == (False, 0.0)
        rig.now_s += 7
        await rig.look(a=KILLED)  # it stopped faster than it was looked at
        assert (rig.watch.is_asleep, rig.none_is_up, rig.problems, rig.outage()) == (True, True, {}, None)
        assert rig.watch.none_up_for_s == 7
        rig.coordinators.plans = ScalePlan.SOME
        await rig.look()
        assert rig.watch.is_asleep
        await rig.look(b=LIVES)
        assert (rig.watch.is_asleep, rig.none_is_up, rig.watch.none_up_for_s) == (False, False, 0.0)

    run(scenario())


def test_an_application_is_deleted_when_serve_says_so_and_not_because_its_pipelines_are_gone() -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        await rig.look()
        await rig.look(a=STOPS)
        assert (rig.none_is_up, rig.watch.is_deleted.is_set()) == (True, False)
        rig.coordinators.plans = ScalePlan.DELETED
        await rig.look()
        assert rig.watch.is_deleted.is_set()

    run(scenario())


@pytest.mark.parametrize("plan", [ScalePlan.SOME, ScalePlan.UNKNOWN])
def test_a_pipeline_that_has_died_is_an_outage_whatever_serve_does(plan: ScalePlan) -> None:
    async def scenario() -> None:
        rig = Rig(a=LIVES)
        rig.coordinators.plans = plan
        await rig.look()
        await rig.look(a=KILLED)
        assert (rig.watch.is_asleep, rig.none_is_up, list(rig.problems)) == (False, True, ["a"])

    run(scenario())


def test_what_waits_for_a_pipeline_gives_up_after_a_while_with_none_and_not_while_one_is_busy() -> None:
    limit_s = 0.01

    async def scenario() -> None:
        rig = Rig(a=LIVES)
        rig.coordinators.plans = ScalePlan.NONE
        await rig.look()
        num_tries = 0

        async def take() -> str:
            nonlocal num_tries
            num_tries += 1
            if num_tries == 4:
                return "a token"
            return await asyncio.Event().wait() and ""

        assert await rig.watch.patiently(take, limit_s) == "a token"
        rig.now_s += 1
        await rig.look(a=KILLED)
        num_tries = 0
        with pytest.raises(NotReadyError, match=r"no pipeline has started within 0\.01 s") as raised:
            await rig.watch.patiently(take, limit_s)
        assert num_tries == 1
        assert retry_after_s(raised.value) == pipeline("a").start_s - 1

    run(scenario())
