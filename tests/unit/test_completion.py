"""From tokens to text: the same text and the same tokens, however the engine's deltas happen to be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

import pytest

import gptj_dist
from gptj_dist.answers.completion import TextDelta, stream_text
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import StageFailedError
from gptj_dist.params import SamplingParams
from gptj_dist.text.tokenizer import Tokenizer

TEXT = "The king said no, and no it was."
FULL_LENGTH = FinishReason.LENGTH


@dataclass(slots=True)
class Source:
    """Deltas as an engine gives them, and what became of them."""

    deltas: Sequence[Delta]
    num_taken: int = field(init=False, default=0)
    is_closed: bool = field(init=False, default=False)

    async def stream(self) -> AsyncGenerator[Delta, None]:
        try:
            for delta in self.deltas:
                self.num_taken += 1
                yield delta
        finally:
            self.is_closed = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole completion."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(gptj_dist.__file__).parent / "demo")


def all_cuts(token_ids: Sequence[int], reason: FinishReason = FULL_LENGTH) -> Iterator[list[Delta]]:
    """Every way in which an engine may deliver the tokens."""
    for num_cuts in range(len(token_ids)):
        for borders in combinations(range(1, len(token_ids)), num_cuts):
            spans = list(pairwise((0, *borders, len(token_ids))))
            yield [Delta(tuple(token_ids[i:j]), reason if j == len(token_ids) else None) for i, j in spans]


def one_by_one(token_ids: Sequence[int], reason: FinishReason = FULL_LENGTH) -> list[Delta]:
    return list(all_cuts(token_ids, reason))[-1]


async def text_deltas(source: Source, tokenizer: Tokenizer, params: SamplingParams) -> list[TextDelta]:
    return [delta async for delta in stream_text(source.stream(), tokenizer, params)]


def complete(deltas: Sequence[Delta], tokenizer: Tokenizer, params: SamplingParams) -> Outcome:
    source = Source(deltas)
    parts = asyncio.run(text_deltas(source, tokenizer, params))
    assert source.is_closed
    assert all(part.finish_reason is None for part in parts[:-1])
    token_ids = tuple(token_id for part in parts for token_id in part.token_ids)
    return Outcome("".join(part.text for part in parts), token_ids, parts[-1].finish_reason)


def expected_outcome(token_ids: Sequence[int], tokenizer: Tokenizer, params: SamplingParams) -> Outcome:
    """By looking at ever longer prefixes. For tokens that are whole characters, and one stop string at a time."""
    head = tokenizer.decode(token_ids[: params.min_tokens])
    for count in range(params.min_tokens + 1, len(token_ids) + 1):
        tail = tokenizer.decode(token_ids[params.min_tokens : count])
        ends = [(tail.index(stop) + len(stop), -len(stop)) for stop in params.stop if stop in tail]
        if ends:
            end, negative_length = min(ends)
            return Outcome(head + tail[: end + negative_length], tuple(token_ids[:count]), FinishReason.STOP)
    return Outcome(tokenizer.decode(token_ids), tuple(token_ids), FULL_LENGTH)


@pytest.mark.parametrize(
    "stop",
    [(), ("no",), ("no, and", "said x"), ("ng sa",), ("was.",), ("T",), ("zebra",), ("no it", "o i", "it was")],
)
@pytest.mark.parametrize("min_tokens", [0, 1, 5, 8])
def test_text_and_tokens_do_not_depend_on_how_deltas_are_cut(
    stop: tuple[str, ...], min_tokens: int, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT)[:12]
    assert len(token_ids) >= 8
    params = SamplingParams(max_tokens=64, stop=stop, min_tokens=min_tokens)
    expected = expected_outcome(token_ids, tokenizer, params)
    outcomes = {complete(deltas, tokenizer, params) for deltas in list(all_cuts(token_ids))[::7]}
    assert outcomes == {expected}


def test_characters_of_several_tokens_do_not_depend_on_how_deltas_are_cut(tokenizer: Tokenizer) -> None:
    text = "é€🌈"
    token_ids = tokenizer.encode(text)
    assert len(token_ids) > len(text)
    assert {complete(deltas, tokenizer, SamplingParams()) for deltas in all_cuts(token_ids)} == {
        Outcome(text, tuple(token_ids), FULL_LENGTH)
    }
    stopped = {complete(deltas, tokenizer, SamplingParams(stop=("€",))) for deltas in all_cuts(token_ids)}
    assert [(outcome.text, outcome.finish_reason) for outcome in stopped] == [("é", FinishReason.STOP)]
    [outcome] = stopped
    assert tokenizer.decode(outcome.token_ids) == "é€"


def test_an_output_that_ends_within_a_character_ends_with_the_replacement_character(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a🌈")[:-1]
    outcomes = {complete(deltas, tokenizer, SamplingParams()) for deltas in all_cuts(token_ids)}
    assert outcomes == {Outcome("a\N{REPLACEMENT CHARACTER}", tuple(token_ids), FULL_LENGTH)}


def test_text_held_back_for_a_stop_string_comes_with_the_last_delta(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("said no")
    source = Source(one_by_one(token_ids))
    parts = asyncio.run(text_deltas(source, tokenizer, SamplingParams(stop=("no way",))))
    assert "n" not in "".join(part.text for part in parts[:-1])
    assert "".join(part.text for part in parts) == "said no"
    assert tuple(token_id for part in parts for token_id in part.token_ids) == tuple(token_ids)


def test_a_delta_never_waits_for_the_next_and_carries_its_own_tokens(tokenizer: Tokenizer) -> None:
    deltas = one_by_one(tokenizer.encode(TEXT)[:8])
    parts = asyncio.run(text_deltas(Source(deltas), tokenizer, SamplingParams()))
    assert [part.token_ids for part in parts] == [delta.token_ids for delta in deltas]
    assert [part.text for part in parts] == [tokenizer.decode(delta.token_ids) for delta in deltas]


def test_the_end_of_text_token_is_counted_and_has_no_text(tokenizer: Tokenizer) -> None:
    token_ids = [*tokenizer.encode("said no"), 0]
    outcomes = {complete(deltas, tokenizer, SamplingParams()) for deltas in all_cuts(token_ids, FinishReason.STOP)}
    assert outcomes == {Outcome("said no", tuple(token_ids), FinishReason.STOP)}


def test_a_stop_string_ends_the_text_and_closes_the_deltas_before_another_is_taken(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(TEXT)
    source = Source([Delta((token_id,), None) for token_id in token_ids])
    parts = asyncio.run(text_deltas(source, tokenizer, SamplingParams(stop=("said",))))
    assert "".join(part.text for part in parts) == "The king "
    assert source.num_taken == sum(len(part.token_ids) for part in parts) < len(token_ids)
    assert source.is_closed


def test_a_stop_string_completed_by_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("said no")
    outcome = complete(one_by_one(token_ids), tokenizer, SamplingParams(stop=("no",)))
    assert outcome == Outcome("said ", tuple(token_ids), FinishReason.STOP)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("stop", ["<|endoftext|>", "no<|endoftext|>", "<|endoftext|> was", "no was"])
def test_the_names_of_special_tokens_complete_stop_strings_though_they_are_left_out(
    tokenizer: Tokenizer, stop: str, keeps: bool
) -> None:
    token_ids = [*tokenizer.encode("said no"), 0, *tokenizer.encode(" was so")]
    params = SamplingParams(stop=(stop,), ignore_eos=True, include_stop_str_in_output=keeps)
    outcomes = {complete(deltas, tokenizer, params) for deltas in all_cuts(token_ids)}
    [outcome] = outcomes
    head = {"<": "said no", "n": "said "}[stop[0]]
    assert (outcome.text, outcome.finish_reason) == (head + (stop if keeps else ""), FinishReason.STOP)


def test_a_special_token_within_min_tokens_completes_no_stop_string(tokenizer: Tokenizer) -> None:
    token_ids = [0, *tokenizer.encode("said"), 0, *tokenizer.encode("no")]
    params = SamplingParams(stop=("<|endoftext|>",), min_tokens=1, ignore_eos=True)
    assert {complete(deltas, tokenizer, params) for deltas in all_cuts(token_ids)} == {
        Outcome("said", tuple(token_ids[: token_ids.index(0, 1) + 1]), FinishReason.STOP)
    }


def test_closing_the_text_closes_the_deltas(tokenizer: Tokenizer) -> None:
    source = Source(one_by_one(tokenizer.encode(TEXT)[:8]))

    async def scenario() -> None:
        async with aclosing(stream_text(source.stream(), tokenizer, SamplingParams())) as texts:
            await anext(texts)
        assert source.is_closed
        assert source.num_taken == 1

    asyncio.run(scenario())


def test_a_failure_of_the_deltas_reaches_the_reader_of_the_text(tokenizer: Tokenizer) -> None:
    async def failing() -> AsyncGenerator[Delta, None]:
        yield Delta(tuple(tokenizer.encode("said no")), None)
        raise StageFailedError("stage 1 died")

    async def scenario() -> None:
        texts = stream_text(failing(), tokenizer, SamplingParams())
        assert (await anext(texts)).text == "said no"
        with pytest.raises(StageFailedError):
            await anext(texts)

    asyncio.run(scenario())
