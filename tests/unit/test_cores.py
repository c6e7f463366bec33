"""Cores are claimed by one stage each, and are free again when it is gone. Of a machine made up for the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from gptj_dist.stages import cores
from gptj_dist.stages.cores import PATIENCE_S, CoreClaim, available_cores, claim_cores

FIRST_CORE = 8 * os.getpid()
"""Numbers that no other test and no machine has."""
CORES = frozenset(range(FIRST_CORE, FIRST_CORE + 4))
HOLD = "import sys; from gptj_dist.stages.cores import _try_to_claim; \
claim = _try_to_claim([int(sys.argv[1])], 1); print(claim is not None, flush=True); sys.stdin.read()"


class Clock:
    """Stands in for the module `time`: sleeping passes no time but its own.

    Attributes:
        on_sleep: called at each sleep.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()


class Machine:
    """Four cores.

    Attributes:
        affinity: what this thread was told to keep to.
        environ: of this process.
    """

    def __init__(self) -> None:
        self.affinity: frozenset[int] | None = None
        self.environ: dict[str, str] = {}

    def sched_getaffinity(self, pid: int) -> frozenset[int]:
        assert pid == 0
        return CORES

    def sched_setaffinity(self, pid: int, cores: frozenset[int]) -> None:
        assert pid == 0
        self.affinity = cores


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made_up = Machine()
    monkeypatch.setattr(cores, "os", made_up)
    return made_up


@pytest.fixture(autouse=True)
def quota(monkeypatch: pytest.MonkeyPatch) -> Callable[[float | None], None]:
    """Sets the CPU quota of this process's control groups; none to begin with."""

    def set_quota(cores_allowed: float | None) -> None:
        monkeypatch.setattr(cores, "cpu_quota", lambda: cores_allowed)

    set_quota(None)
    return set_quota


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ours = Clock()
    monkeypatch.setattr(cores, "time", ours)
    return ours


def end(claim: CoreClaim) -> None:
    """What the end of a process does to its claim."""
    for token in claim.tokens:
        token.close()


@contextmanager
def claims(*nums_cores: int) -> Iterator[list[CoreClaim]]:
    """Claims one after the other, which end with the block; all must succeed."""
    made = []
    try:
        for num_cores in nums_cores:
            claim = claim_cores(num_cores)
            assert claim is not None
            made.append(claim)
        yield made
    finally:
        for claim in made:
            end(claim)


def test_two_claims_get_cores_of_their_own_and_threads_keep_to_them(machine: Machine) -> None:
    with claims(2) as (first,):
        assert machine.affinity == first.cores
        with claims(2) as (second,):
            assert machine.affinity == second.cores
            assert len(first.cores) == len(second.cores) == 2
            assert first.cores | second.cores == CORES


@pytest.mark.parametrize("num_cores", [4, 5])
def test_who_wants_all_cores_claims_none(machine: Machine, clock: Clock, num_cores: int) -> None:
    assert claim_cores(num_cores) is None
    assert machine.affinity is None
    assert clock.now_s == 0


def test_too_few_cores_are_waited_for_a_while_and_then_nothing_is_claimed(machine: Machine, clock: Clock) -> None:
    with claims(2, 1) as (_, last):
        assert claim_cores(2) is None
        assert PATIENCE_S <= clock.now_s < 2 * PATIENCE_S
        assert machine.affinity == last.cores
        with claims(1):  # the one that was too few for two is nobody's
            pass


def test_cores_that_become_free_meanwhile_are_claimed(machine: Machine, clock: Clock) -> None:
    with claims(2, 2) as (dying, _):
        clock.on_sleep = lambda: end(dying)
        with claims(2) as (claim,):
            assert claim.cores == dying.cores == machine.affinity
            assert 0 < clock.now_s < PATIENCE_S


@pytest.mark.usefixtures("machine")
def test_the_cores_of_a_killed_process_are_free() -> None:
    command = [sys.executable, "-c", HOLD, str(FIRST_CORE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with claims(3) as (others,):
            assert FIRST_CORE not in others.cores
        process.kill()
        process.wait()
        with claims(1) as (claim,):
            assert claim.cores == {FIRST_CORE}


def test_a_machine_that_cannot_keep_threads_on_cores_claims_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cores, "os", object())  # which has not what it takes
    assert claim_cores(1) is None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine has one core")
def test_a_claim_keeps_this_thread_and_its_children_on_the_cores() -> None:
    """In a process of its own, as it stays so. Where stages have all cores, there is none to be had."""
    code = """
import os, threading
from gptj_dist.stages.cores import claim_cores
before = os.sched_getaffinity(0)
claim = claim_cores(1)
seen = []
thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
thread.start(); thread.join()
print(seen == [before if claim is None else claim.cores])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "True\n"


def test_nothing_is_claimed_in_a_pod_which_cannot_see_the_claims_of_others(machine: Machine) -> None:
    machine.environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    assert claim_cores(1) is None
    assert machine.affinity is None


def test_nothing_is_claimed_in_a_container_with_a_quota(
    machine: Machine, quota: Callable[[float | None], None]
) -> None:
    quota(2.0)
    assert claim_cores(1) is None
    assert machine.affinity is None


@pytest.mark.parametrize(
    ("cores_allowed", "num_cores"),
    [(None, 4), (64.0, 4), (4.0, 4), (2.0, 2), (1.5, 2), (1.25, 1), (1.0, 1), (0.5, 1), (0.1, 1)],
)
@pytest.mark.usefixtures("machine")
def test_the_cores_available_are_those_of_the_affinity_within_the_quota(
    quota: Callable[[float | None], None], cores_allowed: float | None, num_cores: int
) -> None:
    quota(cores_allowed)
    assert available_cores() == num_cores


def test_a_system_without_affinity_has_all_cores_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert available_cores() == 10
