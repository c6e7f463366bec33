"""Drafts: which of them are accepted, and what becomes of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from gptj_dist.engine.block_pool import BlockPool
from gptj_dist.engine.drafting import Drafting
from gptj_dist.engine.drafts import FIRST_WAIT, LONGEST_WAIT, MAX_DRAFTS, Chance, Drafter, Foretelling, Lookup
from gptj_dist.engine.known_texts import KnownTexts
from gptj_dist.engine.plan import Chunk, Plan, Result
from gptj_dist.engine.prefix import key_after
from gptj_dist.engine.request import Prompt, Request
from gptj_dist.engine.scheduler import Scheduler
from gptj_dist.engine.scheduling import SchedulerConfig
from gptj_dist.params import NO_TOKEN, SamplingParams, TokenLogprobs
from gptj_dist.stages.drafts import accept


def chunk(request_id: int, *token_ids: int, num_drafts: int = 0, samples: bool = True) -> Chunk:
    return Chunk(request_id, 7, token_ids, (), samples, num_drafts=num_drafts)


def logprobs(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, ())


@pytest.mark.parametrize(
    ("sampled", "expected"),
    [
        ([2, 3, 4], [2, 3, 4]),
        ([2, 9, 4], [2, 9]),
        ([9, 3, 4], [9]),
        ([9, 2, 3], [9]),
        ([2, NO_TOKEN, 4], [2, NO_TOKEN]),
    ],
)
def test_drafts_are_accepted_up_to_the_first_that_was_not_sampled(sampled: list[int], expected: list[int]) -> None:
    one, other = chunk(1, 1, 2, 3, num_drafts=2), chunk(2, 5)
    tokens, tops, num_accepted = accept([one, other], [*sampled, 8], ())
    assert (tokens, tops, num_accepted) == ([*expected, 8], (), (len(expected) - 1,))
    plan = Plan(0, (), (), (one, chunk(3, 4, 4, samples=False), other))
    by_chunk = dict(Result(0, tuple(tokens), num_accepted=num_accepted).sampled(plan))
    assert by_chunk == {one: [(token, None) for token in expected], other: [(8, None)]}


def test_log_probabilities_stay_with_their_tokens() -> None:
    tops = (logprobs(2), logprobs(9), logprobs(4), None)
    assert accept([chunk(1, 1, 2, 3, num_drafts=2), chunk(2, 5)], [2, 9, 4, 8], tops) == (
        [2, 9, 8],
        (logprobs(2), logprobs(9), None),
        (1,),
    )


@pytest.mark.parametrize("num_accepted", [(), (0,), (2,)])
def test_a_result_with_tokens_of_no_row_is_refused(num_accepted: tuple[int, ...]) -> None:
    plan = Plan(0, (), (), (chunk(1, 1, 2, 3, num_drafts=2),))
    with pytest.raises(ValueError, match="plan 0 has 2 tokens"):
        Result(0, (2, 3), num_accepted=num_accepted).sampled(plan)


# What is guessed


def following(text: Sequence[int], most: int = 4, before: Sequence[int] = ()) -> list[int]:
    lookup = Lookup(before)
    lookup.extend(text)
    return lookup.following(most)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((1, 2, 3, 4, 5, 6, 1, 2), [3, 4, 5, 6]),
        ((9, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2), [4, 9, 7, 1]),
        ((7, 9, 1, 2, 3, 9, 8, 1, 2, 4, 5, 9, 1, 2), [3, 9, 8, 1]),
        ((5, 6, 7, 5, 6, 7, 5, 6), [7, 5, 6, 7]),
        ((3, 3, 3), [3, 3, 3, 3]),
        ((1, 2, 3, 4, 2, 1), []),
        ((1,), []),
        ((), []),
    ],
    ids=["once", "the latest", "the longest", "goes on", "one token", "no pair", "short", "empty"],
)
def test_what_followed_the_same_tokens_before_is_guessed(text: Sequence[int], expected: list[int]) -> None:
    assert following(text) == expected


def test_another_text_is_searched_up_to_its_end() -> None:
    assert following((8, 1, 2), before=(1, 2, 3, 4)) == [3, 4]
    assert following((1, 2, 9, 1, 2), before=(1, 2, 3, 4)) == [9, 1, 2, 9]


def test_a_text_that_grows_is_searched_as_a_whole() -> None:
    grown = Lookup()
    text = [(number * number) % 7 for number in range(60)]
    for number in range(len(text)):
        grown.extend(text[number : number + 1])
        assert grown.following(5) == following(text[: number + 1], 5)
    assert grown.num_tokens == 60


def test_a_prediction_follows_the_prompt() -> None:
    drafter = Drafter((1, 2, 3), (4, 5, 6, 7))
    assert list(drafter.draft([1, 2, 3, 4], 8, 0.01)) == [5, 6, 7]


def test_what_followed_in_an_earlier_text_is_known_as_long_as_it_is_remembered() -> None:
    texts, first, second = KnownTexts(max_blocks=2), key_after(b"", (1, 2, 3)), key_after(b"", (7, 7, 7))
    texts.note(first, (4, 5, 6))
    texts.note(key_after(first, (4, 5, 6)), (7, 8, 9))
    assert texts.following(first, (), 9) == [4, 5, 6, 7, 8, 9]
    assert texts.following(first, (4, 5), 2) == [6, 7]
    assert texts.following(first, (4, 6), 2) == texts.following(second, (), 2) == []
    texts.note(second, (1, 1, 1))
    assert texts.following(second, (1,), 9) == [1, 1]
    assert texts.following(first, (), 9) == []


@pytest.mark.parametrize(("salt", "num_steps"), [(None, 5), ("another", 20)])
def test_a_prompt_that_comes_again_is_continued_with_the_earlier_text(salt: str | None, num_steps: int) -> None:
    """No token of the text comes twice."""
    text, num_prompt_tokens = tuple(range(1, 27)), 6
    scheduler = Scheduler(SchedulerConfig(1, 100, 4, 8, (0,), max_drafts=MAX_DRAFTS))

    def steps(request: Request) -> int:
        scheduler.add(request)
        num_steps = num_drafted = 0
        while scheduler.has_requests:
            num_steps += 1
            plan = scheduler.schedule()
            assert plan is not None
            [only] = plan.chunks
            rest = text[only.start + only.num_known :]
            assert only.drafts == rest[: only.num_drafts]
            accepted = (only.num_drafts,) if only.drafts else ()
            outputs = scheduler.update(Result(plan.plan_id, rest[: only.num_drafts + 1], num_accepted=accepted))
            assert [output.is_draft for output in outputs] == [True] * sum(accepted) + [False]
            num_drafted += sum(accepted)
            scheduler.check_integrity()
        assert tuple(request.token_ids) == text
        assert num_drafted + num_steps == len(text) - num_prompt_tokens
        return num_steps

    params = SamplingParams(max_tokens=len(text) - num_prompt_tokens)
    assert steps(Request(0, Prompt(text[:num_prompt_tokens]), params, 0)) == 20
    assert steps(Request(1, Prompt(text[:num_prompt_tokens]), replace(params, cache_salt=salt), 0)) == num_steps


# How many


def test_success_makes_more_drafts_and_failure_fewer() -> None:
    chance = Chance()
    first = chance.num_worthwhile(0.08)
    chance.note(first, first)
    more = chance.num_worthwhile(0.08)
    assert 0 < first < more
    for _ in range(8):
        chance.note(more, more)
    assert chance.num_worthwhile(0.08) == MAX_DRAFTS
    for _ in range(3):
        chance.note(MAX_DRAFTS, 0)
    assert chance.num_worthwhile(0.08) < MAX_DRAFTS


def test_dear_rows_take_more_reliable_drafts() -> None:
    chance = Chance()
    chance.note(8, 7)
    numbers = [chance.num_worthwhile(share) for share in (0.02, 0.1, 0.5, 0.9)]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > numbers[-1] == 0


@pytest.mark.parametrize("row_share", [0.05, 0.3, 0.75])
def test_drafts_that_are_never_accepted_are_tried_ever_more_rarely(row_share: float) -> None:
    chance, tries = Chance(), []
    for number in range(20_000):
        if num_drafts := chance.num_worthwhile(row_share):
            chance.note(num_drafts, 0)
            tries.append(number)
    gaps = [after - before for before, after in pairwise(tries)]
    assert gaps == sorted(gaps)
    assert min(gap for gap in gaps if gap > 1) >= FIRST_WAIT * row_share, "a trial costs half a percent at most"
    assert gaps[-1] == LONGEST_WAIT * row_share
    chance.note(1, 1)
    assert chance.wait == FIRST_WAIT


def test_rows_of_prompts_do_not_make_drafts_look_cheap() -> None:
    drafting = Drafting(MAX_DRAFTS, BlockPool(100, 4))
    before = drafting.row_share(16)
    tokens = Plan(0, (), (), tuple(chunk(number, 1) for number in range(16)))
    prompt = Plan(0, (), (), (chunk(0, *range(500), samples=False),))
    for _ in range(20):
        drafting.observe(tokens, 0.02)
        drafting.observe(prompt, 0.03)
    assert drafting.row_share(16) == pytest.approx(before)
    drafted = Plan(0, (), (), tuple(chunk(number, 1, 2, num_drafts=1) for number in range(16)))
    for _ in range(20):
        drafting.observe(tokens, 0.02)
        drafting.observe(drafted, 0.038)
    assert drafting.row_share(16) == pytest.approx(0.9)


# What a prediction foretold


@pytest.mark.parametrize(
    ("text", "expected"),
    [((1, 2, 3, 4, 5), 5), ((1, 9, 3, 4, 5), 2), ((9, 3, 4, 5), 1), ((9, 8), 0), ((1, 2, 3, 4, 5, 1, 2, 3), 6)],
)
def test_tokens_that_follow_in_the_prediction_are_foretold(text: Sequence[int], expected: int) -> None:
    foretelling = Foretelling((1, 2, 3, 4, 5))
    assert sum(foretelling.count((token_id,)) for token_id in text) == expected
    assert Foretelling((1, 2, 3, 4, 5)).count(text) == expected


def test_without_a_prediction_nothing_is_foretold() -> None:
    assert Foretelling(()).count((1, 2)) == 0
