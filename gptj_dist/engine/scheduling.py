"""What a scheduler is given, what it makes, keeps and returns. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gptj_dist.engine.beams import Beam
from gptj_dist.engine.plan import Chunk, NewRequest, Plan
from gptj_dist.engine.request import FinishReason, Request
from gptj_dist.params import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one pipeline.

    Args:
        num_stages: micro-batches needed in flight to keep every stage busy.
        num_blocks: KV blocks, of `block_size` tokens each.
        max_batch_size: the most requests that run at once.
        eos_token_ids: tokens that end a text.
        max_chunk_tokens: the most prompt tokens in a micro-batch; None chooses from the measured times of steps.
        shares_memory: whether the stages read their weights from the memory of one machine.
        can_share_blocks: whether several requests can hold the same block, on every stage.
        keeps_prefixes: whether requests begin with what the blocks of earlier ones hold, where blocks can be shared.
        max_drafts: the most drafts of a request in a micro-batch.
    """

    num_stages: int
    num_blocks: int
    block_size: int
    max_batch_size: int
    eos_token_ids: tuple[int, ...]
    max_chunk_tokens: int | None = None
    shares_memory: bool = False
    can_share_blocks: bool = True
    keeps_prefixes: bool = True
    max_drafts: int = 0

    @property
    def max_in_flight(self) -> int:
        """One micro-batch for each stage, and one more to hide the coordinator's own time."""
        return self.num_stages + 1


class TokenOutput(NamedTuple):
    """A new token of a request.

    Args:
        token_id: None if the request generates none.
        finish_reason: comes with the last token; None before.
        logprobs: the token's, if requested.
        embedding: in place of a token, if requested; as `Embedding.data`.
        beams: in place of a token, the texts that a beam search has found, the best first.
        is_draft: whether the token was guessed, and so took no step of its own.
    """

    request: Request
    token_id: int | None
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
    embedding: bytes | None = None
    beams: tuple[Beam, ...] = ()
    is_draft: bool = False


@dataclass(slots=True)
class NextPlan:
    """The plan that is being made.

    Args:
        starts: for each request in it, the number of tokens that were computed before.
    """

    new_requests: list[NewRequest] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    starts: dict[Request, int] = field(default_factory=dict)
    num_decodes: int = 0

    def add(self, request: Request, start: int, drafts: Sequence[int], new_blocks: Sequence[int]) -> None:
        """Adds the request's tokens from `start` up to those that are now computed, and drafts after the last one."""
        stop = request.num_computed
        is_last = request.is_awaiting_token = stop == len(request.token_ids)
        pools = request.params.pooling is not None
        chunk = Chunk(
            request.request_id,
            start,
            (*request.token_ids[start:stop], *drafts),
            tuple(new_blocks),
            samples=is_last and not pools,
            next_id=request.next_prompt_id(stop),
            ends_embedding=is_last and pools,
            num_drafts=len(drafts),
        )
        self.chunks.append(chunk)
        self.starts[request] = start


@dataclass(frozen=True, slots=True)
class InFlight:
    """A plan in flight, and the requests of its chunks by id."""

    plan: Plan
    num_decodes: int
    requests: dict[int, Request]
