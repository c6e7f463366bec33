"""Sampling settings: what they accept, what they refuse, and by which name."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, RequestTooLongError, StageFailedError
from gptj_dist.params import SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tokens": 0},
        {"max_tokens": 1},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 10},
        {"logit_bias": ((5, 100), (6, -100.0))},
        {"allowed_token_ids": (1,)},
        {"bad_words": ((1,), (2, 3))},
        {"stop_token_ids": (1, 2)},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"temperature": 0},
        {"temperature": 100.0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_p": 0},
        {"top_k": -1},
        {"top_k": 2**31},
        {"min_p": 0},
        {"min_p": 1.0},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"n": 128},
        {"priority": 2**31 - 1},
        {"priority": -(2**31)},
        {"stop": tuple("abcdefghijklmnop")},
        {"max_tokens": 5, "min_tokens": 5},
    ],
)
def test_values_within_their_range_are_taken(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    assert {name: getattr(params, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", -1),
        ("presence_penalty", 2.01),
        ("presence_penalty", NAN),
        ("priority", 2**31),
        ("priority", -(2**31) - 1),
        ("frequency_penalty", -2.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10.1),
        ("repetition_penalty", NAN),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, NAN),)),
        ("allowed_token_ids", ()),
        ("bad_words", ((1,), ())),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", NAN),
        ("temperature", float("inf")),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("top_p", NAN),
        ("top_k", -2),
        ("top_k", 2**31 + 1),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("min_p", NAN),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("n", 0),
        ("n", 129),
        ("stop", ("a", "")),
        ("stop", ("a",) * 17),
        ("min_tokens", -1),
        ("min_tokens", 17),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_name(param: str, value: object) -> None:
    settings: dict[str, Any] = {param: value}
    with pytest.raises(InvalidRequestError, match=f"^{param} ") as refusal:
        SamplingParams(**settings)
    assert refusal.value.param == param


def test_temperature_zero_and_top_p_zero_are_greedy_and_nothing_else_is() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(top_p=0).is_greedy
    assert not SamplingParams(temperature=1e-6, top_p=1e-6, top_k=1, min_p=1).is_greedy


def test_params_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().max_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("too hot", "temperature"),
        RequestTooLongError("too long", "prompt"),
        NotReadyError("not yet"),
        StageFailedError("stage 1 died"),
    ],
)
def test_errors_survive_pickling_with_their_param(error: GPTJDistError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
