"""The best pipeline over unlike devices: which of them, in which order, with how many layers each.

A stage is a run of layers, and its place matters only in that the first holds the embedding and the last computes
`lm_head`. So for a time T that no stage may exceed, each device has a number of layers that it can take, and devices
are chosen by that number; T is found by bisection among all times that a stage can have. A test holds the result
against all orders and cuts of small cases; for dozens of devices those would be too many.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product, takewhile

from gptj_dist.config import DTYPE_BYTES, LayerRange
from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.cost import kv_bytes_per_token, weight_bytes, working_bytes
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.planning.forecast import (
    CONTEXT_TOKENS,
    FREE_MEMORY_USED,
    PlannedStage,
    Workload,
    group_size,
    mixed_step,
    mixed_tokens_per_s,
)
from gptj_dist.planning.partition import layer_ranges
from gptj_dist.quantization import BITS_OF, Bits, Quantization

StageCosts = Sequence[float]
"""Cost of a stage with 1, 2, 3 ... layers, in any unit, increasing; ends with the most layers that fit the stage."""

NUM_REQUESTS = 32
"""The traffic that a partition is best for."""

MAX_MORE_DEVICES = 16
"""Devices that the advice for a model that does not fit adds at most."""


@dataclass(frozen=True, slots=True)
class _Options:
    """Devices of a kind: how many there are, and the seconds from step to step of a stage on one, by its place."""

    num_devices: int
    first: StageCosts
    middle: StageCosts
    last: StageCosts

    @property
    def costs(self) -> tuple[StageCosts, ...]:
        return self.first, self.middle, self.last


def best_pipeline(
    workload: Workload, devices: Sequence[DeviceSpec], num_stages: int | None = None
) -> tuple[PlannedStage, ...]:
    """The pipeline with the most output tokens a second under the assumed traffic.

    Every stage has room for its weights and for the KV cache of one request of full length. Of pipelines that are
    equally fast the one with the fewest devices is taken. A KV cache too small for all requests slows a pipeline, so
    room for 32, 16, 8 ... requests is tried. When fewer requests than stages fit, the slowest stage is still as fast
    as can be, though others may matter then.

    Args:
        num_stages: None leaves their number open.

    Raises:
        ConfigurationError: the model does not fit; says how much is needed, how much there is, and what would help.
    """
    best, best_rate = None, 0.0
    for pipeline in _candidates(workload, devices, num_stages):
        rate = mixed_tokens_per_s(workload, pipeline, NUM_REQUESTS)
        if rate > best_rate * (1 + 1e-9):
            best, best_rate = pipeline, rate
    if best is None:
        if num_stages is not None and _fits(workload, devices):
            raise ConfigurationError(f"{num_stages} stages do not fit these devices; another number does")
        raise ConfigurationError(_why_not(workload, devices))
    return best


def with_bits(workload: Workload, bits: Sequence[Bits | None], layers: Sequence[int] | None = None) -> Workload:
    """The same with weights of few bits.

    Args:
        bits: of each stage.
        layers: of each stage; None is one of all layers.

    Raises:
        ConfigurationError: as `ModelConfig.quantized`.
    """
    quantization = Quantization.of_stages(layers or [workload.model.num_layers], bits)
    return replace(workload, model=workload.model.quantized(quantization))


def raised_bits(workload: Workload, pipeline: Sequence[PlannedStage]) -> tuple[Bits, ...]:
    """The bits of the stages of a pipeline of 4: 8 where a request of full length still fits the stage."""
    raised = with_bits(workload, [8])
    return tuple(8 if stage.num_kv_tokens(raised) >= workload.max_model_len else 4 for stage in pipeline)


def share_layers(num_layers: int, stages: Sequence[StageCosts]) -> tuple[int, ...]:
    """The layers of each stage, one or more, that make the costliest stage cheapest.

    Each further layer goes to the stage that is cheapest with it. No exchange improves the result, because costs only
    grow. Between equals the last stage goes first, then the others from the first.

    Raises:
        ValueError: they do not fit.
    """
    layers = [1] * len(stages)
    last = len(stages) - 1
    if not len(stages) <= num_layers <= sum(map(len, stages)) or not all(stages):
        raise ValueError(f"{num_layers} layers do not fit {len(stages)} stages")
    for _ in range(num_layers - len(stages)):
        has_room = [i for i, costs in enumerate(stages) if layers[i] < len(costs)]
        layers[min(has_room, key=lambda i: (stages[i][layers[i]], i != last, i))] += 1
    return tuple(layers)


def gains_of_one_more(workload: Workload, devices: Sequence[DeviceSpec]) -> dict[str, float]:
    """For each kind of device, how many times as fast the best pipeline is if there is one more of it."""
    present = mixed_tokens_per_s(workload, best_pipeline(workload, devices), NUM_REQUESTS)
    return {
        device.name: mixed_tokens_per_s(workload, best_pipeline(workload, [*devices, device]), NUM_REQUESTS) / present
        for device in dict.fromkeys(devices)
    }


def _candidates(
    workload: Workload, devices: Sequence[DeviceSpec], only: int | None = None
) -> Iterator[tuple[PlannedStage, ...]]:
    """The pipeline with the fastest slowest stage, for each number of stages and of requests that there is room for."""
    num_requests = NUM_REQUESTS
    while num_requests:
        for num_stages in range(1, min(len(devices), workload.model.num_layers) + 1):
            if only not in (None, num_stages):
                continue
            pipeline = _fastest(workload, devices, num_stages, num_requests)
            if pipeline is not None:
                yield pipeline
        num_requests //= 2


def _fastest(
    workload: Workload, devices: Sequence[DeviceSpec], num_stages: int, num_requests: int
) -> tuple[PlannedStage, ...] | None:
    """None if it does not fit."""
    options = {
        device: _options(workload, device, count, num_stages, num_requests)
        for device, count in Counter(devices).items()
    }
    times = sorted({time for option in options.values() for costs in option.costs for time in costs})
    num_layers = workload.model.num_layers
    index = bisect_left(times, True, key=lambda time: _choose(options, num_stages, num_layers, time) is not None)
    chosen = _choose(options, num_stages, num_layers, times[index]) if index < len(times) else None
    if chosen is None:
        return None
    costs = [options[device].middle for device in chosen]
    costs[0], costs[-1] = options[chosen[0]].first, options[chosen[-1]].last
    ranges = layer_ranges(share_layers(num_layers, costs))
    return tuple(PlannedStage(device, layers) for device, layers in zip(chosen, ranges, strict=True))


def _options(workload: Workload, device: DeviceSpec, num_devices: int, num_stages: int, num_requests: int) -> _Options:
    """What a device would do at each place; a lone stage is both first and last."""
    step = mixed_step(workload, group_size(num_requests, num_stages))
    num_tokens = max(workload.max_model_len, num_requests * workload.context_tokens)

    def costs(place: int) -> StageCosts:
        stages = [
            PlannedStage(device, LayerRange(place, num_stages, 0, n + 1)) for n in range(workload.model.num_layers)
        ]
        fits = takewhile(lambda stage: stage.num_kv_tokens(workload) >= num_tokens, stages)
        return [stage.period_s(workload, step) for stage in fits]

    return _Options(num_devices, costs(0), costs(min(1, num_stages - 1)), costs(num_stages - 1))


def _choose(
    options: Mapping[DeviceSpec, _Options], num_stages: int, num_layers: int, time: float
) -> list[DeviceSpec] | None:
    """Devices, first to last, that can take all layers if no stage may exceed a time; None if there are none."""
    if num_stages == 1:
        return next(([device] for device, option in options.items() if _room(option.first, time) >= num_layers), None)
    room = {device: _room(option.middle, time) for device, option in options.items()}
    for first, last in product(options, repeat=2):
        left = Counter({device: option.num_devices for device, option in options.items()})
        left.subtract([first, last])
        ends = [_room(options[first].first, time), _room(options[last].last, time)]
        if min(left.values()) < 0 or min(ends) < 1:
            continue
        middle = sorted(left.elements(), key=lambda device: -room[device])[: num_stages - 2]
        rooms = [room[device] for device in middle]
        if len(middle) == num_stages - 2 and min(rooms, default=1) >= 1 and sum(ends) + sum(rooms) >= num_layers:
            return [first, *middle, last]
    return None


def _room(costs: StageCosts, time: float) -> int:
    """Layers that a stage can take in a time."""
    return bisect_right(costs, time)


def _why_not(workload: Workload, devices: Sequence[DeviceSpec]) -> str:
    """The message for a model that does not fit: memory needed, memory there is, and what would help."""
    needed, usable = _needed_bytes(workload, devices), _usable_bytes(workload, devices)
    amounts = (
        f"{needed / 1e9:.1f} GB are needed for {workload.dtype} weights and the KV cache of one request of "
        f"{workload.max_model_len} tokens, and there are {usable / 1e9:.1f} GB, not counting what stages need to work"
    )
    if usable >= needed:
        amounts += "; that would do, but not in the pieces that it is in, as a layer is not cut"
    remedies = [text for text, fits in _remedies(workload, devices) if fits]
    advice = " or ".join(remedies) or f"{MAX_MORE_DEVICES} more of the largest device would not be enough either"
    return f"the model does not fit: {amounts}. What would help: {advice}."


def _needed_bytes(workload: Workload, devices: Sequence[DeviceSpec]) -> float:
    whole = LayerRange.whole(workload.model.num_layers)
    kv_bytes = max(
        kv_bytes_per_token(workload.model, whole.num_layers, workload.dtype, kind) / FREE_MEMORY_USED[kind]
        for kind in {device.kind for device in devices}
    )
    return weight_bytes(workload.model, whole, workload.dtype) + workload.max_model_len * kv_bytes


def _usable_bytes(workload: Workload, devices: Sequence[DeviceSpec]) -> float:
    model, dtype = workload.model, workload.dtype
    return sum(max(0.0, device.memory_bytes - working_bytes(model, dtype, device.kind)) for device in devices)


def _remedies(workload: Workload, devices: Sequence[DeviceSpec]) -> Iterator[tuple[str, bool]]:
    """What a person could change, and whether the model fits then."""
    if workload.dtype == "float32":
        for dtype in (dtype for dtype in DTYPE_BYTES if dtype != "float32"):
            if all(dtype in device.fast_dtypes for device in devices):
                yield f"--dtype {dtype}", _fits(replace(workload, dtype=dtype), devices)
    if workload.model.quantization is None:
        for name, bits in sorted(BITS_OF.items(), reverse=True):
            with suppress(ConfigurationError):  # 4 bits do not suit every width
                yield f"--quantize {name}", _fits(with_bits(workload, [bits]), devices)
    if workload.max_model_len > CONTEXT_TOKENS:
        shorter = replace(workload, max_model_len=CONTEXT_TOKENS)
        yield f"--max-model-len {CONTEXT_TOKENS}", _fits(shorter, devices)
    largest = max(devices, key=lambda device: device.memory_bytes)
    for count in range(1, MAX_MORE_DEVICES + 1):
        if _fits(workload, [*devices, *[largest] * count]):
            yield f"{count} more {largest.name}", True
            return


def _fits(workload: Workload, devices: Sequence[DeviceSpec]) -> bool:
    return next(_candidates(workload, devices), None) is not None
