"""Cutting layers into stages: against every possible cut, and for GPT-J-6B's shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from gptj_dist.config import LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.partition import (
    CutCost,
    cut_cost,
    explicit_partition,
    layer_ranges,
    lm_head_cost_layers,
    plan_partition,
)
from gptj_dist.quantization import Bits, Quantization


def make_model(num_layers: int, vocab_size: int = 50400, d_model: int = 4096) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=16,
        rotary_dim=64,
        d_ff=4 * d_model,
        context_length=2048,
        eos_token_ids=(0,),
    )


GPTJ_6B = make_model(28)
VOCAB_SIZES = (16, 12 * 4096, 50400, 150_000, 600_000)
"""`lm_head` then costs from next to nothing to nearly nine layers."""


def all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for borders in combinations(range(1, num_layers), num_stages - 1):
        yield tuple(stop - start for start, stop in pairwise((0, *borders, num_layers)))


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("num_layers", range(1, 11))
def test_no_cut_is_cheaper_than_the_planned_one(num_layers: int, vocab_size: int) -> None:
    model = make_model(num_layers, vocab_size)
    for num_stages in range(1, num_layers + 1):
        planned = plan_partition(model, num_stages)
        cuts = list(all_cuts(num_layers, num_stages))
        costs = {layers: cut_cost(model, layers).of_traffic for layers in cuts}
        least = min(costs.values())
        assert costs[planned] == least
        assert planned[-1] == max(layers[-1] for layers, cost in costs.items() if cost == least)


def test_a_cut_costs_what_its_slowest_stages_do() -> None:
    head = 50400 / (12 * 4096)  # lm_head has 50400 x 4096 weights, a layer 12 x 4096**2
    assert lm_head_cost_layers(GPTJ_6B) == pytest.approx(head)
    assert cut_cost(GPTJ_6B, (8, 7, 7, 6)) == CutCost(8, 8)
    assert cut_cost(GPTJ_6B, (7, 7, 7, 7)) == CutCost(7, 7 + head)
    # An output token comes with 4 prompt tokens, and costs what 3 of them do.
    assert CutCost(8, 9).of_traffic == 4 * 8 + 3 * 9


def test_a_large_lm_head_shortens_the_last_stage_only_as_far_as_prompts_bear_it() -> None:
    assert plan_partition(make_model(28, d_model=1024), 2) == (14, 14)  # 4.1 layers
    assert plan_partition(make_model(28, d_model=1024), 3) == (10, 10, 8)


def test_an_lm_head_of_more_bits_than_the_layers_counts_for_more_of_them() -> None:
    of_layer, of_head = 0.5 + 4 / 64, 1.0  # bytes of a number in int4, with scales, and of lm_head beside it
    shares: dict[Bits, float] = {4: of_head / of_layer, 8: 1.0}
    for bits, share in shares.items():
        quantized = GPTJ_6B.quantized(Quantization.of_stages((28,), (bits,)))
        assert lm_head_cost_layers(quantized) == pytest.approx(share * lm_head_cost_layers(GPTJ_6B))
    left_alone = replace(GPTJ_6B, quantization=Quantization((8,) * 28, None, None))
    assert lm_head_cost_layers(left_alone) == pytest.approx(4 * lm_head_cost_layers(GPTJ_6B))


@pytest.mark.parametrize(
    ("num_stages", "layers"),
    [
        (1, (28,)),
        (2, (14, 14)),
        (3, (10, 10, 8)),
        (4, (7, 7, 7, 7)),
        (7, (4,) * 7),
        (14, (2,) * 14),
        (28, (1,) * 28),
    ],
)
def test_gptj_6b_is_cut_about_evenly(num_stages: int, layers: tuple[int, ...]) -> None:
    assert plan_partition(GPTJ_6B, num_stages) == layers


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot cut 28 layers into 29 stages"):
        plan_partition(GPTJ_6B, 29)


def test_explicit_layers_must_add_up_to_the_models() -> None:
    assert explicit_partition(GPTJ_6B, (8, 7, 7, 6)) == (8, 7, 7, 6)
    with pytest.raises(ConfigurationError, match="add up to 27, but the model has 28"):
        explicit_partition(GPTJ_6B, (7, 7, 7, 6))


def test_layer_ranges_cover_the_model_without_gap_or_overlap() -> None:
    assert layer_ranges((8, 7, 7, 6)) == (
        LayerRange(0, 4, 0, 8),
        LayerRange(1, 4, 8, 15),
        LayerRange(2, 4, 15, 22),
        LayerRange(3, 4, 22, 28),
    )
