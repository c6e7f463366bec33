"""One stage of a pipeline: loads its weights, then turns plans into hidden states or tokens. Knows no Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptj_dist.checkpoint.hub import fetch_weights, resolve_model
from gptj_dist.checkpoint.loader import StageTensors
from gptj_dist.config import DTypeName
from gptj_dist.engine.plan import Chunk, Embedding, NewRequest, Plan, PromptCopy, PromptLogprobs, Result
from gptj_dist.model.attention import KVCache
from gptj_dist.model.block_cache import BlockCache
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.inputs import MicroBatch, Span, to_device
from gptj_dist.model.kv_cache import cache_dtype, has_blocks, make_cache
from gptj_dist.model.logprobs import token_logprobs
from gptj_dist.model.sampler import Sampler, SampleSpec
from gptj_dist.params import TokenLogprobs
from gptj_dist.planning.cost import weight_bytes
from gptj_dist.stages.blueprint import DeviceReport, StageReport, StageSpec
from gptj_dist.stages.cores import available_cores
from gptj_dist.stages.device import describe_device, free_bytes, open_device
from gptj_dist.stages.embeddings import EmbeddingPools
from gptj_dist.stages.threads import ThreadChooser
from gptj_dist.stages.torch_dtypes import TORCH_DTYPES

if TYPE_CHECKING:
    from gptj_dist.model.graphs import RecordedSteps


TOLD_ROWS_AT_ONCE = 64
"""Rows of a prompt whose logits are in memory together."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage gives to the next.

    Args:
        hidden: [rows, d_model].
        embeddings: that this stage and those before have completed.
    """

    hidden: Tensor
    embeddings: tuple[Embedding, ...] = ()


class StageRunner:
    """A stage on its device. Call `load`, then `allocate`, then `step` for each plan, in order, from one thread.

    Args:
        spec: what the stage is.

    Raises:
        ConfigurationError: the device that the spec wants is not there.
    """

    def __init__(self, spec: StageSpec) -> None:
        self._spec = spec
        self._device = open_device(spec.device)
        self._requests: dict[int, NewRequest] = {}
        self._histories: dict[int, list[int]] = {}
        self._pools = EmbeddingPools(spec.layers, spec.config.num_layers)
        self._model: StageModel | None = None
        self._cache: KVCache | None = None
        self._steps: RecordedSteps | None = None
        self._threads: ThreadChooser | None = None
        self._sampler = Sampler(spec.rules, self._device)

    @property
    def spec(self) -> StageSpec:
        return self._spec

    def describe_device(self) -> DeviceReport:
        """Where the stage is."""
        return describe_device(self._device)

    def load(
        self, dtype: DTypeName, num_threads: int | None, on_progress: Callable[[str], None] = lambda _: None
    ) -> StageReport:
        """Fetches, reads and packs the stage's weights.

        Args:
            num_threads: the most torch threads that a CPU stage computes with; None means `default_threads()`.
            on_progress: called with what is being done, such as `fetching model.safetensors` or `9/14 layers`.

        Raises:
            CheckpointError: the stage's tensors are not all there, or the hub does not give them out.
        """
        spec = self._spec
        if self._device.type == "cpu":
            num_threads = num_threads or default_threads()
            torch.set_num_threads(num_threads)
            self._threads = ThreadChooser(num_threads, spec.layers.num_layers, torch.set_num_threads)
        directory = resolve_model(spec.model, spec.revision)
        fetch_weights(spec.model, directory, spec.layers, spec.config, lambda file: on_progress(f"fetching {file}"))
        with StageTensors(directory, spec.config, spec.layers) as tensors, torch.inference_mode():
            self._model = StageModel(
                spec.config,
                spec.layers,
                tensors.read,
                TORCH_DTYPES[dtype],
                self._device,
                lambda num_layers: on_progress(f"{num_layers}/{spec.layers.num_layers} layers"),
            )
        return StageReport(
            layers=spec.layers,
            device=self.describe_device(),
            kind=spec.device,
            dtype=dtype,
            weight_bytes=weight_bytes(spec.config, spec.layers, dtype),
            free_bytes=free_bytes(self._device),
            kv_bytes_per_token=2
            * spec.layers.num_layers
            * spec.config.d_model
            * cache_dtype(TORCH_DTYPES[dtype], self._device).itemsize,
            pid=os.getpid(),
            has_blocks=has_blocks(self._device),
        )

    @torch.inference_mode()
    def allocate(self, num_blocks: int, dtype: DTypeName) -> None:
        """Makes the KV cache: room for `num_blocks` blocks in all. A GPU records its steps of single rows."""
        if self._model is None:
            raise RuntimeError("load() comes before allocate()")
        spec = self._spec
        self._cache = make_cache(
            spec.config,
            spec.layers.num_layers,
            num_blocks,
            spec.max_batch_size,
            spec.max_model_len,
            TORCH_DTYPES[dtype],
            self._device,
        )
        if isinstance(self._cache, BlockCache):
            from gptj_dist.model.graphs import GraphRecorder, RecordedSteps, batch_sizes  # Triton needs a GPU's torch

            sizes = batch_sizes(spec.max_batch_size)
            self._steps = RecordedSteps(self._model, self._cache, sizes, GraphRecorder())

    @torch.inference_mode()
    def step(self, plan: Plan, before: StageOutput | None) -> StageOutput | Result:
        """Computes one plan.

        Args:
            before: of the stage before; None on the first stage.

        Returns:
            What the stage behind takes, or the tokens if this is the last.
        """
        output, prompt_logprobs = self._compute(plan, None if before is None else before.hidden)
        embeddings = (() if before is None else before.embeddings) + self._pools.complete(plan.chunks)
        if not self._spec.layers.is_last:
            return StageOutput(output, embeddings)
        specs = [self._sample_spec(chunk) for chunk in plan.chunks if chunk.samples]
        token_ids, logprobs = self._sampler.sample_with_logprobs(output, specs) if specs else ([], ())
        return Result(plan.plan_id, tuple(token_ids), (), logprobs, prompt_logprobs, embeddings)

    @torch.inference_mode()
    def forward(self, plan: Plan, hidden: Tensor | None) -> Tensor:
        """As `step`, but on the last stage gives the logits, float32, of the rows to be sampled."""
        return self._compute(plan, hidden)[0]

    def _compute(self, plan: Plan, hidden: Tensor | None) -> tuple[Tensor, tuple[PromptLogprobs, ...]]:
        """What `forward` gives, and the prompts' log probabilities that are asked for."""
        if self._model is None or self._cache is None:
            raise RuntimeError("load() and allocate() come before the first plan")
        self._register(plan, self._cache)
        batch = _micro_batch(plan.chunks)
        inputs = _token_ids(plan) if hidden is None else hidden
        told = [chunk for chunk in plan.chunks if self._spec.layers.is_last and self._num_told(chunk)]
        wants_all_rows = not self._spec.layers.is_last or all(chunk.samples for chunk in plan.chunks)
        pooled = self._pools.spans_by_depth(batch.spans)
        if self._steps is not None and self._steps.has(batch) and wants_all_rows and not told and not pooled:
            return self._steps(batch, inputs), ()
        hidden = self._model.embed(inputs) if hidden is None else to_device(hidden, self._device)
        hidden = self._model.forward(hidden, batch, self._cache, partial(self._pass, pooled))
        if not self._spec.layers.is_last:
            return hidden, ()
        rows_of = {chunk.request_id: span for chunk, span in zip(plan.chunks, batch.spans, strict=True)}
        prompt_logprobs = tuple(self._tell(chunk, hidden[rows_of[chunk.request_id].rows]) for chunk in told)
        spans = [rows_of[chunk.request_id] for chunk in plan.chunks if chunk.samples]
        if not spans:
            return torch.empty(0, self._spec.config.vocab_size), prompt_logprobs
        last_rows = torch.tensor([span.row + span.num_tokens - 1 for span in spans])
        return self._model.logits(hidden[to_device(last_rows, self._device)]), prompt_logprobs

    def _pass(self, pooled: Mapping[int, Sequence[Span]], depth: int, hidden: Tensor) -> None:
        """Called with what goes into the first layer, and with what comes out of each."""
        if self._threads is not None:
            num_layers = depth - self._spec.layers.start
            self._threads.end_layer(num_layers - 1) if num_layers else self._threads.begin_step()
        if depth in pooled:
            self._pool(pooled[depth], depth, hidden)

    def _pool(self, spans: Sequence[Span], depth: int, hidden: Tensor) -> None:
        """Takes requests' hidden states in; those behind the last layer are normalised first."""
        assert self._model is not None
        for span in spans:
            rows = hidden[span.rows]
            is_final = depth == self._spec.config.num_layers
            self._pools.add(span.request_id, self._model.normed(rows) if is_final else rows)

    @torch.inference_mode()
    def embed(self, plan: Plan) -> Tensor:
        """What the first stage's layers start from: [rows, d_model]."""
        if self._model is None:
            raise RuntimeError("load() comes before the first plan")
        return self._model.embed(_token_ids(plan))

    def _num_told(self, chunk: Chunk) -> int:
        """Rows of a chunk that predict a token of the prompt whose log probability is asked for."""
        request = self._requests[chunk.request_id]
        if request.params.prompt_logprobs is None:
            return 0
        num_known = len(chunk.token_ids) - 1 + (chunk.next_id is not None)
        return max(0, min(num_known, request.num_prompt_tokens - chunk.start - 1))

    def _tell(self, chunk: Chunk, hidden: Tensor) -> PromptLogprobs:
        """Log probabilities of the prompt's tokens that a chunk's rows [rows, d_model] predict; some rows at a time."""
        assert self._model is not None
        num_top = self._requests[chunk.request_id].params.prompt_logprobs
        assert num_top is not None
        targets = (*chunk.token_ids[1:], *(() if chunk.next_id is None else (chunk.next_id,)))[: self._num_told(chunk)]
        told: list[TokenLogprobs] = []
        for first in range(0, len(targets), TOLD_ROWS_AT_ONCE):
            some = targets[first : first + TOLD_ROWS_AT_ONCE]
            logits = self._model.logits(hidden[first : first + len(some)])
            told += token_logprobs(logits, some, [num_top] * len(some))
        return PromptLogprobs(chunk.request_id, chunk.start + 1, tuple(told))

    def _register(self, plan: Plan, cache: KVCache) -> None:
        """Keeps the stage's view of requests in step with the coordinator's."""
        for request_id in plan.released:
            del self._requests[request_id]
            self._histories.pop(request_id, None)
            self._pools.forget(request_id)
            cache.release(request_id)
        for request in plan.new_requests:
            self._requests[request.request_id] = request
            cache.add(request.request_id)
            self._pools.meet(request)
            if request.begins_with is not None:
                cache.extend(request.request_id, request.begins_with.blocks)
            if self._spec.layers.is_last:
                self._histories[request.request_id] = self._first_history(request.begins_with)
        for chunk in plan.chunks:
            if chunk.request_id in self._histories:
                self._histories[chunk.request_id] += chunk.token_ids
            if chunk.new_blocks:
                cache.extend(chunk.request_id, chunk.new_blocks)
        for request in plan.new_requests:
            if request.begins_with is not None:
                cache.copy(request.begins_with.request_id, request.request_id, request.begins_with.num_tokens)

    def _first_history(self, begins_with: PromptCopy | None) -> list[int]:
        """The tokens that a request begins with; the one that has computed them is sampled in the same way."""
        return [] if begins_with is None else self._histories[begins_with.request_id][: begins_with.num_tokens]

    def _sample_spec(self, chunk: Chunk) -> SampleSpec:
        request = self._requests[chunk.request_id]
        return SampleSpec(
            request.params,
            request.noise_key,
            chunk.start + len(chunk.token_ids),
            request.num_prompt_tokens,
            self._histories[chunk.request_id],
        )


def default_threads() -> int:
    """The most threads that a CPU stage computes with unless it is set: as OMP_NUM_THREADS says, or one a core."""
    num_threads = torch.get_num_threads()  # knows OMP_NUM_THREADS and affinity, but no quota
    return num_threads if "OMP_NUM_THREADS" in os.environ else min(num_threads, available_cores())


def _token_ids(plan: Plan) -> Tensor:
    return torch.tensor([token_id for chunk in plan.chunks for token_id in chunk.token_ids])


def _micro_batch(chunks: Sequence[Chunk]) -> MicroBatch:
    spans, row = [], 0
    for chunk in chunks:
        spans.append(Span(chunk.request_id, row, chunk.start, len(chunk.token_ids)))
        row += len(chunk.token_ids)
    positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    return MicroBatch(tuple(spans), positions)
