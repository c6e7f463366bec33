"""Stages move from nodes that will end."""

from __future__ import annotations

import asyncio

import pytest

from gptj_dist.errors import StageFailedError
from gptj_dist.stages import departures
from gptj_dist.stages.departures import watch_departures


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
