"""Calls of tools in responses: OpenAI's own client and its types accept what comes, and send it back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tool_calls import FORMATS, ToolFormatName
from tests.front_app import front_app
from tests.unit.test_responses import EVENT, events_of, request_of
from tests.unit.test_tool_calls import CITY, EOS, HERMES, LEVEL, ONE, PLAIN, TOKENIZER, TWO, Script, answer, matches

TOOLS = [
    {"type": "function", "name": name, "parameters": parameters, "strict": True}
    for name, parameters in (("weather", CITY), ("set-level", LEVEL))
]
ARGUMENTS = ['{"city": "a\\"}"}', '{"to":2}']
OF_MESSAGE = ["output_item.added", "content_part.added"]
CLOSING = ["output_text.done", "content_part.done", "output_item.done"]


def texts(script: Script, template: ChatTemplate | None = HERMES, form: ToolFormatName | None = None) -> AnswerService:
    return AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,), template, ChatDefaults(tool_format=form)), script)


def respond(script: Script, template: ChatTemplate | None = HERMES, **fields: Any) -> Response:
    """The response, which is one of OpenAI's type."""

    async def run() -> dict[str, Any]:
        request = request_of(**{"tools": TOOLS} | fields)
        return await (await texts(script, template).respond(request, "7")).whole()

    return Response.model_validate(asyncio.run(run()), strict=True)


def stream(script: Script, **fields: Any) -> list[Any]:
    return events_of(texts(script), **{"tools": TOOLS} | fields)


def calls_of(response: Response) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


def names_of(events: Sequence[Any]) -> list[str]:
    """The kinds of events, with what comes several times in a row once."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


class TestWhole:
    def test_the_output_is_a_message_and_calls(self) -> None:
        response = respond(Script("Well. " + TWO["hermes"]))
        message, *calls = response.output
        assert (response.status, response.output_text, message.type) == ("completed", "Well. ", "message")
        assert [call.type for call in calls] == ["function_call"] * 2
        assert [call.name for call in calls_of(response)] == ["weather", "set-level"]
        assert [call.arguments for call in calls_of(response)] == ARGUMENTS
        assert {item.status for item in calls_of(response)} == {"completed"}
        assert len({item.id for item in response.output}) == 3

    def test_without_text_there_is_no_message_and_without_a_call_there_is_one(self) -> None:
        assert [item.type for item in respond(Script(ONE["hermes"])).output] == ["function_call"]
        for text in ("Hello", ""):
            response = respond(Script(text))
            assert ([item.type for item in response.output], response.output_text) == (["message"], text)

    def test_calls_are_those_of_chat(self) -> None:
        [body] = answer(Script(TWO["hermes"]))
        of_chat = [(call["id"], call["function"]) for call in body["choices"][0]["message"]["tool_calls"]]
        calls = calls_of(respond(Script(TWO["hermes"])))
        assert [(call.call_id, {"name": call.name, "arguments": call.arguments}) for call in calls] == of_chat

    def test_a_call_that_is_cut_is_incomplete(self) -> None:
        response = respond(Script(TWO["hermes"][:-15], FinishReason.LENGTH))
        assert (response.status, [call.status for call in calls_of(response)]) == (
            "incomplete",
            ["completed", "incomplete"],
        )
        stopped = respond(Script(ONE["hermes"]), stop="a\\")
        assert [call.status for call in calls_of(stopped)] == ["incomplete"]

    def test_the_request_is_said_back(self) -> None:
        named = {"type": "function", "name": "weather"}
        response = respond(Script(ONE["hermes"]), tool_choice=named, parallel_tool_calls=False)
        said = response.model_dump(exclude_none=True)
        assert (said["tools"], said["tool_choice"], said["parallel_tool_calls"]) == (TOOLS, named, False)


class TestStream:
    def test_the_events_are_openais_in_order(self) -> None:
        of_call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
        of_call += ["output_item.done"]
        begin = ["created", "in_progress"]
        of_message = [*OF_MESSAGE, "output_text.delta", *CLOSING]
        both = stream(Script("Well. " + TWO["hermes"]))
        assert names_of(both) == [*begin, *of_message, *of_call, *of_call, "completed"]
        assert names_of(stream(Script(TWO["hermes"]))) == [*begin, *of_call, *of_call, "completed"]
        assert names_of(stream(Script("Well."))) == [*begin, *of_message, "completed"]
        assert names_of(stream(Script(""))) == [*begin, *OF_MESSAGE, *CLOSING, "completed"]

    @pytest.mark.parametrize("text", ["Well. " + TWO["hermes"], TWO["hermes"], ONE["hermes"][:-16], "Well", ""])
    def test_a_stream_gives_what_a_response_is(self, text: str) -> None:
        reason = FinishReason.STOP if text.endswith((">", "l")) else FinishReason.LENGTH
        whole, events = respond(Script(text, reason)), stream(Script(text, reason))
        final = events[-1].response
        items: list[Any] = []
        for event in events:
            if event.type == "response.output_item.added":
                assert (event.output_index, event.item.status) == (len(items), "in_progress")
                items.append([event.item, "", None])
            elif event.type.endswith(".delta"):
                assert items[event.output_index][0].id == event.item_id
                items[event.output_index][1] += event.delta
            elif event.type == "response.output_item.done":
                items[event.output_index][2] = event.item
        assert [done for _, _, done in items] == final.output == whole.output
        for begun, grown, done in items:
            assert begun.id == done.id
            assert grown == (done.arguments if done.type == "function_call" else done.content[0].text)
        assert final.model_dump(exclude={"created_at"}) == whole.model_dump(exclude={"created_at"})

    def test_a_call_is_done_before_the_next_token_comes(self) -> None:
        ends = [
            event.type for event in stream(Script(TWO["hermes"])) if event.type.endswith(("item.done", "item.added"))
        ]
        assert ends == ["response.output_item.added", "response.output_item.done"] * 2


class TestRequest:
    def test_a_choice_decides_what_the_text_may_be_and_where_it_stops(self) -> None:
        other = ONE["hermes"].replace("weather", "set-level").replace('{"city": "a\\"}"}', '{"to": 1}')
        for fields, expected, stop in (
            ({}, (True, True, True, True), ("\nuser:",)),
            ({"parallel_tool_calls": False}, (True, True, True, False), ("\nuser:",)),
            ({"tool_choice": "required"}, (False, True, True, True), ()),
            ({"tool_choice": {"type": "function", "name": "weather"}}, (False, True, False, False), ()),
        ):
            respond(script := Script("x"), **fields)
            [(_, params)] = script.asked
            assert params.structured_outputs is not None
            possible = ("Hello", ONE["hermes"], other, TWO["hermes"])
            assert tuple(matches(params.structured_outputs, text) for text in possible) == expected
            assert params.stop == stop

    def test_without_a_choice_the_model_does_not_see_tools(self) -> None:
        response = respond(script := Script(ONE["hermes"]), PLAIN, tool_choice="none")
        assert TOKENIZER.decode(script.asked[0][0]) == "Hello"
        assert (script.asked[0][1].structured_outputs, response.output_text) == (None, ONE["hermes"])

    @pytest.mark.parametrize("form", FORMATS)
    def test_what_came_out_goes_back_in_with_results(self, form: ToolFormatName) -> None:
        async def run() -> dict[str, Any]:
            return await (await texts(Script(TWO.get(form, ONE[form])), form=form).respond(asked, "7")).whole()

        asked = request_of(tools=TOOLS)
        output = Response.model_validate(asyncio.run(run())).model_dump()["output"]
        results = [
            {"type": "function_call_output", "call_id": call["call_id"], "output": f"Rain {number}"}
            for number, call in enumerate(output)
        ]
        results[-1]["output"] = [{"type": "input_text", "text": "Rain "}, {"type": "input_text", "text": "or so"}]
        said = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Well."}, *output, *results]
        respond(script := Script("x"), input=said, tools=TOOLS[:1])
        shown = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
        calls = [{"name": call["name"], "arguments": json.loads(call["arguments"])} for call in output]
        told = [f"Rain {number}" for number in range(len(output) - 1)] + ["Rain or so"]
        assert TOKENIZER.decode(script.asked[0][0]) == (
            f"{json.dumps(shown)}\nuser: Rain?\nassistant: Well."
            + "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
            + "\n"
            + "".join(f"tool: {text}\n" for text in told)
            + "assistant:"
        )

    def test_a_call_without_a_message_is_one_of_an_assistants_message(self) -> None:
        call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "c", "output": "Rain"}
        respond(script := Script("x"), input=[call, result, call], tools=[])
        shown = 'assistant: <tool_call>{"name": "weather", "arguments": {}}</tool_call>\n'
        assert TOKENIZER.decode(script.asked[0][0]) == f"{shown}tool: Rain\n{shown}assistant:"

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "not one of the tools"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
            ({"tool_choice": "any"}, "tool_choice", '"none", "auto", "required" or {"type": "function", "name": ...}'),
            ({"tools": TOOLS * 65}, "tools", "at most 128"),
            ({"tools": TOOLS * 2}, "tools", "'weather' twice"),
            ({"tools": [{"type": "web_search", "search_context_size": "low"}]}, "tools.0.type", "must be 'function'"),
            ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function", "unknown"),
            ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "1 to 64"),
            (
                {"tools": [{"type": "function", "name": "f", "defer_loading": True}]},
                "tools.0.defer_loading",
                "not supp",
            ),
            ({"text": {"format": {"type": "json_object"}}}, "tools", "contradict"),
            ({"include": ["message.output_text.logprobs"]}, "include", "contradict"),
            ({"tools": [{"type": "function", "name": "f", "parameters": {"not": {}}}]}, "tools", "cannot be served"),
            ({"max_tool_calls": 2}, "max_tool_calls", "not supported"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, fields: dict[str, Any], param: str, words: str) -> None:
        with pytest.raises(InvalidRequestError) as raised:
            respond(Script("x"), **fields)
        assert raised.value.param == param
        assert words in str(raised.value)

    @pytest.mark.parametrize(
        ("item", "param"),
        [
            ({"arguments": "{"}, "input.1.arguments"),
            ({"arguments": "[]"}, "input.1.arguments"),
            ({"arguments": f'{{"a":"{"x" * 131_072}"}}'}, "input.1.arguments"),
            ({"namespace": "n"}, "input.1.namespace"),
            ({"caller": {"type": "program", "caller_id": "p"}}, "input.1.caller"),
            ({"call_id": None}, "input.1.call_id"),
            ({"content": "x"}, "input.1.content"),
        ],
    )
    def test_an_earlier_call_that_cannot_be_read_is_refused_by_its_place(self, item: Any, param: str) -> None:
        call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"} | item
        with pytest.raises(InvalidRequestError) as raised:
            respond(Script("x"), input=[{"role": "user", "content": "x"}, call])
        assert raised.value.param == param

    @pytest.mark.parametrize(
        ("template", "fields", "words"),
        [
            (None, {}, "no chat template"),
            (PLAIN, {}, "no place for tools"),
            (PLAIN, {"tools": [], "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
             "shows no tool_calls"),
        ],
    )  # fmt: skip
    def test_a_template_must_show_them(self, template: ChatTemplate | None, fields: Any, words: str) -> None:
        with pytest.raises(InvalidRequestError, match=words):
            respond(Script("x"), template, **fields)


class Weather(BaseModel):
    """Tells the weather."""

    city: str


class Caller(Script):
    """Calls the tool, and once there is a result, says it."""

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        prompt = TOKENIZER.decode(records[0].prompt_ids)
        self.text = "It rains." if "Rain in Ulm" in prompt else "Well. " + ONE["hermes"].replace('a\\"}', "Ulm")
        return super().streams(records)


def test_openais_client_calls_tools_by_its_own_helpers_and_sends_the_results() -> None:
    tools: Any = [openai.pydantic_function_tool(Weather, name="weather")]

    async def scenario() -> None:
        async with front_app(source=Caller("")) as front:
            client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{front.port}/v1", api_key="x", max_retries=0)
            async with client:
                said: list[Any] = [{"role": "user", "content": "How is Ulm?"}]
                parsed = await client.responses.parse(model="demo", input=said, tools=tools)
                async with client.responses.stream(model="demo", input=said, tools=tools) as stream:
                    events = [event async for event in stream]
                    final = await stream.get_final_response()
                for response in (parsed, final):
                    message, call = response.output
                    assert (message.type, call.type) == ("message", "function_call")
                    assert response.output_text == "Well. "
                    assert call.type == "function_call"
                    assert call.parsed_arguments == Weather(city="Ulm")
                snapshots = [
                    event.snapshot for event in events if event.type == "response.function_call_arguments.delta"
                ]
                assert snapshots[-1] == '{"city": "Ulm"}'
                [call] = [item for item in final.output if item.type == "function_call"]
                result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain in Ulm"}
                forms: list[Any] = [final.output, final.model_dump()["output"], final.to_dict()["output"]]
                for output in forms:
                    items: Any = [*said, *output, result]
                    told = await client.responses.parse(model="demo", input=items, tools=tools)
                    assert told.output_text == "It rains."

    asyncio.run(scenario())


def test_openais_types_know_every_event() -> None:
    for event in stream(Script("Well. " + TWO["hermes"])):
        assert type(event) is type(EVENT.validate_python(event.model_dump()))
        assert not event.model_extra
