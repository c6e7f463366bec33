"""Requests that take a prompt's KV over from another have the bits, in float32, of those that compute it themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gptj_dist import LLM, SamplingParams
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import new_records
from gptj_dist.model import kv_cache
from gptj_dist.params import TokenLogprobs

LONG = "The state of the Union is as strong as it was, and the people of this country are at work in the fields. " * 2
PROMPTS = (LONG, [7] * 16, list(range(300, 317)), [9], [5, 6], "Once there was a captain")
"""Of a token, of a block, of one more, and longer than some chunks."""

PARAMS = SamplingParams(max_tokens=9, seed=3, n=3, ignore_eos=True, logprobs=2)
PENALTIES = replace(PARAMS, repetition_penalty=1.2, presence_penalty=0.3, bad_words=((7, 7),))
TELLING = replace(PARAMS, prompt_logprobs=1)
BRIEF = replace(PARAMS, max_tokens=1)
ALL_PARAMS = (PARAMS, PENALTIES, TELLING, BRIEF)


@dataclass(frozen=True)
class Told:
    """What the engine told of one completion: log probabilities are as good as logits, bit for bit."""

    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]


async def collect(stream: AsyncGenerator[Delta, None]) -> Told:
    deltas = [delta async for delta in stream]
    return Told(tuple(token for delta in deltas for token in delta.logprobs), deltas[0].prompt_logprobs)


def together(llm: LLM, params: SamplingParams) -> list[Told]:
    """All completions of all prompts at once."""

    async def run() -> list[Told]:
        streams = [
            stream
            for prompt in PROMPTS
            for stream in llm._engine.generate_all(new_records(llm._encode(prompt), params, params.n))
        ]
        return await asyncio.gather(*map(collect, streams))

    return llm._loop.run(run())


def alone(llm: LLM, params: SamplingParams) -> list[Told]:
    """The same, one after the other."""

    async def run() -> list[Told]:
        return [
            await collect(llm._engine.generate(llm._encode(prompt), params, choice))
            for prompt in PROMPTS
            for choice in range(params.n)
        ]

    return llm._loop.run(run())


def start(**settings: Any) -> LLM:
    return LLM("demo", device="cpu", dtype="float32", **settings)


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[SamplingParams, list[Told]]]:
    with start() as llm:
        yield {params: alone(llm, params) for params in ALL_PARAMS}


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": 1},
        {"stages": 2, "max_chunk_tokens": 5},
        {"stages": 3},
        {"stages": 3, "max_chunk_tokens": 1, "max_batch_size": 3},
        {"stages": 2, "kv_cache_gb": 0.004},
    ],
    ids=str,
)
def test_the_cut_chunks_few_requests_at_once_and_preemption_change_no_bit(
    settings: dict[str, Any], expected: dict[SamplingParams, list[Told]]
) -> None:
    with start(**settings) as llm:
        for params in ALL_PARAMS:
            assert together(llm, params) == expected[params]
        assert (llm._engine.scheduler.num_preemptions > 0) == ("kv_cache_gb" in settings)


def test_without_a_compiler_regions_are_copied_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against requests that have a region each: another attention has other bits."""
    monkeypatch.setattr(kv_cache, "load_library", lambda: None)
    with start(stages=2, max_chunk_tokens=20) as llm:
        assert not any(report.has_blocks for report in llm.pipeline.reports)
        assert together(llm, TELLING) == alone(llm, TELLING)


def test_a_prompt_whose_first_request_is_left_in_the_middle_is_computed_by_the_next(
    expected: dict[SamplingParams, list[Told]],
) -> None:
    with start(stages=2, max_chunk_tokens=5) as llm:

        async def run() -> Sequence[Told]:
            streams = llm._engine.generate_all(new_records(llm._encode(LONG), TELLING, TELLING.n))
            collecting = [asyncio.ensure_future(collect(stream)) for stream in streams]
            while not llm._engine.scheduler.num_used_blocks:  # noqa: ASYNC110  # what is looked at sets no events
                await asyncio.sleep(0)
            collecting[0].cancel()
            return await asyncio.gather(*collecting[1:])

        assert llm._loop.run(run()) == expected[TELLING][1 : TELLING.n]
        computed = sum(record.num_prefill_tokens for record in llm._engine.stats.records())
        assert computed < 2 * len(llm._encode(LONG))
