"""Sampling controls against transformers' processors and against their definitions; log probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from gptj_dist.model.controls import apply_controls
from gptj_dist.model.logprobs import token_logprobs
from gptj_dist.model.sampler import Sampler, SampleSpec
from gptj_dist.params import SamplingParams
from gptj_dist.token_rules import TokenRules

VOCAB_SIZE = 40
EOS = 0
HISTORY = (3, 5, 5, 7, 3, 9, 11, 9, 9)
NUM_PROMPT = 4
NONE = SamplingParams(temperature=0)
SPEC = SampleSpec(NONE, noise_key=1, position=9, num_prompt_tokens=NUM_PROMPT)


def logits_of(seed: int = 0) -> Tensor:
    return 3 * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def ours(params: SamplingParams, seed: int = 0) -> Tensor:
    row = logits_of(seed)
    apply_controls(row, params, HISTORY, NUM_PROMPT)
    return row


def theirs(processor: object, seed: int = 0) -> Tensor:
    assert callable(processor)
    row: Tensor = processor(torch.tensor([HISTORY]), logits_of(seed)[None])[0]
    return row


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty))
    torch.testing.assert_close(ours(replace(NONE, repetition_penalty=penalty)), expected)


@pytest.mark.parametrize("last", [-1, 0, 1, 3, len(HISTORY), 1000])
def test_the_repetition_penalty_takes_the_last_tokens(last: int) -> None:
    settings = replace(NONE, repetition_penalty=1.7, repetition_penalty_range=last)
    row = logits_of(0)
    apply_controls(row, replace(NONE, repetition_penalty=1.7), HISTORY[-last:] if last > 0 else HISTORY, 0)
    torch.testing.assert_close(ours(settings), row)


def test_biases_are_transformers() -> None:
    expected = theirs(SequenceBiasLogitsProcessor([[[3], 1.5], [[8], -2.5]]))
    torch.testing.assert_close(ours(replace(NONE, logit_bias=((3, 1.5), (8, -2.5)))), expected)


@pytest.mark.parametrize("words", [((4,),), ((9, 9, 9, 6),), ((9, 9, 6), (9, 7), (11, 9, 6), (2,), (8, 9, 9, 20))])
def test_bad_words_are_transformers(words: tuple[tuple[int, ...], ...]) -> None:
    expected = theirs(NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=EOS))
    torch.testing.assert_close(ours(replace(NONE, bad_words=words)), expected)


def test_a_bad_word_longer_than_the_text_is_not_there_yet() -> None:
    row = logits_of()
    apply_controls(row, replace(NONE, bad_words=((1, 2, 3, 4),)), (2, 3), 2)
    assert torch.equal(row, logits_of())


def test_allowed_tokens_suppress_all_others() -> None:
    expected = theirs(SuppressTokensLogitsProcessor([id_ for id_ in range(VOCAB_SIZE) if id_ not in (2, 30)], "cpu"))
    torch.testing.assert_close(ours(replace(NONE, allowed_token_ids=(30, 2))), expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    expected = logits_of()
    for token_id, count in ((3, 1), (9, 3), (11, 1)):  # OpenAI's formula
        expected[token_id] -= 0.25 * count + 1.5
    torch.testing.assert_close(ours(replace(NONE, frequency_penalty=0.25, presence_penalty=1.5)), expected)


def test_all_together_come_in_the_stated_order() -> None:
    """What is ruled out, then biases, then penalties; transformers' processors are called in that order."""
    allowed = (3, 5, 6, 9, 20, 30)
    processors = [
        SuppressTokensLogitsProcessor([id_ for id_ in range(VOCAB_SIZE) if id_ not in allowed], "cpu"),
        NoBadWordsLogitsProcessor([[9, 6], [20]], eos_token_id=EOS),
        SequenceBiasLogitsProcessor([[[3], 4.0], [[9], -6.0], [[30], 2.0]]),
        RepetitionPenaltyLogitsProcessor(1.4),
    ]
    expected = logits_of()[None]
    for processor in processors:
        expected = processor(torch.tensor([HISTORY]), expected)
    for token_id, count in ((3, 1), (9, 3), (11, 1)):
        expected[0, token_id] -= 0.25 * count - 0.5
    params = replace(
        NONE,
        allowed_token_ids=allowed,
        bad_words=((9, 6), (20,)),
        logit_bias=((3, 4.0), (9, -6.0), (30, 2.0)),
        repetition_penalty=1.4,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
    )
    torch.testing.assert_close(ours(params), expected[0])


@pytest.mark.parametrize(("presence", "frequency"), [(1.0, 0.0), (0.0, 1.0), (-2.0, 0.5)])
def test_a_repeated_token_comes_as_often_as_its_penalties_leave_it(presence: float, frequency: float) -> None:
    """Of two tokens with equal logits one has come twice: the sigmoid of what it has lost is its chance."""
    chance = 1 / (1 + math.exp(presence + 2 * frequency))
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    num_draws = 20_000
    specs = [SampleSpec(params, noise_key=1, position=position, history=(1, 1)) for position in range(num_draws)]
    drawn = int(Sampler(TokenRules(2), torch.device("cpu")).draw(torch.zeros(num_draws, 2), specs).sum())
    deviation = math.sqrt(num_draws * chance * (1 - chance))
    assert abs(drawn - num_draws * chance) < 3.3 * deviation  # a right sampler fails this once in 1,000 times


def test_tokens_that_end_a_request_do_not_come_early() -> None:
    """The logits are those that the sampler has changed."""
    params = replace(NONE, stop_token_ids=(4, 6), min_tokens=6)
    for position, expected in ((9, [EOS, 4, 6]), (10, [])):
        logits = logits_of()[None]
        spec = replace(SPEC, params=params, position=position)
        Sampler(TokenRules(VOCAB_SIZE, (EOS,)), torch.device("cpu")).draw(logits, [spec])
        assert (logits[0] == -math.inf).nonzero().flatten().tolist() == expected


def test_each_row_is_sampled_by_its_own_controls_and_told_of_what_the_model_said() -> None:
    logits = torch.stack([logits_of(seed) for seed in range(4)])
    specs = [
        replace(SPEC, params=replace(NONE, allowed_token_ids=(17,), logprobs=2)),
        SPEC,
        replace(SPEC, params=replace(NONE, logit_bias=((23, 100.0),), logprobs=0)),
        replace(SPEC, params=replace(NONE, repetition_penalty=1.5), history=HISTORY),
    ]
    tokens, told = Sampler(TokenRules(VOCAB_SIZE, (EOS,)), torch.device("cpu")).sample_with_logprobs(
        logits.clone(), specs
    )
    repeated = logits[3].clone()
    apply_controls(repeated, replace(NONE, repetition_penalty=1.5), HISTORY, NUM_PROMPT)
    assert tokens == [17, int(logits[1].argmax()), 23, int(repeated.argmax())]
    assert [token is None for token in told] == [False, True, False, True]
    for row, token_id, num_top in ((0, 17, 2), (2, 23, 0)):
        token = told[row]
        assert token is not None
        assert token.token_id == token_id
        assert token.logprob == pytest.approx(logits[row].log_softmax(-1)[token_id].item(), abs=1e-6)
        assert len(token.top) == num_top


def test_nobody_is_told_what_nobody_asked_for() -> None:
    _, told = Sampler(TokenRules(VOCAB_SIZE, (EOS,)), torch.device("cpu")).sample_with_logprobs(
        logits_of()[None], [SPEC]
    )
    assert told == ()


def test_logprobs_are_log_softmax_with_ranks() -> None:
    logits = torch.stack([logits_of(seed) for seed in range(3)])
    expected = torch.log_softmax(logits.double(), -1)
    told = token_logprobs(logits, [4, 9, int(logits[2].argmax())], [3, 0, VOCAB_SIZE])
    for row, token in enumerate(told):
        order = expected[row].argsort(descending=True).tolist()
        assert token.logprob == pytest.approx(expected[row, token.token_id].item(), abs=1e-6)
        assert order[token.rank - 1] == token.token_id
        assert [id_ for id_, _ in token.top] == order[: len(token.top)]
        assert [logprob for _, logprob in token.top] == pytest.approx(expected[row][order[: len(token.top)]].tolist())
    assert [len(token.top) for token in told] == [3, 0, VOCAB_SIZE]
