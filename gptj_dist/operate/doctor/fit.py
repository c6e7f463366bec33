"""Whether a plan fits the nodes: Ray's resources, memory, disk, and the model being where its stages will look for it.

Which node gets which stage is Ray's choice. This is an estimate of it: PACK fills one node after the other, the one
with the most room first, and looks at nothing but the resources that a bundle names, so memory is no reason to move on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptj_dist.config import BLOCK_SIZE_TOKENS, DeviceKind, DTypeName, LayerRange
from gptj_dist.errors import ConfigurationError
from gptj_dist.operate.doctor.cluster import Cluster, Finding, Node
from gptj_dist.operate.doctor.facts import DeviceFacts
from gptj_dist.planning.cost import kv_bytes_per_token, weight_bytes
from gptj_dist.serving.sizing import PipelineSize, size_stages
from gptj_dist.sizes import bytes_text
from gptj_dist.stages.blueprint import (
    Blueprint,
    StageReport,
    choose_dtype,
    count_kv_blocks,
)

STAGE_WORKING_BYTES: dict[DeviceKind, int] = {"cpu": 500_000_000, "cuda": 1_000_000_000}
"""A stage's process without its weights: torch, activations, CUDA's context. One more layer comes on top, as a layer is
there twice while it is packed. Measured on a CPU: 0.2 GB before the first request."""

LOCAL_RAY_BYTES = 1_000_000_000
"""What a Ray and a Serve that are started here take, ingress and coordinator included: measured 0.9 GB."""

RAY_LEAVES_FREE = 0.05
"""Ray kills processes when less than this part of a machine's memory is free."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a stage would be."""

    layers: LayerRange
    node: Node
    device: DeviceFacts


def find_in_plan(cluster: Cluster, blueprint: Blueprint) -> list[Finding]:
    """What there is to say of a plan on these nodes."""
    size = size_stages(blueprint.config, len(blueprint.layers), lambda name: cluster.resources.get(name, 0.0))
    nodes = _place(size, cluster.nodes)
    findings = [*_model(cluster.nodes, blueprint), *_resources(cluster, size, nodes)]
    if nodes is None:
        return [*findings, Finding("warning", "memory", "not checked: there is no place for the stages", "see above")]
    seats = _seat(size, nodes[1:], blueprint.layers)
    if seats is None:
        return [*findings, Finding("warning", "memory", "not checked: torch does not see the devices", "see above")]
    return [*findings, *_memory(cluster, blueprint, seats), *_disk(blueprint, seats)]


def _place(size: PipelineSize, nodes: Sequence[Node]) -> list[Node] | None:
    """The node of each bundle, or None if they do not all find one."""
    order = sorted(nodes, key=lambda n: (n.resources.get("GPU", 0) * (size.device == "cuda"), _cpus(n)), reverse=True)
    room = {node.name: dict(node.resources) for node in order}
    placed = []
    for bundle in size.bundles:
        node = next((n for n in order if all(room[n.name].get(r, 0) >= bundle[r] - 1e-9 for r in bundle)), None)
        if node is None:
            return None
        for resource, amount in bundle.items():
            room[node.name][resource] -= amount
        placed.append(node)
    return placed


def _cpus(node: Node) -> float:
    return node.resources.get("CPU", 0)


def _seat(size: PipelineSize, nodes: Sequence[Node], layers: Sequence[LayerRange]) -> list[Seat] | None:
    """The device of each stage on its node; None if torch sees too few there."""
    taken: dict[str, float] = defaultdict(float)
    seats = []
    for node, stage_layers in zip(nodes, layers, strict=True):
        devices = [node.facts.cpu] if size.device == "cpu" else node.facts.gpus
        # Ray numbers GPUs, fills one before the next and splits none that is asked for as a whole.
        index = int(taken[node.name] + 1e-9) if size.device == "cuda" else 0
        taken[node.name] += size.gpus_per_stage
        if index >= len(devices) or (device := devices[index]) is None:
            return None
        seats.append(Seat(stage_layers, node, device))
    return seats


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
        elif model is not None and model.config not in (None, blueprint.model):
            findings.append(
                Finding("failure", "model", f"{name} on {node.name} is another model", "copy the same files there")
            )
    return findings or [Finding("ok", "model", _model_text(blueprint))]


def _model_text(blueprint: Blueprint) -> str:
    model, stages = blueprint.model, len(blueprint.layers)
    return (
        f"{blueprint.config.model}: {model.num_layers} layers of width {model.d_model} in {stages} "
        f"{'stage' if stages == 1 else 'stages'}, context {blueprint.max_model_len}"
    )


def _resources(cluster: Cluster, size: PipelineSize, nodes: Sequence[Node] | None) -> Iterable[Finding]:
    wanted = _total(size)
    if nodes is None:
        yield Finding(
            "failure",
            "placement",
            f"the stages ask Ray for {_resources_text(wanted)}, each for {_resources_text(size.bundles[1])}; "
            f"the nodes have {_resources_text({name: cluster.resources.get(name, 0) for name in wanted})}",
            "try --cpus-per-stage"
            + (" and --gpus-per-stage" if "GPU" in wanted else "")
            + ", fewer --stages, or more nodes (an autoscaler adds them by itself)",
        )
        return
    if busy := [name for name in wanted if wanted[name] > cluster.free.get(name, 0) + 1e-9]:
        yield Finding(
            "warning",
            "placement",
            f"the stages ask Ray for {_resources_text(wanted)}; free are "
            f"{_resources_text({name: cluster.free.get(name, 0) for name in busy})}",
            "serving will wait until others give back what they have: `ray status` shows who",
        )
        return
    names = dict.fromkeys(node.name for node in nodes[1:])
    yield Finding(
        "ok", "placement", f"Ray has the {_resources_text(wanted)}; the stages go to {', '.join(names)} (estimate)"
    )


def _total(size: PipelineSize) -> dict[str, float]:
    names = {name: None for bundle in size.bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in size.bundles) for name in names}


def _resources_text(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())


def _memory(cluster: Cluster, blueprint: Blueprint, seats: Sequence[Seat]) -> Iterable[Finding]:
    """Weights and working memory by memory pool; then the KV cache in what is left, as serving sizes it."""
    dtype = choose_dtype(blueprint.config, blueprint.model, [seat.device.report for seat in seats])
    pools: dict[str, list[Seat]] = defaultdict(list)
    for seat in seats:
        pools[seat.device.report.memory_pool].append(seat)
    left = {pool: _left_bytes(cluster, blueprint, dtype, inside) for pool, inside in pools.items()}
    cure = _room_cure(dtype, seats[0].device.kind, len(cluster.nodes))
    findings = [_too_small(blueprint, dtype, pools[pool], -left[pool], cure) for pool in pools if left[pool] < 0]
    if findings:
        return findings
    reports = [_foresee(blueprint, dtype, seat, left[seat.device.report.memory_pool]) for seat in seats]
    return [_weights_fit(reports), _kv_cache(blueprint, reports)]


def _left_bytes(cluster: Cluster, blueprint: Blueprint, dtype: DTypeName, seats: Sequence[Seat]) -> int:
    """What is left of a memory pool when its stages are loaded; negative if they do not fit."""
    device = seats[0].device
    usable = device.free_bytes
    if device.kind == "cpu":
        usable -= int(RAY_LEAVES_FREE * device.total_bytes) + LOCAL_RAY_BYTES * (not cluster.is_running)
    return usable - sum(_stage_bytes(blueprint, dtype, seat) for seat in seats)


def _stage_bytes(blueprint: Blueprint, dtype: DTypeName, seat: Seat) -> int:
    """Most of what a stage needs before it has a KV cache."""
    one_layer = LayerRange(1, 3, seat.layers.start, seat.layers.start + 1)
    return (
        weight_bytes(blueprint.model, seat.layers, dtype)
        + weight_bytes(blueprint.model, one_layer, dtype)
        + STAGE_WORKING_BYTES[seat.device.kind]
    )


def _too_small(blueprint: Blueprint, dtype: DTypeName, seats: Sequence[Seat], lacking_bytes: int, cure: str) -> Finding:
    device = seats[0].device
    weights = sum(weight_bytes(blueprint.model, seat.layers, dtype) for seat in seats)
    working = sum(_stage_bytes(blueprint, dtype, seat) for seat in seats) - weights
    return Finding(
        "failure",
        "memory",
        f"{_pool_name(seats)}: {_stages_text(seats)} {bytes_text(weights)} of weights in {dtype} and "
        f"{bytes_text(working)} to work with; of {bytes_text(device.free_bytes)} free that is "
        f"{bytes_text(lacking_bytes)} too much",
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


def _pool_name(seats: Sequence[Seat]) -> str:
    device = seats[0].device
    names = " and ".join(dict.fromkeys(seat.node.name for seat in seats))
    return f"{names} (estimate)" if device.kind == "cpu" else f"{names}, {device.report.name} (estimate)"


def _stages_text(seats: Sequence[Seat]) -> str:
    return f"stage {seats[0].layers.stage} needs" if len(seats) == 1 else f"{len(seats)} stages need"


def _foresee(blueprint: Blueprint, dtype: DTypeName, seat: Seat, left_bytes: int) -> StageReport:
    """What the stage would report after loading."""
    kind = seat.device.kind
    return StageReport(
        layers=seat.layers,
        device=seat.device.report,
        kind=kind,
        dtype=dtype,
        weight_bytes=weight_bytes(blueprint.model, seat.layers, dtype),
        free_bytes=left_bytes,
        kv_bytes_per_token=kv_bytes_per_token(blueprint.model, seat.layers.num_layers, dtype, kind),
        pid=0,
    )


def _weights_fit(reports: Sequence[StageReport]) -> Finding:
    weights = sum(report.weight_bytes for report in reports)
    left = min(report.free_bytes for report in reports)
    return Finding(
        "ok",
        "memory",
        f"{bytes_text(weights)} of weights in {reports[0].dtype}, and what stages need to work, leave at least "
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
            "--max-model-len, so that clients are told",
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
        weights = sum(weight_bytes(model, seat.layers, model.dtype) for seat in inside)
        missing = max(0, weights - facts.model.cached_bytes)
        text = f"{name} still has to download {bytes_text(missing)} to {facts.hub_cache}"
        free = bytes_text(facts.hub_cache_free_bytes)
        if missing > facts.hub_cache_free_bytes:
            yield Finding(
                "failure", "disk", f"{text}, where {free} are free", "make room, or set HF_HOME to a larger disk"
            )
        else:
            yield Finding("ok", "disk", f"{text}; {free} are free" if missing else f"{name} has the weights already")
