"""What a stage holds and how long it takes: counted against the checkpoint's tensors, and against what is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from gptj_dist.checkpoint.index import expected_tensors
from gptj_dist.config import DTypeName, LayerRange, ModelConfig
from gptj_dist.model import regions
from gptj_dist.model.native import attention as native
from gptj_dist.planning import cost
from gptj_dist.planning.cost import Chunks, Work, num_parameters, step_s, step_work
from gptj_dist.planning.devices import GPU_BANDWIDTH_EFFICIENCY, KNOWN_DEVICES, DeviceSpec, known_device
from gptj_dist.planning.forecast import (
    PlannedStage,
    Workload,
    decode_step,
    decode_tokens_per_s,
    first_token_s,
    limiting_stage,
    mixed_tokens_per_s,
    num_running,
)
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.quantization import Quantization

GPTJ_6B = ModelConfig(50400, 28, 4096, 16, 64, 16384, 2048, (50256,), "float16")
SIX_B = Workload(GPTJ_6B, "float16", 2048)
INT4 = GPTJ_6B.quantized(Quantization.of_stages((28,), (4,)))


def pipeline(*devices: DeviceSpec, layers: tuple[int, ...] = (28,)) -> tuple[PlannedStage, ...]:
    return tuple(PlannedStage(device, range_) for device, range_ in zip(devices, layer_ranges(layers), strict=True))


@pytest.mark.parametrize("layers", [(5,), (2, 3), (1, 3, 1)])
def test_parameters_are_those_of_the_checkpoints_tensors(layers: tuple[int, ...]) -> None:
    model = ModelConfig(40, 5, 16, 2, 4, 56, 100, (0,))
    for range_ in layer_ranges(layers):
        expected = sum(math.prod(shape) for shape in expected_tensors(model, range_).values())
        assert num_parameters(model, range_) == expected


def test_a_lone_stage_holds_tied_embeddings_twice() -> None:
    untied = ModelConfig(40, 5, 16, 2, 4, 64, 100, (0,))
    tied = replace(untied, has_tied_embeddings=True)
    for range_ in (LayerRange(0, 1, 0, 5), LayerRange(0, 2, 0, 2), LayerRange(1, 2, 2, 5)):
        assert num_parameters(tied, range_) == num_parameters(untied, range_)


def test_a_decode_step_of_gptj_6b_streams_what_is_known() -> None:
    work = step_work(GPTJ_6B, LayerRange(0, 1, 0, 28), "float16", "cuda", decode_step(SIX_B, 1))
    assert work.weight_bytes == pytest.approx(11.69e9, rel=0.002)
    assert work.kv_bytes == 512 * 458_752


def test_a_chunk_that_samples_nothing_leaves_lm_head_alone() -> None:
    last = LayerRange(1, 2, 27, 28)
    silent, sampled = (
        step_work(GPTJ_6B, last, "float16", "cuda", [Chunks(1, 64, 64, has_samples=samples)])
        for samples in (False, True)
    )
    assert sampled.weight_bytes - silent.weight_bytes == 2 * 50400 * 4096
    assert sampled.matrix_flop - silent.matrix_flop == 2 * 50400 * 4096  # for one row of 64


def test_a_cpu_attends_for_chunks_by_tiles_and_for_a_lone_row_alone() -> None:
    layers = LayerRange(0, 1, 0, 28)
    per_score = 4 * 28 * 4096
    chunk, rows = ([Chunks(2, num_tokens, 20)] for num_tokens in (20, 1))
    dtypes: tuple[DTypeName, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        assert step_work(GPTJ_6B, layers, dtype, "cpu", chunk).attention_flop == per_score * 2 * 8 * (8 + 16 + 24)
        assert step_work(GPTJ_6B, layers, dtype, "cpu", rows).attention_flop == per_score * 2 * 20


def test_a_cpu_does_one_thing_after_the_other_and_a_gpu_all_at_once() -> None:
    work = Work(
        num_layers=2,
        weight_bytes=10.0,
        kv_bytes=20.0,
        matrix_flop=300.0,
        attention_flop=50.0,
        row_elements=7.0,
    )
    cpu = DeviceSpec(
        name="x",
        kind="cpu",
        memory_bytes=0,
        bandwidth_bytes_s=10.0,
        kv_bandwidth_bytes_s=5.0,
        flops=100.0,
        float32_flops=10.0,
        attention_flops=25.0,
        row_elements_s=70.0,
        step_overhead_s=0.01,
        layer_overhead_s=0.5,
    )
    assert step_s(cpu, "bfloat16", work) == pytest.approx(0.01 + 1 + (1 + 4) + (3 + 2) + 0.1)
    assert step_s(cpu, "float32", work) == pytest.approx(0.01 + 1 + (1 + 4) + (30 + 2) + 0.1)
    assert step_s(replace(cpu, kind="cuda"), "float16", work) == pytest.approx(0.01 + 5 + 0.1)


def test_a_gpu_reads_the_bits_for_few_rows_and_makes_numbers_of_them_for_many() -> None:
    layers = LayerRange(0, 1, 0, 28)
    whole, int4 = (step_work(model, layers, "float16", "cuda", decode_step(SIX_B, 64)) for model in (GPTJ_6B, INT4))
    assert 0.25 < int4.weight_bytes / whole.weight_bytes < 0.3
    many = step_work(INT4, layers, "float16", "cuda", decode_step(SIX_B, 65))
    assert many.weight_bytes > 2 * whole.weight_bytes


def test_what_is_known_of_other_layers_is_still_so() -> None:
    assert native.TILE_ROWS == cost.TILE_ROWS == regions.EXACT_TILE_ROWS


# Forecasts


@pytest.mark.parametrize(
    ("name", "published_limit"),  # tokens/s at batch 1 and 512 tokens of context: bytes read over bandwidth
    [("a100-80", 171), ("t4", 27), ("l4", 25)],
)
def test_one_request_on_one_gpu_is_bound_by_its_bandwidth(name: str, published_limit: float) -> None:
    predicted = decode_tokens_per_s(SIX_B, pipeline(known_device(name)), 1)
    assert predicted == pytest.approx(published_limit * GPU_BANDWIDTH_EFFICIENCY, rel=0.1)


def test_an_h200_is_predicted_four_fifths_of_what_its_measured_bandwidth_allows() -> None:
    assert decode_tokens_per_s(SIX_B, pipeline(known_device("h200")), 1) == pytest.approx(361 * 0.8, rel=0.1)


@pytest.mark.parametrize("name", KNOWN_DEVICES)
def test_more_requests_make_more_tokens_and_prompts_cost_some(name: str) -> None:
    device = replace(known_device(name), memory_bytes=200e9)
    rates = [decode_tokens_per_s(SIX_B, pipeline(device), count) for count in (1, 8, 32, 64)]
    assert rates == sorted(rates)
    assert mixed_tokens_per_s(SIX_B, pipeline(device), 8) <= rates[1]


def test_a_pipeline_helps_many_requests_and_not_one() -> None:
    l4 = replace(known_device("l4"), flops=5e12)
    one, four = pipeline(l4), pipeline(l4, l4, l4, l4, layers=(7, 7, 7, 7))
    assert decode_tokens_per_s(SIX_B, four, 1) < decode_tokens_per_s(SIX_B, one, 1)
    assert mixed_tokens_per_s(SIX_B, four, 32) > 2 * mixed_tokens_per_s(SIX_B, one, 32)


def test_a_pipeline_makes_the_first_token_sooner_where_arithmetic_takes_the_time() -> None:
    slow = replace(known_device("l4"), flops=5e12, attention_flops=5e12)
    assert first_token_s(SIX_B, pipeline(slow, slow, layers=(14, 14)), 512) < first_token_s(SIX_B, pipeline(slow), 512)


def test_a_slow_link_costs_a_pipeline_and_not_a_lone_stage() -> None:
    fast = known_device("l4")
    slow = replace(fast, link_bytes_s=1e6)
    assert decode_tokens_per_s(SIX_B, pipeline(slow), 8) == decode_tokens_per_s(SIX_B, pipeline(fast), 8)
    two = (14, 14)
    slowed = decode_tokens_per_s(SIX_B, pipeline(slow, slow, layers=two), 8)
    assert slowed < decode_tokens_per_s(SIX_B, pipeline(fast, fast, layers=two), 8)


def test_requests_beyond_the_kv_cache_wait() -> None:
    # 16 GB less 1 reserved, less 12.10 of weights, 9/10 of the rest, at 458,752 bytes a token: 5,687 tokens.
    assert pipeline(known_device("t4"))[0].num_kv_tokens(SIX_B) == pytest.approx(5687, abs=5)
    assert num_running(SIX_B, pipeline(known_device("t4")), 64) == 11


def test_the_slowest_stage_is_named() -> None:
    stages = pipeline(known_device("l4"), known_device("h200"), known_device("l4"), layers=(9, 10, 9))
    assert limiting_stage(SIX_B, stages, 32) == 2  # it has lm_head
