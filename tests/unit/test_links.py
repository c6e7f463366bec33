"""Links between nodes: what they promise to a planner, and when one counts as slower."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptj_dist.planning.links import Link, by_pair

LINK = Link("a", "b", latency_s=0.001, bytes_per_s=1e8, measured_at=0.0)


def test_a_message_takes_the_latency_and_the_time_of_its_bytes() -> None:
    assert LINK.transfer_s(1e6) == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("latency_s", "rate", "is_slower"),
    [
        (None, None, False),
        (0.0029, 0.6e8, False),
        (0.0031, 1e8, True),
        (0.001, 0.4e8, True),
    ],
)
def test_a_path_is_slower_by_twice_the_latency_or_half_the_rate(
    latency_s: float | None, rate: float | None, is_slower: bool
) -> None:
    assert replace(LINK, latest_latency_s=latency_s, latest_bytes_per_s=rate).is_slower is is_slower


def test_each_direction_is_a_link_of_its_own() -> None:
    back = Link("b", "a", 0.002, 1e8, 0.0)
    assert by_pair([LINK, back]) == {("a", "b"): LINK, ("b", "a"): back}
