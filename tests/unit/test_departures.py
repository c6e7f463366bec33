"""Stages move from nodes that will end."""

from __future__ import annotations

import asyncio
import math

import pytest

from gptj_dist.errors import StageFailedError
from gptj_dist.stages import departures
from gptj_dist.stages.departures import end_nears, watch_departures


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "PERIOD_S", 0.0)
    monkeypatch.setattr(departures, "RETRY_S", 0.0)


def test_stages_move_from_a_node_that_will_end_and_from_no_other() -> None:
    moved: list[int] = []

    async def run() -> None:
        nodes = {0: "a", 1: "b", 2: "b", 3: "c"}
        done = asyncio.Event()

        async def ask() -> frozenset[str]:
            return frozenset({"b", "d"})

        async def move(index: int) -> None:
            moved.append(index)
            del nodes[index]  # it has a successor
            if len(moved) == 2:
                done.set()

        watch = asyncio.create_task(watch_departures(ask, lambda: nodes, move))
        await asyncio.wait_for(done.wait(), 60)
        for _ in range(20):
            await asyncio.sleep(0)
        watch.cancel()

    asyncio.run(run())
    assert moved == [1, 2]


@pytest.mark.parametrize("error", [TimeoutError(), StageFailedError("it died")])
def test_a_move_that_fails_is_tried_again(error: Exception) -> None:
    async def run() -> int:
        calls = 0
        done = asyncio.Event()

        async def ask() -> frozenset[str]:
            return frozenset({"a"})

        async def move(_: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise error
            done.set()
            await asyncio.Future()

        watch = asyncio.create_task(watch_departures(ask, lambda: {0: "a"}, move))
        await asyncio.wait_for(done.wait(), 60)
        watch.cancel()
        return calls

    assert asyncio.run(run()) == 2


def test_the_end_of_a_node_is_near_when_less_time_is_left_than_the_margin_and_of_no_other_node() -> None:
    async def run() -> float:
        now_s = 100.0

        async def ask() -> dict[str, float]:
            nonlocal now_s
            now_s += 1
            return {"a": 107.0, "b": 1.0} if now_s > 103 else {}

        await asyncio.wait_for(end_nears(ask, "a", 2.0, lambda: now_s), 60)
        return now_s

    assert asyncio.run(run()) == 105


def test_a_node_that_drains_without_a_time_limit_does_not_end() -> None:
    async def run() -> bool:
        asked = asyncio.Event()
        num_asked = 0

        async def ask() -> dict[str, float]:
            nonlocal num_asked
            num_asked += 1
            if num_asked == 3:
                asked.set()
            return {"a": math.inf}

        waiting = asyncio.create_task(end_nears(ask, "a", 1e9))
        await asyncio.wait_for(asked.wait(), 60)
        return waiting.cancel()

    assert asyncio.run(run())
