"""Whether a plan fits the nodes: Ray's resources, memory, disk, and the model being where its stages will look for it.

Which node gets which stage is Ray's choice, and Ray has no function that tells it without placing them. This is an
estimate of it: PACK fills one node after the other, the one with the most room first, and looks at nothing but the
resources that a bundle names, so memory is no reason to move on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gptj_dist.config import BLOCK_SIZE_TOKENS, DeviceKind, DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.doctor.cluster import Cluster, Finding, Node
from gptj_dist.operate.doctor.facts import DeviceFacts
from gptj_dist.planning.cost import weight_bytes, working_bytes
from gptj_dist.quantization import weights_text
from gptj_dist.serving.sizing import PipelineSize, size_stages
from gptj_dist.sizes import bytes_text
from gptj_dist.stages.blueprint import Blueprint, StageReport, quantized_name
from gptj_dist.stages.room import count_kv_blocks, foresee_reports

LOCAL_RAY_BYTES = 1_000_000_000
"""What a Ray and a Serve that are started here take, ingress and coordinator included: measured 0.9 GB."""

RAY_LEAVES_FREE = 0.05
"""Ray kills processes when less than this part of a machine's memory is free."""

ROUNDING = 1e-9
"""Of sums of Ray's resources."""


@dataclass(frozen=True, slots=True)
class Place:
    """A stage's place.

    Args:
        gpu: number of its GPU on the node. Ray fills one before the next and splits none that is asked for as a whole.
    """

    node: Node
    gpu: int


@dataclass(frozen=True, slots=True)
class Seat:
    """A stage's device on its node."""

    layers: LayerRange
    node: Node
    device: DeviceFacts


def find_in_plan(cluster: Cluster, blueprint: Blueprint) -> list[Finding]:
    """What there is to say of a plan on these nodes."""
    size = size_stages(blueprint.config, len(blueprint.layers), lambda name: cluster.resources.get(name, 0.0))
    places = _place(size, cluster.nodes)
    findings = [*_model(cluster.nodes, blueprint), _resources(cluster, size, places)]
    if places is None:
        return [*findings, Finding("warning", "memory", "not checked: there is no place for the stages", "see above")]
    seats = list(_seats([stage.device for stage in size.stages], places, blueprint.layers))
    if len(seats) < len(places):
        return [*findings, Finding("warning", "memory", "not checked: torch does not see the devices", "see above")]
    return [*findings, *_memory(cluster, blueprint, seats), *_disk(blueprint, seats)]


def _place(size: PipelineSize, nodes: Sequence[Node]) -> list[Place] | None:
    """The place of each stage, or None if they do not all find one."""
    order = sorted(nodes, key=lambda n: (_has(n, "GPU") * ("GPU" in size.total), _has(n, "CPU")), reverse=True)
    room = {node.name: dict(node.resources) for node in order}
    places = []
    for bundle in size.bundles:
        fits = (n for n in order if all(room[n.name].get(name, 0) >= bundle[name] - ROUNDING for name in bundle))
        if (node := next(fits, None)) is None:
            return None
        left = room[node.name]
        places.append(Place(node, int(_has(node, "GPU") - left.get("GPU", 0) + ROUNDING)))
        for name, amount in bundle.items():
            left[name] -= amount
    return places[1:]


def _has(node: Node, resource: str) -> float:
    return node.resources.get(resource, 0)


def _seats(kinds: Sequence[DeviceKind], places: Sequence[Place], layers: Sequence[LayerRange]) -> Iterator[Seat]:
    """The seats of stages whose device torch sees."""
    for kind, place, stage_layers in zip(kinds, places, layers, strict=True):
        devices = [device for device in place.node.facts.devices if device.kind == kind]
        yield from (Seat(stage_layers, place.node, device) for device in devices[place.gpu : place.gpu + 1])


def _model(nodes: Iterable[Node], blueprint: Blueprint) -> Iterable[Finding]:
    """Each node reads its own copy of a directory."""
    name = blueprint.config.model
    findings = []
    for node in nodes:
        model = node.facts.model
        if model is not None and model.error is not None:
            findings.append(
                Finding(
                    "failure",
                    "model",
                    f"{node.name}: {model.error}",
                    f"put the files at {name} on every node, at an absolute path, or serve it by its hub name",
                )
            )
        elif model is not None and model.config is not None and not _is_same(model.config, blueprint.model):
            findings.append(
                Finding("failure", "model", f"{name} on {node.name} is another model", "copy the same files there")
            )
    return findings or [Finding("ok", "model", _model_text(blueprint))]


def _is_same(found: ModelConfig, planned: ModelConfig) -> bool:
    """Whether two models differ in nothing but in what is quantised while they load."""
    return replace(found, quantization=None) == replace(planned, quantization=None)


def _model_text(blueprint: Blueprint) -> str:
    model, stages = blueprint.model, len(blueprint.layers)
    return (
        f"{blueprint.config.model}: {model.num_layers} layers of width {model.d_model} in {stages} "
        f"{'stage' if stages == 1 else 'stages'}, context {blueprint.max_model_len}"
    )


def _resources(cluster: Cluster, size: PipelineSize, places: Sequence[Place] | None) -> Finding:
    wanted = size.total
    asked = f"the stages ask Ray for {_resources_text(wanted)}"
    if places is None:
        return Finding(
            "failure",
            "placement",
            f"{asked}, each for {_resources_text(size.bundles[1])}; "
            f"the nodes have {_resources_text({name: cluster.resources.get(name, 0) for name in wanted})}",
            "try --cpus-per-stage"
            + (" and --gpus-per-stage" if "GPU" in wanted else "")
            + ", fewer --stages, or more nodes (an autoscaler adds them by itself)",
        )
    free = {name: cluster.free.get(name, 0) for name in wanted}
    if busy := [name for name in wanted if wanted[name] > free[name] + ROUNDING]:
        return Finding(
            "warning",
            "placement",
            f"{asked}; free are {_resources_text({name: free[name] for name in busy})}",
            "serving will wait until others give back what they have: `gptj-dist nodes` shows which stages are where",
        )
    names = ", ".join(dict.fromkeys(place.node.name for place in places))
    return Finding("ok", "placement", f"Ray has the {_resources_text(wanted)}; the stages go to {names} (estimate)")


def _resources_text(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())


def _memory(cluster: Cluster, blueprint: Blueprint, seats: Sequence[Seat]) -> list[Finding]:
    """Weights and working memory by memory pool; then the KV cache in what is left, as serving sizes it."""
    pools: dict[str, list[Seat]] = defaultdict(list)
    for seat in seats:
        pools[seat.device.report.memory_pool].append(seat)
    usable = {pool: _usable_bytes(cluster, inside[0].device) for pool, inside in pools.items()}
    kind = seats[0].device.kind
    kinds = [seat.device.kind for seat in seats]
    reports = foresee_reports(blueprint, kinds, [seat.device.report for seat in seats], usable)
    dtype, left = reports[0].dtype, {report.device.memory_pool: report.free_bytes for report in reports}
    cure = _room_cure(dtype, kind, len(cluster.nodes))
    findings = [_too_small(blueprint, dtype, pools[pool], -left[pool], cure) for pool in pools if left[pool] < 0]
    return findings or [_weights_fit(reports), _kv_cache(blueprint, reports)]


def _usable_bytes(cluster: Cluster, device: DeviceFacts) -> int:
    """What stages may take of a device's memory."""
    if device.kind == "cuda":
        return device.free_bytes
    kept = int(RAY_LEAVES_FREE * device.report.total_bytes) + LOCAL_RAY_BYTES * (not cluster.is_running)
    return device.free_bytes - kept


def _too_small(blueprint: Blueprint, dtype: DTypeName, seats: Sequence[Seat], lacking_bytes: int, cure: str) -> Finding:
    device = seats[0].device
    weights = sum(weight_bytes(blueprint.model, seat.layers, dtype) for seat in seats)
    working = len(seats) * working_bytes(blueprint.model, dtype, device.kind)
    names = " and ".join(dict.fromkeys(seat.node.name for seat in seats))
    text = weights_text(quantized_name(blueprint.model, seats[0].layers), dtype)
    needs = f"stage {seats[0].layers.stage} needs" if len(seats) == 1 else f"{len(seats)} stages need"
    return Finding(
        "failure",
        "memory",
        f"{names if device.kind == 'cpu' else f'{names}, {device.report.name}'} (estimate): {needs} "
        f"{bytes_text(weights)} of weights in {text} and {bytes_text(working)} to work with; of "
        f"{bytes_text(device.free_bytes)} free that is {bytes_text(lacking_bytes)} too much",
        cure,
    )


def _room_cure(dtype: DTypeName, kind: DeviceKind, num_nodes: int) -> str:
    if kind == "cuda":
        cure = "more --stages, with a whole GPU each (--gpus-per-stage 1)"
    elif num_nodes > 1:
        cure = "more --stages, with so large a --cpus-per-stage that Ray spreads them over the nodes"
    else:
        cure = "end other programs, or spread more --stages over a cluster (--address)"
    return f"--dtype bfloat16 halves the weights; or {cure}" if dtype == "float32" else cure


def _weights_fit(reports: Sequence[StageReport]) -> Finding:
    weights = sum(report.weight_bytes for report in reports)
    left = min(report.free_bytes for report in reports)
    text = weights_text(reports[0].quantized, reports[0].dtype)
    return Finding(
        "ok",
        "memory",
        f"{bytes_text(weights)} of weights in {text}, and what stages need to work, leave at least "
        f"{bytes_text(left)} (estimate)",
    )


def _kv_cache(blueprint: Blueprint, reports: Sequence[StageReport]) -> Finding:
    try:
        num_tokens = count_kv_blocks(blueprint, reports) * BLOCK_SIZE_TOKENS
    except ConfigurationError as error:
        return Finding("failure", "KV cache", str(error), "a smaller --kv-cache-gb, or more --stages over more devices")
    text = f"room for {num_tokens:,} tokens"
    if num_tokens < blueprint.max_model_len:
        return Finding(
            "warning",
            "KV cache",
            f"{text}, less than one request of the full context of {blueprint.max_model_len:,}",
            "a larger --kv-cache-gb if that was given, else more --stages over more devices; or a smaller "
            "--max-model-len, so that longer requests are refused at once",
        )
    num_requests = num_tokens // blueprint.max_model_len
    requests = "request" if num_requests == 1 else "requests"
    return Finding("ok", "KV cache", f"{text}: {num_requests} {requests} of the full context at once")


def _disk(blueprint: Blueprint, seats: Sequence[Seat]) -> Iterable[Finding]:
    """Room for the weights of a hub model that are not downloaded yet."""
    on_node: dict[str, list[Seat]] = defaultdict(list)
    for seat in seats:
        on_node[seat.node.name].append(seat)
    for name, inside in on_node.items():
        facts, model = inside[0].node.facts, blueprint.model
        if facts.model is None or facts.model.config is not None or facts.model.error is not None:
            continue
        stored = model if model.quantization and model.quantization.is_stored else replace(model, quantization=None)
        weights = sum(weight_bytes(stored, seat.layers, model.dtype) for seat in inside)
        missing = max(0, weights - facts.model.cached_bytes)
        text = f"{name} still has to download {bytes_text(missing)} to {facts.hub_cache}"
        free = bytes_text(facts.hub_cache_free_bytes)
        if missing > facts.hub_cache_free_bytes:
            yield Finding(
                "failure", "disk", f"{text}, where {free} are free", "make room, or set HF_HOME to a larger disk"
            )
        else:
            yield Finding("ok", "disk", f"{text}; {free} are free" if missing else f"{name} has the weights already")
