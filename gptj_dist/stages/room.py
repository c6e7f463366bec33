"""Whether the stages of a blueprint fit the memory of their devices, and how much KV cache does. Reads no device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from gptj_dist.config import BLOCK_SIZE_TOKENS, DeviceKind, DTypeName, LayerRange, ModelConfig
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.cost import kv_bytes_per_token, weight_bytes, working_bytes
from gptj_dist.planning.forecast import FREE_MEMORY_USED
from gptj_dist.quantization import weights_text
from gptj_dist.sizes import bytes_text, ceil_div
from gptj_dist.stages.blueprint import (
    Blueprint,
    DeviceReport,
    LoadedPipeline,
    StageReport,
    choose_dtype,
    quantized_name,
)


def require_memory(blueprint: Blueprint, dtype: DTypeName, devices: Sequence[DeviceReport]) -> None:
    """Refuses weights that are larger than a device's total memory, before a stage runs out of memory.

    Only weights count: what else a stage needs is an estimate.

    Args:
        devices: of each stage, first to last.

    Raises:
        ConfigurationError: a memory is too small; the message names it and the bytes that its stages need.
    """
    needed: Counter[str] = Counter()
    for layers, device in zip(blueprint.layers, devices, strict=True):
        needed[device.memory_pool] += weight_bytes(blueprint.model, layers, dtype)
    weights = weights_text(quantized_name(blueprint.model, LayerRange.whole(blueprint.model.num_layers)), dtype)
    for device in devices:
        if needed[device.memory_pool] > device.total_bytes:
            raise ConfigurationError(
                f"the stages on {device.memory_pool} need {bytes_text(needed[device.memory_pool])} for their weights "
                f"in {weights}, but it has {bytes_text(device.total_bytes)} in all; more stages on other devices, or a "
                "--dtype of 16 bits, would help"
            )


def foresee_reports(
    blueprint: Blueprint, kinds: Sequence[DeviceKind], devices: Sequence[DeviceReport], free_bytes: Mapping[str, int]
) -> tuple[StageReport, ...]:
    """The reports that stages would give after loading.

    Args:
        kinds, devices: of each stage, first to last.
        free_bytes: of each memory pool, before loading. In the reports it is negative where stages do not fit.
    """
    model, dtype = blueprint.model, choose_dtype(blueprint.config, blueprint.model, devices)
    left = dict(free_bytes)
    for layers, kind, device in zip(blueprint.layers, kinds, devices, strict=True):
        left[device.memory_pool] -= weight_bytes(model, layers, dtype) + working_bytes(model, dtype, kind)
    return tuple(
        StageReport(
            layers=layers,
            device=device,
            kind=kind,
            dtype=dtype,
            weight_bytes=weight_bytes(model, layers, dtype),
            free_bytes=left[device.memory_pool],
            kv_bytes_per_token=kv_bytes_per_token(model, layers.num_layers, dtype, kind),
            pid=0,
            quantized=quantized_name(model, layers),
        )
        for layers, kind, device in zip(blueprint.layers, kinds, devices, strict=True)
    )


def count_kv_blocks(blueprint: Blueprint, reports: Sequence[StageReport]) -> int:
    """Number of KV blocks of every stage. It is the same for all, because each token needs room on every stage.

    Raises:
        ConfigurationError: not even one block fits, or `kv_cache_gb` exceeds the free memory.
    """
    blocks_per_request = ceil_div(blueprint.max_model_len, BLOCK_SIZE_TOKENS)
    most_useful = blueprint.config.max_batch_size * blocks_per_request * BLOCK_SIZE_TOKENS
    free_tokens = min(_free_tokens_by_pool(reports, blueprint.config.kv_cache_gb is None))
    if blueprint.config.kv_cache_gb is None:
        num_tokens = min(free_tokens, most_useful)
    else:
        num_tokens = int(blueprint.config.kv_cache_gb * 1e9) // sum(report.kv_bytes_per_token for report in reports)
        if num_tokens > free_tokens:
            raise ConfigurationError(
                f"kv_cache_gb {blueprint.config.kv_cache_gb} is room for {num_tokens} tokens, but the memory left is "
                f"enough for {free_tokens}"
            )
    if num_tokens < BLOCK_SIZE_TOKENS:
        raise ConfigurationError(
            f"the KV cache has room for {num_tokens} tokens, at least {BLOCK_SIZE_TOKENS} are needed"
        )
    return num_tokens // BLOCK_SIZE_TOKENS


def require_room(loaded: LoadedPipeline, layers: Sequence[LayerRange]) -> None:
    """Refuses a cut of a running pipeline in which the KV cache of a stage has less room than now.

    All stages have the same blocks, and requests hold them.

    Raises:
        ConfigurationError: a memory is too small, a cache has no blocks, or a layer would move between unlike devices.
    """
    if not all(report.has_blocks for report in loaded.reports):
        raise ConfigurationError("layers cannot move: a stage's machine has no C compiler, which KV in blocks needs")
    for (one, other), after in zip(pairwise(loaded.reports), layers[:-1], strict=True):
        if one.kind != other.kind and one.layers.stop != after.stop:
            raise ConfigurationError(
                f"layers cannot move between stage {one.layers.stage} on a {one.kind} and stage {other.layers.stage} "
                f"on a {other.kind} device, which keep KV in unlike forms"
            )
    reports = recut_reports(loaded.blueprint.model, loaded.reports, layers)
    num_tokens = min(_free_tokens_by_pool(reports, has_margin=False))
    if num_tokens < loaded.num_kv_tokens:
        cut = ",".join(str(each.num_layers) for each in layers)
        raise ConfigurationError(
            f"the cut {cut} has room for {num_tokens} KV tokens on every stage, and the pipeline has "
            f"{loaded.num_kv_tokens}: choose one that gives less to the stage with the least memory, or serve with a "
            "smaller --kv-cache-gb"
        )


def recut_reports(
    model: ModelConfig, reports: Sequence[StageReport], layers: Sequence[LayerRange]
) -> tuple[StageReport, ...]:
    """The reports of stages after layers have moved: each stage's weights have come out of its free memory."""
    bytes_of = [weight_bytes(model, each, report.dtype) for each, report in zip(layers, reports, strict=True)]
    growth: Counter[str] = Counter()
    for report, num_bytes in zip(reports, bytes_of, strict=True):
        growth[report.device.memory_pool] += num_bytes - report.weight_bytes
    return tuple(
        replace(
            report,
            layers=each,
            weight_bytes=num_bytes,
            free_bytes=report.free_bytes - growth[report.device.memory_pool],
            kv_bytes_per_token=report.kv_bytes_per_token // report.layers.num_layers * each.num_layers,
            quantized=quantized_name(model, each),
        )
        for report, each, num_bytes in zip(reports, layers, bytes_of, strict=True)
    )


def _free_tokens_by_pool(reports: Sequence[StageReport], has_margin: bool) -> list[int]:
    """Tokens that fit in each memory pool. Stages that share a pool divide it."""
    pools: dict[str, list[StageReport]] = defaultdict(list)
    for report in reports:
        pools[report.device.memory_pool].append(report)
    return [
        int(max(0, min(r.free_bytes for r in pool)) * (FREE_MEMORY_USED[pool[0].kind] if has_margin else 1))
        // sum(r.kv_bytes_per_token for r in pool)
        for pool in pools.values()
    ]
