"""Predicts a pipeline on its devices: memory, time of a step, tokens a second, time to the first token.

All of it follows from `planning.cost`'s formula, for a pipeline that the scheduler keeps full: one micro-batch for each
stage, requests split evenly over them. Overheads of HTTP and of the coordinator are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_dist.chunking import MAX_CHUNK_TOKENS, MIN_CHUNK_TOKENS, StepCost, best_chunk_tokens
from gptj_dist.config import DeviceKind, DTypeName, LayerRange, ModelConfig, WireChoice, WireDType
from gptj_dist.planning.cost import (
    Chunks,
    Step,
    hop_s,
    kv_bytes_per_token,
    step_s,
    step_work,
    weight_bytes,
    working_bytes,
)
from gptj_dist.planning.devices import DeviceSpec
from gptj_dist.planning.partition import PROMPT_TOKENS_PER_OUTPUT_TOKEN

FREE_MEMORY_USED: dict[DeviceKind, float] = {"cpu": 0.5, "cuda": 0.9}
"""What the KV cache takes of the memory that is free once weights are loaded. A machine's memory has other users."""

CONTEXT_TOKENS = 512
"""Tokens that a request is assumed to have when its next one is computed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is served: a model in a type, with requests of at most `max_model_len` tokens."""

    model: ModelConfig
    dtype: DTypeName
    max_model_len: int
    wire: WireChoice = "same"

    @property
    def wire_dtype(self) -> WireDType:
        """The type of hidden states between stages."""
        return self.dtype if self.wire == "same" else self.wire

    @property
    def context_tokens(self) -> int:
        """Tokens that a request is assumed to have."""
        return min(CONTEXT_TOKENS, self.max_model_len)


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A stage on a device."""

    device: DeviceSpec
    layers: LayerRange

    def step_s(self, workload: Workload, step: Step) -> float:
        """Seconds that it computes for a step."""
        work = step_work(workload.model, self.layers, workload.dtype, self.device.kind, step)
        return step_s(self.device, workload.dtype, work)

    def period_s(self, workload: Workload, step: Step) -> float:
        """Seconds from one step to the next, the way of the hidden states included unless it is the only stage."""
        hop = hop_s(self.device, workload.model, workload.wire_dtype, step) if self.layers.num_stages > 1 else 0.0
        return self.step_s(workload, step) + hop

    def num_kv_tokens(self, workload: Workload) -> int:
        """Tokens that fit beside its weights; 0 or less if not even those fit."""
        model, dtype, kind = workload.model, workload.dtype, self.device.kind
        free = self.device.memory_bytes - weight_bytes(model, self.layers, dtype) - working_bytes(model, dtype, kind)
        per_token = kv_bytes_per_token(model, self.layers.num_layers, dtype, kind)
        return math.floor(free * FREE_MEMORY_USED[kind] / per_token)


PlannedPipeline = Sequence[PlannedStage]
"""All stages, first to last."""


def decode_step(workload: Workload, num_requests: int) -> Step:
    """One token for each request."""
    return (Chunks(num_requests, 1, workload.context_tokens),)


def mixed_step(workload: Workload, num_requests: int) -> Step:
    """One token for each request, and the prompt tokens that the assumed traffic brings meanwhile."""
    prompt_tokens = num_requests * PROMPT_TOKENS_PER_OUTPUT_TOKEN
    context = max(prompt_tokens, workload.context_tokens // 2)
    return (*decode_step(workload, num_requests), Chunks(1, prompt_tokens, context, has_samples=False))


def num_kv_tokens(workload: Workload, pipeline: PlannedPipeline) -> int:
    """Tokens that every stage has room for."""
    return min(stage.num_kv_tokens(workload) for stage in pipeline)


def num_running(workload: Workload, pipeline: PlannedPipeline, num_requests: int) -> int:
    """Number of requests that run at once: those whose tokens fit the KV cache, at least one."""
    return max(1, min(num_requests, num_kv_tokens(workload, pipeline) // workload.context_tokens))


def group_size(num_requests: int, num_stages: int) -> int:
    """Requests of a micro-batch. There is one micro-batch for each stage, or for each request if there are fewer."""
    return math.ceil(num_requests / min(num_requests, num_stages))


def decode_tokens_per_s(workload: Workload, pipeline: PlannedPipeline, num_requests: int) -> float:
    """Tokens a second of all requests together while none has prompt tokens to compute."""
    running = num_running(workload, pipeline, num_requests)
    return _tokens_per_s(workload, pipeline, running, decode_step(workload, group_size(running, len(pipeline))))


def mixed_tokens_per_s(workload: Workload, pipeline: PlannedPipeline, num_requests: int) -> float:
    """Output tokens a second of all requests together under the assumed traffic."""
    running = num_running(workload, pipeline, num_requests)
    return _tokens_per_s(workload, pipeline, running, mixed_step(workload, group_size(running, len(pipeline))))


def first_token_s(workload: Workload, pipeline: PlannedPipeline, num_prompt_tokens: int) -> float:
    """Seconds from a prompt to its first token on an idle pipeline.

    The prompt goes through in chunks: the first fills the pipeline, each further one takes the slowest stage's time.
    """
    chunk_tokens = min(
        best_chunk_tokens(num_prompt_tokens, len(pipeline), _step_cost(workload, pipeline)), num_prompt_tokens
    )
    num_chunks = math.ceil(num_prompt_tokens / chunk_tokens)
    mean_context = (num_prompt_tokens + chunk_tokens) // 2
    last = [stage.period_s(workload, (Chunks(1, chunk_tokens, mean_context),)) for stage in pipeline]
    others = [stage.period_s(workload, (Chunks(1, chunk_tokens, mean_context, False),)) for stage in pipeline]
    return sum(last) + (num_chunks - 1) * max(others)


def _step_cost(workload: Workload, pipeline: PlannedPipeline) -> StepCost:
    """What the scheduler will find steps to cost: the line through a small and a large chunk."""
    small, large = (
        max(stage.period_s(workload, (Chunks(1, size, size, has_samples=False),)) for stage in pipeline)
        for size in (MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS)
    )
    row_s = (large - small) / (MAX_CHUNK_TOKENS - MIN_CHUNK_TOKENS)
    return StepCost(max(small - MIN_CHUNK_TOKENS * row_s, row_s), row_s)


def limiting_stage(workload: Workload, pipeline: PlannedPipeline, num_requests: int) -> int:
    """Index of the stage that the others wait for under the assumed traffic."""
    running = num_running(workload, pipeline, num_requests)
    step = mixed_step(workload, group_size(running, len(pipeline)))
    periods = [stage.period_s(workload, step) for stage in pipeline]
    return periods.index(max(periods))


def _tokens_per_s(workload: Workload, pipeline: PlannedPipeline, num_requests: int, step: Step) -> float:
    """Each request gets a token in the time in which the slowest stage serves all micro-batches, or, when those are too
    few to fill the pipeline, in which one goes all the way round."""
    periods = [stage.period_s(workload, step) for stage in pipeline]
    num_groups = min(num_requests, len(pipeline))
    return num_requests / max(num_groups * max(periods), sum(periods))
