"""Going on from the record of a request, with a model: every token and log probability is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace

import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord, new_records
from gptj_dist.params import Grammar, TokenLogprobs

PROMPT = "It was the best of times, it was"
MAX_TOKENS, NUM_CHOICES = 12, 3
KINDS = {
    "greedy": SamplingParams(MAX_TOKENS, temperature=0, logprobs=3),
    "penalties": SamplingParams(
        MAX_TOKENS, temperature=0, presence_penalty=1.5, frequency_penalty=0.7, repetition_penalty=1.4, logprobs=2
    ),
    "seeded": SamplingParams(MAX_TOKENS, seed=5, top_p=0.9, top_k=40, logprobs=0),
    "random": SamplingParams(MAX_TOKENS, temperature=1.3, min_p=0.01),
    "min_tokens": SamplingParams(
        MAX_TOKENS, seed=9, temperature=2.0, min_tokens=8, stop_token_ids=tuple(range(0, 1000, 2)), logprobs=0
    ),
    "bad words": SamplingParams(MAX_TOKENS, seed=2, bad_words=((5, 6), (11,)), logit_bias=((13, 4.0),)),
    "grammar": SamplingParams(MAX_TOKENS, seed=4, structured_outputs=Grammar.json({"type": "object"}), logprobs=0),
    "prompt_logprobs": SamplingParams(MAX_TOKENS, seed=3, prompt_logprobs=1, logprobs=1),
}

Told = list[tuple[int, TokenLogprobs | None]]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", device="cpu", dtype="float32", stages=2) as llm:
        yield llm


async def told(stream: AsyncGenerator[Delta, None], has_prompt_logprobs: bool) -> Told:
    """The tokens of a stream, each with its log probability."""
    deltas = [delta async for delta in stream]
    assert [bool(delta.prompt_logprobs) for delta in deltas] == [has_prompt_logprobs, *[False] * (len(deltas) - 1)]
    return [
        pair
        for delta in deltas
        for pair in zip(delta.token_ids, delta.logprobs or [None] * len(delta.token_ids), strict=True)
    ]


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_from_every_token_on_an_engine_generates_the_same(llm: LLM, params: SamplingParams) -> None:
    records = new_records(llm._encode(PROMPT), params, NUM_CHOICES)

    async def run(records: list[RequestRecord]) -> list[Told]:
        streams = llm._engine.generate_all(records)
        has_prompt_logprobs = params.prompt_logprobs is not None
        return await asyncio.gather(
            *(
                told(stream, has_prompt_logprobs and not record.token_ids)
                for stream, record in zip(streams, records, strict=True)
            )
        )

    whole = llm._loop.run(run(records))
    for cut in range(1, MAX_TOKENS):
        cuts = [min(cut + choice, len(one) - 1) for choice, one in enumerate(whole)]
        cut_records = [
            replace(record, token_ids=tuple(token_id for token_id, _ in one[:place]))
            for record, one, place in zip(records, whole, cuts, strict=True)
        ]
        assert llm._loop.run(run(cut_records)) == [one[place:] for one, place in zip(whole, cuts, strict=True)]
