"""Calls of tools: what a text with them may be, how they are read, and what chat makes of them."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import InvalidRequestError
from gptj_dist.params import Grammar, SamplingParams
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.grammar import Grammars, NextTokens
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tool_calls import FORMATS, CallReader, ToolFormatName, calls_grammar, format_of
from gptj_dist.text.vocabulary import END_OF_TEXT, write_tokenizer
from gptj_dist.token_rules import TokenRules

TOKENIZER = Tokenizer.load(resolve_model("demo"))
BYTES = Grammars([bytes([byte]) for byte in range(256)], [])
EOS = 50256
LIMITS = EngineLimits(rules=TokenRules(50400), max_model_len=512, kv_tokens=1024, num_layers=28)

CLOSED: dict[str, Any] = {"additionalProperties": False}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], **CLOSED}
LEVEL = {"properties": {"to": {"$ref": "#/$defs/x"}}, "required": ["to"], "$defs": {"x": {"enum": [1, 2]}}, **CLOSED}
SCHEMAS: dict[str, Any] = {"weather": CITY, "set-level": LEVEL}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}
    for name, parameters in SCHEMAS.items()
]
HERMES = ChatTemplate(
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor +%}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    {},
)
PLAIN = ChatTemplate("{% for message in messages %}{{ message.content }}{# tools #}{% endfor %}", {})

ONE: dict[ToolFormatName, str] = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "a\\"}"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "a\\"}"}}]',
    "json": '{"name": "weather", "parameters": {"city": "a\\"}"}}',
}
TWO: dict[ToolFormatName, str] = {
    "hermes": ONE["hermes"] + '\n<tool_call>{"name":"set-level","arguments":{"to":2}}</tool_call>',
    "mistral": ONE["mistral"][:-1] + ', {"name": "set-level", "arguments": {"to": 2 }} ]',
}


def matches(grammar: Grammar, text: str) -> bool:
    matcher = BYTES.matcher(grammar)
    for byte in text.encode():
        if not matcher.next_tokens().allows(byte):
            return False
        matcher.consume([byte])
    return matcher.next_tokens().may_end


@pytest.mark.parametrize("name", FORMATS)
class TestGrammars:
    def test_a_text_that_must_call_is_a_call(self, name: ToolFormatName) -> None:
        grammar = calls_grammar(FORMATS[name], SCHEMAS, must_call=True, most=1)
        assert matches(grammar, ONE[name])
        for text in ("", "Hello", f"Hello {ONE[name]}", ONE[name] + "x", ONE[name].replace("weather", "other")):
            assert not matches(grammar, text)
        assert not matches(grammar, ONE[name].replace('"city"', '"town"'))
        assert name not in TWO or not matches(grammar, TWO[name])

    def test_a_text_that_may_call_is_free_until_it_does(self, name: ToolFormatName) -> None:
        grammar = calls_grammar(FORMATS[name], SCHEMAS, must_call=False, most=3)
        begin = "" if name == "json" else "I <ask> [TOOL: é\n "
        for text in ("", "Hello <tool_ca", "x {y} [TOOL_CALL]\n\n  z", ONE[name], begin + ONE[name]):
            assert matches(grammar, text)
        for text in (ONE[name][:-1], ONE[name] + " x", begin + ONE[name].replace("weather", "w")):
            assert not matches(grammar, text)

    def test_several_calls_are_at_most_as_many_as_may_be(self, name: ToolFormatName) -> None:
        if name in TWO:
            assert matches(calls_grammar(FORMATS[name], SCHEMAS, must_call=False, most=2), TWO[name])
            assert not matches(calls_grammar(FORMATS[name], SCHEMAS, must_call=False, most=1), TWO[name])

    def test_random_texts_are_calls_whose_arguments_are_valid(self, name: ToolFormatName) -> None:
        grammar = calls_grammar(FORMATS[name], SCHEMAS, must_call=True, most=2)
        draw = random.Random(3)
        for _ in range(10):
            matcher, text, tokens = BYTES.matcher(grammar), "", NextTokens(b"", may_end=False)
            while not (tokens.may_end and draw.random() < 0.5):
                tokens = matcher.next_tokens()
                chars = [chr(byte) for byte in range(32, 127) if tokens.allows(byte)]
                if not chars:
                    break
                text += draw.choice(['"'] if '"' in chars and draw.random() < 0.2 else chars)
                matcher.consume(text[-1].encode())
            said, calls, reader = TestReader.read(name, [text])
            assert (said, reader.ends_with_call) == ("", True), text
            for tool, arguments in calls:
                jsonschema.Draft202012Validator(SCHEMAS[tool]).validate(json.loads(arguments))


@pytest.mark.parametrize("name", FORMATS)
class TestReader:
    @staticmethod
    def read(name: ToolFormatName, pieces: Sequence[str]) -> tuple[str, list[tuple[str, Any]], CallReader]:
        reader, said, calls = CallReader(FORMATS[name]), "", list[list[str]]()
        for number, piece in enumerate(pieces, start=1):
            text, found = reader.push(piece, is_last=number == len(pieces))
            said += text
            for call in found:
                if call.name is not None:
                    assert call.number == len(calls)
                    calls.append([call.name, ""])
                calls[call.number][1] += call.arguments
        return said, [(tool, arguments) for tool, arguments in calls], reader

    def test_calls_are_the_same_however_the_text_is_cut(self, name: ToolFormatName) -> None:
        text = TWO.get(name, ONE[name])
        begin = "" if name == "json" else "It is <tool [TOO\n"
        expected = [("weather", '{"city": "a\\"}"}'), ("set-level", '{"to": 2 }' if name == "mistral" else '{"to":2}')]
        draw = random.Random(1)
        for _ in range(50):
            ends = sorted(draw.sample(range(1, len(begin + text)), 9))
            pieces = [(begin + text)[i:j] for i, j in zip([0, *ends], [*ends, None], strict=True)]
            said, calls, reader = self.read(name, pieces)
            assert (said, calls) == (begin, expected[: 2 if name in TWO else 1])
            assert reader.ends_with_call
        assert self.read(name, list(begin + text))[:2] == self.read(name, [begin + text])[:2]

    def test_a_text_without_calls_is_itself(self, name: ToolFormatName) -> None:
        for text in ("", " ", "Hello", "Hello <tool_call", "a [TOOL_CALLS", "x {", "a\n\n b"):
            said, calls, reader = self.read(name, list(text))
            assert (said, calls, reader.ends_with_call) == (text, [], False)

    def test_a_call_that_breaks_off_has_what_came_of_its_arguments(self, name: ToolFormatName) -> None:
        whole = ONE[name]
        for end in range(1, len(whole)):
            said, calls, reader = self.read(name, list(whole[:end]))
            assert said in whole[: len(FORMATS[name].mark) - 1]
            assert all('{"city": "a\\"}"}'.startswith(arguments) for _, arguments in calls)
            assert not reader.ends_with_call or '"a\\"}"}' in whole[:end]


def test_a_mark_that_is_a_special_token_is_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 300)
    added = {
        id: {"content": content, "special": True} for id, content in (("299", END_OF_TEXT), ("300", "<tool_call>"))
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<tool_call>") == [300]
    assert tokenizer.decode([299, 300]) == "<tool_call>"
    matcher = tokenizer.grammars.matcher(calls_grammar(FORMATS["hermes"], SCHEMAS, must_call=False, most=1))
    assert matcher.next_tokens().allows(300)
    assert not matcher.next_tokens().allows(299)


@dataclass
class Script:
    """A source whose every stream is a text, one token at a time."""

    text: str
    reason: FinishReason = FinishReason.STOP
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)

    def limits(self) -> EngineLimits:
        return LIMITS

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        self.asked.append((records[0].prompt_ids, records[0].params))
        return [self._stream() for _ in records]

    async def _stream(self) -> AsyncGenerator[Delta, None]:
        ids = [*TOKENIZER.encode(self.text), EOS]
        for number, id in enumerate(ids, start=1):
            yield Delta((id,), self.reason if number == len(ids) else None)


def request_of(**fields: Any) -> ChatRequest:
    given = {"messages": [{"role": "user", "content": "Hello"}], "tools": TOOLS} | fields
    return parse_body(json.dumps(given).encode(), ChatRequest)


def answer(
    script: Script, template: ChatTemplate = HERMES, tool_format: ToolFormatName | None = None, **fields: Any
) -> list[dict[str, Any]]:
    """The response, or the events of a stream."""
    texts = AnswerService(
        ServedModel(("demo",), TOKENIZER, (EOS,), template, ChatDefaults(tool_format=tool_format)), script
    )
    request = request_of(**fields)

    async def run() -> list[dict[str, Any]]:
        answer = await texts.chat(request, "7")
        if not request.stream:
            return [await answer.whole()]
        frames = b"".join([frame async for frame in answer.events()]).split(b"\n\n")
        return [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-2]]

    return asyncio.run(run())


def refusal(template: ChatTemplate = HERMES, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        answer(Script("x"), template, **fields)
    return raised.value


class TestChat:
    def test_the_template_of_the_examples_has_tools(self) -> None:
        source = (Path(__file__).parents[2] / "examples" / "tools.jinja").read_text("utf-8")
        script = Script(TWO["hermes"])
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}
        said = [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "Yes"},
        ]
        [body] = answer(script, ChatTemplate(source, {}), messages=said)
        assert len(body["choices"][0]["message"]["tool_calls"]) == 2
        assert script.asked[0][1].stop == ("\nuser:",)
        prompt = TOKENIZER.decode(script.asked[0][0])
        assert prompt.startswith('system: You may call these functions:\n<tools>\n{"type": "function", ')
        assert prompt.endswith(
            "\nuser: Rain?\n"
            'assistant: <tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>\n'
            "tool: <tool_response>Yes</tool_response>\nassistant:"
        )

    def test_a_response_has_the_calls_and_not_their_text(self) -> None:
        [body] = answer(Script("Well. " + TWO["hermes"]), n=2)
        for choice in ChatCompletion.model_validate(body).choices:
            calls = choice.message.tool_calls or []
            assert (choice.message.content, choice.finish_reason) == ("Well. ", "tool_calls")
            assert [call.type for call in calls] == ["function"] * 2
            assert [call.function.name for call in calls if call.type == "function"] == ["weather", "set-level"]
            assert [call.function.arguments for call in calls if call.type == "function"] == [
                '{"city": "a\\"}"}', '{"to":2}'
            ]  # fmt: skip
        ids = [call["id"] for choice in body["choices"] for call in choice["message"]["tool_calls"]]
        assert len(set(ids)) == 4
        assert all(re.fullmatch("[a-z0-9]{9}", id) for id in ids)
        assert answer(Script("Well. " + TWO["hermes"]), n=2)[0]["choices"] == body["choices"]

    def test_a_stream_names_a_call_and_then_brings_its_arguments(self) -> None:
        [body] = answer(Script(TWO["hermes"]))
        chunks = [ChatCompletionChunk.model_validate(event) for event in answer(Script(TWO["hermes"]), stream=True)]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert not any(delta.content for delta in deltas)
        found: list[dict[str, Any]] = []
        for call in (call for delta in deltas for call in delta.tool_calls or ()):
            assert call.function is not None
            if call.function.name is not None:
                assert call.index == len(found)
                function = {"name": call.function.name, "arguments": ""}
                found.append({"id": call.id, "type": call.type, "function": function})
            found[call.index]["function"]["arguments"] += call.function.arguments or ""
        assert found == body["choices"][0]["message"]["tool_calls"]
        assert len([delta for delta in deltas if delta.tool_calls]) > 8
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

    def test_a_text_without_a_call_is_an_answer(self) -> None:
        [body] = answer(Script("Hello <b>"))
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello <b>"}
        assert body["choices"][0]["finish_reason"] == "stop"

    def test_a_call_that_is_cut_ends_for_the_reason_that_cut_it(self) -> None:
        [body] = answer(Script(ONE["hermes"][:-20], FinishReason.LENGTH))
        assert body["choices"][0]["finish_reason"] == "length"

    def test_a_choice_decides_what_the_text_may_be(self) -> None:
        named = {"type": "function", "function": {"name": "weather"}}
        other = ONE["hermes"].replace("weather", "set-level").replace('{"city": "a\\"}"}', '{"to": 1}')
        for fields, expected in (
            ({}, (True, True, True, True)),
            ({"parallel_tool_calls": False}, (True, True, True, False)),
            ({"tool_choice": "required"}, (False, True, True, True)),
            ({"tool_choice": named}, (False, True, False, False)),
        ):
            script = Script("x")
            answer(script, **fields)
            grammar = script.asked[0][1].structured_outputs
            assert grammar is not None
            texts = ("Hello", ONE["hermes"], other, TWO["hermes"])
            assert tuple(matches(grammar, text) for text in texts) == expected

    def test_default_stop_strings_cut_no_call_that_must_be(self) -> None:
        for choice, stop in (("auto", ("\nuser:",)), ("required", ())):
            script = Script("x")
            answer(script, tool_choice=choice)
            assert script.asked[0][1].stop == stop
        answer(script := Script("x"), tool_choice="required", stop="a")
        assert script.asked[0][1].stop == ("a",)

    def test_the_template_shows_tools_calls_and_results(self) -> None:
        script = Script("x")
        call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}
        said = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        ]
        answer(script, messages=said, tools=TOOLS[:1])
        shown = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
        assert TOKENIZER.decode(script.asked[0][0]) == (
            f'{json.dumps(shown)}\nassistant: <tool_call>{{"name": "weather", "arguments": {{"city": "Ulm"}}}}'
            "</tool_call>\ntool: rain\nassistant:"
        )

    def test_without_a_choice_the_model_does_not_see_tools(self) -> None:
        script = Script(ONE["hermes"])
        [body] = answer(script, PLAIN, tool_choice="none")
        assert TOKENIZER.decode(script.asked[0][0]) == "Hello"
        assert script.asked[0][1].structured_outputs is None
        assert body["choices"][0]["message"]["content"] == ONE["hermes"]

    def test_a_tool_without_parameters_has_no_arguments(self) -> None:
        script = Script("x")
        answer(script, tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required")
        grammar = script.asked[0][1].structured_outputs
        assert grammar is not None
        assert matches(grammar, '<tool_call>{"name":"f","arguments":{}}</tool_call>')
        assert not matches(grammar, '<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>')

    def test_the_format_is_the_templates_or_the_settings(self) -> None:
        marks = ("{{ tools }}<tool_call>", "{{ tools }}[TOOL_CALLS]", '{{ tools }}{"name":')
        assert list(map(format_of, marks)) == list(FORMATS)
        for name in FORMATS:
            [body] = answer(Script(ONE[name]), tool_format=name)
            assert body["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "weather"

    @pytest.mark.parametrize(
        ("fields", "param", "words"),
        [
            ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "not one of the tools"),
            ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
            ({"tool_choice": "any"}, "tool_choice", '"none", "auto", "required" or'),
            ({"tools": TOOLS * 65}, "tools", "at most 128"),
            ({"tools": TOOLS * 2}, "tools", "'weather' twice"),
            ({"tools": [{"type": "custom"}]}, "tools.0.type", "'function'"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "1 to 64"),
            ({"functions": [{"name": "f"}]}, "functions", "use 'tools'"),
            ({"function_call": {"name": "f"}}, "function_call", "use 'tool_choice'"),
            ({"response_format": {"type": "json_object"}}, "tools", "contradict"),
            ({"structured_outputs": {"regex": "a"}}, "tools", "contradict"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, fields: dict[str, Any], param: str, words: str) -> None:
        error = refusal(**fields)
        assert error.param == param
        assert words in str(error)

    @pytest.mark.parametrize(
        "schema",
        [{"type": "string"}, {"not": {}}, {"properties": {f"p{i}": {} for i in range(600)}}, {"$ref": "#/$defs/x"}],
    )
    def test_parameters_that_cannot_be_enforced_are_refused(self, schema: dict[str, Any]) -> None:
        error = refusal(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])
        assert error.param == "tools"
        assert str(error).startswith("tools cannot be served: ")

    @pytest.mark.parametrize(
        ("call", "param"),
        [
            ({"id": "1", "function": {"name": "f", "arguments": "{"}}, "function.arguments"),
            ({"id": "1", "function": {"name": "f", "arguments": "[]"}}, "function.arguments"),
            ({"id": "1", "function": {"name": "f", "arguments": '{"a":' * 5000}}, "function.arguments"),
            ({"id": "1", "function": {"name": "f", "arguments": f'{{"a":"{"x" * 131_072}"}}'}}, "function.arguments"),
            ({"id": "1", "function": {"name": "f", "arguments": r'{"a":"\ud800"}'}}, "function.arguments"),
            ({"function": {"name": "f", "arguments": "{}"}}, "id"),
        ],
    )
    def test_an_earlier_call_that_cannot_be_read_is_refused_by_its_place(self, call: Any, param: str) -> None:
        error = refusal(messages=[{"role": "assistant", "tool_calls": [call]}])
        assert error.param == f"messages.0.tool_calls.0.{param}"

    def test_a_template_without_a_place_for_them_refuses_tools_and_calls(self) -> None:
        assert refusal(PLAIN).param == "tools"
        assert "--chat-template" in str(refusal(PLAIN))
        call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
        error = refusal(PLAIN, tools=[], messages=[{"role": "assistant", "tool_calls": [call]}])
        assert (error.param, str(error)) == ("messages", "the chat template shows no tool_calls")
