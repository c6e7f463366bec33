"""The OpenMP team of a stage: the cores of its threads, and their sleep while the stage waits for work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from gptj_dist.model.native.library import load_library
from gptj_dist.model.native.team import Team
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("restored_threads")


@pytest.fixture
def stage() -> Iterator[ThreadPoolExecutor]:
    """A thread that computes as a stage's does. Its team and its cores end with it."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def team() -> Team:
    library = load_library()
    if library is None:
        pytest.skip("there is no C compiler")
    return Team(library)


def compute() -> float:
    return float((torch.ones(256, 256) @ torch.ones(256, 256)).sum())


def threads_of_torch(num_threads: int) -> set[Path]:
    """All threads of the process, with those that torch starts beside OpenMP's."""
    torch.set_num_threads(num_threads)
    return set(Path("/proc/self/task").iterdir())


def threads_after(before: set[Path]) -> list[Path]:
    return sorted(set(Path("/proc/self/task").iterdir()) - before)


def test_while_a_stage_waits_the_threads_of_its_team_sleep_and_then_go_on(
    team: Team, stage: ThreadPoolExecutor
) -> None:
    def waits() -> list[int]:
        before = threads_of_torch(2)
        team.resize(2, ())
        spun_ns = []
        for _ in range(5):
            assert compute() == 256**3
            (other,) = threads_after(before)
            spun_ns.append(team.wait_for(partial(ns_until_asleep, other)))
        return spun_ns

    assert sum(stage.submit(waits).result()) < 10e6, "it would spin for some 8 ms at the beginning of each wait"


def ns_until_asleep(thread: Path) -> int:
    """CPU time that the thread takes from now until it sleeps."""
    begin_ns = cpu_ns(thread)
    wait_until(lambda: (thread / "stat").read_text().rpartition(")")[2].split()[0] == "S", "the thread sleeps")
    return cpu_ns(thread) - begin_ns


def cpu_ns(thread: Path) -> int:
    return int((thread / "schedstat").read_text().split()[0])


def test_what_the_wait_raises_reaches_the_caller(team: Team, stage: ThreadPoolExecutor) -> None:
    def receive() -> str:
        raise ConnectionError("the frame is torn")

    team.resize(4, ())
    with pytest.raises(ConnectionError, match="the frame is torn"):
        stage.submit(team.wait_for, receive).result()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_have_a_core_each_if_there_are_as_many_else_all_cores(team: Team, stage: ThreadPoolExecutor) -> None:
    first, second, *_ = os.sched_getaffinity(0)

    def cores(num_threads: int, *cores: int) -> list[set[int]]:
        before = threads_of_torch(num_threads)
        team.resize(num_threads, cores)
        started = [int(path.name) for path in threads_after(before)]
        return [os.sched_getaffinity(thread) for thread in (0, *started)]

    assert stage.submit(cores, 1, second).result() == [{second}]
    assert stage.submit(cores, 2, second, first).result() == [{second}, {first}]
    assert stage.submit(cores, 1, second, first).result() == [{first, second}]
    assert stage.submit(cores, 1, second).result() == [{second}]
