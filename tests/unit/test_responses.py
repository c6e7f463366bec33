"""OpenAI's responses, short of HTTP: its own client's types accept the body and every event."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.moderation import Moderation
from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.errors import InvalidRequestError, StageFailedError
from gptj_dist.text.chat import ChatTemplate
from tests.unit.test_service import EOS, TEMPLATE, TEXT, TOKENIZER, TOKENS, Script

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
OPENING = ["created", "in_progress", "output_item.added", "content_part.added"]
CLOSING = ["output_text.done", "content_part.done", "output_item.done"]


def service(
    script: Script, template: ChatTemplate | None = TEMPLATE, moderation: Moderation | None = None
) -> AnswerService:
    return AnswerService(
        ServedModel(("demo",), TOKENIZER, (EOS,), template, ChatDefaults(max_tokens=9)), script, moderation
    )


def request_of(**fields: Any) -> ResponsesRequest:
    return parse_body(json.dumps({"input": "Hello"} | fields).encode(), ResponsesRequest)


def respond(texts: AnswerService, **fields: Any) -> Any:
    """The response, which is one of OpenAI's type."""

    async def run() -> dict[str, Any]:
        return await (await texts.respond(request_of(**fields), "7")).whole()

    return Response.model_validate(asyncio.run(run()), strict=True)


def events_of(texts: AnswerService, **fields: Any) -> list[Any]:
    """The events of a stream; their names are also in their data, and their numbers count up."""

    async def run() -> bytes:
        answer = await texts.respond(request_of(stream=True, **fields), "7")
        return b"".join([frame async for frame in answer.events()])

    frames = asyncio.run(run()).decode().split("\n\n")[:-1]
    bodies = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert (name.removeprefix("event: "), number) == (body["type"], body["sequence_number"])
        bodies.append(EVENT.validate_python(body))
    return bodies


def prompt_of(script: Script) -> str:
    [(prompt_ids, _)] = script.asked
    return TOKENIZER.decode(prompt_ids)


class TestWhole:
    def test_a_response_is_openais(self) -> None:
        response = respond(service(Script()), metadata={"a": "b"}, temperature=0.5, instructions="Be brief.")
        assert (response.id, response.object, response.model) == ("resp_7", "response", "demo")
        assert response.output_text == TEXT
        assert response.usage is not None
        num_prompt = len(TOKENIZER.encode("system: Be brief.\nuser: Hello\nassistant:"))
        assert (response.usage.input_tokens, response.usage.output_tokens) == (num_prompt, len(TOKENS))
        assert response.usage.input_tokens_details.cached_tokens == 0
        assert response.usage.total_tokens == num_prompt + len(TOKENS)
        assert (response.metadata, response.temperature, response.instructions) == ({"a": "b"}, 0.5, "Be brief.")
        assert response.store is False

    def test_a_text_that_did_not_end_is_incomplete_and_one_that_did_is_complete(self) -> None:
        cut, ended = respond(service(Script())), respond(service(Script()), stop=[TEXT[4:8]])
        assert cut.status == cut.output[0].status == "incomplete"
        assert cut.incomplete_details is not None
        assert cut.incomplete_details.reason == "max_output_tokens"
        assert (ended.status, ended.incomplete_details, ended.output_text) == ("completed", None, TEXT[:4])

    def test_a_text_that_the_moderator_cut_says_so(self) -> None:
        moderation = Moderation(lambda _, role: "no" if role == "output" else None)
        response = respond(service(Script(), moderation=moderation))
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "content_filter"

    def test_log_probabilities_come_if_they_are_included(self) -> None:
        response = respond(service(Script()), include=["message.output_text.logprobs"], top_logprobs=2)
        [part] = response.output[0].content
        assert [token.logprob for token in part.logprobs] == [-token_id / 1000 for token_id in TOKENS]
        assert [len(token.top_logprobs) for token in part.logprobs] == [2] * len(TOKENS)
        assert respond(service(Script())).output[0].content[0].logprobs == []


class TestStream:
    def test_the_events_are_openais_in_order(self) -> None:
        names = [event.type.removeprefix("response.") for event in events_of(service(Script()))]
        assert names == [*OPENING, *["output_text.delta"] * len(TOKENS), *CLOSING, "incomplete"]
        assert events_of(service(Script()), stop=[TEXT[4:8]])[-1].type == "response.completed"

    def test_a_stream_gives_what_a_response_is(self) -> None:
        asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "stop": [TEXT[8:12]]}
        whole, stream = respond(service(Script()), **asked), events_of(service(Script()), **asked)
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        [done] = [event for event in stream if event.type == "response.output_text.done"]
        final = stream[-1].response
        assert "".join(delta.delta for delta in deltas) == done.text == final.output_text == whole.output_text
        logprobs = [token.logprob for token in whole.output[0].content[0].logprobs]
        assert [token.logprob for delta in deltas for token in delta.logprobs] == logprobs
        assert final.model_dump(exclude={"created_at"}) == whole.model_dump(exclude={"created_at"})

    def test_a_failure_under_way_is_a_failed_response_and_the_last_event(self) -> None:
        stream = events_of(service(Script(StageFailedError("stage 1 died"), num_before_error=2)))
        assert stream[-1].type == "response.failed"
        assert stream[-1].response.status == "failed"
        assert stream[-1].response.error.message == "stage 1 died"

    def test_an_error_before_the_first_token_is_raised(self) -> None:
        with pytest.raises(StageFailedError):
            events_of(service(Script(StageFailedError("stage 1 died"))))


class TestInput:
    def test_a_text_is_a_users_message_where_there_is_a_template(self) -> None:
        script = Script()
        respond(service(script))
        assert prompt_of(script) == "user: Hello\nassistant:"

    def test_a_text_is_continued_where_there_is_no_template(self) -> None:
        script = Script()
        respond(service(script, template=None))
        assert prompt_of(script) == "Hello"

    @pytest.mark.parametrize("fields", [{"instructions": "x"}, {"input": [{"role": "user", "content": "x"}]}])
    def test_a_conversation_needs_a_template(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError, match="--chat-template FILE"):
            respond(service(Script(), template=None), **fields)

    def test_what_came_out_goes_back_in(self) -> None:
        script = Script()
        output = respond(service(Script())).model_dump()["output"]
        question = {
            "role": "user",
            "content": [{"type": "input_text", "text": "And "}, {"type": "input_text", "text": "?"}],
        }
        respond(service(script), input=[{"role": "user", "content": "Hello"}, *output, question])
        assert prompt_of(script) == f"user: Hello\nassistant: {TEXT}\nuser: And ?\nassistant:"

    def test_the_servers_defaults_hold_where_the_request_says_nothing(self) -> None:
        script = Script()
        respond(service(script))
        respond(service(script), max_output_tokens=20, stop=["x"])
        [(_, silent), (_, stated)] = script.asked
        assert (silent.max_tokens, silent.stop) == (9, ("\nuser:",))
        assert (stated.max_tokens, stated.stop) == (20, ("x",))

    def test_what_clients_send_without_meaning_anything_is_accepted(self) -> None:
        silent: dict[str, Any] = {
            "store": False,
            "previous_response_id": None,
            "background": False,
            "tools": [],
            "tool_choice": "auto",
        }
        hints: dict[str, Any] = {
            "prompt_cache_key": "k",
            "safety_identifier": "u",
            "service_tier": "auto",
            "parallel_tool_calls": True,
        }
        texts: dict[str, Any] = {
            "text": {"format": {"type": "text"}, "verbosity": None},
            "reasoning": {"effort": None, "summary": None},
        }
        plain: dict[str, Any] = {
            "truncation": "disabled",
            "include": None,
            "stream_options": {"include_obfuscation": False},
        }
        assert respond(service(Script()), **silent, **hints, **texts, **plain).output_text == TEXT

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": 5}, "input"),
            (
                {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
                "input.0.content.0.image_url",
            ),
            ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input.0.type"),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
            ({"input": [{"type": ["message"], "role": "user", "content": "y"}]}, "input.0.type"),
            ({"input": ["x"]}, "input.0"),
            ({"input": [{"type": "function_call_output", "output": "y"}]}, "input.0.call_id"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"conversation": "c"}, "conversation"),
            ({"background": True}, "background"),
            ({"truncation": "auto"}, "truncation"),
            ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
            ({"reasoning": {"effort": "high"}}, "reasoning"),
            ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
            ({"include": ["file_search_call.results"]}, "include.0"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 1000}, "max_output_tokens"),
            ({"max_tokens": 5}, "max_tokens"),
            ({"n": 2}, "n"),
            ({"input": "word " * 200}, "input"),
        ],
    )
    def test_what_is_not_served_is_refused_by_name(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(InvalidRequestError) as raised:
            respond(service(Script()), **fields)
        assert raised.value.param == param

    def test_every_field_of_openais_client_is_known(self) -> None:
        of_the_client = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
        fields = set(inspect.signature(openai.OpenAI(api_key="x").responses.create).parameters) - of_the_client
        known = {*ResponsesRequest.model_fields, *ResponsesRequest.hints, *ResponsesRequest.unserved}
        assert fields - known == set()
