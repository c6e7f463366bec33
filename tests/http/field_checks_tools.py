"""Checks of the fields that tell of tools and of their calls."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from gptj_dist.answers.schema.chat import ChatRequest, Message
from gptj_dist.answers.schema.tokens import TokenizeRequest
from gptj_dist.answers.schema.tools import CalledFunction, Function, NamedFunction, NamedTool, Tool, ToolCall
from tests.http.fields import CHECKS, Face, check, post, prompt_of, tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It does.", "parameters": SCHEMA}}
    for name in ("first", "second")
]
CALL = {"id": "c7", "type": "function", "function": {"name": "first", "arguments": '{"a":1}'}}
WHOLE: dict[str, Any] = {"ignore_eos": False, "max_tokens": 200, "temperature": 1.0, "seed": 1}
WHOLE |= {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}


def calls(face: Face, **fields: Any) -> list[dict[str, Any]]:
    """The calls of an answer that must have some."""
    answer = Face(face.server, ChatRequest).post(**WHOLE | fields)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    made: list[dict[str, Any]] = choice["message"]["tool_calls"]
    for call in made:
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(call["function"]["arguments"]))
    return made


def refused(face: Face, **fields: Any) -> str:
    """The field that a refusal names."""
    answer = Face(face.server, ChatRequest).post(**WHOLE | fields)
    assert answer.status_code == 400
    return str(answer.json()["error"]["param"])


@check(ChatRequest)
def of_tools(face: Face) -> None:
    for seed in range(4):
        assert {call["function"]["name"] for call in calls(face, seed=seed)} <= {"first", "second"}
    assert refused(face, tools=[]) == "tool_choice"


def of_choice(face: Face) -> None:
    for name in ("first", "second"):
        [call] = calls(face, tool_choice={"type": "function", "function": {"name": name}})
        assert (call["type"], call["function"]["name"]) == ("function", name)
    assert refused(face, tool_choice={"type": "function", "function": {"name": "third"}}) == "tool_choice"
    assert refused(face, tool_choice={"type": "custom", "function": {"name": "first"}}) == "tool_choice"


CHECKS[ChatRequest, "tool_choice"] = of_choice
CHECKS[NamedTool, "type"] = CHECKS[NamedTool, "function"] = CHECKS[NamedFunction, "name"] = of_choice


@check(ChatRequest)
def of_parallel_tool_calls(face: Face) -> None:
    several = WHOLE | {"parallel_tool_calls": True, "min_tokens": 150}
    [choice] = Face(face.server, ChatRequest).post(**several).json()["choices"]
    assert len(choice["message"]["tool_calls"]) > len(calls(face, min_tokens=150)) == 1


def shown(face: Face, tool: dict[str, Any]) -> str:
    """The prompt of a conversation with a tool."""
    said = {"messages": [{"role": "user", "content": "It"}], "tools": [tool]}
    return tokenizer().decode(post(face, "/tokenize", **said)["tokens"])


def of_tool(face: Face) -> None:
    assert shown(face, TOOLS[0]) == json.dumps(TOOLS[0]) + "It"
    assert refused(face, tools=[TOOLS[0] | {"type": "custom"}]) == "tools.0.type"
    assert refused(face, tools=[{"type": "function", "function": {"name": "a b"}}]) == "tools.0.function.name"


for body, field in (
    (TokenizeRequest, "tools"),
    (Tool, "type"),
    (Tool, "function"),
    (Function, "name"),
    (Function, "description"),
    (Function, "parameters"),
):
    CHECKS[body, field] = of_tool


def of_calls(face: Face) -> None:
    prompt = prompt_of(face, {"role": "assistant", "content": "Well.", "tool_calls": [CALL]})
    as_object = CALL | {"function": {"name": "first", "arguments": {"a": 1}}}
    assert prompt == f"Well.<tool_call>{json.dumps(as_object)}</tool_call>"
    said = {"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]}
    assert refused(face, **said) == "messages.0.tool_calls.0.type"


CHECKS[Message, "tool_calls"] = of_calls
CHECKS[ToolCall, "id"] = CHECKS[ToolCall, "type"] = CHECKS[ToolCall, "function"] = of_calls
CHECKS[CalledFunction, "name"] = CHECKS[CalledFunction, "arguments"] = of_calls


@check(Message)
def of_tool_call_id(face: Face) -> None:
    assert prompt_of(face, {"role": "tool", "content": " rain", "tool_call_id": "c7"}) == "c7 rain"
