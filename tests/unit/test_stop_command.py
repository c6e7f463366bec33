"""`gptj-dist stop` on this machine: which processes it ends, and which it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gptj_dist.operate.launch.environment import LAUNCHER_VARIABLE
from gptj_dist.operate.launch.leftovers import find_servers
from gptj_dist.operate.launch.processes import is_running, kill, start_tick
from tests.verbs import run_verb
from tests.waiting import wait_until

Processes = dict[str, subprocess.Popen[bytes]]


@pytest.fixture
def ray_of() -> Iterator[Processes]:
    """A process in the place of Ray's for each of: a launcher that runs, one that is gone, one whose pid came again."""
    marks = {
        "running": f"{os.getpid()}:{start_tick(os.getpid())}",
        "gone": f"{2**22 + 1}:5",
        "came again": f"{os.getpid()}:1",
    }
    processes = {
        name: subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={LAUNCHER_VARIABLE: mark})
        for name, mark in marks.items()
    }
    yield processes
    for process in processes.values():
        kill([process.pid])
        process.communicate()


def test_it_ends_the_processes_of_launchers_that_are_gone_and_no_others(ray_of: Processes) -> None:
    wait_until(lambda: {p.pid for p in ray_of.values()} <= {pid for s in find_servers() for pid in s.pids}, "they run")
    done = run_verb("stop")
    assert done.returncode == 0
    for name in ("gone", "came again"):
        ray_of[name].wait(10)
    assert is_running(ray_of["running"].pid)
    assert f"Ended 1 processes of the launcher with pid {2**22 + 1}" in done.stdout
    assert f"`kill {os.getpid()}` stops its server" in done.stdout


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    done = run_verb("stop", "--address", "127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr == "gptj-dist: no Ray answers at 127.0.0.1:1: Connection refused\n"
