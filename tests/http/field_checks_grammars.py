"""Checks of the fields that say what a text must match."""

from __future__ import annotations

import json
import re
from typing import Any

from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.grammars import NamedSchema, ResponseFormat, StructuredOutputs, TextFormat
from gptj_dist.answers.schema.responses import ResponsesRequest, TextOptions
from gptj_dist.answers.schema.sampling import ChoiceFields, SamplingFields
from tests.http.fields import CHECKS, Face, check, choice, ids

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
WHOLE = {"ignore_eos": False, "max_tokens": 60, "temperature": 1.0, "seed": 1}


def text(face: Face, **grammar: Any) -> str:
    """A text that ended by itself."""
    answer = choice(face, **WHOLE, structured_outputs=grammar)
    assert answer["finish_reason"] == "stop"
    return str(answer["text"])


def formatted(face: Face, body: type[ChoiceFields], **response_format: Any) -> str:
    answer = choice(Face(face.server, body), **WHOLE, response_format=response_format)
    assert answer["finish_reason"] == "stop"
    return str(answer["text"])


@check(SamplingFields)
def of_structured_outputs(face: Face) -> None:
    assert text(face, choice=["yes", "no"]) in ("yes", "no")
    refused = face.post(structured_outputs={"regex": "(a"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "structured_outputs")


@check(StructuredOutputs)
def of_json_schema(face: Face) -> None:
    assert json.loads(text(Face(face.server, CompletionRequest), json=SCHEMA)) in ({"a": 1}, {"a": 2})


@check(StructuredOutputs)
def of_json_object(face: Face) -> None:
    of_object, of_schema = (
        ids(Face(face.server, CompletionRequest), structured_outputs=grammar)
        for grammar in ({"json_object": True}, {"json": {"type": "object"}})
    )
    assert of_object == of_schema


@check(StructuredOutputs)
def of_regex(face: Face) -> None:
    assert re.fullmatch("[0-9]{3}x", text(Face(face.server, CompletionRequest), regex="[0-9]{3}x"))


@check(StructuredOutputs)
def of_choice(face: Face) -> None:
    assert text(Face(face.server, CompletionRequest), choice=["né"]) == "né"


@check(StructuredOutputs)
def of_grammar(face: Face) -> None:
    assert text(Face(face.server, CompletionRequest), grammar='start: "a" /b|c/') in ("ab", "ac")


@check(StructuredOutputs)
def of_disable_any_whitespace(face: Face) -> None:
    assert text(Face(face.server, CompletionRequest), json=SCHEMA, disable_any_whitespace=True).startswith('{"a":')


@check(StructuredOutputs)
def of_whitespace_pattern(face: Face) -> None:
    assert text(Face(face.server, CompletionRequest), json=SCHEMA, whitespace_pattern=" {2}").startswith('{  "a"  :')


@check(ChoiceFields)
def of_response_format(face: Face) -> None:
    fields = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}
    refused = face.post(**fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


@check(ResponseFormat)
def of_type(face: Face) -> None:
    face = Face(face.server, CompletionRequest)
    of_object, of_schema = (
        ids(face, **fields)
        for fields in (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"json_object": True}},
        )
    )
    assert of_object == of_schema
    assert ids(face, response_format={"type": "text"}) == ids(face)


def of_schema(face: Face) -> None:
    schema = {"name": "a", "strict": True, "schema": SCHEMA}
    assert json.loads(formatted(face, ChatRequest, type="json_schema", json_schema=schema)) in ({"a": 1}, {"a": 2})


CHECKS[ResponseFormat, "json_schema"] = CHECKS[NamedSchema, "schema_object"] = of_schema


def of_format(face: Face) -> None:
    format = {"type": "json_schema", "name": "a", "strict": True, "schema": SCHEMA}
    answer = Face(face.server, ResponsesRequest).post(**WHOLE, text={"format": format}).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) in ({"a": 1}, {"a": 2})
    assert answer["text"] == {"format": {"type": "json_schema", "schema": SCHEMA}}


CHECKS[TextOptions, "format"] = CHECKS[TextFormat, "type"] = CHECKS[TextFormat, "schema_object"] = of_format
