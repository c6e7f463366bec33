"""How many prompt tokens a micro-batch takes: the formula against every other choice."""

from __future__ import annotations

import random

import pytest

from gptj_dist.chunking import (
    MAX_CHUNK_TOKENS,
    MAX_STALL_OVERHEADS,
    MAX_STALL_S,
    MIN_CHUNK_TOKENS,
    USUAL_OVERHEAD_ROWS,
    StepCost,
    best_chunk_tokens,
    most_chunk_tokens_beside_decodes,
    num_decode_groups,
)


def step_s(cost: StepCost, num_rows: int) -> float:
    return cost.overhead_s + num_rows * cost.row_s


def makespan_s(num_tokens: int, num_stages: int, cost: StepCost, chunk_tokens: int) -> float:
    """Seconds until the last of equal chunks and a rest has left the last of equal stages."""
    num_whole, rest = divmod(num_tokens, chunk_tokens)
    sizes = [chunk_tokens] * num_whole + [rest] * (rest > 0)
    return sum(step_s(cost, size) for size in sizes) + (num_stages - 1) * step_s(cost, max(sizes))


@pytest.mark.parametrize("seed", range(300))
def test_no_other_size_is_more_than_2_percent_sooner_but_beside_the_least_of_all(seed: int) -> None:
    """The least size may leave a small rest, where a somewhat larger one would not."""
    rng = random.Random(seed)
    num_tokens, num_stages = int(10 ** rng.uniform(0.5, 4)), rng.randint(1, 8)
    cost = StepCost(10 ** rng.uniform(-4, -1), 10 ** rng.uniform(-5, -2))
    sizes = range(MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS + 1)
    best = min(makespan_s(num_tokens, num_stages, cost, size) for size in sizes)
    chosen = best_chunk_tokens(num_tokens, num_stages, cost)
    assert makespan_s(num_tokens, num_stages, cost, chosen) <= (1.08 if chosen == MIN_CHUNK_TOKENS else 1.02) * best


def test_one_stage_takes_all_at_once_up_to_the_limit_and_equal_parts_beyond() -> None:
    cost = StepCost(1e-6, 1.0)
    assert [best_chunk_tokens(n, 1, cost) for n in (100, 512, 600)] == [100, 512, 300]


def test_sizes_keep_to_the_limits_whatever_steps_cost() -> None:
    for cost in (StepCost(1e-9, 1.0), StepCost(1.0, 1e-9)):
        for num_tokens in (1, 31, 700, 10**6):
            for num_stages in (1, 2, 28):
                assert MIN_CHUNK_TOKENS <= best_chunk_tokens(num_tokens, num_stages, cost) <= MAX_CHUNK_TOKENS


def test_a_slow_rows_stage_cuts_finer_and_a_slow_start_coarser() -> None:
    sizes = [best_chunk_tokens(1000, 4, StepCost(overhead_s, 1e-3)) for overhead_s in (1e-3, 1e-2, 1e-1)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("seed", range(50))
def test_beside_decodes_a_step_takes_no_longer_than_the_stall_allows(seed: int) -> None:
    rng = random.Random(seed)
    cost = StepCost(10 ** rng.uniform(-4, 0), 10 ** rng.uniform(-5, -3))
    most = most_chunk_tokens_beside_decodes(cost)
    allowed_s = max(MAX_STALL_S, MAX_STALL_OVERHEADS * cost.overhead_s)
    assert most == MIN_CHUNK_TOKENS or step_s(cost, most) <= allowed_s * (1 + 1e-9)
    assert step_s(cost, most + 1) > allowed_s * (1 - 1e-9)


def test_beside_decodes_rows_that_take_forever_still_get_the_least_chunk() -> None:
    assert most_chunk_tokens_beside_decodes(StepCost(0.01, 10.0)) == MIN_CHUNK_TOKENS


def test_stages_with_memories_of_their_own_get_a_group_of_decodes_each() -> None:
    assert [num_decode_groups(n, 4, shares_memory=False) for n in (1, 4, 100)] == [4, 4, 4]


@pytest.mark.parametrize("num_stages", [1, 2, 4, 28])
def test_on_one_memory_no_other_number_of_groups_is_more_than_a_tenth_sooner(num_stages: int) -> None:
    for num_requests in range(1, 300):
        rounds = {n: n * USUAL_OVERHEAD_ROWS + num_requests / n for n in range(1, num_stages + 1)}
        assert rounds[num_decode_groups(num_requests, num_stages, shares_memory=True)] <= 1.1 * min(rounds.values())
