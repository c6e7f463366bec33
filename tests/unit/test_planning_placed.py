"""Which device of which node holds which stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptj_dist.config import ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.devices import DeviceSpec, known_device
from gptj_dist.planning.forecast import PlannedStage, Workload, mixed_tokens_per_s, num_kv_tokens
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.planning.placed import NodeDevice, place_pipeline, with_more_kv
from gptj_dist.planning.search import NUM_REQUESTS

DEEP = Workload(ModelConfig(50400, 28, 1024, 16, 64, 4096, 2048, (0,)), "bfloat16", 2048)
NEAR, FAR = (100e-6, 1.25e9), (20e-3, 12.5e6)


def cpu(speed: float = 1.0, memory_gb: float = 24) -> DeviceSpec:
    base = known_device("cpu")
    return replace(
        base,
        memory_bytes=memory_gb * 1e9,
        bandwidth_bytes_s=base.bandwidth_bytes_s * speed,
        kv_bandwidth_bytes_s=base.kv_bandwidth_bytes_s * speed,
        flops=base.flops * speed,
        attention_flops=base.attention_flops * speed,
        row_elements_s=base.row_elements_s * speed,
        layer_overhead_s=base.layer_overhead_s / speed,
    )


def nodes(**specs: DeviceSpec) -> list[NodeDevice]:
    return [NodeDevice(name, f"cpu of {name}", spec) for name, spec in specs.items()]


def near(_from_node: str, _to_node: str) -> tuple[float, float]:
    return NEAR


def test_a_node_at_half_speed_gets_about_half_the_layers() -> None:
    found = place_pipeline(DEEP, nodes(whole=cpu(), half=cpu(0.5)), near)
    layers = {d.node_id: s.layers.num_layers for d, s in zip(found.devices, found.stages, strict=True)}
    assert layers["half"] + layers["whole"] == 28
    assert 8 <= layers["half"] <= 11
    even = [PlannedStage(stage.device, r) for stage, r in zip(found.stages, layer_ranges((14, 14)), strict=True)]
    assert found.tokens_per_s > 1.25 * mixed_tokens_per_s(DEEP, even, NUM_REQUESTS)


def test_a_node_that_would_slow_the_pipeline_is_left_out_with_both_speeds() -> None:
    found = place_pipeline(DEEP, nodes(a=cpu(), b=cpu(), snail=cpu(0.01)), near)
    assert {device.node_id for device in found.devices} == {"a", "b"}
    (left,) = found.left_out
    assert left.device.name == "cpu of snail"
    assert left.tokens_per_s is not None
    assert left.tokens_per_s < 0.8 * found.tokens_per_s


def test_a_node_that_is_far_from_all_others_is_left_out() -> None:
    def link(from_node: str, to_node: str) -> tuple[float, float]:
        return (5.0, 1e6) if "moon" in (from_node, to_node) else NEAR

    found = place_pipeline(DEEP, nodes(a=cpu(), b=cpu(), moon=cpu()), link)
    assert {device.node_id for device in found.devices} == {"a", "b"}


def test_neighbours_of_the_pipeline_are_close_together() -> None:
    """Two racks: the way between them is long, so the ring crosses it twice and no more."""

    def link(from_node: str, to_node: str) -> tuple[float, float]:
        return NEAR if from_node[0] == to_node[0] else FAR

    six = nodes(a1=cpu(), b1=cpu(), a2=cpu(), b2=cpu(), a3=cpu(), b3=cpu())
    small = [replace(device, spec=replace(device.spec, memory_bytes=1.0e9)) for device in six]
    found = place_pipeline(DEEP, small, link, num_stages=6)
    racks = [device.node_id[0] for device in found.devices]
    assert sum(a != b for a, b in zip(racks, [*racks[1:], racks[0]], strict=True)) == 2


def test_of_equal_nodes_the_close_ones_are_taken() -> None:
    def link(from_node: str, to_node: str) -> tuple[float, float]:
        return NEAR if from_node[0] == to_node[0] else FAR

    found = place_pipeline(DEEP, nodes(a1=cpu(), b1=cpu(), a2=cpu()), link, num_stages=2)
    assert {device.node_id for device in found.devices} == {"a1", "a2"}


def test_layers_move_to_where_memory_is_as_long_as_that_costs_hardly_any_speed() -> None:
    fast_but_small, slow_but_large = cpu(1.0, memory_gb=1.4), cpu(0.99, memory_gb=24)
    devices = (fast_but_small, slow_but_large, slow_but_large)
    cut = [PlannedStage(device, layers) for device, layers in zip(devices, layer_ranges((10, 9, 9)), strict=True)]
    better = with_more_kv(DEEP, cut)
    assert num_kv_tokens(DEEP, better) > num_kv_tokens(DEEP, cut)
    assert mixed_tokens_per_s(DEEP, better, NUM_REQUESTS) >= 0.99 * mixed_tokens_per_s(DEEP, cut, NUM_REQUESTS)


def test_a_number_of_stages_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 stages do not fit these devices; another number does"):
        place_pipeline(DEEP, nodes(a=cpu(), b=cpu()), near, num_stages=3)
