"""Fake stages and a fake executor. They check plans and compute tokens without a model."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass, field

from gptj_dist.engine.plan import Chunk, Continuations, Embedding, KVPrefix, NewRequest, Plan, Result
from gptj_dist.errors import GPTJDistError, StageFailedError
from gptj_dist.params import Continuation

FAKE_VOCAB_SIZE = 1000
FAKE_EOS_TOKEN_ID = 0


@dataclass(slots=True)
class HeldRequest:
    """The state of one request on the stages: the tokens whose KV they hold, drafts last, and its blocks."""

    introduction: NewRequest
    token_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_drafts: int = 0


class FakeStages:
    """The state of every stage after the plans so far. Knows plans, but not the scheduler that makes them.

    Args:
        num_blocks, block_size: size of the KV cache, and tokens per block.
        max_requests: the most requests that a stage holds at once.
    """

    def __init__(self, num_blocks: int, block_size: int, max_requests: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_requests = max_requests
        self._next_plan_id = 0
        self._holders: dict[int, set[int]] = {}
        self._cells: dict[tuple[int, int], int] = {}
        self.requests: dict[int, HeldRequest] = {}

    def apply(self, plan: Plan) -> None:
        """Executes a plan. Raises AssertionError if real stages could not execute it."""
        assert plan.plan_id >= self._next_plan_id, "plans go backwards"
        self._next_plan_id = plan.plan_id + 1
        for request_id in plan.released:
            assert request_id in self.requests, f"request {request_id} is released, but no stage knows it"
            for block in self.requests.pop(request_id).blocks:
                self._holders[block].remove(request_id)
        for new in plan.new_requests:
            assert new.request_id not in self.requests, f"request {new.request_id} is introduced twice"
            self.requests[new.request_id] = HeldRequest(new)
            if new.begins_with is not None:
                self._take_over(new.request_id, new.begins_with)
        assert len(self.requests) <= self._max_requests, "more requests than stages have room for"
        computed = [chunk.request_id for chunk in plan.chunks]
        assert computed, "a plan with nothing to compute"
        assert len(computed) == len(set(computed)), "two chunks of one request in a plan"
        assert {new.request_id for new in plan.new_requests} <= set(computed), "an introduction without a chunk"
        for chunk in plan.chunks:
            self._give_blocks(chunk)
        for new in plan.new_requests:
            if new.begins_with is not None and new.begins_with.source_id is not None:
                self._copy(new.request_id, new.begins_with.source_id, new.begins_with)
        for chunk in plan.chunks:
            self._compute(chunk)

    def _take_over(self, request_id: int, begins_with: KVPrefix) -> None:
        taken = begins_with.token_ids
        if begins_with.source_id is None:
            assert len(taken) == begins_with.num_tokens == len(begins_with.blocks) * self._block_size, (
                "not whole blocks"
            )
        else:
            assert begins_with.source_id in self.requests, "the KV of a request that no stage knows"
            source = self.requests[begins_with.source_id]
            assert begins_with.num_tokens <= len(source.token_ids), "KV that was not computed by earlier plans"
            assert begins_with.blocks == tuple(source.blocks[: len(begins_with.blocks)]), "not its blocks"
            taken = tuple(source.token_ids[: begins_with.num_tokens])
        assert begins_with.num_tokens > 0
        assert len(begins_with.blocks) * self._block_size <= begins_with.num_tokens, "blocks that are still written to"
        for block in begins_with.blocks:
            self._holders[block].add(request_id)
        self.requests[request_id].blocks.extend(begins_with.blocks)
        self.requests[request_id].token_ids.extend(taken)

    def _give_blocks(self, chunk: Chunk) -> None:
        assert chunk.request_id in self.requests, f"request {chunk.request_id} was never introduced"
        for block in chunk.new_blocks:
            assert 0 <= block < self._num_blocks, "no such block"
            assert not self._holders.get(block), f"block {block} has two holders"
            self._holders[block] = {chunk.request_id}
        self.requests[chunk.request_id].blocks.extend(chunk.new_blocks)

    def _copy(self, request_id: int, source_id: int, begins_with: KVPrefix) -> None:
        for position in range(len(begins_with.blocks) * self._block_size, begins_with.num_tokens):
            self._cells[self._cell(request_id, position)] = self._cells[self._cell(source_id, position)]

    def _compute(self, chunk: Chunk) -> None:
        held = self.requests[chunk.request_id]
        assert chunk.token_ids, "an empty chunk"
        num_held = len(held.token_ids)
        assert num_held - held.num_drafts <= chunk.start <= num_held, "a chunk does not continue where its request was"
        held.token_ids[chunk.start :] = chunk.token_ids
        held.num_drafts = chunk.num_drafts
        num_needed = -(-len(held.token_ids) // self._block_size)
        assert len(held.blocks) >= num_needed, "blocks do not cover the positions"
        assert not chunk.new_blocks or len(held.blocks) == num_needed, "there are too many blocks"
        for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
            cell = self._cell(chunk.request_id, position)
            assert self._holders[cell[0]] == {chunk.request_id}, "a block is written to that others read"
            self._cells[cell] = token_id
        read = [self._cells[self._cell(chunk.request_id, position)] for position in range(len(held.token_ids))]
        assert read == held.token_ids, "blocks hold another request's KV"

    def _cell(self, request_id: int, position: int) -> tuple[int, int]:
        """The block of a position, and the position's index in the block."""
        return self.requests[request_id].blocks[position // self._block_size], position % self._block_size


def fake_token(noise_key: int, position: int) -> int:
    """The token that fake stages sample at a position; never end of text."""
    return 1 + (noise_key * 7919 + position * 104729) % (FAKE_VOCAB_SIZE - 1)


def fake_embedding(chunk: Chunk) -> Embedding:
    """The embedding that fake stages compute for a prompt that ends with the chunk."""
    return Embedding(chunk.request_id, f"{chunk.start + len(chunk.token_ids)} tokens".encode())


class FakeExecutor:
    """An `Executor` that samples `fake_token`, so that a test can predict each stream's tokens.

    Args:
        stages: checks the plans.
        is_paused: hold results back until `step` or `go_on`.
        end_positions: positions at which it samples end of text, in any request.

    Attributes:
        plans: all plans that were submitted.
    """

    def __init__(
        self, stages: FakeStages, is_paused: bool = False, end_positions: frozenset[int] = frozenset()
    ) -> None:
        self._stages = stages
        self._is_paused = is_paused
        self._end_positions = end_positions
        self._computed: deque[Result] = deque()
        self._arrived: deque[Result] = deque()
        self._failure: GPTJDistError | None = None
        self._has_news = asyncio.Event()
        self.plans: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self._stages.apply(plan)
        self.plans.append(plan)
        tokens = tuple(self._sample(chunk) for chunk in plan.chunks if chunk.samples)
        embeddings = tuple(fake_embedding(chunk) for chunk in plan.chunks if chunk.ends_embedding)
        continuations = tuple(map(self._continuations, filter(self._is_beam, plan.chunks)))
        self._computed.append(Result(plan.plan_id, tokens, embeddings=embeddings, continuations=continuations))
        if not self._is_paused and self._failure is None:
            self.step()

    async def receive(self) -> Result:
        await asyncio.sleep(0)  # yields to the event loop, like a real transport
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            self._has_news.clear()
            await self._has_news.wait()
        return self._arrived.popleft()

    def step(self) -> None:
        """Delivers the oldest result that is held back."""
        self.inject(self._computed.popleft())

    def go_on(self) -> None:
        """Delivers all results that are held back, and later ones at once."""
        self._is_paused = False
        while self._computed:
            self.step()

    def inject(self, result: Result) -> None:
        """Delivers a result that need not belong to a submitted plan."""
        self._arrived.append(result)
        self._has_news.set()

    def fail(self, message: str = "stage 1 died") -> None:
        """Makes `receive` fail after the results that have been delivered. Later plans have none."""
        self._failure = StageFailedError(message)
        self._has_news.set()

    def _sample(self, chunk: Chunk) -> int:
        position = chunk.start + len(chunk.token_ids)
        if position in self._end_positions:
            return FAKE_EOS_TOKEN_ID
        return fake_token(self._stages.requests[chunk.request_id].introduction.noise_key, position)

    def _is_beam(self, chunk: Chunk) -> bool:
        return chunk.samples and self._stages.requests[chunk.request_id].introduction.params.use_beam_search

    def _continuations(self, chunk: Chunk) -> Continuations:
        """Any, but always the same after the same tokens."""
        held = self._stages.requests[chunk.request_id]
        chooser = random.Random(str(held.token_ids))
        token_ids = chooser.sample(range(1, FAKE_VOCAB_SIZE), held.introduction.params.num_beams)
        return Continuations(
            chunk.request_id, tuple(Continuation(token_id, -0.1 * place) for place, token_id in enumerate(token_ids))
        )
