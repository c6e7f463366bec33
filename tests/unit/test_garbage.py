"""Collections of garbage stay short, and find what is left of requests."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from types import FrameType

import pytest

from gptj_dist import garbage
from tests.front_app import eventually, front_app

NUM_STREAMS = 1000
OBJECTS_PER_STREAM = 400
"""As counted in an ingress."""


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    thresholds = gc.get_threshold()
    garbage.settle()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def num_full_collections() -> int:
    number: int = gc.get_stats()[2]["collections"]
    return number


def test_what_lived_at_the_start_is_not_visited() -> None:
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < gc.get_freeze_count() // 100


def test_a_burst_of_streams_causes_no_full_collection() -> None:
    before = num_full_collections()
    streams = [[[] for _ in range(OBJECTS_PER_STREAM)] for _ in range(NUM_STREAMS)]  # type: ignore[var-annotated]
    assert len(streams) == NUM_STREAMS
    assert num_full_collections() == before


def test_young_circles_are_still_collected() -> None:
    before = gc.get_stats()[0]["collected"] + gc.get_stats()[1]["collected"]
    for _ in range(10_000):
        circle: list[object] = []
        circle.append(circle)
    assert gc.get_stats()[0]["collected"] + gc.get_stats()[1]["collected"] > before + 9_000


async def refused_requests(number: int) -> None:
    async with front_app() as app:
        for body in ({"model": "other", "prompt": "x"}, {"model": "demo", "prompt": "many words " * 20_000}):
            for _ in range(number):
                assert (await app.client.post("/v1/completions", json=body)).status_code in (400, 404)


def test_refused_requests_leave_no_frames_in_circles() -> None:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        asyncio.run(refused_requests(number=5))
        gc.collect()
        frames = {found.f_code.co_qualname for found in gc.garbage if isinstance(found, FrameType)}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert frames == set()


@pytest.mark.parametrize(
    ("num_requests", "most_objects", "most_s", "is_collected"),
    [
        (0, -1, 300.0, True),
        (garbage.MAX_BUSY, 10**9, 300.0, True),
        (garbage.MAX_BUSY, -1, 0.0, True),
        (1, -1, 300.0, False),
        (garbage.MAX_BUSY + 1, 10**9, 0.0, False),
    ],
    ids=["idle", "few objects", "overdue", "many objects", "busy"],
)
def test_old_circles_are_collected_unless_that_holds_up_requests(
    num_requests: int, most_objects: int, most_s: float, is_collected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "PERIOD_S", 0.01)
    monkeypatch.setattr(garbage, "MAX_OBJECTS", most_objects)
    monkeypatch.setattr(garbage, "MAX_PERIOD_S", most_s)
    asked = 0

    def ask() -> int:
        nonlocal asked
        asked += 1
        return num_requests

    async def scenario() -> None:
        garbage.collect_when_quiet(ask)
        await eventually(lambda: asked == 3)

    before = num_full_collections()
    asyncio.run(scenario())
    assert num_full_collections() - before == (asked if is_collected else 0)
