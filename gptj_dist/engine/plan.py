"""What crosses the border between the coordinator and the stages: one plan out, one result back. Plain data.

A plan carries a new request in full once and only the difference later. Every stage sees the plans in the same order,
so a block that one plan releases may be written by the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gptj_dist.params import SamplingParams, TokenLogprobs


class PromptCopy(NamedTuple):
    """The beginning of a request's KV, for another request of the same prompt.

    Args:
        request_id: whose KV; all stages have computed it by earlier plans.
        num_tokens: the positions from 0 on that are taken over.
        blocks: KV blocks that lie wholly within them and that both requests hold from now on; neither writes to them.
            What lies behind is copied.
    """

    request_id: int
    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What stages need to know of a request: to sample for it, to make its embedding, and to log it.

    Args:
        request_id: unique in the life of the pipeline.
        params: the request's own, unchanged.
        noise_key: 64 bits; with the position of a token they determine the noise that samples it.
        num_prompt_tokens: positions below this belong to the prompt.
        log_id: the request's name in logs; None for one that is not logged.
        begins_with: KV that need not be computed; the first chunk starts after it. None if there is none.
    """

    request_id: int
    params: SamplingParams
    noise_key: int
    num_prompt_tokens: int
    log_id: str | None = None
    begins_with: PromptCopy | None = None


class Chunk(NamedTuple):
    """A run of tokens of one request, to be computed in one micro-batch.

    Args:
        start: position of the first token.
        token_ids: the tokens, one or more.
        new_blocks: KV blocks that the request alone gets with this chunk, behind those it has.
        samples: whether the last token's logits are to be sampled.
        next_id: the token behind the chunk, where its log probability is wanted.
        tells_embedding: whether the request's embedding is complete with this chunk.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    new_blocks: tuple[int, ...]
    samples: bool
    next_id: int | None = None
    tells_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """One micro-batch.

    `released` requests are forgotten, `new_requests` are met, they and the `chunks` get their blocks, what they begin
    with is copied, and then all chunks are computed.
    """

    plan_id: int
    released: tuple[int, ...]
    new_requests: tuple[NewRequest, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class StageTiming(NamedTuple):
    """When a stage took up a plan and when its output was ready to leave, in nanoseconds of its `SteadyClock`."""

    begin_ns: int
    end_ns: int


class PromptLogprobs(NamedTuple):
    """Those of some tokens of a request's prompt, one behind the other from position `start` on."""

    request_id: int
    start: int
    tokens: tuple[TokenLogprobs, ...]


class Embedding(NamedTuple):
    """A request's: `d_model` float32 numbers, byte by byte."""

    request_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a plan.

    Args:
        token_ids: what the last stage sampled: one for each chunk with `samples`, in the plan's order.
        timings: of every stage, first to last; empty where nobody measures.
        logprobs: one for each of `token_ids`, None where it was not asked for; empty if it was for none.
        prompt_logprobs: of the plan's chunks, where it was asked for.
        embeddings: one for each chunk that tells one.
    """

    plan_id: int
    token_ids: tuple[int, ...]
    timings: tuple[StageTiming, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
