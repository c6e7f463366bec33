"""Which device of which node holds which stage: the best pipeline over measured devices, neighbours close together.

`planning.search` knows devices by their figures alone. Here each has a node, and each pair of nodes a link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from gptj_dist.config import LayerRange
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.planning.forecast import PlannedStage, Workload, mixed_step, mixed_tokens_per_s, num_kv_tokens
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.planning.search import NUM_REQUESTS, best_pipeline

ALIKE = 0.05
"""Devices whose speed and memory differ less count as equal, which keeps the search short in clusters of many."""

KV_GAIN_WORTH = 0.5
"""How much speed a cut may lose for more KV cache: this part of what the cache gains, and `MAX_LOSS` at most."""

MAX_LOSS = 0.01

LinkBetween = Callable[[str, str], tuple[float, float]]
"""Latency in seconds, and bytes a second, from one node to another."""


@dataclass(frozen=True, slots=True)
class NodeDevice:
    """A device in a cluster.

    Args:
        node_id: Ray's name of its node.
        name: for people, such as `cpu of 10.0.0.2`.
    """

    node_id: str
    name: str
    spec: DeviceSpec


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A device that the plan does not use.

    Args:
        tokens_per_s: of the best pipeline that uses it beside the others; None if there is none.
    """

    device: NodeDevice
    tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class PlacedPipeline:
    """A plan.

    Args:
        stages: with the links from each to the next in the figures of its device.
        devices: of each stage.
        tokens_per_s: predicted under the assumed traffic.
    """

    stages: tuple[PlannedStage, ...]
    devices: tuple[NodeDevice, ...]
    tokens_per_s: float
    left_out: tuple[LeftOut, ...]


def place_pipeline(
    workload: Workload, devices: Sequence[NodeDevice], link: LinkBetween, num_stages: int | None = None
) -> PlacedPipeline:
    """The fastest pipeline under the assumed traffic that has room for a request of full length.

    Args:
        num_stages: None leaves their number open.

    Raises:
        ConfigurationError: the model does not fit, or not in this number of stages.
    """
    known = _alike(workload, _with_best_links(devices, link))
    stages, chosen = _placed(workload, known, link, num_stages)
    rate = mixed_tokens_per_s(workload, stages, NUM_REQUESTS)
    is_smaller = num_stages is None
    while is_smaller and len(chosen) > 1:  # a device that looks fast may be far away from all others
        is_smaller = False
        for device in chosen:
            rest = [other for other in known if other != device]
            with suppress(ConfigurationError):
                fewer, others = _placed(workload, rest, link, None)
                if (faster := mixed_tokens_per_s(workload, fewer, NUM_REQUESTS)) > rate * (1 + 1e-9):
                    stages, chosen, rate, known, is_smaller = fewer, others, faster, rest, True
                    break
    names = {device.name: device for device in devices}
    left_out = tuple(
        LeftOut(device, _rate_with(workload, [*chosen, device], link))
        for device in _with_best_links(devices, link)
        if device.name not in {other.name for other in chosen}
    )
    return PlacedPipeline(stages, tuple(names[device.name] for device in chosen), rate, left_out)


def with_more_kv(workload: Workload, pipeline: Sequence[PlannedStage]) -> tuple[PlannedStage, ...]:
    """Moves layers from the stage with the least KV cache to others, as long as that costs hardly any speed.

    Every stage has the KV cache of the smallest one, so the memory of larger stages would be wasted.
    """
    best = tuple(pipeline)
    while (better := max(_shifted(best), key=lambda cut: _worth(workload, best, cut), default=None)) is not None:
        if _worth(workload, best, better) <= 0:
            break
        if mixed_tokens_per_s(workload, better, NUM_REQUESTS) < (1 - MAX_LOSS) * mixed_tokens_per_s(
            workload, pipeline, NUM_REQUESTS
        ):
            break
        best = better
    return best


def _worth(workload: Workload, now: Sequence[PlannedStage], then: Sequence[PlannedStage]) -> float:
    """What a change of the cut gains in KV cache, less what it loses in speed; 0 and less is not worth it."""
    kv_now, kv_then = num_kv_tokens(workload, now), num_kv_tokens(workload, then)
    useful = workload.max_model_len * NUM_REQUESTS
    gain = min(kv_then, useful) / max(min(kv_now, useful), 1) - 1
    loss = 1 - mixed_tokens_per_s(workload, then, NUM_REQUESTS) / mixed_tokens_per_s(workload, now, NUM_REQUESTS)
    return KV_GAIN_WORTH * gain - loss if gain > 0 else 0.0


def _shifted(pipeline: Sequence[PlannedStage]) -> Iterator[tuple[PlannedStage, ...]]:
    """The pipelines in which one stage has a layer less, and another one more."""
    layers = [stage.layers.num_layers for stage in pipeline]
    for giver in range(len(layers)):
        for taker in range(len(layers)):
            if giver != taker and layers[giver] > 1:
                cut = tuple(n - (i == giver) + (i == taker) for i, n in enumerate(layers))
                yield tuple(replace(stage, layers=r) for stage, r in zip(pipeline, layer_ranges(cut), strict=True))


def _placed(
    workload: Workload, devices: Sequence[NodeDevice], link: LinkBetween, num_stages: int | None
) -> tuple[tuple[PlannedStage, ...], list[NodeDevice]]:
    pipeline = best_pipeline(workload, [device.spec for device in devices], num_stages)
    pipeline = with_more_kv(workload, pipeline)
    free = list(devices)
    chosen = []
    for stage in pipeline:
        chosen.append(next(device for device in free if device.spec == stage.device))
        free.remove(chosen[-1])
    return _closer(workload, pipeline, chosen, free, link)


def _closer(
    workload: Workload,
    pipeline: Sequence[PlannedStage],
    chosen: list[NodeDevice],
    free: list[NodeDevice],
    link: LinkBetween,
) -> tuple[tuple[PlannedStage, ...], list[NodeDevice]]:
    """Exchanges equal devices, and middle stages with each other, while that makes the way round the ring shorter."""
    best = _linked(pipeline, chosen, link)
    has_improved = True
    while has_improved:
        has_improved = False
        for stages, devices in _exchanges(pipeline, chosen, free):
            linked = _linked(stages, devices, link)
            if _ring_s(workload, linked) < _ring_s(workload, best) * (1 - 1e-9):
                free = [device for device in [*free, *chosen] if device not in devices]
                best, pipeline, chosen, has_improved = linked, stages, devices, True
                break
    return best, chosen


def _exchanges(
    pipeline: Sequence[PlannedStage], chosen: list[NodeDevice], free: Sequence[NodeDevice]
) -> Iterator[tuple[Sequence[PlannedStage], list[NodeDevice]]]:
    for index, device in enumerate(chosen):
        for other in free:
            if other.spec == device.spec:
                yield pipeline, [*chosen[:index], other, *chosen[index + 1 :]]
    for a, b in combinations(range(len(chosen)), 2):
        devices = list(chosen)
        devices[a], devices[b] = devices[b], devices[a]
        if chosen[a].spec == chosen[b].spec:
            yield pipeline, devices
        elif a > 0 and b < len(chosen) - 1:  # the first and the last stage have more than layers
            layers = [stage.layers.num_layers for stage in pipeline]
            layers[a], layers[b] = layers[b], layers[a]
            ranges = layer_ranges(tuple(layers))
            yield [PlannedStage(d.spec, r) for d, r in zip(devices, ranges, strict=True)], devices


def _linked(
    pipeline: Sequence[PlannedStage], devices: Sequence[NodeDevice], link: LinkBetween
) -> tuple[PlannedStage, ...]:
    """The stages with the links between their nodes. The last stage's leads to the coordinator, beside the first."""
    ways = [link(a.node_id, b.node_id) for a, b in pairwise([*devices, devices[0]])]
    return tuple(
        PlannedStage(replace(stage.device, link_latency_s=latency_s, link_bytes_s=bytes_s), stage.layers)
        for stage, (latency_s, bytes_s) in zip(pipeline, ways, strict=True)
    )


def _ring_s(workload: Workload, pipeline: Sequence[PlannedStage]) -> float:
    """Seconds of one step of a request alone, the ways between stages included."""
    return sum(stage.period_s(workload, mixed_step(workload, 1)) for stage in pipeline)


def _with_best_links(devices: Sequence[NodeDevice], link: LinkBetween) -> list[NodeDevice]:
    """The devices with the best link from each to another node, which the search for the number of stages takes."""
    found = []
    for device in devices:
        ways = [link(device.node_id, other.node_id) for other in devices if other is not device]
        latency_s, bytes_s = min(ways, default=(device.spec.link_latency_s, device.spec.link_bytes_s))
        found.append(replace(device, spec=replace(device.spec, link_latency_s=latency_s, link_bytes_s=bytes_s)))
    return found


def _alike(workload: Workload, devices: Sequence[NodeDevice]) -> list[NodeDevice]:
    """The devices, of which those that hardly differ have the figures of the slowest and the memory of the smallest."""
    middle = LayerRange(1, 3, 0, 1)
    step = mixed_step(workload, NUM_REQUESTS // 2)

    def seconds(device: NodeDevice) -> float:
        return PlannedStage(device.spec, middle).period_s(workload, step)

    groups: list[list[NodeDevice]] = []
    for device in sorted(devices, key=seconds):
        for group in groups:
            smallest, largest = sorted((group[0].spec.memory_bytes, device.spec.memory_bytes))
            is_alike = smallest > (1 - ALIKE) * largest and seconds(device) < (1 + ALIKE) * seconds(group[0])
            if is_alike and group[0].spec.kind == device.spec.kind:
                group.append(device)
                break
        else:
            groups.append([device])
    return [
        replace(device, spec=replace(group[-1].spec, memory_bytes=min(d.spec.memory_bytes for d in group)))
        for group in groups
        for device in group
    ]


def _rate_with(workload: Workload, devices: Sequence[NodeDevice], link: LinkBetween) -> float | None:
    """Tokens a second of the best pipeline that uses all these devices."""
    try:
        stages, _ = _placed(workload, devices, link, len(devices))
    except ConfigurationError:
        return None
    return mixed_tokens_per_s(workload, stages, NUM_REQUESTS)
