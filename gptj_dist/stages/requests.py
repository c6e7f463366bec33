"""What a stage keeps of its requests, as plans introduce, continue and release them. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptj_dist.engine.plan import Chunk, KVPrefix, NewRequest, Plan
from gptj_dist.model.attention import KVCache
from gptj_dist.model.block_tables import BlockTables
from gptj_dist.model.sampler import SampleSpec
from gptj_dist.params import AdapterChoice
from gptj_dist.stages.blueprint import StageSpec
from gptj_dist.stages.embeddings import EmbeddingPools
from gptj_dist.stages.grammars import GrammarMasks


class StageRequests:
    """The requests of a stage. The last stage keeps their tokens, too, to sample by them.

    Attributes:
        pools: of those that ask for an embedding.
        masks: of those with a grammar, on the last stage.
    """

    def __init__(self, spec: StageSpec) -> None:
        self._is_last = spec.layers.is_last
        self._by_id: dict[int, NewRequest] = {}
        self._adapted: set[int] = set()
        self._histories: dict[int, list[int]] = {}
        self.pools = EmbeddingPools(spec.layers, spec.config.num_layers)
        self.masks = GrammarMasks(spec.rules)

    def load(self, directory: Path) -> None:
        """Begins to read what the checkpoint says of tokens."""
        if self._is_last:
            self.masks.load(directory)

    def __getitem__(self, request_id: int) -> NewRequest:
        return self._by_id[request_id]

    @property
    def has_adapters(self) -> bool:
        """Whether any of them has."""
        return bool(self._adapted)

    def adapters(self, request_id: int) -> tuple[AdapterChoice, ...]:
        return self._by_id[request_id].params.adapters

    def register(self, plan: Plan, cache: KVCache) -> None:
        """Updates the requests, their tokens and their KV blocks from the plan."""
        for request_id in plan.released:
            self._release(request_id, cache)
        for request in plan.new_requests:
            self._by_id[request.request_id] = request
            if request.params.adapters:
                self._adapted.add(request.request_id)
            cache.add(request.request_id)
            self.pools.register(request)
            if request.begins_with is not None:
                cache.extend(request.request_id, request.begins_with.blocks)
            if self._is_last:
                self._histories[request.request_id] = history = self._first_history(request.begins_with)
                self.masks.add(request, history)
        for chunk in plan.chunks:
            if chunk.request_id in self._histories:
                self._histories[chunk.request_id][chunk.start :] = chunk.token_ids  # in place of rejected drafts
            if chunk.new_blocks:
                cache.extend(chunk.request_id, chunk.new_blocks)
        self.masks.prepare(plan.chunks)
        for request in plan.new_requests:
            begins_with = request.begins_with
            if begins_with is not None and begins_with.source_id is not None:
                cache.copy(begins_with.source_id, request.request_id, begins_with.num_tokens)

    def note_written(self, plan: Plan, cache: KVCache | None) -> None:
        """The plan's keys and values are in the cache."""
        if isinstance(cache, BlockTables) and cache.is_watched:
            for chunk in plan.chunks:
                cache.note_written(chunk.request_id, chunk.start, chunk.start + len(chunk.token_ids))

    def release_all(self, cache: KVCache) -> None:
        for request_id in list(self._by_id):
            self._release(request_id, cache)

    def sample_specs(self, chunk: Chunk) -> list[SampleSpec]:
        """How the token after the chunk's last known one is sampled, and those after its drafts."""
        request, history = self._by_id[chunk.request_id], self._histories[chunk.request_id]
        first = chunk.start + chunk.num_known
        return [
            SampleSpec(
                request.params,
                request.noise_key,
                position,
                request.num_prompt_tokens,
                history if position == len(history) else history[:position],
                mask,
            )
            for position, mask in enumerate(self.masks.masks(chunk), first)
        ]

    def prompt_targets(self, chunk: Chunk) -> Sequence[int]:
        """The prompt's tokens that the chunk's rows predict, if the request asks for their log probabilities."""
        request = self._by_id[chunk.request_id]
        if request.params.prompt_logprobs is None or not self._is_last:
            return ()
        next_ids = chunk.token_ids[1:] if chunk.next_id is None else (*chunk.token_ids[1:], chunk.next_id)
        return next_ids[: max(0, request.num_prompt_tokens - chunk.start - 1)]

    def _release(self, request_id: int, cache: KVCache) -> None:
        del self._by_id[request_id]
        self._adapted.discard(request_id)
        self._histories.pop(request_id, None)
        self.masks.release(request_id)
        self.pools.release(request_id)
        cache.release(request_id)

    def _first_history(self, begins_with: KVPrefix | None) -> list[int]:
        """The tokens whose KV a request begins with."""
        if begins_with is None:
            return []
        if begins_with.source_id is None:
            return list(begins_with.token_ids)
        return self._histories[begins_with.source_id][: begins_with.num_tokens]
