"""Links between nodes: what they promise to a planner, and when one counts as slower."""

from __future__ import annotations

import pytest

from gptj_dist.planning.links import Link, by_pair

LINK = Link("a", "b", latency_s=0.001, bytes_per_s=1e8, measured_at=0.0)


def test_a_message_takes_the_latency_and_the_time_of_its_bytes() -> None:
    assert LINK.transfer_s(1e6) == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("latency_s", "rate", "is_slower"),
    [
        (0.0029, 1.2e7, False),
        (0.0031, 2e7, True),
        (0.001, 0.9e7, True),
    ],
)
def test_a_path_is_slower_after_three_looks_of_twice_the_latency_or_half_the_rate(
    latency_s: float, rate: float, is_slower: bool
) -> None:
    """A look's message is short: its rate is compared with those of other looks."""
    link = LINK.looked_at(0.001, 2e7)
    found = []
    for _ in range(3):
        link = link.looked_at(latency_s, rate)
        found.append(link.is_slower)
    assert found == [False, False, is_slower]
    assert not link.looked_at(0.001, 2e7).is_slower


def test_the_first_look_is_never_slow_however_short_its_message() -> None:
    assert LINK.looked_at(0.001, 1e6).num_slow_looks == 0


def test_a_look_corrects_a_first_measurement_that_was_disturbed() -> None:
    link = Link("a", "b", 0.020, 1e8, 1.0).looked_at(0.001, 5e7)
    assert (link.latency_s, link.bytes_per_s, link.measured_at) == (0.001, 1e8, 1.0)
    assert (link.latest_latency_s, link.latest_bytes_per_s) == (0.001, 5e7)


def test_each_direction_is_a_link_of_its_own() -> None:
    back = Link("b", "a", 0.002, 1e8, 0.0)
    assert by_pair([LINK, back]) == {("a", "b"): LINK, ("b", "a"): back}
