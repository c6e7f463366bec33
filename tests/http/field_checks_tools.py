"""Checks of the fields that tell of tools and of their calls."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema

from gptj_dist.answers.schema.chat import ChatRequest, Message
from gptj_dist.answers.schema.input_items import CallItem, CallOutputItem
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.tokens import TokenizeRequest
from gptj_dist.answers.schema.tools import (
    CalledFunction,
    Function,
    FunctionTool,
    NamedFunction,
    NamedFunctionTool,
    NamedTool,
    Tool,
    ToolCall,
)
from tests.http.fields import CHECKS, Face, check, post, prompt_of, tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS: list[dict[str, Any]] = [
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


def response_of(face: Face, **fields: Any) -> httpx.Response:
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 1, "ignore_eos": False, "tools": flat, "max_tokens": 200}
    return Face(face.server, ResponsesRequest).post(**asked | {"tool_choice": "required"} | fields)


def items(face: Face, **fields: Any) -> list[dict[str, Any]]:
    """The calls of a response that must have some, and nothing else."""
    answer = response_of(face, **{"parallel_tool_calls": False} | fields)
    assert answer.status_code == 200, answer.text
    made: list[dict[str, Any]] = answer.json()["output"]
    for call in made:
        assert (call["type"], call["status"]) == ("function_call", "completed")
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(call["arguments"]))
    return made


def refused_param(face: Face, **fields: Any) -> str:
    answer = response_of(face, **fields)
    assert answer.status_code == 400
    return str(answer.json()["error"]["param"])


def of_flat_tools(face: Face) -> None:
    for seed in range(4):
        assert {call["name"] for call in items(face, seed=seed)} <= {"first", "second"}
    assert refused_param(face, tools=[]) == "tool_choice"
    assert refused_param(face, tools=[{"type": "web_search"}]) == "tools.0.type"
    assert refused_param(face, tools=[{"type": "function", "name": "a b"}]) == "tools.0.name"


CHECKS[ResponsesRequest, "tools"] = of_flat_tools
CHECKS[FunctionTool, "type"] = CHECKS[FunctionTool, "name"] = of_flat_tools


def of_flat_tool(face: Face) -> None:
    """The model sees what it sees in chat."""
    flat = {"type": "function", **TOOLS[0]["function"]}
    changes: list[dict[str, Any]] = [{}, {"description": "Other."}, {"parameters": {"type": "object"}}]
    for changed in changes:
        usage = response_of(face, tools=[flat | changed], prompt="It").json()["usage"]
        prompt = shown(face, {"type": "function", "function": TOOLS[0]["function"] | changed})
        assert usage["input_tokens"] == len(tokenizer().encode(prompt))


CHECKS[FunctionTool, "description"] = CHECKS[FunctionTool, "parameters"] = of_flat_tool


def of_flat_choice(face: Face) -> None:
    for name in ("first", "second"):
        [call] = items(face, tool_choice={"type": "function", "name": name})
        assert call["name"] == name
    assert refused_param(face, tool_choice={"type": "function", "name": "third"}) == "tool_choice"
    assert refused_param(face, tool_choice={"type": "custom", "name": "first"}) == "tool_choice"


CHECKS[ResponsesRequest, "tool_choice"] = of_flat_choice
CHECKS[NamedFunctionTool, "type"] = CHECKS[NamedFunctionTool, "name"] = of_flat_choice


@check(ResponsesRequest)
def of_parallel_tool_calls_(face: Face) -> None:
    assert len(items(face, parallel_tool_calls=True, min_tokens=150)) > len(items(face, min_tokens=150)) == 1


def of_items(face: Face) -> None:
    """The model sees what it sees of a chat's call and its result."""
    call = {"type": "function_call", "call_id": "c7", "name": "first", "arguments": '{"a":1}'}
    result = {"type": "function_call_output", "call_id": "c7", "output": " rain"}
    said = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": " rain", "tool_call_id": "c7"}]
    prompt = tokenizer().decode(post(face, "/tokenize", messages=said)["tokens"])
    usage = response_of(face, prompt=[call, result], tools=[], tool_choice="auto").json()["usage"]
    assert usage["input_tokens"] == len(tokenizer().encode(prompt))
    assert refused_param(face, prompt=[call | {"type": "custom_tool_call"}]) == "input.0.type"
    assert refused_param(face, prompt=[{"type": "function_call_output"}]) == "input.0.call_id"


for field in CallItem.model_fields:
    CHECKS[CallItem, field] = of_items
for field in CallOutputItem.model_fields:
    CHECKS[CallOutputItem, field] = of_items
