"""One stage of a pipeline: loads its weights, then computes plans into hidden states or tokens. Does not use Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from gptj_dist.config import DTypeName, LayerRange
from gptj_dist.engine.plan import Chunk, Continuations, Embedding, Plan, PromptLogprobs, Result
from gptj_dist.model.adapters import Changes
from gptj_dist.model.attention import KVCache
from gptj_dist.model.block_cache import BlockCache
from gptj_dist.model.block_tables import BlockTables
from gptj_dist.model.gptj import StageModel
from gptj_dist.model.inputs import MicroBatch, Span, to_device
from gptj_dist.model.kv_cache import cache_dtype, make_cache
from gptj_dist.model.logprobs import token_logprobs
from gptj_dist.model.sampler import Sampler, SampleSpec
from gptj_dist.params import AdapterSource, TokenLogprobs
from gptj_dist.stages.adapters import AdaptedRows, StageAdapters
from gptj_dist.stages.blueprint import DeviceReport, StageReport, StageSpec
from gptj_dist.stages.cores import LoneCores, available_cores
from gptj_dist.stages.device import describe_device, open_device
from gptj_dist.stages.drafts import accept
from gptj_dist.stages.embeddings import MovedPool
from gptj_dist.stages.files import ModelFiles, OwnFiles
from gptj_dist.stages.held_layer import HeldLayer
from gptj_dist.stages.load_progress import LoadProgress
from gptj_dist.stages.lone_steps import StageThreads, stage_threads
from gptj_dist.stages.parts import new_adapters, read_layer, read_stage, stage_report
from gptj_dist.stages.requests import StageRequests

if TYPE_CHECKING:
    from gptj_dist.model.graphs import RecordedSteps

T = TypeVar("T")

TORCH_DTYPES: Mapping[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The types that stages compute in, by their names in the settings and on the wire."""

PROMPT_ROWS_AT_ONCE = 64
"""Prompt rows whose logits are computed at a time, which limits the memory they take."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage sends to the next one.

    Args:
        hidden: [rows, d_model].
        embeddings: embeddings completed by this stage and the stages before it.
    """

    hidden: Tensor
    embeddings: tuple[Embedding, ...] = ()


class StageRunner:
    """A stage on its device. Call `load`, then `allocate`, then `step` for each plan, in order, from one thread.

    Args:
        spec: the stage's layers, model and device.
        files: of the model; None if this machine or the hub has them.

    Attributes:
        num_beats: layers that were begun or computed, a sign of life.

    Raises:
        ConfigurationError: the machine does not have the device that the spec names.
    """

    def __init__(self, spec: StageSpec, files: ModelFiles | None = None) -> None:
        self._spec = spec
        self._files: ModelFiles = files or OwnFiles(spec.model, spec.revision)
        self._device = open_device(spec.device)
        self._requests = StageRequests(spec)
        self._model: StageModel | None = None
        self._cache: KVCache | None = None
        self._steps: RecordedSteps | None = None
        self._adapters: StageAdapters | None = None
        self._threads: StageThreads | None = None
        self._sampler = Sampler(spec.rules, self._device)
        self._held: dict[int, HeldLayer] = {}
        self._next_adapters: StageAdapters | None = None
        self.num_beats = 0

    def describe_device(self) -> DeviceReport:
        """Describes the stage's device."""
        return describe_device(self._device)

    def load(
        self,
        dtype: DTypeName,
        num_threads: int | None,
        on_progress: Callable[[LoadProgress], None] = lambda _: None,
        lone: LoneCores | None = None,
    ) -> StageReport:
        """Fetches, reads and packs the stage's weights.

        Args:
            num_threads: maximum number of torch threads of a CPU stage; None means `default_threads()`.
            on_progress: called at every step.
            lone: what a CPU stage may use in lone steps; None if they are like others.

        Raises:
            CheckpointError: tensors of the stage are missing, or the hub denies access to them.
        """
        spec = self._spec
        if self._device.type == "cpu":
            num_threads = num_threads or default_threads()
            torch.set_num_threads(num_threads)
            self._threads = stage_threads(num_threads, lone, spec.layers.num_layers)
        self._requests.load(self._files.directory())
        self._model = read_stage(spec, self._files, TORCH_DTYPES[dtype], self._device, on_progress)
        self._adapters = new_adapters(spec, self._files, TORCH_DTYPES[dtype], self._device, spec.layers)
        return stage_report(spec, dtype, cache_dtype(TORCH_DTYPES[dtype], self._device), self._device)

    @torch.inference_mode()
    def allocate(self, num_blocks: int) -> None:
        """Allocates a KV cache of `num_blocks` blocks. On a GPU, also sets up CUDA graphs for decode steps."""
        if self._model is None:
            raise RuntimeError("load() comes before allocate()")
        spec = self._spec
        self._cache = make_cache(
            spec.config,
            spec.layers.num_layers,
            num_blocks,
            spec.max_batch_size,
            spec.max_model_len,
            self._model.dtype,
            self._device,
        )
        if isinstance(self._cache, BlockCache):
            from gptj_dist.model.graphs import GraphRecorder, RecordedSteps, batch_sizes  # Triton needs a GPU's torch

            sizes = batch_sizes(spec.max_batch_size)
            self._steps = RecordedSteps(self._model, self._cache, sizes, GraphRecorder())

    def load_adapter(self, source: AdapterSource) -> None:
        """Reads this stage's part of an adapter. Can be called on another thread while steps are computed.

        Raises:
            CheckpointError: it cannot be read or does not fit the model.
        """
        if self._adapters is None:
            raise RuntimeError("load() comes before load_adapter()")
        for adapters in (self._adapters, self._next_adapters):
            if adapters is not None:
                adapters.load(source)

    def close(self) -> None:
        """Ends the stage's threads."""
        self._requests.masks.close()

    def reset(self, layers: LayerRange) -> None:
        """Releases all requests. The stage has these layers, as before or after a move of which it was a part."""
        if self._cache is not None:
            self._requests.release_all(self._cache)
            if layers != self._spec.layers:
                self.arrange(layers)
        self.forget_held()

    @property
    def layers(self) -> LayerRange:
        """The stage's layers now."""
        return self._spec.layers

    @property
    def tables(self) -> BlockTables:
        """The cache, if it has blocks. Raises RuntimeError for any other."""
        if not isinstance(self._cache, BlockTables):
            raise RuntimeError("layers move only between caches with blocks, after allocate()")
        return self._cache

    @torch.inference_mode()
    def load_layer(self, index: int, layers: LayerRange) -> HeldLayer:
        """Loads a layer that `arrange` can add, memory for its keys and values, and its parts of adapters.

        Any thread may call it.

        Args:
            index: its number in the model.
            layers: the stage's with it.

        Raises:
            CheckpointError: its tensors are missing, or the hub denies access to them.
        """
        if self._model is None or self._adapters is None:
            raise RuntimeError("load() comes before load_layer()")
        held = HeldLayer(read_layer(self._spec, self._files, self._model, index), self.tables.new_layer())
        adapters = new_adapters(self._spec, self._files, self._model.dtype, self._device, layers)
        for source in self._adapters.sources:  # some are read together with the weights that have just been fetched
            adapters.load(source)
        self._held[index], self._next_adapters = held, adapters
        return held

    def arrange(self, layers: LayerRange, pools: Iterable[MovedPool] = ()) -> list[MovedPool]:
        """Makes these the stage's layers: held ones join at its ends, others leave and are held. Between two steps.

        Args:
            pools: embeddings under way of layers that join.

        Returns:
            Those of layers that have left.
        """
        assert self._model is not None, "load() comes first"
        before, tables = self._spec.layers, self.tables
        for index in (*reversed(range(layers.start, before.start)), *range(before.stop, layers.stop)):
            held = self._held.pop(index)
            self._model.insert_layer(index, held.layer)
            tables.insert_layer(0 if index < before.start else tables.num_layers, held.kv)
        for index in (*range(before.start, layers.start), *reversed(range(layers.stop, before.stop))):
            kv = tables.remove_layer(0 if index < layers.start else tables.num_layers - 1)
            self._held[index] = HeldLayer(self._model.remove_layer(index), kv)
        self._spec = replace(self._spec, layers=layers)
        self._adapters = self._fitting_adapters(self._model.dtype, layers)
        if self._threads is not None:
            self._threads.resize(layers.num_layers)
        if self._steps is not None:
            self._steps.forget()
        return self._requests.pools.move_to(layers, pools, self._device)

    def forget_held(self) -> None:
        """Frees the layers that are no longer the stage's, or that have not become so."""
        self._held.clear()
        self._next_adapters = None

    def _fitting_adapters(self, dtype: torch.dtype, layers: LayerRange) -> StageAdapters:
        held, prepared = self._adapters, self._next_adapters
        if prepared is not None and prepared.layers == layers:
            self._next_adapters = None
            return prepared
        if held is not None and held.layers.start <= layers.start and layers.stop <= held.layers.stop:
            held.narrow(layers)
            return held
        return new_adapters(self._spec, self._files, dtype, self._device, layers)  # requests have theirs read again

    def wait_for(self, receive: Callable[[], T]) -> T:
        """The result of `receive`, which waits for the next plan. The stage's other threads sleep meanwhile."""
        return receive() if self._threads is None else self._threads.wait_for(receive)

    @torch.inference_mode()
    def step(self, plan: Plan, before: StageOutput | None) -> StageOutput | Result:
        """Computes one plan.

        Args:
            before: output of the previous stage; None on the first stage.

        Returns:
            The input of the next stage, or the sampled tokens if this is the last stage.
        """
        output, prompt_logprobs = self._compute(plan, None if before is None else before.hidden)
        self._requests.note_written(plan, self._cache)
        embeddings = (() if before is None else before.embeddings) + self._requests.pools.complete(plan.chunks)
        if self._spec.layers.is_last:
            sampled = [chunk for chunk in plan.chunks if chunk.samples]
            specs = [spec for chunk in sampled for spec in self._requests.sample_specs(chunk)]
            continuations = self._continuations(sampled, output, specs)
            token_ids, logprobs = self._sampler.sample_with_logprobs(output, specs) if specs else ([], ())
            self._requests.masks.prepare_next(sampled, token_ids)
        if not self._spec.layers.is_last:
            return StageOutput(output, embeddings)
        token_ids, logprobs, num_accepted = accept(sampled, token_ids, logprobs)
        told = (prompt_logprobs, embeddings, continuations)
        return Result(plan.plan_id, tuple(token_ids), (), logprobs, *told, num_accepted)

    def _continuations(
        self, sampled: Sequence[Chunk], logits: Tensor, specs: Sequence[SampleSpec]
    ) -> tuple[Continuations, ...]:
        """The likeliest tokens of the beams among the chunks whose rows are sampled."""
        ids = [chunk.request_id for chunk in sampled for _ in range(1 + chunk.num_drafts)]
        rows = [row for row, spec in enumerate(specs) if spec.params.use_beam_search]
        if not rows:
            return ()
        likeliest = self._sampler.continuations(logits[rows], [specs[row] for row in rows])
        return tuple(Continuations(ids[row], tokens) for row, tokens in zip(rows, likeliest, strict=True))

    @torch.inference_mode()
    def forward(self, plan: Plan, hidden: Tensor | None) -> Tensor:
        """Computes one plan like `step`, but returns float32 logits of the rows to sample if this is the last stage."""
        return self._compute(plan, hidden)[0]

    def _compute(self, plan: Plan, hidden: Tensor | None) -> tuple[Tensor, tuple[PromptLogprobs, ...]]:
        """The result of `forward`, and the requested log probabilities of prompt tokens."""
        if self._model is None or self._cache is None:
            raise RuntimeError("load() and allocate() come before the first plan")
        self._requests.register(plan, self._cache)
        batch = _micro_batch(plan.chunks)
        inputs = _token_ids(plan) if hidden is None else hidden
        is_last = self._spec.layers.is_last
        targets = [self._requests.prompt_targets(chunk) for chunk in plan.chunks]
        wants_all_rows = not is_last or all(chunk.samples for chunk in plan.chunks)
        pooled = self._requests.pools.spans_by_depth(batch.spans)
        changes = self._changes([(span.request_id, span.start, span.num_tokens) for span in batch.spans])
        is_plain = wants_all_rows and not any(targets) and not pooled and changes is None
        if self._steps is not None and is_plain and all(chunk.num_known == 1 for chunk in plan.chunks):
            single_rows = batch.row_by_row()
            if self._steps.has(single_rows):
                return self._steps(single_rows, inputs), ()
        hidden = self._model.embed(inputs, changes) if hidden is None else to_device(hidden, self._device)
        hidden = self._model.forward(hidden, batch, self._cache, partial(self._pass, pooled, plan.is_lone), changes)
        if not is_last:
            return hidden, ()
        prompt_logprobs = tuple(
            self._prompt_logprobs(chunk, token_ids, hidden[span.rows])
            for chunk, token_ids, span in zip(plan.chunks, targets, batch.spans, strict=True)
            if token_ids
        )
        sampled = [
            span.last(1 + chunk.num_drafts)
            for chunk, span in zip(plan.chunks, batch.spans, strict=True)
            if chunk.samples
        ]
        if not sampled:
            return torch.empty(0, self._spec.config.vocab_size), prompt_logprobs
        rows = torch.cat([torch.arange(span.row, span.row + span.num_tokens) for span in sampled])
        changes = self._changes([(span.request_id, span.start, span.num_tokens) for span in sampled])
        return self._model.logits(hidden[to_device(rows, self._device)], changes), prompt_logprobs

    def _changes(self, rows: Sequence[tuple[int, int, int]]) -> Changes | None:
        """The changes of consecutive rows; None if no request has an adapter.

        Args:
            rows: request ids, positions of first tokens, and numbers of rows.
        """
        if self._adapters is None or not self._requests.has_adapters:
            return None
        adapted: list[AdaptedRows] = []
        first = 0
        for request_id, start, num_rows in rows:
            adapters = self._requests.adapters(request_id)
            adapted.append(AdaptedRows(range(first, first + num_rows), start, adapters))
            first += num_rows
        return self._adapters.changes(adapted, first)

    def _pass(self, pooled: Mapping[int, Sequence[Span]], is_lone: bool, depth: int, hidden: Tensor) -> None:
        """Called with the hidden states before the first layer and after each layer."""
        self.num_beats += 1
        if self._threads is not None:
            num_layers = depth - self._spec.layers.start
            self._threads.end_layer(num_layers - 1) if num_layers else self._threads.begin_step(is_lone)
        if depth in pooled:
            self._pool(pooled[depth], depth, hidden)

    def _pool(self, spans: Sequence[Span], depth: int, hidden: Tensor) -> None:
        """Pools requests' hidden states. Those after the model's last layer are normalised first."""
        assert self._model is not None
        for span in spans:
            rows = hidden[span.rows]
            if depth == self._spec.config.num_layers:
                changes = self._changes([(span.request_id, span.start, span.num_tokens)])
                rows = self._model.normed(rows, changes)
            self._requests.pools.add(span.request_id, rows)

    @torch.inference_mode()
    def embed(self, plan: Plan) -> Tensor:
        """The embedded tokens of a plan, which enter the first layer: [rows, d_model]."""
        if self._model is None:
            raise RuntimeError("load() comes before the first plan")
        return self._model.embed(_token_ids(plan))

    def _prompt_logprobs(self, chunk: Chunk, targets: Sequence[int], hidden: Tensor) -> PromptLogprobs:
        """Log probabilities of the prompt tokens `targets`, which a chunk's rows [rows, d_model] predict."""
        assert self._model is not None
        num_top = self._requests[chunk.request_id].params.prompt_logprobs
        assert num_top is not None
        logprobs: list[TokenLogprobs] = []
        for first in range(0, len(targets), PROMPT_ROWS_AT_ONCE):
            some = targets[first : first + PROMPT_ROWS_AT_ONCE]
            changes = self._changes([(chunk.request_id, chunk.start + first, len(some))])
            logits = self._model.logits(hidden[first : first + len(some)], changes)
            logprobs += token_logprobs(logits, some, [num_top] * len(some))
        return PromptLogprobs(chunk.request_id, chunk.start + 1, tuple(logprobs))


def default_threads() -> int:
    """Default maximum number of threads of a CPU stage: OMP_NUM_THREADS if set, else one per available core."""
    num_threads = torch.get_num_threads()  # respects OMP_NUM_THREADS and affinity, but not a CPU quota
    return num_threads if "OMP_NUM_THREADS" in os.environ else min(num_threads, available_cores())


def _token_ids(plan: Plan) -> Tensor:
    return torch.tensor([token_id for chunk in plan.chunks for token_id in chunk.token_ids])


def _micro_batch(chunks: Sequence[Chunk]) -> MicroBatch:
    spans, row = [], 0
    for chunk in chunks:
        spans.append(Span(chunk.request_id, row, chunk.start, len(chunk.token_ids)))
        row += len(chunk.token_ids)
    positions = [position for span in spans for position in range(span.start, span.stop)]
    return MicroBatch(tuple(spans), torch.tensor(positions))
