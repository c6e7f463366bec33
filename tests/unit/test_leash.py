"""A stage is told that its coordinator is lost: when it dies, and when it only falls silent; and at no other time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gptj_dist.stages.transport import leash
from gptj_dist.stages.transport.leash import LeashPost, watch_post

TIMEOUT_S = 20.0
COORDINATOR = """
import sys
from gptj_dist.stages.transport.leash import LeashPost
print(LeashPost("127.0.0.1").address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leash, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(leash, "HEARTBEAT_TIMEOUT_MS", 200)
    monkeypatch.setattr(leash, "PERIOD_MS", 50)


@contextmanager
def coordinator() -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """A process with a post, and what is set when it counts as lost."""
    with subprocess.Popen(
        [sys.executable, "-c", COORDINATOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        is_lost = threading.Event()
        watch_post(process.stdout.readline().strip(), is_lost.set)
        assert not is_lost.wait(1.0), "a coordinator that lives, and whose Python does nothing, is not lost"
        yield process, is_lost
        process.kill()


def test_a_dead_coordinator_is_noticed_within_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    waits_ms = leash.MAX_LOST_PERIODS * leash.PERIOD_MS
    assert leash.HEARTBEAT_MS + leash.HEARTBEAT_TIMEOUT_MS + waits_ms < 5000


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_that_dies_or_falls_silent_is_lost(sent: signal.Signals) -> None:
    """A stopped process keeps its connections open and answers nothing, as a machine without power."""
    with coordinator() as (process, is_lost):
        os.kill(process.pid, sent)
        assert is_lost.wait(TIMEOUT_S)


def test_a_coordinator_that_falls_silent_and_comes_back_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the network between them fails for a while."""
    monkeypatch.setattr(leash, "MAX_CUT_PERIODS", 10_000)
    with coordinator() as (process, is_lost):
        os.kill(process.pid, signal.SIGSTOP)
        assert not is_lost.wait(1.5), "longer than the limit for one that is dead"
        os.kill(process.pid, signal.SIGCONT)
        assert not is_lost.wait(1.5)


def test_strangers_are_refused_and_a_post_that_was_never_reached_is_not_lost() -> None:
    post, is_lost = LeashPost("127.0.0.1"), threading.Event()
    watch_post(f"{post.address}x", is_lost.set)
    assert not is_lost.wait(1.0)
    assert post.dropped.num_refused > 0
    post.close()
