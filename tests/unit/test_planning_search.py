"""The best pipeline over unlike devices: against every order and cut, and what is said when there is none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from statistics import median

import pytest

from gptj_dist.config import ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.cost import PROCESS_BYTES, weight_bytes
from gptj_dist.planning.devices import DeviceSpec, known_device
from gptj_dist.planning.forecast import PlannedStage, Workload, mixed_tokens_per_s
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.planning.search import NUM_REQUESTS, best_pipeline, gains_of_one_more

MODEL = ModelConfig(50400, 6, 1024, 16, 32, 4096, 2048, (0,), "float16")
WORKLOAD = Workload(MODEL, "float16", 2048)
SIX_B = Workload(ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,), "float16"), "float16", 2048)


WEAK = replace(known_device("l4"), name="weak", memory_bytes=40e9, flops=5e12)
"""Bound by arithmetic."""


def all_pipelines(workload: Workload, devices: Sequence[DeviceSpec]) -> Iterator[tuple[PlannedStage, ...]]:
    """Every cut over every order of every subset that has room for one request of full length."""
    num_layers = workload.model.num_layers
    for num_stages in range(1, min(len(devices), num_layers) + 1):
        for chosen in set(permutations(devices, num_stages)):
            for borders in combinations(range(1, num_layers), num_stages - 1):
                layers = tuple(stop - start for start, stop in pairwise((0, *borders, num_layers)))
                stages = tuple(map(PlannedStage, chosen, layer_ranges(layers)))
                if all(stage.num_kv_tokens(workload) >= workload.max_model_len for stage in stages):
                    yield stages


def random_device(rng: random.Random, memory_gb: tuple[float, float]) -> DeviceSpec:
    base = known_device(rng.choice(["l4", "t4", "rtx-3060", "cpu"]))
    return replace(
        base,
        memory_bytes=rng.uniform(*memory_gb) * 1e9,
        bandwidth_bytes_s=base.bandwidth_bytes_s * rng.uniform(0.2, 2),
        flops=base.flops * rng.uniform(0.02, 1),
        link_bytes_s=10 ** rng.uniform(7, 10),
    )


def rate(workload: Workload, pipeline: Sequence[PlannedStage]) -> float:
    return mixed_tokens_per_s(workload, pipeline, NUM_REQUESTS)


@pytest.mark.parametrize("seed", range(25))
def test_no_order_and_no_cut_is_faster_where_memory_is_ample(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [random_device(rng, (20, 40)) for _ in range(3)]
    devices = [rng.choice(kinds) for _ in range(4)]
    best = max(rate(WORKLOAD, pipeline) for pipeline in all_pipelines(WORKLOAD, devices))
    assert rate(WORKLOAD, best_pipeline(WORKLOAD, devices)) == pytest.approx(best)


def test_what_is_found_where_memory_is_short_fits_and_is_close_to_the_best() -> None:
    """The search tries room for 32, 16, 8 ... requests only, so it may miss the best."""
    shares = []
    for seed in range(25):
        rng = random.Random(seed)
        devices = [random_device(rng, (1.15, 1.5)) for _ in range(4)]
        found = best_pipeline(WORKLOAD, devices)
        assert all(stage.num_kv_tokens(WORKLOAD) >= WORKLOAD.max_model_len for stage in found)
        best = max(rate(WORKLOAD, pipeline) for pipeline in all_pipelines(WORKLOAD, devices))
        shares.append(rate(WORKLOAD, found) / best)
    assert min(shares) > 0.8
    assert median(shares) == pytest.approx(1)


def test_equal_devices_are_cut_evenly() -> None:
    found = best_pipeline(SIX_B, [known_device("l4")] * 4)
    assert [stage.layers.num_layers for stage in found] == [7, 7, 7, 7]


def test_a_device_with_twice_the_flops_gets_about_twice_the_layers_where_those_count() -> None:
    slow = replace(WEAK, name="half", flops=WEAK.flops / 2)
    layers = {stage.device.name: stage.layers.num_layers for stage in best_pipeline(SIX_B, [slow, WEAK])}
    assert layers["weak"] in (18, 19, 20)


def test_a_device_that_only_slows_things_is_left_out() -> None:
    snail = replace(known_device("cpu"), name="snail", bandwidth_bytes_s=1e8, flops=1e9)
    found = best_pipeline(SIX_B, [snail, known_device("l4"), snail])
    assert [stage.device.name for stage in found] == ["l4"]


def test_a_slow_device_is_used_when_the_memory_is_needed() -> None:
    small = replace(known_device("h200"), memory_bytes=8e9)
    found = best_pipeline(SIX_B, [small, known_device("cpu")])
    assert {stage.device.name for stage in found} == {"h200", "cpu"}


def test_dozens_of_unlike_devices_are_no_trouble() -> None:
    names = ("l4", "t4", "a10g", "v100", "rtx-3060", "rtx-4090")
    found = best_pipeline(SIX_B, [known_device(name) for name in names for _ in range(5)])
    assert sum(stage.layers.num_layers for stage in found) == 28


def test_one_more_device_never_makes_it_slower() -> None:
    gains = gains_of_one_more(SIX_B, [known_device(name) for name in ("t4", "l4")])
    assert set(gains) == {"t4", "l4"}
    assert all(gain >= 1 for gain in gains.values())


def test_a_second_device_is_worth_the_most_where_arithmetic_takes_the_time() -> None:
    """Where reading weights does, both must read theirs twice, as each step has half of the requests."""
    assert 1.7 < gains_of_one_more(SIX_B, [WEAK])["weak"] <= 2
    ample = replace(known_device("rtx-3060"), memory_bytes=40e9)
    assert 1 <= gains_of_one_more(SIX_B, [ample])["rtx-3060"] < 1.3


def test_a_model_that_does_not_fit_says_how_much_is_needed_and_what_would_help() -> None:
    with pytest.raises(ConfigurationError) as error:
        best_pipeline(replace(SIX_B, dtype="float32"), [known_device("t4")])
    assert "26.3 GB are needed for float32 weights and the KV cache of one request of 2048 tokens" in str(error.value)
    assert "there are 15.0 GB" in str(error.value)
    assert "What would help: --dtype float16 or --quantize int8 or --quantize int4 or 1 more t4." in str(error.value)


def test_enough_memory_in_pieces_too_small_is_said_to_be_that() -> None:
    crumbs = replace(known_device("t4"), name="crumb", memory_bytes=PROCESS_BYTES["cuda"] + 0.4e9)
    with pytest.raises(ConfigurationError, match=r"but not in the pieces.*16 more of the largest"):
        best_pipeline(SIX_B, [crumbs] * 60)


def test_a_shorter_context_is_advised_where_it_is_enough() -> None:
    whole = weight_bytes(SIX_B.model, layer_ranges((28,))[0], "float16")
    tight = replace(known_device("t4"), memory_bytes=PROCESS_BYTES["cuda"] + whole + 0.5e9)
    with pytest.raises(ConfigurationError, match="--quantize int4 or --max-model-len 512 or 1 more t4"):
        best_pipeline(SIX_B, [tight])
