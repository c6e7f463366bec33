"""Decides how many drafts the requests of a pipeline have, by what their rows cost."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.chunk_sizes import UNKNOWN_COST
from gptj_dist.engine.drafts import Drafter
from gptj_dist.engine.known_texts import KnownTexts
from gptj_dist.engine.plan import Plan
from gptj_dist.engine.prefix import block_keys
from gptj_dist.engine.request import Request
from gptj_dist.engine.step_cost import StepCostEstimate


class Drafting:
    """Makes drafts of requests whose next token is to be computed.

    Args:
        max_drafts: the most of a request in a micro-batch.
        pool: of the KV blocks. Drafts preempt no request.
    """

    def __init__(self, max_drafts: int, pool: BlockPool) -> None:
        self._max_drafts = max_drafts
        self._pool = pool
        self._step_cost = StepCostEstimate()
        self._texts = KnownTexts(pool.num_blocks)

    def observe(self, plan: Plan, seconds: float) -> None:
        """Adds the time of a step. Rows of prompts say nothing of drafts: they are cheaper, as nothing is sampled."""
        if all(chunk.samples and chunk.num_known == 1 for chunk in plan.chunks):
            self._step_cost.observe(plan.num_tokens, seconds)

    def row_share(self, num_rows: int) -> float:
        """Share of a step's time that its rows take, from 0 to 1. The rest is the same for any number."""
        cost = self._step_cost.cost or UNKNOWN_COST
        return num_rows * cost.row_s / (cost.overhead_s + num_rows * cost.row_s)

    def drafts(self, request: Request, num_running: int, row_share: float) -> Sequence[int]:
        """Guesses of the request's next tokens.

        None before the first token, with which results come that belong to no other.

        Args:
            row_share: see `Drafter.draft`.
        """
        num_output_tokens = request.num_output_tokens
        if not num_output_tokens:
            return ()
        num_blocks = len(request.blocks) + self._pool.num_free - num_running
        room = num_blocks * self._pool.block_size - request.num_tokens
        most = min(self._max_drafts, request.params.max_tokens - num_output_tokens - 1, room)
        if most <= 0:
            return ()
        if request.drafter is None:
            request.drafter = Drafter(request.prompt_ids, request.prediction_ids)
        known_ids = self._known_ids(request, request.drafter, most) if request.drafter.may_be_known else ()
        return request.drafter.draft(request.token_ids, most, row_share, known_ids)

    def note(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Takes the outcome of a request's drafts."""
        if request.drafter is not None:
            request.drafter.note(num_drafts, num_accepted)

    def learn(self, request: Request, start: int) -> None:
        """Remembers the request's whole blocks, which have keys.

        Args:
            start: tokens from here on were computed since the last call.
        """
        size = self._pool.block_size
        for index in range(max(1, start // size), request.num_computed // size):
            block = request.token_ids[index * size : (index + 1) * size]
            self._texts.note(request.block_keys[index - 1], tuple(block))

    def _known_ids(self, request: Request, drafter: Drafter, most: int) -> Sequence[int]:
        """What followed in an earlier text that is the same up to here. Where none is, none will be later."""
        num_blocks, num_after = divmod(request.num_tokens, self._pool.block_size)
        if not num_blocks:
            return ()
        key = block_keys(self._pool, request, num_blocks)[-1]
        found = self._texts.following(key, request.token_ids[request.num_tokens - num_after :], most)
        drafter.may_be_known = bool(found)
        return found
