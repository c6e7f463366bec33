"""The messages between the coordinator and the stages: a plan goes out, a result comes back. Plain data.

A plan carries a new request in full once and only the difference later. Every stage sees the plans in the same order,
so a block that one plan releases may be written by the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from gptj_dist.params import Continuation, SamplingParams, TokenLogprobs


class KVPrefix(NamedTuple):
    """The KV that a request begins with: of its first tokens, which other requests have had before.

    Args:
        source_id: a request of the same prompt; all stages have computed its KV in earlier plans. None if the blocks
            hold everything.
        num_tokens: number of positions, from 0 on.
        blocks: KV blocks that lie wholly within these positions, and that earlier plans have computed. Nobody writes to
            them any more. The stages copy the rest from the source.
        token_ids: the tokens at these positions if there is no source.
    """

    source_id: int | None
    num_tokens: int
    blocks: tuple[int, ...]
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What a stage needs of a request: to sample its tokens, to compute its embedding, and to log it.

    Args:
        request_id: unique within the pipeline.
        params: the request's parameters.
        noise_key: 64 bits; with the position of a token they determine the noise that samples it.
        num_prompt_tokens: positions below this belong to the prompt.
        log_id: the request's name in logs; None for one that is not logged.
        begins_with: KV that is there already; the first chunk starts after it. None if there is none.
    """

    request_id: int
    params: SamplingParams
    noise_key: int
    num_prompt_tokens: int
    log_id: str | None = None
    begins_with: KVPrefix | None = None


class Chunk(NamedTuple):
    """A run of tokens of one request, to be computed in one micro-batch.

    Args:
        start: position of the first token.
        token_ids: the tokens, one or more, and then the drafts.
        new_blocks: KV blocks that are added to the request's with this chunk; no other request holds them.
        samples: whether the logits of the last token are to be sampled, and those of each draft.
        next_id: the prompt's token after the chunk, if its log probability is requested; else None.
        ends_embedding: whether the request's embedding is complete after this chunk.
        num_drafts: of `token_ids`, the last ones that are drafts: guesses of the tokens to be sampled.
    """

    request_id: int
    start: int
    token_ids: tuple[int, ...]
    new_blocks: tuple[int, ...]
    samples: bool
    next_id: int | None = None
    ends_embedding: bool = False
    num_drafts: int = 0

    @property
    def num_known(self) -> int:
        """Tokens that are no drafts."""
        return len(self.token_ids) - self.num_drafts

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.token_ids[self.num_known :]


@dataclass(frozen=True, slots=True)
class Plan:
    """One micro-batch.

    A stage drops the `released` requests, adds the `new_requests`, gives them and the `chunks` their blocks, copies
    the KV that new requests begin with, and then computes all chunks.

    Args:
        is_lone: no other plan is in flight, and until this one's result none follows, unless requests arrive.
    """

    plan_id: int
    released: tuple[int, ...]
    new_requests: tuple[NewRequest, ...]
    chunks: tuple[Chunk, ...]
    is_lone: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class StageTiming(NamedTuple):
    """When a stage began a plan and when its output was ready, in nanoseconds of its `SteadyClock`."""

    begin_ns: int
    end_ns: int


class PromptLogprobs(NamedTuple):
    """Log probabilities of consecutive tokens of a request's prompt, from position `start` on."""

    request_id: int
    start: int
    tokens: tuple[TokenLogprobs, ...]


class Embedding(NamedTuple):
    """A request's embedding: `d_model` float32 numbers as bytes."""

    request_id: int
    data: bytes


class Continuations(NamedTuple):
    """How a beam may go on, as `BeamSearch.step` takes it."""

    request_id: int
    tokens: tuple[Continuation, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a plan.

    Args:
        token_ids: the sampled tokens of each chunk with `samples`, in the plan's order: its accepted drafts, and the
            token after them.
        timings: one for each stage, first to last; empty if the executor does not measure.
        logprobs: one for each of `token_ids`, None where it was not requested; empty if none was requested.
        prompt_logprobs: one for each chunk whose tokens' log probabilities were requested.
        embeddings: one for each chunk with `ends_embedding`.
        continuations: one for each chunk with `samples` of a beam search; its sampled token does not count.
        num_accepted: for each chunk with drafts, how many of them, from the first on, are what was sampled.
    """

    plan_id: int
    token_ids: tuple[int, ...]
    timings: tuple[StageTiming, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    continuations: tuple[Continuations, ...] = ()
    num_accepted: tuple[int, ...] = ()

    def sampled(self, plan: Plan) -> Iterator[tuple[Chunk, list[tuple[int, TokenLogprobs | None]]]]:
        """Each chunk with `samples`, and its tokens with their log probabilities.

        Raises:
            ValueError: the result has tokens of more or fewer chunks than the plan.
        """
        chunks = [chunk for chunk in plan.chunks if chunk.samples]
        accepted = iter(self.num_accepted)
        counts = [1 + next(accepted, 0) if chunk.num_drafts else 1 for chunk in chunks]
        if sum(counts) != len(self.token_ids):
            raise ValueError(f"plan {self.plan_id} has {len(self.token_ids)} tokens for {sum(counts)} rows")
        tokens = zip(self.token_ids, self.logprobs or (None,) * len(self.token_ids), strict=True)
        return ((chunk, list(islice(tokens, count))) for chunk, count in zip(chunks, counts, strict=True))
