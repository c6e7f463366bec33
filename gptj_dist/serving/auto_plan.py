"""`plan: auto`: measures the devices of the connected cluster, and decides cut and nodes for one pipeline.

CPUs are measured, by a task on each node, all at the same time. GPUs have the figures of `planning.devices`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import DeviceKind, DTypeName, ModelConfig, PipelineConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.placement import NODE_ID_LABEL
from gptj_dist.planning.cost import Work
from gptj_dist.planning.devices import DEFAULT_LINK_GB_S, DEFAULT_LINK_LATENCY_US, gpus_of_node, known_device
from gptj_dist.planning.fit import fit_device
from gptj_dist.planning.forecast import Workload
from gptj_dist.planning.links import Link, by_pair
from gptj_dist.planning.placed import LinkBetween, NodeDevice, PlacedPipeline, place_pipeline
from gptj_dist.planning.search import NUM_REQUESTS
from gptj_dist.stages.blueprint import DeviceReport, choose_dtype, quantized_model

SURVEY_TIMEOUT_S = 300.0
LOCAL_LINK = (95e-6, 2e9)
"""Latency and rate of a hop within a machine, as `benchmarks.transport` measured them."""


@dataclass(frozen=True, slots=True)
class AutoPlan:
    """A plan, and the settings that carry it out.

    Args:
        survey_s: seconds that the measurement took.
    """

    config: PipelineConfig
    workload: Workload
    pipeline: PlacedPipeline
    survey_s: float

    @property
    def lines(self) -> list[str]:
        """For people: a line a stage, and one for each device that is left out."""
        found = self.pipeline
        speed = f"{found.tokens_per_s:,.0f} tokens/s predicted for {NUM_REQUESTS} requests"
        lines = [f"Planned in {self.survey_s:.0f} s: {speed}."]
        for stage, device in zip(found.stages, found.devices, strict=True):
            layers = stage.layers.num_layers
            lines.append(f"stage {stage.layers.stage}: {layers} layer{'s' * (layers > 1)} on {device.name}")
        for left in found.left_out:
            lines.append(f"left out: {left.device.name}, {_why(found.tokens_per_s, left.tokens_per_s)}")
        return lines


def plan_on_cluster(config: PipelineConfig, links: Sequence[Link] = ()) -> AutoPlan:
    """Measures the devices of the connected cluster and plans one pipeline over them.

    Args:
        config: its `stages` fixes their number; `device` may leave out a kind of device.
        links: those that were measured; others have the planner's defaults.

    Raises:
        ConfigurationError: a GPU has no known figures, a node cannot be measured, or the model does not fit.
    """
    begin_s = time.monotonic()
    model = read_model_config(resolve_model(config.model, config.revision))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    allowed = set(config.devices)
    cpus = [node for node in nodes if node["Resources"].get("CPU")] if allowed & {"auto", "cpu"} else []
    facts = _ask(cpus, "describe_cpu", ())
    gpus = [(node, spec) for node in nodes for spec in gpus_of_node(node["Resources"])] if allowed != {"cpu"} else []
    reports = [fact.report for fact in facts] + [
        DeviceReport(spec.name, f"{node['NodeID']}/{i}", 1, int(spec.memory_bytes), spec.fast_dtypes)
        for i, (node, spec) in enumerate(gpus)
    ]
    if not reports:
        raise ConfigurationError(f"the cluster has no device of kind {config.device}")
    dtype = choose_dtype(config, model, reports)
    wanted = model if config.quantize is None else quantized_model(model, config, [model.num_layers])
    devices = [
        NodeDevice(node["NodeID"], f"{spec.name} {i} of {_name(node, nodes)}", spec)
        for i, (node, spec) in enumerate(gpus)
    ] + _measured(wanted, dtype, cpus, facts, nodes)
    workload = Workload(wanted, dtype, config.max_model_len or model.context_length, config.wire_dtype)
    found = place_pipeline(workload, devices, _link_between(nodes, links), config.stages)
    return AutoPlan(_settings(config, dtype, found), workload, found, time.monotonic() - begin_s)


def _measured(
    model: ModelConfig, dtype: DTypeName, cpus: Sequence[Any], facts: Sequence[Any], nodes: Sequence[Any]
) -> list[NodeDevice]:
    """The CPUs, each as fast as it is beside the others."""
    on_machine = Counter(fact.report.memory_pool for fact in facts)
    threads = [max(1, fact.report.num_cores // on_machine[fact.report.memory_pool]) for fact in facts]
    timed: list[list[tuple[Work, float]]] = _ask(cpus, "time_steps", [(model, dtype, number) for number in threads])
    found = []
    for node, fact, steps in zip(cpus, facts, timed, strict=True):
        memory_bytes = fact.free_bytes / on_machine[fact.report.memory_pool]
        base = replace(known_device("cpu"), memory_bytes=memory_bytes, fast_dtypes=fact.report.fast_dtypes)
        fitted = fit_device(base, steps)
        # All steps had equally many layers, so the fit cannot tell the cost of a step from that of its layers.
        layer_s = fitted.layer_overhead_s + fitted.step_overhead_s / steps[0][0].num_layers
        spec = replace(fitted, step_overhead_s=0.0, layer_overhead_s=layer_s)
        found.append(NodeDevice(node["NodeID"], f"cpu of {_name(node, nodes)}", spec))
    return found


def _ask(nodes: Sequence[Any], function: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Calls a function of `stages.survey` on each node, in a process of its own.

    Raises:
        ConfigurationError: a node does not answer.
    """

    def call(name: str, *given: Any) -> Any:
        from gptj_dist.stages import survey  # loads torch, which the caller's process may do without

        return vars(survey)[name](*given)

    calls = []
    for index, node in enumerate(nodes):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(max_calls=1)(call).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        calls.append(task.remote(function, *(arguments[index] if arguments else ())))
    try:
        return list(ray.get(calls, timeout=SURVEY_TIMEOUT_S))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigurationError(f"--plan auto: a node could not be measured: {reason}") from error


def _link_between(nodes: Sequence[Any], links: Sequence[Link]) -> LinkBetween:
    """Links between nodes: measured ones, short ones within a machine, and else the planner's defaults."""
    measured = by_pair(links)
    machine_of = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}

    def link(from_node: str, to_node: str) -> tuple[float, float]:
        if (known := measured.get((from_node, to_node))) is not None:
            return known.latency_s, known.bytes_per_s
        if machine_of[from_node] == machine_of[to_node]:
            return LOCAL_LINK
        return DEFAULT_LINK_LATENCY_US * 1e-6, DEFAULT_LINK_GB_S * 1e9

    return link


def _settings(config: PipelineConfig, dtype: DTypeName, found: PlacedPipeline) -> PipelineConfig:
    kinds: list[DeviceKind] = [device.spec.kind for device in found.devices]
    return replace(
        config,
        plan="none",
        stages=None,
        layers=tuple(stage.layers.num_layers for stage in found.stages),
        device=",".join(kinds),
        stage_nodes=tuple(f"{NODE_ID_LABEL}={device.node_id}" for device in found.devices),
        dtype=dtype,
    )


def _name(node: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """What people call a node: its address, and its labels where several nodes share one."""
    address = cast(str, node["NodeManagerAddress"])
    if sum(other["NodeManagerAddress"] == address for other in nodes) == 1:
        return address
    labels = [f"{key}={value}" for key, value in node["Labels"].items() if not key.startswith("ray.io/")]
    return f"{address} ({', '.join(labels) or node['NodeID'][:8]})"


def _why(rate: float, with_it: float | None) -> str:
    if with_it is None:
        return "it has no room for a layer and the KV cache"
    if with_it < 0.99 * rate:
        return f"it would slow the pipeline from {rate:,.0f} to {with_it:,.0f} tokens/s"
    return "it would not make the pipeline faster"
