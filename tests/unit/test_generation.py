"""`generation_config.json`: what is taken from it, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig as TheirConfig

from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.config import ModelConfig
from gptj_dist.errors import CheckpointError, InvalidRequestError
from gptj_dist.generation import GenerationConfig, unapplied_fields
from gptj_dist.params import SamplingParams
from gptj_dist.token_rules import TokenRules

SHAPE = ModelConfig(100, 2, 16, 2, 4, 64, 32, (7,))


def read(directory: Path, generation: object = None, **config: object) -> ModelConfig:
    """What is read of a checkpoint whose `config.json` has these fields; None leaves a field out."""
    write_checkpoint(directory, SHAPE)
    fields = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "left out"}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(directory)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, {"eos_token_id": [7, 13]}, (7, 13)),
        ([7, 8], {"eos_token_id": [13, 8]}, (7, 8, 13)),
        (7, {"eos_token_id": 13}, (7, 13)),
        (7, {"eos_token_id": None}, (7,)),
        (7, {}, (7,)),
        (None, {"eos_token_id": [13]}, (13,)),
        ([], {"eos_token_id": []}, ()),
        ("left out", {"eos_token_id": [13, 13]}, (13,)),
        ("left out", {}, ()),  # GPT-J's own is not in this vocabulary
        ("left out", None, ()),
    ],
)
def test_texts_end_at_the_end_tokens_of_both_files(
    tmp_path: Path, config: object, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert read(tmp_path, generation, eos_token_id=config).eos_token_ids == expected


def test_the_end_token_of_a_config_that_names_none_is_gptjs() -> None:
    fields = {"model_type": "gptj", "vocab_size": 50400, "n_layer": 1, "n_embd": 64, "n_head": 1, "n_positions": 8}
    assert ModelConfig.from_hf(fields).eos_token_ids == (50256,)
    assert ModelConfig.from_hf(fields, {"eos_token_id": 198}).eos_token_ids == (198,)


def test_sampling_defaults_are_read_under_the_names_of_parameters(tmp_path: Path) -> None:
    fields = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40.0,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 256,
        "do_sample": True,
        "typical_p": 1.0,
        "transformers_version": "4.30.0",
    }
    assert dict(read(tmp_path, fields).generation.defaults) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_tokens": 256,
    }


def test_a_file_that_transformers_writes_sets_nothing_that_nobody_set(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SHAPE)
    TheirConfig(eos_token_id=[7, 13]).save_pretrained(tmp_path)

    model = read_model_config(tmp_path)

    assert model.eos_token_ids == (7, 13)
    assert model.generation == GenerationConfig()
    assert unapplied_fields(json.loads((tmp_path / "generation_config.json").read_text())) == []


def test_without_the_file_config_json_says_it_as_in_transformers(tmp_path: Path) -> None:
    model = read(tmp_path, temperature=0.5, suppress_tokens=[3], bad_words_ids=[[4], [5, 6]])
    assert model.generation == GenerationConfig((("temperature", 0.5),), (3, 4), (), ((5, 6),))


def test_with_the_file_config_json_has_no_say(tmp_path: Path) -> None:
    model = read(tmp_path, {"top_k": 5}, temperature=0.5, suppress_tokens=[3])
    assert model.generation == GenerationConfig((("top_k", 5),))


def test_a_bad_word_that_is_an_end_token_keeps_no_text_from_ending(tmp_path: Path) -> None:
    model = read(tmp_path, {"eos_token_id": [7, 8], "bad_words_ids": [[7], [8], [9], [7, 8]]})
    assert model.generation == GenerationConfig(suppressed_ids=(9,), bad_words=((7, 8),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "temperature is invalid: temperature must be float"),
        ({"temperature": -1}, "temperature is invalid"),
        ({"temperature": True}, "temperature is invalid"),
        ({"top_p": 1.5}, "top_p is invalid: top_p must be from 0 to 1"),
        ({"top_k": 2.5}, "top_k is invalid"),
        ({"min_p": -0.1}, "min_p is invalid"),
        ({"repetition_penalty": 0}, "repetition_penalty is invalid"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens is invalid"),
        ({"eos_token_id": 100}, "eos_token_id 100 is not a number below vocab_size 100"),
        ({"eos_token_id": "7"}, "eos_token_id must hold token ids"),
        ({"eos_token_id": [7, [8]]}, "eos_token_id must hold token ids"),
        ({"suppress_tokens": 3}, "suppress_tokens must hold token ids"),
        ({"suppress_tokens": [-1]}, "suppress_tokens -1 is not"),
        ({"begin_suppress_tokens": ["a"]}, "begin_suppress_tokens must hold token ids"),
        ({"bad_words_ids": [3, 4]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[3, 100]]}, "bad_words_ids 100 is not"),
        ([], "holds no JSON object"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_error_that_names_file_and_field(tmp_path: Path, fields: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path, fields)
    assert "generation_config.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_fields_that_are_not_applied_are_named_unless_they_ask_for_nothing() -> None:
    fields = {"do_sample": False, "num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 0, "max_length": 50}
    assert unapplied_fields(fields) == ["do_sample False", "num_beams 4", "max_length 50"]


RULES = TokenRules(10, eos_token_ids=(0, 1), spare_ids=(8, 9), suppressed_ids=(7,), first_suppressed_ids=(6,))


def refusal(settings: dict[str, Any]) -> InvalidRequestError | None:
    """Of a request with these settings."""
    try:
        RULES.check(SamplingParams(**settings))
    except InvalidRequestError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"allowed_token_ids": (5,), "bad_words": ((5,),)}, "allowed_token_ids and bad_words leave"),
        ({"allowed_token_ids": (0, 1), "min_tokens": 1}, "allowed_token_ids and min_tokens leave"),
        ({"allowed_token_ids": (0, 5), "stop_token_ids": (5,), "min_tokens": 1}, "allowed_token_ids and min_tokens"),
        ({"allowed_token_ids": (7,)}, "allowed_token_ids leave"),
        ({"allowed_token_ids": (6, 7)}, "allowed_token_ids leave"),
        ({"bad_words": tuple((i,) for i in range(6))}, "bad_words leave"),
        ({"bad_words": tuple((i,) for i in range(2, 6)), "min_tokens": 1}, "bad_words and min_tokens leave"),
    ],
    ids=str,
)
def test_a_request_that_leaves_no_token_is_refused_by_the_fields_that_do(settings: dict[str, Any], named: str) -> None:
    error = refusal(settings)
    assert error is not None
    assert error.param == named.split(" ", maxsplit=1)[0]
    assert named in str(error)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"allowed_token_ids": (0,)},
        {"allowed_token_ids": (8,)},
        {"allowed_token_ids": (8,), "bad_words": ((8, 8),)},
        {"allowed_token_ids": (0, 5), "min_tokens": 1},
        {"bad_words": tuple((i,) for i in range(5))},
        {"bad_words": tuple((i,) for i in range(6)), "stop_token_ids": (9,)},
        {"bad_words": tuple((i,) for i in range(6)), "logit_bias": ((9, 1.0),)},
        {"allowed_token_ids": (7,), "max_tokens": 0},
    ],
    ids=str,
)
def test_a_request_that_leaves_a_token_is_not_refused(settings: dict[str, Any]) -> None:
    assert refusal(settings) is None


def test_a_checkpoint_that_suppresses_everything_is_said_to() -> None:
    with pytest.raises(InvalidRequestError, match="the checkpoint's rules leave no token"):
        TokenRules(3, suppressed_ids=(0, 1, 2)).check(SamplingParams())
