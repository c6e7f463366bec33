"""Devices and nodes of single stages, and what stages ask of Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.placement import NODE_ID_LABEL, StageResources
from gptj_dist.serving.sizing import COORDINATOR_CPUS, size_stages
from gptj_dist.stages.blueprint import DeviceReport, require_equal_bits
from gptj_dist.stages.group import Placement

NODE_ID = "ab12" * 14
IN_CLUSTER = {"CPU": 40.0, "GPU": 1.0}


def config(**settings: Any) -> PipelineConfig:
    return PipelineConfig("demo", **settings)


@pytest.mark.parametrize("settings", [{"device": "cpu,cuda"}, {"stage_nodes": ("any", "zone=b")}, {"layers": (9, 19)}])
def test_what_is_said_of_single_stages_gives_their_number(settings: dict[str, Any]) -> None:
    assert config(**settings).num_stages == 2
    assert len(config(**settings).devices) == len(config(**settings).nodes) == 2


def test_each_stage_asks_for_its_own_device_and_node() -> None:
    wanted = config(device="cpu,cuda,auto", stage_nodes=("10.0.0.2", "zone=b", "any"), gpus_per_stage=0.5)
    size = size_stages(wanted, 3, IN_CLUSTER.__getitem__)
    assert size.bundles == [
        {"CPU": COORDINATOR_CPUS},
        {"CPU": 1.0, "node:10.0.0.2": 0.001},
        {"CPU": 1.0, "GPU": 0.5},
        {"CPU": 1.0, "GPU": 0.5},
    ]
    assert size.labels == [{}, {}, {"zone": "b"}, {}]
    assert size.total == {"CPU": 3 + COORDINATOR_CPUS, "GPU": 1.0}


def test_stages_on_gpus_share_them_if_there_are_fewer_but_cpu_stages_take_none() -> None:
    size = size_stages(config(device="cuda,cpu,cuda"), 3, IN_CLUSTER.__getitem__)
    assert [stage.gpus for stage in size.stages] == [0.5, 0.0, 0.5]


def test_stages_that_ask_for_a_gpu_wait_for_one_that_the_cluster_may_get() -> None:
    size = size_stages(config(stages=2, gpus_per_stage=1.0), 2, {"CPU": 16.0, "GPU": 0.0}.__getitem__)
    assert [(stage.device, stage.gpus) for stage in size.stages] == [("cuda", 1.0)] * 2


def test_a_stage_on_a_chosen_node_has_no_bundle_and_may_move_when_the_node_is_gone() -> None:
    nodes = ("any", f"{NODE_ID_LABEL}={NODE_ID}", "zone=b")
    size = size_stages(config(stage_nodes=nodes), 3, IN_CLUSTER.__getitem__)
    assert [stage.node_id for stage in size.stages] == [None, NODE_ID, None]
    assert (len(size.bundles), size.labels) == (3, [{}, {}, {"zone": "b"}])
    placement = Placement(PlacementGroup.empty(), size.stages, "pipeline")
    first, chosen, last = map(placement.strategy, range(3))
    assert isinstance(chosen, NodeAffinitySchedulingStrategy)
    assert (chosen.node_id, chosen.soft) == (NODE_ID, True)
    assert isinstance(first, PlacementGroupSchedulingStrategy)
    assert isinstance(last, PlacementGroupSchedulingStrategy)
    assert (first.placement_group_bundle_index, last.placement_group_bundle_index) == (1, 2)


def test_float32_over_cpus_and_gpus_is_refused_only_if_it_was_asked_for() -> None:
    cpu = DeviceReport("cpu", "here/cpu", 2, 10, ("float32",), kernels="compiled", vectors="avx512")
    gpu = DeviceReport("T4", "here/gpu", 2, 10, ("float32", "float16"), kernels="triton", vectors="cuda")
    with pytest.raises(ConfigurationError, match=r"stages are on CPUs and GPUs \(cpu,cuda\); serve with --dtype auto"):
        require_equal_bits(config(device="cpu,cuda", dtype="float32"), "float32", [cpu, gpu])
    require_equal_bits(config(device="cpu,cuda"), "float32", [cpu, gpu])
    with pytest.raises(ConfigurationError, match="install a C compiler"):
        require_equal_bits(config(device="cpu"), "float32", [cpu, gpu])


def test_an_unlabelled_stage_asks_for_no_label() -> None:
    assert StageResources("cpu", 1, 0).labels == {}
