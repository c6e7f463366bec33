"""What steps cost, learnt from those that have been."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from gptj_dist.chunking import USUAL_OVERHEAD_ROWS, StepCost
from gptj_dist.engine.step_cost import MAX_OVERHEAD_ROWS, StepCostEstimate


def learnt(steps: Iterable[tuple[int, float]]) -> StepCost:
    estimate = StepCostEstimate()
    for num_rows, seconds in steps:
        estimate.observe(num_rows, seconds)
    cost = estimate.cost
    assert cost is not None
    return cost


def line(overhead_s: float, row_s: float, rows: Iterable[int]) -> list[tuple[int, float]]:
    return [(num_rows, overhead_s + row_s * num_rows) for num_rows in rows]


@pytest.mark.parametrize(("overhead_s", "row_s"), [(0.02, 1e-3), (1e-4, 1e-5), (0.5, 0.01)])
def test_it_recovers_a_line(overhead_s: float, row_s: float) -> None:
    cost = learnt(line(overhead_s, row_s, (1, 32, 300, 8, 500)))
    assert (cost.overhead_s, cost.row_s) == pytest.approx((overhead_s, row_s))


def test_noise_does_little() -> None:
    rng = random.Random(0)
    steps = line(0.02, 1e-3, [rng.choice((1, 8, 64, 256)) for _ in range(300)])
    cost = learnt((num_rows, seconds * rng.uniform(0.9, 1.1)) for num_rows, seconds in steps)
    assert (cost.overhead_s, cost.row_s) == pytest.approx((0.02, 1e-3), rel=0.2)


def test_it_forgets_what_was_long_ago() -> None:
    rows = (1, 64, 300, 17) * 300
    cost = learnt([*line(0.5, 0.01, rows), *line(0.02, 1e-3, rows)])
    assert (cost.overhead_s, cost.row_s) == pytest.approx((0.02, 1e-3), rel=0.02)


def test_nothing_is_known_before_the_first_step() -> None:
    assert StepCostEstimate().cost is None


def test_steps_of_one_size_show_what_they_take_and_share_it_as_usual() -> None:
    cost = learnt([(100, 0.5)] * 50)
    assert cost.overhead_s + 100 * cost.row_s == pytest.approx(0.5)
    assert cost.overhead_s == pytest.approx(USUAL_OVERHEAD_ROWS * cost.row_s)


def test_rows_that_seem_to_cost_nothing_or_less_cost_something_all_the_same() -> None:
    for steps in ([(1, 0.3), (400, 0.1)], [(1, 0.2), (400, 0.2)], [(1, 0.0), (400, 0.2)]):
        cost = learnt(steps)
        assert cost.overhead_s > 0
        assert cost.row_s > 0
        assert cost.overhead_s <= 1.0001 * MAX_OVERHEAD_ROWS * cost.row_s


@pytest.mark.parametrize("seed", range(100))
def test_both_parts_are_above_zero_whatever_was_measured(seed: int) -> None:
    rng = random.Random(seed)
    estimate = StepCostEstimate()
    for _ in range(300):
        estimate.observe(rng.choice((1, 2, 512, rng.randint(1, 5000))), rng.choice((0.0, 1e-9, rng.random(), 1e4)))
        cost = estimate.cost
        assert cost is None or (cost.overhead_s > 0 and cost.row_s > 0)
