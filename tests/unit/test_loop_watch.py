"""A stall of an event loop is measured, and reported with the code that caused it."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from gptj_dist.engine.histogram import BOUNDS_NS
from gptj_dist.serving.loop_watch import LATE_S, LoopWatch, _place
from tests.waiting import wait_until

HERE = Path(__file__).parent
TIMEOUT_S = 20


def block(watch: LoopWatch, times: int = 4) -> None:
    """Holds the loop up until its watcher has looked at it some times."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while sum(watch._places.values()) < times and time.monotonic() < deadline_s:
        time.sleep(0.001)


async def stalled(watch: LoopWatch) -> None:
    """Stalls the loop, and returns when it has noticed."""
    block(watch)
    async with asyncio.timeout(TIMEOUT_S):
        while watch._places:  # noqa: ASYNC110  # a beat sets no event
            await asyncio.sleep(0.001)


def num_late(watch: LoopWatch) -> int:
    return sum(watch.lag.counts[BOUNDS_NS.index(round(1e9 * LATE_S)) + 1 :])


def test_a_stall_is_counted_and_reported_with_the_function_that_held_the_loop_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        watch = LoopWatch(HERE, report_s=0)
        await stalled(watch)
        watch.stop()
        assert num_late(watch) >= 1

    with caplog.at_level(logging.WARNING, "gptj_dist"):
        asyncio.run(main())
    [reported, *_] = [vars(record)["values"] for record in caplog.records if record.message == "event loop was late"]
    assert re.fullmatch(r"unit/test_loop_watch\.py:\d+ block", reported["place"])
    assert reported["lag_s"] >= LATE_S
    assert reported["cpu_s"] >= 0
    assert reported["num_stalls"] == 1


def test_a_wait_in_the_code_of_others_is_named_with_its_caller() -> None:
    may_go_on = threading.Event()

    def hold() -> None:
        may_go_on.wait(TIMEOUT_S)

    def place(root: Path) -> str:
        return _place(sys._current_frames()[thread.ident or 0], root)

    thread = threading.Thread(target=hold)
    thread.start()
    wait_until(lambda: "Condition.wait" in place(HERE), "the thread waits")
    caller, called = place(HERE).split(" > ")
    assert place(HERE / "elsewhere") == called
    may_go_on.set()
    thread.join()
    assert re.fullmatch(r"unit/test_loop_watch\.py:\d+ .*hold", caller)
    assert re.fullmatch(r".*/threading\.py:\d+ Condition\.wait", called)


def test_of_several_stalls_the_worst_is_reported_at_most_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> int:
        watch = LoopWatch(HERE, report_s=3600)
        for _ in range(3):
            await stalled(watch)
        assert len(caplog.records) == 1
        watch.stop()
        assert len(caplog.records) == 2
        return num_late(watch)

    with caplog.at_level(logging.WARNING, "gptj_dist"):
        assert asyncio.run(main()) >= 3


def test_a_loop_that_hangs_is_told_of_and_not_because_its_process_stood_still() -> None:
    hangs = threading.Event()

    async def main() -> None:
        watch = LoopWatch(HERE, on_hang=hangs.set, hang_s=1.0)
        watch._due_s -= 3600  # as if the thread had not looked for an hour
        block(watch)
        assert not hangs.is_set()
        assert hangs.wait(TIMEOUT_S)
        watch.stop()

    asyncio.run(main())


def test_a_loop_that_hangs_because_its_log_cannot_be_written_is_told_of_too() -> None:
    hangs, slow = threading.Event(), logging.StreamHandler(io.StringIO())
    log = logging.getLogger("gptj_dist")

    async def main() -> None:
        watch = LoopWatch(HERE, on_hang=hangs.set, hang_s=0.2)
        slow.acquire()  # as while it writes to a disk that hangs
        try:
            assert hangs.wait(TIMEOUT_S)
        finally:
            slow.release()
        watch.stop()

    log.addHandler(slow)
    try:
        asyncio.run(main())
        wait_until(lambda: "event loop hangs" in slow.stream.getvalue(), "the line is written when the disk goes on")
    finally:
        log.removeHandler(slow)
