"""What a checkpoint says of its end tokens, defaults and tokens is obeyed: tiny models whose head prefers a token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTJForCausalLM
from typer.testing import CliRunner

from gptj_dist.checkpoint.synthetic import write_checkpoint
from gptj_dist.cli import app
from gptj_dist.config import ModelConfig
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.llm import LLM, Completion
from gptj_dist.params import SamplingParams
from gptj_dist.text.vocabulary import write_tokenizer

EOS = 298
SHAPE = ModelConfig(303, 2, 32, 2, 8, 128, 96, (EOS,))
"""The tokenizer's 299 tokens, of which the last ends a text, and 4 spare rows."""

SPARE = (299, 300, 301, 302)
GREEDY = SamplingParams(max_tokens=8, temperature=0)
PROMPT = [5, 6, 7]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, SHAPE)
    write_tokenizer(tmp_path, 299)
    return tmp_path


def edit_json(path: Path, fields: Mapping[str, object]) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | dict(fields)))


def prefer(model: Path, **biases: float) -> None:
    """Adds to the head's bias of tokens, given as `_ID=BIAS`."""
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    for name, bias in biases.items():
        tensors["lm_head.bias"][int(name[1:])] += bias
    save_file(tensors, model / "model.safetensors")


def complete(model: Path, params: SamplingParams | None = GREEDY, **settings: Any) -> Completion:
    with LLM(str(model), device="cpu", dtype="float32", kv_cache_gb=0.01, **settings) as llm:
        return llm.generate(PROMPT, params)[0].completions[0]


def theirs(model: Path, max_new_tokens: int = 8) -> list[int]:
    output = GPTJForCausalLM.from_pretrained(model).generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    ids: list[int] = output[0, len(PROMPT) :].tolist()
    return ids


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [[EOS, 13], [13, EOS], 13])
def test_any_token_of_the_list_ends_a_text_as_in_transformers(model: Path, file: str, eos: object) -> None:
    edit_json(model / file, {"eos_token_id": eos})
    prefer(model, _13=1000.0)

    completion = complete(model)

    assert (list(completion.token_ids), completion.finish_reason) == (theirs(model), FinishReason.STOP)
    assert completion.token_ids == (13,)


def test_a_config_whose_end_token_is_null_ends_at_max_tokens_as_in_transformers(model: Path) -> None:
    edit_json(model / "config.json", {"eos_token_id": None, "bos_token_id": None})
    prefer(model, **{f"_{EOS}": 1000.0})

    completion = complete(model)

    assert (list(completion.token_ids), completion.finish_reason) == (theirs(model), FinishReason.LENGTH)
    with (
        LLM(str(model), device="cpu", kv_cache_gb=0.01) as llm,
        pytest.raises(InvalidRequestError, match="prompt has no tokens"),
    ):
        llm.generate("", GREEDY)


@pytest.mark.parametrize("first", [EOS, 13])
def test_ignore_eos_and_min_tokens_hold_for_every_end_token(model: Path, first: int) -> None:
    edit_json(model / "config.json", {"eos_token_id": [EOS, 13]})
    prefer(model, **{f"_{first}": 1000.0})

    ignored = complete(model, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ((first,) * 5, FinishReason.LENGTH)
    late = complete(model, SamplingParams(max_tokens=5, temperature=0, min_tokens=3))
    assert not set(late.token_ids[:3]) & {EOS, 13}
    assert (late.token_ids[3:], late.finish_reason) == ((first,), FinishReason.STOP)


def test_a_spare_row_that_the_config_names_ends_a_text(model: Path) -> None:
    edit_json(model / "config.json", {"eos_token_id": 300})
    prefer(model, _300=1000.0, _301=2000.0)

    completion = complete(model)

    assert (completion.token_ids, completion.finish_reason, completion.text) == ((300,), FinishReason.STOP, "")


@pytest.mark.parametrize(
    ("settings", "expected", "reason"),
    [
        ({"stop_token_ids": (301,)}, (301,), FinishReason.STOP),
        ({"allowed_token_ids": (300,)}, (300, 300), FinishReason.LENGTH),
        ({"logit_bias": ((299, 50.0),)}, (299, 299), FinishReason.LENGTH),
    ],
)
def test_a_spare_row_that_the_request_names_is_sampled_and_no_other(
    model: Path, settings: dict[str, Any], expected: tuple[int, ...], reason: FinishReason
) -> None:
    prefer(model, **dict.fromkeys(("_299", "_300", "_301", "_302"), 1000.0))

    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=2, temperature=temperature, seed=1, **settings)
        completion = complete(model, params)
        assert (completion.token_ids, completion.finish_reason) == (expected, reason)


def test_spare_rows_that_nothing_names_never_come(model: Path) -> None:
    prefer(model, **dict.fromkeys(("_299", "_300", "_301", "_302"), 1000.0))

    completion = complete(model, SamplingParams(max_tokens=40, temperature=1, seed=1, ignore_eos=True))

    assert not set(completion.token_ids) & set(SPARE)


def test_suppressed_tokens_and_bad_words_never_come_as_in_transformers(model: Path) -> None:
    prefer(model, _20=60.0, _21=50.0, _22=40.0, _23=30.0)
    words = {"suppress_tokens": [20], "bad_words_ids": [[21], [22, 22], [5, 6, 7, 23]], "begin_suppress_tokens": [22]}
    edit_json(model / "generation_config.json", words | {"eos_token_id": EOS})

    completion = complete(model)

    assert list(completion.token_ids) == theirs(model)
    assert not set(completion.token_ids) & {20, 21}
    assert complete(model, generation_config="none").token_ids == (20,) * 8


def test_sampling_defaults_hold_where_nothing_else_is_said(model: Path) -> None:
    fields = {"temperature": 0.0, "repetition_penalty": 1.5, "max_new_tokens": 5, "eos_token_id": EOS}
    edit_json(model / "generation_config.json", fields)
    expected = complete(model, SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=5, ignore_eos=True))

    assert complete(model, None).token_ids == expected.token_ids
    assert len(complete(model, SamplingParams(ignore_eos=True)).token_ids) == 16
    assert len(complete(model, None, generation_config="none").token_ids) != 5


def test_a_default_of_more_tokens_than_fit_is_cut_to_what_fits(model: Path) -> None:
    edit_json(model / "config.json", {"eos_token_id": None})
    edit_json(model / "generation_config.json", {"max_new_tokens": 10_000, "temperature": 0.0})

    assert len(complete(model, None).token_ids) == SHAPE.context_length - len(PROMPT)


def generated(model: Path, *options: str) -> str:
    arguments = ["generate", str(model), "--prompt", "x", "--device", "cpu", "--seed", "1", *options]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_generate_takes_the_defaults_unless_told_otherwise(model: Path) -> None:
    edit_json(model / "generation_config.json", {"max_new_tokens": 3, "temperature": 0.0, "eos_token_id": EOS})
    prefer(model, _40=1000.0)

    assert generated(model) == f"x{'I' * 3}\n"
    assert generated(model, "--max-tokens", "5") == f"x{'I' * 5}\n"
    assert generated(model, "--generation-config", "none") == f"x{'I' * 64}\n"


# Nothing to sample


@pytest.fixture
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), device="cpu", kv_cache_gb=0.01) as llm:
        yield llm


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_token_ids": (9,), "bad_words": ((9,),)},
        {"allowed_token_ids": (EOS,), "min_tokens": 1},
    ],
)
def test_a_request_that_leaves_nothing_to_sample_is_refused_before_anything_is_queued(
    llm: LLM, settings: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match="leave no token that may be sampled"):
        llm.generate([PROMPT, PROMPT], SamplingParams(max_tokens=4, temperature=0, **settings))
    assert llm._engine.scheduler.has_requests is False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("prompt", "expected"), [([5], (9,)), ([5, 9], ())])
def test_a_text_that_bad_words_leave_no_way_to_go_on_ends_there_with_a_reason_of_its_own(
    llm: LLM, temperature: float, prompt: list[int], expected: tuple[int, ...]
) -> None:
    params = SamplingParams(
        max_tokens=4, temperature=temperature, allowed_token_ids=(9,), bad_words=((9, 9),), logprobs=1, n=2
    )
    [output] = llm.generate([prompt], params)
    for completion in output.completions:
        assert (completion.token_ids, completion.finish_reason) == (expected, FinishReason.CONTENT_FILTER)
        assert len(completion.logprobs) == len(expected)


def test_a_text_that_ends_so_disturbs_none_beside_it(llm: LLM) -> None:
    plain = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    alone = llm.generate(PROMPT, plain)
    together = llm.generate([PROMPT, [5, 9]], plain)
    assert together[0] == alone[0]
