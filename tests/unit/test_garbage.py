"""Collections of garbage stay short."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from gptj_dist import garbage

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
