"""Drafts: which of them are accepted, and what becomes of their tokens."""

from __future__ import annotations

import pytest

from gptj_dist.engine.plan import Chunk, Plan, Result
from gptj_dist.params import NO_TOKEN, TokenLogprobs
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
