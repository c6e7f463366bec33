"""Texts that must match: always whole where they end by themselves, in any cut and beside any other control."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from benchmarks.schemas import KINDS
from benchmarks.structured_output import fill_in
from gptj_dist import LLM, Grammar, SamplingParams
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.llm.outputs import Completion
from gptj_dist.text.tool_calls import FORMATS, calls_grammar

PROMPT = "It was the best of times, it was"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["whale", "ship"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
ROWS = Grammar.json({"type": "array", "items": SCHEMA, "minItems": 4})
CALLS = calls_grammar(FORMATS["hermes"], {"f": SCHEMA, "g": {"type": "object"}}, must_call=True, most=2)
WORDS = Grammar("regex", "[a-z]+( [a-z]+){0,3}[.]")
BASE = SamplingParams(max_tokens=60, seed=1, n=3, structured_outputs=Grammar.json(SCHEMA))


@pytest.fixture(scope="module", params=[(1, False), (2, False), (4, False), (2, True)], ids=str)
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """In several cuts, the last one with speculation."""
    num_stages, speculation = request.param
    settings = {"stages": num_stages, "speculation": speculation, "max_batch_size": 8, "kv_cache_gb": 0.006}
    with LLM("demo", device="cpu", dtype="float32", **settings) as llm:
        yield llm


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What the first cut has told."""
    return {}


CONTROLS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "repetitive": {"temperature": 0, "max_tokens": 80, "structured_outputs": ROWS, "n": 1},
    "greedy": {"temperature": 0},
    "logprobs": {"logprobs": 2},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "biases": {"logit_bias": {90: -5.0, 91: 3.0}},
    "bad words": {"bad_words": ((82,), (5, 6))},
    "top": {"top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "stop": {"stop": ("age",)},
    "calls": {"structured_outputs": CALLS},
}


def complete(llm: LLM, params: SamplingParams) -> tuple[Completion, ...]:
    return llm.generate(PROMPT, params)[0].completions


@pytest.mark.parametrize("controls", CONTROLS.values(), ids=CONTROLS)
def test_json_that_ends_is_valid_and_every_cut_gives_the_same(
    llm: LLM, kept: dict[str, Any], controls: dict[str, Any]
) -> None:
    completions = complete(llm, replace(BASE, **controls))
    assert completions == kept.setdefault(str(controls), completions)
    ended = [each.text for each in completions if each.finish_reason == FinishReason.STOP]
    assert ended or "structured_outputs" in controls
    for text in ended if {"stop", "structured_outputs"}.isdisjoint(controls) else ():
        jsonschema.validate(json.loads(text), SCHEMA)


def test_json_of_many_kinds_of_schemas_is_valid(llm: LLM) -> None:
    if len(llm.pipeline.reports) == 1:
        figures = fill_in(llm, num_schemas=len(KINDS), max_tokens=100)
        assert (figures["wrong"], figures["refused"]) == ([], {})
        assert figures["num_by_finish_reason"]["stop"] > len(KINDS) // 3


def test_a_text_may_be_cut_by_its_number_of_tokens(llm: LLM) -> None:
    [cut] = complete(llm, replace(BASE, n=1, max_tokens=3))
    assert (cut.finish_reason, len(cut.token_ids)) == (FinishReason.LENGTH, 3)


@pytest.mark.parametrize("controls", [{"min_tokens": 50}, {"ignore_eos": True}])
def test_a_text_that_cannot_go_on_ends_as_a_whole(llm: LLM, controls: dict[str, Any]) -> None:
    for one in complete(llm, replace(BASE, structured_outputs=Grammar.choice(["yes", "yesterday"]), **controls)):
        assert (one.text, one.finish_reason) == ("yesterday", FinishReason.STOP)


def test_a_text_that_could_end_goes_on_to_its_minimum(llm: LLM) -> None:
    params = replace(BASE, structured_outputs=Grammar("regex", "[a-z ]+"), min_tokens=20, max_tokens=20)
    assert [len(one.token_ids) for one in complete(llm, params)] == [20] * 3


def test_a_stop_token_comes_only_where_the_text_may_end(llm: LLM) -> None:
    [full_stop] = llm.tokenizer.encode(".")
    params = replace(BASE, structured_outputs=Grammar("regex", "[a-z]{8,20}|[.]"), stop_token_ids=(full_stop,))
    for one in complete(llm, replace(params, logit_bias=((full_stop, 100.0),), ignore_eos=True)):
        assert re.fullmatch("[a-z]{8,20}", one.text)
        assert (one.token_ids[-1], one.finish_reason) == (full_stop, FinishReason.STOP)


def test_a_text_ends_where_other_controls_leave_no_token(llm: LLM) -> None:
    params = replace(BASE, n=1, structured_outputs=Grammar("regex", "[0-9]+"), allowed_token_ids=(90, 91))
    [one] = complete(llm, params)
    assert (one.text, one.finish_reason) == ("", FinishReason.CONTENT_FILTER)


def test_requests_with_and_without_grammars_get_what_they_get_alone(llm: LLM) -> None:
    """There is room for few of them at once, so some are preempted."""
    each = [replace(BASE, n=1, seed=seed, max_tokens=30) for seed in range(4)]
    each += [replace(each[0], structured_outputs=grammar) for grammar in (WORDS, None)]
    together = llm.generate([PROMPT * 4] * len(each), each)
    assert together[1::3] == [llm.generate(PROMPT * 4, params)[0] for params in each[1::3]]


def test_beams_are_texts_of_the_grammar(llm: LLM, kept: dict[str, Any]) -> None:
    params = replace(BASE, structured_outputs=WORDS, use_beam_search=True, best_of=4, temperature=0, max_tokens=12)
    beams = complete(llm, params)
    assert beams == kept.setdefault("beams", beams)
    assert len({one.text for one in beams}) == 3
    assert [one.text for one in beams if not re.fullmatch(WORDS.text, one.text)] == []


def test_a_grammar_that_is_not_valid_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs cannot be served"):
        llm.generate([PROMPT] * 2, [BASE, replace(BASE, structured_outputs=Grammar("regex", "(a"))])
