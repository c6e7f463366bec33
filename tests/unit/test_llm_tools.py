"""Tools in `LLM.chat`: what the model sees, what it may write, and the calls that are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gptj_dist import LLM, Grammar, SamplingParams
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.llm import Completion, Output, ToolCall
from gptj_dist.llm.tools import with_calls
from gptj_dist.text.tool_calls import FORMATS
from tests.unit.test_tool_calls import HERMES, ONE, PLAIN, TWO

ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(max_tokens=300, seed=3, n=2)
CLOSED = {"type": "object", "required": ["a"], "additionalProperties": False}
SCHEMA = {"properties": {"a": {"enum": [1, 2]}}, **CLOSED}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It does.", "parameters": SCHEMA}}
    for name in ("first", "second")
]
MESSAGES = [{"role": "user", "content": "It"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", dtype="float32") as llm:
        yield llm


def chat(llm: LLM, *, template: str = HERMES.source, params: SamplingParams = PARAMS, **arguments: Any) -> Output:
    [output] = llm.chat(MESSAGES, params, False, chat_template=template, **{"tools": TOOLS} | arguments)
    return output


def test_what_must_be_called_is_called_with_valid_arguments(llm: LLM) -> None:
    output = chat(llm, tool_choice="required", parallel_tool_calls=False)
    calls = [call for completion in output.completions for call in completion.tool_calls]
    assert len(calls) == 2
    for call in calls:
        assert call.name in ("first", "second")
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(call.arguments))
        assert re.fullmatch("[a-z0-9]{9}", call.id)
    assert calls[0].id != calls[1].id
    assert [completion.text for completion in output.completions] == ["", ""]
    assert llm.tokenizer.decode(list(output.prompt_ids)).startswith(json.dumps(TOOLS[0]))
    assert chat(llm, tool_choice="required", parallel_tool_calls=False) == output


def test_a_named_tool_is_called_and_several_may_be(llm: LLM) -> None:
    [one, _] = chat(llm, tool_choice={"type": "function", "function": {"name": "second"}}).completions
    assert [call.name for call in one.tool_calls] == ["second"]
    long = SamplingParams(max_tokens=300, min_tokens=150, seed=1)
    assert len(chat(llm, params=long, tool_choice="required").completions[0].tool_calls) > 1


def test_without_a_choice_the_model_does_not_see_tools(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, seed=1)
    assert chat(llm, params=params, tool_choice="none", template=PLAIN.source) == chat(
        llm, params=params, tools=None, template=PLAIN.source
    )


def test_text_and_calls_are_told_apart_and_make_a_message() -> None:
    text = "Well. " + TWO["hermes"]
    output = Output((1, 2), (Completion(text, (3,), FinishReason.STOP), Completion("No.", (4,), FinishReason.STOP)))
    [calling, plain] = with_calls(output, FORMATS["hermes"]).completions
    assert (calling.text, plain.text, plain.tool_calls) == ("Well. ", "No.", ())
    assert [(call.name, call.arguments) for call in calling.tool_calls] == [
        ("weather", '{"city": "a\\"}"}'),
        ("set-level", '{"to":2}'),
    ]
    assert plain.message == {"role": "assistant", "content": "No."}
    message = Completion("Well.", (3,), FinishReason.STOP, tool_calls=(ToolCall("x", "f", "{}"),)).message
    called = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert message == {"role": "assistant", "content": "Well.", "tool_calls": [called]}
    cut = Completion(ONE["hermes"][:-18], (3,), FinishReason.LENGTH)
    [cut] = with_calls(Output((1,), (cut,)), FORMATS["hermes"]).completions
    assert [call.arguments for call in cut.tool_calls] == ['{"city": "a']


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function is required"),
        ({"tools": 7}, "tools must be a valid list"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice needs tools"),
        ({"tool_choice": "any"}, "tool_choice must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "not one of the tools"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls must be"),
        ({"template": PLAIN.source}, "no place for tools"),
        ({"params": SamplingParams(structured_outputs=Grammar.choice(["a"]))}, "tools contradict structured_outputs"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "^tools cannot be"),
    ],
)
def test_what_cannot_be_is_refused_by_name(llm: LLM, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        chat(llm, **arguments)


def test_calls_that_the_template_does_not_show_are_refused(llm: LLM) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(InvalidRequestError, match="the chat template shows no tool_calls"):
        llm.chat([{"role": "assistant", "tool_calls": [call]}], PARAMS, chat_template=PLAIN.source)


def test_the_example_of_the_documentation_runs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(from pathlib.*?)```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.DOTALL)
    exec(code, {})
    assert "ToolCall(id='" in capsys.readouterr().out
