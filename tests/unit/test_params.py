"""Sampling settings: what they accept, what they refuse, and by which name."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, RequestTooLongError, StageFailedError
from gptj_dist.params import Pooling, SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tokens": 0},
        {"max_tokens": 1},
        {"max_tokens": 2**31},
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
        {"pooling": Pooling("last", 3), "max_tokens": 0},
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
        ("max_tokens", 2**31 + 1),
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


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", 16.0),
        ("n", True),
        ("n", "2"),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", False),
        ("seed", 1.5),
        ("ignore_eos", 1),
        ("stop", (1,)),
        ("stop", b"x"),
        ("stop_token_ids", 5),
        ("stop_token_ids", ("a",)),
        ("allowed_token_ids", (1.5,)),
        ("logit_bias", ((1,),)),
        ("logit_bias", {"1": 1.0}),
        ("bad_words", ("a",)),
        ("pooling", "mean"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(param: str, value: object) -> None:
    settings: dict[str, Any] = {param: value}
    with pytest.raises(InvalidRequestError, match=f"^{param} must be ") as refusal:
        SamplingParams(**settings)
    assert refusal.value.param == param


def test_a_kind_of_pooling_that_is_none_is_refused() -> None:
    settings: dict[str, Any] = {"kind": "max"}
    with pytest.raises(InvalidRequestError, match="kind must be 'mean' or 'last', got 'max'"):
        Pooling(**settings)


def test_messages_stay_short_however_long_the_value() -> None:
    """Huge numbers, long lists and long strings are shown in part."""
    for param, value in {
        "seed": 10**5000,
        "n": 10**4000,
        "logit_bias": ((1, 1e9),) * 1000,
        "temperature": "x" * 9999,
    }.items():
        settings: dict[str, Any] = {param: value}
        with pytest.raises(InvalidRequestError) as refusal:
            SamplingParams(**settings)
        assert len(str(refusal.value)) < 250


def test_lists_dicts_and_a_lone_stop_string_are_taken_as_vllm_does() -> None:
    settings: dict[str, Any] = {
        "stop": "a",
        "stop_token_ids": [1],
        "bad_words": [[1, 2], [3]],
        "logit_bias": {5: 1.5, 6: -1},
    }
    expected = SamplingParams(
        stop=("a",), stop_token_ids=(1,), bad_words=((1, 2), (3,)), logit_bias=((5, 1.5), (6, -1))
    )
    assert SamplingParams(**settings) == expected
    assert hash(SamplingParams(**settings)) == hash(expected)


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
